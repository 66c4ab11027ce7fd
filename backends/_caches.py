"""What of a problem the last cache holds, and which outputs are better written past it."""

import math

from convdispatch.backend import item_bytes
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


def should_stream(shape: tuple[int, ...], itemsize: int, run: int, row: int, part: float = CACHED_OUTPUT) -> bool:
    """Return whether outputs are better written by streaming (non-temporal) stores, past the caches.

    An ordinary store first loads the line that it overwrites, and drives out the input and other things.

    Args:
        shape: of the output.
        itemsize: bytes of a value.
        run: values that are written at a time; they must be whole cache lines.
        row: values from one run's beginning to the next's; they must be so too, or lines would begin elsewhere.
        part: of the last cache, which is left to the output.
    """
    whole = run * itemsize % CACHE_LINE == row * itemsize % CACHE_LINE == 0
    return whole and math.prod(shape) * itemsize > part * current().caches[2]
