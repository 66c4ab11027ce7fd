"""The kernel of ``winograd``: transform some tiles, multiply, transform back, all while they are in cache.

A tile is n x n input pixels and m x m outputs, n = stride * (m - 1) + r. A folded pixel is fold x fold of the image's.
The transformed values are ``[n * n, tiles, C]``, C being the values of a pixel. For each of the n * n points they are
multiplied with the transformed filters ``[C, block]`` by the register tiles of ``implicit_gemm``, and the products
``[n * n, tiles, block]`` of one block of filters are transformed back before the next block's are made.
"""

import functools
import math

import numpy as np
from numba import literally  # type: ignore[attr-defined]  # its stubs forgot one

from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._atomics import add
from convdispatch.backends._epilogue import RELU, RELU6, activate
from convdispatch.backends._jit import hold, njit
from convdispatch.backends._tile import (
    add_doubts,
    add_to_all,
    add_to_each,
    clamp,
    gather,
    load_apart,
    multiply_add,
    save_apart,
    store,
    zeros,
)
from convdispatch.backends._transforms import leave_columns, odd_lines_apart, report, transform_input, transform_output
from convdispatch.backends._vector import prefetch


@njit()
def _place(tile, shape, m, dilations):  # type: ignore[no-untyped-def]
    """Return a tile's image, first output row and first output column; ``shape`` is the output's.

    With dilation d, every d-th row and column is a picture of its own: tiles are of one of the d * d pictures.
    """
    rows, columns = -(-shape[1] // dilations[0]), -(-shape[2] // dilations[1])
    down, across = -(-rows // m), -(-columns // m)
    image, rest = divmod(tile, dilations[0] * dilations[1] * down * across)
    phase, rest = divmod(rest, down * across)
    i, j = divmod(rest, across)
    return image, phase // dilations[1] + i * m * dilations[0], phase % dilations[1] + j * m * dilations[1]


@njit()
def _find_pixels(tile, x, shape, m, n, stride, pads, dilations, itemsize, zero, pixels):  # type: ignore[no-untyped-def]
    """Fill the table with the addresses of a tile's n x n input pixels, of zeros where there is padding."""
    image, oh, ow = _place(tile, shape, m, dilations)
    top, left = oh * stride - pads[0], ow * stride - pads[1]
    step = (dilations[0] * x[3] * x[4] * itemsize, dilations[1] * x[4] * itemsize)
    line = x[0] + ((image * x[2] + top) * x[3] + left) * x[4] * itemsize
    bottom, right = top + (n - 1) * dilations[0], left + (n - 1) * dilations[1]
    if top >= 0 and left >= 0 and bottom < x[2] and right < x[3]:
        for i in range(n):
            for j in range(n):
                pixels[i * n + j] = line + j * step[1]
            line += step[0]
        return
    for i in range(n):
        ih = top + i * dilations[0]
        for j in range(n):
            iw = left + j * dilations[1]
            inside = 0 <= ih < x[2] and 0 <= iw < x[3]
            pixels[i * n + j] = line + j * step[1] if inside else zero
        line += step[0]


@njit()
def _copy_last_channels(pixels, x, start, first, count, edge, itemsize):  # type: ignore[no-untyped-def]
    """Copy what is less than a vector of channels to scratch memory, filled up with zeros.

    ``x`` is the flat input that begins at address ``start``; addresses outside of it are of zeros.
    """
    for p in range(pixels.size):
        index = (pixels[p] - start) // itemsize + first
        for lane in range(count):
            edge[p, lane] = x[index + lane] if 0 <= pixels[p] - start < x.size * itemsize else 0


@njit()
def _transform(pixels, offset, half, to, between, m, r, stride, n, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Transform one vector of channels of a tile, whose n x n pixels are in a table, to points ``between`` apart."""
    literally(m), literally(r), literally(stride), literally(n), literally(lanes), literally(itemsize)
    lane_bytes = lanes * itemsize
    for j in range(n):
        column = gather(pixels + j * 8, n * 8, offset, n, lanes, itemsize)
        save_apart(half + j * lane_bytes, n * lane_bytes, transform_input(column, m, r, stride))
    for i in range(n):
        line = load_apart(half + i * n * lane_bytes, lane_bytes, n, lanes, itemsize)
        save_apart(to + i * n * between, between, transform_input(line, m, r, stride))


@njit()
def _enter(x, flat, shape, pads, dilations, zero, channels, first, count, values, m, r, stride, n, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Transform tiles ``first`` on, of channels ``channels[0]`` on, into ``values [points, count * padded]``."""
    literally(m), literally(r), literally(stride), literally(n), literally(lanes), literally(itemsize)
    points, padded = n * n, -(-channels[1] // lanes) * lanes
    pixels, edge_table = np.empty(points, np.int64), np.empty(points, np.int64)
    edge, half = np.zeros((points, lanes), values.dtype), np.empty(points * lanes, values.dtype)
    for p in range(points):
        edge_table[p] = edge.ctypes.data + p * lanes * itemsize
    between = values.shape[1] * itemsize
    for t in range(count):
        _find_pixels(first + t, x, shape, m, n, stride, pads, dilations, itemsize, zero, pixels)
        for c in range(0, padded, lanes):
            table, offset = pixels.ctypes.data, (channels[0] + c) * itemsize
            if c + lanes > channels[1]:
                _copy_last_channels(pixels, flat, x[0], channels[0] + c, channels[1] - c, edge, itemsize)
                table, offset = edge_table.ctypes.data, 0
            to = values.ctypes.data + (t * padded + c) * itemsize
            _transform(table, offset, half.ctypes.data, to, between, m, r, stride, n, lanes, itemsize)
    hold(edge), hold(edge_table)


@njit()
def _find_folded(tile, row, x, flat, shape, m, n, fold, pads, edge, pixels):  # type: ignore[no-untyped-def]
    """Fill the table with the addresses of row ``row`` of a tile's n x n folded pixels.

    Such a row is as many values as ``fold`` pixels have, neighbours in the image; what is not, or lies too near its end
    to be read by whole vectors, is copied to ``edge``.
    """
    image, oh, ow = _place(tile, shape, m, (1, 1))
    run, room, size = fold * x[4], edge.shape[1], flat.itemsize
    top, left = oh * fold - pads[0] + row, ow * fold - pads[1]
    start = ((image * x[2] + top) * x[3] + left) * x[4]
    step, last = fold * x[3] * x[4], start + (n - 1) * (fold * x[3] * x[4] + run)
    if top >= 0 and left >= 0 and top + (n - 1) * fold < x[2] and left + n * fold <= x[3] and last + room <= flat.size:
        for i in range(n):
            for j in range(n):
                pixels[i * n + j] = x[0] + (start + i * step + j * run) * size
        return
    for i in range(n):
        ih = top + i * fold
        for j in range(n):
            iw, p, index = left + j * fold, i * n + j, start + i * step + j * run
            if 0 <= ih < x[2] and 0 <= iw <= x[3] - fold and index + room <= flat.size:
                pixels[p] = x[0] + index * size
                continue
            low, high = max(0, -iw) * x[4], min(fold, x[3] - iw) * x[4]
            for v in range(run):
                edge[p, v] = flat[index + v] if 0 <= ih < x[2] and low <= v < high else 0
            pixels[p] = edge.ctypes.data + p * room * size


@njit()
def _enter_folded(  # type: ignore[no-untyped-def]
    x, flat, shape, pads, first, count, values, m, r, n, fold, lanes, itemsize
):
    """Do as ``_enter`` does with folded pixels; each of their ``fold`` rows fills up vectors."""
    literally(m), literally(r), literally(n), literally(lanes), literally(itemsize)
    points, room = n * n, -(-fold * x[4] // lanes) * lanes
    pixels, edge = np.empty(points, np.int64), np.zeros((points, room), values.dtype)
    half, between = np.empty(points * lanes, values.dtype), values.shape[1] * itemsize
    for t in range(count):
        for row in range(fold):
            _find_folded(first + t, row, x, flat, shape, m, n, fold, pads, edge, pixels)
            for c in range(0, room, lanes):
                to = values.ctypes.data + ((t * fold + row) * room + c) * itemsize
                start, offset = pixels.ctypes.data, c * itemsize
                _transform(start, offset, half.ctypes.data, to, between, m, r, 1, n, lanes, itemsize)
    hold(edge)


@njit()
def _pass(inputs, weights, runs, start, outputs, rows, vectors, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Store the products of ``rows`` tiles at one point, whose values and products lie as ``_tile`` tells.

    Of each tile, ``runs[0]`` times ``runs[1]`` values count; each run fills up vectors. ``start`` is the address of
    what the sums begin with, or 0. The next point's filters, which follow, are on their way meanwhile: where filters
    come from far caches, that makes up to a third of the time.
    """
    literally(rows), literally(vectors), literally(lanes), literally(itemsize)
    sums, room = zeros(rows, vectors, lanes, itemsize), -(-runs[1] // lanes) * lanes
    step = vectors * lanes * itemsize
    point_bytes = runs[0] * runs[1] * step
    if start:
        sums = add_to_all(sums, rows, start)
    for run in range(runs[0]):
        for c in range(runs[1]):
            sums = multiply_add(sums, rows, inputs, (run * room + c) * itemsize, weights)
            prefetch(weights + point_bytes)
            weights += step
    store(sums, rows, outputs, 0)


@njit()
def _multiply(  # type: ignore[no-untyped-def]
    values, count, packed, runs, bias, one, products, rows, less, least, vectors, lanes, itemsize
):
    """Store ``values [points, count * padded] @ packed [points, values of a pixel, block]``.

    A pixel is ``runs[0]`` times ``runs[1]`` values. The tiles are shared out evenly among passes of at most ``rows``,
    each by the register tile that wastes least: what that is too long is products of the next tiles, or of what lies
    behind the last. What is added at the point ``one`` is added to every output of a tile
    when it is transformed back, since powers of 1 are 1: the bias, of which this is the address, or 0.
    """
    literally(rows), literally(less), literally(least), literally(vectors), literally(lanes), literally(itemsize)
    points, step = values.shape[0], vectors * lanes * itemsize
    padded = runs[0] * -(-runs[1] // lanes) * lanes
    passes = -(-count // rows)
    for point in range(points):  # the filters of a point come from a far cache once, and stay for the other passes
        weights, start = packed + point * runs[0] * runs[1] * step, bias if point == one else 0
        entered = np.int64(values.ctypes.data) + point * values.shape[1] * itemsize
        left = np.int64(products.ctypes.data) + point * products.shape[1] * itemsize
        for number in range(passes):
            first = number * count // passes
            now = (number + 1) * count // passes - first
            x, y = (entered + first * padded * itemsize, padded * itemsize), (left + first * step, step)
            if now > less:
                _pass(x, weights, runs, start, y, rows, vectors, lanes, itemsize)
            elif now > least:
                _pass(x, weights, runs, start, y, less, vectors, lanes, itemsize)
            else:
                _pass(x, weights, runs, start, y, least, vectors, lanes, itemsize)


@njit()
def _finish(sums, out, residual, image, a, b, k0, count, code, slope):  # type: ignore[no-untyped-def]
    """Finish ``count`` values of one pixel one by one."""
    for lane in range(count):
        total = sums[lane]
        if residual.size:
            total += residual[image, a, b, k0 + lane]
        out[image, a, b, k0 + lane] = activate(total, code, slope)


@njit()
def _find_outputs(where, out, residual, m, dilations, nowhere, table):  # type: ignore[no-untyped-def]
    """Fill ``table[0]`` with the addresses of a tile's m x m outputs, ``table[1]`` with those of their residuals.

    ``where`` is the tile's image, first row and first column. What lies outside the image is ``nowhere``.
    """
    image, oh, ow = where
    for i in range(m):
        a = oh + i * dilations[0]
        for j in range(m):
            b, p = ow + j * dilations[1], i * m + j
            inside = a < out.shape[1] and b < out.shape[2]
            behind = ((image * out.shape[1] + a) * out.shape[2] + b) * out.shape[3] * out.itemsize
            table[0, p] = out.ctypes.data + behind if inside else nowhere
            table[1, p] = residual.ctypes.data + behind if inside else nowhere


@njit()
def _leave(  # type: ignore[no-untyped-def]
    products, first, count, step, out, residual, k0, valid, dilations, code, slope, doubts,
    m, r, stride, n, lanes, itemsize,
):  # fmt: skip
    """Transform products back, finish them and store ``valid`` filters from ``k0`` on; return the doubts."""
    literally(m), literally(r), literally(stride), literally(n), literally(lanes), literally(itemsize)
    lane_bytes, between, room = lanes * itemsize, products.shape[1] * itemsize, -(-valid // lanes) * lanes
    half, done = np.empty(n * m * lanes, out.dtype), np.empty((m, lanes), out.dtype)
    table, nowhere = np.empty((2, m * m), np.int64), np.zeros(out.shape[3] + lanes, out.dtype)
    outputs, residuals = table[0].ctypes.data, table[1].ctypes.data
    for t in range(count):
        image, oh, ow = _place(first + t, out.shape, m, dilations)
        _find_outputs((image, oh, ow), out, residual, m, dilations, nowhere.ctypes.data, table)
        down = min(m, -(-(out.shape[1] - oh) // dilations[0]))
        across = min(m, -(-(out.shape[2] - ow) // dilations[1]))
        for k in range(0, room, lanes):
            start = products.ctypes.data + t * step + k * itemsize
            leave_columns(start, between, half.ctypes.data, m, r, stride, n, lanes, itemsize)
            for i in range(down):
                line = load_apart(half.ctypes.data + i * n * lane_bytes, lane_bytes, n, lanes, itemsize)
                sums = transform_output(line, m, r, stride)
                doubts = add_doubts(doubts, sums)
                if k + lanes <= valid and code <= RELU6:
                    offset = (k0 + k) * itemsize
                    if residual.size:
                        sums = add_to_each(sums, m, residuals + i * m * 8, offset)
                    if code == RELU:
                        sums = clamp(sums, 0.0, math.inf)
                    elif code == RELU6:
                        sums = clamp(sums, 0.0, 6.0)
                    store(sums, m, outputs + i * m * 8, offset)
                else:
                    save_apart(done.ctypes.data, lane_bytes, sums)
                    few, a = min(lanes, valid - k), oh + i * dilations[0]
                    for j in range(across):
                        b = ow + j * dilations[1]
                        _finish(done[j], out, residual, image, a, b, k0 + k, few, code, slope)
    hold(half), hold(nowhere), hold(table)
    return doubts


#: ``filters`` is ``[groups, blocks of a group, points, values of a pixel, block]``, its ends zeros; so is ``bias``.
ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(5), bias=array_of(1), residual=array_of(4), out=array_of(4), zero=array_of(1),
    pads=integers_of(2), dilations=integers_of(2), groups=INTEGER, code=INTEGER, slope=FLOAT,
    parts=array_of(2, "int64"), spoiled=INTEGER,
)  # fmt: skip
unpack = ARGUMENTS.unpack
_SPOILED_AT, _DONE_AT = 8 * ARGUMENTS.at["spoiled"], 8 * ARGUMENTS.done_at


@functools.cache
def compiled(
    m: int, r: int, stride: int, fold: int, rows: int, vectors: int, lanes: int, itemsize: int
) -> CompiledKernel:
    """Return the kernel for F(m x m, r x r) with register tiles of up to rows x vectors."""
    n, block = stride * (m - 1) + r, vectors * lanes
    points, step = n * n, block * itemsize
    less, least = rows - 1, max(1, rows - 2)

    def convolve(arguments, number):  # type: ignore[no-untyped-def]
        """Compute the tiles ``part[0:2]`` for the blocks of filters ``part[2:4]``."""
        x, u, bias, residual, out, zero, pads, dilations, groups, code, slope, parts, _ = unpack(arguments, itemsize)
        first, last, first_block, last_block = parts[number]
        group_k, per_group = out.shape[3] // groups, u.shape[1]
        group_c = x.shape[3] // groups
        runs = (fold, fold * group_c)
        here = (x.ctypes.data, x.shape[0], x.shape[1], x.shape[2], x.shape[3])
        padded = fold * -(-runs[1] // lanes) * lanes
        count = last - first
        entering, leaving = odd_lines_apart(count * padded, itemsize), odd_lines_apart(count * block, itemsize)
        beyond = least * max(padded, block)  # a register tile may be longer than what is left
        scratch = np.empty(points * (entering + leaving) + beyond + lanes, x.dtype)
        start = (-scratch.ctypes.data // itemsize) % lanes  # or every vector lies across two cache lines
        middle = start + points * entering  # what is written beyond the products must be behind all
        values = scratch[start:middle].reshape(points, entering)
        products = scratch[middle : middle + points * leaving].reshape(points, leaving)
        doubts = zeros(1, 1, lanes, itemsize)[0]
        entered = -1
        for task in range(first_block, last_block):
            group, member = divmod(task, per_group)
            if group != entered:
                channels = (group * group_c, group_c)
                flat = x.reshape(x.size)
                if fold > 1:
                    _enter_folded(here, flat, out.shape, pads, first, count, values, m, r, n, fold, lanes, itemsize)
                else:
                    _enter(
                        here, flat, out.shape, pads, dilations, zero.ctypes.data, channels, first, count, values,
                        m, r, stride, n, lanes, itemsize,
                    )  # fmt: skip
                entered = group
            packed = u.ctypes.data + task * points * runs[0] * runs[1] * step
            added = bias.ctypes.data + task * step if bias.size else 0
            _multiply(
                values, count, packed, runs, added, n + 1, products, rows, less, least, vectors, lanes, itemsize
            )  # fmt: skip
            valid = min(block, group_k - member * block)
            doubts = _leave(
                products, first, count, step, out, residual, group * group_k + member * block, valid, dilations,
                code, slope, doubts, m, r, stride, n, lanes, itemsize,
            )  # fmt: skip
        report(doubts, lanes, x, arguments + _SPOILED_AT)
        add(arguments + _DONE_AT, 1)

    return CompiledKernel(convolve, ARGUMENTS)
