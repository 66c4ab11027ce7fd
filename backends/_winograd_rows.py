"""The kernel of ``winograd_rows``: transform rows of the image, multiply, and transform back, all in registers.

Tiles are runs of m outputs of a row. Of each there are n points, and of each point the values of all channels. Rows of
the image are transformed once for all rows of outputs that see them, and stay in L2. Sums of all points of a few tiles
are held in registers while the kernel walks over the filters' rows, chunks of a row's taps, and channels, and are
transformed back there. A chunk has as many taps as a tile, or several, are inputs long: so what one chunk sees of a
tile, another sees of an earlier one, and there is one transform for all chunks.
"""

import functools
from typing import Any

import numpy as np

from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._atomics import add
from convdispatch.backends._epilogue import RELU6, finish
from convdispatch.backends._jit import compilable, inlined
from convdispatch.backends._layout import whole_lines
from convdispatch.backends._memory import CACHE_LINE
from convdispatch.backends._put import put_tile
from convdispatch.backends._tile import add_doubts, add_to_all, load_apart, multiply_points, part, save_apart, zeros
from convdispatch.backends._transforms import report, transform_input, transform_output
from convdispatch.backends._vector import copy, hold
from convdispatch.backends._windows import copy_columns, taps_inside

#: ``filters`` is ``[blocks, KH, chunks, C, points, lanes]``, the last block moved back until it fits; ``stage`` the
#: rows of outputs and the tiles of one that are worked on together.
ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(6), bias=array_of(1), residual=array_of(4), out=array_of(4),
    pads=integers_of(2), strides=integers_of(2), dilation=INTEGER, stage=integers_of(2), code=INTEGER, slope=FLOAT,
    streamed=INTEGER, parts=array_of(2, "int64"), spoiled=INTEGER,
)  # fmt: skip
unpack = ARGUMENTS.unpack
_SPOILED_AT, _DONE_AT = 8 * ARGUMENTS.at["spoiled"], 8 * ARGUMENTS.done_at


