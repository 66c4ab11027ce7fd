"""A plan's filters while its contest is held: packed for the incumbent, and for the challenger that is compared."""

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Candidate
from convdispatch.plan import Plan
from convdispatch.tuning.pace import Pace

if TYPE_CHECKING:
    from convdispatch.tuning.contest import Contest


class Packed:
    """A plan's filters, packed for the incumbent and, while they are compared, for the challenger."""

    def __init__(self, contest: "Contest", made: Plan, filters: Array, bias: Array | None) -> None:
        """Begin with a plan that was made by the contest's incumbent."""
        self.contest = contest
        self.current = made
        self.plans = {made.candidate.name: made}
        self._filters = np.array(filters)
        self._bias = None if bias is None else np.array(bias)
        self.pace = Pace()
        self._refused: set[str] = set()

    def call(self, input: Any, out: Array | None, residual: Any) -> Array:
        """Compute a call of the plan."""
        contest = self.contest
        with contest.online.lock:
            self.follow()
            current = self.current
        return contest.run(
            self,
            functools.partial(current, input, out=out, residual=residual),
            lambda candidate: self.plans[candidate.name](input, out=out, residual=residual),
        )

    def follow(self) -> None:
        """Go over to the contest's incumbent, or ask for the filters to be packed for it."""
        contest = self.contest
        name = contest.incumbent.name
        if self.current.candidate.name == name:
            return
        if name in self.plans:
            self.current = self.plans[name]
        elif name not in self._refused:
            checked, urgent = contest.standings.checked.get(name), self.current.candidate.name in contest.wrong
            cost = -math.inf if urgent or checked is None else checked.packing
            contest.online.ask_for(self, contest.incumbent, cost)

    def forget_others(self) -> None:
        """Keep what is packed for the incumbent alone."""
        self.plans = {self.current.candidate.name: self.current}

    def pack(self, candidate: Candidate) -> None:
        """Pack the filters for another candidate; in the background."""
        contest, online = self.contest, self.contest.online
        before = online.clock()
        try:
            plan = Plan(
                contest.key.problem, candidate, self._filters, self._bias, contest.evidence, contest.key.threads
            )
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a backend raises
            with online.lock:
                self._refused.add(candidate.name)
                contest.put_out(candidate, error)
            return
        with online.lock:
            online.budget.spent += online.clock() - before
            self.plans = {**self.plans, candidate.name: plan}
