"""Who is chosen, on what evidence, under which options; with backends that count how often they are called."""

import asyncio
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import RULES, FakeClock, Scripted, only, race_by

import convdispatch
from convdispatch import dispatch, heuristic, machine, on_miss, profile, profile_file, reference, registry, settings
from convdispatch.arguments import Array
from convdispatch.backend import Candidate, Config, Kernel, Numerics
from convdispatch.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    BackendRejectedError,
    ConvDispatchError,
    ConvDispatchWarning,
    ProfileWarning,
    UnknownBackendError,
)
from convdispatch.explain import explain, explain_problem
from convdispatch.heuristic import Estimate
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Failure, Key, Result
from convdispatch.question import Question, parse_forced
from convdispatch.tuning import problem_race, tuner
from convdispatch.units import bytes_text, time_text

PROBLEM = Problem.parse("1x6x6x2 * 3x3x2x3 SAME")
OTHER = Problem.parse("1x5x5x2 * 1x1x2x3 VALID")
INPUT = np.ones(PROBLEM.input_shape, "f4")
FILTERS = np.ones(PROBLEM.filter_shape, "f4")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    race_by(monkeypatch, fake)
    return fake


@pytest.fixture
def three(clock: FakeClock) -> dict[str, Scripted]:
    """Three backends; by estimate "quick" is first, by the clock "steady"."""
    backends = {
        "quick": Scripted("quick", clock, 1.3, expected=1.0),
        "steady": Scripted("steady", clock, 1.0, expected=2.0, space=1000),
        "spectral": Scripted("spectral", clock, 1.2, expected=3.0, numerics=Numerics("transform")),
    }
    only(*backends.values())
    return backends


def result(backend: str, median: float = 1.0, **more: Any) -> Result:
    values = {"version": 1, "config": Config(), "spread": 0.0, "rounds": 7, "error": 1e-7, "workspace": 0}
    return Result(backend, median=median, **{**values, **more})


def know(
    *results: Result, problem: Problem = PROBLEM, failures: tuple[Failure, ...] = (), flags: tuple[str, ...] = (),
    **about: Any,
) -> Entry:  # fmt: skip
    """Write an entry into the user's profile."""
    parts = {"deployment": "plan", "threads": machine.usable_cores(), "machine": machine.current().id}
    entry = Entry(Key(problem, **{**parts, **about}), results, failures, flags=flags)
    profile_file.write(profile.user_path(), [entry], machine.current())
    profile.forget()
    return entry


def chosen(problem: Problem = PROBLEM, deployment: str = "plan", forced: Any = None) -> tuple[str, str]:
    decision = dispatch.decide(problem, deployment, parse_forced(forced))
    return decision.candidate.backend.name, decision.evidence.source


# The profile, else the estimate --------------------------------------------------------------------------------------


def test_without_a_profile_the_estimate_decides(three: dict[str, Scripted]) -> None:
    assert chosen() == ("quick", "estimate")


def test_an_exact_entry_decides(three: dict[str, Scripted]) -> None:
    know(result("steady"), result("quick", 2.0))
    assert chosen() == ("steady", "profile")
    assert chosen(deployment="call") == ("quick", "estimate")
    assert chosen(OTHER) == ("quick", "estimate")
    evidence = dispatch.decide(PROBLEM, "plan").evidence
    assert evidence.detail.startswith("winner of 2 in the user profile, 1 s, ")


