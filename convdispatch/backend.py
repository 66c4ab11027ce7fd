"""The contract between an algorithm and the rest of convdispatch.

A backend is stateless: it says what it cannot do, which configs are worth trying, what each costs, and prepares
kernels. It never sees the profile, the tuner or the dispatcher, and it sees only as much of a problem as it
declares it can do (``seen_by``): the plan around it converts layouts and dtypes, applies epilogues, and keeps
NaN and infinity where they belong.
"""

import difflib
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from convdispatch.arguments import Array
from convdispatch.epilogue import Epilogue
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine
from convdispatch.problem import Problem
from convdispatch.said import Value, bytes_said, plain_value, reason_said, seconds_said

Effort = Literal["estimate", "measure", "patient", "exhaustive"]


class Config(Mapping[str, Value]):
    """A backend's tuning choice for one problem: self-describing key/values, immutable and hashable.

    Examples:
        >>> Config(m=4, threads=2)
        Config(m=4, threads=2)
        >>> Config(m=4)["m"]
        4
    """

    __slots__ = ("_hash", "_items", "_key")

    def __init__(self, items: Mapping[str, Value] | None = None, /, **more: Value) -> None:
        """Make a config from a mapping, keyword arguments, or both.

        Raises:
            ArgumentError, ArgumentTypeError: for what is no plain value: a number, a text, a truth value.
        """
        given = {key: plain_value(key, value) for key, value in {**(items or {}), **more}.items()}
        self._items = dict(sorted(given.items()))
        # True and 1.0 are equal to 1, and something else to a backend.
        self._key = tuple((key, type(value), value) for key, value in self._items.items())
        self._hash = hash(self._key)

    def __getitem__(self, key: str) -> Value:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self._key == other._key

    def __reduce__(self) -> tuple[type["Config"], tuple[dict[str, Value]]]:
        return Config, (self._items,)

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{key}={value!r}' for key, value in self._items.items())})"

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self._items.items())

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole-numbered value.

        Raises:
            ArgumentError: if it is missing without a default, or not a whole number.
        """
        value = self._items.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ArgumentError(f"config needs a whole number {key!r}; got {value!r} in ({self})")
        return value

    @property
    def threads(self) -> int:
        """How many threads the kernel may use; 1 where the config does not say."""
        return self.integer("threads", 1)


@functools.cache
def epsilon(dtype: str) -> float:
    """Return the eps of a float dtype: the gap between 1 and the next number."""
    return float(np.finfo(dtype).eps)


#: What an epilogue adds to an error at most, in units of eps: bias, residual and activation round once or twice each.
EPILOGUE_GROWTH = 8


def plain_growth(problem: Problem, config: Config | None = None) -> float:  # noqa: ARG001  # the same for all configs
    """Return the classical bound of a dot product, n * u, in units of eps = 2u, with a little room."""
    return problem.taps / 2 + 4


@dataclass(frozen=True)
class Numerics:
    """What a backend does to accuracy.

    Attributes:
        kind: ``"local"``: each output is a sum over its own window, so ``|y - exact| <= growth * eps *
            conv(|x|, |w|)`` element by element. ``"transform"``: windows are mixed, so the bound is only
            normwise, ``growth * eps * ||x|| * ||w||`` with the 2-norms of an image and of a filter.
        growth: the factor in that bound for a problem and a config.
        deterministic: whether the same call gives the same bits.
    """

    kind: Literal["local", "transform"] = "local"
    growth: Callable[[Problem, Config], float] = plain_growth
    deterministic: bool = True


class Kernel(Protocol):
    """What ``prepare`` returns: filters packed, ready to run again and again, from many threads at once.

    Must be picklable, and must not change ``input`` or itself when called. It may have a method ``entry``, which takes
    shape and dtype of the input and of ``out``, and returns a faster way in, or None: a function of two such arrays,
    and of the residual where there is one, that answers True if it has done all, and anything else where the plan is to
    call the kernel.
    """

    def __call__(self, input: Array, out: Array, residual: Array | None) -> bool | None:
        """Convolve ``input`` ``[N, H, W, C]`` into ``out`` ``[N, OH, OW, K]``.

        ``residual`` is of ``out``'s shape and present only if the problem's epilogue says so. Arrays are
        C-contiguous, in the problem's data format (of those that the backend declared) and dtypes; those of a
        ``strided`` backend are NHWC views of any strides.
        """
        ...


class Backend(ABC):
    """One algorithm. Subclass it, give it a ``name``, register it; nothing else in the package changes.

    Attributes:
        name: stable identity, stored in profiles; never renamed.
        version: raise it when the kernels change; measurements of other versions are then ignored.
        numerics: what it does to accuracy.
        parallel: whether ``config["threads"]`` means something to it; one-thread candidates only if not.
        strided: whether its kernels read and write NHWC views of any strides (NCHW arrays among them).
        fuses_epilogue: whether its kernels apply bias, residual and activation themselves. The kernels of a
            transform that does so return whether any sum was NaN or infinite, since an activation can hide it.
        formats: the data formats its kernels load and store themselves; the plan converts others to NHWC.
        native_dtypes: the dtypes its kernels load themselves. The plan turns others into the problem's
            ``sum_dtype``: float16 and bfloat16 into float32, small integers into int32.
        packing_cost: about how many seconds ``prepare`` takes, and how many for each byte of the filters. ``conv2d``
            packs them in every call, and is estimated with these until this machine is calibrated.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    numerics: ClassVar[Numerics] = Numerics()
    parallel: ClassVar[bool] = False
    strided: ClassVar[bool] = False
    fuses_epilogue: ClassVar[bool] = False
    formats: ClassVar[frozenset[str]] = frozenset(("NHWC",))
    native_dtypes: ClassVar[frozenset[str]] = frozenset(("float32", "float64", "int32", "int64"))
    packing_cost: ClassVar[tuple[float, float]] = (1e-5, 3e-10)

    @abstractmethod
    def rejects(self, problem: Problem) -> str | None:
        """Return why this problem cannot be done, in words that can follow "it cannot:", or None."""

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Config]:  # noqa: ARG002
        """Return the configs worth trying at this effort, the default first, without thread counts."""
        return (Config(),)

    @abstractmethod
    def workspace(self, problem: Problem, config: Config) -> int:
        """Return the scratch bytes of one call besides input, packed filters and output."""

    @abstractmethod
    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float | None:
        """Return the predicted seconds of one call with packed filters; None if it cannot tell."""

    @abstractmethod
    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:
        """Pack the filters and return a kernel.

        Args:
            problem: as ``seen_by`` shows it to this backend; not rejected, not empty.
            filters: ``[KH, KW, C // groups, K]``, any strides, of the problem's dtype; must be copied or packed.
            bias: ``[K]`` of the sums' dtype, present only if the problem's epilogue says so.
            config: one of ``configs``, or what a person or a profile wrote.

        Raises:
            ArgumentError: if the config makes no sense for the problem.
        """

    def __repr__(self) -> str:
        return f"<backend {self.name} version {self.version}>"


