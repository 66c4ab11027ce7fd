"""Who takes part in a problem's race, whom estimates would pick without one, and why nobody is there."""

from collections.abc import Sequence

from convdispatch import heuristic, quarantine, registry, settings, transfer
from convdispatch.backend import Backend, Candidate, Effort
from convdispatch.errors import ArgumentError
from convdispatch.problem import Problem
from convdispatch.profile import Key


def chosen_backends(names: Sequence[str] | None) -> dict[str, Backend]:
    """Return the backends of these names, all available ones for None."""
    if names is None:
        return registry.available()
    if isinstance(names, str) or not names:
        raise ArgumentError(f"backends must be a list of names; got {names!r}")
    return {name: registry.get(name) for name in names}


def entrants_of(key: Key, effort: Effort, backends: dict[str, Backend]) -> tuple[list[Candidate], tuple[str, ...]]:
    """Return the candidates to measure, and the names of those estimated hopelessly slow."""
    free = settings.unrestricted("fast")
    fit = [b for name, b in heuristic.usable(key.problem, free)[0].items() if name in backends]
    raced, hopeless = heuristic.worth_measuring(heuristic.rank(key.problem, fit, key.threads, effort), effort)
    return raced, tuple(estimate.candidate.name for estimate in hopeless)


def picks_of(key: Key, backends: dict[str, Backend]) -> list[Candidate]:
    """Return whom estimates would choose without tuning; empty where they cannot tell.

    First the backends' own estimates' pick, which is the same in every run; then that of ``dispatch``, which goes by
    what was tuned before, too.
    """
    free = settings.unrestricted("standard")
    usable = heuristic.usable(key.problem, free)[0]
    fit = [b for name, b in usable.items() if name in backends and heuristic.accurate_by_kind(b, free)]
    ranked = (
        heuristic.rank(key.problem, fit, key.threads),
        transfer.rank(key.problem, fit, key.threads, key.deployment).estimates,
    )
    best = [estimates[0] for estimates in ranked if estimates and estimates[0].seconds is not None]
    return list({estimate.candidate.name: estimate.candidate for estimate in best}.values())


def why_nobody(problem: Problem, backends: dict[str, Backend]) -> str:
    """Return why none of the backends takes part."""
    held = [str(kept) for backend in backends.values() if (kept := quarantine.of(backend)) is not None]
    refusals = {name: heuristic.refusal(backend, problem) for name, backend in backends.items()}
    said = [f"{name}: {reason}" for name, reason in refusals.items() if reason]
    return "; ".join(held or said) or "no backend takes it"
