"""Arrays that vectors load well."""

import math

import numpy as np

from convdispatch.arguments import Array

CACHE_LINE = 64


def aligned(shape: tuple[int, ...], dtype: str) -> Array:
    """Return an array of zeros that begins at a cache line, so that no vector of it lies across two."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + size].view(dtype).reshape(shape)
