"""``winograd``: 3x3 and 5x5 filters by minimal filtering, F(m x m, r x r).

The output is cut into tiles of m x m pixels. A tile needs n x n input pixels, n = m + r - 1; these and the filters are
transformed so that convolving becomes n * n independent products of matrices ``[tiles, C] @ [C, K]``, whose results are
transformed back: n * n multiplications for m * m outputs where the definition takes r * r * m * m. For 3x3 filters
that is 2.25 times fewer with m = 2, 4 times with m = 4, 5.06 times with m = 6. A dilated problem is d * d interleaved
problems that are not. With stride 2 the even and the odd rows and columns of the input are filtered by the even and
the odd taps, each without a stride: with 3x3 filters and m = 4, 1.8 times fewer multiplications. Tiles are worked on
by the block, so that scratch memory does not grow with the image, and bias, residual and activation are applied before
a result is stored.

Source: A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015 (arXiv:1509.09308); the
matrices and their errors are in ``_toomcook``, the kernel is in ``_winograd``.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort, Numerics, item_bytes
from convdispatch.backends import _rates
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._memory import by_blocks, by_phases
from convdispatch.backends._packed import PackedBackend
from convdispatch.backends._threads import grid, too_many
from convdispatch.backends._tile import register_tiles
from convdispatch.backends._toomcook import amplification, roundings, strided
from convdispatch.backends._transforms import odd_lines
from convdispatch.backends._vector import vector_bytes
from convdispatch.backends._winograd import compiled, is_staged, stage_shape
from convdispatch.backends._winograd_filters import transformed
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine, current
from convdispatch.problem import Problem

#: Sides of output tiles by the filters' side and the stride.
SIZES = {(3, 1): (2, 4, 6), (5, 1): (2, 4), (3, 2): (2, 4), (5, 2): (2,)}
#: Folded: the side of tiles, the sides of filters that are left, and most channels of what is then a pixel.
_FOLDED_SIZE, _FOLDED_FILTERS, _FOLDED_CHANNELS = 4, (3, 4), 64
#: Scratch for the tiles of one job: about what a second-level cache holds. But never fewer than LEAST_TILES, or the
#: filters, read again for every job, would be most of the traffic.
BLOCK_BYTES = 768 << 10
LEAST_TILES = 24
#: Of a folded image, with few products a point, transforms are most of the work, and go faster nearer to L1.
_FOLDED_BYTES, _FOLDED_TILES = 192 << 10, 12

#: A dilation may make so many pictures, be there pixels for all of them or not.
_PICTURES = 1 << 10

# Rates of one core with 64-byte vectors; narrower ones are slower in proportion.
_FLOPS = 1.1e11  # of the products, float32
_TRANSFORM_VALUES = 1e10  # values of one-dimensional transforms a second
_PIXEL_SECONDS = 1.5e-9  # finding one pixel of a tile
_FILTER_BYTES, _FILTER_BYTES_FROM_MEMORY = 6.4e10, 2e10  # transformed filters on their way from far caches


@dataclass(frozen=True)
class _Form:
    """Which algorithm is used, and on what.

    Attributes:
        m: side of a tile of outputs.
        r: side of a filter.
        stride: of a tile's outputs among its inputs.
        fold: so many rows and columns of the image are one pixel of the algorithm; 1 where pixels are pixels.
        run: values of such a pixel that are neighbours in memory: the channels of ``fold`` columns.
    """

    m: int
    r: int
    stride: int
    fold: int
    run: int

    @property
    def n(self) -> int:
        """Side of a tile's input."""
        return self.stride * (self.m - 1) + self.r

    @property
    def depth(self) -> int:
        """Values of a pixel, over which products are summed."""
        return self.fold * self.run

    def padded(self, lanes: int) -> int:
        """Return the values of a pixel in scratch memory: each run fills up vectors."""
        return self.fold * -(-self.run // lanes) * lanes


def _folds(problem: Problem) -> bool:
    """Return whether the image may be folded: pixels become channels, and the stride 1."""
    p, stride = problem, problem.strides[0]
    return (
        p.groups == 1 and stride > 1 and p.strides == (stride, stride) and p.dilations == (1, 1) and p.kh == p.kw
        and -(-p.kh // stride) in _FOLDED_FILTERS and stride * stride * p.c <= _FOLDED_CHANNELS
    )  # fmt: skip


def _form(problem: Problem, config: Config) -> _Form:
    p, stride = problem, problem.strides[0]
    sizes = SIZES.get((p.kh, stride), ())
    known = [(size, False) for size in sizes] + [(_FOLDED_SIZE, True)] * _folds(p)
    m, folded = config.get("m", 4 if 4 in sizes or not sizes else sizes[0]), config.get("folded", not sizes)
    if not isinstance(m, int) or not isinstance(folded, bool) or (m, folded) not in known:
        wanted = " or ".join(f"m={size}" + ", folded=True" * fold for size, fold in known)
        given = f"m={m!r}, folded={folded!r}" if "folded" in config else f"m={m!r}"
        raise ArgumentError(f"winograd's config needs {wanted}, the side of an output tile; got {given}")
    if folded:
        return _Form(m, -(-p.kh // stride), 1, stride, stride * p.c)
    return _Form(m, p.kh, stride, 1, p.group_c)


def _tiles(problem: Problem, m: int) -> int:
    """Return the tiles of all images: those of each of the pictures that a dilation makes."""
    p = problem
    rows, columns = -(-p.oh // p.dilations[0]), -(-p.ow // p.dilations[1])
    return p.n * math.prod(p.dilations) * -(-rows // m) * -(-columns // m)


@functools.lru_cache(maxsize=4096)
def _cut(problem: Problem, form: _Form, tile: tuple[int, int], blocks: int, threads: int) -> tuple[int, int, int]:
    """Return the tiles, into how many ranges they are cut, and into how many the blocks of filters."""
    p, tiles = problem, _tiles(problem, form.m)
    lanes = vector_bytes() // item_bytes(p.dtype)
    each = form.n**2 * (form.depth + tile[1] * lanes) * item_bytes(p.dtype)
    room, least = (_FOLDED_BYTES, _FOLDED_TILES) if form.fold > 1 else (BLOCK_BYTES, LEAST_TILES)
    most = max(least, room // each)
    most = max(tile[0], most - most % tile[0])
    down = -(-tiles // most)
    if tiles >= threads * least // 2:
        down = min(tiles, -(-down // threads) * threads)
    return tiles, down, min(blocks, -(-threads // down))


def _scratch(problem: Problem, form: _Form, tile: tuple[int, int], count: int) -> int:
    """Return how many values a job of so many tiles keeps: the transformed tiles, the products and what is copied."""
    p, size = problem, item_bytes(problem.dtype)
    lanes = vector_bytes() // size
    entered, left = count * form.padded(lanes), count * tile[1] * lanes
    copied = form.n**2 * form.padded(lanes) // form.fold + tile[0] * max(form.padded(lanes), tile[1] * lanes)
    copied += (form.n**2 + 2 * form.m) * lanes
    stage: tuple[int, int] = stage_shape(
        count, (p.oh, p.ow), is_staged(p.groups, p.dilations), form.m, form.stride, form.n
    )
    a_point: int = odd_lines(entered, size) + odd_lines(left, size)
    return form.n**2 * a_point + copied + math.prod(stage) * p.group_c


@functools.cache
def _matrix(m: int, r: int, stride: int) -> Array:
    """Return the matrix that transforms the rows and columns of a filter."""
    return np.array(strided(m, r, stride).g, np.float64)


def _growth(problem: Problem, config: Config) -> float:
    """Return the bound's factor: roundings along the way (in eps / 2), times what the transforms make of them."""
    form = _form(problem, config)
    kind = form.m, form.r, form.stride
    return (form.depth + roundings(*kind)) / 2 * amplification(*kind)


@functools.lru_cache(maxsize=4096)
def _tile(problem: Problem) -> tuple[int, int]:
    """Return the register tile, rows x vectors: the widest that is not much wider than a group's filters."""
    lanes = vector_bytes() // item_bytes(problem.dtype)
    tiles = register_tiles()
    return next((t for t in tiles if t[1] * lanes <= max(lanes, problem.group_k)), min(tiles, key=lambda t: t[1]))


class Winograd(PackedBackend):
    """Minimal filtering, F(2x2) to F(6x6), for 3x3 and 5x5 filters of stride 1, any dilation, and of stride 2."""

    name = "winograd"
    version = 9
    packing_cost = (5e-5, 3e-9)
    numerics = Numerics("transform", growth=_growth)

    def rejects_plain(self, problem: Problem) -> str | None:
        """Return the first thing about the problem that the algorithm has no answer to."""
        kh, kw, strides, folds = problem.kh, problem.kw, problem.strides, _folds(problem)
        checks = (
            (kh != kw or not (folds or (kh, 1) in SIZES), f"filters are {kh}x{kw}, not 3x3 or 5x5"),
            (
                strides[0] != strides[1] or not (folds or (kh, strides[0]) in SIZES),
                "strides other than 1 and 2 leave out the neighbours whose work is shared",
            ),
            (strides != (1, 1) and problem.dilations != (1, 1), "its tiles have a stride or a dilation, not both"),
            (
                math.prod(problem.dilations) > max(_PICTURES, problem.oh * problem.ow),
                "dilated so far, it would be pictures without pixels, most of them",
            ),
            (problem.is_integer, "the transforms have fractions, and integer results are exact"),
            (problem.c == 0, "there are no input channels"),
            (problem.groups > 1 and problem.group_c == 1, "one channel a group leaves no matrices to multiply"),
        )
        pixels = problem.n * problem.oh * problem.ow
        return next((reason for bad, reason in checks if bad), None) or too_many(pixels)

    def configs_plain(self, problem: Problem, effort: Effort) -> Sequence[Config]:  # noqa: ARG002
        """Return the tile sizes, first the one with the smallest estimate here."""
        here = current()
        choices = [Config(m=m) for m in SIZES.get((problem.kh, problem.strides[0]), ())]
        choices += [Config(m=_FOLDED_SIZE, folded=True)] * _folds(problem)
        return sorted(choices, key=lambda config: self.estimate_plain(problem, config, here))

    def step(self, problem: Problem, config: Config) -> int:
        """Return the rows of a tile."""
        return _form(problem, config).m

    def workspace_plain(self, problem: Problem, config: Config) -> int:
        """Return the bytes of the transformed tiles and products of the jobs under way."""
        form, tile = _form(problem, config), _tile(problem)
        block = tile[1] * vector_bytes() // item_bytes(problem.dtype)
        blocks = problem.groups * -(-problem.group_k // block)
        tiles, down, across = _cut(problem, form, tile, blocks, config.threads)
        largest = _scratch(problem, form, tile, -(-tiles // down))
        return min(config.threads, down * across) * largest * item_bytes(problem.dtype)

    def estimate_plain(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return the seconds of the products, the transforms, and the filters' traffic."""
        p, form, tile, size = problem, _form(problem, config), _tile(problem), item_bytes(problem.dtype)
        n, m, width = form.n, form.m, machine.vector_bytes / 64 * 4 / size
        block = tile[1] * machine.vector_bytes // size
        blocks = -(-p.group_k // block)
        tiles, down, across = _cut(p, form, tile, p.groups * blocks, config.threads)
        rows = 1.05 * tiles  # the passes share them out evenly
        products = 2 * rows * n * n * p.groups * form.depth * blocks * block / (_FLOPS * width)
        entered = form.padded(machine.vector_bytes // size)
        values = tiles * p.groups * n * (2 * n * entered * across + (m + n) * blocks * block)
        pixels = tiles * p.groups * (n * n * form.fold + m * m * blocks) * _PIXEL_SECONDS
        filters = n * n * form.depth * p.groups * blocks * block * size
        fetched = down * filters / (_FILTER_BYTES if filters <= machine.caches[2] else _FILTER_BYTES_FROM_MEMORY)
        work = products + values * (n + 1) / 2 / (_TRANSFORM_VALUES * width * 4) + pixels + fetched
        used = min(config.threads, machine.cores, down * across)
        return _rates.shared(work, used)

    def prepare_plain(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Transform the filters in float64 and round them once."""
        p, form, tile = problem, _form(problem, config), _tile(problem)
        lanes = vector_bytes() // item_bytes(p.dtype)
        block = tile[1] * lanes
        if form.fold > 1:
            by_pixels = by_phases(filters, form.fold).transpose(0, 2, 1, 3, 4, 5)
            filters = by_pixels.reshape(form.r, form.r, form.depth, p.k).astype(p.dtype)
        packed = transformed(filters, _matrix(form.m, form.r, form.stride), p.groups, block, config.threads)
        added = np.empty(0, p.dtype) if bias is None else by_blocks(bias.reshape(p.groups, p.group_k), block)
        blocks = packed.shape[0] * packed.shape[1]
        tiles, down, across = _cut(p, form, tile, blocks, config.threads)
        parts = grid((tiles, down), (blocks, across))
        values = {
            "filters": packed, "bias": added.reshape(-1), "pads": p.pads[::2],
            "dilations": p.dilations, "groups": p.groups, "code": p.epilogue.code, "slope": p.epilogue.slope,
            "parts": parts,
        }  # fmt: skip
        algorithm = form.m, form.r, form.stride, form.fold, int(is_staged(p.groups, p.dilations))
        make = functools.partial(compiled, *algorithm, *tile, lanes, item_bytes(p.dtype))
        return PackedKernel(make, p, values, len(parts), config.threads)
