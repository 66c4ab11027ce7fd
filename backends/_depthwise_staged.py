"""The kernel of ``depthwise`` for pixels that are 2 KiB or a multiple of it apart, as those of 512 channels are.

The same channels of such pixels want the same few places of L1, fewer than a tile has pixels, and wait for each other.
So the rows that some outputs see are copied first, with pixels an odd number of cache lines apart, and with the padding
around them.
"""

import functools

import numpy as np

from convdispatch.backends._activation import RELU6
from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._depthwise_tile import DepthwiseForm, ending, flat_tile, high_tile, place, rows_together
from convdispatch.backends._jit import compilable
from convdispatch.backends._scratch import borrow, give_back
from convdispatch.backends._vector import clear, copy, hold
from convdispatch.backends._vector_activation import activate_pixels

#: ``filters`` is ``[blocks, 1, KH, KW, 1, lanes]``; ``stage`` the rows and columns of outputs whose pixels are copied
#: together, and the bytes from one pixel to the next.
_ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(6), bias=array_of(1), residual=array_of(4), out=array_of(4), zero=array_of(1),
    window=integers_of(8), stage=integers_of(3), code=INTEGER, slope=FLOAT, jobs=array_of(2, "int64"),
)  # fmt: skip
unpack = _ARGUMENTS.unpack


@compilable
def _fill(target, apart, image, corner, columns, itemsize):  # type: ignore[no-untyped-def]
    """Copy columns of a row from a corner of an image on, and zeros beside it, to pixels so many bytes apart."""
    height, width, channels = image.shape
    row, left = corner
    pixel, inside = channels * itemsize, 0 <= row < height
    source = image.ctypes.data + (row * width + left) * pixel
    for column in range(columns):
        if inside and 0 <= left + column < width:
            copy(target + column * apart, source + column * pixel, pixel)
        else:
            clear(target + column * apart, pixel)


@functools.cache
def staged(form: DepthwiseForm) -> CompiledKernel:
    """Return the kernel of a form, which has no dilation, and filters of neighbouring channels in a vector."""
    tile, high, taps, lanes, itemsize = form.tile, form.high, form.taps, form.lanes, form.itemsize
    sum_flat, sum_high, streamed = flat_tile(form), high_tile(form), int(form.is_streamed)

    def convolve(arguments, job):  # type: ignore[no-untyped-def]
        """Compute some rows of all images and some columns of these, as the job says."""
        x, w, bias, residual, out, zero, window, stage, code, slope, jobs = unpack(arguments, itemsize)
        first_row, last_row, first_column, last_column = jobs[job]
        kh, kw, top, left, sh, sw, _, _ = window
        at_once, strip, pixel = stage
        rows, columns, filters = out.shape[1:]
        vector, result, jump = lanes * itemsize, filters * itemsize, pixel if taps > 1 else sw * pixel
        line = ((strip - 1) * sw + kw) * pixel
        packed = np.int64(w.ctypes.data), kh * kw * vector, w.shape[0], filters
        ends = ending(bias, zero, residual, out, streamed, code, itemsize)
        pixels = borrow(((at_once - 1) * sh + kh) * line)
        if pixels == 0:
            return 0
        outputs = np.empty((high, tile), np.int64)
        for begin in range(first_column, last_column, strip):
            end = min(begin + strip, last_column)
            first = min(begin, end - tile)  # of the columns of outputs: the last tile is moved back
            taken = (end - first - 1) * sw + kw
            row = first_row
            while row < last_row:
                n, oh = divmod(row, rows)
                count = min(last_row - row, at_once, rows - oh)
                corner = oh * sh - top, first * sw - left
                for i in range((count - 1) * sh + kh):
                    _fill(pixels + i * line, pixel, x[n], (corner[0] + i, corner[1]), taken, itemsize)
                done = 0
                while done < count:
                    done, together = rows_together(done, 0, count, high)
                    for from_column in range(begin, end, tile):
                        ow = min(from_column, end - tile)
                        seen = pixels + done * sh * line + (ow - first) * sw * pixel, line, taps * pixel, jump
                        to = np.int64(out.ctypes.data) + ((row + done) * columns + ow) * result
                        if together > 1:
                            place(outputs, to, columns * result, result)
                            sum_high(seen, packed, outputs.ctypes.data, ends)
                        else:
                            sum_flat(seen, packed, (kh, kw // taps), (to, result), ends)
                        if code > RELU6:
                            steps = columns * result, result
                            activate_pixels(to, steps, (together, tile), filters, code, slope, itemsize)
                    done += together
                row += count
        give_back(pixels), hold(outputs)
        return 1

    return CompiledKernel(convolve, _ARGUMENTS)
