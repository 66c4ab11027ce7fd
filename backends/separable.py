"""``separable``: filters that are a column times a row, in two passes.

A filter of KH x KW values takes KH + KW products a pixel for KH * KW. A thread takes some rows of output at a time:
first sums down the filter's column, of all columns of the image that these rows need, into scratch memory that stays
in its caches; then sums along the filter's row of those. Both passes are ``image_rows``' walk through tiles of
neighbouring columns: vectors of input shifted by their unaligned addresses, sums in registers.

The image has one channel, and is read where it lies. Several channels under the same filter are one: in NCHW they are
as many images; in NHWC they are one image with as many times the columns, whose filter is dilated by their number.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Backend, Config, Effort, item_bytes
from convdispatch.backends import _rates
from convdispatch.backends._caches import should_stream
from convdispatch.backends._jobs import several, split
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._packing import for_columns
from convdispatch.backends._panels import Panels, panels_of
from convdispatch.backends._planes import WOVEN
from convdispatch.backends._register_tiles import register_tile
from convdispatch.backends._separable import AlongTile, compiled
from convdispatch.backends._taps import taps_together
from convdispatch.backends._vector import registers, vector_bytes
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine
from convdispatch.memory import CACHE_LINE, aligned
from convdispatch.problem import Problem
from convdispatch.separation import factors, unsuited

#: Tiles of the pass down, rows x vectors, by the number of vector registers: sums, a row of input and some taps fit.
_TILES = {32: ((8, 2), (12, 1), (4, 4)), 16: ((4, 2), (8, 1), (4, 1))}
#: Vectors of a tile of the pass along whose vectors are shared, likewise; the most that suit the width are taken.
_RUNS = {32: (16, 8), 16: (8,)}
#: Bytes of a vector that taps share. Of unaligned vectors of 64 bytes nearly all lie across two cache lines, which
#: takes as long as two; of those of 32 bytes half do.
_SHARED_BYTES = 32
#: Most taps that share vectors, so that they stay in registers.
_MOST_TAPS = 9
#: Bytes of the results of the pass down, unless a filter reaches over so much of a row that they must be more.
_MIDDLE = 256 << 10


@functools.lru_cache(maxsize=1024)
def _one_channel(problem: Problem) -> Problem:
    """Return the problem with several channels taken for images, or for columns; as NHWC."""
    p, c = problem.replace(data_format="NHWC"), problem.c
    if c == 1:
        return p
    if problem.data_format == "NCHW":
        return p.replace(n=p.n * c, c=1, k=1, groups=1, separable=True)
    top, bottom, left, right = p.pads
    pads, dilations = (top, bottom, left * c, right * c), (p.dilations[0], p.dilations[1] * c)
    return p.replace(w=p.w * c, c=1, k=1, groups=1, pads=pads, dilations=dilations, separable=True)


@functools.lru_cache(maxsize=1024)
def _by_results(problem: Problem) -> Problem:
    """Return the problem of one channel whose images are the results that lie apart in memory."""
    p = _one_channel(problem)
    return p.replace(n=p.n * p.k, k=1, separable=True) if problem.data_format == "NCHW" else p


@dataclass(frozen=True)
class _Along:
    """How the pass along goes.

    Where taps share vectors, those of a tile are as far apart as the filter is dilated. Then taps that are as many
    apart as a vector has lanes meet the same vectors, and are taken together. Other tiles fill the gaps between.

    Attributes:
        tile: what is summed in registers.
        spacing: how many tiles lie between each other, vector by vector.
        turns: in how many a filter's values are taken.
    """

    tile: AlongTile
    spacing: int
    turns: int

    @property
    def block(self) -> int:
        """Columns of such tiles together."""
        tile = self.tile
        return (tile.count if tile.taps > 1 else tile.vectors) * tile.lanes * self.spacing

    def ordered(self, rows: Array) -> Array:
        """Return filters' rows ``[K, KW]`` in the order in which they are taken."""
        return np.concatenate([rows[:, turn :: self.turns] for turn in range(self.turns)], axis=1)


