"""A pool of threads for jobs of Python and NumPy, and BLAS kept from using its own; compiled kernels have ``_team``."""

import collections
import contextlib
import functools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import threadpoolctl

from convdispatch.backends._cores import Helpers

Job = Callable[[], object]


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    import numpy.linalg  # noqa: F401, PLC0415  # BLAS must be loaded before it can be found

    return threadpoolctl.ThreadpoolController().select(user_api="blas")


def _set_blas_threads(counts: Sequence[int]) -> None:
    """Set each BLAS's number of threads, whichever thread asks.

    From 3.7 on threadpoolctl lets one thread of a process set OpenBLAS's and silently ignores the others; here it does
    not matter who asks, since ``_BlasScope`` counts for all of them.
    """
    for library, count in zip(_blas().lib_controllers, counts, strict=True):
        give_up = getattr(library, "clear_controlling_thread", lambda **_: None)
        give_up(force=True)
        library.set_num_threads(count)
        give_up(force=True)


class _BlasScope:
    """BLAS has one thread count a process: the first block in saves it, the last one out restores it.

    Both may be interrupted anywhere, by Ctrl-C, and done again: what is saved stays so until it is restored.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: set[object] = set()
        self._saved: list[int] = []

    def enter(self, block: object) -> None:
        with self._lock:
            self._inside.add(block)
            self._saved = self._saved or [library.get_num_threads() for library in _blas().lib_controllers]
            if len(self._inside) == 1:
                _set_blas_threads([1] * len(self._saved))

    def leave(self, block: object) -> None:
        try:
            self._leave(block)
        except BaseException:
            self._leave(block)
            raise

    def _leave(self, block: object) -> None:
        with self._lock:
            self._inside.discard(block)
            if not self._inside and self._saved:
                _set_blas_threads(self._saved)
                self._saved = []

    def begin_anew(self) -> None:
        """Give BLAS its threads back in a forked child: nobody else will, since who was inside is not there."""
        if self._saved:
            _set_blas_threads(self._saved)
        self.__init__()  # type: ignore[misc]


_scope = _BlasScope()


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Keep BLAS calls inside the block on the thread that makes them.

    BLAS's own threads are never used: OpenBLAS's go on spinning for a tenth of a second after each product, and
    whatever runs next, of ours or anyone's, shares its core with them. ``run_all`` spreads products instead.
    """
    block = object()
    try:
        _scope.enter(block)
        yield
    finally:
        _scope.leave(block)


class _Pool:
    """Threads that wait for work."""

    def __init__(self) -> None:
        self._helpers = Helpers()
        self._offers: queue.SimpleQueue[_Work] = queue.SimpleQueue()

    def offer(self, work: "_Work", places: int) -> None:
        """Let up to this many threads join some work, if they come while it lasts."""
        self._helpers.grow(places, self._wait_for_work)
        self._helpers.keep_off_the_callers_core()
        for _ in range(places):
            self._offers.put(work)

    def _wait_for_work(self) -> None:
        while True:
            work = self._offers.get()
            work.help()
            del work  # and with it the caller's arrays


class _Work:
    """Jobs under way: who comes takes the next one, and who called waits only for those who came."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = iter(jobs)  # next() on it is atomic
        self._lock = threading.Lock()
        self._came = self._left = 0
        self._closed = False
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._errors: list[BaseException] = []

    def take(self) -> None:
        for job in self._jobs:
            try:
                job()
            except BaseException:
                self._leave_the_rest()
                raise

    def help(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._came += 1
        try:
            self.take()
        except BaseException as error:  # noqa: BLE001  # it is the caller's to raise
            self._errors.append(error)
        with self._lock:
            self._left += 1
        self._news.put(None)

    def close(self) -> None:
        """Wait for those who came, whatever interrupts that: what they are at writes into the caller's arrays."""
        interrupted: BaseException | None = None
        while not self._closed or self._left < self._came:
            try:
                with self._lock:
                    self._closed = True
                while self._left < self._came:
                    self._news.get()
            except BaseException as error:  # noqa: BLE001  # Ctrl-C; it is raised when nobody is at work
                interrupted = error
                self._leave_the_rest()
        if interrupted or self._errors:
            raise interrupted or self._errors[0]

    def _leave_the_rest(self) -> None:
        """Take the jobs that nobody has begun, and leave them undone."""
        collections.deque(self._jobs, maxlen=0)


_pool = _Pool()


def _after_fork() -> None:
    global _pool  # noqa: PLW0603  # a child has none of its parent's threads, and locks as they happened to be
    _pool = _Pool()
    _scope.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run_all(jobs: Sequence[Job], threads: int) -> None:
    """Run jobs that release the GIL on up to this many threads, this one among them, in no certain order.

    This thread does not wait for the others to wake up: on a busy machine it does all the jobs itself. After an error,
    or Ctrl-C, no more are begun, and it is raised when all that were have ended.
    """
    threads = min(threads, len(jobs))
    if threads <= 1:
        for job in jobs:
            job()
        return
    work = _Work(jobs)
    _pool.offer(work, threads - 1)
    try:
        work.take()
    finally:
        work.close()


def run_numpy(jobs: Sequence[Job], threads: int) -> None:
    """Run jobs made of NumPy's functions: BLAS stays on their threads, and NaN and infinity make no warnings."""

    def quiet(job: Job) -> None:
        with np.errstate(all="ignore"):  # a thread does not inherit these settings
            job()

    with _one_blas_thread():
        run_all([functools.partial(quiet, job) for job in jobs], threads)
