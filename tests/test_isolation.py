"""What third parties' candidates may do to a child process, and what the tuner makes of it. Real processes run here."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import psutil
import pytest
import villains
from hypothesis import given
from programs import run_well
from scripted import PROBLEM, FakeClock, Scripted, only, race_by
from strategies import Case, familiar_cases, runs_here
from villains import Villain, Wavering

import convdispatch
from convdispatch import (
    dispatch,
    heuristic,
    machine,
    profile,
    profile_file,
    profile_tools,
    quarantine,
    reference,
    registry,
    settings,
)
from convdispatch.arguments import Array
from convdispatch.backend import Backend, Candidate, Config, seen_by
from convdispatch.epilogue import Epilogue
from convdispatch.plan import Plan
from convdispatch.problem import Problem
from convdispatch.profile_tools import Selection
from convdispatch.tuning import cell as cell_module
from convdispatch.tuning import isolation, isolation_worker, online, tuner
from convdispatch.tuning.cell import Cell, Finding, Limits
from convdispatch.tuning.gate import Trial
from convdispatch.tuning.isolation import try_candidate
from convdispatch.tuning.tuner import tune
from convdispatch.tuning.warmup import warm_up


@pytest.fixture(autouse=True)
def no_children() -> Iterator[None]:
    yield
    isolation.close()


def tried(behaviour: str, problem: Problem = PROBLEM, kind: type[Villain] = Villain, **limits: Any) -> Finding:
    return try_candidate(problem, Candidate(kind("villain", behaviour), Config()), Limits(**limits))


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("aborts", r"crashed \(SIGABRT\) in _abort \(villains.py, line \d+\)"),
        ("reads null", r"crashed \(SIGSEGV\) in string_at .*"),
        ("exits", r"crashed \(exit code 3\)"),
        ("raises SystemExit", "raises SystemExit, which would end the process"),
        ("is wrong", r"wrong result in its first run: error .* times what is allowed"),
        ("is wrong later", r"says that it is deterministic, and is not: 108 of 108 outputs differ in a second run"),
        ("wavers", r"says that it is deterministic, and is not: \d+ of 108 outputs differ in a second run"),
        ("stores too little", "wrong result in its first run: results that are not finite from finite input"),
        ("stores before", "stores before its output, outside of it"),
        ("stores behind", "stores behind its output, outside of it"),
        ("changes input", "changes its input"),
        ("changes filters", "changes its filters"),
        ("keeps filters", "keeps the filters that it was given instead of a copy: .* differ when they change"),
        ("remembers filters", "is not independent of other calls: 108 of 108 outputs differ after them"),
        ("leaks", r"leaks memory: each call leaves 2\d\d KiB behind"),
    ],
)  # fmt: skip
def test_what_breaks_the_contract_is_found_and_speaks_against_the_version(behaviour: str, reason: str) -> None:
    found = tried(behaviour)
    assert found.reason is not None
    assert re.fullmatch(reason, found.reason), found.reason
    assert found.lasting


@pytest.mark.parametrize("behaviour", ["sleeps", "spins"])
def test_what_hangs_is_ended_and_tells_where_it_was(behaviour: str) -> None:
    found = tried(behaviour, seconds=1.0)
    assert found.reason is not None
    assert re.fullmatch(r"hung: no result within 1 s in _s\w+ \(villains.py, line \d+\)", found.reason), found.reason
    assert found.lasting


def test_what_takes_too_much_memory_is_ended() -> None:
    found = tried("grows", memory=64 << 20)
    assert found.reason == "took more than 64 MiB of memory, and says it needs 0 MiB"
    assert found.lasting


def test_a_machine_short_of_memory_does_not_speak_against_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_module, "_FREE", 1e-9)
    found = tried("grows")
    assert found.reason == "took more than 0 MiB of memory, and says it needs 0 MiB"
    assert not found.lasting


@pytest.mark.parametrize(
    ("behaviour", "reason"), [("raises", "ValueError: not today"), ("is killed", "crashed (SIGKILL)")]
)
def test_what_need_not_be_its_fault_everywhere_does_not_speak_against_the_version(behaviour: str, reason: str) -> None:
    assert tried(behaviour) == Finding(reason)


def test_a_crash_may_come_before_anybody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(pid: int) -> object:
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(psutil, "Process", gone)
    assert tried("is killed") == Finding("crashed (SIGKILL)")


@pytest.mark.parametrize("behaviour", ["stores too little", "is wrong"])
@pytest.mark.parametrize("text", [PROBLEM.text + " int32", "2x2x6x6 NCHW * 3x3x2x3 SAME float16 +bias +residual +relu"])
def test_it_is_found_in_any_dtype_and_layout(behaviour: str, text: str) -> None:
    found = tried(behaviour, Problem.parse(text))
    assert found.reason is not None
    assert found.reason.startswith("wrong result in its first run")


@pytest.mark.parametrize("behaviour", ["right", "prints"])
def test_who_is_right_may_be_measured(behaviour: str) -> None:
    assert tried(behaviour) == Finding()


def test_who_says_that_it_is_not_deterministic_may_waver_but_not_be_wrong() -> None:
    assert tried("wavers", kind=Wavering) == Finding()
    found = tried("is wrong later", kind=Wavering)
    assert found.reason is not None
    assert found.reason.startswith("wrong result in a second run: ")


def test_a_workspace_that_is_far_from_what_was_declared_is_told() -> None:
    found = tried("takes a workspace")
    assert found.reason is None
    assert re.fullmatch(
        "backend 'villain' says that villain needs 0 KiB of workspace, and was seen to take 6[5-9]... KiB: "
        "memory_limit cannot be kept with it",
        found.note,
    )


def test_children_are_stopped_while_they_wait_and_serve_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started = count_children(monkeypatch)
    candidate = Candidate(Villain(), Config())
    for text in (PROBLEM.text, "1x5x5x2 * 1x1x2x3 VALID", PROBLEM.text + " int8"):
        assert try_candidate(Problem.parse(text), candidate) == Finding()
    assert len(started) == 1
    (cell,) = isolation._cells.values()
    assert cell.usable
    isolation.close()
    assert not cell.usable


def test_a_child_outlives_the_thread_that_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    started = count_children(monkeypatch)
    found = []
    candidate = Candidate(Villain(), Config())
    thread = threading.Thread(target=lambda: found.append(try_candidate(PROBLEM, candidate)))
    thread.start()
    thread.join()
    (cell,) = isolation._cells.values()
    cell._child.go_on()
    time.sleep(0.1)  # for a signal to arrive, were there one
    assert cell.usable
    assert [*found, try_candidate(PROBLEM, candidate)] == [Finding(), Finding()]
    assert len(started) == 1


ORPHAN = """
import os, signal
from scripted import PROBLEM
from villains import Villain
from convdispatch.backend import Candidate, Config
from convdispatch.tuning import isolation
isolation.try_candidate(PROBLEM, Candidate(Villain(), Config()))
print(next(iter(isolation._cells.values()))._child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a stopped process outlives its parent")
def test_a_child_that_waits_ends_with_a_parent_that_is_killed() -> None:
    path = [str(Path(convdispatch.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    patience = time.monotonic() + 10
    while _lives(int(done.stdout)):
        assert time.monotonic() < patience, "still there"
        time.sleep(0.02)


def _lives(process: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    return False


def count_children(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that each backend's name is put into when a child process is started for it."""
    started: list[str] = []

    class Counted(Cell):
        def __init__(self, backend: Backend) -> None:
            started.append(backend.name)
            super().__init__(backend)

    monkeypatch.setattr(isolation, "Cell", Counted)
    return started


def test_an_interrupted_trial_leaves_no_process_and_no_old_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = Candidate(Villain(), Config())
    assert try_candidate(PROBLEM, candidate) == Finding()
    (cell,) = isolation._cells.values()

    def interrupted(*_: Any) -> Finding:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Cell, "_watched", interrupted)
        with pytest.raises(KeyboardInterrupt):
            try_candidate(PROBLEM, candidate)
    assert not cell.usable
    assert try_candidate(PROBLEM, candidate) == Finding()


# What is sent ---------------------------------------------------------------------------------------------------


def test_a_function_from_anywhere_can_be_sent() -> None:
    factor = 1.0

    def local(x: Array, w: Array, problem: Problem) -> Array:
        return reference.convolve(problem, x, w) * factor

    registry.register("local")(local)
    assert try_candidate(PROBLEM, Candidate(registry.get("local"), Config())) == Finding()
    factor = 2.0
    registry.register("double")(local)
    found = try_candidate(PROBLEM, Candidate(registry.get("double"), Config()))
    assert (found.reason or "").startswith("wrong result")


def test_who_cannot_be_sent_is_tried_here_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Villain("locked")
    backend.lock = threading.Lock()  # type: ignore[attr-defined]
    with (
        settings.options(isolation="third-party"),
        pytest.warns(UserWarning, match=r"'locked' cannot be tried in a child .*cannot be pickled \(TypeError"),
    ):
        assert isolation.admitted(PROBLEM, [Candidate(backend, Config())])[0]
    with settings.options(isolation="third-party"):  # said once
        other = Problem.parse("1x5x5x2 * 1x1x2x3 VALID")
        assert isolation.admitted(other, [Candidate(backend, Config())])[0]


class Undecided(Villain):
    """Does not know its workspace."""

    def workspace(self, problem: Problem, config: Config) -> int:
        raise ValueError("who knows")


def test_a_workspace_that_raises_is_a_failure() -> None:
    assert try_candidate(PROBLEM, Candidate(Undecided(), Config())) == Finding("ValueError: who knows")


class Elsewhere(Villain):
    """Cannot be made again from what is sent."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (villains, "nobody")


def test_who_cannot_be_received_is_tried_here_with_a_note() -> None:
    found = try_candidate(PROBLEM, Candidate(Elsewhere(), Config()))
    assert found.reason is None
    assert "AttributeError: module 'villains' has no attribute 'nobody'" in found.note


def test_an_installed_backend_is_sent_by_its_name() -> None:
    assert cell_module._payload(registry.get("direct")) == {"name": "direct"}
    registry.register("direct", replace=True)(lambda x, w, problem: x)
    assert cell_module._payload(registry.get("direct")).keys() == {"pickle"}


# Who is tried ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "who"), [("off", []), ("third-party", ["villain"]), ("all", ["direct", "villain"])]
)  # fmt: skip
def test_the_option_says_who_is_tried(monkeypatch: pytest.MonkeyPatch, mode: str, who: list[str]) -> None:
    asked: list[str] = []

    def note(problem: Problem, candidate: Candidate) -> Finding:
        asked.append(candidate.backend.name)
        return Finding()

    monkeypatch.setattr(isolation, "try_candidate", note)
    candidates = [Candidate(registry.get("direct"), Config()), Candidate(Villain(), Config())]
    with settings.options(isolation=mode):
        assert isolation.admitted(PROBLEM, candidates) == (candidates, [])
        assert isolation.admitted(PROBLEM, candidates) == (candidates, [])  # nobody is asked twice
        assert isolation.admitted(PROBLEM.replace(n=0), candidates) == (candidates, [])  # nobody runs
    assert asked == who


def test_all_of_a_backends_candidates_go_with_the_one_that_did_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {1: Finding(), 2: Finding("raised"), 3: Finding("crashed", lasting=True), 4: Finding()}
    monkeypatch.setattr(isolation, "try_candidate", lambda problem, candidate: found[candidate.config["a"]])
    backend, other = Villain(), Villain("other")
    candidates = [Candidate(backend, Config(a=a)) for a in found] + [Candidate(other, Config(a=1))]
    with settings.options(isolation="third-party"):
        fit, failures = isolation.admitted(PROBLEM, candidates)
    assert fit == candidates[-1:]
    assert [(failure.config["a"], failure.reason) for failure in failures] == [
        (2, "raised"),
        (3, "quarantined: crashed"),
    ]
    held = quarantine.of(backend)
    assert held is not None
    assert (held.reason, held.config, held.problem) == ("crashed", Config(a=3), str(PROBLEM))


_FORKS = """
import os, sys
from pathlib import Path
from convdispatch import registry
from convdispatch.tuning import cell

cell.Child = lambda *_: None
held = cell.Cell(registry.get("direct"))
print(held._folder.path)
sys.stdout.flush()
if (child := os.fork()) == 0:
    sys.exit()
os.waitpid(child, 0)
sys.exit(not Path(held._folder.path).exists())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_the_end_of_a_forked_child_leaves_its_parents_folder_alone() -> None:
    assert not Path(run_well(_FORKS).strip()).exists()  # nor does it outlive the parent


@pytest.mark.parametrize("error", [OSError("no"), RuntimeError("no"), MemoryError("no")])
def test_a_child_that_cannot_be_started_is_waited_for_by_nobody(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*args: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr("convdispatch.tuning.child.subprocess.Popen", refuse)
    assert tried("right") == Finding(
        note="backend 'villain' cannot be tried in a child process, so it is tried here: "
        "its process could not be started: no"
    )


# Nobody is accused who does nothing wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in registry.names() if runs_here(registry.get(name))])
@given(case=familiar_cases())
@hypothesis.settings(max_examples=5)
def test_no_built_in_backend_breaks_the_contract(name: str, case: Case) -> None:
    backend, problem = registry.get(name), case.problem
    if name == "int8_dot":
        problem = problem.replace(dtype="int8", epilogue=Epilogue())
    hypothesis.assume(not problem.is_trivial and not backend.rejects(seen_by(backend, problem)))
    config = heuristic.candidates_of(backend, problem, 2, "measure")[0].config
    with tempfile.TemporaryDirectory() as folder:
        told = isolation_worker._tried(Trial.random(problem), backend, config, Path(folder))
    assert "fault" not in told


# The tuner ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """Isolation as it is by default, with a fake clock for the races and little patience with children."""
    clock = FakeClock()
    monkeypatch.delenv("CONVDISPATCH_ISOLATION")
    settings.from_environment.cache_clear()
    monkeypatch.setattr(isolation, "LIMITS", Limits(seconds=3.0, memory=128 << 20))
    race_by(monkeypatch, clock)
    return clock


def rows(report: tuner.TuneReport) -> tuple[set[str], dict[str, str]]:
    """Return who has results, and why the others have none."""
    entry = report.layers[0].entry
    assert entry is not None
    return {row.backend for row in entry.results}, {failure.backend: failure.reason for failure in entry.failures}


@pytest.mark.parametrize("behaviour", ["aborts", "sleeps"])
def test_tuning_goes_on_without_who_does_harm(
    quick: FakeClock, behaviour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = count_children(monkeypatch)
    villain = Villain("villain", behaviour)
    only(villain, Villain("honest"), registry.get("direct"))
    raced, failed = rows(tune(PROBLEM, threads=1, deployments=("plan",)))
    assert raced == {"honest", "direct"}
    assert failed.keys() == {"villain"}
    assert failed["villain"].startswith(("quarantined: crashed (SIGABRT)", "quarantined: hung: no result within 3 s"))
    assert f"quarantine villain version 1 | {machine.current().id}:" in profile.user_path().read_text()
    assert started == ["villain", "honest"]
    assert not isolation._cells

    # Neither this process nor the next starts a child for it, whatever is tuned.
    profile.forget()
    other = Problem.parse("1x5x5x2 * 1x1x2x3 VALID")
    assert [layer.status for layer in tune(PROBLEM, threads=1, deployments=("plan",)).layers] == ["known"]
    assert rows(tune(other, threads=1, deployments=("plan",))) == ({"honest", "direct"}, {})
    assert tune(PROBLEM, threads=1, deployments=("plan",), retune=True).complete
    assert started == ["villain", "honest", "honest"]

    # A new version is tried, and wins or loses like any other.
    registry.register(Villain("villain", version=2), replace=True)
    report = tune(PROBLEM, threads=1, deployments=("plan",))
    assert rows(report) == ({"villain", "honest", "direct"}, {})
    assert started[3:] == ["villain"]
    assert report.layers[0].status == "tuned"


def test_online_tuning_tries_third_parties_in_a_child_process_too(
    quick: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = count_children(monkeypatch)
    monkeypatch.setattr(online, "_online", online.Online(quick, lambda job: job()))
    only(Scripted("guess", quick), Villain("villain", "aborts"))
    x, w = (np.ones(shape, "f4") for shape in (PROBLEM.input_shape, PROBLEM.filter_shape))
    with settings.options(tuning="online", threads=1):
        plan = convdispatch.plan(x.shape, w)
    for _ in range(2000):
        if type(plan) is Plan:
            break
        plan(x)
    assert (type(plan), plan.candidate.name) == (Plan, "guess")
    assert sorted(started) == ["guess", "villain"]
    assert not isolation._cells
    (entry,) = profile_file.read(profile.user_path()).entries()
    (failure,) = entry.failures
    assert (failure.backend, failure.reason[:28]) == ("villain", "quarantined: crashed (SIGABR")


def test_compiling_ahead_runs_only_who_may_run_here(quick: FakeClock) -> None:
    only(Villain(), Villain("bad", "aborts"), Scripted("scripted", quick))
    seen: list[str] = []
    with pytest.warns(UserWarning, match=r"bad is left out of 1x6x6x2 .*: quarantined: crashed \(SIGABRT\)"):
        assert warm_up(PROBLEM, on_progress=lambda layer, made: seen.extend(one.backend.name for one in made)) == 2
    assert sorted(seen) == ["scripted", "villain"]
    assert not isolation._cells


def test_children_do_not_outlive_tuning_on_a_miss(quick: FakeClock) -> None:
    only(Villain("villain"), registry.get("direct"))
    with settings.options(tuning="on-miss", threads=1):
        convdispatch.plan(PROBLEM.input_shape, np.ones(PROBLEM.filter_shape, "f4"))
    (entry,) = profile_file.read(profile.user_path()).entries()
    assert "villain" in {row.backend for row in entry.results}
    assert not isolation._cells


def test_who_is_mended_without_a_new_version_is_tried_again_when_asked_for(quick: FakeClock) -> None:
    villain = Villain("villain", "aborts")
    only(villain, registry.get("direct"))
    tune(PROBLEM, threads=1, deployments=("plan",))
    villain.behaviour = "right"
    assert tune(PROBLEM, threads=1, deployments=("plan",)).layers[0].status == "known"
    report = tune(PROBLEM, threads=1, deployments=("plan",), retry_quarantined=True)
    assert rows(report) == ({"villain", "direct"}, {})
    assert "quarantine" not in profile.user_path().read_text()


def test_who_is_pruned_out_of_quarantine_is_tried_again_where_it_failed(quick: FakeClock) -> None:
    villain, path = Villain("villain", "aborts"), profile.user_path()
    only(villain, registry.get("direct"))
    tune(PROBLEM, threads=1, deployments=("plan",))
    villain.behaviour = "right"
    profile_file.edit(path, lambda old: profile_tools.prune(old, Selection(quarantined=True)).changes)
    profile.forget()
    isolation.forget([villain])  # as another process, which knows only what the file says
    report = tune(PROBLEM, threads=1, deployments=("plan",))
    assert rows(report) == ({"villain", "direct"}, {})
    assert tune(PROBLEM, threads=1, deployments=("plan",)).layers[0].status == "known"


def test_who_is_not_mended_is_in_quarantine_again(quick: FakeClock) -> None:
    only(Villain("villain", "aborts"), registry.get("direct"))
    for retry in (False, True):
        report = tune(PROBLEM, threads=1, deployments=("plan",), retry_quarantined=retry)
        assert rows(report)[1]["villain"].startswith("quarantined: crashed (SIGABRT)")
        assert "quarantine villain version 1 " in profile.user_path().read_text()


def test_when_only_who_is_in_quarantine_may_take_part_the_error_says_so(quick: FakeClock) -> None:
    only(Villain("villain", "aborts"), registry.get("direct"))
    for said in ("villain: quarantined: crashed", "villain version 1 is quarantined: crashed"):
        (layer,) = tune(PROBLEM, threads=1, deployments=("plan",), backends=["villain"]).layers
        assert layer.status == "failed"
        assert said in layer.reason


def test_an_old_winner_in_quarantine_does_not_race(quick: FakeClock) -> None:
    villain = Villain("villain")
    only(villain, registry.get("direct"))
    first = tune(PROBLEM, threads=1, deployments=("plan",)).layers[0].entry
    assert first is not None
    profile.remember(replace(first, results=tuple(sorted(first.results, key=lambda row: row.backend != "villain"))))
    profile_file.write(profile.user_path(), [profile.find(first.key)[0].entry], machine.current())
    quarantine.add(Candidate(villain, Config()), PROBLEM, "crashed")
    assert rows(tune(PROBLEM, threads=1, deployments=("plan",), retune=True)) == ({"direct"}, {})


def test_an_entry_that_is_measured_again_still_says_who_is_quarantined(quick: FakeClock) -> None:
    only(Villain("villain", "aborts"), registry.get("direct"))
    first = rows(tune(PROBLEM, threads=1, deployments=("plan",)))
    assert first[1].keys() == {"villain"}
    assert rows(tune(PROBLEM, threads=1, deployments=("plan",), retune=True)) == first


def test_tuning_on_a_miss_survives_who_does_harm(quick: FakeClock) -> None:
    only(Villain("villain", "reads null"), registry.get("direct"))
    with settings.options(tuning="on-miss", threads=1):
        decision = dispatch.decide(PROBLEM, "plan")
    assert decision.candidate.backend.name == "direct"
    assert quarantine.of(registry.get("villain")) is not None


SCRIPT = """
import ctypes, sys
import convdispatch

@convdispatch.register("mine")
def mine(x, w, problem):
    return ctypes.string_at(0)

@convdispatch.register("ours")
def ours(x, w, problem):
    from convdispatch import reference
    return reference.convolve(problem, x, w)

how = {"deployments": ("plan",), "threads": 1, "allow_busy": True, "backends": ["mine", "ours", "direct"]}
report = convdispatch.tune(sys.argv[1], **how)
print(sorted({row.backend for row in report.layers[0].entry.results}))
print(report.layers[0].entry.failures[0].reason)
"""


@pytest.mark.parametrize("how", ["script", "text"])
def test_a_script_that_defines_its_own_backends_needs_no_precautions(tmp_path: Path, how: str) -> None:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    environment = {**os.environ, "CONVDISPATCH_PROFILE": str(tmp_path / "p.yaml")}
    del environment["CONVDISPATCH_ISOLATION"]
    what = [str(file)] if how == "script" else ["-c", SCRIPT]
    environment["PYTHONPATH"] = str(Path(convdispatch.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *what, str(PROBLEM)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    won, reason = done.stdout.splitlines()
    assert won == "['direct', 'ours']"
    assert reason.startswith("quarantined: crashed (SIGSEGV) in string_at")


def test_who_spoils_its_process_is_not_run_in_this_one() -> None:
    backend = Villain("spoils", "spoils its process")
    only(backend)
    assert try_candidate(PROBLEM, Candidate(backend, Config(n=1))).reason is None
    finding = try_candidate(PROBLEM, Candidate(backend, Config(n=2)))
    assert finding.lasting
    assert finding.reason is not None
    assert finding.reason.startswith("crashed (SIGABRT)")
    isolation.close()
