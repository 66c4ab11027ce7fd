"""The kernel of ``winograd_rows``: transform rows of the image, multiply, and transform back, all in registers.

Tiles are runs of m outputs of a row. Of each there are n points, and of each point the values of all channels. Rows of
the image are transformed once for all rows of outputs that see them, and stay in L2. Sums of all points of a few tiles
are held in registers while the kernel walks over the rows and channels of the filters, and are transformed back there.
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
from convdispatch.backends._vector import hold
from convdispatch.backends._windows import copy_columns, taps_inside

#: ``filters`` is ``[blocks, KH, C, points, lanes]``, the last block moved back until it fits; ``stage`` the rows of
#: outputs and the tiles of one that are worked on together.
ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(5), bias=array_of(1), residual=array_of(4), out=array_of(4),
    pads=integers_of(2), strides=integers_of(2), dilation=INTEGER, stage=integers_of(2), code=INTEGER, slope=FLOAT,
    streamed=INTEGER, parts=array_of(2, "int64"), spoiled=INTEGER,
)  # fmt: skip
unpack = ARGUMENTS.unpack
_SPOILED_AT, _DONE_AT = 8 * ARGUMENTS.at["spoiled"], 8 * ARGUMENTS.done_at


@compilable
def row_bytes(tiles: int, points: int, room: int, itemsize: int) -> int:
    """Return the bytes of a transformed row of so many tiles, whose points have room for so many values."""
    return -(-tiles * points * room * itemsize // CACHE_LINE) * CACHE_LINE


@compilable
def _column(tile, m, columns):  # type: ignore[no-untyped-def]
    """Return the first of a tile's m outputs; the last tile is moved back until it fits."""
    return min(tile * m, columns - m)


@functools.cache
def _entering(m: int, r: int, stride: int, room: int, narrow: int, itemsize: int) -> Any:
    """Return what transforms rows of an image, in vectors of so many values."""
    n, point = stride * (m - 1) + r, room * itemsize

    @compilable
    def enter(values, line, x, image, span, left, tiles, columns):  # type: ignore[no-untyped-def]
        """Transform the tiles ``tiles[0]`` to ``tiles[1]`` of the image's rows ``span[0]`` to ``span[1]``.

        ``values`` is where they go, ``line`` has room for a row's pixels, zeros beside the image among them: those
        from column ``left`` on.
        """
        height, width, channels = x.shape[1:]
        pixel, begin, end = channels * itemsize, _column(tiles[0], m, columns), _column(tiles[1] - 1, m, columns)
        taken = (end - begin + m - 1) * stride + r
        for row in range(span[0], span[1]):
            source = x.ctypes.data + ((image * height + row) * width + left) * pixel
            copy_columns(line, source, left, taken, width, pixel)
            target = values
            for tile in range(tiles[0], tiles[1]):
                first = line + (_column(tile, m, columns) - begin) * stride * pixel
                for c in range(0, point, narrow * itemsize):
                    pixels = load_apart(first + c, pixel, n, narrow, itemsize)
                    save_apart(target + c, point, transform_input(pixels, m, r, stride))
                target += n * point
            values += row_bytes(tiles[1] - tiles[0], n, room, itemsize)

    return enter


def _leaving(number: int, together: int, m: int, r: int, stride: int) -> Any:
    """Return what transforms tiles of sums back, from one of ``together`` on, finishes and stores them.

    One after another, so that the next ones' sums may stay in registers meanwhile.
    """
    n = stride * (m - 1) + r

    @inlined
    def leave_one(sums, outputs, offset, bias, adds, beside, code, past, doubts):  # type: ignore[no-untyped-def]
        """Do so with one tile; return the doubts. ``outputs`` are the tiles' addresses, and what pixels are apart."""
        results = transform_output(part(sums, number, n), m, r, stride)
        doubts = add_doubts(doubts, results)
        if bias:
            results = add_to_all(results, m, bias)
        put_tile(results, m, (outputs[0][number], outputs[1]), offset, adds, beside, code, past)
        return doubts

    if number + 1 == together:
        return leave_one
    leave_others = _leaving(number + 1, together, m, r, stride)

    @inlined
    def leave(sums, outputs, offset, bias, adds, beside, code, past, doubts):  # type: ignore[no-untyped-def]
        doubts = leave_one(sums, outputs, offset, bias, adds, beside, code, past, doubts)
        return leave_others(sums, outputs, offset, bias, adds, beside, code, past, doubts)

    return leave


