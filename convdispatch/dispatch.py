"""Decides: problem -> profile -> tuning, if wished -> estimate -> plan. The only place that does."""

import contextlib
import functools
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from convdispatch import arguments, heuristic, machine, profile, quarantine, registry, separation, settings, transfer
from convdispatch.arguments import Array, as_array
from convdispatch.backend import Candidate, Config, Effort, item_bytes, rejection
from convdispatch.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    BackendRejectedError,
    ProfileMissError,
    ProfileWarning,
    shown,
    warn,
)
from convdispatch.locks import module_lock
from convdispatch.plan import Evidence, Plan, check_bias, check_filters
from convdispatch.problem import Problem
from convdispatch.profile import Found, Key, Result
from convdispatch.settings import Options
from convdispatch.units import time_text

if TYPE_CHECKING:
    from convdispatch.tuning.contest import Contest

Forced = tuple[str, Config | None] | None

#: What this process has measured on a miss: if others disturbed that, it waits for another process, or for ``tune``.
_measured: set[Key] = set()


#: Bytes of a result that may be too much for memory.
_HUGE = 1 << 32
#: Seconds to wait for another thread that measures the same: a backend that does so of itself is not to hang.
_LONGEST_WAIT, _BETWEEN_LOOKS = 60.0, 0.005


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


@dataclass(frozen=True)
class Decision:
    """What was chosen for a problem, and why.

    Attributes:
        candidate: what was chosen.
        evidence: why.
        found: which of the profiles' answers says so, if one does.
        seconds: how long a call took there, or takes by the estimate; NaN where neither says.
    """

    candidate: Candidate
    evidence: Evidence
    found: Found | None = None
    seconds: float = math.nan


def decide(problem: Problem, deployment: str, forced: Forced = None) -> Decision:
    """Choose a candidate under the options in force.

    Args:
        problem: what is to be computed.
        deployment: ``"plan"`` or ``"call"``.
        forced: a backend's name, with a config or None, if the caller insists.

    Raises:
        BackendRejectedError: if the forced backend cannot do it, or the options leave none that can.
        UnknownBackendError, BackendUnavailableError: if the forced backend is not there.
    """
    return _decide(problem, deployment, forced, settings.current(), registry.generation(), profile.generation())


@functools.lru_cache(maxsize=8192)
def _decide(
    problem: Problem,
    deployment: str,
    forced: Forced,
    options: Options,
    backends_generation: int,  # noqa: ARG001  # part of what is remembered under
    profile_generation: int,  # noqa: ARG001
) -> Decision:
    if forced is not None:
        return _forced(problem, deployment, forced, options)
    if options.tuning == "replay" and not problem.is_trivial:
        if (stored := _replayed(problem, deployment, options)) is not None:
            return stored
        answers = profile.find(key_for(problem, deployment, options))
        _miss(problem, deployment, options)
        return _estimated(answers, problem, deployment, options)
    if options.tuning == "on-miss" and (found := _on_miss(problem, deployment, options)):
        return found
    with profile.looked_at_once():
        answers = profile.find(key_for(problem, deployment, options))
        if stored := _from_profile(answers, problem, options):
            return _renewed(stored, answers, problem, deployment, options) or stored
        known = _for_any_filters(answers, problem, deployment, options)
        return known or _estimated(answers, problem, deployment, options)


def _replayed(problem: Problem, deployment: str, options: Options) -> Decision | None:
    """Return what profiles say of a problem, whatever else might be faster."""
    stored = _from_profile(_answers(problem, deployment, options), problem, options)
    return stored and replace(stored, evidence=Evidence("replay", stored.evidence.detail))


def _answers(problem: Problem, deployment: str, options: Options) -> list[Found]:
    """Return what profiles know of a problem; then what they know of it where filters may be of any kind."""
    return [*profile.find(key_for(problem, deployment, options)), *_answers_of_any(problem, deployment, options)]


def _answers_of_any(problem: Problem, deployment: str, options: Options) -> list[Found]:
    """Return what profiles know of a separable problem where filters may be of any kind; of others nothing more."""
    if not problem.separable:
        return []
    return profile.find(key_for(problem.replace(separable=False), deployment, options))


