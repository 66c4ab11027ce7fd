"""``int8_dot``: int8 times int8 into int32 by VNNI, four products an instruction and lane, exact.

The instruction multiplies unsigned bytes with signed ones. So 128 is added to every input value, which flips its top
bit, and 128 times the sum of its taps is taken from every filter's result beforehand; both are exact in wrapping
32-bit sums. A thread copies the rows that some rows of output need, shifted like this, with their padding (128, which
stands for 0) and with channels filled up to fours; then a tile of output pixels times filters is summed in registers
as in ``implicit_gemm``, four channels a step.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VPDPBUSD.
"""

import functools
from collections.abc import Sequence

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Backend, Config, Effort
from convdispatch.backends import _dot, _rates
from convdispatch.backends._arguments import Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._dot import LANES, dot_add, start
from convdispatch.backends._jit import compilable
from convdispatch.backends._jobs import pieces, split
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._packing import by_blocks
from convdispatch.backends._tile import store
from convdispatch.backends._vector import hold
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine
from convdispatch.problem import Problem

_TILES = ((6, 4), (14, 2), (28, 1))
#: Bytes of the rows that a thread copies at a time.
_BAND_BYTES = 256 << 10
#: Operations a second of a core, about, by which work is cut.
_OPERATIONS = 5e11
#: Bytes of the rows that one row of output needs; with dilations these may be far apart.
_LARGEST_BAND = 256 << 20
_PRODUCTS_PER_SECOND = 2.7e11  # of one core
_LOAD, _TILE_SECONDS = 0.35, 2e-8  # of a load, in instructions of products; and what a tile takes besides
_COPIED_PER_SECOND = 4e9


@compilable
def _copy_shifted(image, first, top, left, rows):  # type: ignore[no-untyped-def]
    """Fill ``rows [count, width, channels]`` with the image's from ``first - top`` on, each value plus 128."""
    height, width, channels = image.shape
    for r in range(rows.shape[0]):
        ih = first - top + r
        rows[r, :, :] = 128
        if 0 <= ih < height:
            low, high = max(0, left), min(rows.shape[1], left + width)
            if rows.shape[2] == channels:
                flat = rows[r, low:high].reshape((high - low) * channels)
                source = image[ih, low - left : high - left].reshape((high - low) * channels)
                for i in range(flat.size):
                    flat[i] = np.uint8(source[i]) ^ np.uint8(128)
            else:
                for w in range(low, high):
                    for c in range(channels):
                        rows[r, w, c] = np.uint8(image[ih, w - left, c]) ^ np.uint8(128)


#: ``filters`` is ``[groups, blocks of a group, KH, KW, channels / 4, block]``, of four bytes each.
_ARGUMENTS = Arguments(
    input=array_of(4, "int8"), filters=array_of(6, "int32"), offsets=array_of(3, "int32"),
    residual=array_of(4, "int32"), out=array_of(4, "int32"), window=integers_of(8), padded=integers_of(2),
    jobs=array_of(2, "int64"),
)  # fmt: skip
unpack = _ARGUMENTS.unpack


@functools.cache
def _compiled(rows: int, vectors: int) -> CompiledKernel:
    """Return the kernel of one tile."""
    block = vectors * LANES
    step = block * 4

    def convolve(arguments, job):  # type: ignore[no-untyped-def]
        """Compute rows ``jobs[job, 1]`` to ``jobs[job, 2]`` of image ``jobs[job, 0]``."""
        x, w, offsets, _, out, window, padded, jobs = unpack(arguments, 4)
        image, first_row, last_row = jobs[job]
        kh, kw, top, left, sh, sw, dh, dw = window
        groups, per_group, _, _, fours, _ = w.shape
        columns, filters = out.shape[2], out.shape[3]
        group_k = filters // groups
        taken = (last_row - first_row - 1) * sh + (kh - 1) * dh + 1
        band = np.empty((taken, padded[0], padded[1]), np.uint8)
        _copy_shifted(x[image], first_row * sh, top, left, band)
        pixel, line = padded[1], padded[0] * padded[1]
        table = np.empty((2, rows), np.int64)
        scratch = np.empty((rows, block), np.int32)
        places, pixels = table.ctypes.data, (last_row - first_row) * columns
        # Taps of one row are one run through memory, if nothing lies between them.
        joined = dw == 1 and groups == 1
        segments, run = (kh, kw * fours) if joined else (kh * kw, fours)
        for first in range(0, pixels, rows):
            count = min(rows, pixels - first)
            for r in range(rows):
                oh, ow = divmod(first + min(r, count - 1), columns)
                table[0, r] = band.ctypes.data + oh * sh * line + ow * sw * pixel
                table[1, r] = out.ctypes.data + (((image * out.shape[1] + first_row + oh) * columns) + ow) * filters * 4
            for task in range(groups * per_group):
                group, member = divmod(task, per_group)
                packed = w.ctypes.data + task * kh * kw * fours * step
                sums = start(rows, vectors, offsets.ctypes.data + task * step)
                for s in range(segments):
                    gap = s * dh * line if joined else s // kw * dh * line + s % kw * dw * pixel
                    gap += group * fours * 4
                    for c in range(run):
                        sums = dot_add(sums, rows, places, gap + c * 4, packed)
                        packed += step
                k0 = group * group_k + member * block
                valid = min(block, group_k - member * block)
                if valid == block:
                    store(sums, rows, places + rows * 8, k0 * 4)
                else:
                    store(sums, rows, (np.int64(scratch.ctypes.data), step), 0)
                    for r in range(count):
                        oh, ow = divmod(first + r, columns)
                        for k in range(valid):
                            out[image, first_row + oh, ow, k0 + k] = scratch[r, k]
        hold(band)
        return 1

    return CompiledKernel(convolve, _ARGUMENTS)


