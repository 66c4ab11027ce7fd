"""The kernel of ``depthwise`` for pixels that are 2 KiB or a multiple of it apart, as those of 512 channels are.

The same channels of such pixels want the same few places of L1, fewer than a tile has pixels, and wait for each other.
So the rows that some outputs see are copied first, with pixels an odd number of cache lines apart, and with the padding
around them.
"""

import functools
import math

import numpy as np

from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._atomics import add
from convdispatch.backends._depthwise import biased, leave, place, slide_down
from convdispatch.backends._epilogue import RELU, RELU6, finish
from convdispatch.backends._jit import compilable
from convdispatch.backends._layout import whole_lines
from convdispatch.backends._memory import CACHE_LINE
from convdispatch.backends._slide import slide
from convdispatch.backends._vector import clear, copy, hold

#: ``filters`` is ``[blocks, 1, KH, KW, 1, lanes]``; ``stage`` the rows and columns of outputs whose pixels are copied
#: together, and the bytes from one pixel to the next.
_ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(6), bias=array_of(1), residual=array_of(4), out=array_of(4), zero=array_of(1),
    window=integers_of(8), stage=integers_of(3), code=INTEGER, slope=FLOAT, parts=array_of(2, "int64"),
)  # fmt: skip
unpack = _ARGUMENTS.unpack
_DONE_AT = 8 * _ARGUMENTS.done_at


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
def staged(tile: int, high: int, down: int, taps: int, stride: int, lanes: int, itemsize: int) -> CompiledKernel:
    """Return the kernel of one tile; the arguments are those of ``in_place``."""
    all_sums = high * tile

    def convolve(arguments, job):  # type: ignore[no-untyped-def]
        """Compute some rows of all images and some columns of these, as the job says."""
        x, w, bias, residual, out, zero, window, stage, code, slope, parts = unpack(arguments, itemsize)
        first_row, last_row, first_column, last_column = parts[job]
        kh, kw, top, left, sh, sw, _, _ = window
        at_once, strip, pixel = stage
        rows, columns, filters = out.shape[1:]
        vector, result, jump = lanes * itemsize, filters * itemsize, pixel if taps > 1 else sw * pixel
        line = ((strip - 1) * sw + kw) * pixel
        adds, more = residual.size > 0, residual.ctypes.data - out.ctypes.data
        start, start_step = (bias.ctypes.data, itemsize) if bias.size else (zero.ctypes.data, 0)
        low, most = (0.0 if RELU <= code <= RELU6 else -math.inf), (6.0 if code == RELU6 else math.inf)
        memory = np.empty(((at_once - 1) * sh + kh) * line + CACHE_LINE, np.uint8)
        pixels = whole_lines(np.int64(memory.ctypes.data))
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
                    together = high if done + high <= count else 1
                    for from_column in range(begin, end, tile):
                        ow = min(from_column, end - tile)
                        here = pixels + done * sh * line + (ow - first) * sw * pixel
                        to = np.int64(out.ctypes.data) + ((row + done) * columns + ow) * result
                        place(outputs, to, columns * result, result)
                        for block in range(w.shape[0]):
                            k0 = min(block * lanes, filters - lanes)
                            at, packed = here + k0 * itemsize, w.ctypes.data + block * kh * kw * vector
                            if together > 1:
                                sums = biased(all_sums, start + k0 * start_step, lanes, itemsize)
                                sums = slide(sums, high, down, taps, stride, 1, 1, at, line, pixel, packed)
                                leave(sums, all_sums, outputs.ctypes.data, k0 * itemsize, adds, more, low, most)
                                continue
                            sums = biased(tile, start + k0 * start_step, lanes, itemsize)
                            sums = slide_down(
                                sums, down, taps, stride, 1, 1, (kh, kw // taps), at, (line, taps * pixel, jump),
                                packed, taps * vector,
                            )  # fmt: skip
                            leave(sums, tile, (to, result), k0 * itemsize, adds, more, low, most)
                        if code > RELU6:
                            for i in range(together):
                                for o in range(tile):
                                    finish(out[n, oh + done + i, ow + o], code, slope)
                    done += together
                row += count
        hold(memory), hold(outputs)
        add(arguments + _DONE_AT, 1)

    return CompiledKernel(convolve, _ARGUMENTS)
