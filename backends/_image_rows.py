"""The kernel of ``image_rows``: tiles of neighbouring columns, whose rows share the vectors of input that they meet."""

import functools

import numpy as np

from convdispatch.backends._activation import RELU6
from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_at, array_of, integers_of
from convdispatch.backends._jit import inlined
from convdispatch.backends._panels import panel_at
from convdispatch.backends._planes import callees, fill, put_line
from convdispatch.backends._put import put_tile
from convdispatch.backends._scratch import borrow, give_back
from convdispatch.backends._tile import add_to_all, store, zeros
from convdispatch.backends._vector_activation import activate_all
from convdispatch.backends._weave import add_rows, add_rows_of_all, woven
from convdispatch.memory import CACHE_LINE

#: ``filters`` is ``[K, C // groups, KH * KW]``, in the order of ``_packed``, and ``chunks [parts, 4]`` tells of each
#: part of its values how they are taken: in so many chunks of ``taps``, of one fewer, and from which column to which.
#: ``shifts [KW]`` are bytes to the input of each column, ``reach`` the columns beside a tile.
#: ``bias`` is ``[K, a tile's columns]`` or empty.
ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(3), bias=array_of(2), residual=array_of(4), out=array_of(4),
    chunks=array_of(2, "int64"), shifts=array_of(1, "int64"), reach=INTEGER, strides=integers_of(2),
    pads=integers_of(4), dilations=integers_of(2), shape=integers_of(2), counts=integers_of(3), window=integers_of(2),
    stage_width=INTEGER, planar=INTEGER, in_place=INTEGER, streamed=INTEGER, code=INTEGER, slope=FLOAT,
    jobs=array_of(2, "int64"), filler=INTEGER, putter=INTEGER,
)  # fmt: skip
unpack = ARGUMENTS.unpack


@inlined
def _add(sums, rows, source, step, packed, apart, taps, together):  # type: ignore[no-untyped-def]
    """Add some rows of one column of a filter, or of as many filters as are done ``together``."""
    if together == 1:
        return add_rows(sums, rows, source, step, packed, taps)
    return add_rows_of_all(sums, rows, source, step, packed, apart, taps)


@inlined
def _sums(  # type: ignore[no-untyped-def]
    source, step, apart, between, packed, own, channels, chunks, shifts, rows, wide, together, taps, fewer, lanes,
    itemsize,
):  # fmt: skip
    """Return a tile's sums of one filter, whose values lie at ``packed``, or of some, ``own`` bytes for each.

    The tile's rows of input are ``step`` bytes apart from ``source`` on, channels ``apart``, and what the parts of the
    filter meet ``between``. A row of the tile is ``wide`` vectors of one filter, or a vector of each.
    """
    sums = zeros(rows, wide, lanes, itemsize)
    for c in range(channels):
        for a in range(chunks.shape[0]):
            taken = source + a * between + c * apart
            for _ in range(chunks[a, 0]):
                for j in range(chunks[a, 2], chunks[a, 3]):
                    sums = _add(sums, rows, taken + shifts[j], step, packed, own, taps, together)
                    packed += taps * itemsize
                taken += taps * step
            for _ in range(chunks[a, 1]):
                for j in range(chunks[a, 2], chunks[a, 3]):
                    sums = _add(sums, rows, taken + shifts[j], step, packed, own, fewer, together)
                    packed += fewer * itemsize
                taken += fewer * step
    return sums


