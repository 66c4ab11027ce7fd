"""Validation: what choices cost against an exhaustive oracle, how far two tunes agree, and whether replay is true.

Everything happens in profiles of its own, made and thrown away; the user's stays as it is.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from convdispatch import calibration, heuristic, machine, observe, profile, profile_file, quarantine, registry, settings
from convdispatch.backend import Candidate, Effort
from convdispatch.calibration import Calibration
from convdispatch.errors import ConvDispatchError
from convdispatch.plan import Evidence
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Key
from convdispatch.tuning import calibrate, problem_race, regret, tuner
from convdispatch.tuning.clock import Clock, system_clock
from convdispatch.tuning.race import Rules
from convdispatch.tuning.session import session
from convdispatch.tuning.validation import WAYS, Case, Cost, Validation, Way
from convdispatch.tuning.workload import Layer, Workload

_ORACLE = Rules(rounds=31, sample_seconds=0.005, race_seconds=5.0, drop=1.5, drop_after=5)
_DUEL = Rules(rounds=41, sample_seconds=0.005, race_seconds=5.0, drop=float("inf"))


class Chosen(Protocol):
    """What a decision says, as far as it matters here."""

    @property
    def candidate(self) -> Candidate:
        """What was chosen."""
        ...

    @property
    def evidence(self) -> Evidence:
        """Why."""
        ...


#: Decides about a problem and a deployment under the options and the profile in force.
Decide = Callable[[Problem, str], Chosen]


def _quiet() -> str:
    return ""


@dataclass
class _Setting:
    """What a validation's steps share."""

    decide: Decide
    threads: int
    deployment: str
    effort: Effort
    seconds: float
    clock: Clock
    oracle: Rules
    duel: Rules
    folder: Path
    failed: dict[str, str] = field(default_factory=dict)

    def key(self, problem: Problem) -> Key:
        return Key(problem, self.deployment, self.threads, machine.current().id)

    def rules(self, rules: Rules) -> Rules:
        return replace(rules, race_seconds=min(self.seconds, rules.race_seconds))


