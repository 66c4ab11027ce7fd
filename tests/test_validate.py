"""Validation under a fake clock: regret, flips and replay come out as the script has them."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from quiet import BusyWatch
from scripted import RULES, FakeClock, Scripted, only, race_by

import convdispatch
from convdispatch import calibration, dispatch, machine, profile, profile_file, quarantine, settings
from convdispatch.backend import Candidate, Config
from convdispatch.calibration import Calibration, Correction
from convdispatch.cli import main
from convdispatch.cli_validate import print_validation
from convdispatch.problem import Problem
from convdispatch.profile import Key
from convdispatch.tuning import busy, calibrate, tuner, validate
from convdispatch.tuning.held_out import draw_problems
from convdispatch.tuning.race import Rules
from convdispatch.tuning.regret import Duel, duel, summary
from convdispatch.tuning.validation import WAYS, Case, Cost, Validation

PROBLEMS = [Problem.parse(f"1x{side}x{side}x2 * 3x3x2x3 SAME") for side in (5, 6, 7, 8)]
TO_THE_END = Rules(rounds=7, sample_seconds=0.0, race_seconds=1e9, drop=math.inf)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """A clock that the tunes use too; and a calibration, so that none has to be measured."""
    fake = FakeClock()
    race_by(monkeypatch, fake)
    known(Correction(1))
    return fake


def known(*corrections: Correction, names: Sequence[str] = ("boasts",)) -> None:
    made = Calibration(machine.current().id, "calibrate", 99, backends=dict(zip(names, corrections, strict=False)))
    profile_file.write(profile.user_path(), (), machine.current(), calibration.dump(made))


def validated(clock: FakeClock, problems: Sequence[Problem] = PROBLEMS, **more: Any) -> Validation:
    return validate.validate(problems, dispatch.decide, threads=1, clock=clock, oracle=RULES, duel=TO_THE_END, **more)


class BySide(Scripted):
    """Takes as long as a table by input height says, whatever it was estimated."""

    def __init__(self, name: str, clock: FakeClock, by_side: dict[int, float], **changes: Any) -> None:
        super().__init__(name, clock, **changes)
        self.by_side = by_side

    def prepare(self, problem: Problem, *rest: Any) -> Any:
        inner = super().prepare(problem, *rest)

        def kernel(input: Any, out: Any, residual: Any) -> None:
            self.clock.spend(self.by_side[problem.h] - 1.0)
            inner(input, out, residual)

        return kernel


# The statistics --------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1, 9), min_size=1, max_size=40))
def test_a_summary_lies_between_the_least_and_the_worst(ratios: list[float]) -> None:
    found = summary(ratios)
    assert found is not None
    assert found.count == len(ratios)
    assert found.worst == max(ratios)
    assert min(ratios) <= found.p95 <= found.worst
    assert min(ratios) * (1 - 1e-9) <= found.mean <= found.worst * (1 + 1e-9)


def test_a_summary_is_exact_and_of_nothing_there_is_none() -> None:
    assert summary([]) is None
    found = summary([1.0 + number / 100 for number in range(101)])
    assert found is not None
    assert (found.mean, found.p95) == pytest.approx((1.5, 1.95))
    assert (found.worst, found.count) == (2.0, 101)


def test_a_duel_finds_the_scripted_ratios_while_the_machine_slows_down(clock: FakeClock) -> None:
    backends = [Scripted("best", clock, 1.0), Scripted("near", clock, 1.02), Scripted("far", clock, 3.0)]
    only(*backends)
    clock.slow = lambda now: 1.0 + now / 1e4
    key = Key(PROBLEMS[0], "plan", 1, machine.current().id)
    found = duel(key, Candidate(backends[0], Config()), [Candidate(b, Config()) for b in backends], TO_THE_END, clock)
    assert found.champion == "best"
    assert dict(found.ratios) == pytest.approx({"best": 1.0, "near": 1.02, "far": 3.0}, rel=5e-3)
    assert found.noise == pytest.approx(1.0, abs=5e-3)
    assert found.regret("far") == pytest.approx(3.0, rel=5e-3)
    assert found.apart("near", "far") == pytest.approx(3 / 1.02, rel=5e-3)
    assert found.apart("far", "near") == pytest.approx(found.apart("near", "far"))


def test_who_beats_the_champion_has_no_regret() -> None:
    assert Duel("champion", {"champion": 1.0, "lucky": 0.9}, {}, 1.0).regret("lucky") == 1.0


def case(first: str = "a", second: str = "a", ratio: float = 1.0, **more: Any) -> Case:
    chosen = {"bare": "a", "calibrated": "a", "neighbours": "b", "tuned": first, "tuned again": second}
    about = {"replayed": True, "drift": 1.0, **more}
    noise = about.pop("noise", 1.0)
    return Case(PROBLEMS[0], Duel("a", {"a": 1.0, "b": ratio}, {"a": 1.0, "b": ratio}, noise), chosen, **about)  # type: ignore[arg-type]


def report(*cases: Case) -> Validation:
    cost = Cost(1.0, 0.25)
    return Validation(cases, {}, (cost, cost), None, "some", 0, "measure", "plan", 1, machine.current().id, 9.0)


def test_flips_are_counted_and_weighed_by_the_duel() -> None:
    found = report(case(), case("a", "b", 1.5), case("b", "a", 0.8), case("b", "b", 3.0))
    assert found.flips == 0.5
    assert found.apart == pytest.approx(1.5)
    assert report(case(), case()).apart == 1.0
    assert report().flips == 0.0
    tuned = found.regret("tuned")
    assert tuned is not None
    assert (tuned.mean, tuned.worst) == pytest.approx(((1 + 1 + 1 + 3) / 4, 3.0))


def test_replay_drift_and_doubt_are_exact() -> None:
    found = report(case(drift=1.1), case(drift=0.5, replayed=False), case(noise=1.2), case(conditions="steal"))
    assert found.replayed == 3
    assert found.drift is not None
    assert found.drift.worst == 2.0
    assert found.median_drift == pytest.approx(1.0)
    assert len(found.doubtful) == 2


# Whole validations -----------------------------------------------------------------------------------------------


def test_regret_is_what_was_scripted_for_every_way_to_choose(clock: FakeClock) -> None:
    """By estimate "boasts" takes half of "modest"; by the clock it takes twice as long, but for one problem."""
    only(
        BySide("boasts", clock, {5: 2.0, 6: 2.0, 7: 2.0, 8: 1.0}, expected=1.0),
        BySide("modest", clock, {5: 1.0, 6: 1.0, 7: 1.0, 8: 2.0}, expected=2.0),
    )
    found = validated(clock)
    assert [case.duel.champion for case in found.cases] == ["modest", "modest", "modest", "boasts"]
    by_way = {way: [round(case.regret(way), 6) for case in found.cases] for way in WAYS}
    assert by_way["bare"] == by_way["calibrated"] == [2.0, 2.0, 2.0, 1.0]
    assert by_way["tuned"] == by_way["tuned again"] == [1.0] * 4
    # Each is held out: 5, 6 and 7 hear of each other that "modest" is faster; so does 8, and is misled.
    assert by_way["neighbours"] == [1.0, 1.0, 1.0, 2.0]
    assert found.flips == 0.0
    assert found.replayed == 4
    assert found.drift is not None
    assert found.drift.worst == pytest.approx(1.0)
    assert found.failed == {}


def test_a_calibration_of_the_profile_takes_part(clock: FakeClock) -> None:
    only(Scripted("boasts", clock, 3.0, expected=1.0), Scripted("modest", clock, 1.0, expected=2.0))
    known(Correction(1, (math.log(3), 0.0, 0.0, 0.0, 0.0)))
    found = validated(clock, PROBLEMS[:1])
    assert found.calibrating is None
    (only_case,) = found.cases
    assert only_case.chosen["bare"] == "boasts"
    assert only_case.chosen["calibrated"] == "modest"


def test_a_winner_that_flips_between_tunes_is_found_and_weighed(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "fickle" is fast throughout the first tune, and 25 % slower than "steady" ever after."""
    tunes: list[int] = []
    fickle, steady = Scripted("fickle", clock, lambda call: 0.8 if len(tunes) < 2 else 1.25), Scripted("steady", clock)
    only(fickle, steady)
    tune = tuner.tune

    def counted(*args: Any, **more: Any) -> tuner.TuneReport:
        tunes.append(len(tunes))
        return tune(*args, **more)

    monkeypatch.setattr(tuner, "tune", counted)
    found = validated(clock, PROBLEMS[:2])
    assert [case.chosen["tuned"] for case in found.cases] == ["fickle", "fickle"]
    assert [case.chosen["tuned again"] for case in found.cases] == ["steady", "steady"]
    assert found.flips == 1.0
    assert found.apart == pytest.approx(1.25)
    assert found.replayed == 2
    assert found.drift is not None
    assert found.drift.worst == pytest.approx(1.25 / 0.8, rel=0.01)


