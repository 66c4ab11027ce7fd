"""Images of few channels as planes: windows copied out with zeros around them, and results interleaved again.

Both are much code that runs seldom. So it is compiled once, and kernels call it by its address.
"""

import functools

import numpy as np

from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_of, call
from convdispatch.backends._jit import compilable
from convdispatch.backends._layout import SAME, gather_planes
from convdispatch.backends._tile import zeros
from convdispatch.backends._vector import clear, copy
from convdispatch.backends._vector_activation import activate_all
from convdispatch.backends._weave import unweave, weave
from convdispatch.memory import CACHE_LINE

#: Up to so many filters are interleaved in registers.
WOVEN = 4
#: So many planes are taken apart in registers.
UNWOVEN = frozenset((1, 2, 3, 4, 6, 8))


@compilable
def fill_line(line, image, row, first_column, columns):  # type: ignore[no-untyped-def]
    """Copy a window of one row of an image ``[H, W]``, zeros where it reaches outside; its values lie side by side."""
    height, width = image.shape
    low = min(max(0, -first_column), columns)
    high = max(low, min(columns, width - first_column))
    if not 0 <= row < height:
        low = high = columns
    target, size = np.int64(line.ctypes.data), line.itemsize
    clear(target, low * size)
    clear(target + high * size, (columns - high) * size)
    source = np.int64(image.ctypes.data) + (row * width + first_column + low) * size
    copy(target + low * size, source, (high - low) * size)


@compilable
def _unweave_pixels(target, source, apart, first, last, channels, like, itemsize):  # type: ignore[no-untyped-def]
    """Take pixels of two to eight channels apart, from one to another; the last vector moves back until it fits."""
    lanes, pixel = like[0].lanes, channels * itemsize
    for i in range(first, last, lanes):
        o = min(i, last - lanes)
        if channels == 2:
            unweave(target + o * itemsize, source + o * pixel, apart, 2, like)
        elif channels == 3:
            unweave(target + o * itemsize, source + o * pixel, apart, 3, like)
        elif channels == 4:
            unweave(target + o * itemsize, source + o * pixel, apart, 4, like)
        elif channels == 6:
            unweave(target + o * itemsize, source + o * pixel, apart, 6, like)
        else:
            unweave(target + o * itemsize, source + o * pixel, apart, 8, like)


@compilable
def _fill_some(panel, q, i, line, first_column, spacing):  # type: ignore[no-untyped-def]
    """Copy what there is of column ``i`` of row ``q`` of some planes, from a row ``[W, C]`` of an image."""
    width, channels = line.shape
    for plane in range(spacing * channels):
        column = first_column + i * spacing + plane // channels
        if 0 <= column < width:
            panel[plane, q, i] = line[column, plane % channels]


#: An ``image [H, W, C]`` and what ``fill`` makes of a window of it.
_WINDOW = Arguments(
    panel=array_of(3), image=array_of(3), first_row=INTEGER, step=INTEGER, first_column=INTEGER, spacing=INTEGER,
    rows=INTEGER, columns=INTEGER,
)  # fmt: skip
unpack_window = _WINDOW.unpack


@compilable
def fill(filler, panel, shape, image, image_shape, first_row, step, first_column, spacing, rows, columns):  # type: ignore[no-untyped-def]
    """Copy a window of an image into planes, zeros where it reaches outside; every ``step``-th row of the image.

    Of columns it takes as many as there are planes for: plane ``b * C + c`` of ``panel [spacing * C, rows, columns]``
    has every ``spacing``-th one of channel ``c``, from ``first_column + b`` on. Of the planes and of the image ``[H, W,
    C]`` the address and the shape are given. ``filler`` is the address of what is called.
    """
    call(filler, (panel, *shape, image, *image_shape, first_row, step, first_column, spacing, rows, columns))


