"""Which worker of a cluster races what, and when: one race at a time on a host, a lost one again elsewhere.

Pure bookkeeping, which knows nothing of Dask: ``gathering`` tells what happened, and asks what may begin.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from convdispatch.machine import Machine
from convdispatch.tuning.workload import Layer

#: A race is begun at most this often: what takes two workers down with it is not given a third.
MOST_TRIES = 2


@dataclass(frozen=True)
class Kind:
    """A kind of machine: what must be equal for one worker's measurement to be another's.

    Attributes:
        machine: the fingerprint.
        threads: the thread budget.
    """

    machine: Machine
    threads: int


@dataclass(frozen=True)
class Worker:
    """A worker process of a cluster.

    Attributes:
        address: where Dask finds it.
        host: the machine that it shares with the other workers of this host; two races there would time each other.
        hostname: what people call that machine.
        kind: its kind.
    """

    address: str
    host: str
    hostname: str
    kind: Kind


@dataclass(eq=False)
class Job:
    """One layer and deployment to race on one kind of machine.

    Attributes:
        kind, layer, deployment: what, and where.
        lost: workers that were lost while they raced it.
    """

    kind: Kind
    layer: Layer
    deployment: str
    lost: list[Worker] = field(default_factory=list)


class Spread:
    """Jobs that wait, jobs that run, and the workers there are."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        """Let these jobs wait, in this order."""
        self._waiting = list(jobs)
        self._workers: dict[str, Worker] = {}
        self._running: dict[str, tuple[Job, Worker]] = {}

    @property
    def waiting(self) -> tuple[Job, ...]:
        """The jobs that wait for a host."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[tuple[Job, Worker], ...]:
        """The jobs that run, at most one on a host, each with its worker."""
        return tuple(self._running.values())

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The workers that are there."""
        return tuple(self._workers.values())

    def join(self, worker: Worker) -> None:
        """Let a worker take part."""
        self._workers[worker.address] = worker

    def leave(self, address: str) -> Job | None:
        """Let a worker be gone; its job waits again, before the others.

        Returns:
            The job that it took with it, if that has been tried often enough.
        """
        worker = self._workers.pop(address)
        job, runner = self._running.get(worker.host, (None, None))
        if job is None or runner != worker:
            return None
        return self.lose(job, worker)

    def lose(self, job: Job, worker: Worker) -> Job | None:
        """Take a job from a worker that did not finish it; see ``leave``."""
        del self._running[worker.host]
        job.lost.append(worker)
        if len(job.lost) >= MOST_TRIES:
            return job
        self._waiting.insert(0, job)
        return None

    def begin(self) -> tuple[Job, Worker] | None:
        """Return a job that may begin now and the worker to race it, or None; from now on it runs.

        Of the kinds that a host serves, the one with the most waiting jobs comes first.
        """
        left = Counter(job.kind for job in self._waiting)
        for worker in self._workers.values():
            if worker.host in self._running:
                continue
            kinds = {other.kind for other in self._workers.values() if other.host == worker.host}
            fit = [job for job in self._waiting if job.kind in kinds and not self._better_elsewhere(job, worker.host)]
            if fit:
                job = max(fit, key=lambda job: (bool(job.lost), left[job.kind]))
                self._waiting.remove(job)
                mates = (other for other in self._workers.values() if other.host == worker.host)
                chosen = next(other for other in mates if other.kind == job.kind)
                self._running[chosen.host] = job, chosen
                return job, chosen
        return None

    def _better_elsewhere(self, job: Job, host: str) -> bool:
        """Return whether a job was lost on this host, and there is another of its kind."""
        lost = {worker.host for worker in job.lost}
        return host in lost and any(w.kind == job.kind and w.host not in lost for w in self._workers.values())

    def end(self, worker: Worker) -> None:
        """Let a worker's job be done."""
        del self._running[worker.host]

    def drop(self, job: Job) -> None:
        """Let a waiting job wait no longer."""
        self._waiting.remove(job)

    def stranded(self) -> list[Job]:
        """Return the waiting jobs for whose kind there is no worker."""
        kinds = {worker.kind for worker in self._workers.values()}
        return [job for job in self._waiting if job.kind not in kinds]

    def share(self, job: Job) -> float:
        """Return which part of the time that is left a job may take that was begun just now.

        The hosts of its kind race side by side; a host of several kinds gives each of them an equal part.
        """
        waiting = Counter(other.kind for other in self._waiting)
        waiting[job.kind] += 1
        served: dict[str, set[Kind]] = {}
        for worker in self._workers.values():
            if waiting[worker.kind]:
                served.setdefault(worker.host, set()).add(worker.kind)
        lanes = sum(1 / len(kinds) for kinds in served.values() if job.kind in kinds)
        return min(1.0, lanes / waiting[job.kind])
