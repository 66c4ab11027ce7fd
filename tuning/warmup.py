"""Compiling ahead: every kernel that a workload may need, so that no call has to wait for a compiler."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convdispatch import heuristic, settings
from convdispatch.backend import Candidate
from convdispatch.backends import _machine_code as machine_code
from convdispatch.errors import BackendError, warn
from convdispatch.problem import Problem
from convdispatch.tuning import compile_ahead, isolation
from convdispatch.tuning import workload as workloads
from convdispatch.tuning.gate import Trial
from convdispatch.tuning.session import session
from convdispatch.tuning.workload import Layer, Workload


@session()
def warm_up(
    workload: str | Path | Problem | Workload | Sequence[Any],
    *,
    on_progress: Callable[[Layer, Sequence[Candidate]], None] | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> int:
    """Compile the kernels of every candidate that ``tune`` would measure, and keep them on disk.

    Third parties' candidates are tried in a child process first, as by ``tune``; who fails there is left out.

    Args:
        workload: as in ``tune``.
        on_progress: called with each layer and the candidates made ready for it.
        on_wait: told in words how many kernels are being compiled.

    Returns:
        How many candidates were made ready.

    Raises:
        WorkloadError: if the workload cannot be understood.
        BackendError: if a backend fails to prepare what it does not reject.
    """
    work = [(layer, _candidates(layer.problem)) for layer in workloads.load(workload).distinct().layers]
    jobs = [compile_ahead.Job(layer.problem, candidate) for layer, fit in work for candidate in fit]
    compile_ahead.kernels(jobs, on_wait or (lambda _: None))
    for layer, fit in work:
        # A batch of one has the same kernels, and smaller arrays.
        arrays = Trial.random(layer.problem.replace(n=min(1, layer.problem.n)))
        ready = {candidate.name for candidate, _ in compile_ahead.plans(arrays, fit)}
        for candidate in fit:
            try:
                if candidate.name not in ready:
                    arrays.plan(candidate).complete()
            except Exception as error:
                raise BackendError(f"{candidate} failed to prepare {layer.problem}: {error}") from error
        if on_progress is not None:
            on_progress(layer, fit)
    if complaint := machine_code.complaint():
        warn(f"what was compiled serves this process only: {complaint}")
    return sum(len(fit) for _, fit in work)


def _candidates(problem: Problem) -> list[Candidate]:
    """Return whom ``tune`` would measure, but for third parties' candidates that fail."""
    options = settings.current()
    usable, _ = heuristic.usable(problem, options)
    ranked = heuristic.rank(problem, usable.values(), heuristic.thread_budget(options), "measure")
    worth, _ = heuristic.worth_measuring(ranked, "measure")
    fit, refused = isolation.admitted(problem.replace(n=min(1, problem.n)), worth)
    for failure in refused:
        warn(f"{failure.name} is left out of {problem}: {failure.reason}")
    return fit
