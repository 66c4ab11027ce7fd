"""Decides: problem -> profile -> tuning, if wished -> estimate -> plan. The only place that does."""

import difflib
import functools
import threading
import warnings
from dataclasses import dataclass, replace
from typing import Any, cast

from convdispatch import arguments, heuristic, machine, profile, registry, settings, transfer
from convdispatch.arguments import Array, as_array, name_of
from convdispatch.backend import Backend, Candidate, Config, Effort, seen_by
from convdispatch.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    BackendRejectedError,
    ConvDispatchError,
    ProfileWarning,
)
from convdispatch.plan import Evidence, Plan, check_bias, check_filters
from convdispatch.problem import Problem
from convdispatch.profile import Key, Result
from convdispatch.settings import Options

Forced = tuple[str, Config | None] | None

_one_miss_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Decision:
    """What was chosen for a problem, and why."""

    candidate: Candidate
    evidence: Evidence


def decide(problem: Problem, deployment: str, forced: Forced = None) -> Decision:
    """Choose a candidate under the options in force.

    Args:
        problem: what is to be computed.
        deployment: ``"plan"`` or ``"call"``.
        forced: a backend's name, with a config or None, if the caller insists.

    Raises:
        BackendRejectedError: if the forced backend cannot do it, or the options leave none that can.
        UnknownBackendError, BackendUnavailableError: if the forced backend is not there.
    """
    return _decide(problem, deployment, forced, settings.current(), registry.generation(), profile.generation())


@functools.lru_cache(maxsize=8192)
def _decide(
    problem: Problem,
    deployment: str,
    forced: Forced,
    options: Options,
    backends_generation: int,  # noqa: ARG001  # part of what is remembered under
    profile_generation: int,  # noqa: ARG001
) -> Decision:
    if forced is not None:
        return _forced(problem, deployment, forced, options)
    return (
        _from_profile(problem, deployment, options)
        or _tuned(problem, deployment, options)
        or _estimated(problem, deployment, options)
    )


def key_for(problem: Problem, deployment: str, options: Options) -> Key:
    """Return the profile's key for a problem on this machine under these options."""
    return Key(problem, deployment, heuristic.thread_budget(options), machine.current().id)


def _forced(problem: Problem, deployment: str, forced: tuple[str, Config | None], options: Options) -> Decision:
    name, config = forced
    backend = registry.get(name)
    if reason := backend.rejects(seen_by(backend, problem)):
        raise BackendRejectedError(f"backend {name!r} cannot do {problem}: {reason}")
    if config is not None:
        _check_keys(backend, problem, config)
        given = {"threads": heuristic.thread_budget(options)} if backend.parallel else {}
        return Decision(
            Candidate(backend, Config({**given, **config})),
            Evidence("forced", f"backend={name!r} with its config"),
        )
    only = replace(options, forbid=tuple(n for n in registry.names() if n != name))
    found = _from_profile(problem, deployment, only)
    if found:
        candidate = found.candidate
    else:
        ranking = transfer.rank(problem, [backend], heuristic.thread_budget(options), deployment)
        candidate = ranking.estimates[0].candidate
    by = f"its config from {found.evidence}" if found else "its config estimated"
    return Decision(candidate, Evidence("forced", f"backend={name!r}, {by}"))


def _check_keys(backend: Backend, problem: Problem, config: Config) -> None:
    """Refuse keys that the backend would pass over: a misspelt one is meant to say something."""
    if problem.is_trivial:
        return
    known = {key for each in backend.configs(seen_by(backend, problem), "exhaustive") for key in each} | {"threads"}
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise ArgumentError(f"backend {backend.name!r} has no config {key!r}; {hint}")


def _from_profile(problem: Problem, deployment: str, options: Options) -> Decision | None:
    for layer, entry in profile.find(key_for(problem, deployment, options)):
        result = entry.best(lambda result: _allows(result, problem, options))
        if result is None:
            continue
        rank = "winner" if result is entry.winner else "best allowed"
        detail = f"{rank} of {len(entry.results)} in the {layer} profile, {result.median * 1e6:.4g} us, {entry.tuned}"
        return Decision(Candidate(registry.get(result.backend), result.config), Evidence("profile", detail))
    return None


def _allows(result: Result, problem: Problem, options: Options) -> bool:
    """Return whether a stored result may be used: its backend as it was measured, and all options met."""
    if result.backend in options.forbid or result.backend not in registry.names():
        return False
    try:
        backend = registry.get(result.backend)
        if backend.version != result.version or backend.rejects(seen_by(backend, problem)):
            return False
        workspace = Candidate(backend, result.config).workspace(problem)
    except ConvDispatchError as error:
        warnings.warn(f"profile: {result.name} for {problem} is ignored: {error}", ProfileWarning, stacklevel=2)
        return False
    if not heuristic.fits_memory(workspace, options):
        return False
    return heuristic.accurate_by_measure(backend, problem, result.error, options)


