"""What of a problem the last cache holds, and which outputs are better written past it."""

import math

from convdispatch.backend import item_bytes
from convdispatch.backends._activation import unclamped
from convdispatch.machine import current
from convdispatch.memory import CACHE_LINE
from convdispatch.problem import Problem

#: Of the last cache, this part is left to an output, as a rule: others use it, too.
CACHED_OUTPUT = 0.4


def in_last_caches(problem: Problem) -> float:
    """Return the bytes of a problem's input and output, in so many last caches."""
    p = problem
    values = math.prod(p.input_shape) + math.prod(p.output_shape)
    return values * item_bytes(p.dtype) / max(1, current().caches[2])


def should_stream(problem: Problem, run: int, row: int, part: float = CACHED_OUTPUT) -> bool:
    """Return whether outputs are better written by streaming (non-temporal) stores, past the caches.

    An ordinary store first loads the line that it overwrites, and drives out the input and other things.

    Args:
        problem: what is computed; what is stored before its activation is done must stay in the caches.
        run: values that are written at a time; they must be whole cache lines.
        row: values from one run's beginning to the next's; they must be so too, or lines would begin elsewhere.
        part: of the last cache, which is left to the output.
    """
    size = item_bytes(problem.dtype)
    whole = run * size % CACHE_LINE == row * size % CACHE_LINE == 0 and not unclamped(problem)
    return whole and math.prod(problem.output_shape) * size > part * current().caches[2]
