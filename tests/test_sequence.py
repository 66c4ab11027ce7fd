"""Kernels in one launch: each begins when the one before has ended, and one that failed holds up nobody."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convdispatch.arguments import Array
from convdispatch.backends import _sequence
from convdispatch.backends._arguments import INTEGER, Arguments, CompiledKernel, array_of
from convdispatch.backends._atomics import add
from convdispatch.backends._kernel import run

_ARGUMENTS = Arguments(clock=INTEGER, begins=array_of(1, "int64"), ends=array_of(1, "int64"), failing=INTEGER)
unpack = _ARGUMENTS.unpack


@functools.cache
def recorder() -> CompiledKernel:
    """Return a kernel whose jobs write down when they begin and end, by a clock that ticks at every look."""

    def record(arguments, number):  # type: ignore[no-untyped-def]
        clock, begins, ends, failing = unpack(arguments, 4)
        begins[number] = add(clock, 1)
        ends[number] = add(clock, 1)
        return 1 if number != failing else 0

    return CompiledKernel(record, _ARGUMENTS)


def stage(times: tuple[Array, Array], failing: int = -1) -> _sequence.Stage:
    """Return a recorder that is to write in two arrays, and looks at the call's output as its clock."""
    begins, ends = times
    block = _ARGUMENTS.pack(begins=begins, ends=ends, failing=failing)
    return _sequence.Stage(recorder(), block, len(begins), {_ARGUMENTS.at["clock"]: (_sequence.OUT, 8)}, times)


def run_in_order(stages: list[_sequence.Stage], threads: int) -> None:
    out = np.zeros((1, 1, 1, 4))
    values, jobs = _sequence.values(stages, 0, threads)
    run(_sequence.in_order(), _sequence.ARGUMENTS.pack(out=out, **values), jobs, jobs)
    assert out.view(np.int64)[0, 0, 0].tolist() == [0, 2 * sum(stage.jobs for stage in stages), 0, 0]


def never(count: int) -> tuple[Array, Array]:
    return np.full(count, -1), np.full(count, -1)


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=4), threads=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_kernel_begins_when_the_one_before_has_ended(counts: list[int], threads: int) -> None:
    times = [never(count) for count in counts]
    run_in_order([stage(each) for each in times], threads)
    assert all((begins >= 0).all() and (ends > begins).all() for begins, ends in times)
    for (_, ended), (begun, _) in itertools.pairwise(each for each in times if len(each[0])):
        assert ended.max() < begun.min()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_part_that_fails_is_an_error_and_holds_up_nobody(threads: int) -> None:
    times = [never(4), never(4)]
    with pytest.raises(MemoryError, match=r"1 of . jobs"):
        run_in_order([stage(times[0], failing=2), stage(times[1])], threads)
    assert (times[1][1] >= 0).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_without_memory_it_is_an_error_and_nobody_waits(threads: int) -> None:
    times = never(4)
    values, jobs = _sequence.values([stage(times)], 1 << 60, threads)
    with pytest.raises(MemoryError, match=r"1 of . jobs"):
        run(_sequence.in_order(), _sequence.ARGUMENTS.pack(**values), jobs, jobs)
    assert (times[0] == -1).all()


def test_scratch_memory_begins_at_a_cache_line_and_is_where_stages_look_for_it() -> None:
    times = never(2)
    first = stage(times)
    places = {_ARGUMENTS.at["clock"]: (_sequence.OUT, 0), _ARGUMENTS.at["begins"]: (_sequence.SCRATCH, 64)}
    values, jobs = _sequence.values([first._replace(addresses=places)], 64 + 16, 2)
    out = np.zeros((1, 1, 1, 1))
    block = _sequence.ARGUMENTS.pack(out=out, **values)
    for _ in range(100):
        run(_sequence.in_order(), block.copy(), jobs, jobs)
    assert out.view(np.int64).item() == 400
    assert (times[0] == -1).all()  # which it had in mind before
    assert (times[1] > 0).all()