def test_what_is_known_needs_no_other_backend(three: dict[str, Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading them all is what takes long in the first call of a process."""
    know(result("steady"), result("quick", 2.0))
    monkeypatch.setattr(registry, "available", lambda: pytest.fail("all backends were asked for"))
    assert chosen() == ("steady", "profile")


def test_a_winner_need_not_be_the_fastest(three: dict[str, Scripted]) -> None:
    know(result("spectral", 9.0), result("quick", 2.0))
    assert chosen() == ("spectral", "profile")


def test_the_config_comes_from_the_profile(three: dict[str, Scripted]) -> None:
    know(result("quick", config=Config(factor=0.5)))
    assert dispatch.decide(PROBLEM, "plan").candidate.config == Config(factor=0.5)


def test_a_winner_in_another_version_is_estimated_against_who_was_slower(three: dict[str, Scripted]) -> None:
    know(result("quick", 0.9, version=7), result("spectral", 5.0))
    assert chosen() == ("quick", "estimate")
    evidence = dispatch.decide(PROBLEM, "plan").evidence
    assert evidence.detail.startswith("1 s predicted; what was faster in the user profile was another version of quick")
    with settings.options(tuning="replay"):
        assert chosen() == ("spectral", "replay")
    with settings.options(tuning="on-miss", effort="estimate"):  # where nothing may be measured
        assert chosen() == ("quick", "estimate")
    with settings.options(forbid="quick"):
        assert chosen() == ("spectral", "profile")
    know(result("quick", 0.7, version=7), result("spectral", 0.8))
    assert chosen() == ("spectral", "profile")  # 1 s are predicted
    know(result("spectral", 0.8), result("quick", 5.0, version=7))
    assert chosen() == ("spectral", "profile")


def test_a_backend_that_cannot_estimate_is_not_chosen_but_can_be_forced(three: dict[str, Scripted]) -> None:
    def estimate(*_: Any) -> float:
        raise ZeroDivisionError

    three["quick"].estimate = estimate  # type: ignore[method-assign, assignment]
    with pytest.warns(UserWarning, match="backend 'quick' has no estimate for .*ZeroDivisionError"):
        assert chosen() == ("steady", "estimate")
    with pytest.warns(UserWarning, match="has no estimate"):
        assert chosen(forced="quick") == ("quick", "forced")


def test_an_entry_of_a_backend_that_breaks_down_is_passed_over(three: dict[str, Scripted]) -> None:
    def rejects(_: Problem) -> str:
        raise ZeroDivisionError

    know(result("steady"), result("quick", 2.0))
    three["steady"].rejects = rejects  # type: ignore[method-assign, assignment]
    assert chosen() == ("quick", "profile")
    three["quick"].fails_in = lambda where, _: where == "workspace"
    dispatch._decide.cache_clear()
    with pytest.warns(ProfileWarning, match="quick for .* is ignored: scripted"):
        assert chosen() == ("spectral", "estimate")


def test_what_was_measured_in_quiet_goes_before_what_this_process_measured_while_disturbed(
    three: dict[str, Scripted],
) -> None:
    profile.remember(replace(know(result("steady")), results=(result("spectral"),), flags=(profile.BUSY,)))
    assert chosen() == ("steady", "profile")
    profile.remember(replace(know(result("steady")), results=(result("spectral"),)))
    assert chosen() == ("spectral", "profile")


def stale(backends: dict[str, Scripted]) -> None:
    registry.register(Scripted("steady", FakeClock(), version=2, expected=2.0), replace=True)


def gone(backends: dict[str, Scripted]) -> None:
    registry.unregister("steady")


def picky(backends: dict[str, Scripted]) -> None:
    backends["steady"].reason = "no longer"


@pytest.mark.parametrize("change", [stale, gone, picky])
def test_a_winner_that_is_no_longer_what_was_measured_is_passed_over(
    three: dict[str, Scripted], change: Callable[[dict[str, Scripted]], None]
) -> None:
    know(result("steady"), result("spectral", 2.0), result("quick", 3.0))
    change(three)
    assert chosen() == ("spectral", "profile")
    assert "best allowed of 3" in dispatch.decide(PROBLEM, "plan").evidence.detail


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "steady"),
        ({"forbid": "steady"}, "spectral"),
        ({"forbid": ("steady", "spectral")}, "quick"),
        ({"memory_limit": 999}, "spectral"),
        ({"memory_limit": "1kB"}, "steady"),
        ({"accuracy": 1e-6}, "spectral"),
        ({"accuracy": 1e-8}, "quick"),
        ({"accuracy": "strict", "forbid": "steady"}, "quick"),
        ({"accuracy": "strict", "memory_limit": 0}, "quick"),
    ],
)
def test_options_pass_over_stored_results(three: dict[str, Scripted], options: dict[str, Any], expected: str) -> None:
    know(result("steady", error=1e-5), result("spectral", 2.0), result("quick", 3.0, error=1e-9))
    with settings.options(**options):
        assert chosen() == (expected, "profile")
    assert chosen() == ("steady", "profile")


def test_an_error_above_the_class_is_passed_over(three: dict[str, Scripted]) -> None:
    know(result("spectral", error=1e-3), result("quick", 3.0))
    assert chosen() == ("quick", "profile")
    with settings.options(accuracy="fast"):
        assert chosen() == ("spectral", "profile")


def test_when_no_stored_result_is_allowed_a_lower_layer_and_then_the_estimate_decides(
    three: dict[str, Scripted], tmp_path: Path
) -> None:
    entry = know(result("steady"))
    with settings.options(profile=tmp_path / "mine.yaml"):
        profile_file.write(tmp_path / "mine.yaml", [Entry(entry.key, (result("spectral"),))], machine.current())
        assert chosen() == ("spectral", "profile")
        with settings.options(accuracy="strict"):
            assert chosen() == ("steady", "profile")
        with settings.options(forbid=("spectral", "steady")):
            assert chosen() == ("quick", "estimate")


def test_a_number_for_accuracy_wants_transforms_measured_first(three: dict[str, Scripted]) -> None:
    three["spectral"].expected = 0.1
    assert chosen() == ("spectral", "estimate")
    with settings.options(accuracy=1e-5):
        assert chosen() == ("quick", "estimate")
        know(result("spectral"))
        assert chosen() == ("spectral", "profile")


def test_a_number_for_accuracy_that_no_bound_keeps_wants_everything_measured(three: dict[str, Scripted]) -> None:
    three["steady"].expected = 0.5
    bound = (PROBLEM.taps / 2 + 4) * 2.0**-23
    with settings.options(accuracy=bound):
        assert chosen() == ("steady", "estimate")
    with settings.options(accuracy=bound * 0.99):
        with pytest.raises(BackendRejectedError, match=r"quick, spectral, steady: accuracy=.* tune it"):
            chosen()
        know(result("quick", error=bound / 2, config=Config(measured=1)))
        assert chosen() == ("quick", "profile")


def test_other_configs_of_a_local_backend_are_as_accurate_as_those_measured(
    three: dict[str, Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    know(result("steady", error=4e-7, config=Config(measured=1)), result("spectral", error=4e-7, config=Config(m=1)))
    rows = profile.find(Question(PROBLEM, "plan", settings.current()).key)[0].entry.results
    assert heuristic.measured_error(Candidate(three["steady"], Config()), rows) == 4e-7
    assert heuristic.measured_error(Candidate(three["spectral"], Config()), rows) is None
    assert heuristic.measured_error(Candidate(three["quick"], Config()), rows) is None
    monkeypatch.setattr(three["steady"], "version", 2)
    assert heuristic.measured_error(Candidate(three["steady"], Config()), rows) is None


def test_a_bound_that_raises_keeps_within_no_number(
    three: dict[str, Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(problem: Problem, config: Config) -> float:
        raise ZeroDivisionError

    monkeypatch.setattr(three["quick"], "numerics", Numerics(growth=broken))
    with settings.options(accuracy=1e-3):
        assert chosen() == ("steady", "estimate")


def test_an_accuracy_that_was_measured_of_nobody_says_so(three: dict[str, Scripted]) -> None:
    with settings.options(accuracy=1e-20), pytest.raises(BackendRejectedError) as raised:
        chosen()
    assert str(raised.value).endswith(
        "under accuracy=1e-20 (quick, spectral, steady: accuracy=1e-20 needs errors measured: tune it)"
    )


def test_nothing_unknown_is_chosen_unmeasured(clock: FakeClock) -> None:
    only(Scripted("unknown", clock, expected=None), Scripted("nan", clock, expected=float("nan")))
    with pytest.raises(BackendRejectedError, match="no backend may do 1x6x6x2"):
        chosen()
    know(result("unknown"))
    assert chosen() == ("unknown", "profile")


def test_when_the_options_leave_nobody_the_error_names_them_and_every_reason(three: dict[str, Scripted]) -> None:
    three["quick"].reason = "too small"
    with (
        settings.options(forbid="steady", accuracy="strict", memory_limit=10),
        pytest.raises(
            BackendRejectedError,
            match=r"accuracy='strict', forbid=\('steady',\), memory_limit=10 \(.*quick: too small.*steady: forbidden",
        ),
    ):
        chosen()


def test_the_thread_budget_is_part_of_what_is_looked_up(three: dict[str, Scripted]) -> None:
    know(result("steady"), threads=3)
    know(result("spectral"), threads=1)
    with settings.options(threads=3):
        assert chosen() == ("steady", "profile")
    with settings.options(threads=1):
        assert chosen() == ("spectral", "profile")
    with settings.options(threads=2):
        assert chosen() == ("quick", "estimate")


def test_what_was_decided_once_is_remembered(three: dict[str, Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    know(result("steady"))
    assert chosen() == ("steady", "profile")
    monkeypatch.setattr(profile, "find", lambda key: pytest.fail("asked again"))
    assert chosen() == ("steady", "profile")


# Hand-made nonsense --------------------------------------------------------------------------------------------------


class Demanding(Scripted):
    """Takes no config but with a whole tile of at least 1."""

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:
        if config.integer("tile", 1) < 1:
            raise ArgumentError(f"tile must be at least 1; got {config['tile']}")
        return super().prepare(problem, filters, bias, config)


class DemandingMemory(Scripted):
    """Notices a wrong tile when it is asked for its workspace."""

    def workspace(self, problem: Problem, config: Config) -> int:
        return 8 * config.integer("tile", 1)


def test_a_config_that_cannot_be_prepared_is_passed_over_with_a_warning(clock: FakeClock) -> None:
    only(Demanding("demanding", clock, expected=9.0), Scripted("other", clock, expected=1.0))
    know(result("demanding", config=Config(threads=1, tile=-4)), result("other", 2.0))
    with pytest.warns(ProfileWarning, match=r"demanding\(threads=1, tile=-4\) .* is ignored: tile must be at least 1"):
        plan = convdispatch.plan(PROBLEM.input_shape, FILTERS)
    assert plan.candidate.backend.name == "other"
    assert plan(INPUT).shape == PROBLEM.output_shape


def test_a_config_whose_workspace_cannot_be_told_is_passed_over_with_a_warning(clock: FakeClock) -> None:
    only(DemandingMemory("demanding", clock), Scripted("other", clock))
    know(result("demanding", config=Config(threads=1, tile="wide")), result("other", 2.0))
    with pytest.warns(ProfileWarning, match="config needs a whole number 'tile'; got 'wide'"):
        assert chosen() == ("other", "profile")


GARBAGE = (0, -1, 3, 2**63 - 1, "x", True, 1.5, float("inf"))


@pytest.mark.parametrize("name", ["direct", "fft", "im2col", "numba", "winograd"])
@pytest.mark.filterwarnings("ignore::convdispatch.ProfileWarning")
def test_no_config_in_a_profile_makes_a_call_with_a_built_in_backend_fail(name: str) -> None:
    backend = registry.get(name)
    if backend.rejects(PROBLEM):
        pytest.skip(f"{name} does not take it")
    known = {key for config in backend.configs(PROBLEM, "exhaustive") for key in config} - {"threads"}
    right = reference.convolve(PROBLEM, INPUT, FILTERS)
    for key in (*sorted(known), "unheard-of"):
        for value in GARBAGE:
            know(result(name, config=Config({key: value}, threads=1)))
            plan = convdispatch.plan(PROBLEM.input_shape, FILTERS)
            np.testing.assert_allclose(plan(INPUT), right, rtol=1e-3, atol=1e-3)


# On miss -------------------------------------------------------------------------------------------------------------


def test_on_miss_measures_once_and_then_the_profile_answers(three: dict[str, Scripted]) -> None:
    with settings.options(tuning="on-miss"):
        assert chosen() == ("steady", "tuned")
        calls = [backend.calls for backend in three.values()]
        assert all(calls)
        assert chosen() == ("steady", "profile")
        convdispatch.plan(PROBLEM.input_shape, FILTERS)(INPUT)
        assert [backend.calls - before for backend, before in zip(three.values(), calls, strict=True)] == [0, 1, 0]
    profile.forget()  # as in the next process
    assert chosen() == ("steady", "profile")


def test_on_miss_measures_calls_apart_from_plans(three: dict[str, Scripted]) -> None:
    three["steady"].packing = 5.0
    with settings.options(tuning="on-miss"):
        assert chosen(deployment="plan") == ("steady", "tuned")
        assert chosen(deployment="call") == ("spectral", "tuned")


def test_off_never_measures(three: dict[str, Scripted]) -> None:
    for _ in range(3):
        convdispatch.plan(PROBLEM.input_shape, FILTERS)
    assert sum(backend.calls for backend in three.values()) == 0
    convdispatch.conv2d(INPUT, FILTERS)
    assert [backend.calls for backend in three.values()] == [1, 0, 0]
    assert not profile.user_path().exists()


def test_on_miss_measures_nothing_that_was_measured_but_may_not_be_used(three: dict[str, Scripted]) -> None:
    with settings.options(tuning="on-miss", accuracy=4e-8):
        for _ in range(3):
            with pytest.raises(BackendRejectedError, match=r"steady: its error was measured as 4"):
                chosen()
            assert [backend.prepared for backend in three.values()] == [3, 3, 3]


def test_nothing_is_chosen_by_estimate_that_was_measured_as_too_inaccurate(three: dict[str, Scripted]) -> None:
    know(result("steady", error=3e-7), result("quick", 2.0, error=2e-7))
    with settings.options(accuracy=2.5e-7):
        assert chosen() == ("quick", "profile")
    with settings.options(accuracy=1e-7, forbid="spectral"), pytest.raises(BackendRejectedError, match="2e-07"):
        chosen()


def test_an_accuracy_that_no_rounded_result_has_is_refused_unmeasured(three: dict[str, Scripted]) -> None:
    with settings.options(accuracy=1e-12), pytest.raises(BackendRejectedError, match="accuracy=1e-12"):
        chosen()
    assert sum(backend.calls for backend in three.values()) == 0


@pytest.mark.parametrize("others", [(), ("spectral",)])
def test_on_miss_measures_again_when_a_winner_is_stale(three: dict[str, Scripted], others: tuple[str, ...]) -> None:
    know(result("steady", version=7), *(result(name, 5.0) for name in others))
    with settings.options(tuning="on-miss"):
        assert chosen() == ("steady", "tuned")


def test_on_miss_measures_once_again_what_a_busy_machine_spoiled(three: dict[str, Scripted]) -> None:
    know(result("quick"), flags=(profile.BUSY,))
    with settings.options(tuning="on-miss"):
        assert chosen() == ("steady", "tuned")
        calls = [backend.calls for backend in three.values()]
        assert all(calls)
        assert chosen() == ("steady", "profile")
    know(result("quick"), flags=(profile.BUSY,))  # and again: but this process has had its try
    with settings.options(tuning="on-miss"):
        assert chosen() == ("quick", "profile")
    assert [backend.calls for backend in three.values()] == calls


def test_on_miss_leaves_empty_problems_alone(three: dict[str, Scripted]) -> None:
    with settings.options(tuning="on-miss"):
        assert chosen(PROBLEM.replace(n=0)) == ("quick", "estimate")
    assert sum(backend.calls for backend in three.values()) == 0


def test_on_miss_measures_nothing_at_the_effort_of_estimating(three: dict[str, Scripted]) -> None:
    with settings.options(tuning="on-miss", effort="estimate"):
        assert chosen() == ("quick", "estimate")
    assert sum(backend.calls for backend in three.values()) == 0


def test_on_miss_with_nobody_right_warns_and_goes_on_by_estimate(clock: FakeClock) -> None:
    only(Scripted("wrong", clock, off=1.0))
    with settings.options(tuning="on-miss"), pytest.warns(ProfileWarning, match="tuning .* failed: .*wrong result"):
        assert chosen() == ("wrong", "estimate")


def test_on_miss_without_a_file_to_write_keeps_what_it_learnt_for_this_process(
    three: dict[str, Scripted], tmp_path: Path
) -> None:
    notes = tmp_path / "notes.yaml"
    notes.write_text("milk: bread\n")
    with settings.options(tuning="on-miss", profile=notes):
        with pytest.warns(ProfileWarning) as told:
            assert chosen() == ("steady", "tuned")
        assert chosen() == ("steady", "profile")
    assert notes.read_text() == "milk: bread\n"
    assert any("kept for this process only" in str(one.message) for one in told)


def test_threads_that_miss_at_once_measure_once_and_agree(three: dict[str, Scripted]) -> None:
    def ask(_: int) -> str:
        with settings.options(tuning="on-miss"):
            return chosen()[0]

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(8))) == {"steady"}
    # Once for random input and the race, twice for hard inputs: three filters are too few for all kinds at once.
    assert [backend.prepared for backend in three.values()] == [3, 3, 3]


def test_who_misses_another_key_meanwhile_takes_the_estimate(three: dict[str, Scripted]) -> None:
    """A backend may convolve in threads of its own, and for these to wait for its own race would be for ever."""
    with ThreadPoolExecutor(1) as pool:

        def ask() -> tuple[str, str]:
            with settings.options(tuning="on-miss"):
                return chosen(OTHER)

        def meanwhile(call: int) -> float:
            asked.append(pool.submit(ask).result(timeout=60))
            return 1.0

        asked: list[tuple[str, str]] = []
        three["steady"].seconds = meanwhile
        with settings.options(tuning="on-miss"):
            assert chosen() == ("steady", "tuned")
            assert set(asked) == {("quick", "estimate")}
            three["steady"].seconds = 1.0
            assert chosen(OTHER)[1] == "tuned"


def test_who_was_not_let_measure_asks_again_even_if_the_other_failed(three: dict[str, Scripted]) -> None:
    def ask() -> tuple[str, str]:
        with settings.options(tuning="on-miss"):
            return chosen(OTHER)

    with ThreadPoolExecutor(1) as pool:

        def meanwhile(call: int) -> float:
            if len(asked) < 1:
                asked.append(pool.submit(ask).result(timeout=60))
            raise ValueError("scripted")

        asked: list[tuple[str, str]] = []
        usual = {name: backend.seconds for name, backend in three.items()}
        for backend in three.values():
            backend.seconds = meanwhile
        with settings.options(tuning="on-miss"), pytest.warns(ProfileWarning, match="tuning .* failed"):
            assert chosen()[1] == "estimate"
        assert [source for _, source in asked] == ["estimate"]
        for name, backend in three.items():
            backend.seconds = usual[name]
    assert ask()[1] == "tuned"


def test_a_warning_shows_the_line_that_called_convdispatch() -> None:
    x = np.ones((1, 4, 4, 2), np.float32)
    with convdispatch.options(forbid="nonesuch"), pytest.warns(ConvDispatchWarning) as told:
        convdispatch.conv2d(x, np.ones((1, 1, 2, 2), np.float32))
    assert [one.filename for one in told] == [__file__]


@pytest.mark.parametrize("hook", ["rejects", "configs", "estimate", "workspace"])
def test_a_third_partys_hook_cannot_end_the_program(hook: str, three: dict[str, Scripted]) -> None:
    def leave(*_: Any) -> Any:
        raise SystemExit(3)

    rude = Scripted("rude", FakeClock())
    setattr(rude, hook, leave)
    registry.register(rude)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvDispatchWarning)
        assert chosen()[0] in three
        assert explain_problem(PROBLEM).chosen is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.parametrize(
    "lock", [on_miss._turns._change, on_miss._turns._turn, profile._lock, problem_race._one_at_a_time]
)
def test_a_forked_child_finds_free_what_a_thread_of_its_parent_held(lock: Any) -> None:
    with lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has other threads
        child = os.fork()
        if child == 0:
            os._exit(0 if lock.acquire(timeout=5) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_result_that_no_memory_holds_is_refused_before_its_plan_is_made(three: dict[str, Scripted]) -> None:
    with pytest.raises(MemoryError):
        convdispatch.conv2d(INPUT, FILTERS, padding=10**6)
    assert sum(backend.prepared for backend in three.values()) == 0


# Forced --------------------------------------------------------------------------------------------------------------


def test_a_forced_backend_is_used_whatever_the_profile_says(three: dict[str, Scripted]) -> None:
    know(result("steady"), result("spectral", 2.0, config=Config(factor=2.0)))
    assert chosen(forced="quick") == ("quick", "forced")
    decision = dispatch.decide(PROBLEM, "plan", ("spectral", None))
    assert decision.candidate.config == Config(factor=2.0)
    assert "its config from profile: " in decision.evidence.detail
    assert "its config estimated" in dispatch.decide(PROBLEM, "plan", ("quick", None)).evidence.detail


def test_a_forced_backend_may_be_one_that_nothing_is_known_of(clock: FakeClock) -> None:
    only(Scripted("unknown", clock, expected=None), Scripted("other", clock))
    assert chosen(forced="unknown") == ("unknown", "forced")


def test_a_forced_config_is_used_with_the_thread_budget(clock: FakeClock) -> None:
    only(Scripted("wide", clock, parallel=True, tried=(Config(factor=1.0),)), Scripted("narrow", clock))
    with settings.options(threads=3):
        wide = dispatch.decide(PROBLEM, "plan", ("wide", Config(factor=2.0))).candidate
        narrow = dispatch.decide(PROBLEM, "plan", ("narrow", Config())).candidate
        own = dispatch.decide(PROBLEM, "plan", ("wide", Config(threads=2))).candidate
    assert wide.config == Config(factor=2.0, threads=3)
    assert narrow.config.threads == 1
    assert own.config.threads == 2


def test_a_forced_config_that_makes_no_sense_raises(clock: FakeClock) -> None:
    only(Demanding("demanding", clock, tried=(Config(tile=8),)))
    with pytest.raises(ArgumentError, match="tile must be at least 1; got 0"):
        convdispatch.conv2d(INPUT, FILTERS, backend=("demanding", {"tile": 0}))


def test_a_misspelt_key_of_a_forced_config_is_refused(clock: FakeClock) -> None:
    only(Scripted("tiled", clock, tried=(Config(tile=8),)))
    with pytest.raises(ArgumentError, match="backend 'tiled' has no config 'tiel'; did you mean 'tile'"):
        convdispatch.conv2d(INPUT, FILTERS, backend=("tiled", {"tiel": 8}))


def test_a_backend_that_raises_when_asked_is_passed_over_and_the_others_serve(clock: FakeClock) -> None:
    def raises(problem: object) -> str | None:
        raise OSError("gone")

    bad = Scripted("bad", clock)
    bad.rejects = raises  # type: ignore[method-assign]
    only(bad, Scripted("good", clock))
    assert dispatch.decide(PROBLEM, "plan").candidate.backend.name == "good"
    rows = {row.backend: row for row in explain_problem(PROBLEM).rows}
    assert rows["bad"].reason == "its rejects raised OSError: gone"


def test_a_forced_backend_that_is_not_there_or_rejects_says_so(three: dict[str, Scripted]) -> None:
    with pytest.raises(UnknownBackendError, match="no backend is called 'quik'; did you mean 'quick'"):
        convdispatch.conv2d(INPUT, FILTERS, backend="quik")
    three["quick"].reason = "only on Sundays"
    with pytest.raises(BackendRejectedError, match=r"backend 'quick' cannot do 1x6x6x2 .*: only on Sundays"):
        convdispatch.conv2d(INPUT, FILTERS, backend="quick")


@pytest.mark.parametrize(
    "backend",
    [3, ("a",), ("a", 3), ("a", {"m": [1]}), ("a", {"m": 1}, 2), (3, {}), {"a": {}}, ("a", {1: 2, "b": 3})],
)
def test_what_is_neither_a_name_nor_a_pair_is_a_type_error(backend: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="backend must be a name, or"):
        convdispatch.conv2d(INPUT, FILTERS, backend=backend)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "many"])
def test_a_forced_thread_count_must_be_one(threads: Any) -> None:
    with pytest.raises(ConvDispatchError, match="threads must be a whole number from 1 to 9999"):
        convdispatch.conv2d(INPUT, FILTERS, backend=("im2col", {"threads": threads}))


# Options -------------------------------------------------------------------------------------------------------------


def test_options_hold_inside_their_block_only_even_when_it_raises(three: dict[str, Scripted]) -> None:
    before = settings.current()
    with settings.options(threads=3, forbid="quick") as outer:
        assert settings.current() == outer
        assert chosen() == ("steady", "estimate")
        with settings.options(forbid=()) as inner:
            assert (inner.threads, inner.forbid) == (3, ())
            assert chosen() == ("quick", "estimate")
        with pytest.raises(KeyError), settings.options(threads=1):
            raise KeyError
        assert settings.current() == outer
    assert settings.current() == before


def test_options_are_their_threads_own(three: dict[str, Scripted]) -> None:
    inside, leave = threading.Event(), threading.Event()
    seen: list[tuple[str, str]] = []

    def other() -> None:
        with settings.options(forbid="quick"):
            inside.set()
            leave.wait(10)
            seen.append(chosen())

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    assert settings.current().forbid == ()
    assert chosen() == ("quick", "estimate")
    leave.set()
    thread.join()
    assert seen == [("steady", "estimate")]


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("memory_limit", "256MiB", 256 << 20), ("memory_limit", "1.5 kB", 1500), ("memory_limit", 12, 12),
        ("memory_limit", "0", 0), ("memory_limit", None, None), ("memory_limit", "2G", 2 * 10**9),
        ("accuracy", "STRICT", "strict"), ("accuracy", "1e-5", 1e-5), ("tuning", "on_miss", "on-miss"),
        ("forbid", "fft, winograd,fft", ("fft", "winograd")), ("forbid", ["b", "a"], ("a", "b")),
        ("threads", "4", 4), ("threads", None, None), ("time_limit", 0, 0.0), ("profile", "", None),
        ("profile", "a/b.yaml", Path("a/b.yaml").absolute()), ("effort", " Patient ", "patient"),
        ("isolation", "Third_Party", "third-party"),
    ],
)  # fmt: skip
def test_options_are_read_leniently(name: str, given: Any, meant: Any) -> None:
    with settings.options(**{name: given}) as found:
        assert getattr(found, name) == meant


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("memory_limit", "lots"), ("memory_limit", -1), ("memory_limit", True), ("memory_limit", "1XB"),
        ("accuracy", "exact"), ("accuracy", 0), ("accuracy", 1), ("accuracy", None), ("accuracy", float("nan")),
        ("tuning", "always"), ("tuning", True), ("forbid", 3), ("forbid", [3]), ("threads", 0), ("threads", 1.0),
        ("threads", True), ("threads", "two"), ("time_limit", -1), ("time_limit", "soon"),
        ("time_limit", float("nan")), ("profile", 3), ("profile", b"x"), ("effort", "heroic"),
        ("isolation", True),
    ],
)  # fmt: skip
def test_an_option_that_makes_no_sense_is_an_error_that_names_it(name: str, given: Any) -> None:
    before = settings.current()
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"{name} must be"), settings.options(**{name: given}):
        pytest.fail("entered")
    assert settings.current() == before


def test_options_can_be_kept_nested_and_used_by_a_function() -> None:
    one, strict = settings.options(threads=1), settings.options(accuracy="strict", threads=2)
    for _ in range(2):
        with one, strict as inner, one:
            assert (settings.current().threads, settings.current().accuracy) == (1, "strict")
            assert inner.threads == 2
        assert settings.current().threads is None
    assert one(lambda: settings.current().threads)() == 1
    with strict:  # blocks of generators end in any order
        one.__enter__()
        strict.__exit__()
        assert (settings.current().threads, settings.current().accuracy) == (1, "standard")
        one.__exit__()
        assert settings.current() == settings.from_environment()
    assert repr(strict) == "options(accuracy='strict', threads=2)"


def test_an_option_that_does_not_exist_is_a_type_error_with_a_suggestion() -> None:
    with pytest.raises(TypeError, match="did you mean 'threads'"), settings.options(thread=1):
        pytest.fail("entered")


def test_every_option_can_be_set_by_its_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "ACCURACY": "strict", "EFFORT": "patient", "FORBID": "fft,winograd", "ISOLATION": "all",
        "MEMORY_LIMIT": "1MiB", "ON_MISS": "warn", "ONLINE_BUDGET": "0.05", "PROFILE": "some.yaml", "THREADS": "3",
        "TIME_LIMIT": "2.5", "TUNING": "on-miss",
    }  # fmt: skip
    assert {name.lower() for name in given} == set(settings.TABLE)
    for name, value in given.items():
        monkeypatch.setenv(f"CONVDISPATCH_{name}", value)
    settings.from_environment.cache_clear()
    assert settings.current() == settings.Options(
        "strict",
        "patient",
        ("fft", "winograd"),
        "all",
        1 << 20,
        "warn",
        0.05,
        Path("some.yaml").absolute(),
        3,
        2.5,
        "on-miss",
    )
    with settings.options(threads=1):  # a block is nearer than the environment
        assert settings.current().threads == 1


def test_a_misspelt_environment_variable_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVDISPATCH_TREADS", "1")
    settings.from_environment.cache_clear()
    with pytest.warns(UserWarning, match="CONVDISPATCH_TREADS means nothing .* did you mean CONVDISPATCH_THREADS"):
        assert settings.current().threads is None


def test_an_environment_variable_that_makes_no_sense_is_ignored_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVDISPATCH_THREADS", "none")
    settings.from_environment.cache_clear()
    with pytest.warns(UserWarning, match="CONVDISPATCH_THREADS is ignored: threads must be"):
        assert settings.current().threads is None


@pytest.mark.parametrize(("name", "hint"), [("THREDS", "did you mean CONVDISPATCH_THREADS"), ("BLAH", "known: ")])
def test_a_hint_goes_by_what_follows_the_prefix(name: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"CONVDISPATCH_{name}", "1")
    settings.from_environment.cache_clear()
    with pytest.warns(UserWarning, match=f"CONVDISPATCH_{name} means nothing to convdispatch; {hint}"):
        settings.current()


@pytest.mark.parametrize("name", [name.upper() for name in (*settings.TABLE, *settings.PROCESS)])
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_environment_variable_is_as_good_as_none(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = settings.from_environment()
    monkeypatch.setenv(f"CONVDISPATCH_{name}", value)
    settings.from_environment.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settings.from_environment() == (
            replace(usual, isolation="third-party") if name == "ISOLATION" else usual
        )
        assert settings.record_path() is None


@pytest.mark.parametrize(
    "given",
    [
        {"time_limit": 10**400}, {"time_limit": 10**5000}, {"time_limit": True}, {"time_limit": math.nan},
        {"accuracy": 10**400}, {"accuracy": math.nan}, {"online_budget": 10**400},
        {"online_budget": math.nan}, {"online_budget": True}, {"memory_limit": "1" * 400 + ".0GiB"},
        {"threads": 10**5000},
    ],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_numbers_that_no_option_can_take_are_errors_that_name_it(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"{name} must be .*; got ") as failed:
        settings.options(**given)
    assert len(str(failed.value)) < 250


@pytest.mark.parametrize("name", ["profile", "record"])
def test_a_home_that_is_not_there_is_told_of_and_passed_over(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"CONVDISPATCH_{name.upper()}", "~nobody-of-this-name/p.yaml")
    settings.from_environment.cache_clear()
    with pytest.warns(UserWarning, match=f"{name} must be a file's path; .*no home folder of ~nobody-of-this-name"):
        assert (settings.from_environment().profile, settings.record_path()) == (None, None)
    with pytest.raises(ArgumentError, match="there is no home folder of ~nobody-of-this-name"):
        settings.options(profile="~nobody-of-this-name/p.yaml")


# What changes a decision ---------------------------------------------------------------------------------------------


def test_registering_and_unregistering_change_what_is_remembered(three: dict[str, Scripted]) -> None:
    assert chosen() == ("quick", "estimate")
    registry.register(Scripted("quicker", FakeClock(), expected=0.5))
    assert chosen() == ("quicker", "estimate")
    registry.unregister("quicker")
    assert chosen() == ("quick", "estimate")
    registry.register(Scripted("quick", FakeClock(), expected=50.0), replace=True)
    assert chosen() == ("steady", "estimate")


def test_tuning_changes_what_is_remembered(three: dict[str, Scripted]) -> None:
    assert chosen() == ("quick", "estimate")
    tuner.tune(PROBLEM)
    assert chosen() == ("steady", "profile")


# Explain -------------------------------------------------------------------------------------------------------------


def test_explain_lists_the_chosen_first_then_by_time_then_the_refused(three: dict[str, Scripted]) -> None:
    registry.register(Scripted("picky", FakeClock(), reason="only on Sundays"))
    told = explain(PROBLEM.input_shape, PROBLEM.filter_shape)
    assert [row.backend for row in told.rows] == ["quick", "steady", "spectral", "picky"]
    assert [row.chosen for row in told.rows] == [True, False, False, False]
    assert told.chosen == "quick"
    assert told.evidence.source == "estimate"
    assert told.layer is None
    assert told.rows[0].estimate == 1.0
    assert told.rows[1].workspace == 1000
    assert told.rows[0].median is None
    assert (told.rows[3].candidate, told.rows[3].reason) == (None, "only on Sundays")


def test_explain_shows_what_was_measured(three: dict[str, Scripted]) -> None:
    three["quick"].off = 1.0
    tuner.tune(PROBLEM)
    told = explain(INPUT, FILTERS)
    steady, spectral, quick = told.rows
    assert (steady.backend, steady.chosen) == ("steady", True)
    assert steady.median == pytest.approx(1.0)
    assert steady.rounds == RULES.rounds
    assert steady.error is not None
    assert steady.error < 1e-6
    assert spectral.median == pytest.approx(1.2)
    assert quick.median is None
    assert quick.reason.startswith("failed when measured: wrong result")
    assert told.layer == "in-process"
    profile.forget()
    assert explain(INPUT, FILTERS).layer == "user"
    assert explain(INPUT, FILTERS, deployment="call").rows[0].median == pytest.approx(1.0)
    assert explain(INPUT, FILTERS, bias=True).layer is None


def test_explain_shows_no_measurement_of_another_version(three: dict[str, Scripted]) -> None:
    know(result("steady", version=9), result("quick"), failures=(Failure("spectral", 9, Config(), "no"),))
    rows = {row.backend: row for row in explain(INPUT, FILTERS).rows}
    assert rows["quick"].median == 1.0
    assert rows["steady"].median is None
    assert rows["spectral"].reason == ""


@pytest.mark.parametrize(
    ("options", "backend", "reason"),
    [
        ({"forbid": "steady"}, "steady", "forbidden by options"),
        ({"memory_limit": 10}, "steady", "needs more workspace than memory_limit=10"),
        ({"accuracy": "strict"}, "spectral", "accuracy='strict' allows local backends only"),
        ({"accuracy": 1e-5}, "spectral", "accuracy=1e-05 needs its error measured"),
    ],
)
def test_explain_says_what_the_options_hold_against_a_backend(
    three: dict[str, Scripted], options: dict[str, Any], backend: str, reason: str
) -> None:
    with settings.options(**options):
        rows = {row.backend: row for row in explain(INPUT, FILTERS).rows}
    assert rows[backend].reason == reason
    assert not rows[backend].chosen
    assert rows["quick"].reason == ""


def test_explain_says_when_a_measured_error_is_too_large(three: dict[str, Scripted]) -> None:
    know(result("spectral", error=1e-3), result("quick", 2.0))
    rows = {row.backend: row for row in explain(INPUT, FILTERS).rows}
    assert rows["spectral"].reason == "its error was measured above what accuracy='standard' allows"
    assert rows["quick"].chosen


def test_explain_shows_the_entry_that_decided(three: dict[str, Scripted], tmp_path: Path) -> None:
    know(result("steady", 2.0), result("quick", 3.0))
    here, project = machine.current(), tmp_path / "project.yaml"
    key = Key(PROBLEM, "plan", machine.usable_cores(), here.id)
    profile_file.write(project, [Entry(key, (result("gone", 1.0), result("steady", 9.0, error=0.5)))], here)
    with settings.options(profile=project):
        told = explain(INPUT, FILTERS)
    assert "in the user profile" in told.evidence.detail
    assert (told.layer, told.chosen) == ("user", "steady")
    assert [(row.backend, row.median) for row in told.rows[:2]] == [("steady", 2.0), ("quick", 3.0)]


@pytest.mark.filterwarnings("ignore:backend 'broken'")
def test_explain_shows_a_backend_that_cannot_estimate(three: dict[str, Scripted]) -> None:
    class Broken(Scripted):
        def estimate(self, problem: Problem, config: Config, machine: machine.Machine) -> float:
            raise ZeroDivisionError

    registry.register(Broken("broken", FakeClock()))
    row = next(row for row in explain(INPUT, FILTERS).rows if row.backend == "broken")
    assert (row.candidate, row.estimate, row.chosen) == ("broken", None, False)
    know(result("broken", 3.0), result("quick", 4.0))
    told = explain(INPUT, FILTERS)
    assert (told.chosen, told.rows[0].estimate, told.rows[0].median) == ("broken", None, 3.0)


@pytest.mark.filterwarnings("ignore:backend 'broken'")
def test_explain_says_why_a_backend_has_no_candidate(three: dict[str, Scripted]) -> None:
    class Broken(Scripted):
        def configs(self, problem: Problem, effort: str) -> tuple[Config, ...]:
            raise ZeroDivisionError("no cores")

    registry.register(Broken("broken", FakeClock()))
    registry.register(Scripted("empty", FakeClock(), tried=()))
    reasons = {row.backend: row.reason for row in explain(INPUT, FILTERS).rows if row.candidate is None}
    assert reasons == {"broken": "its configs raised ZeroDivisionError: no cores", "empty": "it has no configs"}


def test_explain_estimates_nothing_that_was_ranked(three: dict[str, Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def estimate(self: Scripted, problem: Problem, config: Config, machine: machine.Machine) -> float | None:
        asked.append(self.name)
        return self.expected

    explain(INPUT, FILTERS)  # decides, which is remembered
    monkeypatch.setattr(Scripted, "estimate", estimate)
    explain(INPUT, FILTERS)
    assert sorted(asked) == sorted(three)


def test_explain_tells_why_nobody_may(three: dict[str, Scripted]) -> None:
    with settings.options(forbid=tuple(three)):
        told = explain_problem(PROBLEM)
    assert told.chosen is None
    assert "no backend may do" in str(told.evidence)
    assert all(row.reason == "forbidden by options" for row in told.rows)


def test_explain_of_a_forced_backend(three: dict[str, Scripted]) -> None:
    told = explain(INPUT, FILTERS, backend="steady")
    assert told.rows[0].backend == "steady"
    assert told.evidence.source == "forced"
    three["spectral"].reason = "not today"
    told = explain(INPUT, FILTERS, backend="spectral")
    assert told.chosen is None
    assert "not today" in told.evidence.detail


def test_an_explanation_is_of_a_deployment_that_there_is() -> None:
    with pytest.raises(ArgumentError, match="deployment must be plan or call; got 'plans'"):
        explain(INPUT, FILTERS, deployment="plans")


def test_an_explanation_reads_as_a_table(three: dict[str, Scripted]) -> None:
    tuner.tune(PROBLEM)
    three["spectral"].reason = "only on Sundays"
    lines = str(explain(INPUT, FILTERS)).splitlines()
    assert lines[0].startswith("1x6x6x2 * 3x3x2x3 SAME  (plan, ")
    assert lines[1].startswith("chosen: steady  [profile: winner of 3 in the in-process profile")
    assert lines[2].split() == [
        "backend",
        "candidate",
        "measured",
        "spread",
        "estimate",
        "error",
        "workspace",
        "why",
        "not",
    ]
    assert lines[3].split()[:5] == ["*", "steady", "steady", "1", "s"]
    assert lines[-1].endswith("only on Sundays")
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (2.0, "2 s"), (0.0123, "12.3 ms"), (612e-6, "612 us"), (5e-9, "5 ns"), (0.0, "0 ns")],
)
def test_times_are_written_for_people(seconds: float | None, text: str) -> None:
    assert time_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1023, "0.999 KiB"), (1536, "1.5 KiB"), (3 << 30, "3 GiB")]
)
def test_sizes_are_written_for_people(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_explaining_measures_nothing(clock: FakeClock) -> None:
    backend = Scripted("only", clock)
    only(backend)
    with settings.options(tuning="on-miss"):
        assert explain_problem(PROBLEM).evidence.source == "estimate"
    assert backend.calls == 0


def test_what_a_third_party_promises_is_not_believed_unmeasured() -> None:
    registry.register(Scripted("boast", FakeClock(), expected=1e-12))
    decision = dispatch.decide(PROBLEM, "plan")
    assert registry.is_built_in(decision.candidate.backend)
    assert decision.evidence.source == "estimate"


def test_what_a_third_party_promises_puts_nobody_out() -> None:
    boast = Estimate(Candidate(Scripted("boast", FakeClock()), Config()), 1e-12)
    honest = Estimate(Candidate(registry.get("implicit_gemm"), Config()), 1e-3)
    slow = Estimate(Candidate(registry.get("im2col"), Config()), 1.0)
    assert heuristic.worth_measuring([boast, honest, slow], "measure") == ([boast.candidate, honest.candidate], [slow])
    assert heuristic.worth_measuring([boast], "measure") == ([boast.candidate], [])


def test_what_is_explained_is_what_a_call_would_take() -> None:
    with pytest.raises(ArgumentTypeError, match="one dtype; got float32 and float64"):
        explain(np.ones((1, 4, 4, 2), np.float32), np.ones((1, 1, 2, 2)))


def test_a_profiles_path_without_sense_is_refused_where_it_is_named() -> None:
    with pytest.raises(ArgumentError, match="no NUL is part of"), settings.options(profile="a\0b"):
        pass


def test_explaining_goes_on_where_a_workspace_raises() -> None:
    registry.register(Scripted("bad", FakeClock(), fails_in=lambda where, call: where == "workspace"))
    rows = {row.backend: row for row in explain_problem(PROBLEM).rows}
    assert rows["bad"].reason == "its workspace raised ValueError: scripted"
    assert rows["bad"].workspace is None


def test_explain_takes_a_bias_and_a_residual_as_conv2d_does_and_leaves_no_trace() -> None:
    x, w, bias = np.ones((1, 6, 6, 4), np.float32), np.ones((3, 3, 4, 5), np.float32), np.ones(5, np.float32)
    told = convdispatch.explain(x, w, bias=bias, residual=np.ones((1, 6, 6, 5), np.float32))
    assert told.problem == convdispatch.explain(x, w, bias=True, residual=True).problem
    assert not convdispatch.explain(x, w, bias=None).problem.epilogue
    with pytest.raises(ArgumentTypeError, match="bias must be an array"):
        convdispatch.explain(x, w, bias="yes")
    assert convdispatch.conv2d(x, w, bias=bias).shape == (1, 6, 6, 5)


def test_a_backend_that_prepares_nothing_is_told_of() -> None:
    class Forgetful(Scripted):
        def prepare(self, *_: Any) -> Any:
            pass

    only(Forgetful("forgetful", FakeClock()))
    with pytest.raises(BackendError, match=r"must return a kernel.*NoneType.*'forgetful'"):
        convdispatch.conv2d(INPUT, FILTERS)


def test_options_hold_in_a_coroutine_that_they_decorate_and_refuse_generators() -> None:
    @settings.options(threads=1)
    async def asked() -> int | None:
        await asyncio.sleep(0)
        return settings.current().threads

    assert asyncio.run(asked()) == 1
    assert settings.current().threads is None
    with pytest.raises(ArgumentTypeError, match="cannot decorate a generator; got values"):

        @settings.options(threads=1)
        def values() -> Iterator[int]:
            yield 1


def test_a_shape_may_be_an_array() -> None:
    w = np.ones((3, 3, 4, 5), np.float32)
    assert convdispatch.plan(np.array([1, 6, 6, 4]), w).problem == convdispatch.plan((1, 6, 6, 4), w).problem
