"""Kernels that are watched: what they store outside their output, and what they do to what they only may read.

Each array that a kernel gets lies between two zones of marked bytes, and an output is full of marks too. After the
call the zones must be as before; and with other marks the result must be the same, or the kernel took something from
memory that is none of its business, or left some of its output unwritten.
"""

import contextlib
import copy
import functools
import gc
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
import psutil

from convdispatch.arguments import Array
from convdispatch.backend import Backend, Config, Kernel
from convdispatch.memory import aligned
from convdispatch.problem import Problem

#: Bytes of marks on either side of an array.
_ZONE = 1 << 16
#: Bytes that make NaN, and bytes that make large numbers; both are -1 or large as integers.
MARKS = (0xFF, 0x7B)
#: Seconds that looking for a leak takes, about.
_LEAK_SECONDS = 1.0


class FaultError(Exception):
    """A backend did what its contract forbids; the message says what, as in "it ..."."""


class Guarded:
    """Memory for an array between two marked zones, itself full of marks."""

    def __init__(self, like: Array, mark: int) -> None:
        """Make room for an array of this shape, dtype and order of axes."""
        self.mark = mark
        order = sorted(range(like.ndim), key=lambda axis: -abs(like.strides[axis]))
        raw = aligned((2 * _ZONE + like.size * like.itemsize,), "uint8", zero=False)
        raw.fill(mark)
        self._before, self.bytes, self._behind = raw[:_ZONE], raw[_ZONE:-_ZONE], raw[-_ZONE:]
        straight = self.bytes.view(like.dtype).reshape([like.shape[axis] for axis in order])
        self.array = straight.transpose(np.argsort(order))

    def broken(self) -> str | None:
        """Return on which side something was stored, or None."""
        if (self._before != self.mark).any():
            return "before"
        return "behind" if (self._behind != self.mark).any() else None


def _copied(array: Array, mark: int) -> Guarded:
    guarded = Guarded(array, mark)
    guarded.array[...] = array
    return guarded


class Watch:
    """What is known of the kernels of one backend, and how the next call is to be made.

    Attributes:
        mark: what memory is marked with in the next call.
        measure: whether to measure the memory that the next call takes.
        stored: the bytes of the last output.
        workspace: most bytes that a measured call took.
        filters: those that ``prepare`` was given.
    """

    def __init__(self, backend: Backend) -> None:
        """Watch a backend through a copy of it."""
        self.mark = MARKS[0]
        self.measure = False
        self.stored: Array = np.empty(0, np.uint8)
        self.workspace = 0
        self.filters: list[Array] = []
        self._original = backend
        self.backend = copy.copy(backend)
        self.backend.prepare = self._prepare  # type: ignore[method-assign]

    def _prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:
        given = [_copied(array, self.mark) for array in (filters, bias) if array is not None]
        before = [each.bytes.copy() for each in given]
        own = given[1].array if bias is not None else None
        kernel = self._original.prepare(problem, given[0].array, own, config)
        for name, each, was in zip(("filters", "bias"), given, before, strict=False):
            _check(name, each, was)
        self.filters.append(given[0].array)
        return functools.partial(self._call, kernel)

    def _call(self, kernel: Kernel, input: Array, out: Array, residual: Array | None) -> bool | None:
        x, y = _copied(input, self.mark), Guarded(out, self.mark)
        added = None if residual is None else _copied(residual, self.mark)
        was = [x.bytes.copy(), None if added is None else added.bytes.copy()]
        take = None if added is None else added.array
        if self.measure:
            with _Peak() as peak:
                told = kernel(x.array, y.array, take)
            self.workspace = max(self.workspace, peak.bytes)
        else:
            told = kernel(x.array, y.array, take)
        _check("input", x, was[0])
        if added is not None:
            _check("residual", added, was[1])
        if side := y.broken():
            raise FaultError(f"stores {side} its output, outside of it")
        self.stored = y.bytes
        out[...] = y.array
        return told


def _check(name: str, array: Guarded, was: Array | None) -> None:
    if side := array.broken():
        raise FaultError(f"stores {side} its {name}, outside of it")
    if not np.array_equal(array.bytes, was):  # type: ignore[arg-type]
        raise FaultError(f"changes its {name}")


def difference(first: Array, second: Array, itemsize: int) -> str:
    """Return how the bytes of two outputs, stored among first one and then the other of ``MARKS``, differ."""
    items = [stored.reshape(-1, itemsize) for stored in (first, second)]
    unlike = (items[0] != items[1]).any(axis=1)
    unwritten = (items[0] == MARKS[0]).all(axis=1) & (items[1] == MARKS[1]).all(axis=1)
    if unwritten.any():
        return f"leaves {np.count_nonzero(unwritten)} of {len(unlike)} outputs unwritten"
    return f"{np.count_nonzero(unlike)} of {len(unlike)} outputs differ"


# Memory -------------------------------------------------------------------------------------------------------------


class _Peak:
    """Bytes that this process takes at most within a block, above what it had before."""

    bytes = 0

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", "ascii")  # Linux then forgets the peak so far
        self._before = resident()
        tracemalloc.start()
        return self

    def __exit__(self, *_: object) -> None:
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.bytes = max(traced, _peak_resident() - self._before)


def resident() -> int:
    """Return the bytes of memory that this process has."""
    return int(psutil.Process().memory_info().rss)


def _peak_resident() -> int:
    """Return the most bytes it had since the peak was forgotten, 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path("/proc/self/status").read_text("utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
    return 0


def leak(run: Callable[[], object], least: int = 1 << 16) -> int:
    """Return the bytes that each call leaves behind, if the process grows steadily by at least that many a call.

    Args:
        run: calls a kernel that has been called before.
        least: bytes a call that count as a leak; allocators keep a little.
    """
    started = time.perf_counter()
    run()
    calls = max(1, min(4, int(_LEAK_SECONDS / 4 / max(time.perf_counter() - started, 1e-9))))
    grown = []
    gc.collect()
    before = resident()
    for _ in range(4):
        for _ in range(calls):
            run()
        gc.collect()
        now = resident()
        grown.append((now - before) // calls)
        before = now
        if grown[-1] < least:
            return 0
    return min(grown)
