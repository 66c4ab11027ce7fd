"""The kernel of ``fast_fir``: phases of the image are transformed, filtered by short filters, and transformed back.

A tile is m x m outputs. Of the tiles of some rows, the n x n transformed values, n = 2 m - 1, make n x n planes with a
value for each tile. Each plane is filtered by its own filter of A x B values, as ``image_rows`` filters an image, with
neighbouring tiles of a row in a vector; the n x n results are transformed back and interleaved to rows of output.
"""

import functools

import numpy as np

from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_at, array_of, integers_of
from convdispatch.backends._jit import compilable
from convdispatch.backends._lines import odd_lines
from convdispatch.backends._planes import callees, fill, put_line
from convdispatch.backends._scratch import borrow, give_back
from convdispatch.backends._taps import chunks
from convdispatch.backends._tile import add_to_all, store, zeros
from convdispatch.backends._transforms import leave_columns, report, transform_input, transform_output
from convdispatch.backends._tuples import add_doubts, gather, load_apart, save_apart
from convdispatch.backends._vector import copy, hold
from convdispatch.backends._weave import add_rows, unweave, weave


@compilable
def _enter(filler, image, first_row, first_column, values, reach, wide, m, n, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Transform the tiles of ``reach`` rows and ``wide`` columns into ``values [points, C * rows * columns]``.

    A row of the image is split into its m phases and transformed along itself; n such rows are transformed down.
    Tiles overlap by n - m rows, which are kept for the next.
    """
    channels = image.shape[2]
    like = zeros(1, 1, lanes, itemsize)
    line = np.empty((channels, 1, m * (wide + lanes)), values.dtype)
    phases = np.empty((m, wide + lanes), values.dtype)
    half = np.empty((channels, n, n, wide), values.dtype)
    table = np.empty(n, np.int64)  # input j of a tile is in phase j % m, of the tile or of its neighbour
    for j in range(n):
        table[j] = phases.ctypes.data + ((j % m) * phases.shape[1] + j // m) * itemsize
    between = values.shape[1] * itemsize
    for i in range(reach):
        for q in range(n - m if i else 0, n):
            row = first_row + i * m + q
            fill(
                filler, np.int64(line.ctypes.data), line.shape, np.int64(image.ctypes.data), image.shape, row, 1,
                first_column, 1, 1, line.shape[2],
            )  # fmt: skip
            for c in range(channels):
                for at in range(0, wide + lanes, lanes):
                    source = line.ctypes.data + (c * line.shape[2] + at * m) * itemsize
                    unweave(phases.ctypes.data + at * itemsize, source, phases.shape[1] * itemsize, m, like)
                for at in range(0, wide, lanes):
                    inputs = gather(table.ctypes.data, 8, at * itemsize, n, lanes, itemsize)
                    to = half.ctypes.data + ((c * n + q) * n * wide + at) * itemsize
                    save_apart(to, wide * itemsize, transform_input(inputs, m, m, 1))
        for c in range(channels):
            for p in range(n):
                for at in range(0, wide, lanes):
                    start = half.ctypes.data + ((c * n * n + p) * wide + at) * itemsize
                    inputs = load_apart(start, n * wide * itemsize, n, lanes, itemsize)
                    to = values.ctypes.data + ((c * reach + i) * wide + at) * itemsize + p * between
                    save_apart(to, n * between, transform_input(inputs, m, m, 1))
            kept = half.ctypes.data + c * n * n * wide * itemsize
            copy(kept, kept + m * n * wide * itemsize, (n - m) * n * wide * itemsize)
    hold(table)


@compilable
def _filter(  # type: ignore[no-untyped-def]
    tile, apart, packed, short, cut, products, group_c, rows, vectors, taps, fewer, lanes, itemsize
):
    """Store the products of one register tile at all points, by one filter.

    Args:
        tile: address of its values at the first point, of the first channel that the filter sees.
        apart: how many bytes points, channels and rows are apart.
        packed: address of the filter.
        short: A and B, its size at each point.
        cut: A is cut into chunks, so many of ``taps`` rows, and so many of ``fewer``.
        products: ``[points, rows * vectors * lanes]``, where to.
        group_c: channels that the filter sees.
        rows, vectors, taps, fewer, lanes, itemsize: literal.
    """
    places, step = (np.int64(products.ctypes.data), vectors * lanes * itemsize), apart[2]
    for p in range(products.shape[0]):
        sums = zeros(rows, vectors, lanes, itemsize)
        for c in range(group_c):
            place = tile + p * apart[0] + c * apart[1]
            for _ in range(cut[0]):
                for j in range(short[1]):
                    sums = add_rows(sums, rows, place + j * itemsize, step, packed, taps)
                    packed += taps * itemsize
                place += taps * step
            for _ in range(cut[1]):
                for j in range(short[1]):
                    sums = add_rows(sums, rows, place + j * itemsize, step, packed, fewer)
                    packed += fewer * itemsize
                place += fewer * step
        store(sums, rows, places, p * products.shape[1] * itemsize)


@compilable
def _leave(  # type: ignore[no-untyped-def]
    products, bias, stage, first, doubts, half, m, n, rows, vectors, lanes, itemsize
):
    """Transform products of ``[points, rows * vectors * lanes]`` back to ``stage``; return doubts.

    They become ``rows * m`` rows of the stage, from the tile number ``first`` on. ``bias`` is the address of a vector
    of it, or 0. ``half`` is the address of n + 1 times m vectors for what is under way.
    """
    like = zeros(1, 1, lanes, itemsize)
    lane_bytes, step = lanes * itemsize, products.shape[1] * itemsize
    done = half + m * n * lane_bytes
    for r in range(rows):
        for v in range(vectors):
            start = products.ctypes.data + (r * vectors + v) * lane_bytes
            leave_columns(start, step, half, m, m, 1, n, n, lanes, itemsize)
            for i in range(m):
                line = load_apart(half + i * n * lane_bytes, lane_bytes, n, lanes, itemsize)
                sums = transform_output(line, m, m, 1)
                doubts = add_doubts(doubts, sums)
                if bias:
                    sums = add_to_all(sums, m, bias)
                save_apart(done, lane_bytes, sums)
                to = stage.ctypes.data + ((r * m + i) * stage.shape[1] + (first + v * lanes) * m) * itemsize
                weave(to, done, lane_bytes, m, 0, like)
    return doubts


#: ``filters`` is ``[K, points, C // groups, A * B]``, each chunk of a short filter's rows column by column; ``bias``
#: is ``[K, lanes]`` or empty.
ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(4), bias=array_of(2), residual=array_of(4), out=array_of(4),
    pads=integers_of(2), short=integers_of(2), shape=integers_of(2), code=INTEGER, slope=FLOAT,
    jobs=array_of(2, "int64"), spoiled=INTEGER, filler=INTEGER, putter=INTEGER,
)  # fmt: skip
unpack = ARGUMENTS.unpack
_SPOILED_AT = 8 * ARGUMENTS.at["spoiled"]


@compilable
def scratch_of(channels, filters, reach, high, strip, m, tile, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Return how a job's scratch memory is divided, in values.

    Args:
        channels, filters: of the image, and how many results there are.
        reach: rows and columns of tiles that a panel sees.
        high, strip: rows of tiles that are done together, and a panel's columns of tiles.
        m: the tiles' size.
        tile: values of a register tile.
        lanes, itemsize: of a vector.

    Returns:
        What a point takes of all transformed tiles, and of the products; where products begin, results, and the
        transforms' halves; and how many values there are.
    """
    n = 2 * m - 1
    between, leaving = odd_lines(channels * reach[0] * reach[1], itemsize), odd_lines(tile, itemsize)
    results = n * n * (between + leaving)
    half = results + filters * high * m * strip * m
    return between, leaving, n * n * between, results, half, half + (n + 1) * m * lanes


@functools.cache
def compiled(m: int, rows: int, vectors: int, taps: int, lanes: int, itemsize: int) -> CompiledKernel:
    """Return the kernel for tiles of m x m that takes a short filter's rows ``taps`` at a time, or one fewer."""
    n, across = 2 * m - 1, vectors * lanes
    points, fewer = n * n, max(1, taps - 1)

    def convolve(arguments, job):  # type: ignore[no-untyped-def]
        """Compute the panels ``jobs[job]``, each of ``shape[0]`` by ``across * shape[1]`` tiles."""
        x, u, bias, residual, out, pads, short, shape, code, slope, jobs, _, filler, putter = unpack(
            arguments, itemsize
        )
        first_panel, last_panel = jobs[job]
        filters, _, group_c, _ = u.shape
        (a, b), cut = short, chunks(short[0], taps)
        channels = x.shape[3]
        group_k = filters // (channels // group_c)
        _, height, width, _ = out.shape
        down, along = -(-height // m), -(-width // m)  # tiles of an image
        high, strip = shape[0], across * shape[1]
        blocks, strips = -(-down // high), -(-along // strip)
        widest, most = -(-(strip + b - 1) // lanes) * lanes, high + a - 1
        between, leaving, products_at, stage_at, half_at, size = scratch_of(
            channels, filters, (most, widest), rows, strip, m, rows * across, lanes, itemsize
        )
        scratch = borrow(size * itemsize)
        if scratch == 0:
            return 0
        values = array_at(scratch, (points, between), itemsize)
        products = array_at(scratch + products_at * itemsize, (points, leaving), itemsize)
        stage = array_at(scratch + stage_at * itemsize, (filters, rows * m, strip * m), itemsize)
        half = scratch + half_at * itemsize
        doubts = zeros(1, 1, lanes, itemsize)[0]
        bias_at = np.int64(bias.ctypes.data)
        for task in range(first_panel, last_panel):
            rest, s = divmod(task, strips)
            image, block = divmod(rest, blocks)
            top, left = block * high, s * strip
            passes, runs = -(-min(high, down - top) // rows), -(-min(strip, along - left) // across)
            reach, wide = passes * rows + a - 1, -(-(runs * across + b - 1) // lanes) * lanes
            _enter(filler, x[image], top * m - pads[0], left * m - pads[1], values, reach, wide, m, n, lanes, itemsize)
            apart = (between * itemsize, reach * wide * itemsize, wide * itemsize)
            for group in range(passes):
                for run in range(runs):
                    tile = values.ctypes.data + group * rows * apart[2] + run * across * itemsize
                    for k in range(filters):
                        packed = u.ctypes.data + k * points * group_c * a * b * itemsize
                        _filter(
                            tile + k // group_k * group_c * apart[1], apart, packed, short, cut, products, group_c,
                            rows, vectors, taps, fewer, lanes, itemsize,
                        )  # fmt: skip
                        added = bias_at + k * lanes * itemsize if bias.size else 0
                        doubts = _leave(
                            products, added, stage[k], run * across, doubts, half,
                            m, n, rows, vectors, lanes, itemsize,
                        )  # fmt: skip
                first, right = (top + group * rows) * m, min(width, (left + strip) * m)
                for r in range(min(rows * m, height - first)):
                    put_line(
                        putter, out, residual, image, first + r, left * m, right, stage, r, 0, code, slope, itemsize,
                    )  # fmt: skip
        report(doubts, arguments + _SPOILED_AT)
        give_back(scratch)
        return 1

    return CompiledKernel(convolve, ARGUMENTS, callees(lanes, itemsize))
