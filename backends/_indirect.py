"""The kernel of ``implicit_gemm`` for any window: what a tile reads, it finds through a table of addresses.

The table has an address for each tap and pixel of the tile, and padding is the address of a row of zeros (Dukhan: The
Indirect Convolution Algorithm, 2019). A tile whose windows lie inside the image needs only its pixels' addresses. Tiles
are cut from the flat list of all pixels of all images, and run over the ends of lines.
"""

import functools

import numpy as np

from convdispatch.backends._activation import RELU6
from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._jit import compilable, inlined
from convdispatch.backends._put import finished, put
from convdispatch.backends._tile import add_to_all, multiply_add, zeros
from convdispatch.backends._tuples import load_apart, save_apart
from convdispatch.backends._vector import hold, prefetch
from convdispatch.backends._vector_activation import activate_all
from convdispatch.memory import CACHE_LINE

#: Filters with more bytes than this are taken by parts, but not for fewer tiles than these.
FAR, _LEAST_TILES = 4 << 20, 4
#: Steps of a tile's sums with a part, and bytes of filters between one look ahead at the next part and another.
_PART, _STRETCH = 1024, 4 << 10


@compilable
def _locate(place, x, size, out, zero, window, table):  # type: ignore[no-untyped-def]
    """Fill the table for the tile of pixels from ``place`` on: (image, row, column) of the output.

    The first row of the table is the outputs' addresses, the second the windows' (meaningful if all lie inside), the
    rest, filled if they do not, the address of each tap; a row of a tap that no pixel has inside begins with 0. Return
    whether all windows lie inside the image, and the place behind the tile.
    """
    (_, height, width, channels), (images, rows, columns, filters) = x[1:], out[1:]
    kh, kw, top, left, sh, sw, dh, dw = window
    image, oh, ow = place
    ih, iw, pixels = oh * sh - top, ow * sw - left, table.shape[1]
    stored = out[0] + ((image * rows + oh) * columns + ow) * filters * size
    seen = x[0] + ((image * height + ih) * width + iw) * channels * size
    below, right = (kh - 1) * dh, (kw - 1) * dw
    if ow + pixels <= columns:  # as a rule, all in one row
        for r in range(pixels):
            table[0, r] = stored + r * filters * size
            table[1, r] = seen + r * sw * channels * size
        inside = ih >= 0 and iw >= 0 and ih + below < height and iw + (pixels - 1) * sw + right < width
    else:
        inside = True
        for r in range(pixels):
            ih, iw = oh * sh - top, ow * sw - left
            table[0, r] = out[0] + ((image * rows + oh) * columns + ow) * filters * size
            table[1, r] = x[0] + ((image * height + ih) * width + iw) * channels * size
            inside &= ih >= 0 and iw >= 0 and ih + below < height and iw + right < width
            image, oh, ow = _next((image, oh, ow), (images, rows, columns))
    if not inside:
        image, oh, ow = place
        for r in range(pixels):
            for i in range(kh):
                ih = oh * sh - top + i * dh
                for j in range(kw):
                    iw = ow * sw - left + j * dw
                    behind = (i * dh * width + j * dw) * channels * size
                    is_seen = 0 <= ih < height and 0 <= iw < width
                    table[2 + i * kw + j, r] = table[1, r] + behind if is_seen else zero
            image, oh, ow = _next((image, oh, ow), (images, rows, columns))
        _leave_out(table[2:], zero)
    image, oh, ow = place
    if ow + pixels < columns:
        return inside, (image, oh, ow + pixels)
    ow += pixels
    while ow >= columns and image < images:
        ow -= columns
        oh += 1
        if oh == rows:
            oh = 0
            image += 1
    return inside, (image, oh, ow)


@compilable
def _leave_out(taps, zero):  # type: ignore[no-untyped-def]
    """Mark, by 0 in front, the taps that all pixels of a tile have outside the image."""
    for tap in range(taps.shape[0]):
        is_met = False
        for r in range(taps.shape[1]):
            is_met |= taps[tap, r] != zero
        if not is_met:
            taps[tap, 0] = 0


@compilable
def _next(place, shape):  # type: ignore[no-untyped-def]
    """Return the place of the next pixel, of the last one again behind it: a division each would take far longer."""
    image, oh, ow = place
    if ow + 1 < shape[2]:
        return image, oh, ow + 1
    if oh + 1 < shape[1]:
        return image, oh + 1, 0
    if image + 1 < shape[0]:
        return image + 1, 0, 0
    return place


@compilable
def is_far(filter_bytes, tiles):  # type: ignore[no-untyped-def]
    """Return whether filters are taken by parts: from caches shared with others, or memory, and for so many tiles.

    All tiles use a part before the next, so that it comes from afar once.
    """
    return filter_bytes > FAR and tiles >= _LEAST_TILES


