"""The tuner under a fake clock, with backends that take, do and fail as scripted. No real time is measured."""

import errno
import itertools
import mmap
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import PROBLEM, RULES, FakeClock, Scripted, only, race_by

import convdispatch
from convdispatch import dispatch, machine, profile, profile_file, reference, registry, report, settings
from convdispatch.arguments import Array
from convdispatch.backend import Backend, Candidate, Config, Numerics
from convdispatch.errors import ArgumentError, BackendError, ProfileError, UnknownBackendError
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Key, Result
from convdispatch.report import rivals
from convdispatch.tuning import gate, hard_inputs, online
from convdispatch.tuning.calibrate import calibrate
from convdispatch.tuning.gate import Trial
from convdispatch.tuning.layers import LayerReport
from convdispatch.tuning.preference import order_by_preference
from convdispatch.tuning.problem_race import tune_problem
from convdispatch.tuning.race import Rules
from convdispatch.tuning.tuner import TuneReport, tune
from convdispatch.tuning.validate import validate
from convdispatch.tuning.workload import Layer, Workload

OTHER = Problem.parse("1x5x5x2 * 1x1x2x3 VALID")
THIRD = Problem.parse("2x6x5x2 * 3x2x2x3 VALID stride=2")


class Forgetful(Scripted):
    """Stores nothing at all: what is in the output is what was there."""

    def store(self, problem: Problem, input: Array, filters: Array, out: Array) -> None:
        pass


class LeavesTheLastRow(Scripted):
    """Right but for the last row, which it never stores."""

    def store(self, problem: Problem, input: Array, filters: Array, out: Array) -> None:
        out[:, :-1] = reference.convolve(problem, input, filters)[:, :-1].astype(out.dtype)


def key(problem: Problem = PROBLEM, deployment: str = "plan", threads: int = 1) -> Key:
    return Key(problem, deployment, threads, machine.current().id)


def race_of(*backends: Backend, clock: FakeClock, **more: Any) -> Entry:
    only(*backends)
    return tune_problem(more.pop("key", key()), clock=clock, rules=RULES, **more).entry


def names_of(entry: Entry) -> list[str]:
    return [result.backend for result in entry.results]


def reasons(entry: Entry) -> dict[str, str]:
    return {failure.backend: failure.reason for failure in entry.failures}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """A clock that ``tune`` uses too, with rules that are quick to run."""
    fake = FakeClock()
    race_by(monkeypatch, fake)
    return fake


# One problem ----------------------------------------------------------------------------------------------------


def test_the_fastest_wins_with_all_the_evidence(clock: FakeClock) -> None:
    entry = race_of(
        Scripted("slow", clock, 1.3),
        Scripted("fast", clock, 1.0, space=64),
        Scripted("mid", clock, 1.2),
        clock=clock,
    )
    assert names_of(entry) == ["fast", "mid", "slow"]
    winner = entry.winner
    assert winner.median == pytest.approx(1.0)
    assert winner.spread == pytest.approx(0.0, abs=1e-9)
    assert winner.rounds == RULES.rounds
    assert winner.workspace == 64
    assert 0 <= winner.error < 1e-6
    assert winner.version == 1
    assert winner.config == Config()
    assert entry.key == key()
    assert entry.effort == "measure"
    assert entry.failures == ()


def test_the_yardstick_for_speed_is_the_clock_and_not_the_estimate(clock: FakeClock) -> None:
    entry = race_of(
        Scripted("promises", clock, 1.4, expected=0.4), Scripted("delivers", clock, 1.0, expected=1.0), clock=clock
    )
    assert entry.winner.backend == "delivers"


def test_who_is_wrong_may_not_win_however_fast(clock: FakeClock) -> None:
    entry = race_of(Scripted("wrong", clock, 0.001, off=0.5), Scripted("right", clock), clock=clock)
    assert names_of(entry) == ["right"]
    assert reasons(entry)["wrong"].startswith("wrong result: error")
    assert "times what is allowed" in reasons(entry)["wrong"]


def test_nan_is_a_wrong_result(clock: FakeClock) -> None:
    entry = race_of(Scripted("nan", clock, 0.001, off=np.nan), Scripted("right", clock), clock=clock)
    assert reasons(entry) == {"nan": "wrong result: results that are not finite from finite input"}


@pytest.mark.parametrize("kind", [Forgetful, LeavesTheLastRow])
@pytest.mark.parametrize("text", [PROBLEM.text, PROBLEM.text + " int32", PROBLEM.text + " float64"])
def test_who_stores_too_little_cannot_pass_with_what_another_left_in_memory(
    clock: FakeClock, kind: type[Scripted], text: str
) -> None:
    backends = [Scripted("right", clock), kind("idle", clock, 0.001), Scripted("right2", clock)]
    entry = race_of(*backends, clock=clock, key=key(Problem.parse(text)))
    assert names_of(entry) == ["right", "right2"]
    assert reasons(entry)["idle"].startswith("wrong result")


def test_an_integer_result_must_be_exact(clock: FakeClock) -> None:
    whole = key(Problem.parse("1x6x6x2 * 3x3x2x3 SAME int8"))
    entry = race_of(Scripted("near", clock, 0.1, off=1), Scripted("exact", clock), clock=clock, key=whole)
    assert names_of(entry) == ["exact"]
    assert "108 of 108 integer results differ" in reasons(entry)["near"]
    assert entry.winner.error == 0