@functools.cache
def compiled(  # noqa: C901, PLR0915
    rows: int, vectors: int, together: int, taps: int, along: bool, lanes: int, itemsize: int
) -> CompiledKernel:  # fmt: skip
    """Return the kernel of one tile that takes a filter's rows ``taps`` at a time, or one fewer.

    If it lies ``along`` a row, what are rows of sums elsewhere are neighbouring vectors, and so on. If several filters
    are done ``together``, these are all, and their results are interleaved in registers.
    """
    run = vectors * lanes
    high, across = (1, rows * run) if along else (rows, run)
    fewer, wide = max(1, taps - 1), vectors * together

    def convolve(arguments, job):  # type: ignore[no-untyped-def]  # noqa: C901, PLR0912, PLR0915
        """Compute the panels ``jobs[job]``, each of ``high * shape[0]`` by ``across * shape[1]`` outputs."""
        (
            x, w, bias, residual, out, chunks, shifts, reach, strides, pads, dilations, shape, counts, window,
            stage_width, planar, in_place, streamed, code, slope, jobs, filler, putter,
        ) = unpack(arguments, itemsize)  # fmt: skip
        first_panel, last_panel = jobs[job]
        (known, group_c, values), height, width, channels = w.shape, x.shape[1], x.shape[2], x.shape[3]
        _, all_rows, columns, filters = out.shape
        group_k, sets = filters // (channels // group_c), known // filters  # images in turn have these
        (sh, sw), dh = strides, dilations[0]
        parted = 1 if along else chunks.shape[0]  # parts of the filter that meet planes of their own
        # Rows of the filter that meet every ``sh``-th of the image.
        kh = 1 if along else chunks[0, 0] * taps + chunks[0, 1] * fewer
        filled = sw * channels  # planes that are filled from one row of the image
        planes, line_step = (parted * filled, window[0], window[1]), window[1] * itemsize
        plane_step, stage_line = window[0] * line_step, stage_width * itemsize
        planes_at = borrow(planes[0] * plane_step + filters * high * stage_line)
        if planes_at == 0:
            return 0
        stage_at = planes_at + planes[0] * plane_step
        stage = array_at(stage_at, (filters, high, stage_width), itemsize)
        # Images are of pixels, or planes of one channel each; so are results.
        sources, copies = (channels, filters) if planar else (1, 1)
        image_shape = (height, width, channels // sources)
        image_step = height * width * image_shape[2] * itemsize
        results = out.reshape((out.shape[0] * copies, all_rows, columns, filters // copies))
        added = residual.reshape((residual.shape[0] * copies, all_rows, columns, filters // copies))
        places = np.empty(rows, np.int64)
        # As whole numbers of one kind: an unsigned one and a signed one would make a float.
        here, there = np.int64(x.ctypes.data), np.int64(out.ctypes.data)
        more = np.int64(residual.ctypes.data) - there
        filters_at, bias_at, own = np.int64(w.ctypes.data), np.int64(bias.ctypes.data), group_c * values * itemsize
        table = places.ctypes.data
        for task in range(first_panel, last_panel):
            n, phase, top, bottom, left, right = panel_at(
                task, counts, all_rows, columns, dh, high * shape[0], across * shape[1]
            )
            staged = filters > copies * together or right - left < across or bottom - top < high
            if not in_place:
                first_row, first_column = (phase + top * dh) * sh - pads[0], left * sw - pads[2]
                for a in range(parted):
                    for c in range(sources):
                        fill(
                            filler, planes_at + (a * filled + c * sw) * plane_step, planes,
                            here + (n * sources + c) * image_step, image_shape, first_row + a, dh * sh, first_column,
                            sw, max(bottom - top, high) + kh - 1, max(right - left, across) + reach,
                        )  # fmt: skip
            for tile_row in range((bottom - top + high - 1) // high):
                oh = top if staged and bottom - top < high else min(top + tile_row * high, bottom - high)
                ih = phase - pads[0] + oh * dh
                rows_inside = ih >= 0 and ih + (high + kh - 2) * dh < height
                count = min(high, bottom - oh)
                for r in range(rows):
                    below, beside = (0, r * run) if along else (r, 0)
                    if staged:
                        places[r] = stage_at + below * stage_line + beside * itemsize
                    else:
                        line = (n * copies * all_rows + phase + (oh + below) * dh) * columns + left + beside
                        places[r] = there + line * together * itemsize
                for tile in range((right - left + across - 1) // across):
                    ow = max(0, min(tile * across, right - left - across))
                    iw = left + ow - pads[2]
                    source, step, apart = planes_at, line_step, plane_step * (sw if planar else 1)
                    if not in_place:
                        source += (oh - top) * line_step + ow * itemsize
                    elif rows_inside and iw >= 0 and iw + across + reach <= width:
                        source = here + ((n * sources * height + ih) * width + iw) * itemsize
                        step, apart = dh * width * itemsize, height * width * itemsize
                    else:
                        for c in range(sources):
                            fill(
                                filler, planes_at + c * plane_step, planes,
                                here + (n * sources + c) * image_step, image_shape, ih, dh, iw, 1, high + kh - 1,
                                across + reach,
                            )  # fmt: skip
                    if along:
                        step = run * itemsize
                    for k in range(0, filters, together):
                        which = n % sets * filters + k
                        sums = _sums(
                            source + k // group_k * group_c * apart, step, apart, 0 if along else filled * plane_step,
                            filters_at + which * own, own, group_c, chunks, shifts,
                            rows, wide, together, taps, fewer, lanes, itemsize,
                        )  # fmt: skip
                        if bias.size:
                            sums = add_to_all(sums, rows, bias_at + which * run * itemsize)
                        offset = ow * together * itemsize
                        if staged:
                            store(sums, rows, table, offset + k * high * stage_line)
                            continue
                        offset += k * all_rows * columns * itemsize  # of whom there are several only in planes
                        streams = streamed and (there + left * together * itemsize + offset) % CACHE_LINE == 0
                        if together > 1:
                            sums = woven(sums, rows)
                        put_tile(sums, rows, table, offset, residual.size, more, code, streams)
                        if code > RELU6:
                            for r in range(high):
                                stored = results[n * copies + k, phase + (oh + r) * dh, left + ow :]
                                activate_all(np.int64(stored.ctypes.data), across * together, code, slope, itemsize)
                if staged:
                    for r in range(count):
                        row = phase + (oh + r) * dh
                        for k in range(copies):
                            put_line(
                                putter, results, added, n * copies + k, row, left, right,
                                stage[k : k + filters // copies], r, streamed, code, slope, itemsize,
                            )  # fmt: skip
        give_back(planes_at)
        return 1

    return CompiledKernel(convolve, ARGUMENTS, callees(lanes, itemsize))
