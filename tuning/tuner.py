"""The tuner: checks and races every candidate of a problem, and writes down who won and on what evidence."""

import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from convdispatch import heuristic, machine, profile, registry, settings, transfer
from convdispatch.arguments import Array
from convdispatch.backend import Backend, Candidate, Effort
from convdispatch.errors import ArgumentError, BackendError, ProfileError, ProfileWarning
from convdispatch.plan import Plan
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Failure, Key, Result
from convdispatch.settings import EFFORTS
from convdispatch.tuning import calibrate
from convdispatch.tuning import workload as workloads
from convdispatch.tuning.clock import Clock, system_clock
from convdispatch.tuning.gate import Trial, trial
from convdispatch.tuning.race import RULES, Rules, Run, comparable_seconds, race
from convdispatch.tuning.workload import Layer, Workload

Status = Literal["tuned", "known", "left", "failed"]
#: Candidates this close in time are equal; the preference order decides between them.
TIE_MARGIN = 0.01
_LONGEST_REASON = 300
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer and deployment of a workload.

    Attributes:
        layer: the layer.
        deployment: ``"plan"`` or ``"call"``.
        status: ``"tuned"`` now, ``"known"`` from the profile, ``"left"`` when time ran out, or ``"failed"``.
        entry: the measurements, where there are any.
        left_out: candidates not measured, since they were estimated hopelessly slow.
        reason: why it failed.
    """

    layer: Layer
    deployment: str
    status: Status
    entry: Entry | None = None
    left_out: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class TuneReport:
    """What a tuning run did.

    Attributes:
        workload: what was tuned.
        layers: one report for each distinct problem and deployment, in the workload's order.
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
        """Whether every layer has a winner."""
        return all(report.status in {"tuned", "known"} for report in self.layers)


def tune(
    workload: str | Path | Problem | Workload | Sequence[Any],
    *,
    effort: str = "measure",
    time_limit: float | None = None,
    threads: int | None = None,
    backends: Sequence[str] | None = None,
    deployments: Sequence[str] = profile.DEPLOYMENTS,
    retune: bool = False,
    on_progress: Callable[[LayerReport], None] | None = None,
) -> TuneReport:
    """Measure which backend is fastest for each problem of a workload, and keep the winners in the profile.

    Each problem is stored as soon as it is decided, so that an interrupted run keeps what it has measured; the
    next run takes what the profile knows (at this effort or a higher one) and goes on with the rest.

    Args:
        workload: a packaged workload's name, a YAML file, a problem or its text, a ``Workload``, or several
            problems.
        effort: ``"measure"``, ``"patient"`` or ``"exhaustive"``.
        time_limit: seconds for the whole run; what it leaves undone is reported as left.
        threads: most threads a candidate may use; the option ``threads`` where None.
        backends: names of the backends that take part; all where None.
        deployments: ``"plan"`` (filters packed before), ``"call"`` (packed in every call), or both.
        retune: whether to measure again what the profile knows.
        on_progress: called with each layer's report as soon as there is one.

    Returns:
        A report with an entry for each distinct problem and deployment.

    Raises:
        WorkloadError: if the workload cannot be understood.
        UnknownBackendError: for a name in ``backends`` that there is not.
        ProfileError: if the profile cannot be written; nothing has been measured then.
    """
    load = workloads.load(workload).distinct()
    level = _checked_effort(effort)
    limit = None if time_limit is None else settings.TABLE["time_limit"][0](time_limit)
    for deployment in deployments:
        if deployment not in profile.DEPLOYMENTS:
            raise ArgumentError(f"deployments must be of {', '.join(profile.DEPLOYMENTS)}; got {deployment!r}")
    budget = settings.parse_threads(threads) or heuristic.thread_budget(settings.current())
    path = profile.writable_path()
    profile.write(path, (), machine.current())  # better to learn now than after a long run that it cannot be written
    chosen = _chosen(backends)
    started = time.monotonic()
    work = [(layer, deployment) for layer in load.layers for deployment in deployments]
    reports = []
    for number, (layer, deployment) in enumerate(work):
        left = None if limit is None else limit - (time.monotonic() - started)
        share = None if left is None else max(0.0, left) / (len(work) - number)
        key = Key(layer.problem, deployment, budget, machine.current().id)
        report = _tune_layer(layer, key, level, share, chosen, path, retune=retune)
        reports.append(report)
        if on_progress is not None:
            on_progress(report)
    calibrate.learn((report.entry for report in reports if report.entry), path)
    return TuneReport(load, tuple(reports), path, time.monotonic() - started, budget, machine.current().id)


def _checked_effort(effort: str) -> Effort:
    if effort not in RULES:
        raise ArgumentError(f"effort must be one of {', '.join(RULES)}; got {effort!r}")
    return cast("Effort", effort)


