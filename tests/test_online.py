"""Online tuning under a fake clock: right results throughout, the budget kept, the fastest found, and an end to it."""

import copy
import itertools
import pickle
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from scripted import PROBLEM, FakeClock, Scripted, only

import convdispatch
from convdispatch import dispatch, machine, profile, profile_file, reference, registry, settings
from convdispatch.arguments import Array
from convdispatch.backend import Backend, Candidate, Config, Numerics
from convdispatch.errors import ArgumentError
from convdispatch.explain import explain_problem
from convdispatch.plan import Plan
from convdispatch.problem import Problem
from convdispatch.profile import Key
from convdispatch.tuning import hard_inputs, online, pairs
from convdispatch.tuning.online import Online, OnlinePlan
from convdispatch.tuning.pairs import Pairing

RNG = np.random.default_rng(0)
X, W = RNG.standard_normal(PROBLEM.input_shape, "f4"), RNG.standard_normal(PROBLEM.filter_shape, "f4")
RIGHT = reference.convolve(PROBLEM, X, W)
OTHER = Problem.parse("1x5x5x2 * 1x1x2x3 VALID")
#: Calls of a check: two on random inputs, four images under two sets of filters on hard ones.
CHECK = 2 + 8
OPTIONS = {"tuning": "online", "threads": 1}


def inline(job: Callable[[], None]) -> None:
    job()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def here(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Online:
    """This process's online tuning, with a clock that tests move and jobs that are done at once."""
    fresh = Online(clock, inline)
    monkeypatch.setattr(online, "_online", fresh)
    return fresh


def calls(plan: Plan, most: int = 20_000) -> int:
    """Call a plan until it is settled, checking every result; return how many calls that took."""
    for count in range(most):
        if type(plan) is Plan:
            return count
        np.testing.assert_allclose(plan(X), RIGHT, rtol=1e-4, atol=1e-4)
    raise AssertionError(f"not settled after {most} calls")


def made(**options: Any) -> Plan:
    with settings.options(**{**OPTIONS, **options}):
        return convdispatch.plan(X.shape, W)


def stored() -> dict[tuple[Problem, str], profile.Entry]:
    return {(e.key.problem, e.key.deployment): e for e in profile_file.read(profile.writable_path()).entries()}


def three(clock: FakeClock, **of_best: Any) -> dict[str, Scripted]:
    """Three backends: the best by estimate is not the best by the clock."""
    found = {
        "guess": Scripted("guess", clock, 1.0, expected=1.0),
        "best": Scripted("best", clock, 0.8, expected=1.1, **of_best),
        "slower": Scripted("slower", clock, 1.1, expected=1.2),
    }
    only(*found.values())
    return found


# Plans ----------------------------------------------------------------------------------------------------------


def test_a_plan_finds_the_fastest_settles_and_is_plain_from_then_on(clock: FakeClock, here: Online) -> None:
    three(clock)
    plan = made()
    assert type(plan) is OnlinePlan
    assert (plan.candidate.name, plan.evidence.source) == ("guess", "online")
    calls(plan)
    assert type(plan) is Plan
    assert (plan.candidate.name, plan.evidence.source) == ("best", "online")
    assert plan.evidence.detail == "best of 3 on live traffic, 800 ms"
    spent = here.budget.spent
    for _ in range(5):
        plan(X)
    assert here.budget.spent == spent
    entry = stored()[PROBLEM, "plan"]
    assert [result.backend for result in entry.results] == ["best", "guess", "slower"]
    assert [result.median for result in entry.results] == pytest.approx([0.8, 1.0, 1.1])
    assert entry.flags == ("online",)
    assert all(0 <= result.error < 1e-6 for result in entry.results)
    assert type(made()) is Plan
    assert made().evidence.source == "profile"


def test_the_estimates_pick_stays_where_it_is_best(clock: FakeClock, here: Online) -> None:
    only(Scripted("a", clock, 1.0, expected=1.0), Scripted("b", clock, 1.0, expected=1.1))
    plan = made()
    calls(plan)
    assert plan.candidate.name == "a"  # a tie keeps the incumbent


def test_an_incumbent_that_is_found_wrong_goes_at_once(clock: FakeClock, here: Online) -> None:
    three(clock)
    wrong = Scripted("wrong", clock, 0.01, expected=0.9, off=0.5)
    convdispatch.register(wrong)
    plan = made()
    assert plan.candidate.name == "wrong"  # by the estimate alone, and so until it has been checked
    while not any(contest.wrong for contest in here.contests.values()):
        plan(X)
    for _ in range(12):  # to list, to check and to pack for who is right is then no matter of the budget
        plan(X)
    before = wrong.calls
    calls(plan)
    assert wrong.calls == before
    assert plan.candidate.name == "best"


def test_a_wrong_challenger_never_computes_a_call(clock: FakeClock, here: Online) -> None:
    three(clock)
    wrong = Scripted("wrong", clock, 0.01, expected=1.05, off=0.5)
    convdispatch.register(wrong)
    plan = made()
    calls(plan)  # compares every result
    assert plan.candidate.name == "best"
    assert wrong.calls == 2  # of the check
    entry = stored()[PROBLEM, "plan"]
    assert [(failure.backend, failure.reason[:12]) for failure in entry.failures] == [("wrong", "wrong result")]


def test_a_challenger_is_checked_on_hard_inputs_too(clock: FakeClock, here: Online) -> None:
    class Normwise(Scripted):
        """Off by a little of its largest output, everywhere: as transforms are, which this does not say."""

        def store(self, problem: Problem, input: Array, filters: Array, out: Array) -> None:
            sums = reference.convolve(problem, input, filters)
            out[...] = sums + 2.0**-23 * np.abs(sums).max(axis=(1, 2), keepdims=True)

    three(clock)
    convdispatch.register(Normwise("normwise", clock, 0.1, expected=1.05))
    plan = made()
    calls(plan)
    assert plan.candidate.name == "best"
    entry = stored()[PROBLEM, "plan"]
    (failure,) = entry.failures
    assert failure.reason.startswith("wrong result: on wide range input, error")
    measured = hard_inputs.measure(PROBLEM, plan.candidate)
    assert measured is not None
    assert entry.winner.error == pytest.approx(measured.error, rel=1e-3)


@pytest.mark.parametrize("where", ["prepare", "call"])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7, CHECK + 1, CHECK + 2])
def test_a_challenger_that_raises_at_any_moment_is_put_out_and_the_call_is_computed(
    clock: FakeClock, here: Online, where: str, number: int
) -> None:
    three(clock, fails_in=lambda w, c: (w, c) == (where, number))
    plan = made()
    calls(plan)
    prepared_often_enough = where == "prepare" and number > 5  # twice on random inputs, twice on hard ones, once here
    assert plan.candidate.name == ("best" if prepared_often_enough else "guess")
    failures = stored()[PROBLEM, "plan"].failures
    assert [(f.backend, f.reason) for f in failures] == [("best", "ValueError: scripted")] * (not prepared_often_enough)


