"""The kernel of ``winograd_rows``: transform rows of the image, and pass over the tiles of each row of outputs.

Tiles are runs of m outputs of a row. Of each there are n points, and of each point the values of all channels. Rows of
the image are transformed once for all rows of outputs that see them, and stay in L2. ``_row_passes`` does the rest, for
some neighbouring tiles and a vector of filters at a time. Where a row of filters is cut into chunks, what one chunk
sees of a tile, the chunk before sees of the next, so that there is one transform for all chunks.
"""

import functools
from typing import Any

import numpy as np

from convdispatch.backends._activation import RELU6
from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._jit import compilable, inlined
from convdispatch.backends._lines import whole_lines
from convdispatch.backends._row_passes import RowForm, passing
from convdispatch.backends._scratch import borrow, give_back
from convdispatch.backends._tile import zeros
from convdispatch.backends._transforms import report, transform_input
from convdispatch.backends._tuples import load_apart, save_apart
from convdispatch.backends._vector import hold, load, save
from convdispatch.backends._vector_activation import activate_pixels
from convdispatch.backends._windows import copy_columns, taps_inside
from convdispatch.memory import CACHE_LINE

#: ``filters`` is ``[blocks, groups, turns, KH, chunks, C // groups, points of a turn, lanes]``, a group's last block
#: moved back until it fits; ``stage`` the rows of outputs and the tiles of one that are worked on together, and the
#: bytes of a transformed row.
ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(8), bias=array_of(1), residual=array_of(4), out=array_of(4),
    pads=integers_of(2), strides=integers_of(2), dilation=INTEGER, stage=integers_of(3), code=INTEGER, slope=FLOAT,
    streamed=INTEGER, jobs=array_of(2, "int64"), spoiled=INTEGER,
)  # fmt: skip
unpack = ARGUMENTS.unpack
_SPOILED_AT = 8 * ARGUMENTS.at["spoiled"]


@functools.cache
def _entering(form: RowForm) -> Any:
    """Return what transforms rows of an image."""
    m, r, stride, n, itemsize, tile_bytes = form.m, form.r, form.stride, form.n, form.itemsize, form.tile_bytes
    point, narrow = form.room * itemsize, min(form.room, form.lanes)

    @compilable
    def enter(values, row_bytes, line, x, image, span, left, channels, tiles):  # type: ignore[no-untyped-def]
        """Transform so many tiles of the image's rows ``span[0]`` to ``span[1]``, from column ``left`` on.

        ``channels`` are the first and how many. ``values`` is where they go, ``line`` has room for a row's pixels,
        zeros beside the image among them.
        """
        height, width, all_channels = x.shape[1:]
        pixel, columns = channels[1] * itemsize, (tiles - 1) * m * stride + n
        for row in range(span[0], span[1]):
            source = x.ctypes.data + (((image * height + row) * width + left) * all_channels + channels[0]) * itemsize
            if channels[1] == all_channels:
                copy_columns(line, source, left, columns, width, pixel)
            else:
                for column in range(columns):
                    at = source + column * all_channels * itemsize
                    copy_columns(line + column * pixel, at, left + column, 1, width, pixel)
            for tile in range(tiles):
                for c in range(0, point, narrow * itemsize):
                    pixels = load_apart(line + tile * m * stride * pixel + c, pixel, n, narrow, itemsize)
                    save_apart(values + tile * tile_bytes + c, point, transform_input(pixels, m, r, stride))
            values += row_bytes

    return enter


