"""One tuning run over a workload, step by step: every layer, those that were disturbed again, the winners again."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from convdispatch import heuristic, machine, profile, profile_file, settings
from convdispatch.backend import Candidate
from convdispatch.profile import Entry, Key
from convdispatch.profile_file import Found
from convdispatch.tuning import busy, compile_ahead, layers, problem_race, stakes
from convdispatch.tuning.confirmation import contested
from convdispatch.tuning.entrants import entrants_of, picks_of
from convdispatch.tuning.layers import LayerReport, Terms
from convdispatch.tuning.stakes import Task
from convdispatch.tuning.workload import Workload


@dataclass(frozen=True)
class _Doubt:
    """A winner that is to race once more: number of its report, it and its rivals, and whom estimates would pick."""

    number: int
    entry: Entry
    candidates: Sequence[Candidate]
    picks: Sequence[Candidate]


class TuningRun:
    """One run; its clock runs from the moment that it is made."""

    def __init__(
        self,
        load: Workload,
        deployments: Sequence[str],
        threads: int | None,
        terms: Terms,
        path: Path,
        *,
        limit: float | None = None,
        allow_busy: bool = False,
        on_progress: Callable[[LayerReport], None] | None = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare to tune a workload of distinct problems, on these terms, and to keep the winners in a file.

        Args:
            load, deployments: what to tune.
            threads: most threads a candidate may use, None for what was recorded or the options say.
            terms: how to tune.
            path: the profile to read what is known from, and to write to.
            limit: seconds from now for all of it, if any.
            allow_busy, on_progress, on_wait: as in ``tune``.
        """
        self._started, self._limit = time.monotonic(), limit
        self._terms, self._path, self._allow_busy = terms, path, allow_busy
        self._on_progress, self._on_wait = on_progress, on_wait
        self._backends = terms.chosen()
        self._work = stakes.tasks(
            load, deployments, machine.current().id, heuristic.budget_of(threads),
            threads=settings.parse_threads(threads),
            is_settled=lambda key: key.problem.is_trivial or terms.are_met(self._known(key)),
        )  # fmt: skip
        self._threads = max(task.key.threads for task in self._work)
        keys = [task.key for task in self._work if not task.key.problem.is_trivial]
        self._new = [key for key in keys if terms.retune or self._known(key) is None]
        self._is_ready = allow_busy
        self._reports: list[LayerReport] = []

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._started

    def finish(self) -> tuple[LayerReport, ...]:
        """Tune, and return the reports in the order of the tasks."""
        if self._new and self._limit is None:
            self._be_ready()
            self._compile()
        for task, part in zip(self._work, stakes.parts(self._work), strict=True):
            left = self._left()
            report = self._tune(task, self._terms, None if left is None else max(0.0, left) * part)
            self._reports.append(report)
            if self._on_progress is not None:
                self._on_progress(report)
        self._race_disturbed_again()
        self._confirm()
        return tuple(self._reports)

    def _left(self) -> float | None:
        return None if self._limit is None else self._limit - self.seconds

    def _has_ended(self) -> bool:
        return (left := self._left()) is not None and left <= 0

    def _be_ready(self) -> None:
        """Wait once for a quiet moment, before the first race; refuse if there is none."""
        if not self._is_ready:
            seconds = busy.PATIENCE if self._limit is None else min(busy.PATIENCE, self._limit)
            busy.refuse_if_busy(self._threads, seconds, self._on_wait)
            self._is_ready = True

    def _tell(self, said: str) -> None:
        if self._on_wait is not None:
            self._on_wait(said)

    def _compile(self) -> None:
        """Compile what new problems' candidates lack, all at once: that takes less time than one after the other."""
        jobs = [
            compile_ahead.Job(key.problem, candidate)
            for key in self._new
            for candidate in (*entrants_of(key, self._terms.effort, self._backends)[0], *picks_of(key, self._backends))
        ]
        compile_ahead.kernels(jobs, self._tell)

    def _tune(self, task: Task, terms: Terms, seconds: float | None) -> LayerReport:
        known = self._known(task.key)
        report = layers.measure(task.layer, task.key, terms, seconds, known, ready=self._be_ready)
        if report.status == "tuned" and report.entry is not None:
            self._keep(report.entry)
        return report

    def _known(self, key: Key) -> Found | None:
        return next(iter(profile.find_in(self._path, key)), None)

    def _keep(self, entry: Entry) -> None:
        """Keep an entry for this process and in the profile file."""
        profile.remember(entry)
        profile_file.write(self._path, [entry], machine.current())

    def _race_disturbed_again(self) -> None:
        """Tune again what was disturbed, if there is a quiet moment now and as long as there is time."""
        disturbed = [number for number, report in enumerate(self._reports) if report.status == "tuned" and report.busy]
        if not disturbed or not self._is_quiet():
            return
        once = replace(self._terms, retune=False, again=())
        for number in disturbed:
            if not self._has_ended():
                second = self._tune(self._work[number], once, self._left())
                self._reports[number] = second if second.status == "tuned" else self._reports[number]

    def _is_quiet(self) -> bool:
        """Return whether there is a quiet moment before patience, or the time that is left, has run out."""
        patience, left = 0.0 if self._allow_busy else busy.PATIENCE, self._left()
        if left is not None and left <= 0:
            return False
        return busy.is_quiet(self._threads, patience if left is None else min(patience, left))

    def _confirm(self) -> None:
        """Ask winners again, as long as there is time."""
        doubts = self._doubts()
        if doubts:
            self._tell(f"racing {len(doubts)} winner{'s' * (len(doubts) > 1)} once more against who came close")
        for doubt in doubts:
            if self._has_ended():
                break
            after = problem_race.confirm(
                doubt.entry, doubt.candidates, doubt.picks, effort=self._terms.effort, seconds=self._left()
            )
            if after is not doubt.entry:
                self._keep(after)
                self._reports[doubt.number] = replace(self._reports[doubt.number], entry=after)

    def _doubts(self) -> list[_Doubt]:
        """Return whom others came close to: in new problems, in which everybody raced, where nothing disturbed it."""
        found = []
        for number, report in enumerate(self._reports):
            entry = report.entry
            if report.status == "tuned" and not report.busy and entry and entry.key in self._new:
                picks = picks_of(entry.key, self._backends)
                if candidates := contested(entry, picks, self._backends):
                    found.append(_Doubt(number, entry, candidates, picks))
        return found
