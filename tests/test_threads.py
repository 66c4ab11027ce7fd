"""Many callers at once, and processes that fork: right results, no abort, no hang."""

import _thread
import functools
import itertools
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import run_well

import convdispatch
from convdispatch import memory
from convdispatch.backends import _arguments, _jobs, _team, _threads
from convdispatch.backends._kernel import PackedKernel
from convdispatch.problem import Problem

BACKENDS = ("implicit_gemm", "winograd", "im2col", "fft", "numba")


def test_thirty_two_callers_of_the_same_and_of_different_plans() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 20, 20, 16), np.float32), rng.standard_normal((3, 3, 16, 32), np.float32)
    plans = [convdispatch.plan(x, w, backend=(name, {"threads": 3})) for name in BACKENDS]
    expected = [plan(x) for plan in plans]
    wrong: list[str] = []
    start = threading.Barrier(32)

    def call(number: int) -> None:
        start.wait()
        for turn in range(6):
            which = (number + turn) % len(plans)
            if not (plans[which](x) == expected[which]).all():
                wrong.append(str(plans[which]))

    callers = [threading.Thread(target=call, args=(number,)) for number in range(32)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert wrong == []


_FORKS = """
import os, sys, warnings
import numpy as np
import convdispatch
from convdispatch import memory

warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads, which is the point
x, w = np.ones((1, 20, 20, 16), np.float32), np.ones((3, 3, 16, 32), np.float32)
plans = [convdispatch.plan(x, w, backend=(name, {"threads": 2})) for name in %r]
expected = [plan(x) for plan in plans]
child = os.fork()
same = all((plan(x) == y).all() for plan, y in zip(plans, expected))
if child == 0:
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not same)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_works_like_its_parent() -> None:
    run_well(_FORKS % (BACKENDS,))


_FORKS_INSIDE = """
import os, sys, warnings
from convdispatch.backends import _threads

warnings.simplefilter("ignore", DeprecationWarning)
libraries = _threads._blas().lib_controllers
_threads._set_blas_threads([2] * len(libraries))
before = [library.get_num_threads() for library in libraries]
with _threads._one_blas_thread():
    child = os.fork()
    if child == 0:
        os._exit([library.get_num_threads() for library in libraries] != before)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_that_is_forked_while_blas_is_held_to_one_thread_has_all_of_them() -> None:
    run_well(_FORKS_INSIDE)


def test_an_error_in_a_job_is_raised_after_all_that_were_begun_have_ended() -> None:
    ended: list[int] = []

    def job(number: int) -> None:
        if number == 3:
            raise ValueError("third")
        ended.append(number)

    jobs = [functools.partial(job, number) for number in range(20)]
    with pytest.raises(ValueError, match="third"):
        _threads.run_all(jobs, 4)
    before = list(ended)
    assert len(ended) == len(set(ended)) == len(before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_is_raised_when_those_who_came_have_ended_and_no_more_jobs_are_begun() -> None:
    ended: list[int] = []
    both = threading.Barrier(2, timeout=60)

    def job(number: int) -> None:
        if number < 2:
            both.wait()
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.05)  # the caller waits meanwhile
            _thread.interrupt_main()
            time.sleep(0.2)
        ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        _threads.run_all([functools.partial(job, number) for number in range(2)], 2)
    assert sorted(ended) == [0, 1]


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_blas_has_its_threads_back_whenever_ctrl_c_comes(
    turn: int, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries, change, turns = _threads._blas().lib_controllers, _threads._set_blas_threads, itertools.count()
    before = [library.get_num_threads() for library in libraries]

    def interrupted(counts: Sequence[int]) -> None:
        now = next(turns) == turn
        if now and moment == "before":
            raise KeyboardInterrupt
        change(counts)
        if now:
            raise KeyboardInterrupt

    monkeypatch.setattr(_threads, "_set_blas_threads", interrupted)
    with pytest.raises(KeyboardInterrupt), _threads._one_blas_thread():
        pass
    assert [library.get_num_threads() for library in libraries] == before
    assert not _threads._scope._saved


def test_after_an_error_no_more_jobs_are_begun() -> None:
    begun: list[int] = []
    both = threading.Barrier(2, timeout=60)

    def job(number: int) -> None:
        begun.append(number)
        if number < 2:
            both.wait()
        if number == 0:
            raise ValueError("first")
        time.sleep(0.2)  # the other one fails meanwhile

    with pytest.raises(ValueError, match="first"):
        _threads.run_all([functools.partial(job, number) for number in range(20)], 2)
    assert sorted(begun) == [0, 1]


def test_the_caller_does_the_jobs_that_nobody_else_comes_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_comes(work: object, places: int) -> None:
        pass

    monkeypatch.setattr(_threads._pool, "offer", nobody_comes)
    done: list[int] = []
    _threads.run_all([functools.partial(done.append, number) for number in range(9)], 4)
    assert done == list(range(9))


def test_blas_threads_are_restored() -> None:
    controllers = _threads._blas().lib_controllers
    before = [library.get_num_threads() for library in controllers]
    seen: list[int] = []
    _threads.run_numpy([lambda: seen.extend(library.get_num_threads() for library in controllers)], 1)
    assert set(seen) <= {1}
    assert [library.get_num_threads() for library in controllers] == before


def test_a_grid_is_each_range_with_each_other() -> None:
    jobs = _jobs.grid((5, 2), (3, 3))
    assert jobs.tolist() == [[*rows, *columns] for rows in ((0, 2), (2, 5)) for columns in ((0, 1), (1, 2), (2, 3))]
    assert jobs.flags.c_contiguous
    assert _jobs.grid((5, 2), (0, 3)).shape == (0, 4)


@pytest.mark.parametrize(("count", "parts"), [(10, 3), (3, 10), (0, 4), (7, 1)])
def test_split_covers_everything_once_in_even_pieces(count: int, parts: int) -> None:
    pieces = _jobs.split(count, parts)
    assert [number for start, end in pieces for number in range(start, end)] == list(range(count))
    sizes = [end - start for start, end in pieces]
    assert not sizes or (len(sizes) <= parts and max(sizes) - min(sizes) <= 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be told their cores here")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one core")
def test_the_teams_threads_keep_off_the_callers_core_and_the_caller_stays_free() -> None:
    before = os.sched_getaffinity(0)
    plan = convdispatch.plan((1, 20, 20, 16), np.ones((3, 3, 16, 32), "f4"), backend=("implicit_gemm", {"threads": 2}))
    plan(np.ones((1, 20, 20, 16), np.float32))
    assert os.sched_getaffinity(0) == before
    avoided = _team._team.helpers.avoided
    assert avoided in before
    for thread in _team._team.helpers.threads:
        assert avoided not in os.sched_getaffinity(thread)


def _note(arguments, number):  # type: ignore[no-untyped-def]
    done, value = unpack(arguments, 4)
    done[number] += value
    return 1


_NOTES = _arguments.Arguments(done=_arguments.array_of(1, "int64"), value=_arguments.INTEGER)
unpack = _NOTES.unpack


def test_every_part_is_run_once_however_many_call_and_help() -> None:
    kernel = _arguments.CompiledKernel(_note, _NOTES)
    wrong: list[str] = []

    def call(threads: int) -> None:
        for count in (0, 1, 2, 3, 100):
            for _ in range(100):
                done = np.zeros(count, np.int64)
                block = _NOTES.pack(done=done, value=7)
                ended = _team.run_jobs(kernel.address, block.ctypes.data, count, threads)
                if ended != count or not (done == 7).all():
                    wrong.append(f"{count} parts on {threads} threads: {done}")

    callers = [threading.Thread(target=call, args=(1 + number % 4,)) for number in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert wrong == []


def test_without_a_way_to_sleep_the_parts_are_run_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _arguments.CompiledKernel(_note, _NOTES)
    monkeypatch.setattr(_team, "CAN_SLEEP", False)
    done = np.zeros(50, np.int64)
    block = _NOTES.pack(done=done, value=3)
    assert _team.run_jobs(kernel.address, block.ctypes.data, 50, 3) == 50
    assert (done == 3).all()


_THE_SAME = """
import numpy as np
import convdispatch
from convdispatch import memory
x, w = np.random.rand(1, 40, 40, 16).astype("f4"), np.random.rand(3, 3, 16, 16).astype("f4")
y = convdispatch.conv2d(x, w, backend="direct")
for backend in %r:
    plan = convdispatch.plan(x, w, backend=(backend, {"threads": 3}))
    other = convdispatch.plan(
        x.transpose(0, 3, 1, 2), w, data_format="NCHW", backend=(backend, {"threads": 3})
    )
    for _ in range(4):
        np.testing.assert_allclose(plan(x), y, rtol=1e-4)
        np.testing.assert_allclose(other(x.transpose(0, 3, 1, 2)), y.transpose(0, 3, 1, 2), rtol=1e-4)
"""


def test_without_more_threads_to_be_had_the_caller_does_all_the_work() -> None:
    none = """
import threading
def start(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = start
"""
    run_well(none + _THE_SAME % (BACKENDS,))


def test_on_a_system_whose_threads_cannot_sleep_on_memory_no_kernel_asks_for_that(tmp_path: Path) -> None:
    """As on Windows, whose libraries have no such functions; the one that kernels use there is lent them here."""
    elsewhere = f"""
import ctypes, dataclasses, os
import llvmlite.binding as llvm
os.environ["NUMBA_CACHE_DIR"] = {str(tmp_path)!r}
here = ctypes.CDLL(None)
llvm.add_symbol("SwitchToThread", ctypes.cast(here.sched_yield, ctypes.c_void_p).value)
for name in ("sched_yield", "syscall", "sched_getcpu"):
    llvm.add_symbol(name, 0)  # who calls it does not survive
from convdispatch import machine
changed = dataclasses.replace(machine.current(), system="Windows AMD64")
machine.current = lambda: changed
"""
    run_well(elsewhere + _THE_SAME % (BACKENDS[:1],), 300)


def test_an_address_is_where_the_first_element_lies() -> None:
    array = np.arange(24.0).reshape(2, 3, 4)
    for view in (array, array[1:], array[:, ::-1], array[..., 2], np.empty((0, 3)), array.astype(np.float32)):
        assert memory.address(view) == view.ctypes.data
        assert memory._address(view) == view.ctypes.data


def _fail(arguments, number):  # type: ignore[no-untyped-def]
    _, out, _, _ = unpack_failing(arguments, 4)
    if number == 1:
        raise ValueError("as where memory is short")
    out[0, 0, 0, 0] = 1
    return 1


_FAILING = _arguments.Arguments(
    **{name: _arguments.array_of(4) for name in ("input", "out", "residual")}, parts=_arguments.INTEGER
)
unpack_failing = _FAILING.unpack


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # which is how Numba tells of it
@pytest.mark.parametrize("threads", [1, 2])
def test_a_part_that_fails_in_compiled_code_is_an_error(threads: int) -> None:
    problem = Problem.parse("1x1x1x1 * 1x1x1x1 VALID")
    kernel = PackedKernel(lambda: _arguments.CompiledKernel(_fail, _FAILING), problem, {}, 3, threads)
    one = np.ones((1, 1, 1, 1), np.float32)
    with pytest.raises(MemoryError, match="1 of 3"):
        kernel(one, np.zeros_like(one), None)


@given(
    outer=st.integers(1, 20), inner=st.integers(1, 20), threads=st.integers(1, 5), pieces=st.integers(1, 6)
)  # fmt: skip
def test_an_even_grid_has_every_pair_once_and_as_many_for_each_thread(
    outer: int, inner: int, threads: int, pieces: int
) -> None:
    threads = min(threads, outer * inner)
    jobs = _jobs.even_grid(outer, inner, threads, pieces)
    pairs = [
        [(i, j) for first, last, begin, end in share for i in range(first, last) for j in range(begin, end)]
        for share in np.split(jobs, threads)
    ]
    assert sorted(itertools.chain(*pairs)) == list(itertools.product(range(outer), range(inner)))
    assert max(map(len, pairs)) - min(map(len, pairs)) <= 1
    assert len(jobs) <= threads * max(pieces, 3)


def test_short_work_is_cut_into_one_job_a_thread_and_long_work_into_more() -> None:
    assert [_jobs.pieces(seconds, 2) for seconds in (1e-6, 5e-5, 1e-4, 1e-2)] == [2, 2, 4, 8]
    assert _jobs.pieces(1.0, 1) == 1
