"""One problem's contest on live traffic: the incumbent computes the calls, and one challenger at a time some of them.

A challenger is first made ready and checked against the reference in the background. Then it computes a call between
two of the incumbent's, again and again, until ``pairs.verdict`` knows who is faster. Whatever that costs above what the
incumbent alone would have taken comes out of a budget, a share of convolution time so far: nothing begins that is not
expected to fit, and what took longer than expected is made up for before the next. Compiling is not in it: it is done
once, in the background, and holds up no call.
"""

import collections
import functools
import statistics
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from convdispatch import heuristic, settings
from convdispatch.arguments import Array
from convdispatch.backend import Candidate
from convdispatch.plan import Evidence, Plan
from convdispatch.profile import Key
from convdispatch.settings import Options
from convdispatch.tuning import hard_inputs, isolation
from convdispatch.tuning.check import Checked, check
from convdispatch.tuning.pace import Pace
from convdispatch.tuning.pairs import Pairing, verdict
from convdispatch.tuning.standings import Standings
from convdispatch.units import time_text

if TYPE_CHECKING:
    from convdispatch.tuning.online import Online
    from convdispatch.tuning.packed import Packed

Job = Callable[[], None]
#: Calls of the incumbent before anybody challenges it.
_FIRST_CALLS = 3
#: A challenger this many times slower than the incumbent when checked is not tried on live traffic.
_HOPELESS = 2.0
#: After so many calls of other plans, the plan whose calls are compared makes room for one that is called.
_IDLE = 200
#: Seconds that looking after a counted call takes, and the most calls that are passed over to make up for it.
_BOOKKEEPING, _LONGEST_PAUSE = 10e-6, 1000
#: What the reference does in a second, at least.
_REFERENCE_FLOPS = 1e9


class Where(NamedTuple):
    """What a contest is held for; ``generation`` is that of the backends, all of which may take part."""

    key: Key
    options: Options
    generation: int


