"""Conducts a tuning run on a Dask cluster: begins races, keeps what comes back, and gets over workers that are lost."""

import contextlib
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convdispatch import profile, profile_file, quarantine
from convdispatch.profile import Entry, Key
from convdispatch.profile_file import Found
from convdispatch.tuning import isolation, layers
from convdispatch.tuning.layers import LayerReport, Terms
from convdispatch.tuning.roster import Roster, connected, said
from convdispatch.tuning.session import session
from convdispatch.tuning.spread import Job, Spread, Worker
from convdispatch.tuning.workload import Layer

#: Seconds between looks at which workers are there.
_LOOK = 1.0
#: Seconds that jobs wait for a worker of their kind when there is none; a crashed one is restarted in less.
_PATIENCE = 30.0
#: Seconds that a race may go on after the time limit.
_GRACE = 60.0
#: Seconds to fetch a result, which is small.
_FETCH = 30.0

#: Told of a host's name, empty where there is none, and a layer's report.
Progress = Callable[[str, LayerReport], None]


def race_here(
    layer: Layer, key: Key, terms: Terms, seconds: float | None, known: Found | None, held: Mapping[str, str]
) -> tuple[LayerReport, dict[str, str]]:
    """Measure one layer in this process, and write nothing; runs on a worker.

    Args:
        layer, key, terms, seconds, known: as for ``layers.measure``.
        held: the quarantines on this kind of machine, as the profile has them.

    Returns:
        The report, and the quarantines that are new, or now about other code of the same name.
    """
    chosen = terms.chosen()
    isolation.forget([chosen[name] for name in terms.again if name in chosen])
    with session(), quarantine.kept_apart(held) as now:
        report = layers.measure(layer, key, terms, seconds, known)
        return report, {key: text for key, text in now.items() if text != held.get(key)}


