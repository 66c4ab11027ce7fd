"""The kernel of ``implicit_gemm`` for lines of output that are long enough: a tile's pixels are neighbours in one.

So they are equally far apart, in the input as in the output, and need no table of addresses. (To fill one takes a third
of the time where sums are short.) Rows of taps above or below the image are left out, and taps that all of a tile's
pixels have beside it. A window that reaches beside the image is copied, with zeros around it. With 1x1 filters of
stride 1, all pixels of all images are one line.

Of a group's channels, only a few bytes of each pixel are read, and pixels may lie apart so that all of these want the
same places of L1. So each group's channels are first copied to where they lie side by side, with zeros around the
image; but not for a single tap, which reads each pixel once for all filters of a block. So is a small image of few
channels that has padding, since every other window would reach beside it.

A row of a tile may also be of two pixels side by side. Their outputs are neighbours in memory, and together fill
vectors, where those of one alone would leave half of one empty.
"""

import functools

import numpy as np

from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._put import finished, put, put_activated
from convdispatch.backends._tile import add_to_all, multiply_add, multiply_pairs, zeros
from convdispatch.backends._vector import hold, prefetch
from convdispatch.backends._vector_activation import activated
from convdispatch.backends._windows import copy_columns, copy_group, taps_inside
from convdispatch.memory import CACHE_LINE

#: ``filters`` is ``[groups, blocks of a group, KH, KW, C // groups, block]``, filled up with zeros, ``bias`` alike; all
#: of them twice for pixels side by side. ``prefetched``: how many cache lines of the input are so with each tile.
ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(6), bias=array_of(1), residual=array_of(4), out=array_of(4),
    pads=integers_of(2), strides=integers_of(2), dilations=integers_of(2), staged=INTEGER, streamed=INTEGER,
    prefetched=INTEGER, code=INTEGER, slope=FLOAT, jobs=array_of(2, "int64"),
)  # fmt: skip
unpack = ARGUMENTS.unpack

#: So many tiles ahead are they prefetched.
_AHEAD = 2


