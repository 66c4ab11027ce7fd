"""How the candidates of an online contest stand, and the profile entry that comes of it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from convdispatch.backend import Candidate, Config
from convdispatch.errors import in_a_line
from convdispatch.profile import Entry, Failure, Key, Result
from convdispatch.tuning import pairs
from convdispatch.tuning.check import Checked
from convdispatch.tuning.race import Samples

_LONGEST_REASON = 300


@dataclass(frozen=True)
class Raced:
    """What pairs of calls on live traffic say of a candidate: times over those of the contest's first incumbent."""

    relative: float
    interval: tuple[float, float] | None
    spread: float
    rounds: int


class Standings:
    """Who was checked, who raced whom, and who is out."""

    def __init__(self, key: Key, incumbent: Candidate) -> None:
        """Begin with nothing known."""
        self.key = key
        self.incumbent = incumbent.name
        self.checked: dict[str, Checked] = {}
        self.raced: dict[str, Raced] = {}
        self.failures: list[Failure] = []

    def __len__(self) -> int:
        return len(self.checked) + len(self.failures)

    def fail(self, candidate: Candidate, reason: str) -> None:
        """Put a candidate out."""
        self.checked.pop(candidate.name, None)
        self.raced.pop(candidate.name, None)
        reason = in_a_line(reason, _LONGEST_REASON)
        self.failures.append(Failure(candidate.backend.name, candidate.backend.version, candidate.config, reason))

    def add(self, checked: Checked) -> None:
        """Add who passed its check, or was too slow for one."""
        self.checked[checked.candidate.name] = checked

    def lead(self, name: str) -> None:
        """Make the one whom all others are compared with, from the beginning."""
        self.incumbent = name
        self.raced = {name: Raced(1.0, None, 0.0, 0)}

    def add_race(self, name: str, ratios: Sequence[float], times: Sequence[float]) -> None:
        """Add a race against the incumbent: ratios of the times, pair by pair, and the times."""
        base = self.raced[self.incumbent].relative
        bounds = pairs.interval(ratios)
        self.raced[name] = Raced(
            statistics.median(ratios) * base,
            None if bounds is None else (bounds[0] * base, bounds[1] * base),
            Samples(1, list(times)).spread,
            len(ratios),
        )

    def is_hopeless(self, seconds: float, limit: float) -> bool:
        """Return whether a time of a check is more than so many times the incumbent's."""
        own = self.checked.get(self.incumbent)
        return own is not None and seconds > limit * own.seconds

    def expected(self, checked: Checked, typical: float) -> float:
        """Return the seconds that a call is expected to take, given those of the incumbent's calls."""
        own = self.checked.get(self.incumbent)
        return checked.seconds * typical / own.seconds if own is not None and own.seconds else checked.seconds

    def entry(self, typical: float, recent: Sequence[float]) -> Entry | None:
        """Return the profile entry: the incumbent first, the others by time; None if nobody was right.

        Args:
            typical: median seconds of the incumbent's calls.
            recent: its last times.
        """
        winner = self.checked.get(self.incumbent)
        if winner is None or self.incumbent not in self.raced:
            return None
        unit = typical / self.raced[self.incumbent].relative
        own = Result(
            *_identity(winner), typical, Samples(1, list(recent)).spread, len(recent), winner.error, winner.workspace,
            pairs.interval(recent),
        )  # fmt: skip
        others = []
        for name, checked in self.checked.items():
            if name == self.incumbent or checked.slow:  # too slow to be checked: not known to be right
                continue
            raced = self.raced.get(name)
            if raced is None:
                seconds, spread, rounds, bounds = self.expected(checked, typical), 0.0, 1, None
            else:
                seconds, spread, rounds = raced.relative * unit, raced.spread, max(1, raced.rounds)
                bounds = raced.interval and (raced.interval[0] * unit, raced.interval[1] * unit)
            others.append(
                Result(*_identity(checked), seconds, spread, rounds, checked.error, checked.workspace, bounds)
            )
        others.sort(key=lambda result: result.median)
        return Entry(self.key, (own, *others), tuple(self.failures), "measure", flags=("online",))


def _identity(checked: Checked) -> tuple[str, int, Config]:
    candidate = checked.candidate
    return candidate.backend.name, candidate.backend.version, candidate.config
