"""Fits a calibration to measured times: robust least squares on logarithms, held near "nothing to correct"."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from convdispatch.arguments import DEPLOYMENTS
from convdispatch.calibration import TERMS, Calibration, Correction, Sizes, config_text, corrector, features, sizes_of
from convdispatch.machine import Machine
from convdispatch.profile import Entry, Result

#: What is measured scatters around the best that a few terms can say by about this much, as a logarithm, less for its
#: own noise than for what estimates leave out; some lies far outside.
_NOISE = 0.3
#: How far from 0 a coefficient is expected to lie: those of all backends, of one backend, of one config. Little, since
#: some problems do not speak for all: where estimates are right, wider ones made choices worse.
_COMMON_PRIOR = {"constant": 1.0, "threads": 0.3}
_OWN_PRIOR = dict(zip(TERMS, (0.25, 0.07, 0.07, 0.035, 0.035), strict=True))
_CONFIG_PRIOR = 0.05
#: A config that fewer problems speak for has none.
_FEWEST_OF_CONFIG = 3
#: No coefficient lies farther than so many times that: a slope found in one corner would go wild in another.
_FARTHEST = 10.0

Vector = np.ndarray[tuple[int], np.dtype[np.float64]]
Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


@dataclass(frozen=True)
class Timing:
    """One candidate's measured time beside its estimate.

    Attributes:
        backend, version, config, threads: the candidate; the config as text, without its threads.
        sizes: of the problem.
        estimate: seconds predicted for a call with packed filters, uncorrected.
        seconds: of such a call, measured; None where only the packing was.
        packing: seconds of packing the filters, None where not measured.
    """

    backend: str
    version: int
    config: str
    threads: int
    sizes: Sizes
    estimate: float
    seconds: float | None
    packing: float | None = None


def fit(timings: Sequence[Timing], here: Machine, source: str) -> Calibration:
    """Return the calibration that explains these times best.

    A backend of which nothing was measured gets the common part, so that a machine on which everything is twice as
    slow does not favour it.

    Args:
        timings: of one version of each backend.
        here: the machine they were measured on.
        source: ``"calibrate"`` or ``"tune"``.
    """
    timed = [timing for timing in timings if timing.seconds and timing.estimate > 0]
    columns, matrix, priors = _design(timed, here)
    logs = np.array([math.log(timing.seconds / timing.estimate) for timing in timed if timing.seconds])
    solved = dict(zip(columns, _solve(matrix, logs, priors), strict=True)) if timed else {}
    common = tuple(solved.get(("", term), 0.0) for term in TERMS)
    packings = _packings(timings)
    found: dict[str, Correction] = {}
    for name in sorted({timing.backend for timing in timings}):
        mine = [timing for timing in timings if timing.backend == name]
        terms = tuple(solved.get((name, term), 0.0) for term in TERMS)
        configs = {
            config: solved[name, f"={config}"]
            for config in sorted({timing.config for timing in mine})
            if (name, f"={config}") in solved
        }
        found[name] = Correction(mine[0].version, terms, configs, packings.get(name, {}))
    whole = Calibration(here.id, source, len(timed), common, found)
    rated = {name: _rated(name, own, whole, timed, here) for name, own in found.items()}
    return Calibration(here.id, source, len(timed), common, rated, whole.made)


def _design(timings: Sequence[Timing], here: Machine) -> tuple[list[tuple[str, str]], Matrix, list[float]]:
    """Return the unknowns by (backend or "" for all, term or "=config"), what multiplies them, and their priors."""
    backends = sorted({timing.backend for timing in timings})
    measured: dict[tuple[str, str], set[Sizes]] = {}
    for timing in timings:
        measured.setdefault((timing.backend, f"={timing.config}"), set()).add(timing.sizes)
    configs = {column for column, sizes in measured.items() if len(sizes) >= _FEWEST_OF_CONFIG}
    columns = [("", term) for term in _COMMON_PRIOR] + list(itertools.product(backends, TERMS)) + sorted(configs)
    place = {column: number for number, column in enumerate(columns)}
    matrix = np.zeros((len(timings), len(columns)))
    for row, timing in zip(matrix, timings, strict=True):
        for term, value in zip(TERMS, features(timing.sizes, timing.threads, timing.estimate, here), strict=True):
            row[place[timing.backend, term]] = value
            if ("", term) in place:
                row[place["", term]] = value
        if (timing.backend, f"={timing.config}") in place:
            row[place[timing.backend, f"={timing.config}"]] = 1.0
    priors = [
        _CONFIG_PRIOR if term.startswith("=") else (_OWN_PRIOR if backend else _COMMON_PRIOR)[term]
        for backend, term in columns
    ]
    return columns, matrix, priors


def _solve(matrix: Matrix, logs: Vector, priors: Sequence[float]) -> list[float]:
    """Return the coefficients: far-off measurements count by their distance, not by its square."""
    from scipy.optimize import least_squares  # noqa: PLC0415  # half a second to import

    rows = np.vstack([matrix / _NOISE, np.diag(1 / np.array(priors))])
    wanted = np.concatenate([logs / _NOISE, np.zeros(len(priors))])
    start = np.linalg.lstsq(rows, wanted, rcond=None)[0]

    def misses(x: Vector) -> Vector:
        missed: Vector = rows @ x - wanted
        return missed

    def slopes(x: Vector) -> Matrix:  # noqa: ARG001  # a linear problem has the same everywhere
        return rows

    most = _FARTHEST * np.array(priors)
    start = np.clip(start, -0.9 * most, 0.9 * most)
    done = least_squares(misses, start, jac=slopes, loss="soft_l1", bounds=(-most, most))
    return [float(value) for value in done.x]


def _packings(timings: Iterable[Timing]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return seconds, and seconds a byte of filters, by backend and config; ``""`` is every config together."""
    by_config: dict[str, dict[str, list[Timing]]] = {}
    for timing in timings:
        if timing.packing is not None:
            own = by_config.setdefault(timing.backend, {})
            own.setdefault(timing.config, []).append(timing)
            if timing.config:
                own.setdefault("", []).append(timing)
    return {
        backend: {config: _line(rows) for config, rows in sorted(own.items())} for backend, own in by_config.items()
    }


