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

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort, Numerics, item_bytes
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._memory import aligned, by_blocks, odd_lines
from convdispatch.backends._packed import PackedBackend
from convdispatch.backends._threads import split
from convdispatch.backends._tile import register_tiles
from convdispatch.backends._toomcook import amplification, roundings, strided
from convdispatch.backends._vector import vector_bytes
from convdispatch.backends._winograd import compiled
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine, current
from convdispatch.problem import Problem

#: Sides of output tiles by the filters' side and the stride.
SIZES = {(3, 1): (2, 4, 6), (5, 1): (2, 4), (3, 2): (2, 4), (5, 2): (2,)}
#: Scratch for the tiles of one job: about what a second-level cache holds. But never fewer than LEAST_TILES, or the
#: filters, read again for every job, would be most of the traffic.
BLOCK_BYTES = 768 << 10
LEAST_TILES = 24

# Rates of one core with 64-byte vectors; narrower ones are slower in proportion.
_FLOPS = 1.1e11  # of the products, float32
_TRANSFORM_VALUES = 1e10  # values of one-dimensional transforms a second
_PIXEL_SECONDS = 1.5e-9  # finding one pixel of a tile
_FILTER_BYTES = 1.6e10  # transformed filters on their way from far caches
_LAUNCH_SECONDS = 4e-6


