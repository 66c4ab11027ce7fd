"""``fast_fir``: large filters on images of few channels, by minimal filtering of the image's phases.

Every m-th row and column of an image make one of its m * m phases, and so with filters and outputs. Convolving is then
a small convolution of phases, F(m x m, m x m), whose products are convolutions themselves: each of a filter of
ceil(KH / m) x ceil(KW / m) values with an image of as many pixels as there are tiles of m x m outputs. There are
(2 m - 1) ** 2 of them where the definition takes m ** 4: with m = 4, 5.2 times fewer multiplications, with m = 3, 3.2
times. The transforms cost the same whatever the filter's size, so that large filters gain most.

Sources: Z.-J. Mou and P. Duhamel, "Short-Length FIR Filters and Their Use in Fast Nonrecursive Filtering", IEEE
Transactions on Signal Processing 39(6), 1991; for the matrices, ``_toomcook``. The kernel is in ``_fast_fir``.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort, Numerics, item_bytes
from convdispatch.backends import _rates
from convdispatch.backends._fast_fir import compiled, scratch_of
from convdispatch.backends._jobs import several, split
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._packed import PackedBackend
from convdispatch.backends._packing import by_phases, for_columns
from convdispatch.backends._register_tiles import register_tile
from convdispatch.backends._taps import by_chunks, taps_together
from convdispatch.backends._toomcook import amplification, roundings, transforms
from convdispatch.backends._vector import registers, vector_bytes
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine
from convdispatch.memory import aligned
from convdispatch.problem import Problem

#: Sides of output tiles; with 5 and more, rounding errors are too large for float32.
SIZES = (4, 3)
#: Tiles of a register tile, rows x vectors, by the number of vector registers.
_TILES = {32: ((8, 2), (4, 2)), 16: ((4, 2), (4, 1))}
_CHANNELS, _FILTERS = 16, 16
#: Below, transforms cost more than they save.
_SMALLEST_FILTER = 7
#: Bytes of a panel's transformed values, and of its results before they are interleaved.
_VALUES, _STAGE = 320 << 10, 64 << 10


def _size(config: Config) -> int:
    m = config.get("m", SIZES[0])
    if not isinstance(m, int) or isinstance(m, bool) or m not in SIZES:
        known = " or ".join(f"m={size}" for size in SIZES)
        raise ArgumentError(f"fast_fir's config needs {known}, the side of an output tile; got m={m!r}")
    return m


def _tile(config: Config) -> tuple[int, int]:
    return register_tile(config, "fast_fir", _TILES[registers()])


@dataclass(frozen=True)
class _Cut:
    """How a problem is cut into panels.

    Attributes:
        shape: rows of tiles of a panel, and register tiles along it.
        panels: how many there are.
        entered: tiles that are transformed, those that panels have in common more than once.
        filtered: tiles that are filtered and transformed back, those beyond the image included.
        scratch: bytes of a thread's scratch memory.
    """

    shape: tuple[int, int]
    panels: int
    entered: int
    filtered: int
    scratch: int


@functools.lru_cache(maxsize=1024)
def _cut(problem: Problem, m: int, tile: tuple[int, int], lanes: int) -> _Cut:
    """Return the cut with the fewest tiles transformed twice."""
    p, size, (rows, across) = problem, item_bytes(problem.dtype), (tile[0], tile[1] * lanes)
    a, b, points = -(-p.kh // m), -(-p.kw // m), (2 * m - 1) ** 2
    down, along = -(-p.oh // m), -(-p.ow // m)
    passes, runs = -(-down // rows), -(-along // across)
    choices = []
    for number in range(1, runs + 1):
        strip = -(-runs // number)
        wide = -(-(strip * across + b - 1) // lanes) * lanes
        fitting = _VALUES // (points * p.c * wide * size) - a + 1
        high = max(1, min(passes, fitting // rows))
        high = -(-passes // -(-passes // high))  # all panels alike
        overlap = wide / (strip * across) * (high * rows + a - 1) / (high * rows)
        if strip == 1 or (fitting >= rows and p.k * rows * strip * across * m * m * size <= _STAGE):
            choices.append((overlap, high, strip))
    _, high, strip = min(choices)
    blocks, strips = -(-passes // high), -(-runs // strip)
    wide = -(-(strip * across + b - 1) // lanes) * lanes
    reach = high * rows + a - 1, wide
    *_, values = scratch_of(p.c, p.k, reach, rows, strip * across, m, rows * across, lanes, size)
    lines = (p.c + 1) * m * (wide + lanes) + p.c * points * wide
    return _Cut(
        (high * rows, strip), p.n * blocks * strips, p.n * (passes * rows + blocks * (a - 1)) * strips * wide,
        p.n * passes * rows * runs * across, (values + lines) * size,
    )  # fmt: skip


def _growth(problem: Problem, config: Config) -> float:
    """Return the bound's factor: that of F(m x m, m x m), over sums of all the short filters' products.

    Every pixel is part of up to four tiles, so the tiles' norms together are at most twice the image's.
    """
    m = _size(config)
    terms = problem.group_c * -(-problem.kh // m) * -(-problem.kw // m)
    return (terms + 2 * roundings(m, m) + 1) * amplification(m, m) ** 2


class FastFir(PackedBackend):
    """Minimal filtering of an image's phases, for images of few channels and large filters, of stride 1."""

    name = "fast_fir"
    packing_cost = (1e-4, 5e-8)
    numerics = Numerics("transform", growth=_growth)

    def rejects_plain(self, problem: Problem) -> str | None:
        """Return the first thing about the problem that the algorithm has no answer to."""
        p = problem
        checks = (
            (
                p.c > _CHANNELS or p.k > _FILTERS,
                f"it is for up to {_CHANNELS} channels and {_FILTERS} filters; here are {p.c} and {p.k}",
            ),
            (p.c == 0, "there are no input channels"),
            (p.strides != (1, 1), "strides leave out the neighbours whose work is shared"),
            (p.dilations != (1, 1), "its phases have no dilation"),
            (
                min(p.kh, p.kw) < _SMALLEST_FILTER,
                f"filters of fewer than {_SMALLEST_FILTER} rows or columns gain nothing; here are {p.kh}x{p.kw}",
            ),
        )
        return next((reason for bad, reason in checks if bad), None)

    def configs_plain(self, problem: Problem, effort: Effort) -> Sequence[Config]:
        """Return sizes and register tiles, the one with the smallest estimate first."""
        choices = [Config(m=m, rows=rows, vectors=vectors) for m in SIZES for rows, vectors in _TILES[registers()]]
        return _rates.ranked(choices, functools.partial(self.estimate_plain, problem), effort, 2)

    def step(self, problem: Problem, config: Config) -> int:  # noqa: ARG002
        """Return the rows of a tile."""
        return _size(config)

    def workspace_plain(self, problem: Problem, config: Config) -> int:
        """Return the bytes of each thread's transformed values and results."""
        lanes = vector_bytes() // item_bytes(problem.dtype)
        cut = _cut(problem, _size(config), _tile(config), lanes)
        return min(config.threads, cut.panels) * cut.scratch

    def estimate_plain(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return the short filters' products by what is loaded for them; transforms; copies; memory."""
        p, m, tile, size = problem, _size(config), _tile(config), item_bytes(problem.dtype)
        lanes = machine.vector_bytes // size
        cut, n = _cut(p, m, tile, lanes), 2 * m - 1
        a, b = -(-p.kh // m), -(-p.kw // m)
        taps = taps_together(a)
        passes = cut.filtered / (tile[0] * tile[1] * lanes) * n * n * p.k
        # A vector of input that lies across two cache lines takes as long as two products.
        steps = max(tile[0] * a, 2 * (tile[0] + taps - 1) * -(-a // taps)) * tile[1] + 4
        products = passes * (p.group_c * b * steps + 2 * tile[0] * tile[1])
        entering = cut.entered * p.c * (m + n) * n * (n - 1) / lanes
        leaving = cut.filtered * p.k * (n + m) * m * n / lanes + cut.filtered * p.k * m * m * 4 / lanes
        operations = (products + _TRANSFORMS * (entering + leaving)) * lanes
        compute = 2 * operations / _rates.peak(machine, size)
        copies = (math.prod(p.input_shape) + math.prod(p.output_shape)) * _VALUE_SECONDS
        work = compute + copies + _rates.activation_seconds(p, machine) + _rates.moved_bytes(p) / _BYTES_PER_SECOND
        used = min(config.threads, machine.cores, cut.panels)
        return _rates.shared(work, used)

    def prepare_plain(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Transform the short filters in float64 and round them once."""
        p, m, tile, size = problem, _size(config), _tile(config), item_bytes(problem.dtype)
        lanes = vector_bytes() // size
        a, b = -(-p.kh // m), -(-p.kw // m)
        g = np.array(transforms(m, m).g, np.float64)
        halfway = np.einsum("qt,asbtck->asbqck", g, by_phases(filters, m))
        short = np.einsum("ps,asbqck->kpqcab", g, halfway)
        packed = aligned((p.k, (2 * m - 1) ** 2, p.group_c, a * b), p.dtype)
        packed[...] = by_chunks(short.reshape(p.k, -1, p.group_c, a, b), taps_together(a))
        added = for_columns(bias, p.dtype, lanes)
        cut = _cut(p, m, tile, lanes)
        jobs = split(cut.panels, several(config.threads))
        values = {
            "filters": packed, "bias": added, "pads": p.pads[::2], "short": (a, b), "shape": cut.shape,
            "code": p.epilogue.code, "slope": p.epilogue.slope, "jobs": np.array(jobs, np.int64),
        }  # fmt: skip
        make = functools.partial(compiled, m, *tile, taps_together(a), lanes, size)
        return PackedKernel(make, p, values, len(jobs), config.threads)


#: What the transforms' operations take, in products; and a value that is copied in or out.
_TRANSFORMS, _VALUE_SECONDS = 1.4, 2e-10
_BYTES_PER_SECOND = 4e10
