"""What choices cost: paired duels, and the statistics that a validation reports of them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from convdispatch.backend import Candidate
from convdispatch.profile import Key
from convdispatch.times import median_ratio, ratio
from convdispatch.tuning.clock import Clock
from convdispatch.tuning.gate import trial
from convdispatch.tuning.race import Rules, race

#: Name of the second runner of the champion, which tells how far two equals come out apart.
AGAIN = "the champion again"


@dataclass(frozen=True)
class Summary:
    """Ratios in three numbers: their mean, 95th percentile, and the worst; ``count`` of them."""

    mean: float
    p95: float
    worst: float
    count: int

    def within(self, mean: float, p95: float) -> bool:
        """Return whether mean and 95th percentile are no larger than these."""
        return self.mean <= mean and self.p95 <= p95


def summary(ratios: Sequence[float]) -> Summary | None:
    """Return the summary of ratios, None of none."""
    if not ratios:
        return None
    return Summary(statistics.fmean(ratios), float(np.percentile(ratios, 95)), max(ratios), len(ratios))


@dataclass(frozen=True)
class Duel:
    """A race to the end between the oracle's champion, what was chosen otherwise, and the champion once more.

    Attributes:
        champion: name of the candidate that others are compared with.
        ratios: each candidate's time over the champion's, the median of the rounds' ratios.
        seconds: each candidate's median.
        noise: the champion's time over its own, either way round, so at least 1.
    """

    champion: str
    ratios: Mapping[str, float]
    seconds: Mapping[str, float]
    noise: float

    def regret(self, name: str) -> float:
        """Return a candidate's time over the champion's, at least 1: who beats the champion is the best there is."""
        return max(1.0, self.ratios[name])

    def apart(self, one: str, other: str) -> float:
        """Return how many times slower the slower of two is."""
        return max(ratio(self.ratios[one], self.ratios[other]), ratio(self.ratios[other], self.ratios[one]))


def duel(key: Key, champion: Candidate, others: Sequence[Candidate], rules: Rules, clock: Clock) -> Duel:
    """Race a champion, others, and the champion again, none of them leaving early.

    Args:
        key: problem and deployment.
        champion: who is the measure.
        others: who is compared; equal ones count once.
        rules: rounds and times.
        clock: tells the time.
    """
    named = {candidate.name: candidate for candidate in (champion, *others)}
    arrays = trial(key.problem)
    runners = {name: arrays.runner(arrays.plan(candidate), key.deployment) for name, candidate in named.items()}
    runners[AGAIN] = arrays.runner(arrays.plan(champion), key.deployment)
    table = race(runners, rules, clock)
    ratios = {name: median_ratio(table[name].seconds, table[champion.name].seconds) for name in runners}
    again = ratios.pop(AGAIN)
    seconds = {name: table[name].median for name in named}
    return Duel(champion.name, ratios, seconds, max(again, ratio(1.0, again)))