def _along(problem: Problem, tile: tuple[int, int], vector_bytes: int, registers: int) -> _Along:
    """Return how the pass along of a problem ``_by_results`` goes, after one down by this tile."""
    p, size, dilation = problem, item_bytes(problem.dtype), problem.dilations[1]
    rows, vectors = tile
    lanes, across = min(vector_bytes, _SHARED_BYTES) // size, vectors * vector_bytes // size
    taps = -(-p.kw // lanes)
    # Vectors that lie apart do not fill lines of memory one after another, as those do that go past the caches.
    near = dilation == 1 or not _should_stream(p, CACHE_LINE // size)
    if near and p.kw >= 1.5 * lanes and taps <= _MOST_TAPS:
        for count in _RUNS[registers]:
            if across <= count * lanes * dilation <= p.ow:  # both passes' tiles are to fit
                shared = AlongTile(count=count, vectors=1, lanes=lanes, taps=taps)
                return _Along(shared, spacing=dilation, turns=lanes)
    alone = AlongTile(count=rows, vectors=vectors, lanes=vector_bytes // size, taps=1)
    return _Along(alone, spacing=1, turns=p.kw)


def _should_stream(problem: Problem, values: int) -> bool:
    """Return whether results go past the caches, so many at a time."""
    return should_stream(problem, values, problem.ow * problem.k)


def _panels(problem: Problem, rows: int, along: _Along) -> Panels:
    """Return how a problem ``_by_results`` is cut."""
    around = problem.extent[1] - 1
    widest = max(around, _MIDDLE // (rows * item_bytes(problem.dtype)) - around) // along.block + 1
    return panels_of(problem, rows, along.block, in_place=True, woven=problem.k > 1, widest=widest)


class Separable(Backend):
    """Two passes, for filters that are a column times a row."""

    name = "separable"
    parallel = True
    fuses_epilogue = True
    packing_cost = (6e-5, 1e-8)
    formats = frozenset(("NHWC", "NCHW"))

    def rejects(self, problem: Problem) -> str | None:
        """Return None, or what stands against two passes."""
        if reason := unsuited(problem):
            return reason
        if not problem.separable:
            return "filters must be a column times a row each, as they show, or as 'separable' in a problem's text says"
        return None

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Config]:
        """Return tiles, the one with the smallest estimate first."""
        choices = [Config(rows=rows, vectors=vectors) for rows, vectors in _TILES[registers()]]
        return _rates.ranked(choices, functools.partial(self.estimate, problem), effort, 2)

    def workspace(self, problem: Problem, config: Config) -> int:
        """Return the bytes of each thread's results of the pass down, staged ones, and copy of the border's rows."""
        p, tile, size = _by_results(problem), _tile(config), item_bytes(problem.dtype)
        panels = _panels(p, tile[0], _along(p, tile, vector_bytes(), registers()))
        reach, staged = panels.width + p.extent[1] - 1, p.k * panels.width * panels.staged
        return config.threads * ((2 * tile[0] + p.kh - 1) * reach + tile[0] * staged) * size

    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return products of whole tiles, vectors loaded across cache lines, weaving; memory."""
        p, (rows, vectors), size = _by_results(problem), _tile(config), item_bytes(problem.dtype)
        along = _along(p, (rows, vectors), machine.vector_bytes, registers())
        panels, across = _panels(p, rows, along), vectors * machine.vector_bytes // size
        phases = min(p.dilations[0], p.oh)
        lines = p.n * p.k * phases * -(-p.oh // (phases * rows)) * rows
        # The pass down is one of more columns. In that along, many vectors lie across two cache lines.
        wide = -(-p.ow // along.block) * along.block
        first = wide + (p.extent[1] - 1) * -(-wide // (panels.shape[1] * along.block)) + across
        shared = along.tile.taps > 1
        loads = _LOAD_ALONG * (along.turns * (1 + along.tile.taps / along.tile.count) if shared else p.kw)
        products = lines * (first * (p.kh + _PASS) + wide * (max(p.kw, loads) + _PASS))
        compute = products * 2 / _rates.peak(machine, size)
        if panels.staged:
            compute += math.prod(p.output_shape) * (_WOVEN_SECONDS if p.k <= WOVEN else _SCATTERED_SECONDS)
        compute += _rates.activation_seconds(p, machine)
        moved = _rates.moved_bytes(p) / _BYTES_PER_SECOND
        return _rates.shared(compute + moved, min(config.threads, machine.cores, panels.total))

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Take the filters apart; compile for the tile and the filters' height if that has not been done.

        Raises:
            ArgumentError: if filters are not separable.
        """
        if (pair := factors(problem, filters)) is None:
            raise ArgumentError(f"filters of {problem} must be a column times a row, as it says; these are not")
        p, by_results, tile = _one_channel(problem), _by_results(problem), _tile(config)
        size = item_bytes(p.dtype)
        how = _along(by_results, tile, vector_bytes(), registers())
        panels = _panels(by_results, tile[0], how)
        down, along = (aligned(values.shape, p.dtype) for values in pair)
        down[...], along[...] = pair[0], how.ordered(pair[1])
        added = for_columns(bias, p.dtype, how.tile.vectors * how.tile.lanes)
        jobs = split(panels.total, several(config.threads))
        values = {
            "down": down, "along": along, "bias": added, "pads": p.pads, "dilations": p.dilations,
            "shape": panels.shape, "counts": panels.counts, "width": panels.width,
            "stage_width": panels.width * panels.staged, "spacing": how.spacing, "turns": how.turns,
            "planar": by_results.n != p.n, "streamed": how.spacing == 1 and _should_stream(by_results, how.block),
            "code": p.epilogue.code, "slope": p.epilogue.slope, "jobs": np.array(jobs, np.int64),
        }  # fmt: skip
        constants = *tile, taps_together(p.kh), vector_bytes() // size, how.tile, size
        return PackedKernel(functools.partial(compiled, *constants), p, values, len(jobs), config.threads)


#: In products: a load along the row, of which many lie across two cache lines; and what a vector takes in each pass.
_LOAD_ALONG, _PASS = 1.5, 2
#: Of an output that is woven by whole vectors, or stored one by one.
_WOVEN_SECONDS, _SCATTERED_SECONDS = 2.5e-10, 1e-9
_BYTES_PER_SECOND = 4e10


def _tile(config: Config) -> tuple[int, int]:
    return register_tile(config, "separable", _TILES[registers()])
