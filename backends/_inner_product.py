"""The kernel of ``inner_product``: tiles of pixels times filters, each sum a vector along channels.

The values under a row of taps are one run through memory, channel by channel, tap by tap; with a dilation, each tap's
are. A step multiplies a vector of each pixel's run with that of each filter; the end of a run that does not fill one is
loaded through a mask, so that nothing of the next pixel's is read. In the end the lanes of each sum are added, in a
tree of shuffles that leaves the results as they lie in memory: filter by filter, pixel by pixel.

With one filter or two, there would be as many loads as products. So tiles may slide: a vector of the same channels of
each input is loaded once, and multiplied with the taps of all outputs that see it.
"""

import functools
from typing import Any

import numpy as np

from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._jit import inlined
from convdispatch.backends._lanes import multiply_each, multiply_some, slide_each, sum_lanes
from convdispatch.backends._put import finished, put, put_activated
from convdispatch.backends._tile import add_to_all, zeros
from convdispatch.backends._vector import hold
from convdispatch.backends._vector_activation import activated
from convdispatch.backends._windows import copy_columns, taps_inside

#: ``filters`` is ``[KH, runs, steps, K, lanes]``, ends of runs filled up with zeros; of tiles that slide, runs are the
#: vectors of a pixel's channels, and steps the taps. ``bias`` is repeated for each pixel of a tile, and filled up
#: likewise. ``window`` is the taps of a row, and the values of a run. A job is some lines of output, and some tiles of
#: each.
ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(5), bias=array_of(1), residual=array_of(4), out=array_of(4),
    pads=integers_of(2), strides=integers_of(2), dilations=integers_of(2), window=integers_of(2), code=INTEGER,
    slope=FLOAT, jobs=array_of(2, "int64"),
)  # fmt: skip
unpack = ARGUMENTS.unpack


@functools.cache
def _adding(pixels: int, filters: int, taps: int, stride: int, lanes: int, itemsize: int) -> Any:
    """Return what adds the products with a row of taps to the sums of a tile; see ``compiled``."""
    vector = lanes * itemsize

    @inlined
    def add_row(sums, at, steps, packed, runs, values):  # type: ignore[no-untyped-def]
        """Add the products of ``runs`` with filters, of so many ``values`` each where tiles do not slide.

        ``steps`` are the bytes of a pixel, those between outputs, and those between taps.
        """
        pixel, apart, across = steps
        if taps:
            for c in range(runs):
                sums = slide_each(sums, pixels, taps, stride, (at + c * vector, pixel), packed)
                packed += taps * filters * vector
            return sums
        for j in range(runs):
            run = at + j * across
            for _ in range(values // lanes):
                sums = multiply_each(sums, pixels, (run, apart), packed)
                run += vector
                packed += filters * vector
            if values % lanes:
                sums = multiply_some(sums, pixels, (run, apart), packed, values % lanes)
                packed += filters * vector
        return sums

    return add_row


@functools.cache
def compiled(
    pixels: int, filters: int, taps: int, stride: int, lanes: int, itemsize: int, activates: int
) -> CompiledKernel:
    """Return the kernel of tiles of so many pixels and filters, which are no longer than a line.

    They slide over so many ``taps`` of a row, outputs a ``stride`` apart; not if those are 0. ``activates`` is the
    code of an activation that is no clamp, or 0.
    """
    sums_of_tile, vector = pixels * filters, lanes * itemsize
    block = -(-sums_of_tile // lanes) * lanes
    words = block * itemsize // 8
    add_row = _adding(pixels, filters, taps, stride, lanes, itemsize)

    def convolve(arguments, job):  # type: ignore[no-untyped-def]
        """Compute the tiles ``jobs[job, 2:4]`` of the lines ``jobs[job, 0:2]``."""
        x, w, bias, residual, out, pads, strides, dilations, window, code, slope, jobs = unpack(arguments, itemsize)
        kh, runs, steps = w.shape[:3]
        height, width, channels = x.shape[1:]
        lines, columns = out.shape[1], out.shape[2]
        first_line, last_line, first_tile, last_tile = jobs[job]
        pixel, result, row_bytes = channels * itemsize, filters * itemsize, runs * steps * filters * vector
        kw, values = window
        reach = (pixels - 1) * strides[1] + (kw - 1) * dilations[1] + 1
        beside = pads[1] > 0 or (columns - pixels) * strides[1] - pads[1] + reach > width
        copied = np.empty((kh if beside else 0, reach, channels), x.dtype)
        more = np.int64(residual.ctypes.data) - np.int64(out.ctypes.data)
        for line in range(first_line, last_line):
            image, oh = divmod(line, lines)
            top = oh * strides[0] - pads[0]
            low, high = taps_inside(top, dilations[0], kh, height)
            for tile in range(first_tile, last_tile):
                ow = min(tile * pixels, columns - pixels)
                left = ow * strides[1] - pads[1]
                at = np.int64(x.ctypes.data) + ((image * height + top) * width + left) * pixel
                down = dilations[0] * width * pixel
                if left < 0 or left + reach > width:
                    for i in range(low, high):
                        copy_columns(np.int64(copied[i].ctypes.data), at + i * down, left, reach, width, pixel)
                    at, down = np.int64(copied.ctypes.data), reach * pixel
                sums = zeros(sums_of_tile, 1, lanes, itemsize)
                for i in range(low, high):
                    between = pixel, strides[1] * pixel, dilations[1] * pixel
                    packed = np.int64(w.ctypes.data) + i * row_bytes
                    sums = add_row(sums, at + i * down, between, packed, runs, values)
                made, to = sum_lanes(sums), np.int64(out.ctypes.data) + (line * columns + ow) * result
                if bias.size:
                    made = add_to_all(made, 1, np.int64(bias.ctypes.data))
                made = finished(made, 1, (to, result), more, residual.size, code, sums_of_tile, block)
                if activates and itemsize == 4:
                    put(activated(made, activates, slope), 1, (to, result), 0, sums_of_tile, block, 0)
                elif activates:
                    put_activated(made, 1, (to, result), sums_of_tile, block, code, slope, words, itemsize)
                else:
                    put(made, 1, (to, result), 0, sums_of_tile, block, 0)
        hold(copied)
        return 1

    return CompiledKernel(convolve, ARGUMENTS)
