"""Decides: problem -> profile -> tuning, if wished -> estimate -> plan. The only place that does."""

import functools
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from convdispatch import heuristic, on_miss, profile, quarantine, registry, settings, stored, transfer
from convdispatch.arguments import Array
from convdispatch.backend import Candidate, Config, item_bytes, rejection
from convdispatch.errors import (
    ArgumentError,
    BackendRejectedError,
    ProfileMissError,
    ProfileWarning,
    warn,
)
from convdispatch.plan import Evidence, Plan
from convdispatch.problem import Problem
from convdispatch.profile_file import Found
from convdispatch.question import Decision, Forced, Question
from convdispatch.settings import Options
from convdispatch.units import time_text

if TYPE_CHECKING:
    from convdispatch.tuning.contest import Contest

#: Bytes of a result that may be too much for memory.
_HUGE = 1 << 32


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
    question = Question(problem, deployment, options)
    if forced is not None:
        return _forced(question, forced)
    if options.tuning == "replay" and not problem.is_trivial:
        if (chosen := _replayed(question)) is not None:
            return chosen
        answers = profile.find(question.key)
        _miss(question)
        return _estimated(question, answers)
    if options.tuning == "on-miss" and (chosen := on_miss.decide(question)):
        return chosen
    with profile.looked_at_once():
        answers = profile.find(question.key)
        if chosen := stored.choice(question, answers):
            return _renewed(question, chosen, answers) or chosen
        return _for_any_filters(question, answers) or _estimated(question, answers)


def _replayed(question: Question) -> Decision | None:
    """Return what profiles say of a problem, whatever else might be faster."""
    chosen = stored.choice(question, stored.answers(question))
    return chosen and replace(chosen, evidence=Evidence("replay", chosen.evidence.detail))


def _miss(question: Question, why: str = "") -> None:
    """Raise, or warn, of what the profile does not know and ``tuning="replay"`` does not let be measured."""
    told = _miss_text(question) + why
    if question.options.on_miss == "raise":
        raise ProfileMissError(told)
    warn(f"{told}; the estimate decides", ProfileWarning)


def _miss_text(question: Question) -> str:
    """Return what to tell of a miss: the key, and the command that would fill it, or what options rule it out."""
    from convdispatch.tuning.rematch import still_there  # noqa: PLC0415  # needed only where something is missed

    key, options = question.key, question.options
    if any(still_there(found.entry) for found in stored.answers(question)):
        return (
            f"a profile has an entry for '{key}', but the options rule out all that it measured "
            f"(accuracy={options.accuracy!r}{_limits(options)}), and tuning='replay' measures nothing"
        )
    tune = f"convdispatch tune {shlex.quote(str(key.problem))} --deployment {key.deployment} --threads {key.threads}"
    if options.profile is not None:
        tune += f" --profile {shlex.quote(str(options.profile))}"
    return f"no profile has an entry that may be used for '{key}', and tuning='replay' measures nothing: run {tune}"


def look(problem: Problem, deployment: str, forced: Forced = None) -> Decision:
    """Choose as ``decide`` does, but measure nothing and warn of nothing.

    Raises:
        ProfileMissError: if ``decide`` would.
        BackendRejectedError, UnknownBackendError, BackendUnavailableError: as ``decide``.
    """
    question = Question(problem, deployment, settings.current())
    with settings.options(tuning="off"):
        found = decide(problem, deployment, forced)
    if forced is not None or problem.is_trivial:
        return found
    if question.options.tuning == "replay":
        if chosen := _replayed(question):
            return chosen
        if question.options.on_miss == "raise":
            raise ProfileMissError(_miss_text(question))
    if question.options.tuning == "online" and (contest := _contest(question, forced)) and contest.seconds:
        return Decision(contest.incumbent, contest.evidence)
    return found


def _contest(question: Question, forced: Forced) -> "Contest | None":
    """Return the contest on live traffic that decides, where that is wished and nothing is known.

    The options in force are those of the question.
    """
    options = question.options
    if options.tuning != "online" or not options.online_budget or forced is not None or question.problem.is_trivial:
        return None
    generation = None
    while generation != profile.generation():  # what was decided while a contest ended may begin none
        generation = profile.generation()
        decision = decide(question.problem, question.deployment)
        if decision.evidence.source != "estimate":
            return None
        from convdispatch.tuning import online  # noqa: PLC0415  # needed only where something is measured

        if (contest := online.contest(question.key, decision.candidate, generation)) is not None:
            return contest
    return None