@compilable
def _fill(panel, image, first_row, step, first_column, spacing, rows, columns, like):  # type: ignore[no-untyped-def]
    """Do what ``fill`` tells."""
    height, width, channels = image.shape
    woven, size = spacing * channels, panel.itemsize
    # From column ``low`` of the planes to ``high``, all neighbours that go to different planes are inside.
    low = min(max(0, (spacing - 1 - first_column) // spacing), columns)
    high = max(low, min(columns, (width - first_column) // spacing))
    for q in range(rows):
        row = first_row + q * step
        if woven == 1:
            fill_line(panel[0, q], image[:, :, 0], row, first_column, columns)
            continue
        inside = 0 <= row < height
        target, apart = np.int64(panel.ctypes.data) + q * panel.shape[2] * size, panel.shape[1] * panel.shape[2] * size
        for plane in range(woven):
            clear(target + plane * apart, (low if inside else columns) * size)
            clear(target + plane * apart + high * size, (columns - high) * size)
        if not inside:
            continue
        if spacing > 1 and low > 0:
            _fill_some(panel, q, low - 1, image[row], first_column, spacing)
        if spacing > 1 and high < columns:
            _fill_some(panel, q, high, image[row], first_column, spacing)
        if woven in (2, 3, 4, 6, 8) and high - low >= like[0].lanes:
            source = np.int64(image.ctypes.data) + (row * width + first_column) * channels * size
            _unweave_pixels(target, source, apart, low, high, woven, like, size)
        else:
            for plane in range(woven):
                beside, channel = first_column + plane // channels, plane % channels
                for i in range(low, high):
                    panel[plane, q, i] = image[row, beside + i * spacing, channel]


@compilable
def _weave_pixels(target, source, apart, first, last, filters, streams, like, itemsize):  # type: ignore[no-untyped-def]
    """Interleave two to four planes, from one pixel to another; the last vector moves back until it fits."""
    lanes, pixel = like[0].lanes, filters * itemsize
    for i in range(first, last, lanes):
        o = min(i, last - lanes)
        if filters == 2:
            weave(target + o * pixel, source + o * itemsize, apart, 2, streams, like)
        elif filters == 3:
            weave(target + o * pixel, source + o * itemsize, apart, 3, streams, like)
        else:
            weave(target + o * pixel, source + o * itemsize, apart, 4, streams, like)


@compilable
def weave_line(line, stage, r, streamed, like, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Interleave the staged results of row ``r``: ``line [columns, K]`` of ``stage [K, rows, columns]``.

    If ``streamed``, past the caches where vectors fill cache lines.
    """
    columns, filters = line.shape
    target, source = np.int64(line.ctypes.data), np.int64(stage[0, r].ctypes.data)
    apart = stage.shape[1] * stage.shape[2] * itemsize
    done = 0
    if filters == 1:
        copy(target, source, columns * itemsize)
        done = columns
    elif filters <= WOVEN and columns >= lanes:
        if streamed and target % CACHE_LINE == 0:
            done = columns // lanes * lanes
            _weave_pixels(target, source, apart, 0, done, filters, 1, like, itemsize)
        _weave_pixels(target, source, apart, done, columns, filters, 0, like, itemsize)
        done = columns
    elif filters > WOVEN:
        surplus = max(0, lanes - filters)  # values behind the last pixel's, which are the next line's
        whole = columns - (surplus + filters - 1) // filters
        if whole >= lanes:
            gather_planes(source, apart, target, filters, whole, lanes, itemsize, SAME)
            done = whole
    for k in range(filters):
        part = stage[k, r, :columns]
        for i in range(done, columns):
            line[i, k] = part[i]


#: A ``line [columns, K]`` of output, a residual's or none, and staged results ``[K, rows, columns]`` of its row ``r``.
_LINE = Arguments(
    line=array_of(2), added=array_of(2), stage=array_of(3), r=INTEGER, streamed=INTEGER, code=INTEGER, slope=FLOAT
)
unpack_line = _LINE.unpack


@compilable
def put_line(putter, out, residual, image, row, left, right, stage, r, streamed, code, slope, itemsize):  # type: ignore[no-untyped-def]
    """Store a line of output, from column ``left`` to ``right``: the staged results of row ``r``, finished.

    ``putter`` is ``putting``'s address.
    """
    _, rows, columns, filters = out.shape
    offset = ((image * rows + row) * columns + left) * filters * itemsize
    line, added = np.int64(out.ctypes.data) + offset, np.int64(residual.ctypes.data) + offset
    some = right - left if residual.size else 0
    call(
        putter,
        (line, right - left, filters, added, some, filters, np.int64(stage.ctypes.data), *stage.shape, r, streamed,
         code, slope),
    )  # fmt: skip


@functools.cache
def _filling(lanes: int, itemsize: int) -> int:
    """Return the address of what ``fill`` calls."""

    def fill_window(arguments, _):  # type: ignore[no-untyped-def]
        panel, image, first_row, step, first_column, spacing, rows, columns = unpack_window(arguments, itemsize)
        like = zeros(1, 1, lanes, itemsize)
        _fill(panel, image, first_row, step, first_column, spacing, rows, columns, like)
        return 1

    return CompiledKernel(fill_window, _WINDOW).address


@functools.cache
def putting(lanes: int, itemsize: int) -> int:
    """Return the address of what ``put_line`` calls."""

    def put(arguments, _):  # type: ignore[no-untyped-def]
        line, added, stage, r, streamed, code, slope = unpack_line(arguments, itemsize)
        weave_line(line, stage, r, streamed, zeros(1, 1, lanes, itemsize), lanes, itemsize)
        flat, more = line.reshape(line.size), added.reshape(added.size)
        for i in range(more.size):
            flat[i] += more[i]
        activate_all(np.int64(flat.ctypes.data), flat.size, code, slope, itemsize)
        return 1

    return CompiledKernel(put, _LINE).address


def callees(lanes: int, itemsize: int) -> dict[str, int]:
    """Return the addresses of both, by the names of the arguments that kernels have for them."""
    return {"filler": _filling(lanes, itemsize), "putter": putting(lanes, itemsize)}
