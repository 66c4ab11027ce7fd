"""What profiles say of a question: the best stored result that is allowed now."""

from collections.abc import Sequence

from convdispatch import heuristic, profile, quarantine, registry
from convdispatch.backend import Candidate
from convdispatch.errors import ProfileWarning, warn
from convdispatch.plan import Evidence
from convdispatch.profile import Result
from convdispatch.profile_file import Found
from convdispatch.question import Decision, Question
from convdispatch.units import time_text


def answers(question: Question) -> list[Found]:
    """Return what profiles know of a problem; then what they know of it where filters may be of any kind."""
    return [*profile.find(question.key), *answers_for_any_filters(question)]


def answers_for_any_filters(question: Question) -> list[Found]:
    """Return what profiles know of a separable problem where filters may be of any kind; of others nothing more."""
    return profile.find(question.for_any_filters().key) if question.problem.separable else []


def choice(question: Question, answers: Sequence[Found], *, exact: bool = False) -> Decision | None:
    """Return the best result that is allowed, of the first answer that has one; of exact ones only, if so asked."""
    held = quarantine.held() if answers else ()
    for found in answers:
        entry = found.entry
        result = entry.best(lambda result: _allows(question, result, held))
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


def outdated(question: Question, chosen: Decision) -> list[str]:
    """Return the backends that beat a stored choice in a version that is no longer there."""
    rows = chosen.found.entry.results if chosen.found else ()
    faster = [row for row in rows if row.median < chosen.seconds and row.backend not in question.options.forbid]
    now = registry.available() if faster else {}  # which loads them all: seldom, or first calls would wait for it
    return [row.backend for row in faster if row.backend in now and now[row.backend].version != row.version]


def _allows(question: Question, result: Result, held: quarantine.Held) -> bool:
    """Return whether a stored result may be used: its backend as it was measured, and all options met."""
    problem, options = question.problem, question.options
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
