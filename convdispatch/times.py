"""What times say: how far they spread, their ratios, and between which values their median lies.

A time of 0 is one too short for the clock: whatever takes any time takes infinitely longer, and nothing spreads.
"""

import functools
import math
import statistics
from collections.abc import Sequence

#: Part of the intervals that hold the true median, of those that are reported.
REPORTED = 0.95


def ratio(above: float, below: float) -> float:
    """Return how many times as long as another one a time is; 1 where both are 0."""
    if above == below:
        return 1.0
    return above / below if below else math.inf


def paired_ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratios of times that were taken side by side, as long as both have some."""
    return [ratio(a, b) for a, b in zip(above, below, strict=False)]


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median ratio of times that were taken side by side."""
    return statistics.median(paired_ratios(above, below))


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range over the median; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def interval(values: Sequence[float], confidence: float = REPORTED) -> tuple[float, float] | None:
    """Return between which values the median lies with at least this confidence; None if they are too few to tell."""
    skip = outside(len(values), confidence)
    if skip is None:
        return None
    ordered = sorted(values)
    return ordered[skip], ordered[-1 - skip]


@functools.cache
def outside(count: int, confidence: float) -> int | None:
    """Return how many of the smallest, and of the largest, of so many values are outside the interval; None of too few.

    That is a quantile of the binomial distribution, which SciPy has; to import its statistics takes longer than a race.
    """
    tail, found = 0.0, None
    for skip in range((count + 1) // 2):
        tail += math.comb(count, skip) / 2**count
        if 2 * tail > 1 - confidence:
            break
        found = skip
    return found
