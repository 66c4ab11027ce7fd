"""Which candidates there are for a problem, which of them are allowed, and how they rank without running them."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from convdispatch import machine, quarantine, registry, settings
from convdispatch.backend import (
    EPILOGUE_GROWTH,
    Backend,
    Candidate,
    Config,
    Effort,
    configs_of,
    epsilon,
    plain_growth,
    rejection,
)
from convdispatch.errors import ArgumentError, warn
from convdispatch.problem import ROUNDING, Problem
from convdispatch.profile import Result
from convdispatch.settings import Options

#: Largest measured error of an accuracy class, in units of the sum dtype's epsilon; "strict" has a rule of its own.
ACCURACY_EPS = {"standard": 2.0**10, "fast": 2.0**14}
#: A candidate estimated this many times slower than the best is not worth measuring, by effort. Honest estimates are
#: within a factor of two, so their ratio is within four.
_HOPELESS = {"estimate": 4.0, "measure": 4.0, "patient": 16.0, "exhaustive": float("inf")}
#: Measured though it is hopeless: the yardstick that people compare with. But not where a call takes longer than this:
#: it would be most of the time that tuning takes, more than a minute for a layer of 10 GFLOP.
YARDSTICK, _LONGEST_YARDSTICK = "direct", 0.1


@dataclass(frozen=True)
class Estimate:
    """A candidate with its predicted seconds, None where its backend cannot tell."""

    candidate: Candidate
    seconds: float | None


def thread_budget(options: Options) -> int:
    """Return the most threads that a call may use under these options."""
    return options.threads or machine.usable_cores()


def budget_of(threads: int | str | None = None) -> int:
    """Return the thread budget that somebody asks for, else that of the options in force.

    Raises:
        ArgumentError: if what is asked for is no number of threads.
    """
    return settings.parse_threads(threads) or thread_budget(settings.current())


def thread_counts(threads: int) -> tuple[int, ...]:
    """Return the thread counts worth trying: the budget, powers of two below it, and one."""
    counts = {1, threads} | {1 << bit for bit in range(threads.bit_length()) if 1 << bit < threads}
    return tuple(sorted(counts, reverse=True))


def candidates_of(backend: Backend, problem: Problem, threads: int, effort: Effort) -> list[Candidate]:
    """Return a backend's candidates for a problem it does not reject, its default config first.

    Raises:
        ArgumentError, ArgumentTypeError: if the backend names a config that is none, or has threads that are not there.
    """
    if problem.is_trivial:  # the plan does without a kernel
        return [Candidate(backend, Config())]
    configs = configs_of(backend, problem, effort)
    if not backend.parallel:
        if many := next((config for config in configs if not 1 <= config.threads <= threads), None):
            raise ArgumentError(f"config ({many}) has other threads than the 1 to {threads} that a call may use")
        return [Candidate(backend, config) for config in configs]
    counts = thread_counts(threads)
    return [Candidate(backend, _on_threads(config, count)) for config in configs for count in counts]


@functools.lru_cache(maxsize=4096)
def _on_threads(config: Config, count: int) -> Config:
    return Config(config, threads=count)


def usable(problem: Problem, options: Options) -> tuple[dict[str, Backend], dict[str, str]]:
    """Return the backends that may be chosen for a problem, and why each of the others may not."""
    yes: dict[str, Backend] = {}
    no = registry.unavailable()
    held = quarantine.held()
    for name, backend in registry.available().items():
        if name in options.forbid:
            no[name] = "forbidden by options"
        elif kept := quarantine.of(backend, held):
            no[name] = f"quarantined: {kept.reason}"
        elif options.accuracy == "strict" and not accurate_by_kind(backend, options):
            no[name] = "accuracy='strict' allows local backends only"
        elif reason := refusal(backend, problem):
            no[name] = reason
        else:
            yes[name] = backend
    return yes, no


def refusal(backend: Backend, problem: Problem) -> str | None:
    """Return why a backend cannot do a problem, or None; one that raises cannot."""
    try:
        return rejection(backend, problem)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # somebody's backend must not stop the others
        return f"its rejects raised {type(error).__name__}: {error}"


def rank(problem: Problem, backends: Iterable[Backend], threads: int, effort: Effort = "estimate") -> list[Estimate]:
    """Return every candidate of these backends with its estimate, the fastest first, the unknown last."""
    here = machine.current()
    found = []
    for backend in backends:
        candidates: list[Candidate] = []
        try:
            candidates = candidates_of(backend, problem, threads, effort)
            estimates = [Estimate(each, each.estimate(problem, here)) for each in candidates]
        except (Exception, SystemExit) as error:  # noqa: BLE001
            become = "has no estimate" if candidates else "is passed over"
            warn(f"backend {backend.name!r} {become} for {problem}: {error!r}")
            estimates = [Estimate(each, None) for each in candidates]
        found += estimates
    return sorted(found, key=lambda estimate: float("inf") if estimate.seconds is None else estimate.seconds)


def worth_measuring(estimates: Sequence[Estimate], effort: Effort) -> tuple[list[Candidate], list[Estimate]]:
    """Split ranked estimates into candidates to measure and those estimated hopelessly slow.

    Of backends without an estimate, something is always measured, and so is the yardstick unless that takes long. What
    third parties promise puts nobody out: nothing holds their estimates to the truth.
    """
    known = [estimate for estimate in estimates if estimate.seconds is not None]
    trusted = [estimate for estimate in known if registry.is_built_in(estimate.candidate.backend)] or known
    limit = min((estimate.seconds or 0.0 for estimate in trusted), default=0.0) * _HOPELESS[effort]
    keep, leave = [], []
    for estimate in estimates:
        yardstick = estimate.candidate.backend.name == YARDSTICK
        if estimate.seconds is None or estimate.seconds <= max(limit, _LONGEST_YARDSTICK * yardstick):
            keep.append(estimate.candidate)
        else:
            leave.append(estimate)
    return keep, leave


def fits_memory(workspace: int, options: Options) -> bool:
    """Return whether this much workspace is within the memory limit."""
    return options.memory_limit is None or workspace <= options.memory_limit


def accurate_by_kind(backend: Backend, options: Options) -> bool:
    """Return whether a backend's unmeasured accuracy may do: a number asks for a measurement of transforms."""
    exact = isinstance(options.accuracy, float) or options.accuracy == "strict"
    return not exact or backend.numerics.kind == "local"


