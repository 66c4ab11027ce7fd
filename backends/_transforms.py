"""Winograd's transforms of input and output as straight-line vector code, and what becomes of doubts about sums."""

from convdispatch.backends._atomics import write
from convdispatch.backends._jit import compilable, inlined
from convdispatch.backends._toomcook import strided
from convdispatch.backends._tuples import any_doubt, linear, load_apart, save_apart

transform_input = linear(lambda m, r, stride: strided(m, r, stride).bt)
transform_output = linear(lambda m, r, stride: strided(m, r, stride).at)


@inlined
def leave_columns(products, between, half, m, r, stride, n, across, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Transform a vector of tiles' n x across products, ``between`` bytes apart, down to m x across in ``half``."""
    lane_bytes = lanes * itemsize
    for j in range(across):
        column = load_apart(products + j * between, across * between, n, lanes, itemsize)
        save_apart(half + j * lane_bytes, across * lane_bytes, transform_output(column, m, r, stride))


@compilable
def report(doubts, word):  # type: ignore[no-untyped-def]
    """Set the word at an address to 1 if a lane of ``add_doubts``' vector is not 0."""
    if any_doubt(doubts):
        write(word, 1)
