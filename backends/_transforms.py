"""Winograd's transforms of input and output as straight-line vector code, and what becomes of doubts about sums."""

import numpy as np

from convdispatch.backends._atomics import write
from convdispatch.backends._jit import njit
from convdispatch.backends._tile import linear
from convdispatch.backends._toomcook import strided
from convdispatch.backends._vector import save

transform_input = linear(lambda m, r, stride: strided(m, r, stride).bt)
transform_output = linear(lambda m, r, stride: strided(m, r, stride).at)


@njit()
def report(doubts, lanes, values, word):  # type: ignore[no-untyped-def]
    """Set the word at an address to 1 if a lane of ``add_doubts``' vector is not 0; ``values`` have its dtype."""
    check = np.zeros(lanes, values.dtype)
    save(check.ctypes.data, doubts)
    for lane in range(lanes):
        if check[lane] != 0:
            write(word, 1)