def accurate_by_bound(candidate: Candidate, problem: Problem, options: Options) -> bool:
    """Return whether an unmeasured candidate of a backend ``accurate_by_kind`` keeps within a number by its own bound.

    An accuracy class goes by the kind alone. A backend whose bound raises keeps within no number.
    """
    if problem.is_integer or not isinstance(options.accuracy, float):
        return True
    try:
        growth = float(candidate.backend.numerics.growth(problem, candidate.config))
    except (Exception, SystemExit):  # noqa: BLE001  # somebody's backend must not stop the others
        return False
    return growth * epsilon(problem.sum_dtype) + ROUNDING.get(problem.dtype, 0.0) <= options.accuracy


def measured_error(candidate: Candidate, rows: Iterable[Result]) -> float | None:
    """Return the worst error that was measured of a candidate, None if none was.

    Sums over windows of their own differ little between a backend's configs, so there its others count too.
    """
    backend = candidate.backend
    own = [row for row in rows if (row.backend, row.version) == (backend.name, backend.version)]
    same = [row.error for row in own if row.config == candidate.config]
    if not same and backend.numerics.kind == "local":
        same = [row.error for row in own]
    return max(same, default=None)


def accurate_by_measure(backend: Backend, problem: Problem, error: float, options: Options) -> bool:
    """Return whether a measured error is within what the options ask for."""
    if problem.is_integer:
        return True
    if isinstance(options.accuracy, float):
        return error <= options.accuracy
    # A low-precision result carries its storage's rounding, which no candidate can avoid.
    rounding = ROUNDING.get(problem.dtype, 0.0)
    if options.accuracy == "strict":  # whatever growth a local backend declares: the bound of a plain sum, and of what
        limit = plain_growth(problem) + EPILOGUE_GROWTH * bool(problem.epilogue)  # an epilogue adds
        return accurate_by_kind(backend, options) and error <= limit * epsilon(problem.sum_dtype) + rounding
    return error <= ACCURACY_EPS[options.accuracy] * epsilon(problem.sum_dtype) + rounding
