"""Times candidates in interleaved rounds, until it is decided who is fastest.

In each round every candidate gives one sample, in shuffled order; two candidates are compared by the ratios of their
samples of the same round, so that what slows the machine for a while slows both. Each is compared with the leader by a
confidence interval of the median ratio. Who is slower for certain leaves; the race is over when nobody is left whom
more rounds could tell from the leader, since the rest are slower or equal within the margin.

The interval is that of order statistics (the inverted sign test): it supposes nothing of how times are distributed,
so outliers and times of two modes do no harm. Looking after every round errs more often than looking once, and a
runner that left cannot come back; hence intervals of 99.5 % for decisions, where 95 % would do for one look.

Buffers are kept warm: before each sample a call outside the clock brings back to the caches what the other candidates
drove out of them, as where a layer is called again and again. Calls too short for the clock are timed in batches.
"""

import functools
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from convdispatch.backend import Effort
from convdispatch.errors import ArgumentError
from convdispatch.times import REPORTED, interval, median_ratio, outside, paired_ratios, spread
from convdispatch.tuning.clock import Clock

Run = Callable[[], object]


@dataclass(frozen=True)
class Rules:
    """How a race is run.

    Attributes:
        rounds: most samples of a candidate.
        sample_seconds: a sample repeats the call until it takes about this long.
        race_seconds: no round starts after this much time.
        drop: a candidate whose best time, warming up included, is this many times the leader's median leaves...
        drop_after: ...once it has this many samples (one is enough for ten times that).
        margin: candidates this close in time are equal.
    """

    rounds: int
    sample_seconds: float
    race_seconds: float
    drop: float = 1.5
    drop_after: int = 3
    margin: float = 0.01


#: Seconds of a first call from which on a second would tell nothing new.
_SLOW = 0.02
_MOST_REPEATS = 1000
#: Who is this many times slower than who may be dropped leaves without more samples.
_AT_ONCE = 10
#: Part of the intervals that hold the true median, of those that decide.
DECIDED = 0.995

RULES = {
    "measure": Rules(rounds=61, sample_seconds=0.002, race_seconds=1.0),
    "patient": Rules(rounds=121, sample_seconds=0.005, race_seconds=8.0, drop_after=5),
    "exhaustive": Rules(rounds=241, sample_seconds=0.01, race_seconds=60.0, drop=3.0, drop_after=9),
}


def checked_effort(effort: str) -> Effort:
    """Return the effort, an ``ArgumentError`` where there is none of this name."""
    if effort not in RULES:
        raise ArgumentError(f"effort must be one of {', '.join(RULES)}; got {effort!r}")
    return cast("Effort", effort)


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
        return spread(self.seconds)


@dataclass(frozen=True)
class Standing:
    """A candidate's time over the leader's: the median of the rounds' ratios, and the ends of its interval."""

    low: float
    median: float
    high: float

    def slower(self, margin: float) -> bool:
        """Return whether it is for certain slower by the margin."""
        return self.low > 1 + margin

    def equal(self, margin: float) -> bool:
        """Return whether it is for certain no more than the margin slower."""
        return self.high <= 1 + margin


# Standings ----------------------------------------------------------------------------------------------------------


def leader(table: Mapping[str, Samples], among: Iterable[str] | None = None) -> str | None:
    """Return who is fastest of those who ran to the end; round by round, since a drift can deceive plain medians."""
    most = max((len(samples.seconds) for samples in table.values()), default=0)
    names = [name for name in (table if among is None else among) if len(table[name].seconds) == most]
    if not names:
        return None
    first = min(names, key=lambda name: table[name].median)
    return min(names, key=lambda name: (median_ratio(table[name].seconds, table[first].seconds), name != first))


def standings(table: Mapping[str, Samples], among: Iterable[str] | None = None) -> dict[str, Standing]:
    """Return everybody's standing against the leader; rounds too few for an interval must all agree."""
    first = leader(table, among)
    found = {}
    for name in table if among is None else among:
        assert first is not None  # noqa: S101  # where there is anybody, somebody leads
        ratios = paired_ratios(table[name].seconds, table[first].seconds)
        low, high = interval(ratios, DECIDED) or (min(ratios), max(ratios))
        found[name] = Standing(low, statistics.median(ratios), high)
    return found