@pytest.mark.parametrize(
    ("where", "call"),
    [("prepare", 1), ("call", 1), ("call", 2), ("call", 3), ("call", 5), ("workspace", 0)],
)
@pytest.mark.parametrize("deployment", ["plan", "call"])
def test_who_raises_is_recorded_with_the_reason_and_stops_nobody_else(
    clock: FakeClock, where: str, call: int, deployment: str
) -> None:
    bad = Scripted("bad", clock, 0.9, fails_in=lambda w, c: (w, c) == (where, call))
    entry = race_of(
        bad, Scripted("good", clock), Scripted("fine", clock, 1.1), clock=clock, key=key(PROBLEM, deployment)
    )
    assert names_of(entry) == ["good", "fine"]
    assert reasons(entry) == {"bad": "ValueError: scripted"}
    assert all(result.rounds == RULES.rounds for result in entry.results)


def test_packing_that_fails_in_a_later_call_is_a_failure_too(clock: FakeClock) -> None:
    bad = Scripted("bad", clock, 0.9, fails_in=lambda where, call: (where, call) == ("prepare", 4))
    entry = race_of(bad, Scripted("good", clock), clock=clock, key=key(PROBLEM, "call"))
    assert reasons(entry) == {"bad": "ValueError: scripted"}
    assert names_of(entry) == ["good"]


def test_a_long_reason_is_cut_to_one_line_that_can_be_read(clock: FakeClock) -> None:
    bad = Scripted("bad", clock, fails_in=lambda *_: True, error=lambda: ValueError("line\n" * 1000))
    reason = reasons(race_of(bad, Scripted("good", clock), clock=clock))["bad"]
    assert reason.startswith("ValueError: line line")
    assert "\n" not in reason
    assert len(reason) <= 300


def test_when_nobody_can_do_it_the_error_names_everybody(clock: FakeClock) -> None:
    only(Scripted("wrong", clock, off=1.0), Scripted("broken", clock, fails_in=lambda *_: True))
    with pytest.raises(BackendError, match=r"no candidate could do 1x6x6x2 .* wrong.*wrong result.*broken.*scripted"):
        tune_problem(key(), clock=clock, rules=RULES)


def test_when_nobody_takes_it_the_error_says_so(clock: FakeClock) -> None:
    only(Scripted("picky", clock, reason="not this"))
    with pytest.raises(BackendError, match="picky: not this"):
        tune_problem(key(), clock=clock, rules=RULES)


@pytest.mark.parametrize("beginning", range(30))
def test_a_machine_that_slows_down_for_a_while_does_not_make_a_loser_win(clock: FakeClock, beginning: int) -> None:
    # "later" is put out after three rounds; when the spell begins after that, its times look better than the
    # others', which went through it.
    spell = 4 + beginning
    clock.slow = lambda now: 3.0 if spell <= now else 1.0
    entry = race_of(
        Scripted("best", clock, 1.0), Scripted("near", clock, 1.1), Scripted("later", clock, 1.6), clock=clock
    )
    assert entry.winner.backend == "best"


@pytest.mark.parametrize("period", [1.0, 2.0, 5.0, 9.0, 30.0])
def test_a_machine_that_is_slow_now_and_then_does_not_make_a_loser_win(clock: FakeClock, period: float) -> None:
    clock.slow = lambda now: 2.0 if now % (2 * period) < period else 1.0
    rules = Rules(rounds=41, sample_seconds=0.0, race_seconds=1e9)
    only(Scripted("best", clock, 1.0), Scripted("worse", clock, 1.25), Scripted("worst", clock, 1.4))
    assert tune_problem(key(), clock=clock, rules=rules).entry.winner.backend == "best"


def test_a_first_call_that_compiles_does_not_count(clock: FakeClock) -> None:
    compiles = Scripted("compiles", clock, lambda call: 1000.0 if call == 1 else 1.0)
    entry = race_of(compiles, Scripted("steady", clock, 1.2), clock=clock)
    assert entry.winner.backend == "compiles"
    assert entry.winner.median == pytest.approx(1.0)


def test_hopeless_estimates_are_left_out_and_named(clock: FakeClock) -> None:
    hopeless = Scripted("hopeless", clock, expected=100.0)
    only(Scripted("fine", clock, expected=1.0), hopeless, Scripted("unknown", clock, expected=None))
    outcome = tune_problem(key(), clock=clock, rules=RULES)
    assert outcome.left_out == ("hopeless",)
    assert sorted(names_of(outcome.entry)) == ["fine", "unknown"]
    assert hopeless.calls == 0
    assert tune_problem(key(), effort="exhaustive", clock=clock, rules=RULES).left_out == ()


def test_the_yardstick_is_measured_unless_that_takes_long(clock: FakeClock) -> None:
    yardstick = Scripted("direct", clock, 500.0, expected=0.08)
    only(Scripted("fine", clock, expected=0.001), yardstick)
    entry = tune_problem(key(), clock=clock, rules=RULES).entry
    assert names_of(entry) == ["fine", "direct"]
    assert entry.results[1].rounds == 1
    yardstick.expected, yardstick.calls = 0.12, 0
    outcome = tune_problem(key(), clock=clock, rules=RULES)
    assert (outcome.left_out, yardstick.calls) == (("direct",), 0)


def test_every_config_competes_and_is_stored_as_it_is(clock: FakeClock) -> None:
    tried = (Config(factor=1.0, tile="a"), Config(factor=0.9, tile="b"), Config(factor=1.2, tile="c"))
    entry = race_of(Scripted("many", clock, tried=tried), clock=clock)
    assert [result.config["tile"] for result in entry.results] == ["b", "a", "c"]
    assert entry.winner.name == "many(factor=0.9, tile=b)"


