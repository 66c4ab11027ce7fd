"""A team of threads for compiled kernels: a call is shared out without the interpreter.

Waking a sleeping thread takes tens of microseconds, and so does handing it Python's lock: as long as a small layer.
Here a helper waits in compiled code, watching memory for about a twentieth of a millisecond after it has worked, then
asleep; who calls takes jobs of the work too, and waits only for helpers that came. One call at a time is shared out,
and none where callers keep the cores busy as it is; the others do their work alone, so nobody waits for a lock.

What one core writes, another reads a tenth to a third of a microsecond later, and a locked instruction waits for all
that was written before. So a call is announced by one line of cache, written without any lock; the caller begins with a
job that nobody else may take; and helpers write to their own lines only, which the caller reads once it is done.
"""

import ctypes
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from convdispatch import machine
from convdispatch.backends._atomics import (
    CAN_SLEEP,
    add,
    call_kernel,
    current_core,
    exchange_if,
    pause,
    read,
    rest,
    sleep_while,
    stack,
    wake,
    write,
)
from convdispatch.backends._cores import Helpers
from convdispatch.backends._jit import compilable
from convdispatch.backends._machine_code import compiled_address
from convdispatch.backends._shares import (
    BITS,
    ENDED,
    MOST_WORDS,
    SHARE_BYTES,
    SPOILED,
    reported,
    spoiled_word,
    take_jobs,
)
from convdispatch.backends._threads import run_all
from convdispatch.memory import aligned

#: Looks at memory before a helper falls asleep; each takes some 20 ns where the processor has an instruction to pause.
_ALERT_TURNS = 2500

# The words of a team, those that different threads change on cache lines of their own: bytes from its address.
_LOCK, _CALLERS, _SLEEPERS, _COMMAND, _KNOWN = (64 * line for line in range(5))
#: The call that is shared out: its number, 0 while the others change; how many threads it is for, and its jobs.
_CALL, _FUNCTION, _BLOCK, _LAYOUT, _SOURCE, _TARGET, _COUNT, _JOBS = (_COMMAND + 8 * word for word in range(8))
_CORES, _HELPERS, _AVOIDED = (_KNOWN + 8 * word for word in range(3))
#: Then the shares; a helper's has another word, which is 1 while it sleeps.
_SHARES, _ASLEEP = 64 * 5, 56
#: Threads that a call is shared out to at most, the caller included, and its jobs.
MOST_SHARES, _MOST_JOBS = 256, 1 << BITS
_WORDS = (_SHARES + MOST_SHARES * SHARE_BYTES) // 8


def _serve(team, number):  # type: ignore[no-untyped-def]
    """Help whoever calls, for ever, as the helper of this number, from 1."""
    room, own = stack(MOST_WORDS), team + _SHARES + number * SHARE_BYTES
    served, turns = 0, 0
    while True:
        call = read(team + _CALL)
        if call != 0 and call != served:  # noqa: PLR1714  # Numba would make a tuple
            function, block, layout = read(team + _FUNCTION), read(team + _BLOCK), read(team + _LAYOUT)
            task = function, block, layout, read(team + _SOURCE), read(team + _TARGET)
            count, jobs = read(team + _COUNT), read(team + _JOBS)
            if read(team + _CALL) == call:  # all of it is of one call
                served = call
                if number < count:
                    take_jobs(team + _SHARES, call, number, count, (1, jobs), task, room, True)
                    turns = 0
            continue
        pause()
        turns += 1
        if turns >= _ALERT_TURNS:
            add(own + _ASLEEP, 1)
            add(team + _SLEEPERS, 1)
            if read(team + _CALL) == call:
                sleep_while(own + _ASLEEP, 1)
            add(team + _SLEEPERS, -1)
            write(own + _ASLEEP, 0)
            turns = 0


@compilable
def alone(function, block, first, last):  # type: ignore[no-untyped-def]
    """Run some jobs of a kernel's work; return how many came to their end."""
    ended = 0
    for number in range(first, last):
        ended += call_kernel(function, block, number)
    return ended


@compilable
def _wake_helpers(team, count):  # type: ignore[no-untyped-def]
    """Wake those of the first helpers that sleep."""
    if read(team + _SLEEPERS) > 0:
        for number in range(1, count):
            word = team + _SHARES + number * SHARE_BYTES + _ASLEEP
            if exchange_if(word, 1, 0):
                wake(word, 1)


@compilable
def _done_by_helpers(team, call, count):  # type: ignore[no-untyped-def]
    """Return how many jobs of a call helpers have reported as done so far."""
    done = 0
    for number in range(1, count):
        done += reported(team + _SHARES + number * SHARE_BYTES, call)
    return done


@compilable
def _wait_for_helpers(team, call, count, missing):  # type: ignore[no-untyped-def]
    """Wait until helpers have done the missing jobs; return how many ended well, and whether a sum is not finite."""
    turns = 0
    while _done_by_helpers(team, call, count) < missing:
        turns += 1
        rest(turns)
    ended, spoiled = 0, 0
    for number in range(1, count):
        own = team + _SHARES + number * SHARE_BYTES
        if reported(own, call):
            ended += read(own + ENDED)
            spoiled |= read(own + SPOILED)
    return ended, spoiled


