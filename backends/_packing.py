"""Filters and biases in the order in which kernels read them."""

import numpy as np

from convdispatch.arguments import Array
from convdispatch.memory import aligned


def for_columns(bias: Array | None, dtype: str, count: int) -> Array:
    """Return ``[K, count]``: each filter's bias for so many columns of a tile; ``[0, count]`` if there is none."""
    spread = aligned((0 if bias is None else len(bias), count), dtype)
    if bias is not None:
        spread[...] = bias[:, np.newaxis]
    return spread


def by_blocks(values: Array, block: int) -> Array:
    """Return ``[groups, ..., K]`` as ``[groups, blocks, ..., block]``, aligned, the last block filled up with zeros."""
    groups, *between, k = values.shape
    packed = aligned((groups, -(-k // block), *between, block), values.dtype)
    for number in range(packed.shape[1]):
        part = values[..., number * block : (number + 1) * block]
        packed[:, number, ..., : part.shape[-1]] = part
    return packed


def by_vectors(values: Array, lanes: int) -> Array:
    """Return ``[..., K]`` as ``[vectors, ..., lanes]``, aligned, the last vector moved back until it fits."""
    *before, k = values.shape
    packed = aligned((-(-k // lanes), *before, lanes), values.dtype)
    for number, part in enumerate(packed):
        first = min(number * lanes, k - lanes)
        part[...] = values[..., first : first + lanes]
    return packed


def by_phases(filters: Array, period: int) -> Array:
    """Return ``[KH, KW, C, K]`` as ``[A, period, B, period, C, K]`` in float64, the last rows and columns filled up."""
    kh, kw, *rest = filters.shape
    rows, columns = -(-kh // period), -(-kw // period)
    whole = np.zeros((rows * period, columns * period, *rest))
    whole[:kh, :kw] = filters
    return whole.reshape(rows, period, columns, period, *rest)