class Int8Dot(Backend):
    """Sums of four products of bytes at a time, by VNNI instructions; int8 only, exact."""

    name = "int8_dot"
    parallel = True
    native_dtypes = Backend.native_dtypes | {"int8"}

    def rejects(self, problem: Problem) -> str | None:
        """Return None, or that the dtype, the processor or the groups do not suit."""
        p = problem
        if p.dtype != "int8":
            return "it multiplies int8 only"
        if not _dot.available():
            return "the processor has no AVX-512 VNNI"
        if p.groups > 1 and p.group_c % 4:
            return f"groups of {p.group_c} channels are no whole fours"
        width, channels = _padded(p)
        if (reach := ((p.kh - 1) * p.dilations[0] + 1) * width * channels) > _LARGEST_BAND:
            return f"it copies all rows that a filter spans, which take {reach} bytes here"
        return None

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Config]:  # noqa: ARG002  # they are few
        """Return tiles, the widest that is not much wider than a group's filters first."""
        wide = -(-problem.group_k // LANES)
        tiles = sorted(_TILES, key=lambda tile: (tile[1] > max(1, wide), -tile[1]))
        return [Config(rows=rows, vectors=vectors) for rows, vectors in tiles]

    def workspace(self, problem: Problem, config: Config) -> int:
        """Return the bytes of each thread's rows and tile."""
        rows, vectors = _tile(config)
        taken = (_band_rows(problem, config.threads) - 1) * problem.strides[0] + (problem.kh - 1) * problem.dilations[0]
        width, channels = _padded(problem)
        return config.threads * ((taken + 1) * width * channels + rows * (24 + vectors * LANES * 4))

    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return the time of products in whole tiles, and of copying the input."""
        p, (rows, vectors) = problem, _tile(config)
        width, channels = _padded(p)
        tiles = -(-p.n * p.oh * p.ow // rows)
        blocks = p.groups * -(-p.group_k // (vectors * LANES))
        products = tiles * rows * blocks * vectors * LANES * p.kh * p.kw * (channels // p.groups)
        loads = 1 + _LOAD * (rows + vectors) / (rows * vectors)
        seconds = products * loads / _PRODUCTS_PER_SECOND + p.n * p.h * width * channels / _COPIED_PER_SECOND
        used = min(config.threads, machine.cores)
        return _rates.shared(seconds + tiles * blocks * _TILE_SECONDS, used, efficiency=0.95, call=2e-6)

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:  # noqa: ARG002
        """Pack the filters by fours of channels and blocks, and sum up what shifting the input will add."""
        p, (rows, vectors) = problem, _tile(config)
        if reason := self.rejects(p):  # a kernel that goes by addresses must not be wrong about shapes
            raise ArgumentError(f"int8_dot cannot do {p}: {reason}")
        width, channels = _padded(p)
        fours, block = channels // p.groups // 4, vectors * LANES
        wide = np.zeros((p.groups, p.kh, p.kw, fours * 4, p.group_k), np.int8)
        grouped = filters.reshape(p.kh, p.kw, p.group_c, p.groups, p.group_k)
        wide[..., : p.group_c, :] = grouped.transpose(3, 0, 1, 2, 4)
        by_fours = wide.reshape(p.groups, p.kh, p.kw, fours, 4, p.group_k).swapaxes(-1, -2)
        words = np.ascontiguousarray(by_fours).view(np.int32)[..., 0]
        offsets = -128 * wide.sum(axis=(1, 2, 3), dtype=np.int32)
        values = {
            "filters": by_blocks(words, block), "offsets": by_blocks(offsets, block),
            "window": (p.kh, p.kw, p.pads[0], p.pads[2], *p.strides, *p.dilations), "padded": (width, channels),
        }  # fmt: skip
        height = _band_rows(p, config.threads)
        jobs = [(n, *part) for n in range(p.n) for part in split(p.oh, -(-p.oh // height))]
        values["jobs"] = np.array(jobs, np.int64)
        return PackedKernel(functools.partial(_compiled, rows, vectors), p, values, len(jobs), config.threads)


def _padded(problem: Problem) -> tuple[int, int]:
    """Return the width of a copied row, padding included, and its channels in fours."""
    p = problem
    width = max(p.pads[2] + p.w, (p.ow - 1) * p.strides[1] + (p.kw - 1) * p.dilations[1] + 1)
    return width, p.groups * -(-p.group_c // 4) * 4


def _band_rows(problem: Problem, threads: int) -> int:
    """Return the most rows of output that a job computes."""
    p = problem
    width, channels = _padded(p)
    fitting = (_BAND_BYTES // (width * channels) - (p.kh - 1) * p.dilations[0] - 1) // p.strides[0] + 1
    wanted = -(-p.n * p.oh // pieces(p.flops / _OPERATIONS, threads))
    return max(1, min(fitting, wanted))


def _tile(config: Config) -> tuple[int, int]:
    tile = config.integer("rows", _TILES[0][0]), config.integer("vectors", _TILES[0][1])
    if not (1 <= tile[0] <= 28 and 1 <= tile[1] <= 8 and tile[0] * tile[1] <= 28):
        choices = " or ".join(f"{rows}x{vectors}" for rows, vectors in _TILES)
        raise ArgumentError(
            f"config rows x vectors of int8_dot must be sums that fit in registers, such as {choices}; "
            f"got {tile[0]}x{tile[1]}"
        )
    return tile
