"""Arrays that vectors load well: where they begin, on what pages they lie."""

import contextlib
import ctypes
import math
import mmap
from typing import Any

import numpy as np

from convdispatch.arguments import Array

CACHE_LINE = 64

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
