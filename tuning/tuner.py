"""The tuner: checks and races every candidate of a problem, and writes down who won and on what evidence."""

import functools
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from convdispatch import heuristic, machine, observe, profile, quarantine, registry, settings, transfer
from convdispatch.arguments import DEPLOYMENTS
from convdispatch.backend import Backend, Candidate, Effort
from convdispatch.errors import (
    ArgumentError,
    BackendError,
    BusyMachineError,
    ProfileError,
    ProfileWarning,
    in_a_line,
    warn,
)
from convdispatch.locks import module_lock
from convdispatch.problem import Problem
from convdispatch.profile import BUSY, Entry, Failure, Found, Key, Result
from convdispatch.settings import EFFORTS
from convdispatch.tuning import calibrate, compile_ahead, hard_inputs, isolation, stakes
from convdispatch.tuning import workload as workloads
from convdispatch.tuning.busy import Watch, wait_until_quiet
from convdispatch.tuning.clock import Clock, system_clock
from convdispatch.tuning.confirmation import confirmed, contested
from convdispatch.tuning.gate import trial
from convdispatch.tuning.preference import order_by_preference
from convdispatch.tuning.race import (
    RULES,
    Rules,
    Run,
    Samples,
    Standing,
    comparable_intervals,
    comparable_seconds,
    race,
    standings,
)
from convdispatch.tuning.rematch import Rematch, carry_on, known_versions, rematch, still_there
from convdispatch.tuning.session import session
from convdispatch.tuning.workload import Layer, Workload