class Gathering:
    """One tuning run."""

    def __init__(
        self,
        client: Any,
        roster: Roster,
        jobs: Sequence[Job],
        terms: Mapping[str, Terms],
        path: Path,
        *,
        end: float | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Prepare to do these jobs on the workers of a roster.

        Args:
            client: the ``distributed.Client``.
            roster: who is there.
            jobs: what to do.
            terms: how to do it, by the machine's id.
            path: the profile to read what is known from, and to write to.
            end: the moment of ``time.monotonic()`` from which on no race begins, if any.
            on_progress: called as soon as a job is decided.
        """
        self._client = client
        self._roster = roster
        self._spread = Spread(jobs)
        self._terms, self._end = terms, end
        self._path = path
        self._known = profile_file.read(path)
        self._held = {kind.machine.id: {q.key: q.text for q in quarantine.on(kind.machine.id)} for kind in roster.kinds}
        self._on_progress = on_progress
        self._reports: dict[Job, LayerReport] = {}
        self._futures: dict[Any, tuple[Job, Worker]] = {}
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._served = {kind: time.monotonic() for kind in roster.kinds}
        for worker in roster.workers:
            self._spread.join(worker)

    def finish(self) -> dict[Job, LayerReport]:
        """Return a report of every job."""
        try:
            looked = time.monotonic()
            self._begin()
            while self._spread.waiting or self._futures:
                with contextlib.suppress(queue.Empty):
                    self._take(self._done.get(timeout=_LOOK))
                if time.monotonic() - looked >= _LOOK:
                    self._look()
                    looked = time.monotonic()
                self._begin()
        finally:
            for future in self._futures:
                with contextlib.suppress(Exception):  # the scheduler may be gone
                    future.cancel()
        return self._reports

    def _begin(self) -> None:
        """Begin a race on every host that has none, as long as there is time."""
        if self._left() == 0:
            for job in self._spread.waiting:
                if job.lost or not self._has(job):  # what is known may suffice, which takes no time
                    self._spread.drop(job)
                    self._report(job, "", LayerReport(job.layer, job.deployment, "left", self._entry(job)))
        while (pair := self._spread.begin()) is not None:
            job, worker = pair
            left = self._left()
            share = None if left is None else left * self._spread.share(job)
            machine = job.kind.machine.id
            words = job.layer, _key(job), self._terms[machine], share, self._found(job), self._held[machine]
            with connected():
                future = self._client.submit(
                    race_here, *words, workers=[worker.address], allow_other_workers=False, pure=False
                )
                self._futures[future] = job, worker
                future.add_done_callback(self._done.put)

    def _left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def _found(self, job: Job) -> Found | None:
        """Return what the profile knows for a job, from its kind of machine or from one much like it."""
        return next(iter(self._known.answers(_key(job), job.kind.machine)), None)

    def _has(self, job: Job) -> bool:
        found = self._found(job)
        return found is not None and found.exact

    def _entry(self, job: Job) -> Entry | None:
        found = self._found(job)
        return found.entry if found is not None else None

    def _take(self, future: Any) -> None:
        """Keep what a race has found."""
        job, worker = self._futures.pop(future, (None, None))
        if job is None or worker is None:
            return  # given up before
        if future.status == "error" and not _killed(error := future.exception()):
            self._spread.end(worker)
            self._fail(job, worker, f"{type(error).__name__}: {said(error)}")
            return
        try:
            report, new = future.result(timeout=_FETCH)
        except Exception:  # noqa: BLE001  # lost, cancelled, or gone before its result was here
            self._tried(self._spread.lose(job, worker))
            return
        self._spread.end(worker)
        entries = [report.entry] if report.status == "tuned" and report.entry is not None else []
        self._held[job.kind.machine.id].update(new)
        for entry in entries:
            profile.remember(entry)
        if entries or new:
            profile_file.write(self._path, entries, job.kind.machine, new)
        self._report(job, worker.hostname, report)

    def _look(self) -> None:
        """Notice who is gone and who has come."""
        there = self._roster.addresses()
        for worker in self._spread.workers:
            if worker.address not in there:
                self._forget(worker)
                self._tried(self._spread.leave(worker.address))
        for worker in self._roster.newcomers(there):
            self._spread.join(worker)
        now = time.monotonic()
        self._served |= {worker.kind: now for worker in self._spread.workers}
        for job in self._spread.stranded():
            if now - self._served[job.kind] >= _PATIENCE:
                self._spread.drop(job)
                lost = f"{_lost(job)}; " if job.lost else ""
                self._fail(job, None, f"{lost}no worker of this kind is left")
        if self._end is not None and now > self._end + _GRACE:
            for job, worker in self._spread.running:
                self._forget(worker)
                self._spread.end(worker)
                self._fail(job, worker, f"no answer {_GRACE:.0f} s after the time limit")

    def _tried(self, job: Job | None) -> None:
        """Report a job that was lost for good."""
        if job is not None:
            self._fail(job, job.lost[-1], _lost(job))

    def _forget(self, worker: Worker) -> None:
        """Wait no longer for what a worker was doing."""
        for future in [future for future, (_, runner) in self._futures.items() if runner == worker]:
            del self._futures[future]
            with connected():
                future.cancel()

    def _fail(self, job: Job, worker: Worker | None, reason: str) -> None:
        report = LayerReport(job.layer, job.deployment, "failed", self._entry(job), reason=reason)
        self._report(job, worker.hostname if worker else "", report)

    def _report(self, job: Job, hostname: str, report: LayerReport) -> None:
        self._reports[job] = report
        if self._on_progress is not None:
            self._on_progress(hostname, report)


def _key(job: Job) -> Key:
    return Key(job.layer.problem, job.deployment, job.kind.threads, job.kind.machine.id)


def _lost(job: Job) -> str:
    hosts = ", then ".join(f"{worker.hostname} ({worker.address})" for worker in job.lost)
    return f"the worker was lost: {hosts}"


def _killed(error: BaseException) -> bool:
    """Return whether an error says that workers died of a task, rather than that it raised something."""
    return type(error).__name__ == "KilledWorker"
