"""When a challenger's times, each over the incumbent's around it, say who is faster; may be asked after every pair.

The ratios' median is bounded by order statistics, as in ``race``, which supposes nothing about how times are
distributed.
"""

import statistics
from collections.abc import Sequence
from typing import Literal

from convdispatch.tuning import race

#: A challenger must be faster by this much: a change has to be worth it, and a tie keeps the incumbent.
MARGIN = 0.01
#: Part of the intervals that hold the median. Nearly all, since the question is asked again after every pair.
_SURE = 0.996
MOST_PAIRS = 41
#: Nobody whose best of three is this much slower will win.
_HOPELESS, _FEW = 1.25, 3

Verdict = Literal["better", "worse"]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return between what the median of what these are drawn from lies; None where they are too few to tell."""
    return race.interval(values, _SURE)


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