Status = Literal["tuned", "known", "trivial", "left", "failed"]
#: Seconds that a tuning run waits for a busy machine to become quiet, before it refuses.
PATIENCE = 10.0
#: Makes what watches the machine for a thread budget; tests replace it.
make_watch: Callable[[int], Watch] = Watch
_LONGEST_REASON = 300
_one_at_a_time = module_lock()


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer and deployment of a workload.

    Attributes:
        layer: the layer.
        deployment: ``"plan"`` or ``"call"``.
        status: ``"tuned"`` now, ``"known"`` from the profile, ``"trivial"`` where there is nothing to compute,
            ``"left"`` when time ran out, or ``"failed"``.
        entry: the measurements, where there are any.
        left_out: candidates not measured, since they were estimated hopelessly slow.
        reason: why it failed.
        busy: what said that others used the machine meanwhile; the entry is flagged then.
    """

    layer: Layer
    deployment: str
    status: Status
    entry: Entry | None = None
    left_out: tuple[str, ...] = ()
    reason: str = ""
    busy: tuple[str, ...] = ()


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
        workload: a packaged workload's name, a YAML file, a problem or its text, a ``Workload``, what ``record``
            recorded, or several problems.
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
    limit = None if time_limit is None else settings.TABLE["time_limit"][0](time_limit)
    check_deployments(deployments)
    budget = heuristic.budget_of(threads)
    path = profile.writable_path()
    profile.write(path, (), machine.current())  # better to learn now than after a long run that it cannot be written
    chosen = chosen_backends(backends)
    again = quarantine.lift(chosen.values()) if retry_quarantined else ()
    isolation.forget([chosen[name] for name in again])
    started = time.monotonic()

    def is_settled(key: Key) -> bool:
        return key.problem.is_trivial or (not retune and _stands(_known(key, path), level, chosen, again))

    forced = settings.parse_threads(threads)
    work = stakes.tasks(load, deployments, machine.current().id, budget, threads=forced, is_settled=is_settled)
    reports = []
    most = max(task.key.threads for task in work)

    @functools.cache
    def ready() -> None:
        if not allow_busy:
            refuse_if_busy(most, PATIENCE if limit is None else min(PATIENCE, limit), on_wait)

    def left() -> float | None:
        return None if limit is None else limit - (time.monotonic() - started)

    new = [t.key for t in work if not t.key.problem.is_trivial and (retune or _known(t.key, path) is None)]
    tell = on_wait or (lambda _: None)
    if new and limit is None:
        ready()
        _compile_for(new, level, chosen, tell)
    for task, part in zip(work, stakes.parts(work), strict=True):
        still = left()
        share = None if still is None else max(0.0, still) * part
        report = _tune_layer(task.layer, task.key, level, share, chosen, path, ready, retune=retune, again=again)
        reports.append(report)
        if on_progress is not None:
            on_progress(report)
    disturbed = [number for number, report in enumerate(reports) if report.status == "tuned" and report.busy]
    if disturbed and _is_quiet(most, 0.0 if allow_busy else PATIENCE, left()):
        for number in disturbed:
            task, still = work[number], left()
            if still is None or still > 0:
                second = _tune_layer(task.layer, task.key, level, still, chosen, path, ready)
                reports[number] = second if second.status == "tuned" else reports[number]
    reports = _confirm_all(reports, new, level, chosen, left, path, tell)
    calibrate.learn((report.entry for report in reports if report.entry), path)
    return TuneReport(load, tuple(reports), path, time.monotonic() - started, budget, machine.current().id)


def _compile_for(
    keys: Iterable[Key], effort: Effort, backends: dict[str, Backend], on_wait: Callable[[str], None]
) -> None:
    """Compile what candidates for these keys lack, all at once: that takes less time than one key after the other."""
    jobs = [
        compile_ahead.Job(key.problem, candidate)
        for key in keys
        for candidate in (*_entrants(key, effort, backends)[0], *_picks(key, backends))
    ]
    compile_ahead.kernels(jobs, on_wait)


def checked_effort(effort: str) -> Effort:
    """Return the effort, an ``ArgumentError`` where there is none of this name."""
    if effort not in RULES:
        raise ArgumentError(f"effort must be one of {', '.join(RULES)}; got {effort!r}")
    return cast("Effort", effort)


def refuse_if_busy(threads: int, seconds: float, on_wait: Callable[[str], None] | None = None) -> None:
    """Wait for a quiet moment, for so many seconds; raise a ``BusyMachineError`` if there is none."""
    complaints = wait_until_quiet(lambda: make_watch(threads), seconds, on_wait or (lambda _: None))
    if complaints:
        raise BusyMachineError(
            f"the machine is busy: {', '.join(complaints)}. What is measured now may be wrong when it is quiet: "
            "try again then, or measure anyway with --allow-busy (allow_busy=True), which marks the results"
        )


def _is_quiet(threads: int, patience: float, left: float | None) -> bool:
    """Return whether there is a quiet moment before patience, or the time that is left, has run out."""
    if left is not None and left <= 0:
        return False
    seconds = patience if left is None else min(patience, left)
    return not wait_until_quiet(lambda: make_watch(threads), seconds, lambda _: None)


def check_deployments(deployments: Sequence[str]) -> None:
    """Raise an ``ArgumentError`` unless all of these are deployments."""
    for deployment in [deployments] if isinstance(deployments, str) else deployments:
        if deployment not in DEPLOYMENTS or isinstance(deployments, str):
            raise ArgumentError(f"deployments must be a list of {' or '.join(DEPLOYMENTS)}; got {deployment!r}")


def chosen_backends(names: Sequence[str] | None) -> dict[str, Backend]:
    """Return the backends of these names, all available ones for None."""
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
    ready: Callable[[], None],
    *,
    retune: bool = False,
    again: Sequence[str] = (),
) -> LayerReport:
    report = measure_layer(
        layer, key, effort, seconds, backends, _known(key, path), ready=ready, retune=retune, again=again
    )
    if report.status == "tuned" and report.entry is not None:
        _store(report.entry, path)
    return report


def measure_layer(
    layer: Layer,
    key: Key,
    effort: Effort,
    seconds: float | None,
    backends: dict[str, Backend],
    found: Found | None,
    *,
    ready: Callable[[], None] = lambda: None,
    retune: bool = False,
    again: Sequence[str] = (),
) -> LayerReport:
    """Measure a layer unless what is known of it suffices or no time is left; no entry is written anywhere.

    Args:
        layer, key: what to measure.
        effort: how hard to look.
        seconds: most time the race may take, if any.
        backends: who takes part.
        found: what is known of it, here or from a machine much like this one.
        ready: called before something is measured; it may refuse by raising.
        retune: whether to measure again what is known.
        again: backends out of quarantine, which are measured again where they failed.
    """
    known = found.entry if found is not None else None
    if key.problem.is_trivial:
        return LayerReport(layer, key.deployment, "trivial")
    if not retune and _stands(found, effort, backends, again):
        return LayerReport(layer, key.deployment, "known", known)
    if seconds is not None and seconds <= 0:
        return LayerReport(layer, key.deployment, "left", known)
    ready()
    try:
        outcome = tune_problem(
            key, effort=effort, seconds=seconds, backends=backends, incumbent=known,
            sparing=not retune and not _failed(known, again),
        )  # fmt: skip
    except BackendError as error:
        return LayerReport(layer, key.deployment, "failed", known, reason=str(error))
    return LayerReport(layer, key.deployment, "tuned", outcome.entry, outcome.left_out, busy=outcome.busy)


def _confirm_all(
    reports: Sequence[LayerReport], new: Container[Key], effort: Effort, backends: dict[str, Backend],
    left: Callable[[], float | None], path: Path, on_wait: Callable[[str], None],
) -> list[LayerReport]:  # fmt: skip
    """Return the reports after winners were asked again, as long as there is time.

    That is of ``new`` problems, in which everybody raced, where nothing disturbed it.
    """
    found, asked = list(reports), list[tuple[int, Entry, list[Candidate], list[Candidate]]]()
    for number, report in enumerate(reports):
        entry = report.entry
        if report.status == "tuned" and not report.busy and entry and entry.key in new:
            picks = _picks(entry.key, backends)
            if candidates := contested(entry, picks, backends):
                asked.append((number, entry, candidates, picks))
    if asked:
        on_wait(f"racing {len(asked)} winner{'s' * (len(asked) > 1)} once more against who came close")
    for number, entry, candidates, picks in asked:
        still = left()
        if still is not None and still <= 0:
            break
        after = confirm(entry, candidates, picks, effort=effort, seconds=still)
        if after is not entry:
            _store(after, path)
            found[number] = replace(found[number], entry=after)
    return found


def _store(entry: Entry, path: Path) -> None:
    """Keep an entry for this process and in the profile file."""
    profile.remember(entry)
    profile.write(path, [entry], machine.current())


def _known(key: Key, path: Path) -> Found | None:
    return next(iter(profile.find_in(path, key)), None)


def _stands(found: Found | None, effort: Effort, backends: dict[str, Backend], again: Sequence[str]) -> bool:
    """Return whether what the profile has is for just this key and nothing is to be measured anew."""
    if found is None or not found.exact or found.entry.is_busy or _failed(found.entry, again):
        return False
    return suffices(found.entry, effort, backends)


def _failed(entry: Entry | None, again: Sequence[str]) -> bool:
    """Return whether one of the backends that are to be tried again failed in an entry."""
    return entry is not None and any(failure.backend in again for failure in entry.failures)


def suffices(entry: Entry, effort: Effort, backends: dict[str, Backend]) -> bool:
    """Return whether an old entry answers the question: same effort or higher, every backend as it is now."""
    if EFFORTS.index(entry.effort) < EFFORTS.index(effort):
        return False
    winner = registry.available().get(entry.winner.backend)
    if winner is None or winner.version != entry.winner.version:
        return False
    versions = known_versions(entry)
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
    """A problem's new entry, the candidates that were not measured, and what said that the machine was busy."""

    entry: Entry
    left_out: tuple[str, ...]
    busy: tuple[str, ...] = ()


