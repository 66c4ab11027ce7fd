"""Which cores helping threads run on: any but the caller's."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from typing import cast


def _find_current_core() -> Callable[[], int]:
    """Return the C library's ``sched_getcpu`` where threads can be told which cores to use, else what knows nothing."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError, AttributeError):
            return cast("Callable[[], int]", ctypes.PyDLL(None).sched_getcpu)
    return lambda: -1


_current_core = _find_current_core()


class Helpers:
    """A team's threads.

    A scheduler may wake a thread on the core of who woke it, though another is idle; there it would wait until the
    caller has done all the work. So they are told to run elsewhere.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.threads: list[int] = []
        self.avoided = -1
        self.count = 0

    def grow(self, count: int, serve: Callable[[], object]) -> None:
        """Have at least this many threads, each of which runs ``serve``, or as many as can be had.

        Nobody depends on them: whoever calls does what is left undone.
        """
        if self.count >= count:
            return
        with self._lock:
            while self.count < count:
                thread = threading.Thread(target=serve, name="convdispatch", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads for this process, or it is about to end
                    break
                if thread.native_id is not None:
                    self.threads.append(thread.native_id)
                self.count += 1
            self.avoided = -1

    def keep_off_the_callers_core(self) -> None:
        """Let the threads run on any core but this one."""
        here = _current_core()
        if here == self.avoided or here < 0:
            return
        self.avoided = here
        others = os.sched_getaffinity(0) - {here}
        for thread in self.threads if others else ():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, others)
