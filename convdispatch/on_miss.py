"""Measures on a miss, where that is wished: just the problem that is asked of, one at a time."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from convdispatch import profile, registry, stored
from convdispatch.backend import Effort
from convdispatch.errors import BackendError, ProfileWarning, warn
from convdispatch.locks import module_lock
from convdispatch.plan import Evidence
from convdispatch.profile import Key
from convdispatch.question import Decision, Question

#: Seconds to wait for another thread that measures the same: a backend that does so of itself is not to hang.
_LONGEST_WAIT, _BETWEEN_LOOKS = 60.0, 0.005
#: What this process has measured on a miss: if others disturbed that, it waits for another process, or for ``tune``.
_measured: set[Key] = set()


class _Turns:
    """Who measures on a miss: one thread at a time, and whoever misses the same key waits for it.

    Whoever misses another key meanwhile takes the estimate, and measures at a later call. It may be a thread of the
    very backend that is being measured, for which to wait would be for ever.
    """

    def __init__(self) -> None:
        self._change, self._turn = module_lock(), module_lock()
        self._key: Key | None = None

    @contextlib.contextmanager
    def of(self, key: Key) -> Iterator[bool]:
        """Yield whether the block may measure, which is then alone to do so; if another did, it has ended."""
        with self._change:
            mine = self._turn.acquire(blocking=False)
            if mine:
                self._key = key
        if not mine:
            self._wait_while(key)
        try:
            yield mine
        finally:
            if mine:
                with self._change:
                    self._key = None
                    self._turn.release()

    def _wait_while(self, key: Key) -> None:
        """Wait as long as just this is being measured."""
        end = time.monotonic() + _LONGEST_WAIT
        while self._key == key and time.monotonic() < end:
            time.sleep(_BETWEEN_LOOKS)


_turns = _Turns()


def decide(question: Question) -> Decision | None:
    """Return what is known of just this problem, measured now if need be; once more if others disturbed it then."""
    answers = profile.find(question.key)
    chosen = stored.choice(question, answers, exact=True)
    if chosen is not None and stored.outdated(question, chosen):
        chosen = None  # to be measured anew; or estimated, where nothing may be
    known = next((found.entry for found in answers if found.exact), None)
    if known is not None and known.is_busy and question.key not in _measured:
        return _tuned(question) or chosen
    return chosen or _tuned(question)


def _tuned(question: Question) -> Decision | None:
    problem, options, key = question.problem, question.options, question.key
    if problem.is_trivial or options.effort == "estimate":
        return None
    from convdispatch.tuning import problem_race  # noqa: PLC0415  # needed only where something is measured
    from convdispatch.tuning.rematch import suffices  # noqa: PLC0415
    from convdispatch.tuning.session import session  # noqa: PLC0415

    effort = cast("Effort", options.effort)
    everyone = registry.available()
    with _turns.of(key) as mine:
        known = profile.find(key)
        settled = (found.entry for found in known if found.exact and not found.entry.is_busy)
        if any(suffices(entry, effort, everyone) for entry in settled):
            # Another thread has measured it meanwhile; or nothing measured is allowed, and doing so again is no use.
            return stored.choice(question, known, exact=True)
        if not mine:
            profile.forget_decisions()  # so that a later call comes here again
            return None
        try:
            old = known[0].entry if known else None
            with session():
                outcome = problem_race.tune_problem(
                    key, effort=effort, seconds=options.time_limit, incumbent=old,
                    sparing=old is None or not old.is_busy,
                )  # fmt: skip
        except BackendError as error:
            warn(f"tuning {problem} failed: {error}", ProfileWarning)
            return None
        profile.keep(outcome.entry)
        _measured.add(key)
    now = stored.choice(question, profile.find(key), exact=True)
    return now and replace(now, evidence=Evidence("tuned", now.evidence.detail))
