"""Times candidates in interleaved rounds, so that what slows the machine for a while slows all of them alike."""

import functools
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from convdispatch.tuning.clock import Clock

Run = Callable[[], object]


@dataclass(frozen=True)
class Rules:
    """How a race is run.

    Attributes:
        rounds: most samples of a candidate.
        sample_seconds: a sample repeats the call until it takes about this long.
        race_seconds: no round starts after this much time.
        drop: a candidate whose best sample is this many times the leader's median leaves the race...
        drop_after: ...once it has this many samples (one is enough for ten times that).
    """

    rounds: int
    sample_seconds: float
    race_seconds: float
    drop: float = 1.5
    drop_after: int = 3


#: Seconds of a first call from which on a second would tell nothing new.
_SLOW = 0.02
_MOST_REPEATS = 1000

RULES = {
    "measure": Rules(rounds=11, sample_seconds=0.002, race_seconds=1.0),
    "patient": Rules(rounds=31, sample_seconds=0.005, race_seconds=8.0, drop_after=5),
    "exhaustive": Rules(rounds=61, sample_seconds=0.01, race_seconds=60.0, drop=3.0, drop_after=9),
}


@dataclass
class Samples:
    """A candidate's times.

    Attributes:
        repeat: calls that make a sample.
        seconds: of one call, a sample a round.
        first: seconds of a call when warming up.
    """

    repeat: int
    seconds: list[float] = field(default_factory=list)
    first: float = 0.0

    @property
    def median(self) -> float:
        """Median of the samples in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median; 0 for fewer than two samples."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median if self.median else 0.0


def race(
    runners: Mapping[str, Run],
    rules: Rules,
    clock: Clock,
    *,
    seed: int = 0,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, Samples]:
    """Time every runner; the first call of each is a warm-up outside the clock's samples.

    Args:
        runners: what to call, by name.
        rules: how many rounds, how long.
        clock: tells the time.
        seed: decides the order within the rounds.
        on_failure: told of a runner that raised; it leaves the race. Without, the error is raised.

    Returns:
        Samples by name, at least one each, except for runners that raised.
    """
    start = clock()
    order = random.Random(seed)  # noqa: S311  # shuffling, not secrets
    table: dict[str, Samples] = {}
    for name, run in runners.items():
        once = _attempt(name, functools.partial(_warm_up, run, clock), on_failure)
        if once is not None:
            table[name] = Samples(_repeats(once, rules), first=once)
    live = list(table)
    for number in range(rules.rounds):
        order.shuffle(live)
        for name in list(live):
            samples = table[name]
            taken = _attempt(name, functools.partial(_sample, runners[name], samples, clock), on_failure)
            if taken is None:
                live.remove(name)
                del table[name]
            else:
                samples.seconds.append(taken)
        live = _still_in(live, table, rules)
        if not live or (clock() - start > rules.race_seconds and number + 1 >= min(3, rules.rounds)):
            break
        if len(live) == 1 and number + 1 >= rules.drop_after:
            break
    return table


def comparable_seconds(table: Mapping[str, Samples]) -> dict[str, float]:
    """Return the seconds of a call by name, as if all had run in the same rounds at the same moments.

    One who ran to the end is the measure: its median, times the median of the others' ratios to it, round by
    round. A plain median would not do: where the machine becomes slower halfway, it is a matter of luck on which
    side of the change each runner's median falls, and who left before has only the fast half.
    """
    most = max((len(samples.seconds) for samples in table.values()), default=0)
    finishers = [samples for samples in table.values() if len(samples.seconds) == most]
    measure = min(finishers, key=lambda samples: samples.median, default=Samples(1))
    if not all(measure.seconds):
        return {name: samples.median for name, samples in table.items()}  # too fast for the clock
    return {
        name: measure.median * statistics.median(a / b for a, b in zip(samples.seconds, measure.seconds, strict=False))
        for name, samples in table.items()
    }


def _attempt(
    name: str, action: Callable[[], float], on_failure: Callable[[str, Exception], None] | None
) -> float | None:
    try:
        return action()
    except Exception as error:
        if on_failure is None:
            raise
        on_failure(name, error)
        return None


def _warm_up(run: Run, clock: Clock) -> float:
    """Warm up, and return the seconds of a call."""
    before = clock()
    run()
    once = clock() - before
    if once > _SLOW:  # another call only to learn that costs as much
        return once
    before = clock()
    run()
    return clock() - before


def _repeats(once: float, rules: Rules) -> int:
    if once > _SLOW:
        return 1
    return max(1, min(_MOST_REPEATS, round(rules.sample_seconds / once))) if once > 0 else _MOST_REPEATS


def _sample(run: Run, samples: Samples, clock: Clock) -> float:
    if samples.first <= _SLOW:
        run()  # outside the clock: the caches are full of what the others left there
    before = clock()
    for _ in range(samples.repeat):
        run()
    return (clock() - before) / samples.repeat


def _still_in(live: list[str], table: Mapping[str, Samples], rules: Rules) -> list[str]:
    if not live:
        return live
    leader = min(table[name].median for name in live)
    return [
        name
        for name in live
        if (best := min(table[name].seconds)) <= leader * rules.drop
        or (len(table[name].seconds) < rules.drop_after and best <= leader * rules.drop * 10)
    ]