def test_a_parallel_backend_races_with_every_thread_count_within_the_budget(clock: FakeClock) -> None:
    only(Scripted("wide", clock, parallel=True), Scripted("narrow", clock))
    entry = tune_problem(key(threads=6), clock=clock, rules=RULES).entry
    counts = {(r.backend, r.config.threads) for r in entry.results}
    assert counts == {("wide", 6), ("wide", 4), ("wide", 2), ("wide", 1), ("narrow", 1)}


def test_a_call_includes_the_packing_and_a_plan_does_not(clock: FakeClock) -> None:
    backends = Scripted("packs", clock, 1.0, packing=5.0), Scripted("plain", clock, 1.4)
    assert race_of(*backends, clock=clock).winner.backend == "packs"
    called = race_of(*backends, clock=clock, key=key(PROBLEM, "call"))
    assert called.winner.backend == "plain"
    assert next(r.median for r in called.results if r.backend == "packs") == pytest.approx(6.0)


@pytest.mark.parametrize("text", [PROBLEM.text + " +bias +residual +relu", "2x2x6x6 NCHW * 3x3x2x3 SAME +residual"])
def test_epilogues_and_layouts_are_tuned_like_any_problem(clock: FakeClock, text: str) -> None:
    problem = Problem.parse(text)
    entry = race_of(Scripted("a", clock), Scripted("off", clock, 0.5, off=1.0), clock=clock, key=key(problem))
    assert names_of(entry) == ["a"]


@pytest.mark.parametrize("limit", [0.0, 5.0])
def test_a_time_limit_is_kept_but_for_the_rounds_that_every_race_needs(clock: FakeClock, limit: float) -> None:
    only(Scripted("a", clock, 1.0), Scripted("b", clock, 1.1))
    rules = Rules(rounds=1000, sample_seconds=0.0, race_seconds=1e9)
    entry = tune_problem(key(), seconds=limit, clock=clock, rules=rules).entry
    assert 3 <= entry.winner.rounds <= 4
    assert clock.now < 2.1 * (1 + 8 + 2 + 4) + limit  # random input, hard inputs, warming up, rounds


def test_a_backend_may_convolve_itself_without_starting_another_race(clock: FakeClock) -> None:
    class Nested(Scripted):
        def store(self, problem: Problem, input: Array, filters: Array, out: Array) -> None:
            with settings.options(forbid=("nested",)):
                convdispatch.conv2d(np.ones(OTHER.input_shape, "f4"), np.ones(OTHER.filter_shape, "f4"))
            super().store(problem, input, filters, out)

    with settings.options(tuning="on-miss"):
        entry = race_of(Nested("nested", clock), Scripted("plain", clock), clock=clock)
    assert names_of(entry) == ["plain", "nested"]
    assert not profile.user_path().exists()


# Ties -----------------------------------------------------------------------------------------------------------


def result(name: str, median: float, error: float = 0.0, workspace: int = 0, rounds: int = 7) -> Result:
    return Result(name, 1, Config(), median, 0.0, rounds, error, workspace)


@pytest.mark.parametrize(
    ("first", "second", "incumbent", "winner"),
    [
        (result("a", 1.0), result("b", 0.995), None, "a"),
        (result("a", 1.0), result("b", 0.995), "b", "b"),
        (result("a", 1.0, error=1e-6), result("b", 1.005, error=1e-7), None, "b"),
        (result("a", 1.0, error=1e-6), result("b", 1.005, error=1e-7), "a", "a"),
        (result("a", 1.0, workspace=9), result("b", 1.005, workspace=8), None, "b"),
        (result("a", 1.0, 1e-7, 9), result("b", 1.005, 1e-6, 8), None, "a"),
        (result("a", 1.02), result("b", 1.0), None, "b"),
        (result("a", 1.02), result("b", 1.0), "a", "b"),
        (result("a", 0.9, rounds=3), result("b", 1.0), "a", "b"),
    ],
    ids=[
        "name", "incumbent over name", "smaller error", "incumbent over error", "less memory", "error over memory",
        "no tie", "an incumbent that lost", "who left early cannot win",
    ],
)  # fmt: skip
def test_ties_are_decided_by_a_fixed_order(first: Result, second: Result, incumbent: str | None, winner: str) -> None:
    for order in ([first, second], [second, first]):
        ordered = order_by_preference(order, incumbent)
        assert ordered[0].name == winner
        assert len(ordered) == 2


@given(seed=st.integers(0, 2**32), incumbent=st.sampled_from([None, "a", "b"]), noise=st.floats(0.0, 0.0049))
def test_noise_within_the_margin_never_flips_a_tie(seed: int, incumbent: str | None, noise: float) -> None:
    clock = FakeClock()
    shaking = random.Random(seed)

    def seconds(call: int) -> float:
        return 1.0 + shaking.uniform(-noise, noise)

    old = None if incumbent is None else Entry(key(), (Result(incumbent, 1, Config(), 1.0, 0.0, 1, 0.0, 0),))
    try:
        entry = race_of(
            Scripted("b", clock, seconds, space=8), Scripted("a", clock, seconds, space=16), clock=clock, incumbent=old
        )
    finally:
        registry.restore()
    assert entry.winner.backend == (incumbent or "b")


@given(st.permutations([result("a", 1.0), result("b", 1.3), result("c", 1.009), result("d", 2.0, rounds=3)]))
def test_the_order_of_measuring_decides_nothing(results: list[Result]) -> None:
    assert [r.name for r in order_by_preference(results, None)] == ["a", "c", "b", "d"]


