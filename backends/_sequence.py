"""Kernels that run one after the other in one launch: the parts of each begin when all of the one before have ended.

Each thread takes parts of a kernel's work, first of its own share, until there are none left, and then waits for those
that others are at work on; so nobody waits for ever. Waiting costs a microsecond or two, a launch of its own costs
Python's way there and back, and helpers that may have fallen asleep.
"""

import functools
from collections.abc import Sequence

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backends._arguments import Arguments, CompiledKernel, array_of
from convdispatch.backends._atomics import add, wait_for
from convdispatch.backends._kernel import check, run
from convdispatch.backends._memory import address
from convdispatch.backends._team import END, NEXT, SHARE_BYTES, take_parts, useful

#: A row of ``stages`` is a kernel's address, its block's, and how many parts it has. Of each, ``shares`` has the shares
#: as a team has them, and behind these the number of parts that have returned, whether they failed or not.
_ARGUMENTS = Arguments(stages=array_of(2, "int64"), shares=array_of(3, "int64"))
unpack = _ARGUMENTS.unpack
_DONE_AT = 8 * _ARGUMENTS.done_at


@functools.cache
def _in_order() -> CompiledKernel:
    def pass_on(arguments, number):  # type: ignore[no-untyped-def]
        """Take part in all stages as the thread of this number."""
        stages, shares = unpack(arguments, 4)
        threads = shares.shape[1] - 1
        for stage in range(stages.shape[0]):
            function, block, parts = stages[stage]
            own = np.int64(shares[stage].ctypes.data)
            ended = own + threads * SHARE_BYTES
            add(ended, take_parts(own, threads, number, function, block))
            wait_for(ended, parts)
        add(arguments + _DONE_AT, 1)

    return CompiledKernel(pass_on, _ARGUMENTS)


@functools.lru_cache(maxsize=1024)
def _cut(counts: tuple[int, ...], threads: int) -> Array:
    """Return the shares of stages with so many parts, of which none has been taken."""
    shares = np.zeros((len(counts), threads + 1, SHARE_BYTES // 8), np.int64)
    ends = np.array(counts, np.int64).reshape(-1, 1) * np.arange(threads + 1) // threads
    shares[:, :-1, NEXT // 8], shares[:, :-1, END // 8] = ends[:, :-1], ends[:, 1:]
    return shares


def run_in_order(stages: Sequence[tuple[CompiledKernel, Array, int]], threads: int) -> None:
    """Run kernels one after the other, each on up to this many threads.

    Args:
        stages: kernels, their packed arguments, and how many parts each has.
        threads: most threads to use.

    Raises:
        MemoryError: if a part did not come to its end.
    """
    stages = [stage for stage in stages if stage[2]]  # an image without rows has nothing to convert
    counts = tuple(count for _, _, count in stages)
    threads = useful(threads, max(counts, default=1))
    table = np.array([(kernel.address, address(block), count) for kernel, block, count in stages], np.int64)
    shares = _cut(counts, threads).copy()
    run(_in_order(), _ARGUMENTS.pack(stages=table.reshape(-1, 3), shares=shares), threads, threads)
    for kernel, block, count in stages:
        check(kernel, block, count)
