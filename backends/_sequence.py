"""Kernels that run one after the other in one launch: the jobs of each begin when all of the one before have ended.

Each thread takes jobs of a kernel's work, first of its own share, until there are none left, and then waits for those
that others are at work on; so nobody waits for ever. Waiting costs a microsecond or two, a launch of its own costs
Python's way there and back, and helpers that may have fallen asleep.

To the team it is one kernel, whose jobs are the threads that take part. The first that comes is the host: it makes
room for what is needed during the call only (the kernels' blocks with their addresses filled in, the shares, scratch
memory) and frees it when all have left. Who comes when the work is done leaves at once.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backends._arguments import INTEGER, Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._atomics import add, allocate, exchange_if, free, read, wait_for, write
from convdispatch.backends._jit import compilable
from convdispatch.backends._lines import whole_lines
from convdispatch.backends._shares import SHARE_BYTES, take_jobs
from convdispatch.backends._team import useful
from convdispatch.backends._vector import clear, copy
from convdispatch.memory import CACHE_LINE

#: What an address in a stage's block is of: an array of the call, or the scratch memory.
INPUT, RESIDUAL, OUT, SCRATCH = range(4)


class Stage(NamedTuple):
    """A kernel of a sequence.

    Attributes:
        kernel: the compiled kernel.
        block: its packed arguments, but for the addresses below; the arrays they mean must stay alive.
        jobs: how many jobs its work has.
        addresses: which words of the block are addresses: of what, and how many bytes behind its start.
        alive: what else must stay alive as long as the stage.
    """

    kernel: CompiledKernel
    block: Array
    jobs: int
    addresses: dict[int, tuple[int, int]]
    alive: Any = None


#: A row of ``stages`` is a kernel's address, the word of ``blocks`` where its block begins, and how many jobs it has.
#: A row of ``addresses`` is a word of ``blocks``, and of what it is the address, and how far behind its start. ``room``
#: is the bytes of all, and where shares and scratch begin. The last words are those that the threads share.
ARGUMENTS = Arguments(
    input=array_of(4), residual=array_of(4), out=array_of(4), stages=array_of(2, "int64"),
    blocks=array_of(1, "int64"), addresses=array_of(2, "int64"), room=integers_of(3), threads=INTEGER,
    spoiled_at=INTEGER, spoiled=INTEGER, hosted=INTEGER, place=INTEGER, absent=INTEGER, over=INTEGER,
)  # fmt: skip
unpack = ARGUMENTS.unpack
_SPOILED, _HOSTED, _PLACE, _ABSENT, _OVER = (
    8 * ARGUMENTS.at[name] for name in ("spoiled", "hosted", "place", "absent", "over")
)
#: Of a stage, behind its shares: how many jobs are done, and how many of these came to their end.
_DONE, _ENDED = 0, 8
#: In place of an address: there is no memory.
_NO_ROOM = 1


def values(
    stages: Sequence[Stage], scratch: int, threads: int, spoiled: tuple[int, int] | None = None
) -> tuple[dict[str, Any], int]:
    """Return the arguments of ``in_order`` for a sequence, but for the call's arrays, and how many jobs it has.

    Args:
        stages: what to run; those without jobs are left out.
        scratch: bytes of scratch memory, which begins at a cache line.
        threads: most threads to use.
        spoiled: the stage and the word of its block that tell of sums that are not finite, if one does.
    """
    threads = useful(threads, max((stage.jobs for stage in stages), default=1))
    starts = [0, *itertools.accumulate(len(stage.block) for stage in stages)]
    placed = list(zip(starts, stages, strict=False))
    rows = [(stage.kernel.address, start, stage.jobs) for start, stage in placed if stage.jobs]
    addresses = [(start + word, *what) for start, stage in placed for word, what in stage.addresses.items()]
    shares = whole_lines(8 * starts[-1])
    behind = shares + len(rows) * (threads + 1) * SHARE_BYTES
    return {
        "stages": np.array(rows, np.int64).reshape(-1, 3),
        "blocks": np.concatenate([stage.block for stage in stages]),
        "addresses": np.array(addresses, np.int64).reshape(-1, 3),
        "room": (behind + scratch + CACHE_LINE, shares, behind),
        "threads": threads,
        "spoiled_at": -1 if spoiled is None else starts[spoiled[0]] + spoiled[1],
    }, threads


@compilable
def _take_part(stages, base, shares, threads, number):  # type: ignore[no-untyped-def]
    """Take part in all stages as the thread of this number."""
    for stage in range(stages.shape[0]):
        function, start, jobs = stages[stage]
        own = shares + stage * (threads + 1) * SHARE_BYTES
        told, block = own + threads * SHARE_BYTES, base + 8 * start
        done, ended = take_jobs(own, 1, number, threads, (0, jobs), (function, block, 0, 0, 0), block, False)
        add(told + _ENDED, ended)
        add(told + _DONE, done)
        wait_for(told + _DONE, jobs)


@functools.cache
def in_order() -> CompiledKernel:
    """Return the kernel that runs a sequence."""

    def convolve(arguments, number):  # type: ignore[no-untyped-def]
        x, residual, out, stages, blocks, addresses, room, threads, spoiled_at, _, _, _, _, _ = unpack(arguments, 4)
        if not exchange_if(arguments + _HOSTED, 0, 1):
            add(arguments + _ABSENT, -1)
            if not read(arguments + _OVER):
                wait_for(arguments + _PLACE, 1)
                base = read(arguments + _PLACE)
                if base != _NO_ROOM:
                    _take_part(stages, base, base + room[1], threads, number)
            add(arguments + _ABSENT, 1)
            return 1
        memory = allocate(room[0])
        if not memory:
            write(arguments + _PLACE, _NO_ROOM)
            return 0
        base = whole_lines(memory)
        copy(base, blocks.ctypes.data, 8 * blocks.size)
        given = np.int64(x.ctypes.data), np.int64(residual.ctypes.data), np.int64(out.ctypes.data)
        starts = (*given, base + room[2])
        for row in range(addresses.shape[0]):
            word, of, behind = addresses[row]
            write(base + 8 * word, starts[of] + behind)
        clear(base + room[1], room[2] - room[1])  # no job of any share is taken or done
        write(arguments + _PLACE, base)
        _take_part(stages, base, base + room[1], threads, number)
        add(arguments + _OVER, 1)  # no one looks who is absent before this is seen
        wait_for(arguments + _ABSENT, 0)
        missing = 0
        for stage in range(stages.shape[0]):
            told = base + room[1] + (stage * (threads + 1) + threads) * SHARE_BYTES
            missing += stages[stage, 2] - read(told + _ENDED)
        if spoiled_at >= 0 and read(base + 8 * spoiled_at):
            write(arguments + _SPOILED, 1)
        free(memory)
        return 1 if missing == 0 else 0

    return CompiledKernel(convolve, ARGUMENTS, is_shared=True)