@compilable
def _finish(pixels, code, slope):  # type: ignore[no-untyped-def]
    """Apply an activation that is no clamp to neighbouring pixels."""
    for pixel in pixels:
        finish(pixel, code, slope)


@functools.cache
def compiled(m: int, r: int, stride: int, together: int, room: int, lanes: int, itemsize: int) -> CompiledKernel:
    """Return the kernel of F(m, r) for so many tiles together.

    Args:
        m: outputs of a tile.
        r: taps of a row of a filter.
        stride: of outputs along rows.
        together: tiles whose sums are held in registers.
        room: values of a point, as many as channels or more: what ``lanes`` is a multiple of, or a multiple of that.
        lanes: filters of a vector.
        itemsize: bytes of a value.
    """
    n, point, vector = stride * (m - 1) + r, room * itemsize, lanes * itemsize
    tile_bytes, step = n * point, n * vector
    enter, leave = _entering(m, r, stride, room, min(room, lanes), itemsize), _leaving(0, together, m, r, stride)

    def convolve(arguments, job):  # type: ignore[no-untyped-def]
        """Compute some rows of all images and some tiles of these, as the job says."""
        x, u, bias, residual, out, pads, strides, dilation, stage, code, slope, streamed, parts, _ = unpack(
            arguments, itemsize
        )
        first_row, last_row, first_tile, last_tile = parts[job]
        blocks, kh, channels = u.shape[:3]
        rows, columns, filters = out.shape[1:]
        result, reach = filters * itemsize, (stage[0] - 1) * strides[0] + (kh - 1) * dilation + 1
        rows_bytes = reach * row_bytes(stage[1], n, room, itemsize)
        line_bytes = ((stage[1] * m - 1) * stride + r) * channels * itemsize + point
        memory = np.empty(rows_bytes + line_bytes + CACHE_LINE, np.uint8)
        values = whole_lines(np.int64(memory.ctypes.data))
        line = values + rows_bytes
        outputs = np.empty(stage[1], np.int64)
        adds, beside = residual.size > 0, np.int64(residual.ctypes.data) - np.int64(out.ctypes.data)
        past, doubts = streamed and out.ctypes.data % CACHE_LINE == 0, zeros(1, 1, lanes, itemsize)[0]
        for begin in range(first_tile, last_tile, stage[1]):
            end = min(begin + stage[1], last_tile)
            first = max(first_tile, min(begin, end - together))
            apart, column = row_bytes(end - first, n, room, itemsize), _column(first, m, columns)
            for tile in range(first, end):
                outputs[tile - first] = out.ctypes.data + _column(tile, m, columns) * result
            row = first_row
            while row < last_row:
                image, oh = divmod(row, rows)
                count, top = min(last_row - row, stage[0], rows - oh), oh * strides[0] - pads[0]
                low, high = max(0, top), min(x.shape[1], top + (count - 1) * strides[0] + (kh - 1) * dilation + 1)
                left = column * strides[1] - pads[1]
                enter(values, line, x, image, (low, high), left, (first, end), columns)
                for i in range(count):
                    above = top + i * strides[0]
                    from_row, to_row = taps_inside(above, dilation, kh, x.shape[1])
                    start = values + (above + from_row * dilation - low) * apart
                    offset = (image * rows + oh + i) * columns * result
                    for block in range(blocks):
                        k0 = min(block * lanes, filters - lanes)
                        weights = u.ctypes.data + (block * kh + from_row) * channels * step
                        added = bias.ctypes.data + k0 * itemsize if bias.size else 0
                        for tile in range(0, end - first, together):
                            now = min(tile, end - first - together)
                            at, packed = start + now * tile_bytes, weights
                            sums = zeros(together, n, lanes, itemsize)
                            for _ in range(from_row, to_row):
                                for c in range(channels):
                                    sums = multiply_points(sums, n, (at, tile_bytes), c * itemsize, point, packed)
                                    packed += step
                                at += dilation * apart
                            doubts = leave(
                                sums, (outputs[now:], result), offset + k0 * itemsize, added, adds, beside, code, past,
                                doubts,
                            )  # fmt: skip
                    if code > RELU6:
                        _finish(out[image, oh + i, column : _column(end - 1, m, columns) + m], code, slope)
                row += count
        report(doubts, lanes, np.empty(lanes, x.dtype), arguments + _SPOILED_AT)
        hold(memory), hold(outputs)
        add(arguments + _DONE_AT, 1)

    return CompiledKernel(convolve, ARGUMENTS)
