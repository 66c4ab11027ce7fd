"""Tuning what was recorded: where most time went first, as it was called, and within the time there is."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scripted import PROBLEM, RULES, FakeClock, Scripted, only

from convdispatch import profile, profile_file
from convdispatch.cli import main
from convdispatch.errors import ArgumentError, WorkloadError
from convdispatch.problem import Problem
from convdispatch.tuning import problem_race, stakes, tuner, workload
from convdispatch.tuning.record import Recording
from convdispatch.tuning.workload import Layer, Workload

OTHER = Problem.parse("1x5x5x2 * 1x1x2x3 VALID")
THIRD = Problem.parse("2x6x5x2 * 3x2x2x3 VALID stride=2")
BOTH = ("plan", "call")


@pytest.fixture
def recording() -> Recording:
    """Ninety seconds of one problem, nine of another and one of a third."""
    made = Recording()
    for problem, deployment, threads, seconds in (
        (OTHER, "call", 1, 4.5), (THIRD, "plan", 2, 1.0), (PROBLEM, "plan", 1, 90.0), (OTHER, "call", 1, 4.5),
    ):  # fmt: skip
        made.add(problem, deployment, threads, seconds)
    return made


def test_a_recording_is_tuned_as_it_was_called_the_most_time_first(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    only(Scripted("a", clock))
    shares: list[float] = []

    def tune_problem(key: Any, **more: Any) -> Any:
        shares.append(more["seconds"])
        return problem_tuner(key, clock=clock, rules=RULES, **more)

    problem_tuner = problem_race.tune_problem
    monkeypatch.setattr(problem_race, "tune_problem", tune_problem)
    report = tuner.tune(recording, time_limit=1000.0)
    done = [(r.layer.problem, r.deployment, r.entry.key.threads, r.layer.count) for r in report.layers if r.entry]
    assert done == [(PROBLEM, "plan", 1, 1), (OTHER, "call", 1, 2), (THIRD, "plan", 2, 1)]
    assert shares == pytest.approx([900.0, 900.0, 1000.0], rel=0.01)  # of what the ones before have left
    again = tuner.tune(recording, time_limit=1000.0)
    assert [r.status for r in again.layers] == ["known"] * 3
    assert tuner.tune(recording, deployments=["call"]).layers[0].deployment == "call"


def test_what_is_known_has_no_share(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    only(Scripted("a", clock))
    problem_tuner = problem_race.tune_problem
    monkeypatch.setattr(problem_race, "tune_problem", functools.partial(problem_tuner, clock=clock, rules=RULES))
    tuner.tune(PROBLEM, threads=1, deployments=["plan"])
    shares: list[float] = []

    def tune_problem(key: Any, **more: Any) -> Any:
        shares.append(more["seconds"])
        return problem_tuner(key, clock=clock, rules=RULES, **more)

    monkeypatch.setattr(problem_race, "tune_problem", tune_problem)
    report = tuner.tune(recording, time_limit=1000.0)
    assert [r.status for r in report.layers] == ["known", "tuned", "tuned"]
    assert shares == pytest.approx([900.0, 1000.0], rel=0.01)


def test_no_time_leaves_the_rest_and_says_so(recording: Recording) -> None:
    only(Scripted("a", FakeClock()))
    report = tuner.tune(recording, time_limit=0)
    assert [r.status for r in report.layers] == ["left"] * 3
    assert not report.complete


def test_a_workload_without_seconds_keeps_its_order_and_shares_evenly() -> None:
    load = Workload("w", (Layer(OTHER), Layer(PROBLEM, 9), Layer(THIRD)))
    tasks = stakes.tasks(load, BOTH, "m", 4)
    assert [(task.layer.problem, task.key.deployment) for task in tasks] == [
        (problem, deployment) for problem in (OTHER, PROBLEM, THIRD) for deployment in BOTH
    ]
    assert {task.key.threads for task in tasks} == {4}
    assert stakes.parts(tasks) == pytest.approx([1 / 6, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 1])


def test_no_deployment_at_all_is_refused(recording: Recording) -> None:
    with pytest.raises(ArgumentError, match=r"deployments must be at least one of plan, call; got \(\)"):
        stakes.tasks(recording.workload, (), "m", 1)


def test_what_was_added_by_hand_comes_last(recording: Recording) -> None:
    load = Workload("w", (Layer(Problem.parse("1x9x9x2 * 1x1x2x3")), *recording))
    tasks = stakes.tasks(load, ("plan",), "m", 1)
    assert [task.stake for task in tasks] == [90.0, 1.0, 1.0]
    assert tasks[-1].layer.seconds is None


def test_a_thread_count_that_is_asked_for_is_taken_for_all(recording: Recording) -> None:
    load = Workload("w", tuple(recording))
    assert {task.key.threads for task in stakes.tasks(load, BOTH, "m", 1, threads=3)} == {3}
    assert {task.key.threads for task in stakes.tasks(load, BOTH, "m", 7)} == {1, 2}


def test_a_deployment_that_was_never_called_is_an_error() -> None:
    made = Recording()
    made.add(PROBLEM, "plan", 1, 1.0)
    with pytest.raises(WorkloadError, match="no layer of workload 'custom' was recorded as call"):
        tuner.tune(made, deployments=["call"])


@given(
    st.lists(
        st.tuples(
            st.sampled_from([PROBLEM, OTHER, THIRD]),
            st.one_of(st.none(), st.floats(0, 100)),
            st.sampled_from([None, "plan", "call"]),
            st.sampled_from([None, 1, 2]),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sets(st.integers(0, 20)),
    st.floats(0, 1000),
)
def test_each_key_comes_once_and_no_more_time_is_shared_out_than_there_is(
    rows: list[tuple[Problem, float | None, str | None, int | None]], settled: set[int], limit: float
) -> None:
    load = Workload("w", tuple(Layer(p, 1, "", s, d, t) for p, s, d, t in rows))
    known = {task.key for number, task in enumerate(stakes.tasks(load, BOTH, "m", 2)) if number in settled}
    tasks = stakes.tasks(load, BOTH, "m", 2, is_settled=known.__contains__)
    assert len({task.key for task in tasks}) == len(tasks)
    assert {task.key for task in tasks if task.stake == 0} == known
    seconds = [task.layer.seconds or 0.0 for task in tasks]
    assert seconds == sorted(seconds, reverse=True) or not any(seconds)
    left = limit
    for task, part in zip(tasks, stakes.parts(tasks), strict=True):
        share = left * part
        assert 0 <= share <= left
        assert task.stake or share in {0, left}
        left -= share if task.stake else 0
    assert left == pytest.approx(0, abs=1e-6) or not any(task.stake for task in tasks)


# The command ----------------------------------------------------------------------------------------------------

SMALL, TINY = "1x9x9x4 * 3x3x4x8 SAME", "1x5x5x4 * 1x1x4x4 VALID"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = Recording()
    made.add(Problem.parse(TINY), "plan", 1, 1e-3)
    made.add(Problem.parse(SMALL), "call", 1, 2.0)
    made.save(tmp_path / "recording.yaml")
    return tmp_path / "recording.yaml"


def run(*words: str | Path) -> Any:
    profile.forget()
    return CliRunner().invoke(main, [str(word) for word in words])


def test_tune_from_a_recording_tunes_it_as_it_was_called(file: Path, tmp_path: Path) -> None:
    mine = tmp_path / "profile.yaml"
    done = run("tune", "--from", file, "--time-limit", "60", "--backends", "direct,im2col", "--profile", mine)
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines()[0].startswith(f"[1/2] {SMALL} (call): tuned")
    assert "recorded: 2 s of calls; those with a winner took 2 s, and would take" in done.stdout
    keys = {(str(e.key.problem), e.key.deployment, e.key.threads) for e in profile_file.read(mine).entries()}
    assert keys == {(SMALL, "call", 1), (TINY, "plan", 1)}
    data = json.loads(run("tune", "--from", file, "--profile", mine, "--backends", "direct,im2col", "--json").stdout)
    assert [(layer["status"], layer["recorded_seconds"]) for layer in data["layers"]] == [("known", 2), ("known", 1e-3)]


def test_tune_from_a_recording_with_no_time_says_what_is_left(file: Path, tmp_path: Path) -> None:
    done = run("tune", "--from", file, "--time-limit", "0", "--profile", tmp_path / "profile.yaml")
    assert done.exit_code == 3
    assert "2 left when the time limit came" in done.stdout
    assert "those with a winner took 0 ns" in done.stdout


def test_what_to_tune_is_said_once(file: Path, tmp_path: Path) -> None:
    for words in (("tune",), ("tune", SMALL, "--from", file)):
        done = run(*words)
        assert done.exit_code == 2
        assert "either WHAT or --from FILE" in done.stderr
    missing = run("tune", "--from", tmp_path / "nowhere.yaml")
    assert missing.exit_code == 1
    assert "nowhere.yaml: this file does not exist" in missing.stderr


def test_a_recording_can_be_loaded_like_any_workload(file: Path) -> None:
    load = workload.load(file)
    assert [layer.seconds for layer in load.layers] == [2.0, 1e-3]
