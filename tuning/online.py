"""Tuning on live traffic: now and then a call is computed, rightly, by a challenger, until the fastest is known.

For each problem there is a ``Contest``. One contest is held at a time, where the program spends most time, with one
challenger at a time, and one job at a time in the background. When a contest is over, its result goes into the profile
and its plans become plain ones. A program of ever new shapes has no more contests than ``MOST``: the one that was not
called for longest makes room.
"""

import atexit
import functools
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convdispatch import observe, profile, registry, settings, stored
from convdispatch.arguments import Array
from convdispatch.backend import Candidate
from convdispatch.errors import warn
from convdispatch.plan import Evidence, Plan
from convdispatch.profile import Key
from convdispatch.question import Question
from convdispatch.settings import Options
from convdispatch.tuning import session
from convdispatch.tuning.clock import Clock, system_clock
from convdispatch.tuning.contest import Contest, Job, Where
from convdispatch.tuning.gate import Trial
from convdispatch.tuning.packed import Packed

#: After so many calls of other problems, the one whose contest is held makes room for another.
_IDLE = 1000
_SECONDS_TO_WAIT_AT_EXIT = 5.0
#: Most contests that are not over, and most of those that are over and stay with this process.
MOST = 1000


@dataclass
class Budget:
    """Seconds that online tuning may add, earned by convolving and spent on challengers."""

    earned: float = 0.0
    spent: float = 0.0

    def affords(self, seconds: float) -> bool:
        """Return whether something may begin that is expected to take this long."""
        return self.spent + seconds <= self.earned


def _same(plan: Plan) -> Plan:
    return plan


class OnlinePlan(Plan):
    """A plan whose candidate is still being found on live traffic. Becomes a plain ``Plan`` when that is over.

    Results are right throughout; but since it is now one algorithm and now another that computes them, results of the
    same input may differ by rounding. Pickled or copied, it is the plain plan of its current candidate.
    """

    def __init__(self, contest: Contest, made: Plan, filters: Array, bias: Array | None) -> None:
        """Begin as a plan that was made by the contest's incumbent."""
        self.__dict__.update(made.__dict__)
        self._packed: Packed | None = Packed(contest, made, filters, bias)

    @property
    def evidence(self) -> Evidence:  # type: ignore[override]  # an attribute of plain plans
        """Why its candidate computes it, and how far the contest is."""
        packed = self._packed
        own: Evidence = self.__dict__["evidence"]
        return own if packed is None else packed.contest.evidence

    def __reduce_ex__(self, protocol: Any) -> Any:
        packed = self._packed
        if packed is None:  # settled by another thread a moment ago
            return super().__reduce_ex__(protocol)
        return _same, (packed.current,)

    def __call__(self, input: Any, *, out: Array | None = None, residual: Any = None) -> Array:
        """Convolve; see ``Plan``."""
        packed = self._packed
        if packed is None:
            return Plan.__call__(self, input, out=out, residual=residual)
        if observe.observer is not None and observe.is_watched():
            again = functools.partial(self, input, out=out, residual=residual)
            return observe.timed(self.problem, "plan", self.budget, again)
        if packed.pace.passes():
            return packed.current(input, out=out, residual=residual)
        result = packed.call(input, out, residual)
        _update(self, packed)
        return result


def _update(plan: OnlinePlan, packed: Packed) -> None:
    """Have a plan say who computes it; make it a plain one if that is for good."""
    contest = packed.contest
    if not contest.settled and plan.candidate is packed.current.candidate:
        return
    with contest.online.lock:
        if plan._packed is None:  # noqa: SLF001  # another thread was here before, and it is a plain one
            return
        current = packed.current
        plan.candidate = current.candidate
        if contest.settled and current.candidate.name == contest.incumbent.name:
            # Other threads may be in a call: they work on plans that do not change, and the class changes last.
            plan.__dict__.update({**current.__dict__, "evidence": contest.evidence})
            plan.__class__ = Plan  # type: ignore[assignment]  # from now on a call costs what a plain plan's does
            plan._packed = None  # noqa: SLF001