def _chosen(names: Sequence[str] | None) -> dict[str, Backend]:
    if names is None:
        return registry.available()
    if isinstance(names, str) or not names:
        raise ArgumentError(f"backends must be a list of names; got {names!r}")
    return {name: registry.get(name) for name in names}


def _tune_layer(
    layer: Layer,
    key: Key,
    effort: Effort,
    seconds: float | None,
    backends: dict[str, Backend],
    path: Path,
    *,
    retune: bool,
) -> LayerReport:
    known = _known(key, path)
    if known is not None and not retune and suffices(known, effort, backends):
        return LayerReport(layer, key.deployment, "known", known)
    if seconds is not None and seconds <= 0:
        return LayerReport(layer, key.deployment, "left", known)
    try:
        outcome = tune_problem(key, effort=effort, seconds=seconds, backends=backends, incumbent=known)
    except BackendError as error:
        return LayerReport(layer, key.deployment, "failed", known, reason=str(error))
    profile.remember(outcome.entry)
    profile.write(path, [outcome.entry], machine.current())
    return LayerReport(layer, key.deployment, "tuned", outcome.entry, outcome.left_out)


def _known(key: Key, path: Path) -> Entry | None:
    try:
        return profile.read(path).get(key)
    except ProfileError:
        return None


def suffices(entry: Entry, effort: Effort, backends: dict[str, Backend]) -> bool:
    """Return whether an old entry answers the question: same effort or higher, every backend as it is now."""
    if EFFORTS.index(entry.effort) < EFFORTS.index(effort):
        return False
    versions = {row.backend: row.version for row in entry.results} | {
        row.backend: row.version for row in entry.failures
    }
    return all(
        versions.get(name, backend.version) == backend.version
        and (name in versions or not _would_race(backend, entry.key, effort))
        for name, backend in backends.items()
    ) and any(row.backend in backends for row in entry.results)


def _would_race(backend: Backend, key: Key, effort: Effort) -> bool:
    """Return whether a backend that an entry does not know would be measured for its problem."""
    raced = _entrants(key, effort, registry.available())[0]
    return any(candidate.backend is backend for candidate in raced)


@dataclass(frozen=True)
class Outcome:
    """A problem's new entry, and the candidates that were not measured."""

    entry: Entry
    left_out: tuple[str, ...]


def _entrants(key: Key, effort: Effort, backends: dict[str, Backend]) -> tuple[list[Candidate], tuple[str, ...]]:
    """Return the candidates to measure, and the names of those estimated hopelessly slow."""
    free = replace(settings.current(), forbid=(), accuracy="fast", memory_limit=None)
    fit = [b for name, b in heuristic.usable(key.problem, free)[0].items() if name in backends]
    raced, hopeless = heuristic.worth_measuring(heuristic.rank(key.problem, fit, key.threads, effort), effort)
    return raced, tuple(estimate.candidate.name for estimate in hopeless)


def tune_problem(
    key: Key,
    *,
    effort: Effort = "measure",
    seconds: float | None = None,
    backends: dict[str, Backend] | None = None,
    incumbent: Entry | None = None,
    clock: Clock = system_clock,
    rules: Rules | None = None,
) -> Outcome:
    """Check and race the candidates of one problem.

    Args:
        key: the problem, deployment, thread budget and machine.
        effort: how many candidates and rounds.
        seconds: most time the race may take.
        backends: who takes part; all available ones where None.
        incumbent: the old entry, whose winner takes part too, and is preferred in a tie.
        clock: tells the time; tests pass their own.
        rules: how to race; those of the effort where None.

    Returns:
        The entry, winner first. Candidates that raised or were wrong are its failures.

    Raises:
        BackendError: if no candidate was right.
    """
    entrants, left_out = _entrants(key, effort, registry.available() if backends is None else backends)
    # What an untuned call would run, always: tuning must not do worse than that.
    entrants += [pick for pick in _pick(key, backends) if pick.name not in {each.name for each in entrants}]
    entrants += [old for old in _still_there(incumbent) if incumbent and old.name == incumbent.winner.name]
    rules = rules or RULES[effort]
    if seconds is not None:
        rules = replace(rules, race_seconds=min(rules.race_seconds, seconds))
    # Two races at once would time each other; and a backend may itself convolve, which must not start a race.
    with _one_at_a_time, settings.options(tuning="off"):
        results, failures = _measure(key, entrants, rules, clock)
    results = [replace(row, estimate=predicted(row, key)) for row in results]
    if not results:
        said = "; ".join(f"{failure.name}: {failure.reason}" for failure in failures) or "no backend takes it"
        raise BackendError(f"no candidate could do {key.problem}: {said}")
    ordered = order_by_preference(results, incumbent.winner.name if incumbent else None)
    if backends is not None and incumbent is not None:  # those who did not take part keep what they have
        there = {old.name for old in _still_there(incumbent)}
        seen = {result.name for result in results} | {failure.name for failure in failures}
        ordered += [result for result in incumbent.results if result.name in there - seen]
    return Outcome(Entry(key, tuple(ordered), tuple(failures), effort), left_out)


