"""Calibrates the backends' estimates: a few seconds of measuring, or for nothing from what tuning measured."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from convdispatch import calibration, heuristic, machine, observe, profile, profile_file, registry, settings
from convdispatch.backend import Candidate
from convdispatch.calibration import Calibration
from convdispatch.errors import BackendError
from convdispatch.problem import Problem
from convdispatch.profile import Entry
from convdispatch.tuning import isolation
from convdispatch.tuning.clock import Clock, system_clock
from convdispatch.tuning.fit import FEWEST_PROBLEMS, FEWEST_TIMINGS, Timing, fit, timings_of
from convdispatch.tuning.gate import Trial
from convdispatch.tuning.race import Rules, Run, comparable_seconds, race
from convdispatch.tuning.session import session

#: What is measured: dense, pointwise, strided, depthwise, grouped, of few channels or few filters, with large filters;
#: from a call of some microseconds to filters and images larger than the second cache.
PROBLEMS = tuple(
    Problem.parse(text)
    for text in (
        "1x8x8x32 * 3x3x32x32 SAME",
        "1x112x112x32 * 3x3x32x64 SAME",
        "1x14x14x256 * 3x3x256x256 SAME",
        "1x7x7x320 * 3x3x320x320 SAME",
        "1x28x28x128 * 3x3x128x128 SAME stride=2",
        "1x28x28x48 * 5x5x48x64 SAME",
        "1x56x56x64 * 1x1x64x256 VALID",
        "1x14x14x512 * 1x1x512x512 VALID",
        "1x224x224x3 * 7x7x3x64 pad=3 stride=2",
        "1x128x128x3 * 5x5x3x64 SAME",
        "1x56x56x128 * 3x3x1x128 SAME",
        "1x14x14x384 * 5x5x1x384 SAME stride=2",
        "1x28x28x128 * 3x3x32x128 SAME",
        "1x720x1280x1 * 5x5x1x1 SAME",
        "1x200x200x3 * 21x21x3x2 SAME",
        "1x64x64x64 * 3x3x64x3 SAME",
        "1x50x50x256 * 1x1x256x2 VALID",
        "1x540x960x3 * 1x1x3x3 VALID",
    )
)
RULES = Rules(rounds=3, sample_seconds=0.0005, race_seconds=0.2, drop=float("inf"))
#: Packing takes as long as there are bytes: larger filters than these need not be packed to know it.
_MOST_PACKED = 1 << 20
#: What is estimated to take longer than this says little for its time, unless it is within a few times of the best;
#: so does whatever is estimated hopelessly slower.
_LONGEST, _LEAST_RANGE, _HOPELESS = 0.015, 4.0, 8.0


@dataclass(frozen=True)
class CalibrationReport:
    """What calibrating did.

    Attributes:
        calibration: the result.
        profile: the file it was written to.
        seconds: how long it took, compilation included.
        problems: how many were measured.
        failures: candidates that raised, with the reason.
    """

    calibration: Calibration
    profile: Path
    seconds: float
    problems: int
    failures: tuple[str, ...]


def calibrate(
    *,
    threads: int | None = None,
    problems: Sequence[Problem] = PROBLEMS,
    clock: Clock = system_clock,
    rules: Rules = RULES,
    on_progress: Callable[[Problem], None] | None = None,
) -> CalibrationReport:
    """Measure a few problems by every backend, correct the estimates by what came out, and keep that in the profile.

    Args:
        threads: most threads a candidate may use; the option ``threads`` where None.
        problems: what to measure.
        clock: tells the time; tests pass their own.
        rules: how to race.
        on_progress: called with each problem when it has been measured.

    Raises:
        BackendError: if not one candidate could be measured.
        ProfileError: if the profile cannot be written.
    """
    budget = heuristic.budget_of(threads)
    path = profile.writable_path()
    here = machine.current()
    profile_file.write(path, (), here)  # better to learn now than afterwards that it cannot be written
    started = time.monotonic()
    failures: list[str] = []
    timings: list[Timing] = []
    with settings.options(tuning="off"), observe.unwatched(), session():
        for problem in problems:
            timings += _measured(problem, budget, rules, clock, failures)
            if on_progress is not None:
                on_progress(problem)
    if not timings:
        raise BackendError(f"nothing could be measured: {'; '.join(failures) or 'no backend takes these problems'}")
    made = fit(timings, here, "calibrate")
    profile_file.write(path, (), here, calibration.dump(made))
    profile.forget_decisions()
    return CalibrationReport(made, path, time.monotonic() - started, len(problems), tuple(failures))


def _measured(problem: Problem, threads: int, rules: Rules, clock: Clock, failures: list[str]) -> list[Timing]:
    """Race a problem's candidates, and the packing of their filters."""
    usable, _ = heuristic.usable(problem, settings.unrestricted("fast"))
    ranked = heuristic.rank(problem, usable.values(), threads)
    known = {e.candidate.name: (e.candidate, e.seconds) for e in ranked if e.seconds is not None}
    best = min((seconds for _, seconds in known.values()), default=0.0)
    limit = max(best * _LEAST_RANGE, min(best * _HOPELESS, _LONGEST))
    fit, refused = isolation.admitted(problem, [candidate for candidate, seconds in known.values() if seconds <= limit])
    failures += [f"{failure.name}: {failure.reason}" for failure in refused]
    known = {candidate.name: known[candidate.name] for candidate in fit}
    arrays = Trial.random(problem)
    runners: dict[str, Run] = {}
    for name, (candidate, _) in known.items():
        try:
            plan = arrays.plan(candidate)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a backend raises, the others go on
            failures.append(f"{name}: {type(error).__name__}: {error}")
            continue
        runners[name] = arrays.runner(plan)
    said: Callable[[str, Exception], None] = lambda name, error: failures.append(f"{name}: {error!r}")  # noqa: E731
    seconds = comparable_seconds(race(runners, rules, clock, on_failure=said))
    sizes = calibration.sizes_of(problem)
    packers = {_packed_as(known[name][0]): _packer(arrays, known[name][0]) for name in seconds}
    if sizes.filters > _MOST_PACKED:
        packers.clear()
    packing = comparable_seconds(race(packers, rules, clock, on_failure=said))
    return [
        Timing(
            candidate.backend.name, candidate.backend.version, calibration.config_text(candidate.config),
            candidate.config.threads, sizes, estimate, seconds[name], packing.get(_packed_as(candidate)),
        )
        for name, (candidate, estimate) in known.items()
        if seconds.get(name)
    ]  # fmt: skip


def _packed_as(candidate: Candidate) -> str:
    """Return what is the same for candidates that differ in threads only, and so pack alike."""
    return f"{candidate.backend.name}({calibration.config_text(candidate.config)})"


def _packer(arrays: Trial, candidate: Candidate) -> Run:
    return lambda: arrays.plan(candidate)


def learn(entries: Iterable[Entry], path: Path) -> Calibration | None:
    """Fit a calibration to what tuning measured and keep it, if it knows more than the one that is there.

    It costs no measuring. One that was measured for the purpose is never replaced.

    Returns:
        The new calibration; None where the old one stays or the measurements are too few.
    """
    entries = list(entries)
    old = calibration.current([profile_file.read(path)])
    timings = timings_of(entries, {name: backend.version for name, backend in registry.available().items()})
    if len(timings) < FEWEST_TIMINGS or len({entry.key.problem for entry in entries}) < FEWEST_PROBLEMS:
        return None
    if old is not None and (old.source == "calibrate" or old.measurements >= len(timings)):
        return None
    made = fit(timings, machine.current(), "tune")
    profile_file.write(path, (), machine.current(), calibration.dump(made))
    profile.forget_decisions()
    return made