@inlined
def _copy_vectors(target, source, step, count, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Copy so many vectors, ``step`` bytes apart."""
    for i in range(count):
        save(target + i * step, load(source + i * step, lanes, itemsize))


@compilable
def _chunks_inside(chunks, r, first, last, width):  # type: ignore[no-untyped-def]
    """Return the range of chunks of r taps of which some meet one of so many columns.

    ``first`` and ``last`` are columns that the first chunk sees: where a pass begins, and behind its end.
    """
    low = -last // r + 1 if last <= 0 else 0
    return low, max(low, min(chunks, -((first - width) // r)))


@functools.cache
def compiled(form: RowForm) -> CompiledKernel:  # noqa: C901, PLR0915
    """Return the kernel of a form."""
    m, stride, together, lanes, itemsize, vector = (
        form.m, form.stride, form.together, form.lanes, form.itemsize, form.vector
    )  # fmt: skip
    n, r, tile_bytes, sums_bytes, room = form.n, form.r, form.tile_bytes, form.sums_bytes, form.room
    enter, make_pass = _entering(form), passing(form)

    def convolve(arguments, job):  # type: ignore[no-untyped-def]  # noqa: C901, PLR0912, PLR0915
        """Compute some rows of all images and some tiles of these, as the job says."""
        x, u, bias, residual, out, pads, strides, dilation, stage, code, slope, streamed, jobs, _ = unpack(
            arguments, itemsize
        )
        first_row, last_row, first_tile, last_tile, first_group, last_group = jobs[job]
        at_once, strip, row_bytes = stage
        blocks, groups, turns, kh, chunks, channels, points, _ = u.shape
        rows, columns, filters = out.shape[1:]
        group_k, result, filter_bytes = filters // groups, filters * itemsize, chunks * channels * points * vector
        longest = strip + chunks - 1
        rows_bytes = ((at_once - 1) * strides[0] + (kh - 1) * dilation + 1) * row_bytes
        line_bytes = whole_lines((((longest - 1) * m * stride + n) * channels + room) * itemsize)
        values = borrow(rows_bytes + line_bytes + sums_bytes + 2 * m * result)
        if values == 0:
            return 0
        line, scratch = values + rows_bytes, values + rows_bytes + line_bytes
        spill, outputs = scratch + sums_bytes, np.empty((strip, 2), np.int64)
        adds, beside = residual.size > 0, np.int64(residual.ctypes.data) - np.int64(out.ctypes.data)
        streams, doubts = streamed and out.ctypes.data % CACHE_LINE == 0, zeros(1, 1, lanes, itemsize)[0]
        for begin in range(first_tile, last_tile, strip):
            end = min(begin + strip, last_tile)
            first = max(first_tile, min(begin, end - together))
            tiles, inside = end - first, min(m, columns - (end - 1) * m)  # columns of the last tile
            for tile in range(tiles):
                outputs[tile, 0], outputs[tile, 1] = out.ctypes.data + (first + tile) * m * result, beside
            row = first_row
            while row < last_row:
                image, oh = divmod(row, rows)
                count, top = min(last_row - row, at_once, rows - oh), oh * strides[0] - pads[0]
                low, high = max(0, top), min(x.shape[1], top + (count - 1) * strides[0] + (kh - 1) * dilation + 1)
                left, seen = first * m * strides[1] - pads[1], tiles + chunks - 1
                for group in range(first_group, last_group):
                    some = group * channels, channels
                    enter(values, row_bytes, line, x, image, (low, high), left, some, seen)
                    for i in range(count):
                        above = top + i * strides[0]
                        from_row, to_row = taps_inside(above, dilation, kh, x.shape[1])
                        start = values + (above + from_row * dilation - low) * row_bytes
                        for block in range(blocks):
                            k0 = group * group_k + min(block * lanes, group_k - lanes)
                            offset = (image * rows + oh + i) * columns * result + k0 * itemsize
                            packed = u.ctypes.data + ((block * groups + group) * turns * kh + from_row) * filter_bytes
                            added = bias.ctypes.data + k0 * itemsize if bias.size else 0
                            place = out.ctypes.data + (end - 1) * m * result + offset
                            for tile in range(0, tiles, together):
                                now = min(tile, tiles - together)
                                from_chunk, to_chunk, column = np.int64(0), chunks, left + now * m * stride
                                if chunks > 1:  # divisions take as long as some products
                                    from_chunk, to_chunk = _chunks_inside(
                                        chunks, r, column, column + (together - 1) * m * stride + n, x.shape[2]
                                    )
                                where = (
                                    start + (now + from_chunk) * tile_bytes, dilation * row_bytes,
                                    to_row - from_row, to_chunk - from_chunk, channels,
                                )  # fmt: skip
                                at = packed + from_chunk * channels * points * vector, filter_bytes, kh * filter_bytes
                                spills = inside < m and now + together == tiles
                                if spills:  # beside the image: that goes elsewhere, and the rest is copied from there
                                    outputs[tiles - 1, 0], outputs[tiles - 1, 1] = spill - offset, m * result
                                    if adds:
                                        _copy_vectors(
                                            spill + m * result, place + beside, result, inside, lanes, itemsize
                                        )
                                doubts = make_pass(
                                    where, at, scratch, outputs[now:], result, offset, added, adds, code, streams,
                                    doubts,
                                )  # fmt: skip
                                if spills:
                                    _copy_vectors(place, spill, result, inside, lanes, itemsize)
                if code > RELU6:
                    for i in range(count):
                        pixels = out[image, oh + i, first * m : (end - 1) * m + inside, first_group * group_k :]
                        counts, each = (1, pixels.shape[0]), (last_group - first_group) * group_k
                        pixel = out.shape[3] * itemsize
                        activate_pixels(np.int64(pixels.ctypes.data), (0, pixel), counts, each, code, slope, itemsize)
                row += count
        report(doubts, arguments + _SPOILED_AT)
        give_back(values), hold(outputs)
        return 1

    return CompiledKernel(convolve, ARGUMENTS)
