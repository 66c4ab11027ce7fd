"""How ``depthwise`` sums a tile whose pixels are a fixed step apart, for one vector of filters after another.

A tile is a run of outputs along a row, or several rows of such runs. A kernel tells of it in tuples:

- ``pixels``: the first one's address, and the bytes from row to row, from one chunk of taps to the next, and from pixel
  to pixel,
- ``filters``: the address of a vector's, the bytes of these, how many vectors there are, and how many filters,
- ``size``: how many rows of a filter there are, and chunks of taps in each,
- ``ends``: what ``ending`` returns.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from convdispatch.backends._activation import RELU, RELU6
from convdispatch.backends._jit import compilable, inlined
from convdispatch.backends._put import put_whole
from convdispatch.backends._slide import slide, slide_found
from convdispatch.backends._tile import add_to_all, add_to_each, clamp, zeros
from convdispatch.backends._vector import prefetch
from convdispatch.memory import CACHE_LINE


@dataclass(frozen=True)
class DepthwiseForm:
    """What a kernel is compiled for.

    Attributes:
        tile: outputs along a row.
        high: rows of outputs of a tile, where all that these see lies inside.
        down: rows of a filter that are done together where they lie inside, or 0.
        taps: of a row of a filter that are done together: a chunk.
        stride: of outputs among the pixels of a chunk; 1 where taps are done one at a time, and share no pixel.
        is_dilated: whether the pixels of a chunk lie apart.
        group_c: channels of a group of which a vector holds several.
        group_k: filters of such a group; both are 1 where a vector holds filters of neighbouring channels.
        lanes: filters of a vector.
        itemsize: bytes of a value.
        is_streamed: whether outputs are streamed past the caches, where they begin at a cache line.
        prefetches: whether pixels are prefetched a tile ahead.
    """

    tile: int
    high: int
    down: int
    taps: int
    stride: int
    is_dilated: bool
    group_c: int
    group_k: int
    lanes: int
    itemsize: int
    is_streamed: bool
    prefetches: bool

    @property
    def span(self) -> int:
        """Pixels under a tile that a chunk of taps sees."""
        return (self.tile - 1) * self.stride + self.taps

    @property
    def seen_rows(self) -> int:
        """Rows of pixels that a tile of several rows sees; 0 where it has one."""
        return (self.high - 1) * self.stride + self.down if self.high > 1 else 0


@compilable
def place(outputs, first, down, across):  # type: ignore[no-untyped-def]
    """Fill a table with the addresses of a tile's outputs, ``down`` and ``across`` bytes apart."""
    for i in range(outputs.shape[0]):
        for j in range(outputs.shape[1]):
            outputs[i, j] = first + i * down + j * across


@compilable
def _is_moved_back(left, high):  # type: ignore[no-untyped-def]
    """Return whether so many rows, left behind the last whole tile, are a tile moved back, which does some again."""
    return 2 * left > high


@compilable
def rows_together(row, first, end, high):  # type: ignore[no-untyped-def]
    """Return where a tile of a run of rows begins, and how many it has: ``high``, or one."""
    left = end - row
    if left < high <= end - first and _is_moved_back(left, high):
        return end - high, high
    return row, (high if high <= left else 1)


def shared_out(rows: int, high: int) -> tuple[int, int]:
    """Return how many of a run of rows ``rows_together`` has done in tiles, some of them again, and how many alone."""
    tiles, left = divmod(rows, high)
    if tiles and _is_moved_back(left, high):
        return (tiles + 1) * high, 0
    return tiles * high, left


@inlined
def ending(bias, zero, residual, out, streamed, code, itemsize):  # type: ignore[no-untyped-def]
    """Return how sums begin and end.

    That is the address of the bias, and what is added to it for each filter; whether there is a residual, and how far
    it is from the output; the limits of values; and whether these go past the caches.
    """
    # Without a bias, vectors of zeros: a step of 0 stays with the first.
    if bias.size:
        start, step = np.int64(bias.ctypes.data), itemsize
    else:
        start, step = np.int64(zero.ctypes.data), 0
    beside = np.int64(residual.ctypes.data) - np.int64(out.ctypes.data)
    low, high = (0.0 if RELU <= code <= RELU6 else -math.inf), (6.0 if code == RELU6 else math.inf)
    streams = streamed and out.ctypes.data % CACHE_LINE == 0
    return start, step, residual.size > 0, beside, low, high, streams