def test_a_callers_mistake_is_raised_and_puts_nobody_out(clock: FakeClock, here: Online) -> None:
    three(clock)
    plan = made()
    for _ in range(4000):
        if type(plan) is Plan:
            break
        with pytest.raises(ArgumentError, match="input must have shape"):
            plan(X[:, 1:])
        np.testing.assert_allclose(plan(X), RIGHT, rtol=1e-4, atol=1e-4)
    assert plan.candidate.name == "best"
    assert stored()[PROBLEM, "plan"].failures == ()


def test_a_hopeless_one_is_not_tried_on_live_traffic(clock: FakeClock, here: Online) -> None:
    three(clock)
    hopeless = Scripted("hopeless", clock, 5.0, expected=1.05)
    convdispatch.register(hopeless)
    calls(made())
    assert hopeless.calls == 2


def test_one_that_gets_slow_on_live_traffic_is_dropped_after_few_calls(clock: FakeClock, here: Online) -> None:
    three(clock)
    late = Scripted("late", clock, lambda call: 1.0 if call <= CHECK else 1.6, expected=1.05)
    convdispatch.register(late)
    plan = made()
    calls(plan)
    assert late.calls == CHECK + 3


def test_plans_of_one_problem_share_the_contest_and_each_has_its_own_filters(clock: FakeClock, here: Online) -> None:
    three(clock)
    first = made()
    with settings.options(**OPTIONS):
        second = convdispatch.plan(X.shape, 2 * W)
    while type(first) is not Plan or type(second) is not Plan:
        np.testing.assert_allclose(first(X), RIGHT, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(second(X), 2 * RIGHT, rtol=1e-4, atol=1e-4)
        assert here.calls < 20_000
    assert first.candidate.name == second.candidate.name == "best"
    np.testing.assert_allclose(second(X), 2 * RIGHT, rtol=1e-4, atol=1e-4)
    assert here.contests == {}


@pytest.mark.parametrize("at", [1, 200, 500])
def test_a_plan_that_is_gone_does_not_hold_up_the_others(clock: FakeClock, here: Online, at: int) -> None:
    three(clock)
    first, second = made(), made()
    for _ in range(at):
        first(X)
    del first
    calls(second)
    assert second.candidate.name == "best"


def test_a_plan_that_is_called_no_more_does_not_hold_up_the_others(clock: FakeClock, here: Online) -> None:
    three(clock)
    first, second = made(), made()
    for _ in range(300):
        first(X)
    calls(second)
    calls(first)
    assert first.candidate.name == second.candidate.name == "best"


def test_a_problem_that_is_called_no_more_does_not_hold_up_the_others(clock: FakeClock, here: Online) -> None:
    three(clock)
    with settings.options(**OPTIONS):
        other = convdispatch.plan(OTHER.input_shape, np.ones(OTHER.filter_shape, "f4"), padding="VALID")
    for _ in range(100):
        other(np.ones(OTHER.input_shape, "f4"))
    plan = made()
    calls(plan)
    assert plan.candidate.name == "best"
    assert type(other) is OnlinePlan


def test_where_most_time_is_spent_comes_first(clock: FakeClock, here: Online) -> None:
    only(
        Scripted("a", clock, 1.0, expected=1.0),
        Scripted("b", clock, 0.9, expected=1.1),
    )
    here._closed = True
    small, large = made(), None
    with settings.options(**OPTIONS):
        large = convdispatch.plan(OTHER.input_shape, np.ones(OTHER.filter_shape, "f4"), padding="VALID")
    for _ in range(20):
        small(X)
        for _ in range(3):
            large(np.ones(OTHER.input_shape, "f4"))
    here._closed = False
    small(X)
    assert here._current is not None
    assert here._current.key.problem == OTHER


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_copy_is_a_plain_plan_of_the_current_candidate(here: Online, copied: Callable[[Plan], Plan]) -> None:
    plan = made()  # of a built-in backend, whose kernels can be pickled
    assert type(plan) is OnlinePlan
    again = copied(plan)
    assert type(again) is Plan
    assert again.candidate == plan.candidate
    assert again.budget == 1
    np.testing.assert_allclose(again(X), RIGHT, rtol=1e-4, atol=1e-4)


def test_out_and_residual_work_on_the_way(clock: FakeClock, here: Online) -> None:
    three(clock)
    with settings.options(**OPTIONS):
        plan = convdispatch.plan(X.shape, W, residual=True, bias=np.ones(3, "f4"))
    added, out = RNG.standard_normal(RIGHT.shape, "f4"), np.empty(RIGHT.shape, "f4")
    for _ in range(2000):
        assert plan(X, out=out, residual=added) is out
        np.testing.assert_allclose(out, RIGHT + added + 1, rtol=1e-4, atol=1e-4)
    assert plan.candidate.name == "best"


# Calls ----------------------------------------------------------------------------------------------------------


def test_conv2d_is_tuned_with_its_packing(clock: FakeClock, here: Online) -> None:
    three(clock, packing=5.0)["guess"].seconds = 1.5
    with settings.options(**OPTIONS):
        for _ in range(3000):
            np.testing.assert_allclose(convdispatch.conv2d(X, W), RIGHT, rtol=1e-4, atol=1e-4)
        assert dispatch.decide(PROBLEM, "call").evidence.source == "profile"
        assert dispatch.decide(PROBLEM, "call").candidate.backend.name == "slower"
    assert stored()[PROBLEM, "call"].winner.backend == "slower"


def test_a_forced_backend_is_used_and_known_problems_are_left_alone(clock: FakeClock, here: Online) -> None:
    three(clock)
    with settings.options(**OPTIONS):
        plan = convdispatch.plan(X.shape, W, backend="slower")
        convdispatch.conv2d(X, W, backend="slower")
        empty = convdispatch.plan((0, 6, 6, 2), W)
    assert (type(plan), type(empty)) == (Plan, Plan)
    assert here.contests == {}


def test_what_options_do_not_allow_takes_no_part_and_the_result_stays_with_this_process(
    clock: FakeClock, here: Online
) -> None:
    found = three(clock, space=1000)
    convdispatch.register(Scripted("spectral", clock, 0.1, expected=1.05, numerics=Numerics("transform")))
    plan = made(memory_limit=10, accuracy="strict", forbid="guess")
    assert plan.candidate.name == "slower"
    calls(plan)
    assert plan.candidate.name == "slower"
    assert found["best"].calls == found["guess"].calls == 0
    assert not profile.user_path().exists()
    again = made(memory_limit=10, accuracy="strict", forbid="guess")
    assert (type(again), again.candidate.name) == (Plan, "slower")


# Many problems --------------------------------------------------------------------------------------------------


def of_height(height: int) -> Plan:
    with settings.options(**OPTIONS):
        return convdispatch.plan((1, height, 6, 2), W)


def test_a_contest_whose_result_is_kept_is_dropped_and_not_begun_again(clock: FakeClock, here: Online) -> None:
    three(clock)
    generation, plan = profile.generation(), made()
    candidate, (where,) = plan.candidate, here.contests
    calls(plan)
    assert here.contests == here._over == {}
    assert here.contest(where.key, where.options, candidate, generation) is None  # chosen a moment before it was over
    assert type(made()) is Plan
    assert here.contests == {}


def test_a_contest_whose_result_stays_here_is_not_begun_again(clock: FakeClock, here: Online) -> None:
    three(clock)
    plan = made(forbid="guess")
    calls(plan)
    assert here.contests == {}
    (over,) = here._over.values()
    again = made(forbid="guess")
    assert (type(again), again.candidate, again.evidence) == (Plan, plan.candidate, over.evidence)
    assert here.contests == {}


def test_of_ever_new_shapes_no_more_are_held_than_stated(
    clock: FakeClock, here: Online, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "MOST", 3)
    three(clock)
    first, second = of_height(6), of_height(7)
    first(X)
    others = [of_height(height) for height in range(8, 20)]
    assert len(here.contests) == 3
    held = {where.key.problem.h for where in here.contests}
    assert held == {6, 18, 19}  # the one that is called, and the newest
    for plan in (second, *others):
        height = plan.problem.h
        plan(np.ones((1, height, 6, 2), "f4"))
        assert height in {where.key.problem.h for where in here.contests}  # whoever is called is held again
    assert len(here.contests) == 3
    again = of_height(6)  # takes part in the contest that its like has begun
    assert isinstance(first, OnlinePlan)
    assert isinstance(again, OnlinePlan)
    assert again._packed is not None
    assert first._packed is not None
    assert again._packed.contest is first._packed.contest
    calls(first)
    assert first.candidate.name == "best"
    assert len(here.contests) <= 3


def test_where_too_many_stay_here_the_estimate_decides(
    clock: FakeClock, here: Online, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "MOST", 1)
    three(clock)
    calls(made(forbid="slower"))
    with settings.options(**OPTIONS, forbid="slower"):
        other = convdispatch.plan((1, 7, 6, 2), W)
        convdispatch.conv2d(X, W)
    assert (type(other), other.evidence.source) == (Plan, "estimate")
    assert type(made(forbid="slower")) is Plan
    assert made(forbid="slower").evidence.source == "online"


# The budget -----------------------------------------------------------------------------------------------------


@given(
    costs=st.lists(st.floats(0.3, 3.0), min_size=1, max_size=5),
    packing=st.floats(0.0, 2.0),
    share=st.sampled_from([0.01, 0.02, 0.2]),
    seed=st.integers(0, 100),
    deployment=st.sampled_from(["plan", "call"]),
)
def test_the_budget_is_never_exceeded(
    costs: list[float], packing: float, share: float, seed: int, deployment: str
) -> None:
    # Estimates that are what the clock will say, in an order that has nothing to do with it; ``over`` is what a
    # check or a packing takes more than could be expected, since nobody says beforehand how long packing is.
    clock = FakeClock()
    random.Random(seed).shuffle(costs)
    only(*[Scripted(f"b{i}", clock, cost, expected=cost, packing=packing) for i, cost in enumerate(costs)])
    here = Online(clock, inline)
    candidate = Candidate(registry.get("b0"), Config())
    over = 2 * packing + sum(costs) if packing else 0.0
    try:
        with settings.options(**OPTIONS, online_budget=share) as options:
            key = Key(PROBLEM, deployment, 1, machine.current().id)
            contest = here.contest(key, options, candidate, profile.generation())
            assert contest is not None
            plan = online.plan(contest, W, None)
            for _ in range(400):
                if deployment == "plan":
                    plan(X)
                else:
                    contest.call(W, None, X, out=None, residual=None)
                # the clock counts everything: calls, checks, packing, challengers
                assert here.budget.spent <= here.budget.earned + 2 * over + 1e-9
    finally:
        registry.restore()
        profile.forget()


def test_all_that_is_added_is_in_the_budget(clock: FakeClock, here: Online) -> None:
    backends = three(clock)
    plan = made()
    begun, count = clock.now, 0
    while type(plan) is OnlinePlan and backends["best"].calls < CHECK + 8:
        plan(X)
        count += 1
        added = clock.now - begun - count * 1.0
        assert added <= here.budget.spent + 1e-6
        assert here.budget.spent <= 0.02 * (clock.now - begun) + 1e-6
    assert backends["best"].calls == CHECK + 8


def test_no_budget_tries_nothing(clock: FakeClock, here: Online) -> None:
    backends = three(clock)
    plan = made(online_budget=0)
    assert type(plan) is Plan
    with settings.options(**OPTIONS, online_budget=0):
        convdispatch.conv2d(X, W)
    assert backends["best"].calls == backends["slower"].calls == 0
    assert here.contests == {}


@pytest.mark.parametrize(("seconds", "counted"), [(1e-5, 20), (1e-4, 300), (1e-2, 2000)])
def test_of_short_calls_few_are_looked_after(
    clock: FakeClock, here: Online, seconds: float, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(
        Scripted("a", clock, seconds, expected=seconds),
        Scripted("b", clock, seconds * 0.9, expected=seconds * 1.01),
    )
    plan = made()
    for _ in range(2000):
        plan(X)
    assert 2 < here.calls <= counted
    assert here.budget.spent <= here.budget.earned <= 0.02 * 2000 * seconds


@pytest.mark.parametrize("period", [7.0, 50.0, 333.0])
def test_a_machine_that_is_slow_now_and_then_does_not_make_a_loser_win(
    clock: FakeClock, here: Online, period: float
) -> None:
    three(clock)
    clock.slow = lambda now: 2.0 if now % (2 * period) < period else 1.0
    plan = made(online_budget=0.1)
    calls(plan)
    assert plan.candidate.name == "best"


@given(seed=st.integers(0, 2**32), ratio=st.sampled_from([0.8, 1.0, 1.2]))
def test_noise_does_not_make_a_loser_win(seed: int, ratio: float) -> None:
    shaking = random.Random(seed)

    def noise() -> float:
        return shaking.lognormvariate(0, 0.05)

    said = contested(noise, lambda: ratio * noise() * (3.0 if shaking.random() < 0.05 else 1.0))
    assert said == ("better" if ratio < 1 else "worse") or ratio == 1.0


def contested(incumbent: Callable[[], float], challenger: Callable[[], float]) -> pairs.Verdict:
    """Return how a contest ends between two with these times."""
    pairing = Pairing()
    while (said := pairs.verdict(pairing.ratios)) is None:
        pairing.add(incumbent())
        pairing.challenge(challenger())
        assert pairing.add(incumbent())
        pairing.interrupt()
        assert len(pairing.ratios) == len(pairing.times) <= pairs.MOST_PAIRS
    return said


@pytest.mark.parametrize("kind", ["a tail", "spikes"])
def test_noise_that_only_makes_slower_does_not_let_an_equal_take_over(kind: str) -> None:
    shaking = random.Random(0)

    def seconds() -> float:
        if kind == "a tail":
            return 1 + shaking.expovariate(1 / 0.05)
        return (1 + shaking.gauss(0, 0.01)) * (1.5 if shaking.random() < 0.15 else 1.0)

    ends = [contested(seconds, seconds) for _ in range(1000)]
    assert ends.count("better") <= 10


@pytest.mark.parametrize("drift", [0.98, 1.0, 1.02])
def test_a_drift_is_nobodys_merit(drift: float) -> None:
    times = (drift**number for number in itertools.count())
    assert contested(times.__next__, times.__next__) == "worse"  # a tie keeps the incumbent


def test_a_pair_is_three_calls_in_a_row() -> None:
    pairing = Pairing()
    opened = [pairing.is_open]
    assert not pairing.add(1.0)
    opened.append(pairing.is_open)
    pairing.challenge(2.0)
    opened.append(pairing.is_open)
    assert pairing.add(4.0)
    opened.append(pairing.is_open)
    pairing.challenge(2.0)
    assert pairing.add(8.0)
    pairing.interrupt()
    opened.append(pairing.is_open)
    assert opened == [False, True, False, True, False]
    pairing.challenge(2.0)
    assert not pairing.add(1.0)
    pairing.challenge(2.0)
    assert pairing.add(0.0)
    assert pairing.ratios == [2.0, 0.25, 2.0]
    pairing.challenge(2.0)
    assert pairing.add(0.0)  # too fast for the clock
    assert pairing.ratios[-1] == 1.0
    assert pairing.times == [2.0] * 5


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([], None),
        ([0.5] * 8, None),
        ([0.5] * 9, "better"),
        ([1.0] * 9, "worse"),
        ([0.995] * 9, "worse"),
        ([0.985] * 9, "better"),
        ([1.3, 1.4, 1.3], "worse"),
        ([1.3, 1.2, 1.3], None),
        ([0.9, 1.1] * 20, None),
        ([0.9, 1.1] * 20 + [0.9], "worse"),
    ],
)
def test_the_rule(ratios: list[float], said: str | None) -> None:
    assert pairs.verdict(ratios) == said


