"""Threads: those of BLAS and Numba, scoped and restored, and a pool for everything else."""

import concurrent.futures
import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import threadpoolctl


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    import numpy.linalg  # noqa: F401, PLC0415  # BLAS must be loaded before it can be found

    return threadpoolctl.ThreadpoolController().select(user_api="blas")


class _BlasScope:
    """BLAS has one thread count a process: the first block in saves it, the last one out restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved: list[int] = []

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._saved = [library.get_num_threads() for library in _blas().lib_controllers]
                for library in _blas().lib_controllers:
                    library.set_num_threads(1)
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for library, threads in zip(_blas().lib_controllers, self._saved, strict=True):
                    library.set_num_threads(threads)


_scope = _BlasScope()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep BLAS calls inside the block on the thread that makes them.

    BLAS's own threads are never used: OpenBLAS's go on spinning for a tenth of a second after each product, and
    whatever runs next, of ours or anyone's, shares its core with them. ``run_all`` spreads products instead.
    """
    _scope.enter()
    try:
        yield
    finally:
        _scope.leave()


_launch = threading.Lock()


def _layer() -> str:
    import numba  # noqa: PLC0415

    return str(numba.threading_layer())  # type: ignore[attr-defined]  # its stubs forgot it


@contextlib.contextmanager
def numba_threads(threads: int) -> Iterator[None]:
    """Let parallel Numba kernels inside the block use this many threads.

    Numba's ``workqueue`` layer, its last resort, aborts the process when two Python threads launch at once;
    there, and only there, blocks wait for each other.
    """
    import numba  # noqa: PLC0415  # backends without Numba use this module too

    settings: Any = numba.config  # filled when Numba starts, which its stubs do not know
    before = numba.get_num_threads()  # starts the threading layer
    numba.set_num_threads(max(1, min(threads, settings.NUMBA_NUM_THREADS)))
    guard = _launch if _layer() == "workqueue" else contextlib.nullcontext()
    try:
        with guard:
            yield
    finally:
        numba.set_num_threads(before)


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="convdispatch")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def run_all(jobs: Sequence[Callable[[], None]], threads: int) -> None:
    """Run jobs that release the GIL on up to this many threads, this one among them, in no certain order.

    NumPy's warnings are off in them: NaN and infinity are the caller's, and a thread does not inherit his settings.
    """
    waiting = iter(jobs)  # next() on it is atomic, so that threads take jobs as they come free

    def work() -> None:
        with np.errstate(all="ignore"):
            for job in waiting:
                job()

    threads = min(threads, len(jobs))
    if threads <= 1:
        work()
        return
    others = [_pool(threads - 1).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        concurrent.futures.wait(others)
    for other in others:
        other.result()


def split(count: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``range(count)`` into up to ``parts`` pieces of about equal size, none empty."""
    ends = [part * count // parts for part in range(parts + 1)]
    return [(start, end) for start, end in itertools.pairwise(ends) if start < end]
