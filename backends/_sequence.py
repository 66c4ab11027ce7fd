"""Kernels that run one after the other in one launch: the parts of each begin when all of the one before have ended.

Parts are begun in their order, and a part waits only for parts that others are at work on; so nobody waits for
ever. Waiting costs a microsecond or two, a launch of its own costs Python's way there and back, and helpers that may
have fallen asleep.
"""

import functools
from collections.abc import Sequence

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backends._arguments import Arguments, CompiledKernel, array_of
from convdispatch.backends._atomics import add, call_kernel, wait_for
from convdispatch.backends._kernel import check, run
from convdispatch.backends._memory import address

#: A row of ``stages`` is a kernel's address, its block's, the number of its first part, and how many parts it has;
#: ``ended`` counts the parts of each that have returned, whether they failed or not.
_ARGUMENTS = Arguments(stages=array_of(2, "int64"), ended=array_of(1, "int64"))
unpack = _ARGUMENTS.unpack
_DONE_AT = 8 * _ARGUMENTS.done_at


@functools.cache
def _in_order() -> CompiledKernel:
    def pass_on(arguments, number):  # type: ignore[no-untyped-def]
        stages, ended = unpack(arguments, 4)
        now = stages.shape[0] - 1
        while number < stages[now, 2]:
            now -= 1
        if now:
            wait_for(ended.ctypes.data + (now - 1) * 8, stages[now - 1, 3])
        call_kernel(stages[now, 0], stages[now, 1], number - stages[now, 2])
        add(ended.ctypes.data + now * 8, 1)
        add(arguments + _DONE_AT, 1)

    return CompiledKernel(pass_on, _ARGUMENTS)


def run_in_order(stages: Sequence[tuple[CompiledKernel, Array, int]], threads: int) -> None:
    """Run kernels one after the other, each on up to this many threads.

    Args:
        stages: kernels, their packed arguments, and how many parts each has.
        threads: most threads to use.

    Raises:
        MemoryError: if a part did not come to its end.
    """
    rows, parts = [], 0
    stages = [stage for stage in stages if stage[2]]  # an image without rows has nothing to convert
    for kernel, block, count in stages:
        rows.append((kernel.address, address(block), parts, count))
        parts += count
    table, ended = np.array(rows, np.int64), np.zeros(len(rows), np.int64)
    run(_in_order(), _ARGUMENTS.pack(stages=table, ended=ended), parts, threads, in_order=True)
    for kernel, block, count in stages:
        check(kernel, block, count)
