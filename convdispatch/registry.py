"""Finds backends by name: built in, installed (entry points), and registered in this process.

Nothing is imported before it is asked for. What fails to import is kept as unavailable, with the reason.
"""

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar, overload

import numpy as np

from convdispatch import settings
from convdispatch.arguments import Array
from convdispatch.backend import Backend, Config, Kernel, Numerics
from convdispatch.errors import (
    ArgumentTypeError,
    BackendError,
    BackendUnavailableError,
    ConvDispatchError,
    RegistrationError,
    UnknownBackendError,
    shown,
    warn,
)
from convdispatch.locks import module_rlock
from convdispatch.machine import Machine
from convdispatch.problem import Problem
from convdispatch.said import LARGEST, whole_number

ENTRY_POINTS = "convdispatch.backends"
_NAME = re.compile(r"[a-z][a-z0-9_.-]*")

Convolve = Callable[[Array, Array, Problem], Array]
Registered = TypeVar("Registered", bound=type[Backend] | Backend | Convolve)


@dataclass(frozen=True)
class FunctionKernel:
    """A plain function with its filters, as a kernel."""

    name: str
    function: Convolve
    problem: Problem
    filters: Array

    def __call__(self, input: Array, out: Array, residual: Array | None) -> None:  # noqa: ARG002
        """Run the function on read-only arrays and store what it returns."""
        view = input.view()
        view.flags.writeable = False
        result = np.asarray(self.function(view, self.filters, self.problem))
        if result.shape != out.shape:
            raise BackendError(f"backend {self.name!r} returned shape {result.shape} instead of {out.shape}")
        if not np.can_cast(result.dtype, out.dtype, "same_kind"):
            raise BackendError(f"backend {self.name!r} returned {result.dtype} instead of {out.dtype}")
        out[...] = result


class FunctionBackend(Backend):
    """A backend made of one function ``f(x, w, problem) -> y``, NHWC and HWIO, without epilogue."""

    def __init__(
        self,
        name: str,
        function: Convolve,
        *,
        version: int = 1,
        numerics: Numerics | None = None,
        rejects: Callable[[Problem], str | None] | None = None,
    ) -> None:
        """Wrap a function; see ``register``."""
        self.name = name  # type: ignore[misc]  # a class attribute elsewhere; here each instance has its own
        self.version = version  # type: ignore[misc]
        self.numerics = numerics or Numerics()  # type: ignore[misc]
        self.function = function
        self._rejects = rejects

    def rejects(self, problem: Problem) -> str | None:
        """Return the reason of the ``rejects`` function given, or None."""
        return self._rejects(problem) if self._rejects else None

    def workspace(self, problem: Problem, config: Config) -> int:  # noqa: ARG002
        """Return the bytes of the one result that is known of: a fresh output."""
        return int(np.prod((problem.n, problem.oh, problem.ow, problem.k))) * 8

    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float | None:  # noqa: ARG002
        """Return None: nothing is known of a plain function before it has been measured."""
        return None

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:  # noqa: ARG002
        """Keep a read-only copy of the filters for the function."""
        kept = np.array(filters, order="C")
        kept.flags.writeable = False
        return FunctionKernel(self.name, self.function, problem, kept)


class _Registry:
    """The state: what was registered, what was found and not yet loaded, what failed to load."""

    def __init__(self) -> None:
        self.lock = module_rlock()
        self.generation = 0
        self.registered: dict[str, Backend] = {}
        self.loaded: dict[str, Backend] = {}
        self.failed: dict[str, str] = {}
        self.hidden: set[str] = set()
        self.doubted: set[str] = set()
        self._found: dict[str, Callable[[], Any]] | None = None

    @property
    def found(self) -> dict[str, Callable[[], Any]]:
        """Loaders of built-in and installed backends by name, in order of discovery."""
        if self._found is None:
            package = importlib.import_module("convdispatch.backends")
            loaders: dict[str, Callable[[], Any]] = {}
            for module in pkgutil.iter_modules(package.__path__):
                if not module.name.startswith("_"):
                    # numba_.py holds "numba": a file called numba.py could shadow the library.
                    loaders[module.name.rstrip("_")] = _module_loader(f"{package.__name__}.{module.name}")
            for point in metadata.entry_points(group=ENTRY_POINTS):
                if point.name in loaders:
                    self.failed[f"{point.name} ({point.value})"] = f"the name {point.name!r} is taken"
                else:
                    loaders[point.name] = point.load
            self._found = loaders
        return self._found