def _entrants(key: Key, effort: Effort, backends: dict[str, Backend]) -> tuple[list[Candidate], tuple[str, ...]]:
    """Return the candidates to measure, and the names of those estimated hopelessly slow."""
    free = replace(settings.current(), forbid=(), accuracy="fast", memory_limit=None)
    fit = [b for name, b in heuristic.usable(key.problem, free)[0].items() if name in backends]
    raced, hopeless = heuristic.worth_measuring(heuristic.rank(key.problem, fit, key.threads, effort), effort)
    return raced, tuple(estimate.candidate.name for estimate in hopeless)


def _picks(key: Key, backends: dict[str, Backend]) -> list[Candidate]:
    """Return whom estimates would choose without tuning; empty where they cannot tell.

    First the backends' own estimates' pick, which is the same in every run; then that of ``dispatch``, which goes by
    what was tuned before, too.
    """
    free = replace(settings.current(), forbid=(), accuracy="standard", memory_limit=None)
    usable = heuristic.usable(key.problem, free)[0]
    fit = [b for name, b in usable.items() if name in backends and heuristic.accurate_by_kind(b, free)]
    ranked = (
        heuristic.rank(key.problem, fit, key.threads),
        transfer.rank(key.problem, fit, key.threads, key.deployment).estimates,
    )
    best = [estimates[0] for estimates in ranked if estimates and estimates[0].seconds is not None]
    return list({estimate.candidate.name: estimate.candidate for estimate in best}.values())