@functools.lru_cache(maxsize=4096)
def seen_by(backend: Backend, problem: Problem) -> Problem:
    """Return the problem with what the backend leaves to the plan taken out of it."""
    changes: dict[str, Any] = {}
    if problem.data_format not in backend.formats:
        changes["data_format"] = "NHWC"
    if problem.dtype not in backend.native_dtypes:
        changes["dtype"] = problem.sum_dtype
    if problem.epilogue and not backend.fuses_epilogue:
        changes["epilogue"] = Epilogue()
    return problem.replace(**changes) if changes else problem


def rejection(backend: Backend, problem: Problem) -> str | None:
    """Return a backend's reason against a problem, in words, or None."""
    return reason_said(backend.rejects(seen_by(backend, problem)))


def configs_of(backend: Backend, problem: Problem, effort: Effort) -> list[Config]:
    """Return the configs that a backend names for a problem; plain mappings become configs.

    Raises:
        ArgumentError, ArgumentTypeError: if one is none.
    """
    named = backend.configs(seen_by(backend, problem), effort)
    return [config if isinstance(config, Config) else Config(config) for config in named]


def candidate_name(backend: str, config: Config) -> str:
    """Return a candidate as people write it: the backend's name, with the config in brackets if there is any."""
    return f"{backend}({config})" if config else backend