def test_what_cannot_be_done_is_reported_and_the_rest_goes_on(clock: FakeClock) -> None:
    class Picky(Scripted):
        def rejects(self, problem: Problem) -> str | None:
            return "too high" if problem.h == 6 else None

    only(Picky("picky", clock))
    found = validated(clock)
    assert len(found.cases) == 3
    assert list(found.failed) == [PROBLEMS[1].text]


def test_the_user_s_profile_and_memory_are_left_as_they_were(clock: FakeClock) -> None:
    only(Scripted("boasts", clock), Scripted("modest", clock, 2.0))
    before = profile.user_path().read_text()
    validated(clock, PROBLEMS[:1])
    assert profile.user_path().read_text() == before
    assert profile.remembered() == []
    with settings.options(threads=1):
        assert dispatch.decide(PROBLEMS[0], "plan").evidence.source == "estimate"


def test_busy_conditions_are_kept_with_the_problem(clock: FakeClock) -> None:
    only(Scripted("boasts", clock))
    said = iter(["", "others used 30 % of the cores"])
    found = validated(clock, PROBLEMS[:2], conditions=lambda: next(said))
    assert [each.problem for each in found.doubtful] == PROBLEMS[1:2]


def test_a_busy_machine_holds_up_no_validation_and_is_told_of(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(Scripted("boasts", clock))
    monkeypatch.setattr(busy, "make_watch", BusyWatch)
    found = validated(clock, PROBLEMS[:2], conditions=busy.since(lambda: busy.make_watch(1)))
    said = "a fixed loop waited for a core for 50.0% of its time"
    assert [case.conditions for case in found.cases] == [said, said]
    refused = CliRunner().invoke(main, ["calibrate", "--threads", "1"])
    assert refused.exit_code == 5
    assert "waiting up to 10 s" in refused.stderr


def test_quarantined_backends_take_no_part_and_nothing_is_recorded(clock: FakeClock) -> None:
    good, bad = Scripted("good", clock), Scripted("bad", clock, 0.1)
    only(good, bad)
    quarantine.add(Candidate(bad, Config()), PROBLEMS[0], "crashed")
    before = profile.user_path().read_text()
    with convdispatch.record() as recording:
        found = validated(clock, PROBLEMS[:2])
        assert profile.user_path().read_text() == before
        calibrate.calibrate(problems=PROBLEMS, clock=clock, rules=RULES)
    assert {name for case in found.cases for name in case.chosen.values()} == {"good"}
    assert (good.calls > 0, bad.calls, recording.calls) == (True, 0, 0)


# Problems, and the commands ---------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_problems_and_fewer_are_the_first_of_more() -> None:
    many = draw_problems(60, seed=3)
    assert draw_problems(60, seed=3) == many
    assert draw_problems(10, seed=3) == many[:10]
    assert draw_problems(60, seed=4) != many
    assert len(set(many)) == 60
    assert all(not problem.is_trivial and problem.flops <= 4e8 for problem in many)
    kinds = {(p.groups == 1, p.group_c == 1, p.kh == 1, p.strides == (1, 1)) for p in many}
    assert len(kinds) >= 6


def test_validate_prints_figures_and_targets(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    only(Scripted("boasts", clock, 3.0, expected=1.0), Scripted("modest", clock, 1.0, expected=2.0))
    quick = functools.partial(validate.validate, clock=clock, oracle=RULES, duel=TO_THE_END)
    monkeypatch.setattr(validate, "validate", quick)
    arguments = ["validate", PROBLEMS[0].text, "--problems", "0", "--threads", "1"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "3.000" in lines["estimate, as the backends make it"]
    assert "1.01, 1.03: reached" in lines["tuned"]
    assert "1.10, 1.35: missed" in lines["estimate, with the other problems tuned"]
    assert "two tunes: another winner for 0 of 1 problems" in done.stdout
    assert "replay: 1 of 1 problems got the stored winner" in done.stdout
    data = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert data["regret"]["bare"]["mean"] == pytest.approx(3.0)
    assert data["cases"][0]["champion"] == "modest"
    assert CliRunner().invoke(main, ["validate", "--problems", "0"]).exit_code == 1
    assert CliRunner().invoke(main, [*arguments, "--check"]).exit_code == 4


def test_all_targets_reached_needs_every_one_of_them() -> None:
    good = report(case(), case())
    assert good.reached
    assert not report(case(), case("a", "b", 1.5)).reached
    assert not report(case(), case(replayed=False)).reached
    assert not dataclasses.replace(good, failed={"some problem": "some reason"}).reached
    assert not report().reached


def test_a_report_of_a_busy_machine_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    noisy = report(case(noise=1.2), case("a", "b", 1.5))
    print_validation(dataclasses.replace(noisy, failed={"some problem": "some reason"}, calibrating=Cost(3.0, 0.0)))
    said = capsys.readouterr().out
    assert "the machine was busy for 1 of 2 problems" in said
    assert "another winner for 1 of 2 problems, by 50.0% of its time at most (target 2%, 1%: missed)" in said
    assert "in quiet, 1: " in said
    assert "tuned 1.500, 1.500" not in said.partition("in quiet, 1")[0]
    assert "another winner for 1, by 50.0% of its time at most" in said.partition("in quiet, 1:")[2]
    assert "failed: some problem: some reason" in said
    assert "cost of calibrating: 3.0 s, nothing had to be compiled" in said


def test_calibrate_prints_how_far_off_the_estimates_were(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    only(Scripted("boasts", clock, 3.0, expected=1.0))
    quick = functools.partial(calibrate.calibrate, problems=PROBLEMS, clock=clock, rules=RULES)
    monkeypatch.setattr(calibrate, "calibrate", quick)
    done = CliRunner().invoke(main, ["calibrate", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert re.search(r"boasts +3\.00x +1\.\d\dx", done.stdout)
    assert str(profile.user_path()) in done.stdout
    data = json.loads(CliRunner().invoke(main, ["calibrate", "--threads", "1", "--json"]).stdout)
    assert data["calibration"]["backends"]["boasts"]["before"] == pytest.approx(3.0)