def _line(rows: Sequence[Timing]) -> tuple[float, float]:
    """Return the line through packing times over bytes, relative errors counting, neither part below 0."""
    from scipy.optimize import nnls  # noqa: PLC0415

    seconds = np.array([max(row.packing or 0.0, 1e-6) for row in rows])
    ones = np.array([[1.0, float(row.sizes.filters)] for row in rows])
    scale = np.array([1e-6, 1e-9])  # numbers of about one are solved well
    found = nnls(ones * scale / seconds[:, None], np.ones(len(rows)))[0] * scale
    return float(found[0]), float(found[1])


def _rated(name: str, own: Correction, whole: Calibration, timings: Sequence[Timing], here: Machine) -> Correction:
    """Return a backend's correction with how far off its estimates are, before and after."""
    mine = [timing for timing in timings if timing.backend == name and timing.seconds]
    after = [
        corrector(whole, row.sizes, here, None)(row.backend, row.version, row.config, row.threads, row.estimate)
        for row in mine
    ]
    return Correction(
        own.version, own.terms, own.configs, own.packing,
        _typical([row.estimate for row in mine], mine), _typical(after, mine),
    )  # fmt: skip


def _typical(predicted: Sequence[float], timings: Sequence[Timing]) -> float:
    """Return how many times predictions are off, the median of them."""
    if not timings:
        return 1.0
    off = (abs(math.log((row.seconds or p) / p)) for p, row in zip(predicted, timings, strict=True))
    return math.exp(statistics.median(off))


# From what tuning measured ---------------------------------------------------------------------------------------

#: Fewer measurements, or of fewer problems, say too little about a machine.
FEWEST_TIMINGS, FEWEST_PROBLEMS = 40, 5


def timings_of(entries: Iterable[Entry], versions: Mapping[str, int]) -> list[Timing]:
    """Return what tuned entries tell, of backends at these versions; packing where both deployments were measured."""
    by_problem: dict[tuple[object, int], dict[str, Entry]] = {}
    for entry in entries:
        if not entry.flags:
            by_problem.setdefault((entry.key.problem, entry.key.threads), {})[entry.key.deployment] = entry
    found = []
    for pair in by_problem.values():
        plan, call = (_rows(pair.get(deployment), versions) for deployment in DEPLOYMENTS)
        for name, row in plan.items():
            packing = max(0.0, call[name].median - row.median) if name in call else None
            found.append(
                Timing(
                    row.backend, row.version, config_text(row.config), row.config.threads,
                    sizes_of(pair["plan"].key.problem), row.estimate or 0.0, row.median, packing,
                )
            )  # fmt: skip
    return found


def _rows(entry: Entry | None, versions: Mapping[str, int]) -> dict[str, Result]:
    if entry is None:
        return {}
    return {
        row.name: row
        for row in entry.results
        if row.estimate and row.median and versions.get(row.backend) == row.version
    }