class Contest:
    """Who is fastest for one problem, as far as it is known. What changes is guarded by ``online.lock``."""

    def __init__(self, online: "Online", where: Where, incumbent: Candidate) -> None:
        """Begin with the candidate that is estimated best."""
        self.online, self.where = online, where
        self.key, self.options = where.key, where.options
        self.incumbent = incumbent
        self.standings = Standings(self.key, incumbent)
        self.trusted = False  # whether the incumbent has passed its check
        self.wrong: set[str] = set()  # who raised, was wrong, or is less accurate than is allowed
        self.settled = False
        self.put_off = False  # whether it made room for others
        self.waiting: list[tuple[Candidate, float | None]] | None = None  # to be checked, with estimates; None: unknown
        self.checking: tuple[Candidate, float | None] | None = None
        self.challenger: Checked | None = None
        self.pace = Pace()  # of calls that pack their filters; a plan has its own
        self.typical = 0.0  # median seconds of the incumbent's last calls
        self.seconds = 0.0  # of all calls
        self.last = 0  # number of its last call among those of all contests
        self.recent: collections.deque[float] = collections.deque(maxlen=101)  # the incumbent's times
        self.flying = False  # whether the challenger computes a call now
        self._host: weakref.ref[Packed] | None = None  # whose calls are compared
        self._host_idle = 0
        self._pairing = Pairing()

    @property
    def evidence(self) -> Evidence:
        """Why the incumbent is it."""
        known = len(self.standings)
        if self.settled:
            return Evidence("online", f"best of {known} on live traffic, {time_text(self.typical)}")
        more = "" if self.waiting is None else f", {len(self.waiting) + (self.challenger is not None)} to come"
        return Evidence("online", f"ahead so far on live traffic, {known} looked at{more}")

    @property
    def _hosting(self) -> "Packed | None":
        return self._host() if self._host is not None else None

    # On live traffic -------------------------------------------------------------------------------------------

    def call(self, filters: Array, bias: Array | None, input: Array, *, out: Array | None, residual: Any) -> Array:
        """Convolve once, packing the filters."""

        def run(candidate: Candidate) -> Array:
            return Plan(self.key.problem, candidate, filters, bias)(input, out=out, residual=residual)

        incumbent = self.incumbent
        if self.settled or self.pace.passes():
            return run(incumbent)
        return self.run(None, lambda: run(incumbent), run)

    def run(self, who: "Packed | None", by_incumbent: Callable[[], Array], by: Callable[[Candidate], Array]) -> Array:
        """Compute a call by the incumbent or, if it is time for that, by the challenger.

        Args:
            who: the plan that is called; None where filters are packed in every call.
            by_incumbent: computes the call as the plan does without a contest.
            by: computes it by the challenger.
        """
        clock, online = self.online.clock, self.online
        with online.lock:
            challenger = self.challenger if self._may_challenge(who) else None
            self.flying = self.flying or challenger is not None
        if challenger is None:
            before = clock()
            result = by_incumbent()
            seconds = clock() - before
            with online.lock:
                self._count(who, seconds)
        else:
            try:
                result, seconds, error = self._challenge(challenger, by_incumbent, by)
            finally:
                with online.lock:
                    self.flying = False
            with online.lock:
                self._count_challenge(challenger, seconds, error)
        online.go_on()
        return result

    def _challenge(
        self, challenger: Checked, by_incumbent: Callable[[], Array], by: Callable[[Candidate], Array]
    ) -> tuple[Array, float, Exception | None]:
        clock = self.online.clock
        before = clock()
        try:
            result = by(challenger.candidate)
        except Exception as error:  # noqa: BLE001  # the incumbent computes what the challenger could not
            wasted = clock() - before
            return by_incumbent(), wasted, error  # raises itself if the mistake was the caller's
        return result, clock() - before, None

    def _may_challenge(self, who: "Packed | None") -> bool:
        """Return whether the challenger is to compute the call that begins now."""
        challenger = self.challenger
        if challenger is None or self.flying or not self._pairing.is_open:
            return False
        if len(self.recent) < _FIRST_CALLS:
            return False
        if who is not None and (self._hosting is not who or challenger.candidate.name not in who.plans):
            return False
        times, typical = self._pairing.times, self.typical
        expected = statistics.median(times) if times else self.standings.expected(challenger, typical)
        return self.online.budget.affords(max(0.0, expected - typical))

    def _count(self, who: "Packed | None", seconds: float) -> None:
        """Count a call that the incumbent computed, and those before it that were passed over."""
        pace = self.pace if who is None else who.pace
        self._earn(seconds * (1 + pace.passed))
        pace.passed = 0
        if self.settled:
            return
        if who is not None and not self._is_compared(who):
            pace.pause = self._pause()
            return
        self.recent.append(seconds)
        if len(self.recent) < 16 or self.online.calls % 8 == 0:
            self.typical = statistics.median(self.recent)
        paired = self._pairing.add(seconds)
        if paired:
            self._judge()
        if (paired or not self._may_challenge(who)) and (pause := self._pause()):
            pace.pause = pause
            self._pairing.interrupt()  # the next pair begins with a call just before it

    def _pause(self) -> int:
        """Return how many calls to pass over, so that three counted ones cost half of what is earned with all."""
        allowed = self.options.online_budget * self.typical / 2
        if not self.recent:
            return 0
        return min(_LONGEST_PAUSE, max(0, int(3 * _BOOKKEEPING / allowed) - 3)) if allowed else _LONGEST_PAUSE

    def _is_compared(self, who: "Packed") -> bool:
        """Return whether this plan's calls are compared; if nobody's are, from now on this one's."""
        if self._hosting is who:
            self._host_idle = 0
            return who.current.candidate.name == self.incumbent.name
        self._host_idle += 1
        free = self._hosting is None or self._host_idle > _IDLE
        if not free or who.current.candidate.name != self.incumbent.name:
            return False
        self._host, self._host_idle = weakref.ref(who), 0
        self._pairing.interrupt()
        return True

    def _count_challenge(self, challenger: Checked, seconds: float, error: Exception | None) -> None:
        extra = max(0.0, seconds - self.typical) if error is None else seconds
        self._earn(seconds - extra)
        self.online.budget.spent += extra
        if self.challenger is not challenger:
            return
        if error is not None:
            self.put_out(challenger.candidate, error)
        else:
            self._pairing.challenge(seconds)

    def _earn(self, seconds: float) -> None:
        self.seconds += seconds
        self.online.budget.earned += seconds * self.options.online_budget
        self.online.budget.spent += _BOOKKEEPING
        self.online.calls += 1
        self.last = self.online.calls
        if self.put_off:
            self.online.hold(self)

    def _judge(self) -> None:
        """Decide between challenger and incumbent, if the pairs so far allow it."""
        challenger, pairing = self.challenger, self._pairing
        said = verdict(pairing.ratios)
        if challenger is None or said is None:
            return
        self.standings.add_race(challenger.candidate.name, pairing.ratios, pairing.times)
        if said == "better":
            self._take_over(challenger.candidate)
        self._next()

    def _take_over(self, candidate: Candidate) -> None:
        self.incumbent, self.trusted = candidate, True
        self.standings.incumbent = candidate.name
        self.recent.clear()
        times = self._pairing.times
        self.recent.extend(times)
        self.typical = statistics.median(times) if times else self.typical
        if (host := self._hosting) is not None:
            host.follow()

    def _next(self) -> None:
        self.challenger = None
        self._pairing = Pairing()
        if (host := self._hosting) is not None:
            host.forget_others()

    def put_out(self, candidate: Candidate, error: BaseException) -> None:
        """Put out a candidate that raised."""
        self.wrong.add(candidate.name)
        self.standings.fail(candidate, f"{type(error).__name__}: {error}")
        if self.challenger is not None and self.challenger.candidate.name == candidate.name:
            self._next()

    # In the background -----------------------------------------------------------------------------------------

    def next_job(self) -> Job | None:
        """Return what is to be done next, if the budget affords it."""
        if len(self.recent) < _FIRST_CALLS:
            return None
        if self.challenger is not None:
            return self._packing_of(self.challenger)
        if self.waiting is None:
            return self._list
        if self.waiting:
            # An incumbent that was found wrong is to go, whatever it costs.
            urgent = self.incumbent.name in self.wrong
            if not urgent and not self.online.budget.affords(self._cost_of_check(*self.waiting[0])):
                return None
            self.checking = self.waiting.pop(0)
            return functools.partial(self._check, self.checking[0])
        self.settled = True
        return functools.partial(self.online.keep, self)

    def _packing_of(self, challenger: Checked) -> Job | None:
        """Return the packing of the host's filters for a challenger, if there is need and the budget affords it."""
        host, candidate = self._hosting, challenger.candidate
        if host is None or candidate.name in host.plans or not self.online.budget.affords(challenger.packing):
            return None
        return functools.partial(host.pack, candidate)

    def _list(self) -> None:
        """List who is to be checked: the incumbent first, then who is worth trying and allowed, by estimate."""
        problem, options = self.key.problem, self.options
        usable, _ = heuristic.usable(problem, options)
        ranked = heuristic.rank(problem, usable.values(), self.key.threads, "measure")
        estimates = {estimate.candidate.name: estimate.seconds for estimate in ranked}
        found: list[tuple[Candidate, float | None]] = [(self.incumbent, None)]
        for candidate in heuristic.worth_measuring(ranked, "measure")[0]:
            try:
                fits = heuristic.fits_memory(candidate.workspace(problem), options)
            except Exception as error:  # noqa: BLE001  # somebody's backend is no reason to stop
                with self.online.lock:
                    self.put_out(candidate, error)
                continue
            if fits and candidate.name != self.incumbent.name:
                found.append((candidate, estimates[candidate.name]))
        with self.online.lock:
            self.waiting = found

    def _cost_of_check(self, candidate: Candidate, estimate: float | None) -> float:
        """Return what a check is expected to cost.

        These are two calls with packing, those on hard inputs by one thread, and the reference where it is not known.
        """
        typical, problem = self.typical, self.key.problem
        if candidate.name == self.incumbent.name:
            expected = typical
        else:
            expected = _HOPELESS * typical if estimate is None else estimate
        hard = hard_inputs.flops(problem)
        calls = 2 + candidate.config.threads * hard / problem.flops
        compared = problem.flops * min(2, problem.n) / problem.n + hard
        return calls * expected + (0.0 if self.online.has_arrays(self) else compared / _REFERENCE_FLOPS)

    def _check(self, candidate: Candidate) -> None:
        """Make a candidate ready, time it, and compare it with the reference."""
        online, options = self.online, self.options
        with settings.options(isolation=options.isolation, profile=options.profile):  # not all code may run here
            fit, refused = isolation.admitted(self.key.problem, [candidate])
        if not fit:
            with online.lock:
                self.checking = None
                self.wrong.add(candidate.name)
                self.standings.fail(candidate, refused[0].reason if refused else "quarantined")
            return
        before = online.clock()
        arrays = online.arrays_of(self)
        cost = online.clock() - before
        try:
            called = self.key.deployment == "call"
            checked, own = check(candidate, arrays, online.clock, self._is_hopeless, called=called)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a backend raises
            with online.lock:
                online.budget.spent += cost
                self.checking = None
                self.put_out(candidate, error)
            return
        with online.lock:
            online.budget.spent += cost + own
            self.checking = None
            self._enter(checked)

    def _is_hopeless(self, seconds: float) -> bool:
        return self.standings.is_hopeless(seconds, _HOPELESS)

    def _enter(self, checked: Checked) -> None:
        """Let a checked candidate challenge the incumbent, if it was right and may."""
        candidate, problem = checked.candidate, self.key.problem
        if checked.reason is not None:
            self.wrong.add(candidate.name)
            self.standings.fail(candidate, f"wrong result: {checked.reason}")
            return
        self.standings.add(checked)
        if checked.slow:
            return
        if not heuristic.accurate_by_measure(candidate.backend, problem, checked.error, self.options):
            self.wrong.add(candidate.name)
            return
        if candidate.name == self.incumbent.name:
            self.standings.lead(candidate.name)
            self.trusted = True
        elif self.trusted:
            self.challenger = checked
        else:  # who is right takes the place of one who is not
            self.standings.lead(candidate.name)
            self._next()
            self._take_over(candidate)