def validate(
    problems: Sequence[Problem],
    decide: Decide,
    *,
    workload: str | None = None,
    seed: int = 0,
    effort: Effort = "measure",
    deployment: str = "plan",
    threads: int | None = None,
    seconds: float = 5.0,
    clock: Clock = system_clock,
    oracle: Rules = _ORACLE,
    duel: Rules = _DUEL,
    conditions: Callable[[], str] = _quiet,
    on_progress: Callable[[str], None] | None = None,
) -> Validation:
    """Try choices on problems: by estimates, by estimates of held-out problems, by tuning twice.

    Each problem's candidates, all of them, race against each other: the fastest is the champion. What each way
    chooses then runs against the champion in a final duel, interleaved, and regret is the ratio there, so that luck
    in the first race is nobody's merit. Held out means: chosen with a profile that has every other problem.

    Args:
        problems: what to try on.
        decide: what is tried, ``dispatch.decide``, which stands a floor above.
        workload, seed: where they are from; kept in the result.
        effort, deployment: of the tunes.
        threads: most threads a candidate may use; the option ``threads`` where None.
        seconds: most time of one oracle's race, and of one duel.
        clock: tells the time; tests pass their own.
        oracle, duel: rules of the two races.
        conditions: asked after each problem; returns what says that the machine was busy meanwhile, or nothing.
        on_progress: told of each step when it is done: calibration, two tunes, then each problem.

    Raises:
        BackendError: if no candidate can be measured at all.
        ProfileError: if there is no room for the profiles.
    """
    started = time.monotonic()
    budget = heuristic.budget_of(threads)
    say = on_progress or (lambda said: None)  # noqa: ARG005
    load = Workload(workload or "held-out", tuple(Layer(problem) for problem in problems)).distinct()
    with tempfile.TemporaryDirectory(prefix="convdispatch-validate-") as folder:
        how = _Setting(decide, budget, deployment, effort, seconds, clock, oracle, duel, Path(folder))
        with _apart(), settings.options(threads=budget, tuning="off"):
            calibrated, calibrating = _calibration(how)
            say(f"calibrated in {calibrating.seconds:.1f} s" if calibrating else "calibrated by the profile")
            tunes = [_tune(load, how, number) for number in (1, 2)]
            for _, cost in tunes:
                say(f"tuned {len(load.layers)} problems in {cost.seconds:.1f} s")
            first, second = (entries for entries, _ in tunes)
            cases = []
            for layer in load.layers:
                found = _case(layer.problem, first, second, calibrated, how, conditions)
                say(f"{layer.problem}: " + (_said(found) if found else how.failed[layer.problem.text]))
                cases += [found] if found else []
    return Validation(
        tuple(cases), how.failed, (tunes[0][1], tunes[1][1]), calibrating, workload, seed, effort, deployment, budget,
        machine.current().id, time.monotonic() - started,
    )  # fmt: skip


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Keep what is run out of recordings, and what is found of backends that do harm out of the profile."""
    held = {one.key: one.text for one in quarantine.on(None)}
    with observe.unwatched(), quarantine.kept_apart(held), session():
        yield


def _said(case: Case) -> str:
    return ", ".join(f"{way} {case.regret(way):.3f}" for way in WAYS)


@contextlib.contextmanager
def timed() -> Iterator[Callable[[], Cost]]:
    """Yield what tells, after the block, how long it took and how much of that was compiling."""
    from numba.core import event  # noqa: PLC0415  # measuring loads it anyway

    with event.install_recorder("numba:compile") as recorder:
        before = time.monotonic()
        took: list[float] = []
        yield lambda: Cost(took[0], _compiling(recorder.buffer))
        took.append(time.monotonic() - before)


def _compiling(events: Sequence[tuple[float, object]]) -> float:
    """Return the seconds between the first start and the last end of compilations that lie within each other."""
    depth, total, begun = 0, 0.0, 0.0
    for moment, happened in events:
        if getattr(happened, "is_start", False):
            begun = moment if depth == 0 else begun
            depth += 1
        elif depth:
            depth -= 1
            total += moment - begun if depth == 0 else 0.0
    return total


def _calibration(how: _Setting) -> tuple[Calibration, Cost | None]:
    """Return the calibration in force, if it was measured for its own sake; else measure one."""
    known = calibration.current()
    if known is not None and known.source == "calibrate":
        return known, None
    with profile.only(how.folder / "calibration.yaml"), timed() as cost:
        made = calibrate.calibrate(threads=how.threads, clock=how.clock).calibration
    return made, cost()


def _tune(load: Workload, how: _Setting, number: int) -> tuple[dict[Problem, Entry], Cost]:
    """Tune from nothing, in a profile of its own; return its entries."""
    with profile.only(_tuned_path(how, number)), timed() as cost:
        report = tuner.tune(
            load, effort=how.effort, threads=how.threads, deployments=(how.deployment,), allow_busy=True
        )
    for layer in report.layers:
        if layer.entry is None:
            how.failed[layer.layer.problem.text] = layer.reason
    return {layer.layer.problem: layer.entry for layer in report.layers if layer.entry}, cost()


def _tuned_path(how: _Setting, number: int) -> Path:
    return how.folder / f"tune-{number}.yaml"


def _case(
    problem: Problem, first: Mapping[Problem, Entry], second: Mapping[Problem, Entry], calibrated: Calibration,
    how: _Setting, conditions: Callable[[], str],
) -> Case | None:  # fmt: skip
    if problem not in first or problem not in second:
        return None
    key = how.key(problem)
    try:
        with profile.only(how.folder / "none.yaml"):
            champion = _champion(key, how)
        others = {entry.key.problem: entry for entry in first.values() if entry.key.problem != problem}
        chosen: dict[Way, Candidate] = {
            "bare": _decided(problem, how, (), None),
            "calibrated": _decided(problem, how, (), calibrated),
            "neighbours": _decided(problem, how, tuple(others.values()), calibrated),
            "tuned": _winner(first[problem]),
            "tuned again": _winner(second[problem]),
        }
        with profile.only(_tuned_path(how, 1)):
            replay = how.decide(problem, how.deployment)
        duel = regret.duel(key, champion, (*chosen.values(), replay.candidate), how.rules(how.duel), how.clock)
    except ConvDispatchError as error:
        how.failed[problem.text] = str(error)
        return None
    names: dict[Way, str] = {way: candidate.name for way, candidate in chosen.items()}
    stored = first[problem].winner
    drift = duel.seconds[stored.name] / stored.median if stored.median else 1.0
    replayed = replay.evidence.source == "profile" and replay.candidate.name == stored.name
    return Case(problem, duel, names, replayed, drift, conditions())


def _champion(key: Key, how: _Setting) -> Candidate:
    """Race every candidate there is, and return the fastest of those that stayed to the end."""
    outcome = problem_race.tune_problem(
        key, effort="exhaustive", seconds=how.seconds, clock=how.clock, rules=how.rules(how.oracle)
    )
    results = outcome.entry.results
    most = max(result.rounds for result in results)
    best = min((result for result in results if result.rounds == most), key=lambda result: (result.median, result.name))
    return Candidate(registry.get(best.backend), best.config)


def _decided(problem: Problem, how: _Setting, entries: Sequence[Entry], calibrated: Calibration | None) -> Candidate:
    """Return what would be chosen for a problem never tuned, by a profile of these entries and nothing else."""
    path = how.folder / "held-out.yaml"
    path.unlink(missing_ok=True)
    profile_file.write(path, entries, machine.current(), calibration.dump(calibrated) if calibrated else None)
    with profile.only(path):
        return how.decide(problem, how.deployment).candidate


def _winner(entry: Entry) -> Candidate:
    return Candidate(registry.get(entry.winner.backend), entry.winner.config)
