"""The kernel of ``depthwise`` that reads the image where it lies; see ``depthwise.py`` for what it does."""

import functools

import numpy as np

from convdispatch.backends._activation import RELU6
from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._depthwise_tile import (
    DepthwiseForm,
    begun,
    ending,
    finder,
    flat_tile,
    found_tile,
    high_tile,
    leave,
    place,
    rows_together,
)
from convdispatch.backends._jit import compilable
from convdispatch.backends._slide import slide_found
from convdispatch.backends._tile import store, zeros
from convdispatch.backends._vector import hold
from convdispatch.backends._vector_activation import activate_pixels
from convdispatch.backends._windows import taps_inside


@compilable
def _find(pixels, first, column, width, rows, zero, steps):  # type: ignore[no-untyped-def]
    """Fill the table with the addresses of the pixels under a tile, of zeros where they are beside the image.

    The table is ``[rows, chunks of taps, pixels under a tile]``. Return how many runs of pixels there are.
    """
    row_step, chunks, chunk_columns, span, jump, pixel = steps
    at = 0
    for _ in range(rows):
        for j in range(chunks):
            for p in range(span):
                moved = j * chunk_columns + p * jump
                pixels[at] = first + moved * pixel if 0 <= column + moved < width else zero
                at += 1
        first += row_step
    return rows * chunks


@compilable
def _spread(out, residual, bias, scratch, where, k0, member):  # type: ignore[no-untyped-def]
    """Store the sums of one of several filters of each channel, value by value, with bias and residual."""
    outputs, lanes = scratch.shape
    for o in range(outputs):
        ow = where[0] + o * where[1]
        for lane in range(lanes):
            k = (k0 + lane) * member[0] + member[1]
            total = scratch[o, lane]
            if bias.size:
                total += bias[k]
            if residual.size:
                total += residual[ow, k]
            out[ow, k] = total


#: ``filters`` is ``[blocks, members, KH, KW, C // groups, lanes]``, a block being what a vector of outputs needs.
_ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(6), bias=array_of(1), residual=array_of(4), out=array_of(4), zero=array_of(1),
    window=integers_of(8), strip=INTEGER, code=INTEGER, slope=FLOAT, jobs=array_of(2, "int64"),
)  # fmt: skip
unpack = _ARGUMENTS.unpack