def test_rivals_are_each_backends_best_time_over_the_winners() -> None:
    entry = Entry(key(), (result("a", 2.0), result("a", 2.2), result("b", 3.0), result("b", 2.5)))
    assert list(rivals(entry)) == [("a", 1.0), ("b", 1.25)]


def test_no_ratio_is_told_to_a_winner_too_fast_for_the_clock(clock: FakeClock) -> None:
    entry = Entry(key(), (result("a", 0.0), result("a", 0.0), result("direct", 3.0)))
    assert list(rivals(entry)) == [("a", 1.0)]
    layer = LayerReport(Layer(PROBLEM), "plan", "known", entry)
    assert report.tune_cells(layer)[-2:] == ("1x", "-")
    assert report.total_line([layer]) == "one pass of these layers: 0 ns"


# Workloads ------------------------------------------------------------------------------------------------------


def tune_three(**more: Any) -> TuneReport:
    return tune([PROBLEM, OTHER, THIRD], threads=1, **more)


def statuses(report: TuneReport) -> list[str]:
    return [layer.status for layer in report.layers]


def stored() -> dict[Key, Entry]:
    return {entry.key: entry for entry in profile_file.read(profile.writable_path()).entries()}


def test_tune_measures_each_problem_and_deployment_and_stores_the_winners(clock: FakeClock) -> None:
    only(Scripted("fast", clock, packing=9.0), Scripted("slow", clock, 1.4))
    report = tune_three()
    assert report.complete
    assert [(layer.layer.problem, layer.deployment) for layer in report.layers] == [
        (problem, deployment) for problem in (PROBLEM, OTHER, THIRD) for deployment in ("plan", "call")
    ]
    assert statuses(report) == ["tuned"] * 6
    assert report.profile == profile.user_path()
    assert report.machine == machine.current().id
    found = stored()
    assert len(found) == 6
    for one in report.layers:
        assert one.entry is not None
        again = found[one.entry.key]
        assert again.winner.name == one.entry.winner.name
        assert again.winner.backend == ("fast" if one.deployment == "plan" else "slow")


def test_equal_problems_are_measured_once_and_counted(clock: FakeClock) -> None:
    only(Scripted("a", clock))
    workload = Workload("twice", (Layer(PROBLEM, 2), Layer(OTHER), Layer(PROBLEM, 3)))
    report = tune(workload, deployments=("plan",))
    assert [(layer.layer.problem, layer.layer.count) for layer in report.layers] == [(PROBLEM, 5), (OTHER, 1)]


@pytest.mark.parametrize("by", ["on_progress", "backend"])
def test_an_interrupted_run_keeps_what_it_measured_and_the_next_one_goes_on(clock: FakeClock, by: str) -> None:
    backend = Scripted("a", clock)
    only(backend)
    seen: list[LayerReport] = []

    def progress(report: LayerReport) -> None:
        seen.append(report)
        if len(seen) == 2:
            if by == "on_progress":
                raise KeyboardInterrupt
            backend.fails_in = lambda *_: True

    backend.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        tune_three(on_progress=progress)
    assert [report.status for report in seen] == ["tuned", "tuned"]
    assert len(stored()) == 2

    backend.fails_in = lambda *_: False
    profile.forget()
    report = tune_three()
    assert statuses(report) == ["known", "known", "tuned", "tuned", "tuned", "tuned"]
    assert report.complete


def test_each_entry_is_in_the_file_when_its_progress_is_told(clock: FakeClock) -> None:
    only(Scripted("a", clock))
    counts: list[int] = []
    tune_three(on_progress=lambda report: counts.append(len(stored())))
    assert counts == [1, 2, 3, 4, 5, 6]


def test_what_is_known_is_not_measured_again_unless_wished(clock: FakeClock) -> None:
    backend = Scripted("a", clock)
    only(backend)
    tune(PROBLEM)
    calls = backend.calls
    assert statuses(tune(PROBLEM)) == ["known", "known"]
    assert backend.calls == calls
    assert statuses(tune(PROBLEM, retune=True)) == ["tuned", "tuned"]
    assert backend.calls > calls


def test_a_higher_effort_measures_again_and_a_lower_one_does_not(clock: FakeClock) -> None:
    only(Scripted("a", clock))
    assert statuses(tune(PROBLEM, effort="patient")) == ["tuned", "tuned"]
    assert statuses(tune(PROBLEM, effort="measure")) == ["known", "known"]
    assert statuses(tune(PROBLEM, effort="exhaustive")) == ["tuned", "tuned"]
    assert statuses(tune(PROBLEM, effort="patient")) == ["known", "known"]


def test_a_retune_prefers_the_incumbent_in_a_tie(clock: FakeClock) -> None:
    first, second = Scripted("z", clock, 1.0), Scripted("a", clock, 1.1)
    only(first, second)
    assert tune(PROBLEM, deployments=["plan"]).layers[0].entry is not None
    second.seconds = 0.995
    entry = tune(PROBLEM, deployments=["plan"], retune=True).layers[0].entry
    assert entry is not None
    assert entry.winner.backend == "z"
    second.seconds = 0.9
    entry = tune(PROBLEM, deployments=["plan"], retune=True).layers[0].entry
    assert entry is not None
    assert entry.winner.backend == "a"


def test_a_new_backend_leads_to_measuring_again(clock: FakeClock) -> None:
    only(Scripted("old", clock))
    tune(PROBLEM)
    registry.register(Scripted("new", clock, 0.5))
    report = tune(PROBLEM)
    assert statuses(report) == ["tuned", "tuned"]
    assert all(layer.entry and layer.entry.winner.backend == "new" for layer in report.layers)
    assert statuses(tune(PROBLEM)) == ["known", "known"]