@compilable
def share(team, task, mine, jobs, places):  # type: ignore[no-untyped-def]
    """Run all jobs of a kernel's work together with up to ``places`` helpers; return how many came to their end.

    Args:
        team: where its words are.
        task: the kernel, and of what helpers make their blocks; see ``take_jobs``.
        mine: the caller's own block.
        jobs: how many there are.
        places: how many helpers may take part.
    """
    function, block, layout, source, target = task
    callers = add(team + _CALLERS, 1) + 1
    if callers > max(1, read(team + _CORES) // 2) or not exchange_if(team + _LOCK, 0, 1):
        ended = alone(function, mine, 0, jobs)
        add(team + _CALLERS, -1)
        return ended
    call, count = read(team + _CALL) + 1, places + 1
    write(team + _CALL, 0)
    write(team + _FUNCTION, function)
    write(team + _BLOCK, block)
    write(team + _LAYOUT, layout)
    write(team + _SOURCE, source)
    write(team + _TARGET, target)
    write(team + _COUNT, count)
    write(team + _JOBS, jobs)
    write(team + _CALL, call)
    _wake_helpers(team, count)
    ended = call_kernel(function, mine, 0)
    # Who fell asleep at the very moment may not have been seen: now all cores see what was written.
    add(team + _CALLERS, 0)
    _wake_helpers(team, count)
    done, well = take_jobs(team + _SHARES, call, 0, count, (1, jobs), (function, mine, 0, 0, 0), mine, False)
    ended += well
    if done + 1 < jobs:
        well, spoiled = _wait_for_helpers(team, call, count, jobs - 1 - done)
        ended += well
        word = spoiled_word(mine, layout)
        if spoiled and word:
            write(word, 1)
    write(team + _LOCK, 0)
    add(team + _CALLERS, -1)
    return ended


@compilable
def _share_block(team, function, block, jobs, places):  # type: ignore[no-untyped-def]
    """Do as ``share`` does, with one block for all."""
    return share(team, (function, block, 0, 0, 0), block, jobs, places)


@compilable
def ready(team, places):  # type: ignore[no-untyped-def]
    """Return whether a call can be shared out with so many helpers, or is done alone, without more ado."""
    crowded = read(team + _CALLERS) >= max(1, read(team + _CORES) // 2)
    return read(team + _HELPERS) >= places and (crowded or read(team + _AVOIDED) == current_core())


#: Where the words of this process's team are; a forked child has another team.
whereabouts = np.zeros(1, np.int64)


def _from_python(function: Any, words: int, result: Any = types.int64) -> Callable[..., int]:
    """Return a function of so many words, compiled to be called from Python, which goes on meanwhile."""
    address = compiled_address(result(*[types.int64] * words), function)
    returned = ctypes.c_int64 if result is types.int64 else None
    return ctypes.CFUNCTYPE(returned, *[ctypes.c_int64] * words)(address)


_alone_from_python = _from_python(alone, 4)
if CAN_SLEEP:
    _serve_from_python = _from_python(_serve, 2, types.void)
    _share_from_python = _from_python(_share_block, 5)


class _Team:
    """The helpers of this process, and the memory through which they are told what to do."""

    def __init__(self) -> None:
        self._words = aligned((_WORDS,), "int64")
        self._words[_CORES // 8] = machine.usable_cores()
        self.address: int = self._words.ctypes.data
        self.helpers = Helpers()
        self._numbers = itertools.count(1)
        whereabouts[0] = self.address

    def prepare(self, places: int) -> None:
        """Have at least this many helpers, and none of them on the caller's core."""
        self.helpers.grow(places, self.serve)
        self.helpers.keep_off_the_callers_core()
        self._words[_HELPERS // 8], self._words[_AVOIDED // 8] = self.helpers.count, self.helpers.avoided

    def serve(self) -> None:
        """Help whoever calls, for ever."""
        _serve_from_python(self.address, next(self._numbers))


_team = _Team()


def _after_fork() -> None:
    global _team  # noqa: PLW0603  # a child has none of its parent's threads
    _team = _Team()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def useful(threads: int, count: int) -> int:
    """Return how many of the threads a call of so many jobs has work for."""
    return min(threads, count, MOST_SHARES) if count < _MOST_JOBS else 1


def run_jobs(kernel: int, block: int, count: int, threads: int) -> int:
    """Run the jobs 0 to ``count`` of a kernel's work on up to this many threads, this one among them.

    Args:
        kernel: address of the compiled kernel.
        block: address of its packed arguments; the arrays they mean must be alive.
        count: how many jobs there are.
        threads: most threads to use.

    Returns:
        How many jobs came to their end.
    """
    threads = useful(threads, count)
    if threads <= 1:
        return _alone_from_python(kernel, block, 0, count)
    if CAN_SLEEP:
        team = _team
        team.prepare(threads - 1)
        return _share_from_python(team.address, kernel, block, count, threads - 1)
    ended: list[int] = []

    def run(number: int) -> None:
        ended.append(_alone_from_python(kernel, block, number, number + 1))

    run_all([functools.partial(run, number) for number in range(count)], threads)
    return sum(ended)