_registry = _Registry()


def _module_loader(module_name: str) -> Callable[[], type[Backend]]:
    def load() -> type[Backend]:
        module = importlib.import_module(module_name)
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Backend) and value.__module__ == module_name:
                return value
        raise RegistrationError(f"{module_name} defines no backend")

    return load


def _instance(name: str, value: Any, **about: Any) -> Backend:
    """Make a backend of whatever someone offers under a name.

    Its name and version are as profiles write them afterwards: a plain text and a plain whole number.
    """
    if not _NAME.fullmatch(name):
        raise RegistrationError(f"a backend's name must match {_NAME.pattern}; got {name!r}")
    if isinstance(value, type) and issubclass(value, Backend):
        if inspect.isabstract(value):
            missing = ", ".join(sorted(value.__abstractmethods__))
            raise RegistrationError(f"backend {name!r} must define {missing}")
        value = value()
    elif callable(value) and not isinstance(value, Backend | type):
        value = FunctionBackend(name, value, **about)
        about = {}
    if not isinstance(value, Backend):
        raise RegistrationError(
            f"backend {name!r} must be a Backend, a subclass of it, or a function f(x, w, problem); got {value!r}"
        )
    if about:
        raise RegistrationError(f"backend {name!r} is a class: it says {', '.join(about)} itself")
    if getattr(value, "name", name) != name:
        raise RegistrationError(f"backend {name!r} calls itself {value.name!r}; the two names must agree")
    value.name = str(name)  # type: ignore[misc]
    version = whole_number(value.version)
    if version is None or abs(version) > LARGEST:
        raise RegistrationError(f"backend {name!r} must have a whole number as version; got {shown(value.version)}")
    if type(value.version) is not int:
        value.version = version  # type: ignore[misc]
    return value


@overload
def register(
    name: str,
    *,
    replace: bool = False,
    version: int = 1,
    numerics: Numerics | None = None,
    rejects: Callable[[Problem], str | None] | None = None,
) -> Callable[[Registered], Registered]: ...
@overload
def register(name: Registered, *, replace: bool = False) -> Registered: ...


def register(name: Any, *, replace: bool = False, **about: Any) -> Any:
    """Add a backend to this process.

    It is checked against the reference and raced before it may be chosen: run ``tune``, or set
    ``tuning="on-miss"``. Asking for it by name (``backend="mine"``) needs neither.

    Args:
        name: the backend's name (then this is a decorator), or a ``Backend`` subclass or instance.
        replace: whether a backend of that name may be there already.
        **about: for a plain function ``f(x, w, problem)``: ``version`` (raise it when the function changes),
            ``numerics`` (without, each output must be a sum over its own window; FFTs and the like must say
            ``Numerics("transform", ...)``), and ``rejects``, a function from a problem to a reason or None.

    Returns:
        The function or class, unchanged, so that this works as a decorator.

    Raises:
        RegistrationError: if the name is taken or unusable, or the thing is no backend.
        ArgumentTypeError: if what is said about a function is not of these, or of the wrong kind.

    Examples:
        >>> import numpy as np
        >>> @register("pointwise", rejects=lambda p: None if p.is_pointwise and p.strides == (1, 1)
        ...           and p.groups == 1 else "only unit-stride 1x1 filters")
        ... def pointwise(x, w, problem):
        ...     return x @ w[0, 0]
        >>> unregister("pointwise")
    """
    _check_about(about)
    if isinstance(name, str):

        def decorate(value: Any) -> Any:
            _add(name, value, replace, {key: item for key, item in about.items() if item is not None})
            return value

        return decorate
    own = getattr(name, "name", None)
    if not isinstance(own, str):
        raise RegistrationError(f"register needs a name: register('mine')(...); got {name!r}")
    _add(own, name, replace, about)
    return name


_ABOUT: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "version": ("an int", lambda value: whole_number(value) is not None),
    "numerics": ("a Numerics", lambda value: isinstance(value, Numerics)),
    "rejects": ("a function from a problem to a reason or None", callable),
}


