"""What the command line prints of a tuning run or an explanation, as texts and as data for JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from convdispatch import dispatch
from convdispatch.backend import Backend
from convdispatch.errors import BackendRejectedError, ProfileMissError
from convdispatch.explain import Explanation, explain_problem
from convdispatch.heuristic import YARDSTICK
from convdispatch.problem import Problem
from convdispatch.profile import Entry
from convdispatch.tuning.cluster import ClusterReport
from convdispatch.tuning.layers import LayerReport
from convdispatch.tuning.tuner import TuneReport
from convdispatch.units import time_text


def summary(backend: Backend) -> str:
    """Return the first line of a backend's description."""
    return ((type(backend).__doc__ or "").strip().splitlines() or [""])[0]


def rate_text(problem: Problem, seconds: float) -> str:
    """Return direct-algorithm GFLOP/s, the same unit for every backend."""
    return f"{problem.flops / seconds / 1e9:.3g}" if seconds else "-"


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


def _ratio(entry: Entry, backend: str | None) -> float | None:
    """Return a backend's best time over the winner's; the slowest backend's where the name is None."""
    times = dict(rivals(entry))
    return max(times.values()) if backend is None else times.get(backend)


def said_of(layer: LayerReport) -> str:
    """Return what became of a layer, in a line."""
    what = f"{layer.layer.problem} ({layer.deployment})"
    if layer.entry is None:
        return f"{what}: {layer.status}{f', {layer.reason}' if layer.reason else ''}"
    winner = layer.entry.winner
    busy = f" (busy: {', '.join(layer.busy)})" if layer.busy else ""
    return f"{what}: {layer.status}, {winner.name} {time_text(winner.median)}{busy}"


def tune_cells(layer: LayerReport) -> tuple[str, ...]:
    """Return a layer as texts: layer, count, problem, winner, time, GFLOP/s, vs worst, vs direct."""
    name, problem = layer.layer.name, layer.layer.problem
    if layer.entry is None:
        return name, str(layer.layer.count), str(problem), layer.status, "-", "-", "-", "-"
    winner = layer.entry.winner
    ratios = [_ratio(layer.entry, None), _ratio(layer.entry, YARDSTICK)]
    shown = ["-" if ratio is None else f"{ratio:.3g}x" for ratio in ratios]
    rate = rate_text(problem, winner.median)
    chosen = " ".join([winner.name, *(f"({flag})" for flag in layer.entry.flags)])
    return name, str(layer.layer.count), str(problem), chosen, time_text(winner.median), rate, *shown


def total_line(layers: Sequence[LayerReport]) -> str:
    """Return one pass over the layers that have a winner, each as often as it runs, against ``direct``."""
    done = [(layer.layer, layer.entry) for layer in layers if layer.entry is not None]
    total = sum(layer.count * entry.winner.median for layer, entry in done)
    if not done:
        return "no layer has a winner"
    line = f"one pass of these layers: {time_text(total)}"
    direct = [layer.count * entry.winner.median * (_ratio(entry, YARDSTICK) or 0) for layer, entry in done]
    if all(direct):
        line += f", {sum(direct) / total:.3g} times faster than {YARDSTICK}"
    missing = len(layers) - len(done)
    return line + (f" ({missing} without a winner not counted)" if missing else "")


def recorded_line(layers: Sequence[LayerReport]) -> str | None:
    """Return how much of the recorded time is settled, and what it would take now; None where none was recorded."""
    total = sum(layer.layer.seconds or 0.0 for layer in layers)
    if not total:
        return None
    done = [layer for layer in layers if layer.entry is not None]
    before = sum(layer.layer.seconds or 0.0 for layer in done)
    now = sum(layer.layer.count * layer.entry.winner.median for layer in done if layer.entry is not None)
    return f"recorded: {time_text(total)} of calls; those with a winner took {time_text(before)}" + (
        f", and would take {time_text(now)} by their winners" if done else ""
    )


def not_taken(layers: Sequence[LayerReport]) -> Iterator[str]:
    """Yield what calls here use instead of winners that the options in force do not allow, and why."""
    for layer in layers:
        problem = layer.layer.problem
        if layer.entry is None or _used(problem, layer.deployment) == layer.entry.winner.name:
            continue
        told = explain_problem(problem, layer.deployment)  # which estimates everybody
        used = f"calls use {told.chosen}" if told.chosen else "nothing may be used"
        yield f"{problem} ({layer.deployment}): {used} under the options in force: {told.evidence.detail}"


def _used(problem: Problem, deployment: str) -> str | None:
    try:
        return dispatch.look(problem, deployment).candidate.name
    except (BackendRejectedError, ProfileMissError):
        return None


def tune_data(result: TuneReport) -> dict[str, Any]:
    """Return a tuning run as plain data."""
    layers = []
    for layer in result.layers:
        row: dict[str, Any] = {
            "name": layer.layer.name,
            "count": layer.layer.count,
            "problem": str(layer.layer.problem),
            "deployment": layer.deployment,
            "recorded_seconds": layer.layer.seconds,
            "status": layer.status,
            "left_out": list(layer.left_out),
            "reason": layer.reason,
            "busy": list(layer.busy),
        }
        if layer.entry is not None:
            winner = layer.entry.winner
            row |= {
                "winner": winner.name,
                "seconds": winner.median,
                "interval": winner.interval,
                "spread": winner.spread,
                "error": winner.error,
                "workspace": winner.workspace,
                "flags": list(layer.entry.flags),
                "vs_worst": _ratio(layer.entry, None),
                "vs_direct": _ratio(layer.entry, YARDSTICK),
                "backends": {name: ratio for name, ratio in rivals(layer.entry)},  # noqa: C416  # says what it maps
                "failures": {failure.name: failure.reason for failure in layer.entry.failures},
            }
        layers.append(row)
    return {
        "workload": result.workload.name,
        "machine": result.machine,
        "threads": result.threads,
        "profile": str(result.profile),
        "seconds": result.seconds,
        "complete": result.complete,
        "flagged": result.flagged,
        "layers": layers,
    }


def cluster_data(result: ClusterReport) -> dict[str, Any]:
    """Return a tuning run on a cluster as plain data."""
    return {
        "workload": result.workload.name,
        "profile": str(result.profile),
        "seconds": result.seconds,
        "complete": result.complete,
        "kinds": [
            {"hosts": list(kind.hosts), "cpu": kind.machine.cpu} | tune_data(kind.report) for kind in result.kinds
        ],
        "left_out": {left.address: left.reason for left in result.left_out},
    }


def explanation_data(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as plain data."""
    return {
        "problem": str(explanation.problem),
        "deployment": explanation.deployment,
        "threads": explanation.threads,
        "machine": explanation.machine,
        "chosen": explanation.chosen,
        "source": explanation.evidence.source,
        "detail": explanation.evidence.detail,
        "layer": explanation.layer,
        "rows": [asdict(row) for row in explanation.rows],
    }
