"""Lengths in whole cache lines."""

from convdispatch.backends._jit import compilable
from convdispatch.memory import CACHE_LINE


@compilable
def whole_lines(count: int) -> int:
    """Return a number of bytes, or an address, rounded up to whole cache lines."""
    return -(-count // CACHE_LINE) * CACHE_LINE


@compilable
def odd_lines(count: int, itemsize: int) -> int:
    """Return at least so many values that fill an odd number of cache lines.

    Values that are transformed together lie so far apart; were that a multiple of 4 KiB, all of them would want the
    same few places of L1.
    """
    return (-(-count * itemsize // CACHE_LINE) | 1) * CACHE_LINE // itemsize
