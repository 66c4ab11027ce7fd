"""``implicit_gemm``: the matrix product of ``im2col``, with a patch matrix that is never made.

A tile of outputs, some pixels times some vectors of filters, is summed in registers while the kernel walks over the
taps. What it reads of the input it finds through a table of addresses, one for each tap and pixel of the tile, in
which padding is the address of a row of zeros (Dukhan: The Indirect Convolution Algorithm, 2019); a tile whose windows
lie inside the image needs only its pixels' addresses. So every filter size, stride, dilation and padding is one
kernel, nothing is copied, and bias, residual and activation are applied before a sum leaves its register.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort, item_bytes
from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._atomics import add
from convdispatch.backends._epilogue import RELU, RELU6, activate
from convdispatch.backends._jit import hold, njit
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._memory import aligned, by_blocks
from convdispatch.backends._packed import PackedBackend
from convdispatch.backends._threads import split
from convdispatch.backends._tile import (
    add_some_to_each,
    add_to_all,
    add_to_each,
    clamp,
    multiply_add,
    register_tile,
    register_tiles,
    store,
    store_some,
    zeros,
)
from convdispatch.backends._vector import vector_bytes
from convdispatch.machine import Machine, current
from convdispatch.problem import Problem

#: Bytes of a job's input, and of its tables of addresses, that stay in a core's L2 cache.
_CACHED_INPUT = 384 << 10
_CACHED_TABLE = 96 << 10
#: Filters of up to so many bytes stay near enough to be taken in turns, by some tiles at a time: then lines of output
#: are stored whole, one behind the other, and not a piece for each block of filters.
_KEPT_FILTERS, _TILES_TOGETHER = 64 << 10, 16


@njit()
def _locate(place, x, size, out, zero, window, table):  # type: ignore[no-untyped-def]
    """Fill the table for the tile of pixels from ``place`` on: (image, row, column) of the output.

    The first row of the table is the outputs' addresses, the second the windows' (meaningful if all lie inside), the
    rest, filled if they do not, the address of each tap. Return whether all windows lie inside the image, and the place
    behind the tile.
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


@njit()
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


@njit()
def _finish(values, code, slope):  # type: ignore[no-untyped-def]
    """Apply to a tile what has no instruction, value by value."""
    for r in range(values.shape[0]):
        for k in range(values.shape[1]):
            values[r, k] = activate(values[r, k], code, slope)


#: ``filters`` is ``[groups, blocks of a group, KH, KW, C // groups, block]``, filled up with zeros, ``bias`` alike.
_ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(6), bias=array_of(1), residual=array_of(4), out=array_of(4), zero=array_of(1),
    window=integers_of(8), groups=INTEGER, together=INTEGER, code=INTEGER, slope=FLOAT,
    parts=array_of(2, "int64"),
)  # fmt: skip
unpack = _ARGUMENTS.unpack
_DONE_AT = 8 * _ARGUMENTS.done_at