@pytest.mark.parametrize(
    "changes", [{"reason": "not this"}, {"expected": 1e9}], ids=["rejects", "estimated hopelessly slow"]
)
def test_a_new_backend_that_would_not_race_changes_nothing(clock: FakeClock, changes: dict[str, Any]) -> None:
    only(Scripted("old", clock))
    tune(PROBLEM)
    registry.register(Scripted("new", clock, 0.5, **changes))
    assert statuses(tune(PROBLEM)) == ["known", "known"]


def test_a_raised_version_leads_to_measuring_again(clock: FakeClock) -> None:
    backend = Scripted("a", clock)
    only(backend, Scripted("b", clock, 1.2))
    tune(PROBLEM)
    registry.register(Scripted("a", clock, 2.0, version=2), replace=True)
    report = tune(PROBLEM)
    assert statuses(report) == ["tuned", "tuned"]
    assert all(layer.entry and layer.entry.winner.backend == "b" for layer in report.layers)


def test_a_new_backend_races_against_the_old_winner_and_nobody_else(clock: FakeClock) -> None:
    winner, loser, wrong = Scripted("winner", clock), Scripted("loser", clock, 1.2), Scripted("wrong", clock, off=1.0)
    only(winner, loser, wrong)
    tuned_entry()
    calls = winner.calls, loser.calls, wrong.calls
    registry.register(Scripted("new", clock, 1.1))
    entry = tuned_entry()
    assert names_of(entry) == ["winner", "new", "loser"]
    assert reasons(entry).keys() == {"wrong"}
    assert winner.calls > calls[0]
    assert (loser.calls, wrong.calls) == calls[1:]
    assert statuses(tune(PROBLEM, deployments=["plan"], threads=1)) == ["known"]


def test_a_new_version_of_the_winner_races_against_the_best_of_the_others(clock: FakeClock) -> None:
    second, third = Scripted("second", clock, 1.2), Scripted("third", clock, 1.3)
    only(Scripted("first", clock), second, third)
    tuned_entry()
    calls = second.calls, third.calls
    registry.register(Scripted("first", clock, 5.0, version=2), replace=True)
    entry = tuned_entry()
    assert names_of(entry) == ["second", "third", "first"]
    assert second.calls > calls[0]
    assert third.calls == calls[1]


def test_when_the_old_winner_fails_everybody_races_again(clock: FakeClock) -> None:
    winner, loser = Scripted("winner", clock), Scripted("loser", clock, 1.2)
    only(winner, loser)
    tuned_entry()
    calls = loser.calls
    winner.off = 1.0
    registry.register(Scripted("new", clock, 1.4))
    entry = tuned_entry()
    assert names_of(entry) == ["loser", "new"]
    assert reasons(entry).keys() == {"winner"}
    assert loser.calls > calls


def test_a_flagged_entry_settles_nothing(clock: FakeClock) -> None:
    old, other = Scripted("old", clock), Scripted("other", clock, 1.2)
    only(old, other)
    tuned_entry()
    doubtful = replace(next(iter(stored().values())), flags=("busy",))
    profile_file.write(profile.user_path(), [doubtful], machine.current())
    calls = other.calls
    registry.register(Scripted("new", clock, 1.4))
    tuned_entry()
    assert other.calls > calls


# Machines much like this one --------------------------------------------------------------------------------------


def tuned_entry(**more: Any) -> Entry:
    (report,) = tune(PROBLEM, deployments=["plan"], threads=1, **more).layers
    assert report.status == "tuned"
    assert report.entry is not None
    return report.entry


def move_to_a_like_machine() -> str:
    """Make what is stored that of a machine with another NumPy; return what differs in words."""
    path, here = profile.user_path(), machine.current()
    version = here.libraries[0].split()[1]
    text = path.read_text().replace(here.id, "like-machine").replace(f"numpy {version}", "numpy 1.0")
    path.write_text(text)
    profile.forget()
    return f"numpy 1.0 instead of {version}"


@pytest.fixture
def three(clock: FakeClock) -> dict[str, Scripted]:
    """An old winner, the estimate's pick, and one who lost; tuned on a machine much like this one."""
    backends = Scripted("winner", clock, 1.0, expected=2.0), Scripted("pick", clock, 1.1), Scripted("loser", clock, 1.5,
        expected=3.0)  # fmt: skip
    only(*backends)
    tuned_entry()
    move_to_a_like_machine()
    for backend in backends:
        backend.calls = 0
    return {backend.name: backend for backend in backends}


def test_what_a_like_machine_measured_is_used_and_says_so(three: dict[str, Scripted]) -> None:
    difference = f"measured with numpy 1.0 instead of {machine.current().libraries[0].split()[1]}"
    with settings.options(threads=1):
        plan = convdispatch.plan(PROBLEM.input_shape, np.ones(PROBLEM.filter_shape, "f4"))
        assert plan.candidate.backend.name == "winner"
        assert plan.evidence.source == "profile"
        assert plan.evidence.detail.endswith(difference)
        assert difference in str(convdispatch.explain(PROBLEM.input_shape, PROBLEM.filter_shape))
    assert three["loser"].calls == 0


