"""A filter's values in the order in which tiles of rows take them, for ``image_rows`` and ``fast_fir``.

``add_rows`` takes some rows of one column at a time, whose values stay in registers: a chunk. Filters are cut into
chunks of ``taps`` rows and of one fewer, all columns of a chunk come one after the other, and then those of the next.
"""

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backends._jit import compilable

_MOST = 9


def taps_together(rows: int) -> int:
    """Return how many of a filter's rows are taken at a time, so that their values stay in registers: evenly."""
    return -(-rows // -(-rows // _MOST))


@compilable
def chunks(rows: int, taps: int) -> tuple[int, int]:
    """Return into how many chunks of ``taps`` rows, and how many of one fewer, a filter is cut.

    Args:
        rows: of the filter.
        taps: ``taps_together`` of that many, or of one more.
    """
    number = -(-rows // taps)
    fewer = number * taps - rows
    return number - fewer, fewer


def by_chunks(filters: Array, taps: int) -> Array:
    """Return filters ``[..., KH, KW]`` as ``[..., KH * KW]``: chunk by chunk, and of each one column after another."""
    rows, whole = filters.shape[-2], chunks(filters.shape[-2], taps)[0] * taps
    starts = [*range(0, whole, taps), *range(whole, rows, max(1, taps - 1))]
    parts = np.split(filters, starts[1:], axis=-2)
    return np.concatenate([part.swapaxes(-1, -2).reshape(*filters.shape[:-2], -1) for part in parts], axis=-1)