def _miss(problem: Problem, deployment: str, options: Options, why: str = "") -> None:
    """Raise, or warn, of what the profile does not know and ``tuning="replay"`` does not let be measured."""
    told = miss_text(problem, deployment, options) + why
    if options.on_miss == "raise":
        raise ProfileMissError(told)
    warn(f"{told}; the estimate decides", ProfileWarning)


def miss_text(problem: Problem, deployment: str, options: Options) -> str:
    """Return what to tell of a miss: the key, and the command that would fill it, or what options rule it out."""
    from convdispatch.tuning.rematch import still_there  # noqa: PLC0415  # needed only where something is missed

    key = key_for(problem, deployment, options)
    if any(still_there(found.entry) for found in _answers(problem, deployment, options)):
        return (
            f"a profile has an entry for '{key}', but the options rule out all that it measured "
            f"(accuracy={options.accuracy!r}{_limits(options)}), and tuning='replay' measures nothing"
        )
    tune = f"convdispatch tune {shlex.quote(str(problem))} --deployment {deployment} --threads {key.threads}"
    if options.profile is not None:
        tune += f" --profile {shlex.quote(str(options.profile))}"
    return f"no profile has an entry that may be used for '{key}', and tuning='replay' measures nothing: run {tune}"


def look(problem: Problem, deployment: str, forced: Forced = None) -> Decision:
    """Choose as ``decide`` does, but measure nothing and warn of nothing.

    Raises:
        ProfileMissError: if ``decide`` would.
        BackendRejectedError, UnknownBackendError, BackendUnavailableError: as ``decide``.
    """
    options = settings.current()
    with settings.options(tuning="off"):
        found = decide(problem, deployment, forced)
    if forced is not None or problem.is_trivial:
        return found
    if options.tuning == "replay":
        if stored := _replayed(problem, deployment, options):
            return stored
        if options.on_miss == "raise":
            raise ProfileMissError(miss_text(problem, deployment, options))
    if options.tuning == "online" and (contest := _contest(problem, deployment, forced)) and contest.seconds:
        return Decision(contest.incumbent, contest.evidence)
    return found


def _contest(problem: Problem, deployment: str, forced: Forced) -> "Contest | None":
    """Return the contest on live traffic that decides for a problem, where that is wished and nothing is known."""
    options = settings.current()
    if options.tuning != "online" or not options.online_budget or forced is not None or problem.is_trivial:
        return None
    decision = decide(problem, deployment)
    if decision.evidence.source != "estimate":
        return None
    from convdispatch.tuning import online  # noqa: PLC0415  # needed only where something is measured

    return online.contest(key_for(problem, deployment, options), decision.candidate)


def key_for(problem: Problem, deployment: str, options: Options) -> Key:
    """Return the profile's key for a problem on this machine under these options."""
    return Key(problem, deployment, heuristic.thread_budget(options), machine.current().id)


def _forced(problem: Problem, deployment: str, forced: tuple[str, Config | None], options: Options) -> Decision:
    name, config = forced
    backend = registry.get(name)
    if reason := rejection(backend, problem):
        raise BackendRejectedError(f"backend {name!r} cannot do {problem}: {reason}")
    if held := quarantine.of(backend):
        warn(f"backend={name!r} is used as asked, but {held}", ProfileWarning)
    if config is not None:
        Candidate(backend, config).check_keys(problem)
        given = {"threads": heuristic.thread_budget(options)} if backend.parallel else {}
        return Decision(
            Candidate(backend, Config({**given, **config})),
            Evidence("forced", f"backend={name!r} with its config"),
        )
    only = replace(options, forbid=tuple(n for n in registry.names() if n != name))
    found = _from_profile(_answers(problem, deployment, only), problem, only)
    if found:
        candidate = found.candidate
    else:
        ranking = transfer.rank(problem, [backend], heuristic.thread_budget(options), deployment)
        if not ranking.estimates:
            raise BackendRejectedError(f"backend {name!r} names no config for {problem}: give it one as (name, config)")
        candidate = ranking.estimates[0].candidate
    by = f"its config from {found.evidence}" if found else "its config estimated"
    return Decision(candidate, Evidence("forced", f"backend={name!r}, {by}"), found.found if found else None)


