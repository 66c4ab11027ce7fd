"""What there is to tune in a workload, in which order, and how much of the time each part may take.

Where a recording says how many seconds a program spent on a problem, those seconds are what is at stake: the most
come first and get the largest share of the time. What the profile knows already has nothing at stake.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from convdispatch.arguments import DEPLOYMENTS
from convdispatch.errors import ArgumentError, WorkloadError
from convdispatch.profile import Key
from convdispatch.tuning.workload import Layer, Workload


@dataclass(frozen=True)
class Task:
    """One layer in one deployment.

    Attributes:
        layer: the layer.
        key: what its entry is kept under.
        stake: its part in the time to be spent; 0 where nothing need be.
    """

    layer: Layer
    key: Key
    stake: float


def tasks(
    load: Workload,
    deployments: Sequence[str],
    machine: str,
    budget: int,
    *,
    threads: int | None = None,
    is_settled: Callable[[Key], bool] | None = None,
) -> list[Task]:
    """Return what is to be tuned, in order.

    Args:
        load: the workload; a layer that was recorded in one deployment is tuned for that one alone.
        deployments: which deployments may be tuned.
        machine: id of this machine's fingerprint.
        budget: the thread budget of layers that were recorded without.
        threads: the thread budget of all, whatever was recorded; None for what each says.
        is_settled: whether the profile answers a key already; None where it is not asked.

    Returns:
        The tasks: in the workload's order where no layer says its seconds, else by seconds, the most first.

    Raises:
        ArgumentError: if there are no deployments.
        WorkloadError: if no layer is called in any of the deployments.
    """
    if not deployments:
        raise ArgumentError(f"deployments must be at least one of {', '.join(DEPLOYMENTS)}; got {deployments!r}")
    found: dict[Key, Layer] = {}
    for layer in load.layers:
        for deployment in deployments:
            if layer.deployment in {None, deployment}:
                key = Key(layer.problem, deployment, threads or layer.threads or budget, machine)
                found[key] = found[key].plus(layer) if key in found else layer
    if not found:
        raise WorkloadError(f"no layer of workload {load.name!r} was recorded as {' or '.join(deployments)}")
    recorded = [layer.seconds for layer in found.values() if layer.seconds]
    # A layer somebody added by hand to a recording comes after what was seen to matter, but comes.
    unknown = min(recorded, default=1.0)
    ordered = found.items()
    if recorded:
        ordered = sorted(found.items(), key=lambda item: -(item[1].seconds or 0.0))  # type: ignore[assignment]
    return [
        Task(layer, key, 0.0 if is_settled and is_settled(key) else layer.seconds or unknown) for key, layer in ordered
    ]


def parts(work: Sequence[Task]) -> list[float]:
    """Return for each task, in order, which part of the time that is left when it begins it may take."""
    totals = list(itertools.accumulate(task.stake for task in reversed(work)))
    return [task.stake / total if total else 1.0 for task, total in zip(work, reversed(totals), strict=True)]
