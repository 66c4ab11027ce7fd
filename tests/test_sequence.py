"""Kernels in one launch: each begins when the one before has ended, and one that failed holds up nobody."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convdispatch.backends._arguments import INTEGER, Arguments, CompiledKernel, array_of
from convdispatch.backends._atomics import add
from convdispatch.backends._sequence import run_in_order

_ARGUMENTS = Arguments(clock=INTEGER, begins=array_of(1, "int64"), ends=array_of(1, "int64"), failing=INTEGER)
unpack = _ARGUMENTS.unpack
_DONE_AT = 8 * _ARGUMENTS.done_at


@functools.cache
def recorder() -> CompiledKernel:
    """Return a kernel whose parts write down when they begin and end, by a clock that ticks at every look."""

    def record(arguments, number):  # type: ignore[no-untyped-def]
        clock, begins, ends, failing = unpack(arguments, 4)
        begins[number] = add(clock, 1)
        ends[number] = add(clock, 1)
        if number != failing:
            add(arguments + _DONE_AT, 1)

    return CompiledKernel(record, _ARGUMENTS)


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), threads=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_kernel_begins_when_the_one_before_has_ended(counts: list[int], threads: int) -> None:
    clock = np.zeros(1, np.int64)
    times = [(np.full(count, -1), np.full(count, -1)) for count in counts]
    stages = [
        (recorder(), _ARGUMENTS.pack(clock=clock.ctypes.data, begins=begins, ends=ends, failing=-1), len(begins))
        for begins, ends in times
    ]
    run_in_order(stages, threads)
    assert all((begins >= 0).all() and (ends > begins).all() for begins, ends in times)
    for (_, ended), (begun, _) in itertools.pairwise(times):
        assert ended.max() < begun.min()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_part_that_fails_is_an_error_and_holds_up_nobody(threads: int) -> None:
    clock, stages = np.zeros(1, np.int64), []
    times = [(np.full(4, -1), np.full(4, -1)) for _ in range(2)]
    for (begins, ends), failing in zip(times, (2, -1), strict=True):
        block = _ARGUMENTS.pack(clock=clock.ctypes.data, begins=begins, ends=ends, failing=failing)
        stages.append((recorder(), block, 4))
    with pytest.raises(MemoryError, match="1 of 4 parts"):
        run_in_order(stages, threads)
    assert (times[1][1] >= 0).all()
