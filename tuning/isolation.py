"""Tries candidates of third parties in a child process before they are measured in this one.

A kernel that crashes takes its process along, and one that hangs never comes back. So what does not come with
convdispatch first runs where that does no harm, watched, with limits of time and memory. What crashes, hangs, is wrong
or breaks the contract puts that version of its backend into quarantine; what merely raises is a failure of that
candidate. Each backend has a child of its own, so that none is blamed for what another did to its process.
"""

import atexit
import weakref
from collections.abc import Sequence

from convdispatch import quarantine, registry, settings
from convdispatch.backend import Backend, Candidate, Config
from convdispatch.errors import LONGEST_REASON, in_a_line, warn
from convdispatch.locks import module_rlock
from convdispatch.problem import Problem
from convdispatch.profile import Failure
from convdispatch.tuning.cell import Cell, Finding, Limits, UnsentError

LIMITS = Limits()
_MOST_CHILDREN = 4


def admitted(problem: Problem, candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Failure]]:
    """Split candidates into those that may be measured in this process, and failures.

    A third party's candidates are tried first, once a process for each problem and config. What speaks against a
    backend's version puts it into quarantine, with all its candidates.

    Args:
        problem: what is to be computed.
        candidates: of any backends; those in quarantine are left out without a word.
    """
    mode = settings.current().isolation
    failures = []
    fit = []
    for candidate in candidates:
        backend = candidate.backend
        if quarantine.of(backend):
            continue
        if mode == "off" or (mode == "third-party" and registry.is_built_in(backend)) or problem.is_trivial:
            fit.append(candidate)
            continue
        finding = _found(problem, candidate)
        if finding.reason is None:
            fit.append(candidate)
            continue
        reason = in_a_line(finding.reason, LONGEST_REASON)
        if finding.lasting:
            quarantine.add(candidate, problem, reason)
            reason = f"{quarantine.FAILED}{reason}"
        failures.append(Failure(backend.name, backend.version, candidate.config, reason))
    return [candidate for candidate in fit if not quarantine.of(candidate.backend)], failures


_known: "weakref.WeakKeyDictionary[Backend, dict[tuple[Problem, Config], Finding]]" = weakref.WeakKeyDictionary()
_noted: "weakref.WeakKeyDictionary[Backend, str]" = weakref.WeakKeyDictionary()


def _found(problem: Problem, candidate: Candidate) -> Finding:
    """Return what is known of a candidate in this process; say once a backend what the user should know."""
    backend = candidate.backend
    found = _known.setdefault(backend, {})
    key = problem, candidate.config
    if key not in found:
        found[key] = try_candidate(problem, candidate)
    finding = found[key]
    if finding.note and backend not in _noted:
        _noted[backend] = finding.note
        warn(finding.note)
    return finding


def forget(backends: Sequence[Backend]) -> None:
    """Forget what is known of these backends, so that they are tried again."""
    for backend in backends:
        _known.pop(backend, None)


def try_candidate(problem: Problem, candidate: Candidate, limits: Limits | None = None) -> Finding:
    """Run a candidate in its backend's child process, and judge its result here.

    Args:
        problem: what to compute; not trivial.
        candidate: what is to compute it.
        limits: of time and memory; the usual where None.

    Returns:
        What came of it. A backend that cannot be sent to another process is not tried, which its note says.
    """
    with _lock:
        try:
            return _cell(candidate.backend).run(problem, candidate, limits or LIMITS)
        except UnsentError as error:
            close(candidate.backend)
            name = candidate.backend.name
            return Finding(note=f"backend {name!r} cannot be tried in a child process, so it is tried here: {error}")


# The children -------------------------------------------------------------------------------------------------------

_cells: dict[Backend, Cell] = {}
_lock = module_rlock()


def _cell(backend: Backend) -> Cell:
    found = _cells.pop(backend, None)
    if found is None or not found.usable:
        if found is not None:
            found.close()
        while len(_cells) >= _MOST_CHILDREN:
            close(next(iter(_cells)))  # who was asked longest ago
        found = Cell(backend)
    _cells[backend] = found
    return found


def close(backend: Backend | None = None) -> None:
    """End a backend's child process, or all; the next trial starts another."""
    with _lock:
        for each in list(_cells) if backend is None else [backend]:
            cell = _cells.pop(each, None)
            if cell is not None:
                cell.close()


@atexit.register
def _end() -> None:
    for cell in list(_cells.values()):  # without the lock: a thread that waits for a child may hold it for long
        cell.close()