def test_tune_races_the_old_winner_against_the_estimates_pick_alone(three: dict[str, Scripted]) -> None:
    entry = tuned_entry()
    assert names_of(entry) == ["winner", "pick"]
    assert entry.lost_before == (("loser", 1),)
    assert three["loser"].calls == 0
    assert entry.key.machine == machine.current().id
    assert statuses(tune(PROBLEM, deployments=["plan"], threads=1)) == ["known"]
    assert stored()[entry.key].lost_before == entry.lost_before
    assert len(stored()) == 2  # the other machine keeps its own


def test_a_tuned_choice_is_never_worse_than_the_estimates_pick(three: dict[str, Scripted]) -> None:
    three["winner"].seconds = 4.0
    assert names_of(tuned_entry()) == ["pick", "winner"]


def test_who_is_new_or_has_changed_races_too_and_who_lost_before_only_when_changed(
    three: dict[str, Scripted], clock: FakeClock
) -> None:
    registry.register(Scripted("new", clock, 1.2))
    assert names_of(tuned_entry()) == ["winner", "pick", "new"]
    assert three["loser"].calls == 0
    registry.register(Scripted("loser", clock, 0.5, version=2), replace=True)
    entry = tuned_entry()
    assert names_of(entry) == ["loser", "winner", "pick", "new"]
    assert entry.lost_before == ()


def test_who_failed_on_the_like_machine_is_tried_here(clock: FakeClock) -> None:
    wrong = Scripted("wrong", clock, 0.5, off=1.0)
    only(Scripted("winner", clock), wrong)
    tuned_entry()
    move_to_a_like_machine()
    wrong.off = 0.0
    assert names_of(tuned_entry()) == ["wrong", "winner"]


def test_when_the_like_machines_winner_fails_here_everybody_races(three: dict[str, Scripted]) -> None:
    three["winner"].off = 1.0
    entry = tuned_entry()
    assert names_of(entry) == ["pick", "loser"]
    assert entry.lost_before == ()


@pytest.mark.parametrize("more", [{"effort": "patient"}, {"retune": True}], ids=["a higher effort", "retune"])
def test_what_a_like_machine_measured_does_not_spare_who_asks_for_more(
    three: dict[str, Scripted], more: dict[str, Any]
) -> None:
    entry = tuned_entry(**more)
    assert names_of(entry) == ["winner", "pick", "loser"]
    assert entry.lost_before == ()


def test_on_miss_tuning_races_anew_what_only_a_like_machine_measured(three: dict[str, Scripted]) -> None:
    filters = np.ones(PROBLEM.filter_shape, "f4")
    with settings.options(threads=1, tuning="on-miss"):
        plan = convdispatch.plan(PROBLEM.input_shape, filters)
        assert (plan.candidate.backend.name, plan.evidence.source) == ("winner", "tuned")
    assert three["loser"].calls == 0
    assert {entry.key.machine for entry in stored().values()} == {machine.current().id, "like-machine"}


def test_a_failure_is_not_tried_again_until_its_version_is_raised(clock: FakeClock) -> None:
    only(Scripted("bad", clock, off=1.0), Scripted("good", clock, 1.2))
    tune(PROBLEM)
    assert statuses(tune(PROBLEM)) == ["known", "known"]
    registry.register(Scripted("bad", clock, version=2), replace=True)
    report = tune(PROBLEM)
    assert all(layer.entry and layer.entry.winner.backend == "bad" for layer in report.layers)


def test_only_the_backends_asked_for_take_part(clock: FakeClock) -> None:
    out = Scripted("out", clock, 0.5)
    only(Scripted("a", clock), Scripted("b", clock, 1.1), out)
    entry = tune(PROBLEM, backends=["a", "b"], deployments=["plan"]).layers[0].entry
    assert entry is not None
    assert names_of(entry) == ["a", "b"]
    assert out.calls == 0


def test_who_does_not_take_part_keeps_what_he_has_but_the_old_winner_races_again(clock: FakeClock) -> None:
    winner, third = Scripted("winner", clock, 0.5), Scripted("third", clock, 2.0)
    only(winner, third)
    tune(PROBLEM, deployments=["plan"])
    raced, kept = winner.calls, third.calls
    late = Scripted("late", clock, 1.0)
    registry.register(late)
    entry = tune(PROBLEM, backends=["late"], deployments=["plan"]).layers[0].entry
    assert entry is not None
    assert entry.winner.backend == "winner"
    assert names_of(entry) == ["winner", "late", "third"]
    assert winner.calls > raced
    assert third.calls == kept


def test_a_full_race_leaves_nothing_of_what_was_measured_before(clock: FakeClock) -> None:
    tried = Config(factor=1.0), Config(factor=1.1)
    many, failed = Scripted("many", clock, tried=tried), Scripted("failed", clock, tried=tried, off=1.0)
    only(many, failed, Scripted("gone", clock, 2.0))
    tuned_entry()
    many.tried = failed.tried = tried[:1]
    registry.get("gone").expected = 1e9  # type: ignore[attr-defined]
    entry = tuned_entry(retune=True)
    assert [result.name for result in entry.results] == ["many(factor=1.0)"]
    assert [failure.name for failure in entry.failures] == ["failed(factor=1.0)"]
    assert entry.lost_before == ()


@pytest.mark.parametrize("version", [None, 2], ids=["is gone", "has changed"])
def test_an_entry_whose_winner_is_gone_is_measured_again_whoever_takes_part(
    clock: FakeClock, version: int | None
) -> None:
    only(Scripted("winner", clock, 0.5), Scripted("other", clock))
    tuned_entry()
    registry.unregister("winner")
    if version is not None:
        registry.register(Scripted("winner", clock, 2.0, version=version))
    assert names_of(tuned_entry(backends=["other"])) == ["other"]
    assert statuses(tune(PROBLEM, backends=["other"], deployments=["plan"], threads=1)) == ["known"]


