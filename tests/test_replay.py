"""Replay, which measures nothing and says what is missing; a memory limit, which measures nothing either."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scripted import PROBLEM, FakeClock, Scripted, only, race_by

import convdispatch
from convdispatch import dispatch, machine, profile, profile_file, settings
from convdispatch.arguments import Array
from convdispatch.backend import Config, Kernel, Numerics
from convdispatch.cli import main
from convdispatch.errors import ArgumentError, ConvDispatchError, ProfileMissError, ProfileWarning
from convdispatch.explain import explain_problem
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Key, Result
from convdispatch.tuning import tuner

X, W = np.ones(PROBLEM.input_shape, "f4"), np.ones(PROBLEM.filter_shape, "f4")
SMOOTHING = Problem.parse("1x9x9x1 * 5x5x1x1 SAME")
SEPARABLE = SMOOTHING.replace(separable=True)
REPLAY = {"tuning": "replay", "threads": 2}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    race_by(monkeypatch, fake)
    return fake


class Sized(Scripted):
    """Needs as much workspace as its config says."""

    def workspace(self, problem: Problem, config: Config) -> int:
        return config.integer("bytes", self.space)


@pytest.fixture
def two(clock: FakeClock) -> dict[str, Scripted]:
    found: dict[str, Scripted] = {
        "large": Sized("large", clock, 1.0, expected=2.0, tried=(Config(bytes=1000), Config(bytes=500, factor=1.2))),
        "small": Sized("small", clock, 1.5, expected=1.0, space=10),
    }
    only(*found.values())
    return found


def know(*rows: tuple[str, float, Config], deployment: str = "plan", problem: Problem = PROBLEM) -> None:
    results = tuple(Result(name, 1, config, seconds, 0.0, 7, 1e-7, 0) for name, seconds, config in rows)
    entry = Entry(Key(problem, deployment, 2, machine.current().id), results)
    profile_file.write(profile.user_path(), [entry], machine.current())
    profile.forget()


def measured(backends: dict[str, Scripted]) -> int:
    return sum(backend.calls + backend.prepared for backend in backends.values())


# Replay ---------------------------------------------------------------------------------------------------------


def test_a_hit_is_replayed_and_says_so(two: dict[str, Scripted]) -> None:
    know(("large", 1.0, Config(bytes=1000)), ("small", 1.5, Config()))
    with settings.options(**REPLAY):
        decision = dispatch.decide(PROBLEM, "plan")
        assert explain_problem(PROBLEM).evidence == decision.evidence
    assert decision.candidate.name == "large(bytes=1000)"
    assert decision.evidence.source == "replay"
    assert decision.evidence.detail.startswith("winner of 2 in the user profile")
    assert measured(two) == 0


def test_the_same_profile_gives_the_same_candidate_every_time(two: dict[str, Scripted]) -> None:
    know(("small", 1.0, Config()), ("large", 1.0, Config(bytes=1000)))
    seen = set()
    with settings.options(**REPLAY):
        for _ in range(5):
            profile.forget()  # as in the next process
            seen.add(convdispatch.plan(X.shape, W).candidate.name)
    assert seen == {"small"}


@pytest.mark.parametrize("deployment", ["plan", "call"])
def test_a_miss_raises_each_time_and_names_key_and_command(two: dict[str, Scripted], deployment: str) -> None:
    know(("small", 1.0, Config()), deployment="call" if deployment == "plan" else "plan")
    how: dict[str, Callable[[], Any]] = {
        "plan": lambda: convdispatch.plan(X.shape, W),
        "call": lambda: convdispatch.conv2d(X, W),
    }
    asked = how[deployment]
    with settings.options(**REPLAY):
        for _ in range(2):
            with pytest.raises(ProfileMissError) as told:
                asked()
    said = str(told.value)
    assert f"'{PROBLEM} | {deployment} | 2 threads | {machine.current().id}'" in said
    assert said.endswith(f"run convdispatch tune '{PROBLEM}' --deployment {deployment} --threads 2")
    assert isinstance(told.value, LookupError)
    assert isinstance(told.value, ConvDispatchError)
    assert measured(two) == 0


@pytest.mark.parametrize("options", [{"accuracy": 1e-8}, {"forbid": ("large", "small")}, {"memory_limit": 5}])
def test_a_miss_that_tuning_does_not_end_names_the_options(two: dict[str, Scripted], options: dict[str, Any]) -> None:
    know(("small", 1.0, Config()), ("large", 2.0, Config(bytes=1000)))
    with settings.options(**REPLAY, **options), pytest.raises(ProfileMissError) as told:
        convdispatch.plan(X.shape, W)
    assert "the options rule out all that it measured" in str(told.value)
    for name, value in options.items():
        assert f"{name}={value!r}" in str(told.value)
    assert "run convdispatch" not in str(told.value)


def test_the_command_that_is_named_ends_the_miss(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((1, 9, 9, 4), "f4"), rng.standard_normal((3, 3, 4, 8), "f4")
    with settings.options(**REPLAY, profile=tmp_path / "my profile.yaml"):
        with pytest.raises(ProfileMissError) as told:
            convdispatch.conv2d(x, w)
        words = shlex.split(str(told.value).rpartition("run convdispatch ")[2])
        done = CliRunner().invoke(main, [*words, "--backends", "im2col,direct"])
        assert done.exit_code == 0, done.output
        profile.forget()
        assert convdispatch.conv2d(x, w).shape == (1, 9, 9, 8)


def test_a_miss_that_is_to_be_warned_of_is_warned_of_and_the_estimate_decides(two: dict[str, Scripted]) -> None:
    with settings.options(**REPLAY, on_miss="warn"):
        with pytest.warns(ProfileWarning, match=r"no profile has an entry .*; the estimate decides") as told:
            plan = convdispatch.plan(X.shape, W)
        assert len(told) == 1
        again = convdispatch.plan(X.shape, W)  # warned of once
        assert explain_problem(PROBLEM).evidence.source == "estimate"
    assert (plan.candidate.name, plan.evidence.source) == ("small", "estimate")
    assert again.candidate == plan.candidate
    assert [backend.calls for backend in two.values()] == [0, 0]


def test_an_entry_that_may_not_be_used_is_a_miss(two: dict[str, Scripted]) -> None:
    know(("large", 1.0, Config(bytes=1000)))
    with settings.options(**REPLAY, forbid="large"), pytest.raises(ProfileMissError):
        dispatch.decide(PROBLEM, "plan")
    with settings.options(**REPLAY, memory_limit=999), pytest.raises(ProfileMissError):
        dispatch.decide(PROBLEM, "plan")


class Demanding(Scripted):
    """Takes no config but with a whole tile of at least 1."""

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:
        if config.integer("tile", 1) < 1:
            raise ArgumentError(f"tile must be at least 1; got {config['tile']}")
        return super().prepare(problem, filters, bias, config)


def test_an_entry_that_cannot_be_prepared_is_a_miss(clock: FakeClock) -> None:
    only(Demanding("demanding", clock), Scripted("other", clock))
    know(("demanding", 1.0, Config(tile=0)))
    with settings.options(**REPLAY):
        with pytest.raises(ProfileMissError, match=r"demanding\(tile=0\) is in it, but: tile must be at least 1"):
            convdispatch.plan(X.shape, W)
        with settings.options(on_miss="warn"), pytest.warns(ProfileWarning, match="tile must be at least 1"):
            assert convdispatch.plan(X.shape, W).evidence.source == "estimate"


def test_what_is_forced_or_has_nothing_to_compute_misses_nothing(two: dict[str, Scripted]) -> None:
    with settings.options(**REPLAY):
        assert convdispatch.plan(X.shape, W, backend="small").evidence.source == "forced"
        assert convdispatch.conv2d(np.empty((0, 6, 6, 2), "f4"), W).shape == (0, 6, 6, 3)


def test_explain_tells_of_a_miss_without_raising(two: dict[str, Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    with settings.options(**REPLAY):
        told = explain_problem(PROBLEM)
    assert told.chosen is None
    assert "no profile has an entry that may be used" in told.evidence.detail
    monkeypatch.setenv("CONVDISPATCH_TUNING", "replay")
    settings.from_environment.cache_clear()
    done = CliRunner().invoke(main, ["explain", str(PROBLEM), "--threads", "2"])
    assert done.exit_code == 0
    assert "tuning='replay' measures nothing: run convdispatch tune" in done.stdout
    know(("small", 1.0, Config()))
    assert "chosen: small, replay: winner of 1" in CliRunner().invoke(
        main, ["explain", str(PROBLEM), "--threads", "2"]
    ).stdout.replace("\n", " ")


# A memory limit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["off", "on-miss", "replay", "online"])
@pytest.mark.parametrize(
    ("limit", "name"),
    [(None, "large(bytes=1000)"), (1000, "large(bytes=1000)"), (999, "large(bytes=500, factor=1.2)"),
     ("0.5kB", "large(bytes=500, factor=1.2)"), (499, "small"), (10, "small")],
)  # fmt: skip
def test_a_memory_limit_takes_the_best_that_is_stored_and_fits_and_measures_nothing(
    two: dict[str, Scripted], tuning: str, limit: Any, name: str
) -> None:
    with settings.options(threads=2):
        tuner.tune(PROBLEM, deployments=["plan"])
    before = measured(two)
    with settings.options(tuning=tuning, threads=2, memory_limit=limit):
        decision = dispatch.decide(PROBLEM, "plan")
        assert decision.candidate.name == name
        assert decision.evidence.source == ("replay" if tuning == "replay" else "profile")
        assert measured(two) == before
        told = explain_problem(PROBLEM)
        assert measured(two) == before
        plan = convdispatch.plan(X.shape, W)
        assert type(plan) is convdispatch.Plan
    assert plan.workspace <= settings.parse_bytes(limit or "1GB")  # type: ignore[operator]
    assert told.chosen == name
    passed_over = (
        f"not the winner, large(bytes=1000): needs more workspace than memory_limit={settings.parse_bytes(limit)}"
    )
    assert (passed_over in told.evidence.detail) == (name != "large(bytes=1000)")
    assert measured(two) == before + 1  # the plan's own packing


def test_a_limit_that_nothing_stored_fits_leaves_it_to_the_estimate_without_measuring(
    two: dict[str, Scripted],
) -> None:
    know(("large", 1.0, Config(bytes=1000)))
    with settings.options(threads=2, memory_limit=100):
        decision = dispatch.decide(PROBLEM, "plan")
        rows = {row.backend: row for row in explain_problem(PROBLEM).rows}
    assert (decision.candidate.name, decision.evidence.source) == ("small", "estimate")
    assert rows["large"].reason == "needs more workspace than memory_limit=100"
    assert measured(two) == 0


def test_explain_says_what_else_kept_the_winner_from_being_chosen(
    two: dict[str, Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    know(("large", 1.0, Config(bytes=1000)))
    monkeypatch.setattr(two["small"], "numerics", Numerics(growth=lambda *_: 0.5))
    with settings.options(threads=2, accuracy=7e-8):
        told = explain_problem(PROBLEM)
    assert told.evidence.source == "estimate"
    assert "not the winner, large(bytes=1000): its error was measured above" in told.evidence.detail
    with settings.options(threads=2, forbid="large"):
        told = explain_problem(PROBLEM)
    assert {row.backend: row.reason for row in told.rows}["large"] == "forbidden by options"


# Filters that are known to be a column times a row -------------------------------------------------------------


def test_what_was_tuned_for_any_filters_is_replayed_for_separable_ones(two: dict[str, Scripted]) -> None:
    know(("small", 1.0, Config()), problem=SMOOTHING)
    with settings.options(**REPLAY):
        assert dispatch.decide(SEPARABLE, "plan").evidence.source == "replay"
        assert explain_problem(SEPARABLE).chosen == "small"
        assert convdispatch.plan(SMOOTHING.input_shape, np.ones(SMOOTHING.filter_shape, "f4")).problem == SEPARABLE
    assert measured(two) == 1  # the plan


def test_what_was_tuned_for_separable_filters_comes_first(two: dict[str, Scripted]) -> None:
    know(("small", 1.0, Config()), problem=SMOOTHING)
    know(("large", 1.0, Config(bytes=1000)), problem=SEPARABLE)
    with settings.options(**REPLAY):
        assert dispatch.decide(SEPARABLE, "plan").candidate.name == "large(bytes=1000)"
        assert dispatch.decide(SMOOTHING, "plan").candidate.name == "small"


def test_what_was_tuned_for_separable_filters_is_not_replayed_for_others(two: dict[str, Scripted]) -> None:
    know(("large", 1.0, Config(bytes=1000)), problem=SEPARABLE)
    with settings.options(**REPLAY), pytest.raises(ProfileMissError):
        dispatch.decide(SMOOTHING, "plan")


def test_a_backend_that_is_asked_for_by_name_takes_its_config_from_either(two: dict[str, Scripted]) -> None:
    know(("large", 1.0, Config(bytes=500, factor=1.2)), problem=SMOOTHING)
    forced = dispatch.decide(SEPARABLE, "plan", ("large", None))
    assert forced.candidate.config == Config(bytes=500, factor=1.2)
    assert "user profile" in forced.evidence.detail


class Special(Scripted):
    """For separable filters only."""

    def rejects(self, problem: Problem) -> str | None:
        return None if problem.separable else "filters are not separable"


@pytest.mark.parametrize(("expected", "chosen"), [(0.5, "special"), (1.2, "measured")])
def test_the_winner_for_any_filters_is_taken_unless_one_for_separable_ones_is_faster(
    clock: FakeClock, expected: float, chosen: str
) -> None:
    measured = Scripted("measured", clock, 1.0, expected=0.1), Scripted("second", clock, 1.5, expected=0.1)
    only(*measured, Special("special", clock, 0.4, expected=expected))
    know(("measured", 1.0, Config()), ("second", 1.5, Config()), problem=SMOOTHING)
    assert dispatch.decide(SMOOTHING, "plan").candidate.name == "measured"
    assert dispatch.decide(SEPARABLE, "plan").candidate.name == chosen
    with settings.options(forbid=("special",)):
        decision = dispatch.decide(SEPARABLE, "plan")
        assert (decision.candidate.name, decision.evidence.source) == ("measured", "profile")
