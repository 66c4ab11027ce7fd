"""The race under a clock that the runners move themselves: nothing here takes or measures real time."""

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convdispatch.tuning.race import RULES, Rules, Samples, comparable_seconds, race

ONE_CALL = Rules(rounds=7, sample_seconds=0.0, race_seconds=1e9)


class FakeClock:
    """A clock that stands still until it is told how long something took."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Runner:
    """Takes scripted seconds, call by call; the last ones again and again."""

    def __init__(self, clock: FakeClock, *seconds: float, log: list[str] | None = None, name: str = "") -> None:
        self.clock = clock
        self.seconds = seconds
        self.calls = 0
        self.log = log
        self.name = name

    def __call__(self) -> None:
        if self.log is not None:
            self.log.append(self.name)
        self.clock.now += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1


class Raises(Runner):
    """Raises from a certain call on."""

    def __init__(self, clock: FakeClock, seconds: float, at_call: int, error: BaseException) -> None:
        super().__init__(clock, seconds)
        self.at_call = at_call
        self.error = error

    def __call__(self) -> None:
        super().__call__()
        if self.calls >= self.at_call:
            raise self.error


def rounds(table: dict[str, Samples]) -> dict[str, int]:
    return {name: len(samples.seconds) for name, samples in table.items()}


def test_a_sample_is_the_time_of_one_call() -> None:
    clock = FakeClock()
    table = race({"a": Runner(clock, 3.0), "b": Runner(clock, 4.0)}, ONE_CALL, clock)
    assert table["a"].median == pytest.approx(3.0)
    assert table["b"].median == pytest.approx(4.0)
    assert rounds(table) == {"a": 7, "b": 7}


def test_a_first_call_a_thousand_times_slower_does_not_count() -> None:
    clock = FakeClock()
    table = race({"compiles": Runner(clock, 1000.0, 1.0), "steady": Runner(clock, 1.1)}, ONE_CALL, clock)
    assert table["compiles"].median == pytest.approx(1.0)
    assert table["compiles"].spread == pytest.approx(0.0, abs=1e-9)
    assert max(table["compiles"].seconds) < 1.01


def test_short_calls_are_repeated_until_a_sample_is_long_enough() -> None:
    clock = FakeClock()
    run = Runner(clock, 0.001)
    table = race({"a": run}, Rules(rounds=1, sample_seconds=0.05, race_seconds=1e9), clock)
    assert table["a"].repeat == 50
    assert run.calls == 2 + 1 + 50  # warm-up, before the sample, the sample
    assert table["a"].median == pytest.approx(0.001)


def test_calls_too_short_for_the_clock_are_repeated_a_thousand_times() -> None:
    clock = FakeClock()
    table = race({"a": Runner(clock, 0.0)}, Rules(rounds=2, sample_seconds=0.05, race_seconds=1e9), clock)
    assert table["a"].repeat == 1000
    assert table["a"].median == 0.0
    assert table["a"].spread == 0.0


def test_what_slows_all_alike_for_a_while_changes_no_order() -> None:
    clock = FakeClock()

    class Drifting(Runner):
        def __call__(self) -> None:
            slowness = 5.0 if 30 < clock.now - 100.0 < 80 else 1.0
            clock.now += self.seconds[0] * slowness

    # Timed one after the other, one of them would have the slow spell for itself.
    runners = {"better": Drifting(clock, 1.0), "worse": Drifting(clock, 1.1)}
    for seed in range(20):
        clock.now = 100.0
        table = race(runners, Rules(rounds=31, sample_seconds=0.0, race_seconds=1e9), clock, seed=seed)
        seconds = comparable_seconds(table)
        assert seconds["worse"] == pytest.approx(1.1 * seconds["better"])


@pytest.mark.parametrize("seed", range(4))
def test_wherever_the_machine_becomes_slower_the_times_stay_comparable(seed: int) -> None:
    clock = FakeClock()
    change = 0.0

    class Drifting(Runner):
        def __call__(self) -> None:
            clock.now += self.seconds[0] * (3.0 if clock.now >= change else 1.0)

    runners = {"better": Drifting(clock, 1.0), "worse": Drifting(clock, 1.1), "loser": Drifting(clock, 1.6)}
    for step in range(80):
        clock.now, change = 100.0, 100.0 + step / 2
        table = race(runners, ONE_CALL, clock, seed=seed)
        assert rounds(table)["better"] == rounds(table)["worse"] == ONE_CALL.rounds
        seconds = comparable_seconds(table)
        assert seconds["worse"] == pytest.approx(1.1 * seconds["better"])
        assert seconds["loser"] == pytest.approx(1.6 * seconds["better"])


def test_comparable_seconds_are_the_medians_where_nothing_drifts() -> None:
    table = {"a": Samples(1, [1.0] * 5), "b": Samples(1, [2.0] * 3), "c": Samples(1, [4.0])}
    assert comparable_seconds(table) == {"a": 1.0, "b": 2.0, "c": 4.0}
    assert comparable_seconds({"a": Samples(1, [0.0, 0.0]), "b": Samples(1, [1.0])}) == {"a": 0.0, "b": 1.0}
    assert comparable_seconds({}) == {}


def test_rounds_are_interleaved_and_in_an_order_that_only_the_seed_decides() -> None:
    def calls(seed: int) -> list[str]:
        clock = FakeClock()
        log: list[str] = []
        race({name: Runner(clock, 1.0, log=log, name=name) for name in "abcd"}, ONE_CALL, clock, seed=seed)
        return log

    warm_up, timed = calls(0)[:4], calls(0)[4:]
    assert warm_up == list("abcd")
    in_rounds = [tuple(timed[start : start + 4]) for start in range(0, len(timed), 4)]
    assert len(in_rounds) == ONE_CALL.rounds
    assert all(sorted(one) == list("abcd") for one in in_rounds)
    assert len(set(in_rounds)) > 1
    assert calls(0) == calls(0)
    assert calls(0) != calls(1)


def test_hopeless_losers_leave_after_one_round_and_plain_losers_after_a_few() -> None:
    clock = FakeClock()
    seconds = {"best": 1.0, "near": 1.2, "loser": 2.0, "hopeless": 20.0}
    table = race({name: Runner(clock, value) for name, value in seconds.items()}, ONE_CALL, clock)
    assert rounds(table) == {"best": 7, "near": 7, "loser": ONE_CALL.drop_after, "hopeless": 1}


def test_who_was_called_before_and_is_hopeless_is_called_once_more() -> None:
    clock = FakeClock()
    runners = {name: Runner(clock, value) for name, value in {"hopeless": 20.0, "best": 1.0, "near": 1.2}.items()}
    table = race(runners, ONE_CALL, clock, called=True)
    assert rounds(table) == {"hopeless": 1, "best": 7, "near": 7}
    assert runners["hopeless"].calls == 1
    assert comparable_seconds(table) == pytest.approx({"hopeless": 20.0, "best": 1.0, "near": 1.2})


def test_short_calls_are_never_hopeless_at_once() -> None:
    clock = FakeClock()
    unlucky = Runner(clock, 0.019, 0.001)
    table = race({"unlucky": unlucky, "other": Runner(clock, 0.001)}, ONE_CALL, clock, called=True)
    assert rounds(table) == {"unlucky": 7, "other": 7}


def test_one_slow_sample_puts_nobody_out() -> None:
    clock = FakeClock()
    # Call 1 is the warm-up; of the three first samples the second is bad.
    unlucky = Runner(clock, 1.0, 1.0, 50.0, 1.0)
    table = race({"unlucky": unlucky, "other": Runner(clock, 1.2)}, ONE_CALL, clock)
    assert rounds(table) == {"unlucky": 7, "other": 7}
    assert table["unlucky"].median == pytest.approx(1.0)


def test_a_call_that_takes_long_is_warmed_up_once_and_never_repeated() -> None:
    clock = FakeClock()
    run = Runner(clock, 5.0)
    table = race({"a": run}, Rules(rounds=1, sample_seconds=20.0, race_seconds=1e9), clock)
    assert table["a"].repeat == 1
    assert run.calls == 2


def test_a_runner_that_raises_in_the_call_that_tells_how_long_it_takes_leaves_the_race() -> None:
    clock = FakeClock()
    told: list[str] = []
    runners = {"bad": Raises(clock, 1e-3, 2, ValueError("no")), "good": Runner(clock, 1e-3)}
    table = race(runners, ONE_CALL, clock, on_failure=lambda name, _: told.append(name))
    assert list(table) == ["good"]
    assert told == ["bad"]


def test_when_the_leaders_raise_who_they_put_out_is_still_in_the_table() -> None:
    clock = FakeClock()
    runners = {
        "leader": Raises(clock, 1.0, 5, ValueError("no")),
        "second": Raises(clock, 1.1, 5, ValueError("no")),
        "loser": Runner(clock, 2.0),
    }
    assert rounds(race(runners, ONE_CALL, clock, on_failure=lambda *_: None)) == {"loser": 3}


def test_a_race_of_one_ends_as_soon_as_its_spread_is_known() -> None:
    clock = FakeClock()
    rules = RULES["exhaustive"]
    table = race({"alone": Runner(clock, 0.01)}, rules, clock)
    assert rounds(table) == {"alone": rules.drop_after}


def test_a_race_without_runners_ends_at_once() -> None:
    clock = FakeClock()
    assert race({}, ONE_CALL, clock) == {}
    assert clock.now == 100.0


@pytest.mark.parametrize("limit", [0.0, 5.0, 50.0])
def test_no_round_starts_after_the_time_limit_but_three_are_run(limit: float) -> None:
    clock = FakeClock()
    rules = Rules(rounds=1000, sample_seconds=0.0, race_seconds=limit)
    table = race({"a": Runner(clock, 1.0), "b": Runner(clock, 1.0)}, rules, clock)
    taken = clock.now - 100.0
    assert rounds(table)["a"] == rounds(table)["b"] >= 3
    assert taken <= max(limit, 2 * (2 + 3)) + 2  # the round that was under way, and the three


def test_fewer_rounds_than_three_are_run_if_the_rules_say_so() -> None:
    clock = FakeClock()
    table = race({"a": Runner(clock, 1.0)}, Rules(rounds=1, sample_seconds=0.0, race_seconds=0.0), clock)
    assert rounds(table) == {"a": 1}


@pytest.mark.parametrize("at_call", [1, 2, 4], ids=["warm-up", "first round", "third round"])
def test_a_runner_that_raises_leaves_the_race_and_the_others_go_on(at_call: int) -> None:
    clock = FakeClock()
    told: list[tuple[str, str]] = []

    def on_failure(name: str, error: Exception) -> None:
        told.append((name, str(error)))

    runners: dict[str, Callable[[], None]] = {
        "bad": Raises(clock, 1.0, at_call, ValueError("no")),
        "good": Runner(clock, 1.0),
        "fine": Runner(clock, 1.0),
    }
    table = race(runners, ONE_CALL, clock, on_failure=on_failure)
    assert rounds(table) == {"good": 7, "fine": 7}
    assert told == [("bad", "no")]


def test_without_anybody_to_tell_an_error_is_raised() -> None:
    clock = FakeClock()
    with pytest.raises(ValueError, match="no"):
        race({"bad": Raises(clock, 1.0, 1, ValueError("no"))}, ONE_CALL, clock)


def test_when_all_raise_nothing_is_left() -> None:
    clock = FakeClock()
    told: list[str] = []
    runners = {name: Raises(clock, 1.0, 4, ValueError("no")) for name in "ab"}
    assert race(runners, ONE_CALL, clock, on_failure=lambda name, _: told.append(name)) == {}
    assert sorted(told) == ["a", "b"]


def test_an_interruption_is_no_failure_and_ends_the_race() -> None:
    clock = FakeClock()
    told: list[str] = []
    runners = {"stopped": Raises(clock, 1.0, 3, KeyboardInterrupt())}
    with pytest.raises(KeyboardInterrupt):
        race(runners, ONE_CALL, clock, on_failure=lambda name, _: told.append(name))
    assert not told


@given(
    seconds=st.lists(st.floats(0.5, 50.0), min_size=1, max_size=6),
    noise=st.floats(0.0, 0.004),
    seed=st.integers(0, 2**32),
)
def test_nobody_who_is_fastest_by_more_than_the_noise_is_put_out(seconds: list[float], noise: float, seed: int) -> None:
    clock = FakeClock()
    shaking = random.Random(seed)

    class Noisy(Runner):
        def __call__(self) -> None:
            clock.now += self.seconds[0] * (1 + shaking.uniform(-noise, noise))

    runners = {str(number): Noisy(clock, value) for number, value in enumerate(seconds)}
    table = race(runners, ONE_CALL, clock, seed=seed)
    assert set(table) == set(runners)
    best = min(table.values(), key=lambda samples: samples.median)
    assert best.median == pytest.approx(min(seconds), rel=0.01)
    assert len(best.seconds) == max(rounds(table).values())


def test_median_and_spread() -> None:
    assert Samples(1, [4.0, 1.0, 2.0, 3.0, 5.0]).median == 3.0
    assert Samples(1, [4.0, 1.0, 2.0, 3.0, 5.0]).spread == pytest.approx(2.0 / 3.0)
    assert Samples(1, [4.0]).spread == 0.0
    assert Samples(1, [0.0, 0.0]).spread == 0.0


def test_higher_effort_looks_harder() -> None:
    ordered = [RULES[effort] for effort in ("measure", "patient", "exhaustive")]
    for easier, harder in itertools.pairwise(ordered):
        assert harder.rounds > easier.rounds
        assert harder.race_seconds > easier.race_seconds
        assert harder.drop_after > easier.drop_after


def test_nobody_who_left_is_said_to_be_faster_than_was_ever_measured() -> None:
    # The leader's first three rounds were bad: against those, three times as slow looks like three times as fast.
    table = {"a": Samples(1, [10.0] * 3 + [1.0] * 8), "b": Samples(1, [1.05] * 11), "c": Samples(1, [3.0] * 3)}
    assert comparable_seconds(table)["c"] == 3.0
