"""Which outputs read inside the image, and what they read there: padding as slices, or as zeros in a small copy."""

import numpy as np

from convdispatch.backends._jit import compilable
from convdispatch.backends._vector import clear, copy, interleave, load, save


def overlap(first: int, count: int, offset: int, stride: int, length: int) -> tuple[slice, slice]:
    """Return which of ``count`` places from ``first`` on hold elements of ``0..length``, and which elements.

    Place ``i`` is element ``i * stride + offset``; the first slice is relative to ``first``.
    """
    low = max(first, -(offset // stride))
    high = min(first + count, -((offset - length) // stride))
    if low >= high:
        return slice(0, 0), slice(0, 0)
    return slice(low - first, high - first), slice(low * stride + offset, (high - 1) * stride + offset + 1, stride)


@compilable
def taps_inside(start, step, taps, size):  # type: ignore[no-untyped-def]
    """Return the range of taps that lie inside an axis, the first at ``start`` and the others ``step`` apart.

    Of taps, or of outputs that one tap meets.
    """
    low = (-start + step - 1) // step if start < 0 else 0
    high = (size - start + step - 1) // step if start < size else 0
    return low, min(high, taps)


@compilable
def copy_columns(target, source, first, count, width, pixel):  # type: ignore[no-untyped-def]
    """Copy ``count`` columns from ``first`` on, whose address is ``source``; zeros where a line of ``width`` has none.

    ``pixel`` is the bytes of a column.
    """
    low, high = min(max(0, -first), count), min(max(0, width - first), count)
    clear(target, low * pixel)
    copy(target + low * pixel, source + low * pixel, (high - low) * pixel)
    clear(target + high * pixel, (count - high) * pixel)


@compilable
def copy_group(stage, x, where, first_channel, rows, share, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Copy a group's channels of ``rows`` rows of an image to ``stage [rows, columns, C // groups]``.

    ``where`` is the image, the first row and the first column; outside the image there are zeros. Or copy the channels
    of ``share`` groups that fill a vector, interleaved.
    """
    image, top, left = where
    _, height, width, channels = x.shape
    columns, group_c = stage.shape[1:]
    pixel = group_c * itemsize
    low, high = min(max(0, -left), columns), min(max(0, width - left), columns)
    for row in range(rows):
        target, ih = np.int64(stage[row].ctypes.data), top + row
        if not 0 <= ih < height:
            clear(target, columns * pixel)
            continue
        clear(target, low * pixel)
        clear(target + high * pixel, (columns - high) * pixel)
        if group_c == channels and share == 1:
            source = x.ctypes.data + ((image * height + ih) * width + left + low) * pixel
            copy(target + low * pixel, source, (high - low) * pixel)
            continue
        if group_c < lanes:
            for column in range(low, high):
                for c in range(group_c):
                    stage[row, column, c] = x[image, ih, left + column, first_channel + c]
            continue
        first = ((image * height + ih) * width + left + low) * channels + first_channel
        source = np.int64(x.ctypes.data) + first * itemsize
        for column in range(low, high):
            for c in range(0, group_c, lanes):
                offset = min(c, group_c - lanes) * itemsize
                save(target + column * pixel + offset, interleave(load(source + offset, lanes, itemsize), share))
            source += channels * itemsize