def _from_profile(
    answers: Sequence[Found], problem: Problem, options: Options, *, exact: bool = False
) -> Decision | None:
    held = quarantine.held() if answers else ()
    for found in answers:
        entry = found.entry
        result = entry.best(lambda result: _allows(result, problem, options, held))
        if result is None or (exact and not found.exact):
            continue
        rank = "winner" if result is entry.winner else "best allowed"
        where = f"{rank} of {len(entry.results)} in the {found.layer} profile"
        detail = f"{where}, {time_text(result.median)}, {entry.tuned}"
        if found.differences:
            detail += f", measured with {' and '.join(found.differences)}"
        candidate = Candidate(registry.get(result.backend), result.config)
        return Decision(candidate, Evidence("profile", detail), found, result.median)
    return None


def _outdated(stored: Decision, options: Options) -> list[str]:
    """Return the backends that beat a stored choice in a version that is no longer there."""
    rows = stored.found.entry.results if stored.found else ()
    faster = [row for row in rows if row.median < stored.seconds and row.backend not in options.forbid]
    now = registry.available() if faster else {}  # which loads them all: seldom, or first calls would wait for it
    return [row.backend for row in faster if row.backend in now and now[row.backend].version != row.version]


def _renewed(
    stored: Decision, answers: Sequence[Found], problem: Problem, deployment: str, options: Options
) -> Decision | None:
    """Return the estimates' choice among the backends that were faster in another version, if it is fast by them too.

    Who was slower than an old version is no good choice only for being measured.
    """
    if not (names := _outdated(stored, options)):
        return None
    others = tuple(name for name in registry.names() if name not in names)
    if (new := _faster(stored, answers, problem, deployment, replace(options, forbid=others))) is None:
        return None
    layer = stored.found.layer if stored.found else ""
    faster = f"what was faster in the {layer} profile was another version of {new.candidate.backend.name}"
    why = f"{new.evidence.detail}; {faster}"
    return replace(new, evidence=Evidence("estimate", why))


def _for_any_filters(answers: Sequence[Found], problem: Problem, deployment: str, options: Options) -> Decision | None:
    """Return what was measured of a separable problem with filters of any kind, or who is estimated to be faster.

    Whoever was not measured then is for separable filters only, or was hopeless.
    """
    stored = _from_profile(_answers_of_any(problem, deployment, options), problem, options)
    if stored is None or stored.found is None:
        return None
    measured = (row.backend for row in stored.found.entry.results)
    others = replace(options, forbid=(*options.forbid, *measured))
    return _faster(stored, answers, problem, deployment, others) or stored


def _faster(
    stored: Decision, answers: Sequence[Found], problem: Problem, deployment: str, options: Options
) -> Decision | None:
    """Return the estimates' choice under some options, if it is faster than what is stored."""
    try:
        new = _estimated(answers, problem, deployment, options)
    except BackendRejectedError:
        return None
    return new if new.seconds < stored.seconds else None


def _allows(result: Result, problem: Problem, options: Options, held: quarantine.Held) -> bool:
    """Return whether a stored result may be used: its backend as it was measured, and all options met."""
    if result.backend in options.forbid or result.backend not in registry.names():
        return False
    try:
        backend = registry.get(result.backend)
        if backend.version != result.version or quarantine.of(backend, held) or heuristic.refusal(backend, problem):
            return False
        workspace = Candidate(backend, result.config).workspace(problem)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # somebody's backend must not stop the others
        warn(f"profile: {result.name} for {problem} is ignored: {error}", ProfileWarning)
        return False
    if not heuristic.fits_memory(workspace, options):
        return False
    return heuristic.accurate_by_measure(backend, problem, result.error, options)