@compilable
def row_bytes(tiles: int, points: int, room: int, itemsize: int) -> int:
    """Return the bytes of a transformed row of so many tiles, whose points have room for so many values."""
    return -(-tiles * points * room * itemsize // CACHE_LINE) * CACHE_LINE


@functools.cache
def _entering(m: int, r: int, stride: int, room: int, narrow: int, itemsize: int) -> Any:
    """Return what transforms rows of an image, in vectors of so many values."""
    n, point = stride * (m - 1) + r, room * itemsize

    @compilable
    def enter(values, line, x, image, span, left, tiles):  # type: ignore[no-untyped-def]
        """Transform so many tiles of the image's rows ``span[0]`` to ``span[1]``, from column ``left`` on.

        ``values`` is where they go, ``line`` has room for a row's pixels, zeros beside the image among them.
        """
        height, width, channels = x.shape[1:]
        pixel = channels * itemsize
        for row in range(span[0], span[1]):
            source = x.ctypes.data + ((image * height + row) * width + left) * pixel
            copy_columns(line, source, left, (tiles - 1) * m * stride + n, width, pixel)
            for tile in range(tiles):
                for c in range(0, point, narrow * itemsize):
                    pixels = load_apart(line + tile * m * stride * pixel + c, pixel, n, narrow, itemsize)
                    save_apart(values + tile * n * point + c, point, transform_input(pixels, m, r, stride))
            values += row_bytes(tiles, n, room, itemsize)

    return enter


def _leaving(number: int, together: int, m: int, r: int, stride: int) -> Any:
    """Return what transforms tiles of sums back, from one of ``together`` on, finishes and stores them.

    One after another, so that the next ones' sums may stay in registers meanwhile.
    """
    n = stride * (m - 1) + r

    @inlined
    def leave_one(sums, outputs, step, offset, bias, adds, code, past, doubts):  # type: ignore[no-untyped-def]
        """Do so with one tile; return the doubts.

        ``outputs`` are the tiles' addresses and how far their residuals are from these; pixels are ``step`` apart.
        """
        results = transform_output(part(sums, number, n), m, r, stride)
        doubts = add_doubts(doubts, results)
        if bias:
            results = add_to_all(results, m, bias)
        put_tile(results, m, (outputs[number, 0], step), offset, adds, outputs[number, 1], code, past)
        return doubts

    if number + 1 == together:
        return leave_one
    leave_others = _leaving(number + 1, together, m, r, stride)

    @inlined
    def leave(sums, outputs, step, offset, bias, adds, code, past, doubts):  # type: ignore[no-untyped-def]
        doubts = leave_one(sums, outputs, step, offset, bias, adds, code, past, doubts)
        return leave_others(sums, outputs, step, offset, bias, adds, code, past, doubts)

    return leave


@compilable
def _finish(pixels, code, slope):  # type: ignore[no-untyped-def]
    """Apply an activation that is no clamp to neighbouring pixels."""
    for pixel in pixels:
        finish(pixel, code, slope)


@compilable
def _copy_some(target, source, step, count, size):  # type: ignore[no-untyped-def]
    """Copy so many times ``size`` bytes, ``step`` bytes apart."""
    for i in range(count):
        copy(target + i * step, source + i * step, size)


def _multiplying(together: int, n: int, ahead: int, room: int, lanes: int, itemsize: int) -> Any:
    """Return what multiplies; a chunk's tiles are ``ahead`` of those of the one before."""
    point, tile_bytes, step = room * itemsize, n * room * itemsize, n * lanes * itemsize

    @inlined
    def multiply(values, apart, packed, rows, chunks, channels):  # type: ignore[no-untyped-def]
        """Return the sums of some tiles over so many rows of a filter, which see rows of values ``apart``."""
        sums = zeros(together, n, lanes, itemsize)
        for _ in range(rows):
            for chunk in range(chunks):
                for c in range(channels):
                    value = chunk * ahead * tile_bytes + c * itemsize
                    sums = multiply_points(sums, n, (values, tile_bytes), value, point, packed)
                    packed += step
            values += apart
        return sums

    return multiply


@functools.cache
def compiled(  # noqa: PLR0915
    m: int, r: int, stride: int, together: int, room: int, lanes: int, itemsize: int
) -> CompiledKernel:
    """Return the kernel of F(m, r) for so many tiles together.

    Args:
        m: outputs of a tile.
        r: taps of a chunk; of several, a multiple of ``m * stride``.
        stride: of outputs along rows.
        together: tiles whose sums are held in registers.
        room: values of a point, as many as channels or more: what ``lanes`` is a multiple of, or a multiple of that.
        lanes: filters of a vector.
        itemsize: bytes of a value.
    """
    n, vector, ahead = stride * (m - 1) + r, lanes * itemsize, r // (m * stride)
    tile_bytes, step = n * room * itemsize, n * vector
    enter, leave = _entering(m, r, stride, room, min(room, lanes), itemsize), _leaving(0, together, m, r, stride)
    multiply = _multiplying(together, n, ahead, room, lanes, itemsize)

    def convolve(arguments, job):  # type: ignore[no-untyped-def]  # noqa: PLR0915
        """Compute some rows of all images and some tiles of these, as the job says."""
        x, u, bias, residual, out, pads, strides, dilation, stage, code, slope, streamed, parts, _ = unpack(
            arguments, itemsize
        )
        first_row, last_row, first_tile, last_tile = parts[job]
        blocks, kh, chunks, channels = u.shape[:4]
        rows, columns, filters = out.shape[1:]
        result, reach = filters * itemsize, (stage[0] - 1) * strides[0] + (kh - 1) * dilation + 1
        longest = stage[1] + (chunks - 1) * ahead
        rows_bytes = reach * row_bytes(longest, n, room, itemsize)
        line_bytes = (((longest - 1) * m * stride + n) * channels + room) * itemsize
        memory = np.empty(rows_bytes + line_bytes + (2 * m) * result + 2 * CACHE_LINE, np.uint8)
        values = whole_lines(np.int64(memory.ctypes.data))
        line, spill = values + rows_bytes, whole_lines(values + rows_bytes + line_bytes)
        outputs = np.empty((stage[1], 2), np.int64)
        adds, beside = residual.size > 0, np.int64(residual.ctypes.data) - np.int64(out.ctypes.data)
        past, doubts = streamed and out.ctypes.data % CACHE_LINE == 0, zeros(1, 1, lanes, itemsize)[0]
        for begin in range(first_tile, last_tile, stage[1]):
            end = min(begin + stage[1], last_tile)
            first = max(first_tile, min(begin, end - together))
            tiles, inside = end - first, min(m, columns - (end - 1) * m)  # columns of the last tile
            seen = tiles + (chunks - 1) * ahead
            apart, left = row_bytes(seen, n, room, itemsize), first * m * strides[1] - pads[1]
            for tile in range(tiles):
                outputs[tile, 0] = out.ctypes.data + (first + tile) * m * result
                outputs[tile, 1] = beside
            row = first_row
            while row < last_row:
                image, oh = divmod(row, rows)
                count, top = min(last_row - row, stage[0], rows - oh), oh * strides[0] - pads[0]
                low, high = max(0, top), min(x.shape[1], top + (count - 1) * strides[0] + (kh - 1) * dilation + 1)
                enter(values, line, x, image, (low, high), left, seen)
                for i in range(count):
                    above = top + i * strides[0]
                    from_row, to_row = taps_inside(above, dilation, kh, x.shape[1])
                    start = values + (above + from_row * dilation - low) * apart
                    for block in range(blocks):
                        k0 = min(block * lanes, filters - lanes)
                        offset = (image * rows + oh + i) * columns * result + k0 * itemsize
                        weights = u.ctypes.data + (block * kh + from_row) * chunks * channels * step
                        added = bias.ctypes.data + k0 * itemsize if bias.size else 0
                        for tile in range(0, tiles, together):
                            now = min(tile, tiles - together)
                            at = start + now * tile_bytes
                            sums = multiply(at, dilation * apart, weights, to_row - from_row, chunks, channels)
                            place = out.ctypes.data + (end - 1) * m * result + offset
                            spills = inside < m and now + together == tiles
                            if spills:  # beside the image: it goes elsewhere, and what is inside is copied from there
                                outputs[tiles - 1, 0], outputs[tiles - 1, 1] = spill - offset, m * result
                                if adds:
                                    _copy_some(spill + m * result, place + beside, result, inside, vector)
                            doubts = leave(
                                sums, outputs[now:], result, offset, added, adds, code, past, doubts
                            )  # fmt: skip
                            if spills:
                                _copy_some(place, spill, result, inside, vector)
                    if code > RELU6:
                        _finish(out[image, oh + i, first * m : (end - 1) * m + inside], code, slope)
                row += count
        report(doubts, lanes, np.empty(lanes, x.dtype), arguments + _SPOILED_AT)
        hold(memory), hold(outputs)
        add(arguments + _DONE_AT, 1)

    return CompiledKernel(convolve, ARGUMENTS)