def _tiles(problem: Problem, m: int) -> int:
    """Return the tiles of all images: those of each of the pictures that a dilation makes."""
    p = problem
    rows, columns = -(-p.oh // p.dilations[0]), -(-p.ow // p.dilations[1])
    return p.n * math.prod(p.dilations) * -(-rows // m) * -(-columns // m)


def _cut(problem: Problem, m: int, tile: tuple[int, int], blocks: int, threads: int) -> tuple[int, int, int]:
    """Return the tiles, into how many ranges they are cut, and into how many the blocks of filters."""
    p, tiles = problem, _tiles(problem, m)
    lanes = vector_bytes() // item_bytes(p.dtype)
    each = _side(p, m) ** 2 * (p.group_c + tile[1] * lanes) * item_bytes(p.dtype)
    most = max(LEAST_TILES, BLOCK_BYTES // each)
    most = max(tile[0], most - most % tile[0])
    down = -(-tiles // most)
    if tiles >= threads * LEAST_TILES // 2:
        down = min(tiles, -(-down // threads) * threads)
    return tiles, down, min(blocks, -(-threads // down))


def _parts(
    problem: Problem, m: int, tile: tuple[int, int], blocks: int, threads: int
) -> list[tuple[int, int, int, int]]:
    """Return the jobs: a range of tiles, and a range of blocks of filters."""
    tiles, down, across = _cut(problem, m, tile, blocks, threads)
    return [(*some, *block) for some in split(tiles, down) for block in split(blocks, across)]


def _scratch(problem: Problem, m: int, tile: tuple[int, int], count: int) -> int:
    """Return how many values the transformed tiles and products of a job of so many tiles are."""
    lanes = vector_bytes() // item_bytes(problem.dtype)
    padded, size = -(-problem.group_c // lanes) * lanes, item_bytes(problem.dtype)
    return _side(problem, m) ** 2 * (odd_lines(count * padded, size) + odd_lines(count * tile[1] * lanes, size))


@functools.cache
def _both_ways(m: int, r: int, stride: int) -> Array:
    """Return the matrix from the r * r values of a filter to its n * n transformed ones."""
    g = np.array(strided(m, r, stride).g, np.float64)
    return np.kron(g, g)


def _side(problem: Problem, m: int) -> int:
    """Return the side of a tile's input."""
    return problem.strides[0] * (m - 1) + problem.kh


def _growth(problem: Problem, config: Config) -> float:
    """Return the bound's factor: roundings along the way (in eps / 2), times what the transforms make of them."""
    m, r, stride = _size(problem, config), problem.kh, problem.strides[0]
    return (problem.group_c + roundings(m, r, stride)) / 2 * amplification(m, r, stride)


def _size(problem: Problem, config: Config) -> int:
    sizes = SIZES.get((problem.kh, problem.strides[0]), (2,))
    m = config.get("m", 4)
    if not isinstance(m, int) or isinstance(m, bool) or m not in sizes:
        known = " or ".join(f"m={size}" for size in sizes)
        raise ArgumentError(f"winograd's config needs {known}, the side of an output tile; got m={m!r}")
    return m


def _tile(problem: Problem) -> tuple[int, int]:
    """Return the register tile, rows x vectors: the widest that is not much wider than a group's filters."""
    lanes = vector_bytes() // item_bytes(problem.dtype)
    tiles = register_tiles()
    return next((t for t in tiles if t[1] * lanes <= max(lanes, problem.group_k)), min(tiles, key=lambda t: t[1]))


class Winograd(PackedBackend):
    """Minimal filtering, F(2x2) to F(6x6), for 3x3 and 5x5 filters of stride 1, any dilation, and of stride 2."""

    name = "winograd"
    version = 4
    numerics = Numerics("transform", growth=_growth)

    def rejects_plain(self, problem: Problem) -> str | None:
        """Return the first thing about the problem that the algorithm has no answer to."""
        kh, kw, strides = problem.kh, problem.kw, problem.strides
        checks = (
            (kh != kw or (kh, 1) not in SIZES, f"filters are {kh}x{kw}, not 3x3 or 5x5"),
            (
                strides[0] != strides[1] or (kh, strides[0]) not in SIZES,
                "strides other than 1 and 2 leave out the neighbours whose work is shared",
            ),
            (strides != (1, 1) and problem.dilations != (1, 1), "its tiles have a stride or a dilation, not both"),
            (problem.is_integer, "the transforms have fractions, and integer results are exact"),
            (problem.c == 0, "there are no input channels"),
            (problem.groups > 1 and problem.group_c == 1, "one channel a group leaves no matrices to multiply"),
        )
        return next((reason for bad, reason in checks if bad), None)

    def configs_plain(self, problem: Problem, effort: Effort) -> Sequence[Config]:  # noqa: ARG002
        """Return the tile sizes, first the one with the smallest estimate here."""
        here = current()
        sizes = (Config(m=m) for m in SIZES[problem.kh, problem.strides[0]])
        return sorted(sizes, key=lambda config: self.estimate_plain(problem, config, here))

    def step(self, problem: Problem, config: Config) -> int:
        """Return the rows of a tile."""
        return _size(problem, config)

    def workspace_plain(self, problem: Problem, config: Config) -> int:
        """Return the bytes of the transformed tiles and products of the jobs under way."""
        m, tile = _size(problem, config), _tile(problem)
        block = tile[1] * vector_bytes() // item_bytes(problem.dtype)
        blocks = problem.groups * -(-problem.group_k // block)
        tiles, down, across = _cut(problem, m, tile, blocks, config.threads)
        largest = _scratch(problem, m, tile, -(-tiles // down))
        return min(config.threads, down * across) * largest * item_bytes(problem.dtype)

    def estimate_plain(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return the seconds of the products, the transforms, and the filters' traffic."""
        p, m, tile, size = problem, _size(problem, config), _tile(problem), item_bytes(problem.dtype)
        n, width = _side(p, m), machine.vector_bytes / 64 * 4 / size
        block = tile[1] * machine.vector_bytes // size
        blocks = -(-p.group_k // block)
        tiles, down, across = _cut(p, m, tile, p.groups * blocks, config.threads)
        rows = 1.05 * tiles  # the passes share them out evenly
        padded = -(-p.group_c // (machine.vector_bytes // size)) * machine.vector_bytes // size
        products = 2 * rows * n * n * p.groups * p.group_c * blocks * block / (_FLOPS * width)
        values = tiles * p.groups * n * (2 * n * padded * across + (m + n) * blocks * block)
        pixels = tiles * p.groups * (n * n + m * m * blocks) * _PIXEL_SECONDS
        filters = down * n * n * p.group_c * p.groups * blocks * block * size
        work = products + values * (n + 1) / 2 / (_TRANSFORM_VALUES * width * 4) + pixels + filters / _FILTER_BYTES / 4
        used = min(config.threads, machine.cores, down * across)
        return work / (0.97 * used if used > 1 else 1) + 4e-6 + _LAUNCH_SECONDS * (used > 1)

    def prepare_plain(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Transform the filters in float64 and round them once."""
        p, m, tile = problem, _size(problem, config), _tile(problem)
        lanes = vector_bytes() // item_bytes(p.dtype)
        block = tile[1] * lanes
        u = _both_ways(m, p.kh, p.strides[0]) @ np.asarray(filters, np.float64).reshape(p.kh * p.kw, -1)
        by_group = u.astype(p.dtype).reshape(-1, p.group_c, p.groups, p.group_k).transpose(2, 0, 1, 3)
        packed = by_blocks(by_group, block)
        added = np.empty(0, p.dtype) if bias is None else by_blocks(bias.reshape(p.groups, p.group_k), block)
        parts = _parts(p, m, tile, packed.shape[0] * packed.shape[1], config.threads)
        values = {
            "filters": packed, "bias": added.reshape(-1), "zero": aligned((p.c + lanes,), p.dtype), "pads": p.pads[::2],
            "dilations": p.dilations, "groups": p.groups, "code": p.epilogue.code, "slope": p.epilogue.slope,
            "parts": np.array(parts, np.int64),
        }  # fmt: skip
        make = functools.partial(compiled, m, p.kh, p.strides[0], *tile, lanes, item_bytes(p.dtype))
        return PackedKernel(make, p, values, len(parts), config.threads)
