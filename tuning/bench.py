"""The benchmark: convdispatch and other engines on the same layers, in interleaved rounds, with a verdict.

Every engine has its own process and the same thread count. For each layer every engine builds its best deployment,
its result is compared with the float64 reference, and then each gives one sample a round, in shuffled order, while
all the others are stopped. Ratios are of samples of one round: what slows the machine for a while slows both.

A loop in this process runs between the samples. If it had to wait for a core, if its speed varied much, or if
others used the processors meanwhile, the machine was busy, and what was measured decides nothing.
"""

import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from convdispatch import heuristic, registry
from convdispatch.arguments import Array
from convdispatch.backend import epsilon
from convdispatch.errors import BackendError
from convdispatch.problem import LOW_PRECISION, Problem
from convdispatch.reference import conv2d
from convdispatch.times import median_ratio, spread
from convdispatch.tuning import peak, tuner
from convdispatch.tuning.busy import Conditions, Watch
from convdispatch.tuning.engine_field import EngineField
from convdispatch.tuning.engines import OWN, Case
from convdispatch.tuning.gate import compared_images
from convdispatch.tuning.layers import LayerReport
from convdispatch.tuning.workload import Layer, Workload

#: Seconds of one sample.
SAMPLE = 0.015
#: Operations from which on a layer without a transform should be near the peak.
_LARGE = 50e6
#: Error over the largest exact output from which on a float result is wrong: 3e-4 for float32. The fastest
#: transforms stay below a third of it, arithmetic in bfloat16 or TF32 does not.
_ULPS = 2500


# Results ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """What an engine did on a layer.

    Attributes:
        engine: its name.
        deployment: how it ran.
        error: largest deviation over the largest exact output; infinite where shapes differ.
        seconds: of a call: for each round the median of its sample; empty if there is a reason.
        reason: why it was not timed: cannot do it, wrong result, crashed.
        wrong: whether its result was.
        tried: best seconds of each deployment that it chose from.
        passed_over: deployments that failed, and why.
    """

    engine: str
    deployment: str = ""
    error: float | None = None
    seconds: tuple[float, ...] = ()
    reason: str = ""
    wrong: bool = False
    tried: Mapping[str, float] = field(default_factory=dict)
    passed_over: Mapping[str, str] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The best round's median."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range of the rounds over their median; 0 for fewer than two."""
        return spread(self.seconds)


@dataclass(frozen=True)
class LayerResult:
    """Every engine on one layer.

    Attributes:
        layer: the layer.
        timings: by engine, convdispatch first.
        conditions: what the machine was like meanwhile.
    """

    layer: Layer
    timings: Mapping[str, Timing]
    conditions: Conditions

    @property
    def own(self) -> Timing:
        """What convdispatch did: the first."""
        return next(iter(self.timings.values()))

    @property
    def ratios(self) -> dict[str, float]:
        """Time of each other engine over that of convdispatch: the median of the rounds' ratios."""
        return {
            name: median_ratio(timing.seconds, self.own.seconds)
            for name, timing in self.timings.items()
            if timing is not self.own and timing.seconds and self.own.seconds
        }

    @property
    def rival(self) -> str | None:
        """The best other engine."""
        ratios = self.ratios
        return min(ratios, key=lambda name: ratios[name]) if ratios else None

    @property
    def ratio(self) -> float | None:
        """How many times faster convdispatch is than the best other engine."""
        return min(self.ratios.values(), default=None)