def _forced(question: Question, forced: tuple[str, Config | None]) -> Decision:
    (name, config), problem = forced, question.problem
    backend = registry.get(name)
    if reason := rejection(backend, problem):
        raise BackendRejectedError(f"backend {name!r} cannot do {problem}: {reason}")
    if held := quarantine.of(backend):
        warn(f"backend={name!r} is used as asked, but {held}", ProfileWarning)
    if config is not None:
        Candidate(backend, config).check_keys(problem)
        given = {"threads": question.threads} if backend.parallel else {}
        return Decision(
            Candidate(backend, Config({**given, **config})),
            Evidence("forced", f"backend={name!r} with its config"),
        )
    only = question.under(forbid=tuple(n for n in registry.names() if n != name))
    if chosen := stored.choice(only, stored.answers(only)):
        by = f"its config from {chosen.evidence}"
        return replace(chosen, evidence=Evidence("forced", f"backend={name!r}, {by}"), seconds=math.nan)
    ranking = transfer.rank(problem, [backend], question.threads, question.deployment)
    if not ranking.estimates:
        raise BackendRejectedError(f"backend {name!r} names no config for {problem}: give it one as (name, config)")
    return Decision(ranking.estimates[0].candidate, Evidence("forced", f"backend={name!r}, its config estimated"))


def _renewed(question: Question, chosen: Decision, answers: Sequence[Found]) -> Decision | None:
    """Return the estimates' choice among the backends that were faster in another version, if it is fast by them too.

    Who was slower than an old version is no good choice only for being measured.
    """
    if not (names := stored.outdated(question, chosen)):
        return None
    others = tuple(name for name in registry.names() if name not in names)
    if (new := _faster(question.under(forbid=others), chosen, answers)) is None:
        return None
    layer = chosen.found.layer if chosen.found else ""
    faster = f"what was faster in the {layer} profile was another version of {new.candidate.backend.name}"
    why = f"{new.evidence.detail}; {faster}"
    return replace(new, evidence=Evidence("estimate", why))


def _for_any_filters(question: Question, answers: Sequence[Found]) -> Decision | None:
    """Return what was measured of a separable problem with filters of any kind, or who is estimated to be faster.

    Whoever was not measured then is for separable filters only, or was hopeless.
    """
    chosen = stored.choice(question, stored.answers_for_any_filters(question))
    if chosen is None or chosen.found is None:
        return None
    measured = (row.backend for row in chosen.found.entry.results)
    return _faster(question.under(forbid=(*question.options.forbid, *measured)), chosen, answers) or chosen


def _faster(question: Question, chosen: Decision, answers: Sequence[Found]) -> Decision | None:
    """Return the estimates' choice, if it is faster than what is stored."""
    try:
        new = _estimated(question, answers)
    except BackendRejectedError:
        return None
    return new if new.seconds < chosen.seconds else None


def _estimated(question: Question, answers: Sequence[Found]) -> Decision:
    """Return the estimates' choice among those whom the options allow; the errors of the profiles' answers count."""
    problem, options = question.problem, question.options
    usable, refused = heuristic.usable(problem, options)
    allowed = [backend for backend in usable.values() if heuristic.accurate_by_kind(backend, options)]
    ranking = transfer.rank(problem, allowed, question.threads, question.deployment)
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


def make_plan(
    problem: Problem, filters: Array, bias: Array | None, deployment: str = "plan", forced: Forced = None
) -> Plan:
    """Return a plan by the candidate that is chosen; a profile's choice that fails to prepare is passed over."""
    question = Question(problem, deployment, settings.current())
    if deployment == "plan" and (contest := _contest(question, forced)) is not None:
        from convdispatch.tuning import online  # noqa: PLC0415

        return online.plan(contest, filters, bias)
    made = _plain_plan(problem, filters, bias, deployment, forced, question.threads if forced is None else None)
    if deployment == "plan":
        made.complete()  # or a later call would wait for a compiler
    return made


def _plain_plan(
    problem: Problem, filters: Array, bias: Array | None, deployment: str, forced: Forced, budget: int | None = None
) -> Plan:
    decision = decide(problem, deployment, forced)
    try:
        return Plan(problem, decision.candidate, filters, bias, decision.evidence, budget)
    except ArgumentError as error:
        if decision.evidence.source not in {"profile", "replay"} or problem.is_empty:
            raise
        question = Question(problem, deployment, settings.current())
        if question.options.tuning == "replay":
            _miss(question, f" ({decision.candidate} is in it, but: {error})")
        else:
            said = f"profile: {decision.candidate} for {problem} is ignored: {error}"
            warn(said, ProfileWarning)
        fallback = _estimated(question, profile.find(question.key))
        return Plan(problem, fallback.candidate, filters, bias, fallback.evidence, budget)


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
    options = settings.current()
    if options.tuning == "online" and (contest := _contest(Question(problem, "call", options), forced)) is not None:
        return contest.call(filters, bias, input, out=out, residual=residual)
    if out is None and (size := math.prod(problem.output_shape) * item_bytes(problem.result_dtype)) >= _HUGE:
        np.empty(size, np.uint8)  # a result that no memory holds is refused before its plan is made
    return _plain_plan(problem, filters, bias, "call", forced)(input, out=out, residual=residual)