def _tuned(problem: Problem, deployment: str, options: Options) -> Decision | None:
    if options.tuning != "on-miss" or problem.is_empty:
        return None
    from convdispatch.tuning import tuner  # noqa: PLC0415  # needed only where something is measured

    effort = "measure" if options.effort == "estimate" else options.effort
    key = key_for(problem, deployment, options)
    everyone = registry.available()
    with _one_miss_at_a_time:
        if any(tuner.suffices(entry, cast("Effort", effort), everyone) for _, entry in profile.find(key)):
            # Another thread has measured it meanwhile; or nothing measured is allowed, and doing so again is no use.
            return _from_profile(problem, deployment, options)
        try:
            outcome = tuner.tune_problem(key, effort=cast("Effort", effort), seconds=options.time_limit)
        except BackendError as error:
            warnings.warn(f"tuning {problem} failed: {error}", ProfileWarning, stacklevel=2)
            return None
        tuner.keep(outcome.entry)
    found = _from_profile(problem, deployment, options)
    return found and Decision(found.candidate, Evidence("tuned", found.evidence.detail))


def _estimated(problem: Problem, deployment: str, options: Options) -> Decision:
    usable, refused = heuristic.usable(problem, options)
    allowed = [backend for backend in usable.values() if heuristic.accurate_by_kind(backend, options)]
    ranking = transfer.rank(problem, allowed, heuristic.thread_budget(options), deployment)
    for estimate in ranking.estimates:
        if estimate.seconds is None:
            break  # unknown ones come last, and nothing unknown is chosen unmeasured
        if heuristic.fits_memory(estimate.candidate.workspace(problem), options):
            basis = f" ({ranking.basis})" if ranking.basis else ""
            said = f"{estimate.seconds * 1e6:.4g} us predicted{basis}"
            return Decision(estimate.candidate, Evidence("estimate", said))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    limits = f", memory_limit={options.memory_limit}" if options.memory_limit is not None else ""
    raise BackendRejectedError(
        f"no backend may do {problem} under accuracy={options.accuracy!r}, forbid={options.forbid}{limits}"
        + (f" ({reasons})" if reasons else "")
    )


def parse_forced(backend: Any) -> Forced:
    """Return what ``backend=`` asks for: a name, or a name with a config.

    Raises:
        ArgumentTypeError: if it is neither.
    """
    if backend is None:
        return None
    if isinstance(backend, str):
        return backend, None
    if isinstance(backend, tuple | list) and len(backend) == 2 and isinstance(backend[0], str):
        try:
            config = Config(backend[1])
        except (TypeError, ValueError):
            pass
        else:
            settings.parse_threads(config.get("threads"))
            return backend[0], config
    raise ArgumentTypeError(f"backend must be a name, or (name, {{config}}); got {backend!r}")


def make_plan(
    problem: Problem, filters: Array, bias: Array | None, deployment: str = "plan", forced: Forced = None
) -> Plan:
    """Return a plan by the candidate that is chosen; a profile's choice that fails to prepare is passed over."""
    decision = decide(problem, deployment, forced)
    try:
        return Plan(problem, decision.candidate, filters, bias, decision.evidence)
    except ArgumentError as error:
        if decision.evidence.source != "profile" or problem.is_empty:
            raise
        warnings.warn(f"profile: {decision.candidate} for {problem} is ignored: {error}", ProfileWarning, stacklevel=3)
        fallback = _estimated(problem, deployment, settings.current())
        return Plan(problem, fallback.candidate, filters, bias, fallback.evidence)


def checked(
    input_shape: Any,
    dtype: str,
    filters: Any,
    bias: Any,
    *,
    residual: bool,
    filter_format: str,
    **how: Any,
) -> tuple[Problem, Array, Array | None]:
    """Check a call's arguments; return its problem, its filters as HWIO, and its bias.

    Args:
        input_shape: shape of the input in its data format.
        dtype: name of the input's dtype.
        filters, bias: as the caller gave them.
        residual: whether there is one.
        filter_format: ``"HWIO"`` or ``"OIHW"``.
        **how: strides, padding, data_format, dilations, groups, activation.
    """
    weights = as_array("filters", filters)
    if name_of(weights.dtype) != dtype:
        raise ArgumentTypeError(
            f"input and filters must have one dtype; got {dtype} and {weights.dtype.name}: convert one with astype"
        )
    problem = arguments.make_problem(
        input_shape, weights.shape, dtype, filter_format=filter_format, bias=bias is not None, residual=residual, **how
    )
    values = None if bias is None else check_bias(problem, bias)
    return problem, check_filters(problem, weights, filter_format), values