@pytest.mark.parametrize(("seconds", "winner"), [(1.0, "winner"), (0.4, "other")])
def test_only_the_backends_that_were_named_take_part_and_the_faster_winner_stays(
    clock: FakeClock, seconds: float, winner: str
) -> None:
    before, other = Scripted("winner", clock, 0.5), Scripted("other", clock)
    only(before, other)
    assert names_of(tuned_entry()) == ["winner", "other"]
    calls, other.seconds = before.calls, seconds
    (layer,) = tune(PROBLEM, backends=["other"], deployments=["plan"], threads=1, retune=True).layers
    assert layer.entry is not None
    assert layer.entry.winner.backend == winner
    assert {row.backend for row in layer.entry.results} == {"winner", "other"}
    assert before.calls == calls


def test_no_time_leaves_everything_but_what_is_known(clock: FakeClock) -> None:
    backend = Scripted("a", clock)
    only(backend)
    tune(OTHER, threads=1)
    calls = backend.calls
    report = tune_three(time_limit=0)
    assert statuses(report) == ["left", "left", "known", "known", "left", "left"]
    assert not report.complete
    assert backend.calls == calls


def test_a_problem_that_nobody_can_do_is_reported_and_the_others_go_on(clock: FakeClock) -> None:
    backend = Scripted("a", clock)
    only(backend)
    backend.fails_in = lambda where, call: (where, call) == ("prepare", 1)
    report = tune([PROBLEM, OTHER], deployments=["plan"])
    assert statuses(report) == ["failed", "tuned"]
    assert "scripted" in report.layers[0].reason
    assert not report.complete


def test_a_problem_that_no_memory_holds_is_reported_and_the_others_go_on(clock: FakeClock) -> None:
    only(Scripted("a", clock))
    large = Problem.parse("1x9999999x9999999x100 * 1x1x100x1 VALID")
    report = tune([large, OTHER], deployments=["plan"])
    assert statuses(report) == ["failed", "tuned"]
    assert f"no memory for the arrays of {large}" in report.layers[0].reason


