"""``tune``: measures every problem of a workload, and keeps the winners in the profile."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convdispatch import heuristic, machine, profile, profile_file, quarantine, settings
from convdispatch.arguments import DEPLOYMENTS, check_deployments
from convdispatch.problem import Problem
from convdispatch.tuning import calibrate, isolation
from convdispatch.tuning import workload as workloads
from convdispatch.tuning.entrants import chosen_backends
from convdispatch.tuning.layers import LayerReport, Terms
from convdispatch.tuning.race import checked_effort
from convdispatch.tuning.session import session
from convdispatch.tuning.tuning_run import TuningRun
from convdispatch.tuning.workload import Workload


@dataclass(frozen=True)
class TuneReport:
    """What a tuning run did.

    Attributes:
        workload: what was tuned.
        layers: one report for each distinct problem and deployment, in the order in which they were tuned.
        profile: the file that was written.
        seconds: how long it took.
        threads: the thread budget.
        machine: id of the machine's fingerprint.
    """

    workload: Workload
    layers: tuple[LayerReport, ...]
    profile: Path
    seconds: float
    threads: int
    machine: str

    @property
    def complete(self) -> bool:
        """Whether every layer has a winner that needs one."""
        return all(report.status in {"tuned", "known", "trivial"} for report in self.layers)

    @property
    def flagged(self) -> int:
        """How many layers have an entry that was measured on a busy machine, and so is to be measured again."""
        return sum(report.entry is not None and report.entry.is_busy for report in self.layers)


@session()
def tune(
    workload: str | Path | Problem | Workload | Iterable[Any],
    *,
    effort: str = "measure",
    time_limit: float | None = None,
    threads: int | None = None,
    backends: Sequence[str] | None = None,
    deployments: Sequence[str] = DEPLOYMENTS,
    retune: bool = False,
    retry_quarantined: bool = False,
    allow_busy: bool = False,
    on_progress: Callable[[LayerReport], None] | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> TuneReport:
    """Measure which backend is fastest for each problem of a workload, and keep the winners in the profile.

    Each problem is stored as soon as it is decided, so that an interrupted run keeps what it has measured; the
    next run takes what the profile knows (at this effort or a higher one) and goes on with the rest.

    What was recorded is tuned in the order of the seconds it took, the most first, each in the deployment and with
    the thread budget that it was called with; a time limit is spent in proportion to those seconds.

    When all have been raced, winners of new problems race once more against who came close, and give way to who beats
    them twice.

    A busy machine is waited for before the first race, for up to ten seconds. One that becomes busy later stops
    nothing: a race that was disturbed is run again, longer, and if that was disturbed too, its entry is flagged
    ``"busy"``. What is flagged is measured again at the end, if there is a quiet moment then, or by the next run.

    Args:
        workload: a packaged workload's name, a YAML file, an ONNX model's file, a problem or its text, a
            ``Workload``, what ``record`` recorded, or several problems.
        effort: ``"measure"``, ``"patient"`` or ``"exhaustive"``.
        time_limit: seconds for the whole run; what it leaves undone is reported as left. Nothing new begins after
            them, but who takes part in what was begun is still checked, and races for three rounds.
        threads: most threads a candidate may use; what was recorded, else the option ``threads``, where None.
        backends: names of the backends that take part; all where None.
        deployments: ``"plan"`` (filters packed before), ``"call"`` (packed in every call), or both.
        retune: whether to measure again what the profile knows.
        retry_quarantined: whether to lift the quarantine of the backends that take part, so that they are tried again.
        allow_busy: whether to measure on a busy machine too, without waiting; what is measured then is flagged.
        on_progress: called with each layer's report as soon as there is one.
        on_wait: told in words what is waited for: compilers, or a quiet moment of a busy machine.

    Returns:
        A report with an entry for each distinct problem and deployment.

    Raises:
        WorkloadError: if the workload cannot be understood.
        UnknownBackendError: for a name in ``backends`` that there is not.
        ProfileError: if the profile cannot be written; nothing has been measured then.
        BusyMachineError: if others use the machine and ``allow_busy`` is false; nothing has been measured then.
    """
    load = workloads.load(workload).distinct()
    level = checked_effort(effort)
    limit = None if time_limit is None else settings.parse_time_limit(time_limit)
    check_deployments(deployments)
    budget = heuristic.budget_of(threads)
    path = profile.writable_path()
    profile_file.write(path, (), machine.current())  # better to learn now than after long that it cannot be written
    chosen = chosen_backends(backends)
    again = quarantine.lift(chosen.values()) if retry_quarantined else ()
    isolation.forget([chosen[name] for name in again])
    terms = Terms(level, backends, retune, again)
    run = TuningRun(
        load, deployments, threads, terms, path,
        limit=limit, allow_busy=allow_busy, on_progress=on_progress, on_wait=on_wait,
    )  # fmt: skip
    reports = run.finish()
    calibrate.learn((report.entry for report in reports if report.entry), path)
    return TuneReport(load, reports, path, run.seconds, budget, machine.current().id)
