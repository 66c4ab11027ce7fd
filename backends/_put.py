"""How a tile of sums leaves its registers: a residual is added, values are clamped, and then they are stored.

``outputs`` tells where a tile's rows lie, as in ``_tile``; ``offset`` is how many bytes behind that they are stored.
"""

import math

from convdispatch.backends._activation import RELU, RELU6
from convdispatch.backends._atomics import stack
from convdispatch.backends._jit import inlined
from convdispatch.backends._tile import add_some_to_each, add_to_each, clamp, store, store_some, stream
from convdispatch.backends._vector import copy
from convdispatch.backends._vector_activation import activate_all


@inlined
def clamped(sums, code):  # type: ignore[no-untyped-def]
    """Return a tile with the activation applied, if that is a clamp."""
    if code == RELU:
        sums = clamp(sums, 0.0, math.inf)
    elif code == RELU6:
        sums = clamp(sums, 0.0, 6.0)
    return sums


@inlined
def finished(sums, rows, outputs, offset, adds, code, count, whole):  # type: ignore[no-untyped-def]
    """Return a tile of which ``count`` values of each row count, ``whole`` at most: clamped, with what it ``adds``."""
    if adds:
        if count == whole:
            sums = add_to_each(sums, rows, outputs, offset)
        else:
            sums = add_some_to_each(sums, rows, outputs, offset, count)
    return clamped(sums, code)


@inlined
def put_whole(sums, rows, outputs, offset, streams):  # type: ignore[no-untyped-def]
    """Store a tile; if it ``streams``, past the caches."""
    if streams:
        stream(sums, rows, outputs, offset)
    else:
        store(sums, rows, outputs, offset)


@inlined
def put(sums, rows, outputs, offset, count, whole, streams):  # type: ignore[no-untyped-def]
    """Store ``count`` values of each row of a tile, ``whole`` at most, and whole rows as ``put_whole`` does."""
    if count < whole:
        store_some(sums, rows, outputs, offset, count)
    else:
        put_whole(sums, rows, outputs, offset, streams)


@inlined
def put_tile(sums, rows, outputs, offset, adds, beside, code, streams):  # type: ignore[no-untyped-def]
    """Store a tile, clamped, as ``put_whole`` does. If it ``adds`` a residual, that is ``beside`` bytes away."""
    if adds:
        sums = add_to_each(sums, rows, outputs, beside + offset)
    put_whole(clamped(sums, code), rows, outputs, offset, streams)


@inlined
def put_activated(sums, rows, outputs, count, whole, code, slope, words, itemsize):  # type: ignore[no-untyped-def]
    """Store ``count`` values of each row of a tile, which takes so many ``words``, with an activation that is no clamp.

    It is not done where the values belong: another thread may have done some of them.
    """
    room, step = stack(words), whole * itemsize
    store(sums, rows, (room, step), 0)
    for r in range(rows):
        activate_all(room + r * step, count, code, slope, itemsize)
        copy(outputs[0] + r * outputs[1], room + r * step, count * itemsize)