@functools.cache
def _compiled(rows: int, vectors: int, lanes: int, itemsize: int) -> CompiledKernel:  # noqa: C901, PLR0915
    """Return the kernel of one tile."""
    block = vectors * lanes
    step = block * itemsize

    def convolve(arguments, job):  # type: ignore[no-untyped-def]  # noqa: C901, PLR0912, PLR0915
        """Compute the tiles of pixels ``part[0:2]`` for the blocks of filters ``part[2:4]``."""
        x, w, bias, residual, out, zero, window, groups, together, code, slope, parts = unpack(arguments, itemsize)
        first_tile, last_tile, first_block, last_block = parts[job]
        kh, kw, _, _, _, _, dh, dw = window
        channels, filters = x.shape[3], out.shape[3]
        group_c, group_k, per_group = channels // groups, filters // groups, w.shape[1]
        pixels = out.shape[0] * out.shape[1] * out.shape[2]
        here = (x.ctypes.data, x.shape[0], x.shape[1], x.shape[2], x.shape[3])
        there = (out.ctypes.data, out.shape[0], out.shape[1], out.shape[2], out.shape[3])
        residual_offset = residual.ctypes.data - out.ctypes.data
        flat = out.reshape(pixels, filters)
        tiles = last_tile - first_tile
        table, inside = np.empty((tiles, 2 + kh * kw, rows), np.int64), np.empty(tiles, np.bool_)
        image, rest = divmod(first_tile * rows, out.shape[1] * out.shape[2])
        place = (image, rest // out.shape[2], rest % out.shape[2])
        for t in range(tiles):
            inside[t], place = _locate(place, here, itemsize, there, zero.ctypes.data, window, table[t])
        # Taps of one row are one run through memory, if nothing lies between them.
        joined = dw == 1 and groups == 1
        segments, run = (kh, kw * group_c) if joined else (kh * kw, group_c)
        table_at, table_step = table.ctypes.data, (2 + kh * kw) * rows * 8
        blocks = last_block - first_block
        for turn in range(-(-tiles // together) * blocks):
            some, number = turn // blocks, first_block + turn % blocks
            group, member = divmod(number, per_group)
            k0, count = group * group_k + member * block, min(block, group_k - member * block)
            weights, behind = w.ctypes.data + number * kh * kw * group_c * step, group * group_c * itemsize
            for t in range(some * together, min((some + 1) * together, tiles)):
                outputs = table_at + t * table_step
                inputs, packed = outputs + rows * 8, weights
                sums = zeros(rows, vectors, lanes, itemsize)
                if bias.size:
                    sums = add_to_all(sums, rows, bias.ctypes.data + number * step)
                if inside[t]:
                    for s in range(segments):
                        gap = s * dh * here[3] if joined else s // kw * dh * here[3] + s % kw * dw
                        offset = behind + gap * channels * itemsize
                        for c in range(run):
                            sums = multiply_add(sums, rows, inputs, offset + c * itemsize, packed)
                            packed += step
                else:
                    for tap in range(kh * kw):
                        taps = inputs + (1 + tap) * rows * 8
                        for c in range(group_c):
                            sums = multiply_add(sums, rows, taps, behind + c * itemsize, packed)
                            packed += step
                if residual.size:
                    if count == block:
                        sums = add_to_each(sums, rows, outputs, residual_offset + k0 * itemsize)
                    else:
                        sums = add_some_to_each(sums, rows, outputs, residual_offset + k0 * itemsize, count)
                if code == RELU:
                    sums = clamp(sums, 0.0, math.inf)
                elif code == RELU6:
                    sums = clamp(sums, 0.0, 6.0)
                if count == block:
                    store(sums, rows, outputs, k0 * itemsize)
                else:
                    store_some(sums, rows, outputs, k0 * itemsize, count)
                if code > RELU6:
                    first = (first_tile + t) * rows
                    _finish(flat[first : min(first + rows, pixels), k0 : k0 + count], code, slope)
        hold(table)
        add(arguments + _DONE_AT, 1)

    return CompiledKernel(convolve, _ARGUMENTS)


def _cut(problem: Problem, rows: int, blocks: int, threads: int) -> tuple[int, int, int]:
    """Return the tiles, into how many ranges they are cut, and into how many the blocks of filters.

    A job takes one block of filters after another through its tiles, so that the block is in L1 and the tiles' input,
    read again for every block, in L2.
    """
    p, size = problem, item_bytes(problem.dtype)
    images = p.n * p.h * p.w * p.c * size
    tiles = -(-p.n * p.oh * p.ow // rows)
    most = max(1, min(_CACHED_INPUT // max(1, images // tiles), _CACHED_TABLE // ((2 + p.kh * p.kw) * rows * 8)))
    wanted = 1 if threads == 1 else 4 * threads
    down = -(-tiles // most)
    if down >= wanted or p.k * p.taps * size < images:  # cut the larger of input and filters
        down = max(down, wanted)
    down = min(tiles, -(-down // threads) * threads if down > 1 else 1)  # as many for each thread
    return tiles, down, min(blocks, -(-wanted // down))


def _parts(problem: Problem, rows: int, blocks: int, threads: int) -> list[tuple[int, int, int, int]]:
    """Return the jobs: ranges of tiles and of blocks of filters."""
    tiles, down, across = _cut(problem, rows, blocks, threads)
    return [(*tile, *block) for tile in split(tiles, down) for block in split(blocks, across)]


class ImplicitGemm(PackedBackend):
    """Tiles of outputs summed in registers, the input read where it lies; any filter, stride and padding."""

    name = "implicit_gemm"
    version = 4

    def rejects_plain(self, problem: Problem) -> str | None:
        """Return None, or that integers or filters are missing."""
        if problem.is_integer:
            return "its vectors hold floats, and integer results are exact"
        return None

    def configs_plain(self, problem: Problem, effort: Effort) -> Sequence[Config]:
        """Return tiles, the one with the smallest estimate first."""
        here = current()
        choices = [Config(rows=rows, vectors=vectors) for rows, vectors in _tiles(problem)]
        choices.sort(key=lambda config: self.estimate_plain(problem, config, here))
        return choices[: 4 if effort in {"estimate", "measure"} else None]

    def workspace_plain(self, problem: Problem, config: Config) -> int:
        """Return the bytes of each thread's table and tile."""
        rows, vectors = _tile(config)
        blocks = problem.groups * -(-problem.group_k * item_bytes(problem.dtype) // (vectors * vector_bytes()))
        tiles, down, across = _cut(problem, rows, blocks, config.threads)
        return min(config.threads, down * across) * -(-tiles // down) * (1 + rows * (2 + problem.kh * problem.kw) * 8)

    def estimate_plain(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return products, those with padding included, by what a tile loads for each; tables; filters' traffic."""
        p, (rows, vectors) = problem, _tile(config)
        block = vectors * machine.vector_bytes // item_bytes(p.dtype)
        blocks = p.groups * -(-p.group_k // block)
        tiles, down, across = _cut(p, rows, blocks, config.threads)
        peak = _PEAK_PER_BYTE * machine.vector_bytes * 4 / item_bytes(p.dtype)
        loads = 1 + 0.1 * (rows + vectors) / (rows * vectors)
        compute = 2 * tiles * rows * blocks * block * p.taps / peak * loads
        each = tiles * (blocks * 15e-9 + rows * (4e-9 + _border(p) * p.kh * p.kw * 2e-9))
        traffic = blocks * block * p.taps * item_bytes(p.dtype) / _FILTER_BYTES_PER_SECOND
        traffic *= down if blocks * block * p.taps * item_bytes(p.dtype) > 1 << 19 else 1
        used = min(config.threads, machine.cores, down * across)
        return (compute + each + traffic) / (0.98 * used if used > 1 else 1) + 4e-6 + _LAUNCH_SECONDS * (used > 1)

    def prepare_plain(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Pack the filters by blocks; compile for the tile if that has not been done."""
        p, tile = _flat(problem), _tile(config)
        lanes = vector_bytes() // item_bytes(p.dtype)
        block = tile[1] * lanes
        grouped = filters.reshape(p.kh, p.kw, p.group_c, p.groups, p.group_k)
        packed = by_blocks(grouped.transpose(3, 0, 1, 2, 4), block)
        added = np.empty(0, p.dtype) if bias is None else by_blocks(bias.reshape(p.groups, p.group_k), block)
        parts = _parts(p, tile[0], p.groups * packed.shape[1], config.threads)
        values = {
            "filters": packed, "bias": added.reshape(-1), "zero": aligned((p.c + lanes,), p.dtype),
            "window": (p.kh, p.kw, p.pads[0], p.pads[2], *p.strides, *p.dilations), "groups": p.groups,
            "together": _TILES_TOGETHER if packed.nbytes <= _KEPT_FILTERS else parts[-1][1],  # all of them
            "code": p.epilogue.code, "slope": p.epilogue.slope, "parts": np.array(parts, np.int64),
        }  # fmt: skip
        compiled = functools.partial(_compiled, *tile, lanes, item_bytes(p.dtype))
        return PackedKernel(compiled, p, values, len(parts), config.threads)


_PEAK_PER_BYTE = 1.8e9  # FLOP/s of one core for each byte of vector width
_FILTER_BYTES_PER_SECOND = 3e10
_LAUNCH_SECONDS = 4e-6


def _flat(problem: Problem) -> Problem:
    """Return the same problem with all pixels in one row, where that is the same: with 1x1 filters of stride 1."""
    p = problem
    if not p.is_pointwise or p.strides != (1, 1) or any(p.pads):
        return p
    return p.replace(n=1, h=1, w=p.n * p.h * p.w)


def _tiles(problem: Problem) -> list[tuple[int, int]]:
    """Return the tiles that are no wider than a group's filters, and at least one."""
    lanes = vector_bytes() // item_bytes(problem.dtype)
    all_of_them = register_tiles()
    least = min(vectors for _, vectors in all_of_them)
    wide = -(-problem.group_k // lanes)
    return [tile for tile in all_of_them if tile[1] <= max(least, wide)]


def _tile(config: Config) -> tuple[int, int]:
    return register_tile(config, "implicit_gemm", register_tiles())


def _border(problem: Problem) -> float:
    """Return about which part of the outputs has a window that reaches outside the image."""
    p = problem
    rows = min(1.0, (-(-p.pads[0] // p.strides[0]) + -(-p.pads[1] // p.strides[0])) / max(1, p.oh))
    columns = min(1.0, (-(-p.pads[2] // p.strides[1]) + -(-p.pads[3] // p.strides[1])) / max(1, p.ow))
    return 1 - (1 - rows) * (1 - columns)
