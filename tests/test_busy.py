"""A busy machine: how it is noticed, waited for, refused, and marked. The machine here does as it is told."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from quiet import BusyWatch, QuietWatch
from scripted import PROBLEM, RULES, FakeClock, Scripted, only, race_by

import convdispatch
from convdispatch import machine, profile, profile_file, settings
from convdispatch.backend import Config
from convdispatch.cli import main
from convdispatch.errors import BusyMachineError, ConvDispatchError
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Key
from convdispatch.tuning import busy as busying
from convdispatch.tuning.busy import Conditions, Ticks, Watch, children_seconds, since, wait_until_quiet
from convdispatch.tuning.problem_race import tune_problem
from convdispatch.tuning.tuner import tune

OTHER = Problem.parse("1x5x5x2 * 1x1x2x3 VALID")
SAYS = "a fixed loop waited for a core for 50.0% of its time"


class Machine:
    """Makes watches that see a busy machine as often as scripted, then a quiet one."""

    def __init__(self, *busy: bool, then: bool = False) -> None:
        self.script, self.then = iter(busy), then
        self.made = 0

    def __call__(self, threads: int) -> Watch:
        self.made += 1
        return (BusyWatch if next(self.script, self.then) else QuietWatch)(threads)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    race_by(monkeypatch, fake)
    return fake


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    def make(*script: bool, then: bool = False) -> Machine:
        made = Machine(*script, then=then)
        monkeypatch.setattr(busying, "make_watch", made)
        return made

    return make


def key(problem: Problem = PROBLEM) -> Key:
    return Key(problem, "plan", 1, machine.current().id)


def stored() -> dict[Problem, Entry]:
    return {entry.key.problem: entry for entry in profile_file.read(profile.writable_path()).entries()}


# What is seen -------------------------------------------------------------------------------------------------------


class Told(QuietWatch):
    """Threads of which only so many run at once, and tasks of others, as told."""

    slowness: Iterator[float] = iter(())
    waiting: Iterator[float | None] = iter(())

    def together(self) -> float:
        return next(self.slowness)

    def tasks(self) -> float | None:
        return next(self.waiting)


def seen(slowness: list[float], waiting: list[float | None], threads: int = 2) -> Conditions:
    watch = Told(threads)
    watch.slowness, watch.waiting = iter(slowness), iter(waiting)
    watch.start()
    for _ in waiting:
        watch.calibrate()
    return watch.stop()


def test_threads_that_do_not_run_at_once_are_a_complaint() -> None:
    alone = seen([2.0] * 5, [0.0] * 5)
    assert alone.missing == pytest.approx(0.5)
    assert alone.complaints() == ["50.0% of the threads' speed was missing when all ran"]
    assert seen([1.25] * 5, [0.0] * 5).complaints() == []  # waking a thread takes its time
    assert seen([1.1, 1.1, 2.0, 1.1, 2.1], [0.0] * 5).complaints() == []  # now and then is not always


def test_one_thread_is_not_asked_whether_it_runs_with_others() -> None:
    conditions = seen([], [0.0] * 5, threads=1)
    assert conditions.missing is None
    assert conditions.complaints() == []


def test_tasks_of_others_are_a_complaint_if_they_are_there_most_of_the_time() -> None:
    assert seen([1.1] * 5, [0.5, 0.5, 0.0, 0.5, 0.5]).complaints() == ["other tasks wanted 50.0% of the cores"]
    assert seen([1.1] * 5, [0.0, 2.0, 0.0, 0.0, 0.0]).complaints() == []
    assert seen([1.1] * 5, [None] * 5).load is None


@pytest.mark.parametrize("found", ["", "0.1 0.2 0.3", "a b c d/e f"])
def test_a_system_that_does_not_tell_its_load_is_judged_without(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: found)
    assert Watch().tasks() is None
    assert Watch().ticks() is None


def test_what_this_process_does_is_no_task_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: "0.25 0.28 0.48 1/92 30171\n")
    assert Watch().tasks() == 0.0


def test_this_machine_can_be_looked_at() -> None:
    conditions = Watch(2).look()
    assert conditions.missing is not None
    assert conditions.missing < 1
    assert 0 <= conditions.waiting <= 1
    assert conditions.spread >= 0


def test_watching_takes_a_small_part_of_the_time() -> None:
    class Slow(QuietWatch):
        def loop(self) -> tuple[float, float]:
            self.time[0] += 1.0
            self.calls += 1
            return 1.0, 1.0

        calls = 0

    watch = Slow()
    watch.start()
    for _ in range(1000):
        watch.time[0] += 1.0
        watch.glance()
    assert 40 <= watch.calls <= 60
    again = Slow()
    again.start()
    again.finish()
    assert again.calls == 7


def test_what_our_own_children_did_is_not_done_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(QuietWatch):
        def ticks(self) -> Ticks | None:
            return Ticks(worked, 0.0, total)

    monkeypatch.setattr("convdispatch.tuning.busy.time.process_time", lambda: 0.0)
    worked, total, ours = 5.0, 100.0, 1.0
    tell = since(lambda: Counts(1), lambda: ours)
    worked, total, ours = 8.0, 110.0, 4.0
    assert tell() == ""
    worked, total = 11.0, 120.0
    assert tell() == "other processes used 30.0% of the cores"


_WORKS = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"


def test_childrens_seconds_count_while_they_live_and_when_they_have_ended() -> None:
    before = children_seconds()
    with subprocess.Popen([sys.executable, "-c", _WORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert children_seconds() - before > 0.2
        child.communicate(b"\n")
    assert children_seconds() - before > 0.2


# Waiting ------------------------------------------------------------------------------------------------------------


def test_a_quiet_machine_is_not_waited_for() -> None:
    told: list[str] = []
    make = Machine()
    assert wait_until_quiet(lambda: make(2), 10.0, told.append) == []
    assert (make.made, told) == (1, [])


@pytest.mark.parametrize(("looks", "quiet"), [(3, True), (100, False)])
def test_a_busy_machine_is_waited_for_but_not_for_ever(looks: int, quiet: bool) -> None:
    told: list[str] = []
    make = Machine(*[True] * looks)
    began = QuietWatch.time[0]
    complaints = wait_until_quiet(lambda: make(1), 10.0, told.append)
    assert told == [f"the machine is busy ({SAYS}); waiting up to 10 s for a quiet moment"]
    assert (complaints == []) is quiet
    assert quiet or 10.0 <= QuietWatch.time[0] - began <= 12.0


# Tuning -------------------------------------------------------------------------------------------------------------


def test_a_race_that_was_disturbed_is_run_again_and_longer(clock: FakeClock, busy: Callable[..., Machine]) -> None:
    made = busy(True)
    only(Scripted("a", clock), Scripted("b", clock, lambda call: 1.2 + 0.3 * (call % 3)))
    outcome = tune_problem(key(), clock=clock, rules=RULES)
    assert made.made == 2
    assert outcome.busy == ()
    assert outcome.entry.flags == ()
    assert outcome.entry.winner.rounds > RULES.rounds


def test_a_race_that_ran_out_of_its_time_has_more_of_it_when_it_is_run_again(
    clock: FakeClock, busy: Callable[..., Machine]
) -> None:
    rules = dataclasses.replace(RULES, rounds=1000, race_seconds=100.0)
    found = []
    for script in ((), (True,)):
        busy(*script)
        only(Scripted("a", clock), Scripted("b", clock, lambda call: 0.8 + 0.4 * (call % 4 > 1)))
        found.append(tune_problem(key(), clock=clock, rules=rules).entry.winner.rounds)
    assert 1.8 < found[1] / found[0] < 2.2


def test_what_is_disturbed_twice_is_flagged_and_says_why(clock: FakeClock, busy: Callable[..., Machine]) -> None:
    made = busy(True, True)
    only(Scripted("a", clock), Scripted("b", clock, 1.2))
    outcome = tune_problem(key(), clock=clock, rules=RULES)
    assert made.made == 2
    assert outcome.busy == (SAYS,)
    assert outcome.entry.flags == ("busy",)


def test_a_second_race_is_within_the_time_limit(clock: FakeClock, busy: Callable[..., Machine]) -> None:
    made = busy(then=True)
    only(Scripted("a", clock), Scripted("b", clock, 1.2))
    assert tune_problem(key(), clock=clock, rules=RULES, seconds=5.0).entry.flags == ("busy",)
    assert made.made == 1


def test_who_raises_in_a_disturbed_race_does_not_come_back(clock: FakeClock, busy: Callable[..., Machine]) -> None:
    busy(True)
    # Calls 1 to 9 are checks; then come two of warming up and two a round.
    bad = Scripted("bad", clock, fails_in=lambda where, call: where == "call" and call == 14)
    only(bad, Scripted("good", clock))
    entry = tune_problem(key(), clock=clock, rules=RULES).entry
    assert [result.backend for result in entry.results] == ["good"]
    assert [failure.backend for failure in entry.failures] == ["bad"]
    assert bad.calls == 14


def test_a_busy_machine_is_refused_before_anything_is_measured(clock: FakeClock, busy: Callable[..., Machine]) -> None:
    busy(then=True)
    backend = Scripted("a", clock)
    only(backend)
    told: list[str] = []
    with pytest.raises(BusyMachineError, match=r"waited for a core for 50\.0%.*--allow-busy") as caught:
        tune(PROBLEM, on_wait=told.append)
    assert isinstance(caught.value, ConvDispatchError)
    assert backend.calls == 0
    assert len(told) == 1
    assert stored() == {}


def test_a_machine_that_becomes_quiet_is_tuned(clock: FakeClock, busy: Callable[..., Machine]) -> None:
    busy(True, True)
    only(Scripted("a", clock))
    report = tune(PROBLEM)
    assert report.complete
    assert report.flagged == 0


def test_what_is_known_needs_no_quiet(clock: FakeClock, busy: Callable[..., Machine]) -> None:
    only(Scripted("a", clock))
    tune(PROBLEM)
    made = busy(then=True)
    assert [layer.status for layer in tune(PROBLEM).layers] == ["known", "known"]
    assert [layer.status for layer in tune(OTHER, time_limit=0).layers] == ["left", "left"]
    assert made.made == 0


def test_allowed_busy_measurements_are_flagged_and_measured_again_when_next_possible(
    clock: FakeClock, busy: Callable[..., Machine]
) -> None:
    busy(then=True)
    only(Scripted("a", clock))
    report = tune([PROBLEM, OTHER], deployments=("plan",), allow_busy=True)
    assert report.complete
    assert report.flagged == 2
    assert [layer.busy for layer in report.layers] == [(SAYS,)] * 2
    assert {entry.flags for entry in stored().values()} == {("busy",)}

    busy()
    profile.forget()
    again = tune([PROBLEM, OTHER], deployments=("plan",))
    assert [layer.status for layer in again.layers] == ["tuned", "tuned"]
    assert again.flagged == 0
    assert {entry.flags for entry in stored().values()} == {()}
    assert [layer.status for layer in tune([PROBLEM], deployments=("plan",)).layers] == ["known"]


def test_a_machine_that_becomes_busy_later_stops_nothing(clock: FakeClock, busy: Callable[..., Machine]) -> None:
    busy(False, False, then=True)  # the look, the first race
    only(Scripted("a", clock))
    report = tune([PROBLEM, OTHER], deployments=("plan",))
    assert [layer.entry.flags for layer in report.layers if layer.entry] == [(), ("busy",)]


def test_what_was_disturbed_is_measured_again_at_the_end(clock: FakeClock, busy: Callable[..., Machine]) -> None:
    made = busy(False, True, True)  # the look, twice the first race
    only(Scripted("a", clock, lambda call: 1.0 if call < 60 else 3.0), Scripted("b", clock, 1.2))
    heard: list[str] = []
    report = tune([PROBLEM, OTHER], deployments=("plan",), on_progress=lambda layer: heard.append(layer.status))
    assert made.made == 6  # and the second race, another look, and the first race again
    assert heard == ["tuned", "tuned"]
    assert report.flagged == 0
    assert {entry.flags for entry in stored().values()} == {()}


def test_what_was_disturbed_is_not_measured_again_beyond_the_time_limit(
    clock: FakeClock, busy: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = busy(False, True, True)
    monkeypatch.setattr("time.monotonic", clock)
    only(Scripted("a", clock))
    assert tune(PROBLEM, deployments=("plan",), time_limit=5.0).flagged == 1
    assert made.made <= 3


def test_a_missing_core_makes_no_winner_of_one_thread(clock: FakeClock, busy: Callable[..., Machine]) -> None:
    two, one = (Config(threads=count, factor=factor) for count, factor in ((2, 1.3), (1, 1.0)))
    parallel = Scripted("a", clock, tried=(two, one), expected=0.5)
    only(parallel, Scripted("b", clock, 3.0))
    busy(True, True)
    disturbed = tune_problem(replace(key(), threads=2), clock=clock, rules=RULES).entry
    assert (disturbed.winner.config["threads"], disturbed.flags) == (2, ("busy",))
    assert disturbed.results[1].config["threads"] == 1  # it is known that it was faster
    assert tune_problem(replace(key(), threads=2), clock=clock, rules=RULES).entry.winner.config["threads"] == 1


def test_what_is_kept_of_a_flagged_entry_keeps_the_flag(clock: FakeClock, busy: Callable[..., Machine]) -> None:
    busy(then=True)
    only(Scripted("a", clock), Scripted("b", clock, 1.2), Scripted("c", clock, 1.3))
    tune(PROBLEM, deployments=("plan",), allow_busy=True)
    busy()
    tune(PROBLEM, deployments=("plan",), backends=["b"])
    assert stored()[PROBLEM].flags == ("busy",)  # "c" was not measured again
    tune(PROBLEM, deployments=("plan",))
    assert stored()[PROBLEM].flags == ()


def test_what_a_busy_run_measured_beyond_this_effort_goes_with_the_first_quiet_one(
    clock: FakeClock, busy: Callable[..., Machine]
) -> None:
    busy(then=True)
    only(Scripted("a", clock, expected=1.0), Scripted("b", clock, 1.2, expected=1e9))
    tune(PROBLEM, deployments=("plan",), effort="exhaustive", allow_busy=True)
    assert [result.backend for result in stored()[PROBLEM].results] == ["a", "b"]
    busy()
    tune(PROBLEM, deployments=("plan",))  # "b" is estimated too slow for this
    assert [result.backend for result in stored()[PROBLEM].results] == ["a"]
    assert stored()[PROBLEM].flags == ()
    assert [layer.status for layer in tune(PROBLEM, deployments=("plan",)).layers] == ["known"]


def test_tuning_on_a_miss_never_refuses_and_measures_once(clock: FakeClock, busy: Callable[..., Machine]) -> None:
    busy(then=True)
    backend = Scripted("a", clock)
    only(backend, Scripted("b", clock, 1.3))
    x, w = np.ones(PROBLEM.input_shape, "f4"), np.ones(PROBLEM.filter_shape, "f4")
    with settings.options(tuning="on-miss", threads=1):
        convdispatch.conv2d(x, w)
        calls = backend.calls
        convdispatch.conv2d(x, w)
        assert backend.calls == calls + 1
    assert stored()[PROBLEM].flags == ("busy",)


# The command line ---------------------------------------------------------------------------------------------------


def run(*words: Any) -> Any:
    profile.forget()
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_refuses_with_its_own_exit_code_or_marks_what_it_measured(
    clock: FakeClock, busy: Callable[..., Machine], tmp_path: Path
) -> None:
    busy(then=True)
    only(Scripted("a", clock))
    words = ("tune", PROBLEM, "--deployment", "plan", "--profile", tmp_path / "profile.yaml")
    refused = run(*words)
    assert refused.exit_code == 5
    assert "waiting up to 10 s" in refused.stderr
    assert "--allow-busy" in refused.stderr
    assert "Traceback" not in refused.output

    marked = run(*words, "--allow-busy")
    assert marked.exit_code == 0, marked.output
    assert f"(busy: {SAYS})" in marked.stderr
    assert "a (busy)" in marked.stdout
    assert "1 flagged busy: run again when the machine is quiet" in marked.stdout

    data = json.loads(run(*words, "--allow-busy", "--json").stdout)
    assert data["flagged"] == 1
    assert data["layers"][0]["flags"] == ["busy"]
    assert data["layers"][0]["busy"] == [SAYS]

    busy()
    quiet = run(*words)
    assert quiet.exit_code == 0
    assert "busy" not in quiet.output


def test_nobody_is_left_with_ticks_of_the_real_machine() -> None:
    assert busying.make_watch is QuietWatch
    watch = busying.make_watch(2)
    assert isinstance(watch.ticks(), Ticks | None)
    assert watch.look().complaints() == []


def test_tasks_that_use_no_core_make_no_machine_busy() -> None:
    quiet = Conditions(spread=0.0, waiting=0.0, others=0.0, steal=0.0, missing=0.0, load=1.0)
    assert quiet.complaints() == []
    assert dataclasses.replace(quiet, others=0.05).complaints() == ["other tasks wanted 100.0% of the cores"]
    assert dataclasses.replace(quiet, others=None).complaints() == ["other tasks wanted 100.0% of the cores"]