def _on_miss(problem: Problem, deployment: str, options: Options) -> Decision | None:
    """Return what is known of just this problem, measured now if need be; once more if others disturbed it then."""
    key = key_for(problem, deployment, options)
    answers = profile.find(key)
    stored = _from_profile(answers, problem, options, exact=True)
    if stored is not None and _outdated(stored, options):
        stored = None  # to be measured anew; or estimated, where nothing may be
    known = next((found.entry for found in answers if found.exact), None)
    if known is not None and known.is_busy and key not in _measured:
        return _tuned(problem, deployment, options) or stored
    return stored or _tuned(problem, deployment, options)


def _tuned(problem: Problem, deployment: str, options: Options) -> Decision | None:
    if problem.is_trivial or options.effort == "estimate":
        return None
    from convdispatch.tuning import tuner  # noqa: PLC0415  # needed only where something is measured
    from convdispatch.tuning.session import session  # noqa: PLC0415

    effort = cast("Effort", options.effort)
    key = key_for(problem, deployment, options)
    everyone = registry.available()
    with _turns.of(key) as mine:
        known = profile.find(key)
        settled = (found.entry for found in known if found.exact and not found.entry.is_busy)
        if any(tuner.suffices(entry, effort, everyone) for entry in settled):
            # Another thread has measured it meanwhile; or nothing measured is allowed, and doing so again is no use.
            return _from_profile(known, problem, options, exact=True)
        if not mine:
            profile.forget_decisions()  # so that a later call comes here again
            return None
        try:
            old = known[0].entry if known else None
            with session():
                outcome = tuner.tune_problem(
                    key, effort=effort, seconds=options.time_limit, incumbent=old,
                    sparing=old is None or not old.is_busy,
                )  # fmt: skip
        except BackendError as error:
            warn(f"tuning {problem} failed: {error}", ProfileWarning)
            return None
        tuner.keep(outcome.entry)
        _measured.add(key)
    now = _from_profile(profile.find(key), problem, options, exact=True)
    return now and replace(now, evidence=Evidence("tuned", now.evidence.detail))


def _estimated(answers: Sequence[Found], problem: Problem, deployment: str, options: Options) -> Decision:
    usable, refused = heuristic.usable(problem, options)
    allowed = [backend for backend in usable.values() if heuristic.accurate_by_kind(backend, options)]
    ranking = transfer.rank(problem, allowed, heuristic.thread_budget(options), deployment)
    measured = [row for answer in answers for row in answer.entry.results]
    not_these, unmeasured = [], [name for name, backend in usable.items() if backend not in allowed]
    # What third parties promise of themselves is unchecked: they are for those whom nothing else is left to.
    trusted = sorted(ranking.estimates, key=lambda each: not registry.is_built_in(each.candidate.backend))
    for estimate in trusted:
        candidate = estimate.candidate
        if estimate.seconds is None:
            continue  # nothing unknown is chosen unmeasured
        off = heuristic.measured_error(candidate, measured)
        if off is None and not heuristic.accurate_by_bound(candidate, problem, options):
            unmeasured.append(candidate.backend.name)
            continue
        if off is not None and not heuristic.accurate_by_measure(candidate.backend, problem, off, options):
            not_these.append(f"{candidate}: its error was measured as {off:.2g}")
            continue
        try:
            fits = heuristic.fits_memory(candidate.workspace(problem), options)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # somebody's backend must not stop the others
            not_these.append(f"{candidate}: its workspace raised {type(error).__name__}: {error}")
            continue
        if fits:
            basis = f" ({ranking.basis})" if ranking.basis else ""
            said = f"{time_text(estimate.seconds)} predicted{basis}"
            return Decision(candidate, Evidence("estimate", said), seconds=estimate.seconds)
    if unmeasured:
        names, asked = ", ".join(sorted(set(unmeasured))), f"accuracy={options.accuracy!r}"
        why = "allows local backends only" if options.accuracy == "strict" else "needs errors measured: tune it"
        not_these.insert(0, f"{names}: {asked} {why}")
    reasons = "; ".join([*(f"{name}: {reason}" for name, reason in refused.items()), *not_these])
    raise BackendRejectedError(
        f"no backend may do {problem} under accuracy={options.accuracy!r}{_limits(options)}"
        + (f" ({reasons})" if reasons else "")
    )


