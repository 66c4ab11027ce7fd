"""Checks and races the candidates of one problem, and says who won and on what evidence."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from convdispatch import machine, observe, quarantine, registry, settings
from convdispatch.backend import Backend, Candidate, Effort
from convdispatch.errors import LONGEST_REASON, BackendError, in_a_line
from convdispatch.locks import module_lock
from convdispatch.profile import BUSY, Entry, Failure, Key, Result
from convdispatch.tuning import busy, compile_ahead, hard_inputs, isolation
from convdispatch.tuning.clock import Clock, system_clock
from convdispatch.tuning.confirmation import confirmed
from convdispatch.tuning.entrants import entrants_of, picks_of, why_nobody
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
from convdispatch.tuning.rematch import Rematch, carry_on, rematch, still_there

_one_at_a_time = module_lock()


@dataclass(frozen=True)
class Outcome:
    """A problem's new entry, the candidates that were not measured, and what said that the machine was busy."""

    entry: Entry
    left_out: tuple[str, ...]
    busy: tuple[str, ...] = ()


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
    entrants, left_out = entrants_of(key, effort, taking_part)
    picks = picks_of(key, taking_part)
    entrants += picks
    again = rematch(key, effort, entrants, incumbent, picks) if sparing else None
    old_winner = incumbent.winner.name if incumbent else ""
    entrants += [old for old in still_there(incumbent) if old.name == old_winner and old.backend.name in taking_part]
    rules = rules or RULES[effort]
    measured, again = _raced(key, entrants, again, rules, clock, seconds)
    if not measured.results:
        said = "; ".join(f"{failure.name}: {failure.reason}" for failure in measured.failures)
        said = said or why_nobody(key.problem, taking_part)
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
            table, complaints = _race_in_quiet(runners, rules, clock, key.threads, seconds, on_failure=lambda *_: None)
        if complaints or not table:
            return ()
        measured = _Measured(_timed(entry.results, table), [], standings(table), complaints)
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
        reason = in_a_line(reason, LONGEST_REASON)
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
    table, complaints = _race_in_quiet(
        runners, rules, clock, key.threads, seconds,
        on_failure=lambda name, error: fail(name, f"{type(error).__name__}: {error}"),
    )  # fmt: skip
    found = [
        Result(by_name[name].backend.name, by_name[name].backend.version, by_name[name].config, 0.0, 0.0, 0, *said)
        for name, said in checked.items()
    ]
    results = [replace(row, estimate=_predicted(row, key)) for row in _timed(found, table)]
    return _Measured(results, failures, standings(table), complaints)


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
    complaints: tuple[str, ...] = ()
    for times in (1, 2):
        most = times * rules.race_seconds
        left = most if seconds is None else min(most, seconds - (clock() - began))
        if table and left <= 0:
            break
        watch = busy.make_watch(threads)
        watch.start()
        now = replace(rules, rounds=times * rules.rounds, race_seconds=left)
        table = race(runners, now, clock, called=True, on_failure=on_failure, on_round=watch.glance)
        complaints = tuple(watch.finish().complaints())
        if not complaints:
            break
        runners = {name: runners[name] for name in table}
    return table, complaints


def _predicted(result: Result, key: Key) -> float | None:
    """Return what a result's backend estimates by itself, or None if it cannot tell."""
    backend = registry.get(result.backend)
    try:
        return Candidate(backend, result.config).estimate(key.problem, machine.current())
    except (Exception, SystemExit):  # noqa: BLE001  # a backend that cannot estimate has still been measured
        return None