def _pick(key: Key, backends: dict[str, Backend] | None) -> list[Candidate]:
    """Return the candidate that would be chosen without measuring, if one would be."""
    fit, _ = heuristic.usable(key.problem, settings.current())
    allowed = [backend for name, backend in fit.items() if backends is None or name in backends]
    ranked = transfer.rank(key.problem, allowed, key.threads, key.deployment).estimates
    return [estimate.candidate for estimate in ranked[:1] if estimate.seconds is not None]


def predicted(result: Result, key: Key) -> float | None:
    """Return what a result's backend estimates by itself, or None if it cannot tell."""
    backend = registry.get(result.backend)
    try:
        return Candidate(backend, result.config).estimate(key.problem, machine.current())
    except Exception:  # noqa: BLE001  # a backend that cannot estimate has still been measured
        return None


def _still_there(entry: Entry | None) -> list[Candidate]:
    """Return an old entry's candidates whose backends are as they were when measured."""
    now = registry.available()
    return [
        Candidate(now[row.backend], row.config)
        for row in (entry.results if entry else ())
        if row.backend in now and now[row.backend].version == row.version
    ]


def _measure(key: Key, entrants: Sequence[Candidate], rules: Rules, clock: Clock) -> tuple[list[Result], list[Failure]]:
    arrays = trial(key.problem)
    failures: list[Failure] = []
    checked: dict[str, tuple[float, int]] = {}
    runners: dict[str, Run] = {}
    by_name = {candidate.name: candidate for candidate in entrants}

    def fail(name: str, reason: str) -> None:
        candidate = by_name[name]
        reason = textwrap.shorten(reason, _LONGEST_REASON, placeholder=" ...")
        failures.append(Failure(candidate.backend.name, candidate.backend.version, candidate.config, reason))

    for name, candidate in by_name.items():
        try:
            plan = arrays.plan(candidate)
            out = plan(arrays.input, out=arrays.spoiled_output(), residual=arrays.residual)
            verdict = arrays.judge(candidate, out)
            workspace = candidate.workspace(key.problem)
        except Exception as error:  # noqa: BLE001  # whatever a backend raises, the others go on
            fail(name, f"{type(error).__name__}: {error}")
            continue
        if verdict.reason is not None:
            fail(name, f"wrong result: {verdict.reason}")
            continue
        checked[name] = verdict.error, workspace
        runners[name] = _runner(key, candidate, plan, arrays, out)
    table = race(
        runners,
        rules,
        clock,
        on_failure=lambda name, error: fail(name, f"{type(error).__name__}: {error}"),
    )
    seconds = comparable_seconds(table)
    results = [
        Result(
            by_name[name].backend.name, by_name[name].backend.version, by_name[name].config, seconds[name],
            samples.spread, len(samples.seconds), *checked[name],
        )
        for name, samples in table.items()
    ]  # fmt: skip
    return results, failures


def _runner(key: Key, candidate: Candidate, plan: Plan, arrays: Trial, out: Array) -> Run:
    """Return what is timed: a plan's call, or the making of a plan and its call."""
    if key.deployment == "call":
        return lambda: arrays.plan(candidate)(arrays.input, residual=arrays.residual)
    return lambda: plan(arrays.input, out=out, residual=arrays.residual)


def order_by_preference(results: Sequence[Result], incumbent: str | None) -> list[Result]:
    """Return results by time, but the first chosen among those within the tie margin of the fastest.

    Between equals the order is: the incumbent, the smaller error, the smaller workspace, the name. So noise
    cannot flip a choice back and forth. Who left the race early cannot win.
    """
    by_time = sorted(results, key=lambda result: (result.median, result.name))
    rounds = max(result.rounds for result in results)
    finishers = [result for result in by_time if result.rounds == rounds]
    limit = finishers[0].median * (1 + TIE_MARGIN)
    equals = [result for result in finishers if result.median <= limit]
    winner = min(equals, key=lambda r: (r.name != incumbent, r.error, r.workspace, r.name))
    return [winner, *(result for result in by_time if result is not winner)]


def rivals(entry: Entry) -> Iterator[tuple[str, float]]:
    """Yield each backend of an entry with its best time over the winner's, the winner's own first."""
    seen = set()
    for result in sorted(entry.results, key=lambda result: result.median):
        if result.backend not in seen:
            seen.add(result.backend)
            yield result.backend, result.median / entry.winner.median


def keep(entry: Entry) -> None:
    """Keep an entry for this process, and in the profile file if that can be written."""
    profile.remember(entry)
    try:
        profile.write(profile.writable_path(), [entry], machine.current())
    except ProfileError as error:
        warnings.warn(f"what tuning learnt is kept for this process only: {error}", ProfileWarning, stacklevel=2)
