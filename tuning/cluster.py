"""Tunes a workload on a Dask cluster, once for each kind of machine there is, into one profile.

Within a kind, the layers are spread over the hosts, one race at a time on each host, since two would time each other.
What comes back is written here, as it comes; a worker writes nothing.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convdispatch import profile, profile_file, quarantine, settings
from convdispatch.arguments import DEPLOYMENTS, check_deployments
from convdispatch.machine import Machine
from convdispatch.problem import Problem
from convdispatch.tuning import stakes
from convdispatch.tuning import workload as workloads
from convdispatch.tuning.entrants import chosen_backends
from convdispatch.tuning.gathering import Gathering, Progress
from convdispatch.tuning.layers import Terms
from convdispatch.tuning.race import checked_effort
from convdispatch.tuning.roster import LeftOut, Roster, open_client
from convdispatch.tuning.spread import Job, Kind
from convdispatch.tuning.tuner import TuneReport
from convdispatch.tuning.workload import Workload


@dataclass(frozen=True)
class KindReport:
    """What was done on one kind of machine.

    Attributes:
        machine: its fingerprint.
        hosts: what people call the hosts of this kind.
        report: what became of each layer, as when tuning here.
    """

    machine: Machine
    hosts: tuple[str, ...]
    report: TuneReport


@dataclass(frozen=True)
class ClusterReport:
    """What a tuning run on a cluster did.

    Attributes:
        workload: what was tuned.
        kinds: one report for each kind of machine.
        left_out: workers that took no part.
        profile: the file that was written.
        seconds: how long it took.
    """

    workload: Workload
    kinds: tuple[KindReport, ...]
    left_out: tuple[LeftOut, ...]
    profile: Path
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every layer has a winner on every kind."""
        return all(kind.report.complete for kind in self.kinds)


def tune(
    workload: str | Path | Problem | Workload | Sequence[Any],
    scheduler: Any,
    *,
    effort: str = "measure",
    time_limit: float | None = None,
    threads: int | None = None,
    backends: Sequence[str] | None = None,
    deployments: Sequence[str] = DEPLOYMENTS,
    retune: bool = False,
    retry_quarantined: bool = False,
    on_progress: Progress | None = None,
) -> ClusterReport:
    """Tune a workload on every kind of machine of a Dask cluster, and keep the winners in the profile here.

    The arguments not named are as in ``convdispatch.tune``.

    Args:
        workload: what to tune.
        scheduler: its address such as ``"tcp://10.0.0.1:8786"``, a scheduler file, or a ``distributed.Client``.
        time_limit: seconds for the whole run, all hosts together; what it leaves undone is reported as left.
        retry_quarantined: whether to lift the quarantine of the backends that take part, on the kinds that are tuned.
        threads: most threads a candidate may use; each worker's own budget where None.
        on_progress: called with a host's name and a layer's report as soon as there is one.

    Returns:
        A report for each kind of machine.

    Raises:
        ClusterError: if ``distributed`` is not installed, the scheduler cannot be reached or is lost on the way, or
            no worker can tune.
        WorkloadError, ArgumentError, UnknownBackendError, ProfileError: as ``convdispatch.tune``.
    """
    load = workloads.load(workload)
    with connect(scheduler, threads=threads, backends=backends) as cluster:
        return cluster.tune(
            load,
            effort=effort,
            time_limit=time_limit,
            deployments=deployments,
            retune=retune,
            retry_quarantined=retry_quarantined,
            on_progress=on_progress,
        )


@contextlib.contextmanager
def connect(
    scheduler: Any, *, threads: int | None = None, backends: Sequence[str] | None = None
) -> Iterator["Cluster"]:
    """Yield the cluster of a scheduler, its workers asked for what they are; arguments and errors as in ``tune``."""
    chosen_backends(backends)
    budget = settings.parse_threads(threads)
    with contextlib.ExitStack() as stack:
        client = scheduler if hasattr(scheduler, "submit") else stack.enter_context(open_client(str(scheduler)))
        yield Cluster(client, budget, backends)


class Cluster:
    """A Dask cluster whose workers were asked what they are.

    Attributes:
        client: the ``distributed.Client``.
        roster: the workers that take part, and those left out.
        backends: names of the backends that take part, all where None.
    """

    def __init__(self, client: Any, threads: int | None, backends: Sequence[str] | None) -> None:
        """Ask the workers; see ``connect``."""
        self.client = client
        self.backends = None if backends is None else list(backends)
        self.roster = Roster(client, threads, backends)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The distinct kinds of machine."""
        return self.roster.kinds

    def jobs(self, workload: Workload, deployments: Sequence[str]) -> list[Job]:
        """Return what is to be done: what was recorded in one deployment for that one, the most seconds first."""
        return [
            Job(kind, task.layer, task.key.deployment)
            for kind in self.kinds
            for task in stakes.tasks(
                workload.distinct(), deployments, kind.machine.id, kind.threads, threads=kind.threads
            )
        ]

    def _lift(self, path: Path) -> dict[str, tuple[str, ...]]:
        """Lift the quarantine of the backends that take part; return their names by machine."""
        lifted = {}
        for there in {kind.machine.id: kind.machine for kind in self.kinds}.values():
            held = [one for one in quarantine.on(there.id) if self.backends is None or one.backend in self.backends]
            texts = dict.fromkeys(one.key for one in held)
            profile.remember_notes(texts)
            profile_file.write(path, (), there, texts)
            lifted[there.id] = tuple(one.backend for one in held)
        return lifted

    def tune(
        self,
        workload: Workload,
        *,
        effort: str = "measure",
        time_limit: float | None = None,
        deployments: Sequence[str] = DEPLOYMENTS,
        retune: bool = False,
        retry_quarantined: bool = False,
        on_progress: Progress | None = None,
    ) -> ClusterReport:
        """Tune a workload on every kind; see ``tune``."""
        load = workload.distinct()
        level = checked_effort(effort)
        limit = None if time_limit is None else settings.parse_time_limit(time_limit)
        check_deployments(deployments)
        path = profile.writable_path()
        kinds = self.kinds
        for kind in kinds:  # better to learn now than after a long run that it cannot be written
            profile_file.write(path, (), kind.machine)
        started = time.monotonic()
        jobs = self.jobs(load, deployments)
        again = self._lift(path) if retry_quarantined else {}
        end = None if limit is None else started + limit
        terms = {kind.machine.id: Terms(level, self.backends, retune, again.get(kind.machine.id, ())) for kind in kinds}
        gathering = Gathering(self.client, self.roster, jobs, terms, path, end=end, on_progress=on_progress)
        reports = gathering.finish()
        seconds = time.monotonic() - started
        done = []
        for kind in kinds:
            hosts = sorted({worker.hostname for worker in self.roster.workers if worker.kind == kind})
            layers = tuple(reports[job] for job in jobs if job.kind == kind)
            report = TuneReport(load, layers, path, seconds, kind.threads, kind.machine.id)
            done.append(KindReport(kind.machine, tuple(hosts), report))
        return ClusterReport(load, tuple(done), tuple(self.roster.left_out), path, seconds)