@dataclass(frozen=True)
class Candidate:
    """A backend with one of its configs: what is timed, chosen and stored."""

    backend: Backend
    config: Config

    @property
    def name(self) -> str:
        """The candidate as people write it, e.g. ``winograd(m=4, threads=2)``."""
        return candidate_name(self.backend.name, self.config)

    def __str__(self) -> str:
        return self.name

    def rejects(self, problem: Problem) -> str | None:
        """Return the backend's reason against the problem, or None."""
        return rejection(self.backend, problem)

    def check_keys(self, problem: Problem) -> None:
        """Raise an ``ArgumentError`` for a key that the backend would pass over: a misspelt one, say."""
        if problem.is_trivial:
            return
        known = _known_keys(self.backend, problem)
        for key in self.config:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
                raise ArgumentError(f"backend {self.backend.name!r} has no config {key!r}; {hint}")

    def workspace(self, problem: Problem) -> int:
        """Return the scratch bytes of one call, those of the plan's own conversions included.

        Raises:
            BackendError: if what the backend says is no number of bytes.
        """
        if problem.is_trivial:
            return 0
        seen = seen_by(self.backend, problem)
        own = bytes_said(self.backend.name, self.backend.workspace(seen, self.config))
        return own + _conversion_bytes(self.backend, problem, seen)

    def estimate(self, problem: Problem, machine: Machine) -> float | None:
        """Return the predicted seconds of one call, or None if the backend cannot tell.

        It cannot if it says anything that is no time of a call, as zero, less, infinity and NaN are.

        Raises:
            BackendError: if what it says is no number at all.
        """
        if problem.is_trivial:
            return 0.0
        seen = seen_by(self.backend, problem)
        seconds = seconds_said(self.backend.name, self.backend.estimate(seen, self.config, machine))
        if seconds is None:
            return None
        return seconds + _conversion_bytes(self.backend, problem, seen) / _COPY_BYTES_PER_SECOND


@functools.lru_cache(maxsize=64)
def _known_keys(backend: Backend, problem: Problem) -> frozenset[str]:
    return frozenset(key for each in configs_of(backend, problem, "exhaustive") for key in each) | {"threads"}


#: What converting an array costs: read, convert, write, on one core.
_COPY_BYTES_PER_SECOND = 3e9
_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int8": 1, "uint8": 1, "int16": 2,
               "uint16": 2, "int32": 4, "int64": 8}  # fmt: skip


def item_bytes(dtype: str) -> int:
    """Return the bytes of one element of a dtype named as in ``problem.DTYPES``."""
    return _ITEM_BYTES[dtype]


def _conversion_bytes(backend: Backend, problem: Problem, seen: Problem) -> int:
    """Return the bytes of the copies a plan makes around a kernel: other layout, other dtype."""
    if seen is problem:
        return 0
    relayout = problem.data_format != seen.data_format and not backend.strided
    widened = seen.result_dtype != problem.result_dtype
    output = math.prod(seen.output_shape) * item_bytes(seen.result_dtype)
    total = 0
    if relayout or seen.dtype != problem.dtype:
        total += math.prod(seen.input_shape) * item_bytes(seen.dtype)
    if relayout or widened:
        total += output
    if problem.epilogue.residual:
        total += output * (widened + (relayout and seen.epilogue.residual))
    return total