@functools.cache
def compiled(  # noqa: C901, PLR0915
    rows: int, vectors: int, lanes: int, itemsize: int, pixels: int = 1, activates: int = 0
) -> CompiledKernel:
    """Return the kernel of one tile, which is no longer than a line, with so many pixels in a row: 1 or 2.

    ``activates`` is the code of an activation that is no clamp, 0 if there is none: then short sums are done sooner.
    """
    block = vectors * lanes
    step = block * itemsize
    words = rows * step // 8

    def convolve(arguments, job):  # type: ignore[no-untyped-def]  # noqa: C901, PLR0912, PLR0915
        """Compute the tiles ``jobs[job, 0:2]``, line by line, for the blocks of filters ``jobs[job, 2:4]``."""
        x, w, bias, residual, out, pads, strides, dilations, staged, streamed, prefetched, code, slope, jobs = unpack(
            arguments, itemsize
        )
        groups, per_group, kh, kw, group_c, _ = w.shape
        height, width, channels = x.shape[1:]
        lines, columns, filters = out.shape[1], out.shape[2] // pixels, out.shape[3] * pixels
        group_k, across = filters // groups, (columns + rows - 1) // rows
        span = (kw - 1) * dilations[1] + 1
        stride, furthest = strides[1] * pixels, (out.shape[2] - 1) * strides[1]
        wide = furthest + span if staged else width
        pixel, result = (group_c if staged else channels) * itemsize, filters * itemsize
        apart, line_bytes, tap_bytes = stride * pixel, wide * pixel, kw * group_c * step
        first_tile, last_tile, first_block, last_block = jobs[job]
        inner = (rows * pixels - 1) * strides[1]
        reach, most = inner + span, min(lines, (last_tile - first_tile) // across + 2)
        beside = not staged and (pads[1] > 0 or furthest - pads[1] + span > width)
        window = np.empty((kh if beside else 0, reach, channels), x.dtype)
        high_stage = (most - 1) * strides[0] + (kh - 1) * dilations[0] + 1
        stage = np.empty((high_stage if staged else 0, wide, group_c), x.dtype)
        kept, begun = (-1, -1), 0
        here, there = np.int64(x.ctypes.data), np.int64(out.ctypes.data)
        more = np.int64(residual.ctypes.data) - there
        streams = streamed and there % CACHE_LINE == 0
        for number in range(first_block, last_block):
            group, member = divmod(number, per_group)
            k0, count = group * group_k + member * block, min(block, group_k - member * block)
            weights = np.int64(w.ctypes.data) + number * kh * tap_bytes
            now = first_tile
            while now < last_tile:
                line, tile = divmod(now, across)
                image, oh = divmod(line, lines)
                top = oh * strides[0] - pads[0]
                low, high = taps_inside(top, dilations[0], kh, height)
                if staged:
                    if kept != (group, image):
                        kept, begun = (group, image), oh
                        until = min(lines - oh, (last_tile - 1) // across - line + 1)
                        taken = (until - 1) * strides[0] + (kh - 1) * dilations[0] + 1
                        copy_group(stage, x, (image, top, -pads[1]), group * group_c, taken, 1, lanes, itemsize)
                    behind = 0
                    from_line = np.int64(stage.ctypes.data) + (oh - begun) * strides[0] * line_bytes
                else:
                    from_line = here + ((image * height + top) * width - pads[1]) * pixel
                    behind = group * group_c * itemsize
                to_line = there + line * columns * result + k0 * itemsize
                stop = min(across, tile + last_tile - now)
                now += stop - tile
                for place in range(tile, stop):
                    ow = min(place * rows, columns - rows)
                    left, to = ow * stride - pads[1], to_line + ow * result
                    begin, end, is_beside = 0, kw, left < 0 or left + reach > width
                    if is_beside:
                        # Taps that all pixels of the tile have beside the image are left out.
                        begin = taps_inside(left + inner, dilations[1], kw, width)[0]
                        end = taps_inside(left, dilations[1], kw, width)[1]
                    at, down = from_line + ow * apart, dilations[0] * line_bytes
                    if number == first_block:  # for the others it is in L2
                        for line in range(prefetched):
                            prefetch(at + _AHEAD * rows * apart + line * CACHE_LINE)
                    if is_beside and not staged:
                        for i in range(low, high):
                            copy_columns(np.int64(window[i].ctypes.data), at + i * down, left, reach, width, pixel)
                        at, down = np.int64(window.ctypes.data), reach * pixel
                    sums = zeros(rows, vectors, lanes, itemsize)
                    if bias.size:
                        sums = add_to_all(sums, rows, np.int64(bias.ctypes.data) + number * step)
                    # Taps of one row are one run through memory, if nothing lies between them.
                    segments, run = (1, (end - begin) * group_c) if dilations[1] == 1 else (end - begin, group_c)
                    for i in range(low, high):
                        packed = weights + i * tap_bytes + begin * group_c * step
                        for j in range(segments):
                            tap = at + behind + i * down + (begin + j) * dilations[1] * pixel
                            for _ in range(run):
                                if pixels > 1:
                                    sums = multiply_pairs(sums, rows, (tap, apart), strides[1] * pixel, packed)
                                else:
                                    sums = multiply_add(sums, rows, (tap, apart), 0, packed, 1)
                                tap += itemsize
                                packed += step
                    sums = finished(sums, rows, (to, result), more, residual.size, code, count, block)
                    if activates and itemsize == 4:
                        put(activated(sums, activates, slope), rows, (to, result), 0, count, block, streams)
                    elif activates:
                        put_activated(sums, rows, (to, result), count, block, code, slope, words, itemsize)
                    else:
                        put(sums, rows, (to, result), 0, count, block, streams)
        hold(window), hold(stage)
        return 1

    return CompiledKernel(convolve, ARGUMENTS)
