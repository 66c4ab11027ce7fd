"""A candidate's check: made ready, timed once, and compared with the reference, before it computes anybody's call."""

from collections.abc import Callable
from dataclasses import dataclass

from convdispatch.backend import Candidate
from convdispatch.tuning import hard_inputs
from convdispatch.tuning.clock import Clock
from convdispatch.tuning.gate import Trial


@dataclass(frozen=True)
class Checked:
    """What a candidate's check in the background found.

    Attributes:
        candidate: who.
        seconds: of a call, on arrays of its own.
        packing: seconds of packing the filters.
        error: largest deviation from the reference over the largest output, on random and on hard inputs; NaN where it
            was too slow to be compared.
        workspace: scratch bytes.
        slow: whether it is too slow to be tried.
        reason: why its result is wrong, or None.
    """

    candidate: Candidate
    seconds: float
    packing: float
    error: float
    workspace: int
    slow: bool
    reason: str | None


def check(
    candidate: Candidate, arrays: Trial, clock: Clock, is_hopeless: Callable[[float], bool], *, called: bool
) -> tuple[Checked, float]:
    """Return what a check finds, and the seconds that it costs but for compiling.

    Args:
        candidate: who is checked.
        arrays: what it computes.
        clock: tells the time.
        is_hopeless: whether so many seconds of a call need no comparing any more.
        called: whether filters are packed in every call.
    """
    output = arrays.plan(candidate)(arrays.input, out=arrays.spoiled_output(), residual=arrays.residual)
    started = clock()  # everything is compiled from here on
    plan = arrays.plan(candidate)
    packed = clock()
    plan(arrays.input, residual=arrays.residual)
    ended = clock()
    seconds = ended - (started if called else packed)
    slow = is_hopeless(seconds)
    verdict = None if slow else hard_inputs.worse(arrays.judge(candidate, output), candidate, arrays.problem)
    cost = 2 * (ended - started) + clock() - ended  # the first time cost as much as the second, and compiling
    error, reason = (verdict.error, verdict.reason) if verdict else (float("nan"), None)
    space = candidate.workspace(arrays.problem)
    return Checked(candidate, seconds, packed - started, error, space, slow, reason), cost
