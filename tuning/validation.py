"""What a validation found: regret by way of choosing, flips between two tunes, replay, costs; and the targets."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from convdispatch.problem import Problem
from convdispatch.tuning.regret import Duel, Summary, summary

Way = Literal["bare", "calibrated", "neighbours", "tuned", "tuned again"]
#: How a candidate may come to be chosen: by the backends' own estimates; by calibrated ones; by those and the other
#: tuned problems; by tuning; by tuning once more, from nothing.
WAYS: tuple[Way, ...] = ("bare", "calibrated", "neighbours", "tuned", "tuned again")
#: What is to be reached: mean and 95th percentile of regret.
TARGETS: Mapping[Way, tuple[float, float]] = {
    "neighbours": (1.10, 1.35), "tuned": (1.01, 1.03), "tuned again": (1.01, 1.03),
}  # fmt: skip
#: Part of the keys that may have another winner in another tune, and by how much slower that may be.
FLIPS, APART = 0.02, 1.01
#: A champion that comes out so far from itself was measured on a machine that had something else to do.
NOISY = 1.05


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        problem: the problem.
        duel: the champion against everything that was chosen.
        chosen: the candidate's name by way.
        replayed: whether the stored winner was what a fresh start chose from the profile.
        drift: the winner's time in the duel over the time that tuning stored.
        conditions: what says that the machine was busy meanwhile; empty if nothing does.
    """

    problem: Problem
    duel: Duel
    chosen: Mapping[Way, str]
    replayed: bool
    drift: float
    conditions: str = ""

    def regret(self, way: Way) -> float:
        """Return the time of what was chosen over the best, at least 1."""
        return self.duel.regret(self.chosen[way])

    @property
    def flipped(self) -> bool:
        """Whether the two tunes chose differently."""
        return self.chosen["tuned"] != self.chosen["tuned again"]

    @property
    def apart(self) -> float:
        """How many times slower the slower of the two tunes' winners is."""
        return self.duel.apart(self.chosen["tuned"], self.chosen["tuned again"])


@dataclass(frozen=True)
class Cost:
    """Seconds that something took, and how many of them went into compiling kernels that were not on disk."""

    seconds: float
    compiling: float


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    Attributes:
        cases: one a problem.
        failed: problems that could not be tried, with the reason.
        tunes: what the two tunes cost, the first one first.
        calibrating: what measuring a calibration cost; None where the profile had one.
        workload: name of the workload that problems were from, if there was one.
        seed, effort, deployment, threads, machine: what was validated, and where.
        seconds: how long all of it took.
    """

    cases: tuple[Case, ...]
    failed: Mapping[str, str]
    tunes: tuple[Cost, Cost]
    calibrating: Cost | None
    workload: str | None
    seed: int
    effort: str
    deployment: str
    threads: int
    machine: str
    seconds: float

    def regret(self, way: Way) -> Summary | None:
        """Return the regret of a way to choose, over all problems."""
        return summary([case.regret(way) for case in self.cases])

    @property
    def noise(self) -> Summary | None:
        """The champions against themselves: what regret cannot be told from 1."""
        return summary([case.duel.noise for case in self.cases])

    @property
    def flipped(self) -> int:
        """For how many problems the two tunes chose differently."""
        return sum(case.flipped for case in self.cases)

    @property
    def flips(self) -> float:
        """Part of the problems for which the two tunes chose differently."""
        return self.flipped / len(self.cases) if self.cases else 0.0

    @property
    def apart(self) -> float:
        """How many times slower the slower winner was where the two tunes differed, the worst of them; else 1."""
        return max((case.apart for case in self.cases if case.flipped), default=1.0)

    @property
    def agrees(self) -> bool:
        """Whether the two tunes are as alike as they should be."""
        return self.flips <= FLIPS and self.apart <= APART

    @property
    def reached(self) -> bool:
        """Whether all targets are reached, and every problem could be tried."""
        within = [(found := self.regret(way)) is not None and found.within(*most) for way, most in TARGETS.items()]
        return all(within) and self.agrees and self.replayed == len(self.cases) and not self.failed

    @property
    def replayed(self) -> int:
        """For how many problems a fresh start chose the stored winner."""
        return sum(case.replayed for case in self.cases)

    @property
    def drift(self) -> Summary | None:
        """Winners' times now over those stored, whichever is larger over the other."""
        return summary([max(case.drift, 1 / case.drift) for case in self.cases])

    @property
    def median_drift(self) -> float:
        """The median of winners' times now over those stored."""
        return statistics.median(case.drift for case in self.cases) if self.cases else 1.0

    @property
    def in_quiet(self) -> "Validation":
        """The same without the doubtful cases."""
        doubtful = set(map(id, self.doubtful))
        return replace(self, cases=tuple(case for case in self.cases if id(case) not in doubtful))

    @property
    def doubtful(self) -> tuple[Case, ...]:
        """Cases measured while the machine seems to have been busy."""
        return tuple(case for case in self.cases if case.conditions or case.duel.noise > NOISY)