@dataclass(frozen=True)
class Report:
    """A run of the benchmark.

    Attributes:
        workload: what was run.
        threads, rounds: how.
        layers: the results, in the workload's order.
        versions: of the engines that there are.
        missing: the engines that there are not, and why.
        seconds: how long it took.
        peak: float32 operations a second of a loop of products on as many threads, measured between the layers.
    """

    workload: Workload
    threads: int
    rounds: int
    layers: tuple[LayerResult, ...]
    versions: Mapping[str, str]
    missing: Mapping[str, str]
    seconds: float
    peak: float | None = None

    @property
    def direct(self) -> list[tuple[LayerResult, float]]:
        """Large layers that convdispatch did in float32 without a transform, with the part of the peak it reached."""
        return [
            (result, result.layer.problem.flops / result.own.best / self.peak)
            for result in self.layers
            if self.peak and result.own.seconds and _is_direct(result)
        ]

    @property
    def busy(self) -> list[str]:
        """What spoke against a quiet machine, layer by layer; empty if the verdict stands."""
        return [
            f"{result.layer.name or result.layer.problem}: {', '.join(said)}"
            for result in self.layers
            if (said := result.conditions.complaints())
        ]

    @property
    def compared(self) -> list[tuple[LayerResult, float]]:
        """Layers that have a ratio, with it."""
        return [(result, ratio) for result in self.layers if (ratio := result.ratio) is not None]

    @property
    def geometric_mean(self) -> float | None:
        """Of the layers' ratios, each counted once."""
        ratios = [ratio for _, ratio in self.compared]
        return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None

    @property
    def pass_ratio(self) -> float | None:
        """One pass of the workload by the best other engine of each layer over one by convdispatch."""
        own = [result.layer.count * result.own.median for result, _ in self.compared]
        others = [seconds * ratio for seconds, (_, ratio) in zip(own, self.compared, strict=True)]
        return sum(others) / sum(own) if own else None


def _is_direct(result: LayerResult) -> bool:
    problem, backend = result.layer.problem, result.own.deployment.partition("(")[0].strip()
    local = backend in registry.names() and registry.get(backend).numerics.kind == "local"
    return local and problem.dtype == "float32" and problem.flops >= _LARGE and not problem.separable


# The run ------------------------------------------------------------------------------------------------------------