@functools.cache
def in_place(form: DepthwiseForm) -> CompiledKernel:  # noqa: C901, PLR0915
    """Return the kernel of a form.

    With one tap at a time any stride and dilation will do, since then outputs share no pixel. What is no dilation is
    compiled apart: with pixels a variable number of columns apart, the compiler keeps more differences of addresses
    than there are registers, and the kernel takes half as long again.
    """
    tile, high, taps, stride, span, dilated = (
        form.tile, form.high, form.taps, form.stride, form.span, int(form.is_dilated)
    )  # fmt: skip
    group_c, group_k, lanes, itemsize = form.group_c, form.group_k, form.lanes, form.itemsize
    streamed = int(form.is_streamed)
    sum_flat, sum_high, sum_found, find_all = flat_tile(form), high_tile(form), found_tile(form), finder(form)
    seen_rows = form.seen_rows

    def convolve(arguments, job):  # type: ignore[no-untyped-def]  # noqa: C901, PLR0912, PLR0915
        """Compute some rows of all images and some columns of these, as the job says."""
        x, w, bias, residual, out, zero, window, strip, code, slope, jobs = unpack(arguments, itemsize)
        first_row, last_row, first_column, last_column = jobs[job]
        kh, kw, top, left, sh, sw, dh, dw = window
        height, width, channels = x.shape[1:]
        rows, columns, filters = out.shape[1:]
        blocks, members = w.shape[:2]
        pixel, result, tap_bytes = channels * itemsize, filters * itemsize, group_c * lanes * itemsize
        apart = dw if dilated else 1
        jump, phases = apart if taps > 1 else sw, min(apart, columns)
        line, reach = width * pixel, (span - 1) * jump + (kw - taps) * dw
        filter_bytes = kh * kw * tap_bytes
        ends = ending(bias, zero, residual, out, streamed, code, itemsize)
        finishes = code > RELU6 or (code > 0 and members > 1)
        pixels = np.empty(max(kh * (kw // taps), seen_rows) * span, np.int64)
        scratch = np.empty((tile, lanes), out.dtype)
        outputs = np.empty((high, tile), np.int64)
        for begin in range(first_column, last_column, strip):
            tiles = (min(strip, last_column - begin) + tile * apart - 1) // (tile * apart)
            row = first_row
            while row < last_row:
                n = row // rows
                row, together = rows_together(row, max(n * rows, first_row), min((n + 1) * rows, last_row), high)
                oh = row - n * rows
                above = oh * sh - top
                fits = above >= 0 and above + (high - 1) * sh + kh <= height
                for task in range(tiles * phases):
                    number, phase = divmod(task, phases)
                    o0 = min(begin // apart + number * tile, (last_column - phase + apart - 1) // apart - tile)
                    ow = phase + o0 * apart
                    column = ow * sw - left
                    inside = column >= 0 and column + reach < width
                    if together > 1:
                        place(outputs, out.ctypes.data + (row * columns + ow) * result, columns * result, result)
                        corner = x.ctypes.data + ((n * height + above) * width + column) * pixel
                        packed = np.int64(w.ctypes.data), filter_bytes, blocks, filters
                        if inside and fits:
                            sum_high((corner, line, 0, pixel), packed, outputs.ctypes.data, ends)
                        else:
                            zeros_at = np.int64(zero.ctypes.data)
                            find_all(pixels, corner, (above, column), (height, width), zeros_at, line, pixel)
                            sum_found(pixels.ctypes.data, packed, outputs.ctypes.data, ends)
                    for upper in range(together if together == 1 else 0):
                        from_top = above + upper * sh
                        first, last = taps_inside(from_top, dh, kh, height)
                        places = (np.int64(out.ctypes.data) + ((row + upper) * columns + ow) * result, apart * result)
                        from_row = x.ctypes.data + ((n * height + from_top + first * dh) * width + column) * pixel
                        weights = w.ctypes.data + first * kw * tap_bytes
                        if members == 1 and inside:
                            seen = from_row, dh * line, dw * taps * pixel, jump * pixel
                            packed, size = (weights, filter_bytes, blocks, filters), (last - first, kw // taps)
                            sum_flat(seen, packed, size, places, ends)
                            continue
                        found = _find(pixels, from_row, column, width, last - first, np.int64(zero.ctypes.data), (
                            dh * line, kw // taps, taps * dw, span, jump, pixel))  # fmt: skip
                        for block in range(blocks):
                            k0 = min(block * lanes, filters // members - lanes)
                            offset = k0 // group_k * group_c * itemsize
                            for member in range(members):
                                at = weights + (block * members + member) * filter_bytes
                                sums = zeros(tile, 1, lanes, itemsize)
                                if members == 1:
                                    sums = begun(tile, ends, k0, lanes, itemsize)
                                for i in range(found):
                                    sums = slide_found(
                                        sums, 1, 1, taps, stride, group_c, group_k,
                                        pixels.ctypes.data + i * span * 8, offset, at + i * taps * tap_bytes,
                                    )  # fmt: skip
                                if members == 1:
                                    leave(sums, tile, places, k0 * itemsize, ends)
                                else:
                                    store(sums, tile, (np.int64(scratch.ctypes.data), lanes * itemsize), 0)
                                    added = residual[n, oh + upper] if residual.size else residual.reshape(0, 0)
                                    _spread(
                                        out[n, oh + upper], added, bias, scratch, (ow, apart), k0, (members, member)
                                    )
                    if finishes:
                        at, steps = out.ctypes.data + (row * columns + ow) * result, (columns * result, apart * result)
                        activate_pixels(at, steps, (together, tile), filters, code, slope, itemsize)
                row += together
        hold(pixels), hold(outputs)
        return 1

    return CompiledKernel(convolve, _ARGUMENTS)