@pytest.mark.parametrize("count", range(102))
def test_an_interval_leaves_out_as_many_as_the_binomial_allows(count: int) -> None:
    bounds = pairs.interval([float(value) for value in reversed(range(count))])
    left_out = -1 if bounds is None else int(bounds[0])
    assert bounds is None or bounds[1] == count - 1 - left_out
    chances = [2 * float(scipy.stats.binom.cdf(end, count, 0.5)) for end in (left_out, left_out + 1)]
    assert chances[0] <= 0.004 < chances[1]


# Threads, failures, explanations --------------------------------------------------------------------------------


def test_many_threads_may_call_one_plan_and_every_result_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Online()
    monkeypatch.setattr(online, "_online", fresh)
    with settings.options(tuning="online", online_budget=1.0, threads=1):
        plan = convdispatch.plan(X.shape, W)
    assert type(plan) is OnlinePlan
    wrong: list[Any] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(3000):
            y = plan(X)
            if not np.allclose(y, RIGHT, rtol=1e-4, atol=1e-4):
                wrong.append(y)
            if type(plan) is Plan:
                break

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive()
    assert wrong == []
    fresh.finish()
    assert not any(contest.flying for contest in fresh.contests.values())


def test_without_a_thread_for_the_background_calls_go_on(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(job: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    backends = three(clock)
    monkeypatch.setattr(online, "_online", Online(clock, none))
    plan = made()
    for _ in range(200):
        np.testing.assert_allclose(plan(X), RIGHT, rtol=1e-4, atol=1e-4)
    assert backends["guess"].calls == 200


def test_a_compiler_that_takes_long_holds_up_no_call(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Callable[[], None]] = []
    monkeypatch.setattr(online, "_online", Online(clock, jobs.append))
    backends = three(clock)
    plan = made()
    for _ in range(500):
        plan(X)
    assert len(jobs) == 1  # and is still being done
    assert backends["guess"].calls == 500
    while type(plan) is not Plan:
        if jobs:
            jobs.pop()()
        plan(X)
    assert plan.candidate.name == "best"


def test_without_a_thread_to_be_had_the_program_ends_as_usual(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    fresh = Online(clock)
    monkeypatch.setattr(online, "_online", fresh)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    three(clock)
    plan = made()
    for _ in range(500):
        plan(X)
    assert fresh._closed
    fresh.finish()


def test_a_forked_child_goes_on(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Callable[[], None]] = []
    fresh = Online(clock, jobs.append)
    monkeypatch.setattr(online, "_online", fresh)
    three(clock)
    plan = made()
    for _ in range(300):
        plan(X)
        if any(contest.checking for contest in fresh.contests.values()):
            break
        if jobs:
            jobs.pop()()
    jobs.clear()  # the thread that was doing it is the parent's
    fresh.after_fork()
    while type(plan) is not Plan:
        if jobs:
            jobs.pop()()
        plan(X)
    assert plan.candidate.name == "best"


def test_when_nobody_is_right_it_says_so_and_ends(clock: FakeClock, here: Online) -> None:
    only(Scripted("wrong", clock, off=1.0), Scripted("broken", clock, expected=2.0, fails_in=lambda *_: True))
    plan = made()

    def call_often() -> None:
        for _ in range(1000):
            plan(X)

    with pytest.warns(UserWarning, match="nobody was found right: .*wrong: wrong result"):
        call_often()
    assert type(plan) is Plan
    assert not profile.user_path().exists()


def test_a_new_backend_begins_a_new_contest(clock: FakeClock, here: Online) -> None:
    three(clock)
    made()
    convdispatch.register(Scripted("new", clock, 0.5, expected=1.05))
    plan = made()
    calls(plan)
    assert plan.candidate.name == "new"


class Nested(Scripted):
    """Convolves itself on the way."""

    def store(self, problem: Problem, input: Array, filters: Array, out: Array) -> None:
        convdispatch.conv2d(np.ones(OTHER.input_shape, "f4"), np.ones(OTHER.filter_shape, "f4"), padding="VALID")
        super().store(problem, input, filters, out)


def test_a_backend_may_convolve_itself(clock: FakeClock, here: Online) -> None:
    def rejects(problem: Problem) -> str | None:
        return "not this" if problem == OTHER else None

    nested: Backend = Nested("nested", clock, 0.3, expected=1.05)
    nested.rejects = rejects  # type: ignore[method-assign]
    three(clock)
    convdispatch.register(nested)
    with settings.options(**OPTIONS):
        plan = made()
        for _ in range(3000):
            np.testing.assert_allclose(plan(X), RIGHT, rtol=1e-4, atol=1e-4)
    assert type(plan) is Plan


def test_explain_tells_how_far_it_is_and_measures_nothing(clock: FakeClock, here: Online) -> None:
    backends = three(clock)
    plan = made()
    with settings.options(**OPTIONS):
        assert explain_problem(PROBLEM).evidence.source == "estimate"
        before = backends["best"].calls
        plan(X)
        told = explain_problem(PROBLEM)
        assert (told.chosen, told.evidence.source) == ("guess", "online")
        assert told.evidence.detail == "ahead so far on live traffic, 0 looked at"
        assert backends["best"].calls == before
        calls(plan)
        told = explain_problem(PROBLEM)
        assert (told.chosen, told.evidence.source) == ("best", "profile")


@pytest.mark.slow
@pytest.mark.parametrize("deployment", ["plan", "call"])
def test_the_built_in_backends_are_tuned_by_the_real_clock(monkeypatch: pytest.MonkeyPatch, deployment: str) -> None:
    fresh = Online()
    monkeypatch.setattr(online, "_online", fresh)
    problem = Problem.parse("1x14x14x32 * 3x3x32x32 SAME")
    x, w = RNG.standard_normal(problem.input_shape, "f4"), RNG.standard_normal(problem.filter_shape, "f4")
    right = reference.convolve(problem, x, w)
    end = time.monotonic() + 120
    with settings.options(tuning="online", threads=1):
        plan = convdispatch.plan(x, w)
        while (problem, deployment) not in stored():
            y = plan(x) if deployment == "plan" else convdispatch.conv2d(x, w)
            assert np.abs(y - right).max() < 1e-3
            assert time.monotonic() < end
    fresh.finish()
    entry = stored()[problem, deployment]
    assert entry.flags == ("online",)
    assert len(entry.results) > 1
    assert fresh.budget.spent <= 2 * fresh.budget.earned
