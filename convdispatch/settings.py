"""Every option and environment variable with its default, in one table, and the scope they are changed in."""

import contextlib
import contextvars
import difflib
import functools
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from convdispatch.errors import ArgumentError, ArgumentTypeError, shown, warn
from convdispatch.said import whole_number

PREFIX = "CONVDISPATCH_"
TUNING = ("off", "on-miss", "online", "replay")
ISOLATION = ("off", "third-party", "all")
ON_MISS = ("raise", "warn")
EFFORTS = ("estimate", "measure", "patient", "exhaustive")
ACCURACIES = ("strict", "standard", "fast")

_Function = TypeVar("_Function", bound=Callable[..., Any])

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)


def _choice(name: str, allowed: tuple[str, ...]) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        text = str(value).strip().lower().replace("_", "-")
        if text not in allowed:
            raise ArgumentError(f"{name} must be one of {', '.join(allowed)}; got {shown(value)}")
        return text

    return parse


#: More threads than any machine has use for; profiles write them in four digits.
MOST_THREADS = 9999


def parse_threads(value: Any) -> int | None:
    """Return a thread count, or None for "as many as there are usable cores"."""
    if value is None or value == "":
        return None
    try:
        count = int(value) if isinstance(value, str) else whole_number(value)
    except ValueError:
        count = None
    if count is None:
        raise ArgumentTypeError(f"threads must be a whole number from 1 to {MOST_THREADS}, or None; got {shown(value)}")
    if not 1 <= count <= MOST_THREADS:
        raise ArgumentError(f"threads must be a whole number from 1 to {MOST_THREADS}, or None; got {shown(value)}")
    return count


def parse_bytes(value: Any) -> int | None:
    """Return a size in bytes from a number or a text such as ``"256MiB"``; None means no limit."""
    if value is None or value == "":
        return None
    if (count := whole_number(value)) is not None and count >= 0:
        return count
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ArgumentError(f"memory_limit must be bytes or a text such as '256MiB'; got {shown(value)}")
    number, unit, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " ")
    if not math.isfinite(size):
        raise ArgumentError(f"memory_limit must be bytes or a text such as '256MiB'; got {shown(value)}")
    return int(size)


def _number(value: Any) -> float:
    """Return a number, or a text's; NaN for what is none, which no comparison is true of."""
    if isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _accuracy(value: Any) -> str | float:
    if isinstance(value, str) and value.strip().lower() in ACCURACIES:
        return value.strip().lower()
    number = _number(value)
    if not 0 < number < 1:
        raise ArgumentError(
            f"accuracy must be one of {', '.join(ACCURACIES)}, or a relative error between 0 and 1; got {shown(value)}"
        )
    return number


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    names = list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(name, str) for name in names):
        raise ArgumentTypeError(f"forbid must be backend names, e.g. ('fft',); got {shown(value)}")
    return tuple(sorted(set(names)))


def user_file(name: str, value: Any) -> Path:
    """Return the file that a person names, as an absolute path: a program may go elsewhere.

    Args:
        name: what the argument is called.
        value: a path; ``~`` is its user's home, and ``~name`` that of another.

    Raises:
        ArgumentError, ArgumentTypeError: if it can be no file's path.
    """
    if not isinstance(value, str | os.PathLike):
        raise ArgumentTypeError(f"{name} must be a file's path; got {shown(value)}")
    text = os.fsdecode(value)
    if "\0" in text:
        raise ArgumentError(f"{name} must be a file's path, which no NUL is part of; got {shown(value)}")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        user = text.partition(os.sep)[0]
        raise ArgumentError(
            f"{name} must be a file's path; got {shown(value)}, and there is no home folder of {user}; "
            f"a folder of that name here is ./{user}"
        ) from None


def _path(name: str) -> Callable[[Any], Path | None]:
    def parse(value: Any) -> Path | None:
        return None if value is None or value == "" else user_file(name, value)

    return parse


def _share(value: Any) -> float:
    number = _number(value)
    if not 0 <= number <= 1:
        raise ArgumentError(f"online_budget must be a share between 0 and 1; got {shown(value)}")
    return number


def parse_time_limit(value: Any) -> float:
    """Return seconds from a number or a text."""
    number = _number(value)
    if not number >= 0:
        raise ArgumentError(f"time_limit must be seconds, 0 or more; got {shown(value)}")
    return number


#: option -> (parser, default, help). Each option is also read from ``CONVDISPATCH_<OPTION>``.
TABLE: Mapping[str, tuple[Callable[[Any], Any], Any, str]] = {
    "accuracy": (_accuracy, "standard", "error class a backend must meet: strict, standard, fast, or a number"),
    "effort": (
        _choice("effort", EFFORTS),
        "measure",
        "how hard on-miss tuning looks (estimate: not at all): " + ", ".join(EFFORTS),
    ),
    "forbid": (_names, (), "backends never to choose, separated by commas"),
    "isolation": (
        _choice("isolation", ISOLATION),
        "third-party",
        "whose candidates tuning first tries in a child process: " + ", ".join(ISOLATION),
    ),
    "memory_limit": (parse_bytes, None, "most workspace bytes a candidate may use, e.g. 256MiB"),
    "on_miss": (_choice("on_miss", ON_MISS), "raise", "what replay does about a miss: " + ", ".join(ON_MISS)),
    "online_budget": (_share, 0.02, "share of convolution time that online tuning may add"),
    "profile": (
        _path("profile"),
        None,
        "profile file of this project; read above the user's, and written instead of it",
    ),
    "threads": (parse_threads, None, "most threads a call may use; all usable cores where unset"),
    "time_limit": (
        parse_time_limit,
        10.0,
        "most seconds that on-miss tuning races a problem's candidates, once checked",
    ),
    "tuning": (_choice("tuning", TUNING), "off", "what an unmeasured problem causes: " + ", ".join(TUNING)),
}