def _limits(options: Options) -> str:
    """Return what options besides accuracy rule candidates out."""
    limits = f", forbid={options.forbid}" if options.forbid else ""
    return limits + (f", memory_limit={options.memory_limit}" if options.memory_limit is not None else "")


def parse_forced(backend: Any) -> Forced:
    """Return what ``backend=`` asks for: a name, or a name with a config.

    Raises:
        ArgumentTypeError: if it is neither.
    """
    if backend is None:
        return None
    if isinstance(backend, str):
        return backend, None
    if isinstance(backend, tuple | list) and len(backend) == 2 and isinstance(backend[0], str):
        try:
            config = Config(backend[1])
        except ArgumentError:
            raise  # it says which value would not do
        except (TypeError, ValueError):
            pass
        else:
            settings.parse_threads(config.get("threads"))
            return backend[0], config
    raise ArgumentTypeError(f"backend must be a name, or (name, {{config}}); got {shown(backend)}")


def make_plan(
    problem: Problem, filters: Array, bias: Array | None, deployment: str = "plan", forced: Forced = None
) -> Plan:
    """Return a plan by the candidate that is chosen; a profile's choice that fails to prepare is passed over."""
    if deployment == "plan" and (contest := _contest(problem, deployment, forced)) is not None:
        from convdispatch.tuning import online  # noqa: PLC0415

        made = online.plan(contest, filters, bias)
    else:
        made = _plain_plan(problem, filters, bias, deployment, forced)
        if deployment == "plan":
            made.complete()  # or a later call would wait for a compiler
    if forced is None:
        made.budget = heuristic.budget_of()
    return made


def _plain_plan(problem: Problem, filters: Array, bias: Array | None, deployment: str, forced: Forced) -> Plan:
    decision = decide(problem, deployment, forced)
    try:
        return Plan(problem, decision.candidate, filters, bias, decision.evidence)
    except ArgumentError as error:
        if decision.evidence.source not in {"profile", "replay"} or problem.is_empty:
            raise
        options = settings.current()
        if options.tuning == "replay":
            _miss(problem, deployment, options, f" ({decision.candidate} is in it, but: {error})")
        else:
            said = f"profile: {decision.candidate} for {problem} is ignored: {error}"
            warn(said, ProfileWarning)
        fallback = _estimated(profile.find(key_for(problem, deployment, options)), problem, deployment, options)
        return Plan(problem, fallback.candidate, filters, bias, fallback.evidence)


def call(
    problem: Problem,
    filters: Array,
    bias: Array | None,
    forced: Forced,
    input: Array,
    *,
    out: Array | None,
    residual: Any,
) -> Array:
    """Convolve once: pack the filters by the candidate that is chosen, and run it."""
    if settings.current().tuning == "online" and (contest := _contest(problem, "call", forced)) is not None:
        return contest.call(filters, bias, input, out=out, residual=residual)
    if out is None and (size := math.prod(problem.output_shape) * item_bytes(problem.result_dtype)) >= _HUGE:
        np.empty(size, np.uint8)  # a result that no memory holds is refused before its plan is made
    return _plain_plan(problem, filters, bias, "call", forced)(input, out=out, residual=residual)


def checked(
    input_shape: Any,
    dtype: str,
    filters: Any,
    bias: Any,
    *,
    residual: bool,
    filter_format: str,
    **how: Any,
) -> tuple[Problem, Array, Array | None]:
    """Check a call's arguments; return its problem, its filters as HWIO, and its bias.

    Args:
        input_shape: shape of the input in its data format.
        dtype: name of the input's dtype.
        filters, bias: as the caller gave them.
        residual: whether there is one.
        filter_format: ``"HWIO"`` or ``"OIHW"``.
        **how: strides, padding, data_format, dilations, groups, activation.
    """
    weights = as_array("filters", filters)
    arguments.check_same_dtype(dtype, weights.dtype)
    problem = arguments.make_problem(
        input_shape, weights.shape, dtype, filter_format=filter_format, bias=bias is not None, residual=residual, **how
    )
    values = None if bias is None else check_bias(problem, bias)
    packed = check_filters(problem, weights, filter_format)
    return separation.noticed(problem, packed), packed, values
