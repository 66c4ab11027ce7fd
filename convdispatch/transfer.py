"""Estimates for problems never tuned: the backends' own, calibrated, and corrected by how the nearest tuned fared.

The measurements of similar problems say by how much each candidate's estimate is off around here. What they say counts
by how near they are and how well they agree; where that is too little, the calibrated estimates stand as they are.
"""

import math
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from convdispatch import calibration, heuristic, machine, profile, registry
from convdispatch.backend import Backend, Candidate, Config
from convdispatch.calibration import Calibration, Corrector, Sizes, config_text
from convdispatch.heuristic import Estimate
from convdispatch.neighbours import Neighbour, Row, neighbours
from convdispatch.problem import Problem

#: Weight of "nothing is off" against the neighbours: a neighbour at distance 0 weighs 1.
_DOUBT = 0.5
#: How much a single neighbour's ratio is expected to scatter, as a logarithm, and the scatter that halves trust.
_SCATTER, _HALVING = 0.08, 0.25
#: Below this confidence neighbours are not heard.
LEAST_CONFIDENCE = 0.3
#: An estimate that was stored and one made now are the same if they differ by no more than this.
_SAME = 0.02


# What they say ---------------------------------------------------------------------------------------------------


class _Mean:
    """A weighted mean that starts from what is believed without evidence."""

    __slots__ = ("squares", "total", "weight")

    def __init__(self) -> None:
        self.weight = self.total = self.squares = 0.0

    def add(self, weight: float, value: float) -> None:
        self.weight += weight
        self.total += weight * value
        self.squares += weight * value * value

    def given(self, prior: float) -> float:
        return (self.total + _DOUBT * prior) / (self.weight + _DOUBT)

    @property
    def scatter(self) -> float:
        """Standard deviation, that of a single value being what is usual."""
        mean = self.total / self.weight if self.weight else 0.0
        variance = max(0.0, self.squares - self.weight * mean * mean)
        return math.sqrt((variance + _DOUBT * _SCATTER**2) / (self.weight + _DOUBT))


class Local:
    """By how much the estimates are off around one problem.

    A candidate's own ratios of measured to estimated time count first, then those of its backend's other candidates,
    then everybody's; the fewer and the farther the measurements, the less they move an estimate.

    Attributes:
        used: how many neighbours had something to say.
        nearest: the text of the nearest.
        confidence: 0 to 1, from how near the neighbours are and how well they agree.
    """

    def __init__(self, around: list[Neighbour], backends: Mapping[str, Backend], correct: "_Correctors") -> None:
        everyone, by_backend = _Mean(), defaultdict[str, _Mean](_Mean)
        by_candidate = defaultdict[tuple[str, Config], _Mean](_Mean)
        heard = []
        for neighbour in around:
            offs = _offs(neighbour, backends, correct)
            if not offs:
                continue
            heard.append(neighbour)
            weight, means = neighbour.weight, list[float]()
            for name, own in offs.items():
                for config, off in own:
                    by_candidate[name, config].add(weight, off)
                means.append(sum(off for _, off in own) / len(own))
                by_backend[name].add(weight, means[-1])
            everyone.add(weight, sum(means) / len(means))
        self.used, self.nearest = len(heard), heard[0].text if heard else ""
        shared = everyone.given(0.0)
        self._shared = shared
        self._by_backend = {name: mean.given(shared) for name, mean in by_backend.items()}
        self._by_candidate = {key: mean.given(self._by_backend[key[0]]) for key, mean in by_candidate.items()}
        self.confidence = 0.0
        if heard:
            scatter = sum(mean.scatter for mean in by_candidate.values()) / len(by_candidate)
            self.confidence = everyone.weight / (everyone.weight + _DOUBT) * 0.5 ** (scatter / _HALVING)

    def factor(self, candidate: Candidate) -> float:
        """Return what to multiply a candidate's calibrated estimate by."""
        name = candidate.backend.name
        off = self._by_candidate.get((name, candidate.config))
        return math.exp(self._by_backend.get(name, self._shared) if off is None else off)


class _Correctors:
    """A calibration's correctors by problem; an estimate is corrected there as here before it is compared."""

    def __init__(self, calibrated: Calibration | None, backends: Mapping[str, Backend], deployment: str) -> None:
        self.calibrated = calibrated
        self.packing = (
            {name: backend.packing_cost for name, backend in backends.items()} if deployment == "call" else None
        )

    def at(self, sizes: Sizes) -> Corrector:
        return calibration.corrector(self.calibrated, sizes, machine.current(), self.packing)