def test_so_is_one_whose_arrays_the_system_does_not_map(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    only(Scripted("a", clock))
    monkeypatch.setattr(mmap, "mmap", none)
    large = Problem.parse("9x64x64x3 * 1x1x3x4 VALID")
    report = tune([large, OTHER], deployments=["plan"])
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert statuses(report) == ["failed", "tuned"]
        assert f"no memory for the arrays of {large}: cannot map" in report.layers[0].reason


@pytest.mark.parametrize("text", ["0x6x6x2 * 3x3x2x3", "0x2x6x6 NCHW * 3x3x2x3 int8 +residual", "1x6x6x0 * 3x3x0x3"])
def test_a_problem_without_work_needs_no_race(clock: FakeClock, text: str) -> None:
    backend = Scripted("a", clock)
    only(backend)
    report = tune([Problem.parse(text), PROBLEM], deployments=["plan"], retune=True)
    assert (statuses(report), report.complete) == (["trivial", "tuned"], True)
    assert len(stored()) == 1


def test_a_failing_retune_keeps_the_old_entry(clock: FakeClock) -> None:
    backend = Scripted("a", clock)
    only(backend)
    tune(PROBLEM, deployments=["plan"])
    backend.fails_in = lambda *_: True
    report = tune(PROBLEM, deployments=["plan"], retune=True)
    assert statuses(report) == ["failed"]
    assert [entry.winner.backend for entry in stored().values()] == ["a"]


def test_the_thread_budget_is_part_of_the_key(clock: FakeClock) -> None:
    only(Scripted("a", clock, parallel=True))
    assert statuses(tune(PROBLEM, threads=1)) == ["tuned", "tuned"]
    assert statuses(tune(PROBLEM, threads=2)) == ["tuned", "tuned"]
    assert {(k.deployment, k.threads) for k in stored()} == set(itertools.product(("plan", "call"), (1, 2)))
    with settings.options(threads=3):
        assert tune(PROBLEM).threads == 3
    assert tune(PROBLEM).threads == machine.usable_cores()


def test_options_that_forbid_or_limit_do_not_limit_what_is_measured(clock: FakeClock) -> None:
    spectral = Scripted("spectral", clock, space=1 << 20, numerics=Numerics("transform"))
    only(spectral, Scripted("a", clock, 1.2))
    with settings.options(forbid=("a",), memory_limit=1, accuracy="strict"):
        entry = tune(PROBLEM, deployments=["plan"]).layers[0].entry
    assert entry is not None
    assert names_of(entry) == ["spectral", "a"]


def test_tuned_winners_are_used_at_once(clock: FakeClock) -> None:
    only(Scripted("fast", clock, expected=3.0), Scripted("slow", clock, 2.0))
    shape, filters = PROBLEM.input_shape, np.ones(PROBLEM.filter_shape, "f4")
    with settings.options(threads=1):
        assert convdispatch.plan(shape, filters).candidate.backend.name == "slow"
        tune(PROBLEM)
        assert convdispatch.plan(shape, filters).candidate.backend.name == "fast"


def test_a_project_profile_is_written_instead_of_the_users(clock: FakeClock, tmp_path: Path) -> None:
    only(Scripted("a", clock))
    with settings.options(profile=tmp_path / "deep" / "mine.yaml"):
        assert tune(PROBLEM).profile == tmp_path / "deep" / "mine.yaml"
    assert (tmp_path / "deep" / "mine.yaml").exists()
    assert not profile.user_path().exists()


def test_nothing_is_measured_when_the_profile_cannot_be_written(clock: FakeClock, tmp_path: Path) -> None:
    backend = Scripted("a", clock)
    only(backend)
    notes = tmp_path / "notes.txt"
    notes.write_text("milk, bread")
    with settings.options(profile=notes), pytest.raises(ProfileError, match=r"notes\.txt is not a profile"):
        tune(PROBLEM)
    assert backend.calls == 0
    assert notes.read_text() == "milk, bread"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"effort": "estimate"}, ArgumentError, "effort must be one of measure, patient, exhaustive; got 'estimate'"),
        ({"time_limit": -1}, ArgumentError, "time_limit must be seconds"),
        ({"threads": 0}, ArgumentError, "threads must be"),
        ({"threads": 10_000}, ArgumentError, "threads must be a whole number from 1 to 9999, or None; got 10000"),
        ({"deployments": ["both"]}, ArgumentError, "deployments must be a list of plan or call; got 'both'"),
        ({"deployments": "plan"}, ArgumentError, "deployments must be a list of plan or call; got 'plan'"),
        ({"backends": "a"}, ArgumentError, "backends must be a list of names; got 'a'"),
        ({"backends": []}, ArgumentError, "backends must be a list"),
        ({"backends": ["aa"]}, UnknownBackendError, "no backend is called 'aa'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(
    clock: FakeClock, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    backend = Scripted("a", clock)
    only(backend)
    with pytest.raises(error, match=message):
        tune(PROBLEM, **arguments)
    assert backend.calls == 0


# The gate's arrays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint8", "int64"])
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_a_trial_has_arrays_as_its_problem_wants_them(dtype: str, data_format: Literal["NHWC", "NCHW"]) -> None:
    words = f"{dtype} +bias +residual +relu"
    text = f"3x6x6x2 * 3x3x2x3 {words}" if data_format == "NHWC" else f"3x2x6x6 NCHW * 3x3x2x3 {words}"
    problem = Problem.parse(text)
    arrays = Trial.random(problem)
    assert arrays.input.shape == problem.input_shape
    assert arrays.input.dtype == arrays.filters.dtype == dtype
    bias, residual = cast("Array", arrays.bias), cast("Array", arrays.residual)
    assert bias.dtype == residual.dtype == problem.result_dtype
    assert residual.shape == problem.output_shape
    only(backend := Scripted("a", FakeClock()))
    candidate = Candidate(backend, Config(threads=1))
    output = arrays.plan(candidate)(arrays.input, residual=arrays.residual)
    assert arrays.judge(candidate, output).reason is None
    assert arrays.judge(candidate, arrays.spoiled_output()).reason is not None
    output[-1] += 1  # the last image is looked at too
    assert arrays.judge(candidate, output).reason is not None


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_every_image_of_a_batch_is_judged(n: int, data_format: str) -> None:
    text = f"{n}x6x6x2 * 3x3x2x3 +residual" if data_format == "NHWC" else f"{n}x2x6x6 NCHW * 3x3x2x3 +residual"
    arrays = Trial.random(Problem.parse(text))
    only(backend := Scripted("a", FakeClock()))
    candidate = Candidate(backend, Config(threads=1))
    right = arrays.plan(candidate)(arrays.input, residual=arrays.residual)
    assert arrays.judge(candidate, right).reason is None
    rounded = np.nextafter(right, np.inf, dtype="f4")
    rounded[::2] = right[::2]
    assert arrays.judge(candidate, rounded).reason is None
    for image in range(n):
        wrong = right.copy()
        wrong[image, 0, 0, 0] += 1
        assert arrays.judge(candidate, wrong).reason is not None
        wrong[image] = np.nan
        assert arrays.judge(candidate, wrong).reason is not None
    if n == 9:
        assert arrays.judge(candidate, np.roll(right, 1, axis=0)).reason is not None
        swapped = right.copy()
        swapped[1:-1] = right[-2:0:-1]
        assert arrays.judge(candidate, swapped).reason is not None


@pytest.mark.parametrize("by", ["tune", "on-miss", "calibrate", "validate", "online"])
def test_arrays_are_not_kept_when_the_measuring_is_over(
    clock: FakeClock, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(Scripted("a", clock), Scripted("b", clock, 1.2, expected=1.1))
    if by == "tune":
        tune(PROBLEM, threads=1)
    elif by == "calibrate":
        calibrate(problems=[PROBLEM], threads=1, clock=clock, rules=RULES)
    elif by == "validate":
        validate([PROBLEM], dispatch.decide, threads=1, clock=clock, oracle=RULES, duel=RULES)
    else:
        monkeypatch.setattr(online, "_online", online.Online(clock, lambda job: job()))
        x, w = np.ones(PROBLEM.input_shape, "f4"), np.ones(PROBLEM.filter_shape, "f4")
        with settings.options(tuning=by, threads=1):
            plan = convdispatch.plan(x.shape, w)
        while by == "online" and plan.evidence.detail.startswith("ahead so far"):
            plan(x)
    assert {entry.winner.backend for entry in stored().values()} <= {"a"}
    assert gate.trial.cache_info().currsize == 0
    assert hard_inputs._trials.cache_info().currsize == 0


def test_trials_are_the_same_every_time() -> None:
    first, second = Trial.random(PROBLEM), Trial.random(PROBLEM)
    assert np.array_equal(first.input, second.input)
    assert np.array_equal(first.filters, second.filters)