def predicted(result: Result, key: Key) -> float | None:
    """Return what a result's backend estimates by itself, or None if it cannot tell."""
    backend = registry.get(result.backend)
    try:
        return Candidate(backend, result.config).estimate(key.problem, machine.current())
    except (Exception, SystemExit):  # noqa: BLE001  # a backend that cannot estimate has still been measured
        return None


@dataclass(frozen=True)
class _Measured:
    """What became of a problem's candidates, and what said that the machine was busy meanwhile."""

    results: list[Result]
    failures: list[Failure]
    standings: dict[str, Standing]
    busy: tuple[str, ...]


def tune_problem(
    key: Key,
    *,
    effort: Effort = "measure",
    seconds: float | None = None,
    backends: dict[str, Backend] | None = None,
    incumbent: Entry | None = None,
    sparing: bool = False,
    clock: Clock = system_clock,
    rules: Rules | None = None,
) -> Outcome:
    """Check and race the candidates of one problem.

    What estimates would pick and the old winner always take part; ``preference`` has the rule by which one wins. A race
    that others disturbed is run again, twice as long; if they disturb that too, the entry is flagged.

    Args:
        key: the problem, deployment, thread budget and machine.
        effort: how many candidates and rounds.
        seconds: most time the race may take, after the checks; it has three rounds in any case.
        backends: who takes part; all available ones where None.
        incumbent: the old entry, whose winner takes part too, and is preferred in a tie.
        sparing: whether candidates that lost in an old entry that still holds are not raced again.
        clock: tells the time; tests pass their own.
        rules: how to race; those of the effort where None.

    Returns:
        The entry, winner first. Candidates that raised or were wrong are its failures.

    Raises:
        BackendError: if no candidate was right.
    """
    taking_part = registry.available() if backends is None else backends
    entrants, left_out = _entrants(key, effort, taking_part)
    picks = _picks(key, taking_part)
    entrants += picks
    again = rematch(key, effort, entrants, incumbent, picks) if sparing else None
    old_winner = incumbent.winner.name if incumbent else ""
    entrants += [old for old in still_there(incumbent) if old.name == old_winner and old.backend.name in taking_part]
    rules = rules or RULES[effort]
    measured, again = _raced(key, entrants, again, rules, clock, seconds)
    if not measured.results:
        said = "; ".join(f"{failure.name}: {failure.reason}" for failure in measured.failures)
        said = said or _nobody(key.problem, taking_part)
        raise BackendError(f"no candidate could do {key.problem}: {said}")
    ordered = _ordered(measured, picks, incumbent, rules.margin)
    entry = Entry(key, tuple(ordered), tuple(measured.failures), effort, flags=(BUSY,) if measured.busy else ())
    if incumbent is not None and (again is not None or incumbent.key == key):
        able = {name for name, backend in taking_part.items() if quarantine.of(backend) is None}
        entry = carry_on(entry, incumbent, renewed=able if again is None else ())
    return Outcome(entry, left_out, measured.busy)