@inlined
def _add_products(  # type: ignore[no-untyped-def]
    sums, rows, table, inside, behind, walk, part, weights, step, coming, lines, stretch, itemsize
):
    """Return a tile's sums with the products of its inputs and ``part`` of the filters, from and to which value.

    Args:
        table: what ``_locate`` has filled.
        inside: whether all windows lie inside the image, and taps are found from the windows' addresses.
        behind: bytes from those addresses to the values.
        walk: taps of a row, bytes from a row of taps to the next and from a tap to the next, taps that are one run
            through memory, values of a tap.
        weights, step: where the filters lie, and how far it is from one value's to the next.
        coming: where the filters lie that are used next: before each ``stretch``, so many ``lines`` are prefetched.
    """
    kw, down, across, together, depth = walk
    c, i, j, left, packed = part[0], 0, 0, part[1] - part[0], weights + part[0] * step
    run, inputs = together * depth, np.int64(table.ctypes.data) + rows * 8
    if c:
        first, c = divmod(c, run)
        i, j = divmod(first * together, kw)
    while left:
        for _ in range(lines):
            prefetch(coming)
            coming += CACHE_LINE
        now, is_met = min(run - c, left, stretch), True
        if inside:
            places, offset = inputs, behind + i * down + j * across + c * itemsize
        else:
            places, offset = inputs + (1 + i * kw + j) * rows * 8, behind + c * itemsize
            is_met = table[2 + i * kw + j, 0] != 0
        if is_met:
            for _ in range(now):
                sums = multiply_add(sums, rows, places, offset, packed, 1)
                offset += itemsize
                packed += step
        else:
            packed += now * step
        left -= now
        c += now
        if c == run:
            c, j = 0, j + together
            if j == kw:
                i, j = i + 1, 0
    return sums


#: ``filters`` is ``[groups, blocks of a group, KH, KW, C // groups, block]``, filled up with zeros, ``bias`` alike.
ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(6), bias=array_of(1), residual=array_of(4), out=array_of(4), zero=array_of(1),
    window=integers_of(8), groups=INTEGER, streamed=INTEGER, code=INTEGER,
    slope=FLOAT, jobs=array_of(2, "int64"),
)  # fmt: skip
unpack = ARGUMENTS.unpack


@functools.cache
def compiled(rows: int, vectors: int, lanes: int, itemsize: int) -> CompiledKernel:  # noqa: PLR0915
    """Return the kernel of one tile."""
    block, sums_of_tile = vectors * lanes, rows * vectors
    step, vector_bytes = block * itemsize, lanes * itemsize

    def convolve(arguments, job):  # type: ignore[no-untyped-def]
        """Compute the tiles of pixels ``jobs[job, 0:2]`` for the blocks of filters ``jobs[job, 2:4]``."""
        x, w, bias, residual, out, zero, window, groups, streamed, code, slope, jobs = unpack(arguments, itemsize)
        first_tile, last_tile, first_block, last_block = jobs[job]
        kh, kw, _, _, _, _, dh, dw = window
        channels, filters = x.shape[3], out.shape[3]
        group_c, group_k, per_group = channels // groups, filters // groups, w.shape[1]
        pixels = out.shape[0] * out.shape[1] * out.shape[2]
        here = (x.ctypes.data, x.shape[0], x.shape[1], x.shape[2], x.shape[3])
        there = (out.ctypes.data, out.shape[0], out.shape[1], out.shape[2], out.shape[3])
        residual_offset = residual.ctypes.data - out.ctypes.data
        tiles = last_tile - first_tile
        table, inside = np.empty((tiles, 2 + kh * kw, rows), np.int64), np.empty(tiles, np.bool_)
        image, rest = divmod(first_tile * rows, out.shape[1] * out.shape[2])
        place = (image, rest // out.shape[2], rest % out.shape[2])
        for t in range(tiles):
            inside[t], place = _locate(place, here, itemsize, there, np.int64(zero.ctypes.data), window, table[t])
        # Taps of one row are one run through memory, if nothing lies between them.
        joined, pixel = dw == 1 and groups == 1, channels * itemsize
        table_at, table_step = table.ctypes.data, (2 + kh * kw) * rows * 8
        streams = streamed and out.ctypes.data % CACHE_LINE == 0
        depth, far = kh * kw * group_c, is_far(w.size * itemsize, tiles)
        turns, stretch = (-(-depth // _PART), max(1, _STRETCH // step)) if far else (1, depth)
        lines = stretch * step // (tiles * CACHE_LINE) + 1 if far else 0
        partial = np.empty((tiles if turns > 1 else 0, rows, block), x.dtype)
        for number in range(first_block, last_block):
            group, member = divmod(number, per_group)
            k0, count = group * group_k + member * block, min(block, group_k - member * block)
            weights, behind = w.ctypes.data + number * depth * step, group * group_c * itemsize
            for turn in range(turns):
                begin, end = turn * depth // turns, (turn + 1) * depth // turns
                share = (end - begin) // tiles
                for t in range(tiles):
                    outputs = table_at + t * table_step
                    if turn:
                        sums = load_apart(partial[t].ctypes.data, vector_bytes, sums_of_tile, lanes, itemsize)
                    else:
                        sums = zeros(rows, vectors, lanes, itemsize)
                        if bias.size:
                            sums = add_to_all(sums, rows, bias.ctypes.data + number * step)
                    walk = (kw, dh * here[3] * pixel, dw * pixel, kw if joined and inside[t] else 1, group_c)
                    sums = _add_products(
                        sums, rows, table[t], inside[t], behind, walk, (begin, end), weights, step,
                        weights + (end + t * share) * step, lines, stretch, itemsize,
                    )  # fmt: skip
                    if turn + 1 < turns:
                        save_apart(partial[t].ctypes.data, vector_bytes, sums)
                        continue
                    beside = residual_offset + k0 * itemsize
                    sums = finished(sums, rows, outputs, beside, residual.size, code, count, block)
                    put(sums, rows, outputs, k0 * itemsize, count, block, streams)
                    if code > RELU6:
                        first = (first_tile + t) * rows
                        for r in range(first, min(first + rows, pixels)):
                            at = out.ctypes.data + (r * filters + k0) * itemsize
                            activate_all(at, count, code, slope, itemsize)
        hold(table), hold(partial)
        return 1

    return CompiledKernel(convolve, ARGUMENTS)
