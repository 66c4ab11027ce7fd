"""Recording: every call is counted once, by whom it is made, and nothing counted is lost on its way to the file."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import PROBLEM, FakeClock, Scripted, only

import convdispatch
from convdispatch import observe, registry, settings
from convdispatch.arguments import Array
from convdispatch.errors import ArgumentError, ArgumentTypeError, WorkloadError
from convdispatch.problem import Problem
from convdispatch.tuning import workload
from convdispatch.tuning.record import ProgramRecording, Recording, merge, record
from convdispatch.tuning.workload import Layer, Workload

OTHER = Problem.parse("1x5x5x2 * 1x1x2x3 VALID")
X, W = np.ones(PROBLEM.input_shape, "f4"), np.ones(PROBLEM.filter_shape, "f4")
X2, W2 = np.ones(OTHER.input_shape, "f4"), np.ones(OTHER.filter_shape, "f4")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """A clock for what is recorded, and one backend that takes a second a call and packs for three."""
    fake = FakeClock()
    monkeypatch.setattr(time, "perf_counter", fake)
    only(Scripted("a", fake, 1.0, packing=3.0))
    return fake


def rows(recording: Recording) -> set[tuple[str, str | None, int, float | None]]:
    return {(str(layer.problem), layer.deployment, layer.count, layer.seconds) for layer in recording}


def test_calls_and_plans_are_counted_apart_with_their_time(clock: FakeClock) -> None:
    plan = convdispatch.plan(X.shape, W)
    with record() as recorded:
        for _ in range(3):
            plan(X)
        plan(X, out=np.empty(PROBLEM.output_shape, "f4"))
        convdispatch.conv2d(X, W)
        convdispatch.conv2d(X2, W2, padding="VALID")
    plan(X)
    convdispatch.conv2d(X, W)
    assert rows(recorded) == {
        (str(PROBLEM), "plan", 4, 4.0),
        (str(PROBLEM), "call", 1, 4.0),  # packing is part of a call
        (str(OTHER), "call", 1, 4.0),
    }
    assert (recorded.calls, recorded.seconds) == (6, 12.0)
    assert not observe.is_watched()


def test_a_recorded_call_returns_what_an_unrecorded_one_does() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(X.shape, "f4"), rng.standard_normal(W.shape, "f4")
    plan, out = convdispatch.plan(x, w, residual=True), np.empty(PROBLEM.output_shape, "f4")
    residual = rng.standard_normal(out.shape, "f4")
    expected = plan(x, residual=residual)
    with record():
        assert plan(x, out=out, residual=residual) is out
        called = convdispatch.conv2d(x, w, residual=residual)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_allclose(called, expected, rtol=1e-5, atol=1e-5)


def test_the_most_time_comes_first(clock: FakeClock) -> None:
    with record() as recorded:
        convdispatch.conv2d(X2, W2, padding="VALID")
        for _ in range(9):
            convdispatch.conv2d(X, W)
    assert [layer.problem for layer in recorded] == [PROBLEM, OTHER]


def test_the_thread_budget_is_recorded_as_it_was_chosen_for(clock: FakeClock) -> None:
    with settings.options(threads=3):
        plan = convdispatch.plan(X.shape, W)
    with record() as recorded, settings.options(threads=2):
        plan(X)
        convdispatch.conv2d(X, W)
    assert {(layer.deployment, layer.threads) for layer in recorded} == {("plan", 3), ("call", 2)}


def test_a_first_call_that_waits_for_a_compiler_counts_like_the_others(clock: FakeClock) -> None:
    backend = registry.get("a")
    assert isinstance(backend, Scripted)
    backend.seconds = lambda call: 100.0 if call == 1 else 2.0
    plan = convdispatch.plan(X.shape, W)
    with record() as recorded:
        plan(X)
        assert rows(recorded) == {(str(PROBLEM), "plan", 1, 100.0)}  # nothing better is known
        for _ in range(3):
            plan(X)
        assert rows(recorded) == {(str(PROBLEM), "plan", 4, 8.0)}


def test_calls_that_wait_with_the_first_one_count_like_the_others(clock: FakeClock) -> None:
    recorded = Recording()
    clock.now = 5.0
    for _ in range(3):  # three threads began at 0, and all were kept waiting
        recorded.add(PROBLEM, "plan", 1, 5.0)
    clock.now = 6.0
    recorded.add(PROBLEM, "plan", 1, 1.0)
    assert [(layer.count, layer.seconds) for layer in recorded] == [(4, 4.0)]


def test_only_the_first_call_of_a_program_is_a_first_one(clock: FakeClock, tmp_path: Path) -> None:
    program = ProgramRecording(tmp_path / "r.yaml")

    def call(seconds: float) -> None:
        clock.now += seconds
        program.add(PROBLEM, "plan", 1, seconds)

    call(100.0)
    call(1.0)
    program.write()
    call(3.0)
    call(1.0)
    program.put_back(program.take())
    program.write()
    assert [(layer.count, layer.seconds) for layer in workload.load(tmp_path / "r.yaml").layers] == [(4, 6.0)]


def test_nested_blocks_both_count(clock: FakeClock) -> None:
    with record() as outer:
        convdispatch.conv2d(X, W)
        with record() as inner:
            convdispatch.conv2d(X, W)
        convdispatch.conv2d(X, W)
    assert (outer.calls, inner.calls) == (3, 1)


def test_a_block_that_raises_ends_its_recording_and_keeps_its_calls(clock: FakeClock, tmp_path: Path) -> None:
    def stops() -> None:
        convdispatch.conv2d(X, W)
        raise KeyError

    with pytest.raises(KeyError), record(tmp_path / "r.yaml") as recorded:
        stops()
    assert not observe.is_watched()
    assert recorded.calls == 1
    assert workload.load(tmp_path / "r.yaml").layers == recorded.workload.layers


def test_a_relative_path_is_meant_where_the_block_begins(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with record("r.yaml"):
        convdispatch.conv2d(X, W)
        monkeypatch.chdir("elsewhere")
    assert (tmp_path / "r.yaml").exists()


def test_what_a_block_raises_comes_before_a_recording_that_cannot_be_saved(clock: FakeClock, tmp_path: Path) -> None:
    def stops() -> None:
        convdispatch.conv2d(X, W)
        raise KeyError("the program's own")

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(KeyError, match="the program's own") as raised, record(tmp_path / "file" / "r.yaml"):
        stops()
    (note,) = raised.value.__notes__
    assert "the recording cannot be written" in note
    with pytest.raises(WorkloadError, match="the recording cannot be written"), record(tmp_path / "file" / "r.yaml"):
        convdispatch.conv2d(X, W)


def test_a_call_that_raises_is_not_counted(clock: FakeClock) -> None:
    plan = convdispatch.plan(X.shape, W)
    with record() as recorded:
        with pytest.raises(ArgumentError):
            plan(X2)
        with pytest.raises(ArgumentError):
            convdispatch.conv2d(X, W, out=np.empty((1, 1, 1, 1), "f4"))
        plan(X)
    assert recorded.calls == 1


def test_what_a_call_calls_inside_is_not_counted(clock: FakeClock) -> None:
    class Nested(Scripted):
        def store(self, problem: Problem, input: Array, filters: Array, out: Array) -> None:
            if problem == PROBLEM:
                convdispatch.conv2d(X2, W2, padding="VALID", backend="a")
            super().store(problem, input, filters, out)

    convdispatch.register(Nested("nested", clock))
    with record() as recorded:
        convdispatch.conv2d(X, W, backend="nested")
    assert {(layer.problem, layer.count) for layer in recorded} == {(PROBLEM, 1)}


def test_images_that_are_done_again_are_not_counted_apart() -> None:
    x = np.ones((1, 12, 12, 8), "f4")
    x[0, 0, 0, 0] = np.nan
    plan = convdispatch.plan(x, np.ones((3, 3, 8, 8), "f4"), backend="winograd")
    with record() as recorded:
        plan(x)
    assert [(layer.problem, layer.count) for layer in recorded] == [(plan.problem, 1)]


def test_measuring_is_not_counted(clock: FakeClock) -> None:
    with record() as recorded:
        convdispatch.tune(OTHER)
        with settings.options(tuning="on-miss"):
            convdispatch.conv2d(X, W)
    assert [(layer.problem, layer.count) for layer in recorded] == [(PROBLEM, 1)]


def test_what_has_nothing_to_multiply_is_not_recorded(clock: FakeClock) -> None:
    with record() as recorded:
        convdispatch.conv2d(np.empty((0, 6, 6, 2), "f4"), W)
    with pytest.raises(WorkloadError, match="has no layers"):
        recorded.workload  # noqa: B018
    with pytest.raises(WorkloadError, match="has no layers"):
        convdispatch.tune(recorded)


def test_the_calls_of_all_threads_count_and_none_is_lost() -> None:
    plan, start = convdispatch.plan(X.shape, W), threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(200):
            plan(X)

    threads = [threading.Thread(target=work) for _ in range(8)]
    with record() as recorded:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert recorded.calls == 1600


# Files ----------------------------------------------------------------------------------------------------------

_layers = st.builds(
    Layer,
    st.sampled_from([PROBLEM, OTHER]),
    st.integers(1, 10**6),
    st.sampled_from(["", "name"]),
    st.one_of(st.none(), st.floats(0, 1e6)),
    st.sampled_from([None, "plan", "call"]),
    st.sampled_from([None, 1, 2]),
)


@given(st.lists(_layers, min_size=1, max_size=6))
def test_a_file_holds_all_that_a_layer_says(layers: list[Layer]) -> None:
    load = Workload("w", tuple(layers))
    assert workload._parse("w", "w", load.to_yaml().encode()) == load


@given(st.lists(st.lists(_layers, min_size=1, max_size=4), min_size=1, max_size=4))
def test_merging_adds_up(tmp_path_factory: pytest.TempPathFactory, parts: list[list[Layer]]) -> None:
    path = tmp_path_factory.mktemp("merged") / "deep" / "r.yaml"
    for part in parts:
        merge(path, Workload("part", tuple(part)))
    every = [layer for part in parts for layer in part]
    found = workload.load(path).layers
    assert len({layer.posed for layer in found}) == len(found)
    for layer in found:
        same = [other for other in every if other.posed == layer.posed]
        assert layer.count == sum(other.count for other in same)
        assert layer.seconds == pytest.approx(sum(other.seconds or 0.0 for other in same)) or layer.seconds is None
    assert {layer.posed for layer in found} == {layer.posed for layer in every}


def test_a_recording_is_written_as_a_profile_is(tmp_path: Path) -> None:
    path, link, load = tmp_path / "r.yaml", tmp_path / "link.yaml", Workload("w", (Layer(PROBLEM),))
    merge(path, load)
    path.chmod(0o660)
    link.symlink_to(path)
    (tmp_path / f".r.yaml-{10**7}.tmp").write_text("half")  # by a process that was killed
    merge(link, load)
    assert link.is_symlink()
    assert [layer.count for layer in workload.load(path).layers] == [2]
    assert path.stat().st_mode & 0o777 == 0o660
    assert {child.name for child in tmp_path.iterdir()} == {"r.yaml", "r.yaml.lock", "link.yaml"}


def test_what_is_no_workload_is_not_overwritten(clock: FakeClock, tmp_path: Path) -> None:
    path = tmp_path / "notes.yaml"
    path.write_text("milk: bread\n")
    with pytest.raises(WorkloadError, match=r"notes\.yaml"), record(path):
        convdispatch.conv2d(X, W)
    assert path.read_text() == "milk: bread\n"
    program = ProgramRecording(path)
    program.add(PROBLEM, "plan", 1, 1.0)
    with pytest.warns(UserWarning, match="recorded calls are written to"):
        program.write()
    assert path.read_text() == "milk: bread\n"
    (beside,) = tmp_path.glob("notes-*.yaml")
    assert workload.load(beside).layers == (Layer(PROBLEM, 1, seconds=1.0, deployment="plan", threads=1),)


def test_what_cannot_be_written_anywhere_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.write_text("in the way")
    program = ProgramRecording(folder / "r.yaml")
    program.add(PROBLEM, "plan", 1, 1.0)
    with pytest.warns(UserWarning, match="kept for another attempt"):
        program.write()
    assert program.calls == 1
    folder.unlink()
    program.write()
    assert workload.load(folder / "r.yaml").layers[0].count == 1
    assert program.calls == 0


def test_an_interrupted_write_keeps_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path, recorded: Workload) -> None:
        raise KeyboardInterrupt

    program = ProgramRecording(tmp_path / "r.yaml")
    program.add(PROBLEM, "plan", 1, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr("convdispatch.tuning.record.merge", interrupt)
        with pytest.raises(KeyboardInterrupt):
            program.write()
    assert program.calls == 1
    program.write()
    assert workload.load(tmp_path / "r.yaml").layers[0].count == 1


def test_calls_that_went_into_another_file_are_not_kept_if_the_warning_raises(tmp_path: Path) -> None:
    path = tmp_path / "notes.yaml"
    path.write_text("milk: bread\n")
    program = ProgramRecording(path)
    program.add(PROBLEM, "plan", 1, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="written to"):
            program.write()
    assert program.calls == 0


def test_a_long_program_writes_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    class Inline:
        def __init__(self, target: Any, **about: Any) -> None:
            self.start = target
            started.append(about)

    program = ProgramRecording(tmp_path / "r.yaml")
    monkeypatch.setattr(threading, "Thread", Inline)
    for _ in range(5):
        program.add(PROBLEM, "plan", 1, 1.0)
    assert started == []
    program._written -= 31
    program.add(PROBLEM, "plan", 1, 1.0)
    assert len(started) == 1
    assert workload.load(tmp_path / "r.yaml").layers[0].count == 6


def test_a_program_that_gets_no_thread_goes_on_and_keeps_its_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    program = ProgramRecording(tmp_path / "r.yaml")
    program._written -= 31
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        program.add(PROBLEM, "plan", 1, 1.0)
    program.write()
    assert workload.load(tmp_path / "r.yaml").layers[0].count == 1


# Whole programs -------------------------------------------------------------------------------------------------

_PROGRAM = """
import multiprocessing, os, sys, threading, warnings
import numpy as np, convdispatch
warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads
x, w = np.ones((1, 6, 6, 2), "f4"), np.ones((3, 3, 2, 3), "f4")
def work(count):
    for _ in range(count):
        convdispatch.conv2d(x, w, backend="im2col")