def bench(
    load: Workload,
    against: Sequence[str],
    *,
    rounds: int = 9,
    threads: int | None = None,
    effort: str | None = "measure",
    timeout: float = 120.0,
    sample: float = SAMPLE,
    attempts: int = 2,
    own: str = OWN,
    watch: Callable[[], Watch] | None = None,
    seed: int = 0,
    on_progress: Callable[[LayerResult], None] | None = None,
    on_tuned: Callable[[LayerReport], None] | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> Report:
    """Compare convdispatch with other engines; where none of them is to be had, nothing is measured.

    Args:
        load: the layers; equal ones are measured once.
        against: names from ``engines.PEERS``, or ``module:class`` of an own engine; ``name@python`` runs it in
            another interpreter, where that has what the engine needs.
        rounds: samples of each engine on each layer.
        threads: what every engine may use; the option ``threads`` or all usable cores where None.
        effort: how hard convdispatch is tuned first where the profile does not know; None to take what it knows.
        timeout: seconds for each answer of an engine; one that takes longer is lost.
        sample: seconds of a sample.
        attempts: how often a layer is measured at most, if the machine is busy.
        own: the engine that all others are compared with.
        watch: makes what watches the machine during a layer; tests pass their own.
        seed: decides the order within the rounds.
        on_progress: called with each layer's result.
        on_tuned, on_wait: told of tuning's progress, as by ``tune``.
    """
    started = time.monotonic()
    load = load.distinct()
    budget = heuristic.budget_of(threads)
    order = random.Random(seed)  # noqa: S311  # shuffling, not secrets
    watch = watch or functools.partial(Watch, budget)
    with EngineField(dict.fromkeys([own, *against]), budget, timeout) as engines:
        results, peaks = [], []
        there = [name for name in engines.names if name != own and engines.ready(name) is None]
        if there and effort is not None:
            tuner.tune(
                load, effort=effort, threads=budget, deployments=("plan",), allow_busy=True, on_progress=on_tuned,
                on_wait=on_wait,
            )  # fmt: skip
        for layer in load.layers if there else ():
            peaks.append(peak.flops(budget))
            result = _layer(layer, engines, rounds, sample, watch, order)
            for _ in range(attempts - 1):
                if result.conditions.complaints():
                    result = _layer(layer, engines, rounds, sample, watch, order)
            results.append(result)
            if on_progress is not None:
                on_progress(result)
    elapsed = time.monotonic() - started
    limit = statistics.median(peaks) if peaks else None
    return Report(load, budget, rounds, tuple(results), engines.versions, engines.missing, elapsed, limit)


def _layer(
    layer: Layer,
    engines: EngineField,
    rounds: int,
    sample: float,
    watch: Callable[[], Watch],
    order: random.Random,
) -> LayerResult:
    built = _built(layer.problem, engines)
    live = [name for name, timing in built.items() if not timing.reason]
    taken: dict[str, list[float]] = {name: [] for name in live}
    watching = watch()
    watching.start(engines.cpu_seconds())
    for name in _turns(live, rounds, order):
        watching.calibrate()
        reply = engines.ask(name, do="sample", seconds=sample)
        if "reason" in reply:
            built[name] = Timing(name, built[name].deployment, built[name].error, reason=reply["reason"])
            live.remove(name)
        else:
            taken[name].append(reply["seconds"])
    conditions = watching.stop(engines.cpu_seconds())
    timings = {
        name: replace(timing, seconds=tuple(taken[name])) if name in live else timing for name, timing in built.items()
    }
    return LayerResult(layer, timings, conditions)


def _built(problem: Problem, engines: EngineField) -> dict[str, Timing]:
    """Have every engine build a problem; nobody takes part where there is no memory to compare them."""
    try:
        exact = _exact(problem)
    except (BackendError, MemoryError) as error:
        return {name: Timing(name, reason=f"it cannot be compared: {error}") for name in engines.names}
    return {name: _judged(name, *engines.build(name, problem), problem, exact) for name in engines.names}


def _turns(live: list[str], rounds: int, order: random.Random) -> Iterator[str]:
    """Yield who is next, round by round; who leaves ``live`` has no more turns."""
    for _ in range(rounds):
        turn = list(live)
        order.shuffle(turn)
        yield from (name for name in turn if name in live)


def _exact(problem: Problem) -> Array:
    """Return the reference's result for the first and the last image, NHWC, float64 or exact integers."""
    case = Case.of(problem)
    images = compared_images(problem.n)
    few = problem.replace(n=len(images), dtype=problem.dtype if problem.is_integer else "float64")
    return conv2d(few, case.x[images], case.w, case.bias, None if case.residual is None else case.residual[images])


def _judged(name: str, reply: Mapping[str, Any], result: Array | None, problem: Problem, exact: Array) -> Timing:
    """Return a timing without samples: how the engine would run, or why it does not take part."""
    if result is None:
        return Timing(name, reason=reply["reason"])
    made = Timing(name, reply["deployment"], tried=reply["tried"], passed_over=reply["passed_over"])
    if result.shape != exact.shape:
        error, reason = math.inf, f"wrong result: shape {result.shape} instead of {exact.shape}"
    else:
        error = _error(result, exact)
        limit = 0.0 if problem.is_integer else _ULPS * epsilon(problem.sum_dtype)
        limit += 2.0**-7 if problem.dtype in LOW_PRECISION else 0.0
        reason = "" if error <= limit else f"wrong result: error {error:.2g} of the largest output"
    return replace(made, error=error, reason=reason, wrong=bool(reason))


def _error(result: Array, exact: Array) -> float:
    """Return the largest deviation over the largest exact value; infinite if anything is not a number."""
    if not exact.size:
        return 0.0
    wide = exact.astype(np.float64)
    deviation = float(np.abs(result.astype(np.float64) - wide).max())
    return deviation / max(float(np.abs(wide).max()), np.finfo(np.float64).tiny) if deviation >= 0 else math.inf
