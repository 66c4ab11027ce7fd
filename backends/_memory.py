"""Arrays that vectors load well."""

import contextlib
import ctypes
import math
import mmap
from typing import Any

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import item_bytes
from convdispatch.machine import current
from convdispatch.problem import Problem

CACHE_LINE = 64

#: Of the last cache, this part is left to an output, as a rule: others use it, too.
CACHED_OUTPUT = 0.4

_HEAD = object.__basicsize__
_word_at = ctypes.c_size_t.from_address


def _is_first_field() -> bool:
    """Return whether an array's address is the first thing behind its object's head, as in CPython with NumPy."""
    known = np.empty(1)
    return _word_at(id(known) + _HEAD).value == known.ctypes.data


def _address(array: Array) -> int:
    """Return where an array's elements lie."""
    return array.ctypes.data


def _address_behind_head(array: Array) -> int:
    return _word_at(id(array) + _HEAD).value


#: Return where an array's elements lie; NumPy's own way takes a microsecond, as long as a tiny convolution.
address = _address_behind_head if _is_first_field() else _address


def aligned(shape: tuple[int, ...], dtype: str | np.dtype[Any], *, zero: bool = True) -> Array:
    """Return an array that begins at a cache line, so that no vector of it lies across two.

    NumPy's own begin 16 bytes behind one, as a rule: then every load and store of 64 bytes takes two.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = (np.zeros if zero else np.empty)(size + CACHE_LINE, np.uint8)
    start = -address(raw) % CACHE_LINE
    return raw[start : start + size].view(dtype).reshape(shape)


#: Bytes of an output from which on it pays to begin at a cache line.
LARGE = 1 << 15


def room_for(shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> Array:
    """Return memory for an output of so many bytes: where it is large, from a cache line on."""
    return aligned(shape, dtype, zero=False) if size >= LARGE else np.empty(shape, dtype)


#: Bytes of a huge page, as most systems have them.
_HUGE = 2 << 20


def on_huge_pages(size: int) -> Array:
    """Return so many bytes on huge pages where the system has such; none are taken before they are written to.

    Small pages lie wherever the system had some, so that it is luck, another in each process, how many of an array's
    want the same places of a core's second cache.

    Raises:
        MemoryError: if the system has not so many.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return aligned((size,), "uint8", zero=False)
    try:
        memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot map {size} bytes: {error.strerror}") from error
    with contextlib.suppress(OSError):  # a system may know the word and have none
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -address(whole) % _HUGE
    return whole[start : start + size]


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


def in_last_caches(problem: Problem) -> float:
    """Return the bytes of a problem's input and output, in so many last caches."""
    p = problem
    values = math.prod(p.input_shape) + math.prod(p.output_shape)
    return values * item_bytes(p.dtype) / max(1, current().caches[2])


def streams(shape: tuple[int, ...], itemsize: int, run: int, row: int, part: float = CACHED_OUTPUT) -> bool:
    """Return whether outputs are better written past the caches, which hold the input and other things too.

    Args:
        shape: of the output.
        itemsize: bytes of a value.
        run: values that are written at a time; they must be whole cache lines.
        row: values from one run's beginning to the next's; they must be so too, or lines would begin elsewhere.
        part: of the last cache, which is left to the output.
    """
    whole = run * itemsize % CACHE_LINE == row * itemsize % CACHE_LINE == 0
    return whole and math.prod(shape) * itemsize > part * current().caches[2]