def comparable_seconds(table: Mapping[str, Samples]) -> dict[str, float]:
    """Return the seconds of a call by name, as if all had run in the same rounds at the same moments.

    The leader is the measure: its median, times the median of the others' ratios to it, round by round. A plain
    median would not do: where the machine becomes slower halfway, it is a matter of luck on which side of the change
    each runner's median falls, and who left before has only the fast half.
    Nobody who left is said to be faster than was ever measured.
    """
    first = leader(table)
    if first is None or not all(table[first].seconds):  # too fast for the clock
        return {name: samples.median for name, samples in table.items()}
    measure = table[first]
    found = {}
    for name, samples in table.items():
        found[name] = measure.median * median_ratio(samples.seconds, measure.seconds)
        if len(samples.seconds) < len(measure.seconds):  # of few rounds, the measure's own may have been bad
            found[name] = max(found[name], min(samples.seconds))
    return found


def comparable_intervals(table: Mapping[str, Samples]) -> dict[str, tuple[float, float] | None]:
    """Return the 95 % intervals of ``comparable_seconds``; None from fewer than six rounds.

    Those of the others are of their ratios to the leader, times the leader's median: they say how well one is told
    from the other. The leader's own is of its seconds.
    """
    first = leader(table)
    if first is None or not all(table[first].seconds):
        return {name: interval(samples.seconds) for name, samples in table.items()}
    measure = table[first]
    scaled = {
        name: [ratio * measure.median for ratio in paired_ratios(samples.seconds, measure.seconds)]
        for name, samples in table.items()
    }
    return {name: interval(measure.seconds if name == first else values) for name, values in scaled.items()}


# The race -----------------------------------------------------------------------------------------------------------


def race(
    runners: Mapping[str, Run],
    rules: Rules,
    clock: Clock,
    *,
    seed: int = 0,
    called: bool = False,
    on_failure: Callable[[str, Exception], None] | None = None,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Samples]:
    """Time every runner; the first call of each is a warm-up outside the clock's samples.

    Args:
        runners: what to call, by name.
        rules: how many rounds, how long.
        clock: tells the time.
        seed: decides the order within the rounds.
        called: whether all have been called before, so that none compiles or the like in its first call here. Who is
            hopeless in that one leaves at once, and it is the only sample.
        on_failure: told of a runner that raised; it leaves the race. Without, the error is raised.
        on_round: called before each round, between the samples.

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
    if called:
        live = _without_hopeless(table, rules)
    for number in range(1, rules.rounds + 1):
        if on_round is not None:
            on_round()
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
        if not live or (clock() - start > rules.race_seconds and number >= min(3, rules.rounds)):
            break
        if number >= rules.drop_after and _decided(live, table, rules):
            break
    return table


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


def _without_hopeless(table: Mapping[str, Samples], rules: Rules) -> list[str]:
    """Return who is not hopeless by its first call alone; that call is the sample of who is."""
    best = min((samples.first for samples in table.values()), default=0.0)
    live = []
    for name, samples in table.items():
        if samples.first > _SLOW and _hopeless(samples, best, rules):
            samples.seconds.append(samples.first)
        else:
            live.append(name)
    return live


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
    """Return who goes on: not who is hopeless, nor who is slower for certain."""
    if not live:
        return live
    best = min(table[name].median for name in live)
    near = [name for name in live if not _hopeless(table[name], best, rules)]
    if outside(len(table[near[0]].seconds), DECIDED) is None:
        return near
    return [name for name, standing in standings(table, near).items() if not standing.slower(rules.margin)]


def _hopeless(samples: Samples, best: float, rules: Rules) -> bool:
    own = min((samples.first, *samples.seconds))
    return own > best * rules.drop * (1 if len(samples.seconds) >= rules.drop_after else _AT_ONCE)


def _decided(live: Sequence[str], table: Mapping[str, Samples], rules: Rules) -> bool:
    """Return whether more rounds would change nothing: all who are left are equal, and the leader's time is known."""
    rounds = len(table[live[0]].seconds)
    if outside(rounds, REPORTED if len(live) == 1 else DECIDED) is None:
        return False
    return all(standing.equal(rules.margin) for standing in standings(table, live).values())
