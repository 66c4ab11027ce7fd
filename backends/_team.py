"""A team of threads for compiled kernels: a call is shared out without the interpreter.

Waking a sleeping thread takes tens of microseconds, and so does handing it Python's lock: as long as a small layer.
Here a helper waits in compiled code, watching memory for about a twentieth of a millisecond after it has worked, then
asleep; who calls takes parts of the work too, and waits only for helpers that came. One call at a time is shared out,
and none where callers keep the cores busy as it is; the others do their work alone, so nobody waits for a lock.

Each thread has a share of its own, parts that follow each other, the same in every call: what it read and wrote last
time is still in its core's caches. Who is done with that takes parts of the others' shares.
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
    sleep_while,
    wait_for,
    wake,
    write,
)
from convdispatch.backends._cores import Helpers
from convdispatch.backends._jit import compilable
from convdispatch.backends._machine_code import compiled_address
from convdispatch.backends._memory import aligned
from convdispatch.backends._threads import run_all

#: Looks at memory before a helper falls asleep; each takes some 20 ns where the processor has an instruction to pause.
_ALERT_TURNS = 2500
_CLOSED = 1 << 30

# The words of a team, those that different threads change on cache lines of their own: bytes from its address.
_LOCK, _GENERATION, _PLACES, _LEFT, _SLEEPERS, _CALLERS = (64 * line for line in range(6))
_FUNCTION, _BLOCK, _SHARES, _CORES, _HELPERS, _AVOIDED = (64 * 6 + 8 * word for word in range(6))
#: Then the shares, a cache line each: the part to be taken next, and where the share ends.
_FIRST_SHARE, SHARE_BYTES = 64 * 7, 64
NEXT, END = 0, 8
#: Threads that a call is shared out to at most, the caller included.
MOST_SHARES = 256
_WORDS = (_FIRST_SHARE + MOST_SHARES * SHARE_BYTES) // 8


@compilable
def cut(shares, count, parts):  # type: ignore[no-untyped-def]
    """Cut parts into ``count`` shares, which lie at an address."""
    for number in range(count):
        write(shares + number * SHARE_BYTES + NEXT, number * parts // count)
        write(shares + number * SHARE_BYTES + END, (number + 1) * parts // count)


@compilable
def take_parts(shares, count, number, function, block):  # type: ignore[no-untyped-def]
    """Do the parts of the share of this number, then those left of the others'; return how many those were."""
    done = 0
    for turn in range(number, number + count):
        share = shares + turn % count * SHARE_BYTES
        end = read(share + END)
        while read(share + NEXT) < end:  # where all are done, looking is cheaper than counting up
            part = add(share + NEXT, 1)
            if part < end:
                call_kernel(function, block, part)
                done += 1
    return done


def _serve(team, number):  # type: ignore[no-untyped-def]
    """Help whoever calls, for ever, as the helper of this number, from 1."""
    served = -1
    while True:
        seen = read(team + _GENERATION)
        places = read(team + _PLACES)
        if places > 0 and served != seen:
            if exchange_if(team + _PLACES, places, places - 1):
                # From here to the end of its part the caller waits, and its words stay as they are.
                count, function, block = read(team + _SHARES), read(team + _FUNCTION), read(team + _BLOCK)
                take_parts(team + _FIRST_SHARE, count, number, function, block)
                add(team + _LEFT, 1)
                served = seen
            continue
        turns = 0
        while read(team + _GENERATION) == seen and turns < _ALERT_TURNS:
            pause()
            turns += 1
        if turns == _ALERT_TURNS:
            add(team + _SLEEPERS, 1)
            sleep_while(team + _GENERATION, seen)
            add(team + _SLEEPERS, -1)


@compilable
def alone(function, block, first, last):  # type: ignore[no-untyped-def]
    for number in range(first, last):
        call_kernel(function, block, number)


@compilable
def share(team, function, block, count, places):  # type: ignore[no-untyped-def]
    """Run all parts of a kernel's work together with up to ``places`` helpers."""
    callers = add(team + _CALLERS, 1) + 1
    if callers > max(1, read(team + _CORES) // 2) or not exchange_if(team + _LOCK, 0, 1):
        for number in range(count):
            call_kernel(function, block, number)
        add(team + _CALLERS, -1)
        return
    write(team + _FUNCTION, function)
    write(team + _BLOCK, block)
    write(team + _LEFT, 0)
    write(team + _SHARES, places + 1)
    cut(team + _FIRST_SHARE, places + 1, count)
    write(team + _PLACES, places)
    add(team + _GENERATION, 1)
    if read(team + _SLEEPERS) > 0:
        wake(team + _GENERATION, places)
    take_parts(team + _FIRST_SHARE, places + 1, 0, function, block)
    came = places - add(team + _PLACES, -_CLOSED)
    wait_for(team + _LEFT, came)
    write(team + _LOCK, 0)
    add(team + _CALLERS, -1)


@compilable
def ready(team, places):  # type: ignore[no-untyped-def]
    """Return whether a call can be shared out with so many helpers, or is done alone, without more ado."""
    crowded = read(team + _CALLERS) >= max(1, read(team + _CORES) // 2)
    return read(team + _HELPERS) >= places and (crowded or read(team + _AVOIDED) == current_core())


#: Where the words of this process's team are; a forked child has another team.
whereabouts = np.zeros(1, np.int64)


def _from_python(function: Any, words: int) -> Callable[..., None]:
    """Return a function of so many words, compiled to be called from Python, which goes on meanwhile."""
    address = compiled_address(types.void(*[types.int64] * words), function)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * words)(address)


_alone_from_python = _from_python(alone, 4)
if CAN_SLEEP:
    _serve_from_python = _from_python(_serve, 2)
    _share_from_python = _from_python(share, 5)


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
    """Return how many of the threads a call of so many parts has work for."""
    return min(threads, count, MOST_SHARES)


def run_parts(kernel: int, block: int, count: int, threads: int) -> None:
    """Run the parts 0 to ``count`` of a kernel's work on up to this many threads, this one among them.

    Args:
        kernel: address of the compiled kernel.
        block: address of its packed arguments; the arrays they mean must be alive.
        count: how many parts there are.
        threads: most threads to use.
    """
    threads = useful(threads, count)
    if threads <= 1:
        _alone_from_python(kernel, block, 0, count)
    elif CAN_SLEEP:
        team = _team
        team.prepare(threads - 1)
        _share_from_python(team.address, kernel, block, count, threads - 1)
    else:
        each = functools.partial(_alone_from_python, kernel, block)
        run_all([functools.partial(each, number, number + 1) for number in range(count)], threads)
