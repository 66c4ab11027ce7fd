"""Where somebody may watch a program's calls. Nobody does, as a rule, and then a call pays for one comparison."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Result = TypeVar("Result")
#: Told of a call that ended well: its problem, deployment, thread budget (None: unknown) and seconds.
Observer = Callable[[Any, str, int | None, float], None]

#: Who watches, for all threads of the process; ``watch`` sets it.
observer: Observer | None = None


class _Thread(threading.local):
    """What a thread is doing."""

    quiet = False


_here = _Thread()


def watch(new: Observer | None) -> None:
    """Have every call from now on told to ``new``; to nobody where it is None."""
    global observer  # noqa: PLW0603  # a plain global is what a call can test at no cost
    observer = new


def is_watched() -> bool:
    """Return whether a call that this thread begins now is to be told."""
    return observer is not None and not _here.quiet


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Tell nothing of this thread's calls inside: they are part of another call, or of measuring."""
    before, _here.quiet = _here.quiet, True
    try:
        yield
    finally:
        _here.quiet = before


def timed(problem: Any, deployment: str, threads: int | None, run: Callable[[], Result]) -> Result:
    """Run a call and tell the observer of it, and not of the calls inside it. One that raises is not told."""
    told = observer
    with unwatched():
        before = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - before
    if told is not None:
        told(problem, deployment, threads, seconds)
    return result