def confirm(
    entry: Entry,
    candidates: Sequence[Candidate],
    picks: Sequence[Candidate],
    *,
    effort: Effort = "measure",
    seconds: float | None = None,
    clock: Clock = system_clock,
    rules: Rules | None = None,
) -> Entry:
    """Return a problem's entry after its winner raced once more against some others; see ``confirmation``.

    Args:
        entry: what ``tune_problem`` has measured.
        candidates: who races, the winner first.
        picks: who would be used without tuning.
        effort, seconds, clock, rules: as there.
    """
    rules, key = rules or RULES[effort], entry.key

    def again(candidates: Sequence[Candidate]) -> Sequence[Result]:
        arrays, runners = trial(key.problem), dict[str, Run]()
        with _one_at_a_time, settings.options(tuning="off"), observe.unwatched():
            for candidate in candidates:
                try:
                    plan = arrays.plan(candidate)
                    plan.complete()
                except (Exception, SystemExit):  # noqa: BLE001  # it did well before: nothing is learnt of its time
                    return ()
                runners[candidate.name] = arrays.runner(plan, key.deployment)
            table, busy = _race_in_quiet(runners, rules, clock, key.threads, seconds, on_failure=lambda *_: None)
        if busy or not table:
            return ()
        measured = _Measured(_timed(entry.results, table), [], standings(table), busy)
        return _ordered(measured, picks, entry, rules.margin)

    return confirmed(entry, candidates, again)


def _raced(
    key: Key, entrants: Sequence[Candidate], again: Rematch | None, rules: Rules, clock: Clock, seconds: float | None
) -> tuple[_Measured, Rematch | None]:
    """Check and race who must race again, or everybody; return what came of it, and the rematch if it holds."""
    refused: list[Failure] = []
    # Two races at once would time each other; and a backend may itself convolve, which must not start a race.
    with _one_at_a_time, settings.options(tuning="off"), observe.unwatched():
        if again is not None:
            fit, refused = isolation.admitted(key.problem, again.entrants)
            measured = _measure(key, fit, rules, clock, seconds)
            if again.holds(measured.results):
                return replace(measured, failures=[*refused, *measured.failures]), again
        fit, also_refused = isolation.admitted(key.problem, entrants)
        measured = _measure(key, fit, rules, clock, seconds)
    refused = list(dict.fromkeys((*refused, *also_refused)))
    return replace(measured, failures=[*refused, *measured.failures]), None


def _ordered(measured: _Measured, picks: Sequence[Candidate], incumbent: Entry | None, margin: float) -> list[Result]:
    """Return the results with the winner first, the others by time."""
    results = measured.results
    contenders = _on_all_threads(results, picks) if measured.busy else results
    winner = order_by_preference(
        contenders,
        incumbent.winner.name if incumbent else None,
        picks=[candidate.name for candidate in picks],
        standings=measured.standings if contenders == results else None,
        margin=margin,
    )[0]
    return [winner, *sorted((row for row in results if row is not winner), key=lambda row: row.median)]


def _on_all_threads(results: list[Result], picks: Sequence[Candidate]) -> list[Result]:
    """Return who may win on a busy machine: nobody with fewer threads than the pick.

    A core that others take makes all slow who use it. It will be back; a winner that does without it would stay.
    """
    least = picks[0].config.threads if picks else 1
    return [row for row in results if row.config.threads >= least] or results


def _nobody(problem: Problem, backends: dict[str, Backend]) -> str:
    """Return why none of the backends takes part."""
    held = [str(kept) for backend in backends.values() if (kept := quarantine.of(backend)) is not None]
    refusals = {name: heuristic.refusal(backend, problem) for name, backend in backends.items()}
    said = [f"{name}: {reason}" for name, reason in refusals.items() if reason]
    return "; ".join(held or said) or "no backend takes it"


