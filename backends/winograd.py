"""Winograd: 3x3 filters by the minimal algorithms F(2x2, 3x3) and F(4x4, 3x3).

The output is cut into tiles of m x m pixels. A tile needs n x n input pixels, n = m + 2; these and the filters are
transformed so that convolving becomes n*n independent products of matrices ``[tiles, C] @ [C, K]``, whose results
are transformed back: n*n multiplications for m*m outputs where the definition takes 9*m*m, that is 2.25 (m = 2) and
4 (m = 4) times fewer. Tiles are worked on by the block, so that scratch memory does not grow with the image.

Source: A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015 (arXiv:1509.09308); the
matrices and their errors are in ``_toomcook``.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Backend, Config, Effort, Kernel, Numerics, item_bytes
from convdispatch.backends._jit import array, njit
from convdispatch.backends._threads import one_blas_thread, run_all, split
from convdispatch.backends._toomcook import amplification, roundings, transforms
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine, current
from convdispatch.problem import Problem

TAPS = 3
SIZES = (4, 2)
#: Scratch for one block's tiles: what a second-level cache holds about. But never fewer than BLOCK_TILES, or the
#: filters, read again for every block, would be most of the traffic.
BLOCK_BYTES = 2 << 20
BLOCK_TILES = 32
#: Tiles a thread from which on threads work apart, on blocks of their own.
LANE_TILES = 20

# Rates of one core, measured on a Zen 4 server core with 64-byte vectors; narrower ones scale the first and third.
GEMM_FLOPS = 115e9  # float32
FILTER_BYTES = 9e9  # transformed filters on their way from far caches through BLAS's packing
TRANSFORM_BYTES = 35e9  # stored by the transforms' vector loops
IMAGE_BYTES = 5e9  # input and output
SCRATCH_BYTES = 8e9  # fresh memory, touched for the first time
LOOP_SECONDS = 40e-9  # entering one vector loop
GEMM_SECONDS = 0.5e-6  # entering one call of BLAS
STEP_SECONDS = 10e-6  # Python's part in one step of a block
WAKE_SECONDS = 50e-6  # handing one step to other threads
GAIN_APART = 0.9  # what each further thread adds on blocks of its own
GAIN_TOGETHER = 0.6  # and on one block with the others, waiting for them after every step


@njit()
def blend(target: Any, weights: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> None:
    """Store the weighted sum of four or six vectors, as many as there are weights, in ``target``."""
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    if len(weights) == 4:
        for i in range(len(target)):
            target[i] = w0 * a[i] + w1 * b[i] + (w2 * c[i] + w3 * d[i])
        return
    w4, w5 = weights[4], weights[5]
    for i in range(len(target)):
        target[i] = w0 * a[i] + w1 * b[i] + (w2 * c[i] + w3 * d[i]) + (w4 * e[i] + w5 * f[i])


@njit()
def gather(tile: Any, image: Any, top: int, left: int) -> None:
    """Copy what lies under a tile ``[n, n, C]`` out of an image ``[H, W, C]``; zeros where nothing does."""
    n = tile.shape[0]
    rows = max(0, -top), min(n, image.shape[0] - top)
    columns = max(0, -left), min(n, image.shape[1] - left)
    if rows[1] - rows[0] < n or columns[1] - columns[0] < n:
        tile[:] = 0
    for i in range(rows[0], rows[1]):
        if columns[0] < columns[1]:
            source = image[top + i][left + columns[0] : left + columns[1]].reshape(-1)
            target = tile[i][columns[0] : columns[1]].reshape(-1)
            for c in range(len(target)):
                target[c] = source[c]


def transform_input(x: Any, bt: Any, scratch: Any, v: Any, tiles: Any, first: int, grid: Any, corner: Any) -> None:
    """Store ``B^T d B`` of some tiles of a block.

    Args:
        x: ``[N, H, W, C]``.
        bt: B^T, ``[n, n]``.
        scratch: ``[2, n, n, C]``.
        v: ``[n, T, n, C]``: row, tile, column and channel of the transformed tiles.
        tiles: the first of these tiles, counted within the block, and the one after the last.
        first: number of the block's first tile, counted by image, row and column.
        grid: tiles in a column and in a row of an image.
        corner: rows and columns of padding before the image.
    """
    n, (down, across) = len(v), grid
    m, last, tile, half = n - 2, n - 1, scratch[0], scratch[1]
    rows, halves = tile.reshape(n, -1), half.reshape(n, -1)
    for t in range(tiles[0], tiles[1]):
        image, place = divmod(first + t, across * down)
        gather(tile, x[image], place // across * m - corner[0], place % across * m - corner[1])
        for i in range(n):
            blend(halves[i], bt[i], rows[0], rows[1], rows[2], rows[3], rows[last - 1], rows[last])
        for i in range(n):
            d = half[i]
            for j in range(n):
                blend(v[i, t, j], bt[j], d[0], d[1], d[2], d[3], d[last - 1], d[last])


def transform_output(p: Any, at: Any, scratch: Any, y: Any, tiles: Any, first: int, grid: Any) -> None:
    """Store ``A^T p A`` of some tiles of a block, as much of it as lies inside the output.

    Args:
        p: ``[n, T, n, K]``: row, tile, column and filter of the summed products.
        at: A^T, ``[m, n]``.
        scratch: ``[n, K]``.
        y: ``[N, OH, OW, K]``, written to.
        tiles: as in ``transform_input``.
        first: as there.
        grid: as there.
    """
    n, (down, across) = len(p), grid
    m, last, d = n - 2, n - 1, scratch
    rows, half = p.reshape(n, p.shape[1], -1), scratch.reshape(-1)
    for t in range(tiles[0], tiles[1]):
        image, place = divmod(first + t, across * down)
        top, left = place // across * m, place % across * m
        for i in range(min(m, y.shape[1] - top)):
            blend(half, at[i], rows[0, t], rows[1, t], rows[2, t], rows[3, t], rows[last - 1, t], rows[last, t])
            for j in range(min(m, y.shape[2] - left)):
                blend(y[image, top + i, left + j], at[j], d[0], d[1], d[2], d[3], d[last - 1], d[last])


@functools.cache
def compiled(dtype: str) -> tuple[Any, Any]:
    """Return both transforms compiled for a dtype, the same machine code for read-only and writable inputs."""
    types: Any = numba.types  # annotated in part only
    whole, pair = types.intp, types.UniTuple(types.intp, 2)
    real, target = partial(array, dtype), partial(array, dtype, writable=True)
    into = njit((real(4), real(2), target(4), target(4), pair, whole, pair, pair))
    back = njit((real(4), real(2), target(2), target(4), pair, whole, pair))
    return into(transform_input), back(transform_output)


def multiply(v: Array, u: Array, p: Array, rows: slice) -> None:
    """Store the products of transformed tiles and filters for some rows of the transform, by BLAS.

    Args:
        v: ``[n, T, n, C]``.
        u: ``[n, n, G, C / G, K / G]``.
        p: ``[n, T, n, K]``, written to.
        rows: which of the n rows.
    """
    groups = u.shape[2]
    left, right = (a[rows].reshape(-1, *a.shape[1:3], groups, a.shape[3] // groups) for a in (v, p))
    np.matmul(left.transpose(0, 2, 3, 1, 4), u[rows], out=right.transpose(0, 2, 3, 1, 4))


@functools.cache
def matrices(m: int, dtype: str) -> tuple[Array, Array]:
    """Return A^T and B^T of F(m, 3)."""
    at, _, bt = transforms(m, TAPS).arrays(dtype)
    return at, bt


@dataclass(frozen=True)
class Blocks:
    """How a problem is cut.

    Attributes:
        grid: tiles in a column and in a row of an image.
        total: tiles in all.
        block: tiles in a block, but for the last one.
        lanes: blocks under way at once, a thread each; one block that all threads share where there are few tiles.
    """

    grid: tuple[int, int]
    total: int
    block: int
    lanes: int

    @classmethod
    def of(cls, problem: Problem, m: int, threads: int) -> "Blocks":
        """Cut a problem into blocks of about equal size."""
        down, across = -(-problem.oh // m), -(-problem.ow // m)
        total = max(1, problem.n * down * across)
        lanes = threads if total >= threads * LANE_TILES else 1
        tile = (m + 2) ** 2 * (problem.c + problem.k) * item_bytes(problem.dtype)
        most = max(BLOCK_TILES, BLOCK_BYTES // lanes // max(1, tile))
        rounds = -(-total // (most * lanes)) * lanes
        return cls((down, across), total, -(-total // rounds), lanes)

    def of_lane(self, lane: int) -> Iterator[tuple[int, int]]:
        """Yield the first tile and the number of tiles of every block of one lane."""
        for first in range(lane * self.block, self.total, self.lanes * self.block):
            yield first, min(self.block, self.total - first)


@dataclass(frozen=True, eq=False)
class WinogradKernel:
    """Transformed filters ``[n, n, G, C / G, K / G]`` and what else a call needs."""

    problem: Problem
    m: int
    threads: int
    filters: Array

    def __call__(self, input: Array, out: Array, residual: Array | None) -> None:  # noqa: ARG002
        """Convolve block by block, a thread to a lane of blocks or all threads to one block."""
        blocks = Blocks.of(self.problem, self.m, self.threads)
        compiled(self.problem.dtype)  # by this thread alone
        with one_blas_thread():
            run_all([partial(self._lane, input, out, blocks, i) for i in range(blocks.lanes)], blocks.lanes)

    def _lane(self, x: Array, y: Array, blocks: Blocks, lane: int) -> None:
        """Work through one lane's blocks, in scratch memory of its own."""
        problem, n, threads = self.problem, self.m + 2, self.threads // blocks.lanes
        values = np.empty(n * n * blocks.block * problem.c, problem.dtype)
        products = np.empty(n * n * blocks.block * problem.k, problem.dtype)
        tiles = np.empty((threads, 2, n, n, problem.c), problem.dtype)
        halves = np.empty((threads, n, problem.k), problem.dtype)
        for first, count in blocks.of_lane(lane):
            v = values[: n * n * count * problem.c].reshape(n, count, n, -1)
            p = products[: n * n * count * problem.k].reshape(n, count, n, -1)
            self._block(x, y, v, p, tiles, halves, first, blocks.grid)

    def _block(
        self, x: Array, y: Array, v: Array, p: Array, tiles: Array, halves: Array, first: int, grid: tuple[int, int]
    ) -> None:
        """Take one block through the three steps, each spread over as many threads as have scratch memory."""
        (at, bt), (into, back) = matrices(self.m, self.problem.dtype), compiled(self.problem.dtype)
        corner, threads = self.problem.pads[::2], len(tiles)
        parts, rows = list(enumerate(split(v.shape[1], threads))), split(len(v), threads)
        run_all([partial(into, x, bt, tiles[i], v, part, first, grid, corner) for i, part in parts], threads)
        run_all([partial(multiply, v, self.filters, p, slice(*part)) for part in rows], threads)
        run_all([partial(back, p, at, halves[i], y, part, first, grid) for i, part in parts], threads)