class Online:
    """All contests of a process, their budget, and the one job in the background."""

    def __init__(self, clock: Clock = system_clock, submit: Callable[[Job], None] | None = None) -> None:
        """Take a clock, and what runs a job in the background; tests pass their own."""
        self.clock = clock
        self.lock = threading.Lock()
        self.budget = Budget()
        self.contests: dict[Where, Contest] = {}
        self._over: dict[Where, Contest] = {}  # whose results no profile has
        self._put_off: weakref.WeakValueDictionary[Where, Contest] = weakref.WeakValueDictionary()  # plans have them
        self.calls = 0
        self._submit = submit or self._start
        self._current: Contest | None = None
        self._busy = self._closed = False
        self._thread: threading.Thread | None = None
        self._asked: dict[int, tuple[weakref.ref[Packed], Candidate, float]] = {}
        self._arrays: tuple[Contest, Trial] | None = None

    def contest(self, key: Key, options: Options, incumbent: Candidate, generation: int) -> Contest | None:
        """Return the contest of a problem under options, begun if need be.

        None is begun where the profile may know more by now, since what is over is never begun again; nor where too
        many that are over stay with this process.

        Args:
            key, options: what it is held for.
            incumbent: who begins.
            generation: that of the profile by which the incumbent was chosen.
        """
        where = Where(key, options, registry.generation())
        with self.lock:
            known = self.contests.get(where) or self._over.get(where)
            if known is None and (known := self._put_off.get(where)) is not None:
                self.hold(known)
            if known is None and generation == profile.generation() and len(self._over) < MOST:
                known = Contest(self, where, incumbent)
                self.hold(known)
            return known

    def hold(self, contest: Contest) -> None:
        """Go on with a contest; the one that was not called for longest makes room, if need be. Under the lock."""
        if len(self.contests) >= MOST:
            going_on = (each for each in self.contests.values() if not each.settled)
            if (idle := min(going_on, key=lambda each: each.last, default=None)) is not None:
                self._put_off[idle.where] = self.contests.pop(idle.where)
                idle.put_off = True
        contest.put_off = False
        self._put_off.pop(contest.where, None)
        self.contests[contest.where] = contest

    def ask_for(self, who: Packed, candidate: Candidate, seconds: float) -> None:
        """Have a plan's filters packed for a candidate as soon as the budget affords it; under the lock."""
        self._asked[id(who)] = weakref.ref(who), candidate, seconds

    def go_on(self) -> None:
        """Start the next job, if none is running, there is one, and the budget affords it."""
        with self.lock:
            if self._busy or self._closed:
                return
            job = self._next_job()
            self._busy = job is not None
        if job is not None:
            try:
                self._submit(functools.partial(self._work, job))
            except RuntimeError:  # there is no thread to be had: the calls go on without
                self._closed = True

    def _next_job(self) -> Job | None:
        for asker, (reference, candidate, seconds) in list(self._asked.items()):
            who = reference()
            if who is None or candidate.name in who.plans:
                del self._asked[asker]
            elif self.budget.affords(seconds):
                del self._asked[asker]
                return functools.partial(who.pack, candidate)
        held = self._current
        if held is None or held.settled or held.put_off or self.calls - held.last > _IDLE:
            open_ = [contest for contest in self.contests.values() if not contest.settled]
            self._current = held = max(open_, key=lambda c: (self.calls - c.last <= _IDLE, c.seconds), default=None)
        return None if held is None else held.next_job()

    # Jobs ------------------------------------------------------------------------------------------------------

    def _start(self, job: Job) -> None:
        thread = threading.Thread(target=job, name="convdispatch-online", daemon=True)
        thread.start()
        self._thread = thread

    def _work(self, job: Job) -> None:
        try:
            # A backend may itself convolve, which is neither to be counted nor to begin a contest.
            with observe.unwatched(), settings.options(tuning="off"):
                job()
        except Exception as error:  # noqa: BLE001  # nobody waits for this thread
            warn(f"online tuning goes on without a step that failed: {error!r}")
        finally:
            with self.lock:
                self._busy = False

    def has_arrays(self, contest: Contest) -> bool:
        """Return whether the arrays that a contest's candidates are checked with are there."""
        return self._arrays is not None and self._arrays[0] is contest

    def arrays_of(self, contest: Contest) -> Trial:
        """Return the arrays that a contest's candidates are checked with; only one contest's are kept."""
        held = self._arrays
        if held is None or held[0] is not contest:
            held = self._arrays = contest, Trial.random(contest.key.problem)
        return held[1]

    def keep(self, contest: Contest) -> None:
        """Keep the result of a contest that is over in the profile."""
        if self.has_arrays(contest):
            self._arrays = None
        session.end()
        standings, options = contest.standings, contest.options
        entry = standings.entry(contest.typical, contest.recent)
        answered = False  # by the profile, from now on
        if entry is None:
            said = "; ".join(f"{failure.name}: {failure.reason}" for failure in standings.failures)
            warn(f"online tuning of {contest.key.problem}: nobody was found right: {said}")
        elif not options.forbid and options.memory_limit is None and options.accuracy == "standard":
            # Otherwise it stays with this process: what was not allowed took no part, and may be best elsewhere.
            with settings.options(profile=options.profile):
                profile.keep(entry)
                question = Question(contest.key.problem, contest.key.deployment, options)
                answered = stored.choice(question, profile.find(contest.key)) is not None
        with self.lock:
            if self.contests.get(contest.where) is contest:
                del self.contests[contest.where]
            if not answered:
                self._over[contest.where] = contest

    # The process's ends ----------------------------------------------------------------------------------------

    def after_fork(self) -> None:
        """Go on in a forked child, without the parent's thread and without what its calls were doing."""
        self.lock = threading.Lock()
        self._busy, self._thread = False, None
        for contest in self.contests.values():
            contest.flying = False
            if contest.checking is not None and contest.waiting is not None:
                contest.waiting.insert(0, contest.checking)
                contest.checking = None

    def finish(self) -> None:
        """Begin nothing any more, and wait a moment for the job that runs."""
        self._closed = True
        if self._thread is not None:
            self._thread.join(_SECONDS_TO_WAIT_AT_EXIT)


_online = Online()
atexit.register(_online.finish)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_online.after_fork)


def contest(key: Key, incumbent: Candidate, generation: int) -> Contest | None:
    """Return this process's contest of a problem under the options in force; see ``Online.contest``."""
    return _online.contest(key, settings.current(), incumbent, generation)


def plan(contest: Contest, filters: Array, bias: Array | None) -> Plan:
    """Return a plan that takes part in a contest as it is called; a plain one if the contest is over."""
    made = Plan(contest.key.problem, contest.incumbent, filters, bias, contest.evidence, contest.key.threads)
    return made if contest.settled else OnlinePlan(contest, made, filters, bias)