#: The same of what holds for a whole process, and is no option of a block.
PROCESS: Mapping[str, tuple[Callable[[Any], Any], Any, str]] = {
    "record": (_path("record"), None, "workload file to add all calls of this program to, when it ends"),
}


@dataclass(frozen=True)
class Options:
    """One consistent set of options; hashable, so that decisions can be remembered under it."""

    accuracy: str | float
    effort: str
    forbid: tuple[str, ...]
    isolation: str
    memory_limit: int | None
    on_miss: str
    online_budget: float
    profile: Path | None
    threads: int | None
    time_limit: float
    tuning: str


@functools.cache
def from_environment() -> Options:
    """Read the options' defaults from the environment, once a process; warn of names that mean nothing."""
    known = [name.upper() for name in (*TABLE, *PROCESS)]
    for variable in sorted(os.environ):
        if variable.startswith(PREFIX) and (name := variable.removeprefix(PREFIX)) not in known:
            near = difflib.get_close_matches(name, known, n=1)
            all_known = ", ".join(sorted(PREFIX + each for each in known))
            hint = f"; did you mean {PREFIX}{near[0]}?" if near else f"; known: {all_known}"
            warn(f"environment variable {variable} means nothing to convdispatch{hint}")
    return Options(**{name: _from_variable(name, row) for name, row in TABLE.items()})


def _from_variable(name: str, row: tuple[Callable[[Any], Any], Any, str]) -> Any:
    variable, (parse, default, _) = PREFIX + name.upper(), row
    given = os.environ.get(variable, "")
    try:
        return parse(given) if given.strip() else default  # an empty one is as good as none
    except (ArgumentError, ArgumentTypeError) as error:
        warn(f"environment variable {variable} is ignored: {error}")
        return default


def record_path() -> Path | None:
    """Return the file that this program's calls are to be recorded in, if any."""
    return cast("Path | None", _from_variable("record", PROCESS["record"]))


class _Scope(NamedTuple):
    """The options of a block, whose it is, and the block around it."""

    chosen: Options
    owner: "options"
    around: "_Scope | None"

    def without(self, owner: "options") -> "_Scope | None":
        """Return what is left when the innermost block of an owner ends, whichever blocks have begun within it."""
        if self.owner is owner:
            return self.around
        return self.owner.within(self.around and self.around.without(owner))


_scope: contextvars.ContextVar[_Scope | None] = contextvars.ContextVar("convdispatch_options", default=None)


def current() -> Options:
    """Return the options in force here: those of the innermost ``options(...)`` block, else the defaults."""
    scope = _scope.get()
    return from_environment() if scope is None else scope.chosen


def unrestricted(accuracy: str) -> Options:
    """Return the options in force, but with no backend forbidden, memory without limit, and this accuracy class."""
    return replace(current(), forbid=(), accuracy=accuracy, memory_limit=None)


class options(contextlib.ContextDecorator):  # noqa: N801  # it is called like a function
    """Change options within a ``with`` block, for this thread or task only; or in a function that it decorates.

    The function may be a coroutine's, but no generator's: what runs between its values is somebody else's.

    It may be kept and entered again and again; outside of blocks it changes nothing.

    Args:
        **changes: any of ``accuracy``, ``effort``, ``forbid``, ``isolation``, ``memory_limit``, ``on_miss``,
            ``online_budget``, ``profile``, ``threads``, ``time_limit``, ``tuning``;
            ``convdispatch.settings.TABLE`` says what each means.

    Raises:
        ArgumentTypeError: for an option that does not exist, or one of the wrong kind.
        ArgumentError: for a value that an option cannot take.

    Examples:
        >>> with options(threads=1, accuracy="strict") as chosen:
        ...     chosen.threads
        1
    """

    def __init__(self, **changes: Any) -> None:
        names = [f.name for f in fields(Options)]
        for name in changes:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"options are {', '.join(names)}"
                raise ArgumentTypeError(f"options() got {name!r}; {hint}")
        self._changes = {name: TABLE[name][0](value) for name, value in changes.items()}

    def __enter__(self) -> Options:
        """Return the options in force inside the block."""
        scope = self.within(_scope.get())
        _scope.set(scope)
        return scope.chosen

    def within(self, around: _Scope | None) -> _Scope:
        """Return the scope of this block in another, or in none."""
        outside = from_environment() if around is None else around.chosen
        return _Scope(replace(outside, **self._changes), self, around)

    def __exit__(self, *_: object) -> None:
        if (scope := _scope.get()) is not None:
            _scope.set(scope.without(self))

    def __call__(self, function: _Function) -> _Function:
        """Return the function, to be run under these options."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ArgumentTypeError(
                f"options() cannot decorate a generator; got {function.__name__}: write a with block in it"
            )
        if not inspect.iscoroutinefunction(function):
            return super().__call__(function)

        @functools.wraps(function)
        async def under_options(*args: Any, **more: Any) -> Any:
            with self:
                return await function(*args, **more)

        return cast("_Function", under_options)

    def __repr__(self) -> str:
        return f"options({', '.join(f'{name}={value!r}' for name, value in self._changes.items())})"