def _measure(
    key: Key, entrants: Sequence[Candidate], rules: Rules, clock: Clock, seconds: float | None = None
) -> _Measured:
    arrays = trial(key.problem)
    failures: list[Failure] = []
    checked: dict[str, tuple[float, int]] = {}
    runners: dict[str, Run] = {}
    by_name = {candidate.name: candidate for candidate in entrants}

    def fail(name: str, reason: str) -> None:
        candidate = by_name[name]
        reason = in_a_line(reason, _LONGEST_REASON)
        failures.append(Failure(candidate.backend.name, candidate.backend.version, candidate.config, reason))

    ready = {candidate.name: plan for candidate, plan in compile_ahead.plans(arrays, by_name.values())}
    for name, candidate in by_name.items():
        try:
            plan = ready.get(name) or arrays.plan(candidate)
            plan.complete()  # nothing is to be compiled in a race
            out = plan(arrays.input, out=arrays.spoiled_output(), residual=arrays.residual)
            verdict = hard_inputs.worse(arrays.judge(candidate, out), candidate, key.problem)
            workspace = candidate.workspace(key.problem)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a backend raises, the others go on
            fail(name, f"{type(error).__name__}: {error}")
            continue
        if verdict.reason is not None:
            fail(name, f"wrong result: {verdict.reason}")
            continue
        checked[name] = verdict.error, workspace
        runners[name] = arrays.runner(plan, key.deployment)
    table, busy = _race_in_quiet(
        runners, rules, clock, key.threads, seconds,
        on_failure=lambda name, error: fail(name, f"{type(error).__name__}: {error}"),
    )  # fmt: skip
    found = [
        Result(by_name[name].backend.name, by_name[name].backend.version, by_name[name].config, 0.0, 0.0, 0, *said)
        for name, said in checked.items()
    ]
    results = [replace(row, estimate=predicted(row, key)) for row in _timed(found, table)]
    return _Measured(results, failures, standings(table), busy)


def _timed(rows: Iterable[Result], table: Mapping[str, Samples]) -> list[Result]:
    """Return the rows of those who ran to their end, with their times."""
    times, intervals = comparable_seconds(table), comparable_intervals(table)
    return [
        replace(
            row, median=times[row.name], spread=table[row.name].spread, rounds=len(table[row.name].seconds),
            interval=intervals[row.name],
        )
        for row in rows
        if row.name in table
    ]  # fmt: skip


def _race_in_quiet(
    runners: Mapping[str, Run],
    rules: Rules,
    clock: Clock,
    threads: int,
    seconds: float | None,
    on_failure: Callable[[str, Exception], None],
) -> tuple[dict[str, Samples], tuple[str, ...]]:
    """Race, once more and longer if others disturb it; return the times, and what said that the machine was busy."""
    began = clock()
    table: dict[str, Samples] = {}
    busy: tuple[str, ...] = ()
    for times in (1, 2):
        most = times * rules.race_seconds
        left = most if seconds is None else min(most, seconds - (clock() - began))
        if table and left <= 0:
            break
        watch = make_watch(threads)
        watch.start()
        now = replace(rules, rounds=times * rules.rounds, race_seconds=left)
        table = race(runners, now, clock, called=True, on_failure=on_failure, on_round=watch.glance)
        busy = tuple(watch.finish().complaints())
        if not busy:
            break
        runners = {name: runners[name] for name in table}
    return table, busy


def rivals(entry: Entry) -> Iterator[tuple[str, float]]:
    """Yield each backend of an entry with its best time over the winner's, the winner's own first.

    A winner too fast for the clock has no time that another could be over.
    """
    if not entry.winner.median:
        yield entry.winner.backend, 1.0
        return
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
        warn(f"what tuning learnt is kept for this process only: {error}", ProfileWarning)
