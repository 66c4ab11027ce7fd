"""The kernel of ``winograd``: transform some tiles, multiply, transform back, all while they are in cache.

A tile is n x n input pixels and m x m outputs, n = m + r - 1. Its transformed values are ``[n * n, tiles, C]``; for
each of the n * n frequencies they are multiplied with the transformed filters ``[C, block]`` by the register tile of
``implicit_gemm``, and the products ``[n * n, tiles, block]`` of one block of filters are transformed back before the
next block's are made.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import literally, types  # type: ignore[attr-defined]  # its stubs forgot one

from convdispatch.backends._epilogue import RELU, RELU6, activate
from convdispatch.backends._jit import array, integers, njit
from convdispatch.backends._tile import (
    add_doubts,
    add_to_all,
    clamp,
    gather,
    linear,
    load_apart,
    multiply_add,
    save_apart,
    store,
    zeros,
)
from convdispatch.backends._toomcook import transforms
from convdispatch.backends._vector import save, splat

transform_input = linear(lambda m, r: transforms(m, r).bt)
transform_output = linear(lambda m, r: transforms(m, r).at)


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
def _find_pixels(tile, x, shape, m, n, pads, dilations, itemsize, zero, pixels):  # type: ignore[no-untyped-def]
    """Fill the table with the addresses of a tile's n x n input pixels, of zeros where there is padding."""
    image, oh, ow = _place(tile, shape, m, dilations)
    for i in range(n):
        ih = oh - pads[0] + i * dilations[0]
        for j in range(n):
            iw = ow - pads[1] + j * dilations[1]
            inside = 0 <= ih < x[2] and 0 <= iw < x[3]
            pixels[i * n + j] = x[0] + ((image * x[2] + ih) * x[3] + iw) * x[4] * itemsize if inside else zero


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
def _enter(x, flat, shape, pads, dilations, zero, channels, first, count, values, m, r, n, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Transform tiles ``first`` on, of channels ``channels[0]`` on, into ``values [points, count, padded]``."""
    literally(m), literally(r), literally(n), literally(lanes), literally(itemsize)
    points, lane_bytes, padded = n * n, lanes * itemsize, values.shape[2]
    pixels, edge_table = np.empty(points, np.int64), np.empty(points, np.int64)
    edge, half = np.zeros((points, lanes), values.dtype), np.empty(points * lanes, values.dtype)
    for p in range(points):
        edge_table[p] = edge.ctypes.data + p * lane_bytes
    between = count * padded * itemsize
    for t in range(count):
        _find_pixels(first + t, x, shape, m, n, pads, dilations, itemsize, zero, pixels)
        for c in range(0, padded, lanes):
            table, offset = pixels.ctypes.data, (channels[0] + c) * itemsize
            if c + lanes > channels[1]:
                _copy_last_channels(pixels, flat, x[0], channels[0] + c, channels[1] - c, edge, itemsize)
                table, offset = edge_table.ctypes.data, 0
            for j in range(n):
                column = gather(table + j * 8, n * 8, offset, n, lanes, itemsize)
                save_apart(half.ctypes.data + j * lane_bytes, n * lane_bytes, transform_input(column, m, r))
            to = values.ctypes.data + (t * padded + c) * itemsize
            for i in range(n):
                line = load_apart(half.ctypes.data + i * n * lane_bytes, lane_bytes, n, lanes, itemsize)
                save_apart(to + i * n * between, between, transform_input(line, m, r))


@njit()
def _multiply(values, packed, group_c, products, rows, held, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Store ``values [points, count, padded] @ packed [points, group_c, block]`` in ``products``."""
    literally(rows), literally(held), literally(lanes), literally(itemsize)
    points, count, padded = values.shape
    step = products.shape[2] * itemsize
    table = np.empty((2, rows), np.int64)
    for first in range(0, count, rows):
        for row in range(rows):  # beyond the last tile, the last one again
            tile = min(first + row, count - 1)
            table[0, row] = values.ctypes.data + tile * padded * itemsize
            table[1, row] = products.ctypes.data + tile * step
        for point in range(points):
            sums = zeros(held, lanes, itemsize)
            weights, offset = packed + point * group_c * step, point * count * padded * itemsize
            for c in range(group_c):
                sums = multiply_add(sums, rows, table.ctypes.data, offset + c * itemsize, weights + c * step)
            store(sums, rows, table.ctypes.data + rows * 8, point * count * step)


@njit()
def _finish(sums, out, residual, bias, image, a, b, k0, count, code, slope):  # type: ignore[no-untyped-def]
    """Finish ``count`` values of one pixel one by one."""
    for lane in range(count):
        total = sums[lane]
        if bias.size:
            total += bias[lane]
        if residual.size:
            total += residual[image, a, b, k0 + lane]
        out[image, a, b, k0 + lane] = activate(total, code, slope)


@njit()
def _leave(products, first, out, residual, bias, k0, valid, dilations, code, slope, doubts, m, r, n, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Transform products back, finish them and store ``valid`` filters from ``k0`` on; return the doubts."""
    literally(m), literally(r), literally(n), literally(lanes), literally(itemsize)
    count, step, lane_bytes = products.shape[1], products.shape[2] * itemsize, lanes * itemsize
    half, done = np.empty(n * m * lanes, out.dtype), np.empty((m * m, lanes), out.dtype)
    for t in range(count):
        image, oh, ow = _place(first + t, out.shape, m, dilations)
        for k in range(0, valid, lanes):
            start = products.ctypes.data + t * step + k * itemsize
            for j in range(n):
                column = load_apart(start + j * count * step, n * count * step, n, lanes, itemsize)
                save_apart(half.ctypes.data + j * lane_bytes, n * lane_bytes, transform_output(column, m, r))
            for i in range(m):
                line = load_apart(half.ctypes.data + i * n * lane_bytes, lane_bytes, n, lanes, itemsize)
                sums = transform_output(line, m, r)
                doubts = add_doubts(doubts, sums)
                save_apart(done.ctypes.data + i * m * lane_bytes, lane_bytes, sums)
            for i in range(min(m, -(-(out.shape[1] - oh) // dilations[0]))):
                for j in range(min(m, -(-(out.shape[2] - ow) // dilations[1]))):
                    a, b = oh + i * dilations[0], ow + j * dilations[1]
                    if k + lanes <= valid and code <= RELU6:
                        value = load_apart(done.ctypes.data + (i * m + j) * lane_bytes, 0, 1, lanes, itemsize)
                        index = ((image * out.shape[1] + a) * out.shape[2] + b) * out.shape[3] + k0 + k
                        if bias.size:
                            value = add_to_all(value, 1, bias.ctypes.data + k * itemsize)
                        if residual.size:
                            value = add_to_all(value, 1, residual.ctypes.data + index * itemsize)
                        if code == RELU:
                            value = clamp(value, 0.0, math.inf)
                        elif code == RELU6:
                            value = clamp(value, 0.0, 6.0)
                        save_apart(out.ctypes.data + index * itemsize, 0, value)
                    else:
                        few = min(lanes, valid - k)
                        _finish(done[i * m + j], out, residual, bias[k:], image, a, b, k0 + k, few, code, slope)
    return doubts


@functools.cache
def compiled(m: int, r: int, rows: int, vectors: int, lanes: int, itemsize: int) -> Callable[..., Any]:
    """Return the kernel for F(m x m, r x r) with a register tile of rows x vectors."""
    n, held, block = m + r - 1, rows * vectors, vectors * lanes
    points, step = n * n, block * itemsize

    def convolve(x, u, bias, residual, out, zero, pads, dilations, groups, code, slope, part, scratch, spoiled):  # type: ignore[no-untyped-def]
        """Compute the tiles ``part[1:3]`` for the blocks of filters ``part[3:5]``; report to ``spoiled[part[0]]``.

        ``u`` is ``[groups, blocks of a group, points, C // groups, block]``, ``bias`` is padded like it;
        ``scratch`` holds the part's transformed tiles and products.
        """
        _, first, last, first_block, last_block = part
        group_c, group_k, per_group = x.shape[3] // groups, out.shape[3] // groups, u.shape[1]
        here = (x.ctypes.data, x.shape[0], x.shape[1], x.shape[2], x.shape[3])
        padded = -(-group_c // lanes) * lanes
        count = last - first
        values = scratch[: points * count * padded].reshape(points, count, padded)
        products = scratch[values.size : values.size + points * count * block].reshape(points, count, block)
        check = np.empty(lanes, x.dtype)
        save_apart(check.ctypes.data, 0, zeros(1, lanes, itemsize))
        doubts = splat(check.ctypes.data, lanes, itemsize)
        entered = -1
        for number in range(first_block, last_block):
            group, member = divmod(number, per_group)
            if group != entered:
                channels = (group * group_c, group_c)
                _enter(
                    here, x.reshape(x.size), out.shape, pads, dilations, zero.ctypes.data, channels, first,
                    count, values, m, r, n, lanes, itemsize,
                )  # fmt: skip
                entered = group
            packed = u.ctypes.data + number * points * group_c * step
            _multiply(values, packed, group_c, products, rows, held, lanes, itemsize)
            added = bias[number * block : (number + 1) * block] if bias.size else bias
            valid = min(block, group_k - member * block)
            doubts = _leave(
                products, first, out, residual, added, group * group_k + member * block, valid, dilations, code, slope,
                doubts, m, r, n, lanes, itemsize,
            )  # fmt: skip
        save(check.ctypes.data, doubts)
        for lane in range(lanes):
            if check[lane] != 0:
                spoiled[part[0]] = True

    dtype, number = f"float{8 * itemsize}", types.int64
    return njit(
        types.void(
            array(dtype, 4), array(dtype, 5), array(dtype, 1), array(dtype, 4), array(dtype, 4, writable=True),
            array(dtype, 1), integers(2), integers(2), number, number, types.float64, integers(5),
            array(dtype, 1, writable=True), array("bool", 1, writable=True),
        )
    )(convolve)  # fmt: skip