def _offs(
    neighbour: Neighbour, backends: Mapping[str, Backend], correct: _Correctors
) -> dict[str, list[tuple[Config, float]]]:
    """Return, by backend, each config's logarithm of measured over calibrated time at a neighbour."""
    here = correct.at(neighbour.place.sizes)
    found: dict[str, list[tuple[Config, float]]] = {}
    heard: dict[tuple[str, int], bool] = {}
    for row in neighbour.rows:
        name, version = row.backend, row.version
        if (says := heard.get((name, version))) is None:
            backend = backends.get(name)
            says = backend is not None and backend.version == version
            says = says and backend is not None and _estimates_as_then(backend, neighbour, row)
            heard[name, version] = says
        if says:
            expected = here(name, version, config_text(row.config), row.config.threads, row.estimate)
            found.setdefault(name, []).append((row.config, math.log(row.seconds / expected)))
    return found


#: Whether a backend estimates as when its stored estimates were made: its code may have changed, its kernels not; and
#: on a machine much like this one it may have gone by other caches. Here, and there.
_as_then: weakref.WeakKeyDictionary[Backend, dict[bool, bool]] = weakref.WeakKeyDictionary()


def _estimates_as_then(backend: Backend, neighbour: Neighbour, row: Row) -> bool:
    """Return whether stored estimates of a backend are those it would make now; one is tried, once a process."""
    known = _as_then.get(backend)
    if known is None:  # `setdefault` would make a weak reference with a callback every time
        known = _as_then[backend] = {}
    if neighbour.here not in known:
        try:
            problem = Problem.parse(neighbour.text)
            now = Candidate(backend, row.config).estimate(problem, machine.current())
        except (Exception, SystemExit):  # noqa: BLE001  # a backend that cannot estimate what it was measured on has changed
            now = None
        known[neighbour.here] = now is not None and abs(math.log(max(now, 1e-12) / row.estimate)) < _SAME
    return known[neighbour.here]


# The ranking -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """Candidates with their corrected estimates, and what corrected them.

    Attributes:
        estimates: the fastest first, those without an estimate last.
        calibrated: whether this machine's calibration took part.
        local: what the neighbours said, where they were heard.
    """

    estimates: list[Estimate]
    calibrated: bool
    local: Local | None

    @property
    def basis(self) -> str:
        """What the estimates rest on, in words that follow "predicted"; empty for the backends' own."""
        if self.local is not None:
            count = f"{self.local.used} tuned neighbour{'s' * (self.local.used > 1)}"
            return f"from {count}, nearest {self.local.nearest}, confidence {self.local.confidence:.2f}"
        return "calibrated" if self.calibrated else ""


def rank(problem: Problem, backends: Iterable[Backend], threads: int, deployment: str) -> Ranking:
    """Return every candidate of these backends with its estimate, corrected for machine and neighbourhood.

    Args:
        problem: what is to be computed.
        backends: whose candidates.
        threads: most threads a candidate may use.
        deployment: ``"plan"`` or ``"call"``.
    """
    plain = heuristic.rank(problem, backends, threads)
    if problem.is_trivial:
        return Ranking(plain, calibrated=False, local=None)
    files = profile.files()
    calibrated = calibration.current(files)
    around = neighbours(problem, deployment, threads, files)
    if calibrated is None and not around and deployment == "plan":
        return Ranking(plain, calibrated=False, local=None)
    known = registry.available()
    correctors = _Correctors(calibrated, known, deployment)
    correct = correctors.at(calibration.sizes_of(problem))
    local: Local | None = None
    if around:
        local = Local(around, known, correctors)
        if local.confidence < LEAST_CONFIDENCE:
            local = None
    found = []
    for estimate in plain:
        seconds = estimate.seconds
        if seconds is not None:
            seconds = calibration.corrected(correct, estimate.candidate, seconds)
            if local is not None:
                seconds *= local.factor(estimate.candidate)
        found.append(Estimate(estimate.candidate, seconds))
    found.sort(key=lambda each: math.inf if each.seconds is None else each.seconds)
    return Ranking(found, calibrated is not None, local)