def _growth(problem: Problem, config: Config) -> float:
    """Return the bound's factor: roundings along the way (in eps / 2), times what the transforms make of them."""
    m = _size(config)
    return (problem.group_c + roundings(m, TAPS)) / 2 * amplification(m, TAPS)


def _size(config: Config) -> int:
    m = config.get("m", SIZES[0])
    if not isinstance(m, int) or isinstance(m, bool) or m not in SIZES:
        raise ArgumentError(f"winograd's config needs m=2 or m=4, the side of an output tile; got m={m!r}")
    return m


class Winograd(Backend):
    """F(2x2, 3x3) and F(4x4, 3x3) for 3x3 filters of unit stride, any padding, groups included."""

    name = "winograd"
    numerics = Numerics("transform", growth=_growth)
    parallel = True

    def rejects(self, problem: Problem) -> str | None:
        """Return the first thing about the problem that the algorithm has no answer to."""
        checks = (
            ((problem.kh, problem.kw) != (TAPS, TAPS), f"filters are {problem.kh}x{problem.kw}, not 3x3"),
            (problem.strides != (1, 1), "strides other than 1 leave out the neighbours whose work is shared"),
            (problem.dilations != (1, 1), "dilated filters are not done"),
            (problem.is_integer, "the transforms have fractions, and integer results are exact"),
            (problem.c == 0, "there are no input channels"),
            (problem.groups > 1 and problem.group_c == 1, "one channel a group leaves no matrices to multiply"),
        )
        return next((reason for bad, reason in checks if bad), None)

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Config]:  # noqa: ARG002
        """Return both tile sizes, first the one with the smaller estimate here."""
        here = current()
        return sorted((Config(m=m) for m in SIZES), key=lambda config: self.estimate(problem, config, here))

    def workspace(self, problem: Problem, config: Config) -> int:
        """Return the bytes of one block's transformed tiles and products, and of each thread's tiles."""
        m = _size(config)
        n, blocks = m + 2, Blocks.of(problem, m, config.threads)
        block_items = blocks.lanes * n * n * blocks.block * (problem.c + problem.k)
        thread_items = config.threads * (2 * n * n * problem.c + n * problem.k)
        return (block_items + thread_items) * item_bytes(problem.dtype)

    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return the seconds of the three steps, by the rates at the top of this file."""
        m, size = _size(config), item_bytes(problem.dtype)
        n, blocks = m + 2, Blocks.of(problem, m, config.threads)
        rounds = -(-blocks.total // blocks.block)
        width = machine.vector_bytes / 64
        loops = 3 * n + n * n + m * (m + 1)
        stored = 3 * n * n * problem.c + (m * n + m * m) * problem.k
        tiles = blocks.total * (loops * LOOP_SECONDS + stored * size / (TRANSFORM_BYTES * width))
        products = n * n * problem.group_c * problem.k
        compute = 2 * blocks.total * products * size / 4 / (GEMM_FLOPS * width)
        filters = rounds * products * size / FILTER_BYTES
        calls = rounds * n * n * problem.groups * GEMM_SECONDS
        image = (math.prod(problem.input_shape) + math.prod(problem.output_shape)) * size / IMAGE_BYTES
        work = tiles + math.hypot(compute, filters) + calls + image
        threads = min(config.threads, machine.cores)
        gain = GAIN_APART if blocks.lanes > 1 else GAIN_TOGETHER
        wakes = 0 if threads == 1 else 1 if blocks.lanes > 1 else 3 * rounds
        steps = 3 * rounds * STEP_SECONDS + wakes * WAKE_SECONDS
        return steps + self.workspace(problem, config) / SCRATCH_BYTES + work / (1 + gain * (threads - 1))

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:  # noqa: ARG002
        """Transform the filters in float64 and round them once."""
        m = _size(config)
        g = np.array(transforms(m, TAPS).g, np.float64)
        split = np.asarray(filters, np.float64).reshape(TAPS, TAPS, problem.group_c, problem.groups, -1)
        u = np.einsum("ip,pqcgk,jq->ijgck", g, split, g, optimize=True)
        packed = np.ascontiguousarray(u, dtype=problem.dtype)
        return WinogradKernel(problem, m, config.threads, packed)