def main():
    work(1)
    thread = threading.Thread(target=work, args=(10,))
    thread.start(); thread.join()
    os.chdir("/")
    how = sys.argv[1]
    if how == "fork":
        child = os.fork()
        work(100)
        if child == 0:
            sys.exit()
        os.waitpid(child, 0)
    elif how != "alone":
        process = multiprocessing.get_context(how[3:]).Process(target=work, args=(1000,))
        process.start(); process.join()
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(("how", "count"), [("alone", 11), ("fork", 211), ("mp-fork", 1011), ("mp-spawn", 1011)])
def test_a_program_is_recorded_to_its_end_with_its_children(tmp_path: Path, how: str, count: int) -> None:
    if "fork" in how and not hasattr(os, "fork"):
        pytest.skip("there is no fork here")
    script = tmp_path / "program.py"
    script.write_text(_PROGRAM)
    environment = {**os.environ, "CONVDISPATCH_RECORD": "r.yaml", "PYTHONPATH": str(ROOT)}
    if how == "mp-spawn":
        environment["CONVDISPATCH_RECORD"] = str(tmp_path / "r.yaml")
    for turn in (1, 2):  # a second run adds to the first
        done = subprocess.run(
            [sys.executable, script, how], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
            timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        (layer,) = workload.load(tmp_path / "r.yaml").layers
        assert (layer.problem, layer.deployment, layer.count) == (PROBLEM, "call", turn * count)
        assert layer.seconds is not None
        assert layer.seconds > 0
        if how != "alone":
            break


_LATE = """
import multiprocessing, sys
def work(count):
    import numpy as np, convdispatch
    x, w = np.ones((1, 6, 6, 2), "f4"), np.ones((3, 3, 2, 3), "f4")
    for _ in range(count):
        convdispatch.conv2d(x, w, backend="im2col")
if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=work, args=(5,))
    process.start(); process.join()
"""


@pytest.mark.parametrize("how", multiprocessing.get_all_start_methods())
def test_a_child_that_imports_convdispatch_first_is_recorded(tmp_path: Path, how: str) -> None:
    script, calls = tmp_path / "program.py", tmp_path / "r.yaml"
    script.write_text(_LATE)
    environment = {**os.environ, "CONVDISPATCH_RECORD": str(calls), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, how], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert [layer.count for layer in workload.load(calls).layers] == [5]


def test_a_program_that_records_nothing_loads_nothing_for_it() -> None:
    code = "import sys, convdispatch; print('convdispatch.tuning.record' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_a_path_of_another_kind_is_refused_before_anything_is_recorded() -> None:
    with pytest.raises(ArgumentTypeError, match="path must be a file's path; got 5"), record(5):  # type: ignore[arg-type]
        pytest.fail("the block must not run")


def test_a_recording_goes_to_the_home_that_the_path_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with record("~/in/r.yaml") as recording:
        convdispatch.conv2d(X, W)
    recording.save("~/in/s.yaml")
    assert {path.name for path in (tmp_path / "in").glob("*.yaml")} == {"r.yaml", "s.yaml"}
    assert not (tmp_path / "~").exists()


def test_a_program_that_is_to_record_into_no_home_runs_all_the_same() -> None:
    environment = {**os.environ, "CONVDISPATCH_RECORD": "~nobody-of-this-name/r.yaml", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", "import convdispatch"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "record must be a file's path" in done.stderr
    assert "Traceback" not in done.stderr
