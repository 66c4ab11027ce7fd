"""When a challenger's times, each over the incumbent's around it, say who is faster; may be asked after every pair.

The ratios' median is bounded by order statistics, which supposes nothing about how times are distributed: of ``n``
ratios, the ``k``-th smallest and the ``k``-th largest enclose it but for a chance that the binomial distribution tells.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import Literal

#: A challenger must be faster by this much: a change has to be worth it, and a tie keeps the incumbent.
MARGIN = 0.01
#: Chance of an interval without the median. Small, since the question is asked again after every pair.
_RISK = 0.004
MOST_PAIRS = 41
#: Nobody whose best of three is this much slower will win.
_HOPELESS, _FEW = 1.25, 3

Verdict = Literal["better", "worse"]


@functools.cache
def _outside(count: int) -> int:
    """Return how many of so many values may be left out at each end; -1 if the ends themselves bound nothing."""
    chance, left_out = 0.0, -1
    while 2 * (chance := chance + math.comb(count, left_out + 1) / 2**count) <= _RISK:
        left_out += 1
    return left_out


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return between what the median of what these are drawn from lies; None where they are too few to tell."""
    end = _outside(len(values))
    if end < 0:
        return None
    ordered = sorted(values)
    return ordered[end], ordered[-1 - end]


def verdict(ratios: Sequence[float]) -> Verdict | None:
    """Return whether the challenger is better by the margin; None where more pairs must tell."""
    if len(ratios) >= _FEW and min(ratios) > _HOPELESS:
        return "worse"
    if (bounds := interval(ratios)) is not None:
        if bounds[1] < 1 and statistics.median(ratios) <= 1 - MARGIN:
            return "better"
        if bounds[0] > 1 - MARGIN:
            return "worse"
    return "worse" if len(ratios) >= MOST_PAIRS else None