@inlined
def begun(count, ends, k0, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Return so many sums of filters from ``k0`` on, which begin as the bias."""
    return add_to_all(zeros(count, 1, lanes, itemsize), count, ends[0] + k0 * ends[1])


@inlined
def leave(sums, count, outputs, offset, ends):  # type: ignore[no-untyped-def]
    """Store sums brought between the limits; with the residual, if there is one."""
    _, _, adds, beside, low, high, streams = ends
    if adds:
        sums = add_to_each(sums, count, outputs, beside + offset)
    put_whole(clamp(sums, low, high), count, outputs, offset, streams)


@functools.cache
def flat_tile(form: DepthwiseForm) -> Any:
    """Return what sums a tile of one row of outputs, with all rows of a filter at once if they are ``form.down``."""
    tile, down, taps, stride = form.tile, form.down, form.taps, form.stride
    group_c, group_k, lanes, itemsize = form.group_c, form.group_k, form.lanes, form.itemsize
    chunk_bytes = taps * group_c * lanes * itemsize

    @inlined
    def sum_tile(pixels, filters, size, outputs, ends):  # type: ignore[no-untyped-def]
        first, row_step, chunk_step, step = pixels
        packed, filter_bytes, blocks, count = filters
        for block in range(blocks):
            k0 = min(block * lanes, count - lanes)
            here, weights = first + k0 // group_k * group_c * itemsize, packed + block * filter_bytes
            sums = begun(tile, ends, k0, lanes, itemsize)
            if size[0] == down:
                sums = slide(sums, 1, down, taps, stride, group_c, group_k, here, row_step, step, weights)
            else:
                for _ in range(size[0]):
                    for j in range(size[1]):
                        at = here + j * chunk_step
                        sums = slide(sums, 1, 1, taps, stride, group_c, group_k, at, 0, step, weights)
                        weights += chunk_bytes
                    here += row_step
            leave(sums, tile, outputs, k0 * itemsize, ends)

    return sum_tile


@inlined
def _no_tile(pixels, filters, outputs, ends):  # type: ignore[no-untyped-def]
    """Do nothing."""


@functools.cache
def finder(form: DepthwiseForm) -> Any:
    """Return what fills a table with the addresses of the pixels under a tile of ``form.high`` rows, row by row.

    Those beside the image are the address of zeros.
    """
    rows, span = form.seen_rows, form.span

    @inlined
    def find(table, first, place, size, zero, line, pixel):  # type: ignore[no-untyped-def]
        for i in range(rows):
            width = size[1] if 0 <= place[0] + i < size[0] else 0
            for p in range(span):
                table[i * span + p] = first + p * pixel if 0 <= place[1] + p < width else zero
            first += line

    return find


def _tile_of_rows(form: DepthwiseForm, add_window: Any) -> Any:
    """Return what sums a tile of ``form.high`` rows, given what adds the products of a window at an offset."""
    if form.high == 1:
        return _no_tile
    lanes, itemsize, all_sums = form.lanes, form.itemsize, form.high * form.tile

    @inlined
    def sum_tile(pixels, filters, outputs, ends):  # type: ignore[no-untyped-def]
        packed, filter_bytes, blocks, count = filters
        for block in range(blocks):
            k0 = min(block * lanes, count - lanes)
            sums = begun(all_sums, ends, k0, lanes, itemsize)
            sums = add_window(sums, pixels, k0 * itemsize, packed + block * filter_bytes)
            leave(sums, all_sums, outputs, k0 * itemsize, ends)

    return sum_tile


@functools.cache
def found_tile(form: DepthwiseForm) -> Any:
    """Return what does as ``high_tile``'s, with pixels whose addresses are in a table, row by row."""
    high, down, taps, stride = form.high, form.down, form.taps, form.stride

    @inlined
    def add_window(sums, table, offset, weights):  # type: ignore[no-untyped-def]
        return slide_found(sums, high, down, taps, stride, 1, 1, table, offset, weights)

    return _tile_of_rows(form, add_window)


@functools.cache
def high_tile(form: DepthwiseForm) -> Any:
    """Return what sums a tile of ``form.high`` rows of outputs, under whole filters; of one row there is nothing."""
    high, down, taps, stride, vector = form.high, form.down, form.taps, form.stride, form.lanes * form.itemsize
    seen, span, ahead = form.seen_rows, form.span, form.tile if form.prefetches else 0

    @inlined
    def add_window(sums, pixels, offset, weights):  # type: ignore[no-untyped-def]
        first, row_step, _, step = pixels
        # Each vector of filters prefetches some of the next tile's pixels, in the order in which these lie in memory.
        coming = first + span * step + ahead * offset
        for i in range(seen - high, seen):
            for q in range(ahead):
                prefetch(coming + i * row_step + q * vector)
        return slide(sums, high, down, taps, stride, 1, 1, first + offset, row_step, step, weights)

    return _tile_of_rows(form, add_window)
