"""Parts are taken once, by whoever comes in time; blocks are copied, and what a helper found is reported."""

import ctypes
import functools
from collections.abc import Callable

import numpy as np
import pytest
from numba import types

from convdispatch.arguments import Array
from convdispatch.backends import _shares
from convdispatch.backends._arguments import INTEGER, Arguments, CompiledKernel
from convdispatch.backends._atomics import write
from convdispatch.backends._machine_code import compiled_address
from convdispatch.backends._shares import take_jobs

_ARGUMENTS = Arguments(input=INTEGER, out=INTEGER, spoiling=INTEGER, failing=INTEGER, spoiled=INTEGER)
unpack = _ARGUMENTS.unpack
_SPOILED_AT = 8 * _ARGUMENTS.at["spoiled"]


def _note(arguments, number):  # type: ignore[no-untyped-def]
    """Write the input's address where the output's says, in place of this part; some spoil their sums, or fail."""
    source, target, spoiling, failing, _ = unpack(arguments, 4)
    write(target + 8 * number, source)
    if number == spoiling:
        write(arguments + _SPOILED_AT, 1)
    return 0 if number == failing else 1


def _take(shares, call, number, count, first, last, function, block, form, source, target, room, report):  # type: ignore[no-untyped-def]
    task = function, block, form, source, target
    done, ended = take_jobs(shares, call, number, count, (first, last), task, room, report)
    return 1000 * done + ended


@functools.cache
def kernel() -> CompiledKernel:
    return CompiledKernel(_note, _ARGUMENTS)


@functools.cache
def taking() -> Callable[..., int]:
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 13)(
        compiled_address(types.int64(*[types.int64] * 13), _take)
    )


class Call:
    """A call of eight jobs, from the second on, by two threads that come one after the other."""

    def __init__(self, **values: int) -> None:
        self.shares = np.zeros(2 * _shares.SHARE_BYTES // 8, np.int64)
        self.template = _ARGUMENTS.pack(**{"spoiling": -1, "failing": -1, **values})
        self.noted = np.zeros(8, np.int64)

    def take(self, call: int, number: int, *, copied: bool = True) -> tuple[int, int]:
        """Let a thread take jobs; return how many it did, and how many of these ended well."""
        room, block = np.zeros(_shares.MOST_WORDS, np.int64), self.template.copy()
        form = _shares.layout(len(block), (0, 1), _ARGUMENTS.at["spoiled"]) if copied else 0
        if not copied:
            block[:2] = 7, self.noted.ctypes.data
        took: int = taking()(
            self.shares.ctypes.data, call, number, 2, 1, 8, kernel().address, block.ctypes.data, form, 7,
            self.noted.ctypes.data, room.ctypes.data, number,
        )  # fmt: skip
        return divmod(took, 1000)

    def told(self, number: int) -> list[int]:
        """Return what a thread has reported: the call, the jobs it did, those that ended well, and spoiling."""
        first = number * _shares.SHARE_BYTES // 8
        words: Array = self.shares[first + 1 : first + 4]
        return [*divmod(int(words[0]), 1 << _shares.BITS), *words[1:].tolist()]


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("number", [0, 1])
def test_who_comes_takes_all_that_is_left_and_who_comes_later_nothing(number: int, copied: bool) -> None:
    call = Call()
    assert call.take(5, number, copied=copied) == (7, 7)
    assert call.noted.tolist() == [0, *[7] * 7]
    assert call.take(5, 1 - number, copied=copied) == (0, 0)


def test_a_helper_that_is_late_for_a_call_takes_nothing_of_the_next() -> None:
    call = Call()
    assert call.take(6, 0) == (7, 7)
    call.noted[:] = 0
    assert call.take(5, 1) == (0, 0)
    assert not call.noted.any()
    assert call.take(7, 1) == (7, 7)
    assert call.told(1) == [7, 7, 7, 0]


def test_a_thread_begins_with_its_own_share() -> None:
    call = Call()
    call.shares[0] = (9 << _shares.BITS) + 2  # of three, the caller has taken two
    assert call.take(9, 1) == (5, 5)
    assert call.noted.tolist() == [0, 0, 0, *[7] * 5]


def test_what_a_helper_found_is_reported_and_what_failed_is_not_among_what_ended() -> None:
    call = Call(spoiling=3, failing=5)
    assert call.take(2, 1) == (7, 6)
    assert call.told(1) == [2, 7, 6, 1]
    assert (call.template == Call(spoiling=3, failing=5).template).all()  # it is the same for all calls