def _check_about(about: dict[str, Any]) -> None:
    for key, value in about.items():
        if key not in _ABOUT:
            near = difflib.get_close_matches(key, _ABOUT, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"a function's are {', '.join(_ABOUT)}"
            raise ArgumentTypeError(f"register takes no {key!r}; {hint}")
        what, is_right = _ABOUT[key]
        if value is not None and not is_right(value):
            raise ArgumentTypeError(f"{key} must be {what}; got {value!r}")


def _add(name: str, value: Any, replace: bool, about: dict[str, Any]) -> None:
    backend = _instance(name, value, **about)
    with _registry.lock:
        if name in names() and not replace:
            raise RegistrationError(f"there is a backend {name!r} already; pass replace=True to take its place")
        _registry.registered[name] = backend
        _registry.hidden.discard(name)
        _registry.generation += 1


def unregister(name: str) -> None:
    """Take a backend out of this process, a built-in or installed one too.

    Raises:
        UnknownBackendError: if there is none of that name.
    """
    with _registry.lock:
        if name not in names():
            raise _unknown(name)
        if _registry.registered.pop(name, None) is None:
            _registry.hidden.add(name)
        _registry.generation += 1


def restore() -> None:
    """Undo every ``register`` and ``unregister`` of this process."""
    with _registry.lock:
        _registry.registered.clear()
        _registry.hidden.clear()
        _registry.generation += 1


def generation() -> int:
    """Return a number that changes whenever the set of backends does."""
    return _registry.generation


def names() -> tuple[str, ...]:
    """Return the names of all backends, available or not."""
    with _registry.lock:
        found = [name for name in _registry.found if name not in _registry.hidden]
        return tuple(dict.fromkeys(found + list(_registry.registered)))


def _unknown(name: str) -> UnknownBackendError:
    near = difflib.get_close_matches(str(name), names(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names())}"
    return UnknownBackendError(f"no backend is called {name!r}; {hint}")


def get(name: str) -> Backend:
    """Return a backend, importing it if need be.

    Raises:
        UnknownBackendError: if there is none of that name.
        BackendUnavailableError: if it cannot be imported here; the message says why.
    """
    backend = _registry.registered.get(name) or _registry.loaded.get(name)
    if backend is not None and name not in _registry.hidden:
        return backend
    with _registry.lock:
        if name in _registry.hidden or name not in _registry.found:
            raise _unknown(name)
        return _loaded(name)


def _loaded(name: str) -> Backend:
    """Return a built-in or installed backend; to be called by who holds the lock."""
    if (backend := _registry.loaded.get(name)) is not None:
        return backend
    if name not in _registry.failed:
        try:
            return _registry.loaded.setdefault(name, _instance(name, _registry.found[name]()))
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever an import may do
            reason = str(error) if isinstance(error, ConvDispatchError) else f"{type(error).__name__}: {error}"
            _registry.failed[name] = reason
    raise BackendUnavailableError(f"backend {name!r} is unavailable: {_registry.failed[name]}")


def built_in(name: str) -> Backend:
    """Return one of convdispatch's own backends, whatever is registered under its name, or taken out.

    Raises:
        BackendUnavailableError: if it cannot be imported here; the message says why.
    """
    with _registry.lock:
        return _loaded(name)


def origin(backend: Backend) -> str:
    """Return where a backend's code is: ``module:name`` of its class, or of the function it was made of."""
    code: Any = backend.function if isinstance(backend, FunctionBackend) else type(backend)
    code = code if hasattr(code, "__qualname__") else type(code)
    return f"{code.__module__}:{code.__qualname__}"


def is_built_in(backend: Backend) -> bool:
    """Return whether a backend is one of convdispatch's own."""
    return type(backend).__module__.startswith("convdispatch.backends.")


def installed(backend: Backend) -> bool:
    """Return whether any process finds this backend by its name, without it being registered there."""
    return _registry.loaded.get(backend.name) is backend


def available() -> dict[str, Backend]:
    """Return every backend that can be imported, by name.

    Whoever chooses asks this, so it is here that a forbidden name which nobody has is noticed.
    """
    _doubt(settings.current().forbid)
    found = {}
    for name in names():
        try:
            found[name] = get(name)
        except BackendUnavailableError:
            continue
    return found


def _doubt(forbidden: tuple[str, ...]) -> None:
    """Warn, once a name, of forbidden names that no backend has now: a misspelt one forbids nothing."""
    for name in forbidden:
        if name in _registry.doubted or name in _registry.registered or name in _registry.found:
            continue
        _registry.doubted.add(name)
        warn(f"forbid names {name!r}, which forbids nothing: {_unknown(name)}")


def unavailable() -> dict[str, str]:
    """Return why each unavailable backend is so, by name."""
    available()
    elsewhere = _registry.hidden.union(_registry.registered)
    return {name: reason for name, reason in _registry.failed.items() if name not in elsewhere}
