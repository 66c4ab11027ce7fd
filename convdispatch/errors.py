"""Every error of convdispatch.

::

    ConvDispatchError
    ├── ArgumentError (ValueError)        a wrong value: the message names the argument, what came, what would do
    ├── ArgumentTypeError (TypeError)     a wrong kind of thing
    ├── BackendError (RuntimeError)       a backend failed at something it said it could do
    ├── BackendRejectedError (ValueError) the backend that was asked for cannot do it, or no backend may
    ├── BusyMachineError (RuntimeError)   others use the machine, so that measuring would mislead
    ├── BackendUnavailableError (ImportError)  its module cannot be imported here
    ├── UnknownBackendError (ValueError)  no backend has this name
    ├── ClusterError (RuntimeError)       a Dask cluster cannot be reached, or none of its workers can tune
    ├── RegistrationError (ValueError)    two backends want one name, or a name is not usable
    ├── ProfileError (ValueError)         a profile file cannot be read or written as asked
    ├── ProfileMissError (LookupError)    the profile does not know a problem, and nothing else may decide
    └── WorkloadError (ValueError)        a workload is not one

``ProfileWarning`` is what a broken or foreign profile gives instead of an error: the call goes on as if the
profile were not there.
"""

import reprlib
import sys
import warnings
from types import FrameType


class ConvDispatchError(Exception):
    """The base of every error raised by convdispatch."""


class ArgumentError(ConvDispatchError, ValueError):
    """An argument has a wrong value."""


class ArgumentTypeError(ConvDispatchError, TypeError):
    """An argument is the wrong kind of thing."""


class BackendError(ConvDispatchError, RuntimeError):
    """A backend failed at something it said it could do."""


class BackendRejectedError(ConvDispatchError, ValueError):
    """A backend that was asked for cannot do the problem, or the options leave none that may; the message says why."""


class BackendUnavailableError(ConvDispatchError, ImportError):
    """A backend's module cannot be imported on this machine."""


class BusyMachineError(ConvDispatchError, RuntimeError):
    """Others use the machine, so that what is measured now would mislead; the message says what was seen."""


class UnknownBackendError(ConvDispatchError, ValueError):
    """No backend has this name."""


class ClusterError(ConvDispatchError, RuntimeError):
    """A Dask cluster cannot be reached, or none of its workers can tune."""


class RegistrationError(ConvDispatchError, ValueError):
    """A backend cannot be registered under this name."""


class ProfileError(ConvDispatchError, ValueError):
    """A profile cannot be read or written as asked."""


class ProfileMissError(ConvDispatchError, LookupError):
    """The profile has nothing that may be used for a problem, and ``tuning="replay"`` lets nothing else decide."""


class WorkloadError(ConvDispatchError, ValueError):
    """A workload cannot be understood."""


class ConvDispatchWarning(UserWarning):
    """The base of every warning by convdispatch."""


class ProfileWarning(ConvDispatchWarning):
    """A profile, or one entry of it, was passed over; the message says which and why."""


def warn(said: str, category: type[ConvDispatchWarning] = ConvDispatchWarning) -> None:
    """Warn whoever called convdispatch: the line that is shown is theirs."""
    level, frame = 1, sys._getframe()  # noqa: SLF001  # what the interpreter has for this
    while frame.f_back is not None and _is_ours(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(said), category, stacklevel=level)


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] == "convdispatch" or name in {"contextlib", "functools"}


_LONGEST = 80
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _LONGEST


def shown(value: object) -> str:
    """Return how a value is told of in an error: as Python writes it, but no longer than a line."""
    if shape := getattr(value, "shape", ()):
        return f"{type(value).__name__} of shape {shape}"
    try:
        text = _repr.repr(value)
    except ValueError:  # Python writes no whole number of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


#: Characters of a reason that is kept: why a candidate failed, say.
LONGEST_REASON = 300


def printable(text: str) -> str:
    r"""Return a text that somebody else may have written as it can be shown, line by line.

    What a terminal would obey, or cannot show, is written as Python writes it in a string: ``\x1b``.
    """
    if text.isprintable():
        return text
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_a_line(said: object, limit: int | None = None) -> str:
    """Return what an error says in one line that can be shown, of so many characters at most.

    It is cut between characters, not words: one long word, such as a path, may be all there is.
    """
    line = printable(" ".join(str(said).split()))
    return line if limit is None or len(line) <= limit else line[: limit - 3] + "..."
