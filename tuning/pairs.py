"""When a challenger's times, each over one of the incumbent's beside it, say who is faster; asked after every pair.

The ratios' median is bounded by order statistics, as in ``race``, which supposes nothing about how times are
distributed.
"""

import statistics
from collections.abc import Sequence
from typing import Literal

from convdispatch import times

#: A challenger must be faster by this much: a change has to be worth it, and a tie keeps the incumbent.
MARGIN = 0.01
#: Part of the intervals that hold the median. Nearly all, since the question is asked again after every pair.
_SURE = 0.996
MOST_PAIRS = 41
#: Nobody whose best of three is this much slower will win.
_HOPELESS, _FEW = 1.25, 3

Verdict = Literal["better", "worse"]


class Pairing:
    """A challenger's calls, each between two of the incumbent's, and the ratios of their times.

    A time is taken over the one before and over the one after in turns: where the machine becomes slower bit by bit,
    the one is too short and the other too long. The mean of both would not do. Noise only ever makes calls slower, a
    mean of two has it more often than one time has, and so the challenger would seem to be the faster of two equals.

    Attributes:
        times: of all of the challenger's calls.
        ratios: of those that are between two calls of the incumbent.
    """

    def __init__(self) -> None:
        """Begin with no call."""
        self.times: list[float] = []
        self.ratios: list[float] = []
        self._before: float | None = None  # the incumbent's last time
        self._between: float | None = None  # the challenger's after that

    @property
    def is_open(self) -> bool:
        """Whether the incumbent has just computed a call, and the next one may be the challenger's."""
        return self._before is not None and self._between is None

    def challenge(self, seconds: float) -> None:
        """Add a call of the challenger."""
        self.times.append(seconds)
        self._between = seconds

    def add(self, seconds: float) -> bool:
        """Add a call of the incumbent; return whether that makes a pair."""
        before, between = self._before, self._between
        self._before, self._between = seconds, None
        if before is None or between is None:
            return False
        beside = seconds if len(self.ratios) % 2 else before
        self.ratios.append(between / beside if beside else 1.0)
        return True

    def interrupt(self) -> None:
        """Forget the last calls, since those that come now do not follow on them."""
        self._before = self._between = None


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return a confidence interval of the population's median; None where they are too few to tell."""
    return times.interval(values, _SURE)


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
