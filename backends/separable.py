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
from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_at, array_of, integers_of
from convdispatch.backends._caches import should_stream
from convdispatch.backends._epilogue import RELU6, finish
from convdispatch.backends._jit import compilable, inlined
from convdispatch.backends._jobs import several, split
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._packing import for_columns
from convdispatch.backends._panels import Panels, panels_of, place
from convdispatch.backends._planes import WOVEN, fill_line, put_line, putting
from convdispatch.backends._put import put_tile
from convdispatch.backends._scratch import borrow, give_back
from convdispatch.backends._taps import chunks, taps_together
from convdispatch.backends._tile import add_to_all, register_tile, store, zeros
from convdispatch.backends._vector import registers, vector_bytes
from convdispatch.backends._weave import add_rows
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

#: ``down`` is ``[K, KH]``; ``along`` ``[K, KW]``, ordered as ``_Along`` has it; ``bias`` ``[K, a tile's columns]`` or
#: empty; ``width`` the most columns of results, and ``stage_width`` of those that are staged.
_ARGUMENTS = Arguments(
    input=array_of(4), down=array_of(2), along=array_of(2), bias=array_of(2), residual=array_of(4), out=array_of(4),
    pads=integers_of(4), dilations=integers_of(2), shape=integers_of(2), counts=integers_of(3), width=INTEGER,
    stage_width=INTEGER, spacing=INTEGER, turns=INTEGER, planar=INTEGER, streamed=INTEGER, code=INTEGER, slope=FLOAT,
    jobs=array_of(2, "int64"), putter=INTEGER,
)  # fmt: skip
unpack = _ARGUMENTS.unpack


@compilable
def _sum_down(source, step, columns, filters, count, target, apart, rows, vectors, taps, fewer, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Do the pass down for so many columns: store ``rows`` lines of sums at ``target``, ``apart`` bytes apart.

    The input's lines are ``step`` bytes apart from ``source`` on. A column of ``count`` values at ``filters`` is taken
    ``taps`` at a time, or ``fewer``.
    """
    across, (whole, rest) = vectors * lanes, chunks(count, taps)
    for tile in range((columns + across - 1) // across):
        at = min(tile * across, columns - across) * itemsize
        sums = zeros(rows, vectors, lanes, itemsize)
        packed, taken = filters, source + at
        for _ in range(whole):
            sums = add_rows(sums, rows, taken, step, packed, taps)
            packed += taps * itemsize
            taken += taps * step
        for _ in range(rest):
            sums = add_rows(sums, rows, taken, step, packed, fewer)
            packed += fewer * itemsize
            taken += fewer * step
        store(sums, rows, (target, apart), at)


@inlined
def _sum_along(source, step, between, filters, turns, longer, rows, vectors, taps, fewer, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Return a tile's sums of the pass along, whose rows are ``step`` bytes apart.

    A filter's row is taken in turns, ``longer`` of which take ``taps`` of its values and the others ``fewer``; what one
    turn and the next meet is ``between`` bytes apart.
    """
    sums = zeros(rows, vectors, lanes, itemsize)
    for _ in range(longer):
        sums = add_rows(sums, rows, source, step, filters, taps)
        filters += taps * itemsize
        source += between
    for _ in range(turns - longer):
        sums = add_rows(sums, rows, source, step, filters, fewer)
        filters += fewer * itemsize
        source += between
    return sums


@functools.cache
def _compiled(  # noqa: C901, PLR0915
    rows: int, vectors: int, taps: int, lanes: int, along: "_AlongTile", itemsize: int
) -> CompiledKernel:
    """Return the kernel for a tile of the pass down that takes ``taps`` at a time, or one fewer, and one along."""
    across, fewer, less = vectors * lanes, max(1, taps - 1), max(1, along.taps - 1)
    count, beside, narrow, more = along.count, along.vectors, along.lanes, along.taps
    lines = 1 if more > 1 else count

    def convolve(arguments, job):  # type: ignore[no-untyped-def]  # noqa: C901, PLR0912, PLR0915
        """Compute the panels ``jobs[job]``, each of ``rows * shape[0]`` by ``block * shape[1]`` outputs."""
        (
            x, w_down, w_along, bias, residual, out, pads, dilations, shape, counts, width, stage_width, spacing,
            turns, planar, streamed, code, slope, jobs, putter,
        ) = unpack(arguments, itemsize)  # fmt: skip
        first_panel, last_panel = jobs[job]
        (images, height, row_length, _), (_, all_rows, columns, _) = x.shape, out.shape
        (filters, kh), kw, (dh, dw) = w_down.shape, w_along.shape[1], dilations
        # Results of several filters are planes, or woven into pixels.
        copies, woven = (filters, 1) if planar else (1, filters)
        results = out.reshape((images * copies, all_rows, columns, woven))
        added = residual.reshape((images * copies if residual.size else 0, all_rows, columns, woven))
        block, spaced = (count if more > 1 else beside) * narrow * spacing, narrow * spacing * itemsize
        longer = kw - turns * (more - 1)  # so many turns take more values of a filter's row, the others less
        reach = width + (kw - 1) * dw
        line_bytes, staged_bytes = reach * itemsize, stage_width * itemsize
        plane_bytes, middle_bytes = (rows + kh - 1) * line_bytes, rows * line_bytes
        plane_at = borrow(plane_bytes + middle_bytes + woven * rows * staged_bytes)
        if plane_at == 0:
            return 0
        middle_at, stage_at = plane_at + plane_bytes, plane_at + plane_bytes + middle_bytes
        plane = array_at(plane_at, (rows + kh - 1, reach), itemsize)
        middle = array_at(middle_at, (rows, reach), itemsize)
        stage = array_at(stage_at, (woven, rows, stage_width), itemsize)
        # As whole numbers of one kind: an unsigned one and a signed one would make a float.
        here, there = np.int64(x.ctypes.data), np.int64(out.ctypes.data)
        more_at = np.int64(residual.ctypes.data) - there
        down_at, along_at = np.int64(w_down.ctypes.data), np.int64(w_along.ctypes.data)
        bias_at = np.int64(bias.ctypes.data)
        for task in range(first_panel, last_panel):
            made, phase, top, bottom, left, right = place(
                task, counts, all_rows, columns, dh, rows * shape[0], block * shape[1]
            )
            n, k0 = made // copies, made % copies * woven
            staged = woven > 1 or right - left < block or bottom - top < rows
            first, wide = left - pads[2], max(right - left, block) + (kw - 1) * dw
            for tile_row in range((bottom - top + rows - 1) // rows):
                oh = top if staged and bottom - top < rows else min(top + tile_row * rows, bottom - rows)
                ih = phase - pads[0] + oh * dh
                # Of the columns from ``first`` on, those from ``low`` to ``high`` may be more than zeros.
                low, high = max(0, -first), min(wide, row_length - first)
                if ih >= 0 and ih + (rows + kh - 2) * dh < height and high - low >= across:
                    source, step = (
                        here + ((n * height + ih) * row_length + first) * itemsize,
                        dh * row_length * itemsize,
                    )
                else:
                    low, high, source, step = 0, wide, plane_at, line_bytes
                    for q in range(rows + kh - 1):
                        fill_line(plane[q], x[n, :, :, 0], ih + q * dh, first, wide)
                for r in range(rows):
                    middle[r, :low] = 0
                    middle[r, high:wide] = 0
                for k in range(woven):
                    _sum_down(
                        source + low * itemsize, step, high - low, down_at + (k0 + k) * kh * itemsize, kh,
                        middle_at + low * itemsize, line_bytes, rows, vectors, taps, fewer, lanes, itemsize,
                    )  # fmt: skip
                    for r in range(0, rows, lines):
                        row = phase + (oh + r) * dh
                        line = there + ((made * all_rows + row) * columns + left) * itemsize
                        if staged:
                            line = stage_at + (k * rows + r) * staged_bytes
                        down, apart = line_bytes, staged_bytes if staged else dh * columns * itemsize
                        if more > 1:  # a tile is of one row, whose vectors share values
                            down = apart = spaced
                        for tile in range((right - left + block - 1) // block):
                            ow = max(0, min(tile * block, right - left - block))
                            for turn in range(spacing):
                                offset = (ow + turn * narrow) * itemsize
                                sums = _sum_along(
                                    middle_at + r * line_bytes + offset, down, dw * itemsize,
                                    along_at + (k0 + k) * kw * itemsize, turns, longer,
                                    count, beside, more, less, narrow, itemsize,
                                )  # fmt: skip
                                if bias.size:
                                    sums = add_to_all(sums, count, bias_at + (k0 + k) * bias.shape[1] * itemsize)
                                if staged:
                                    store(sums, count, (line, apart), offset)
                                else:
                                    streams = streamed and (line + offset) % CACHE_LINE == 0
                                    put_tile(sums, count, (line, apart), offset, residual.size, more_at, code, streams)
                            if code > RELU6 and not staged:
                                for each in range(lines):
                                    finish(
                                        results[made, row + each * dh, left + ow : left + ow + block, 0], code, slope
                                    )
                if staged:
                    for r in range(min(rows, bottom - oh)):
                        row = phase + (oh + r) * dh
                        put_line(
                            putter, results, added, made, row, left, right, stage, r, streamed, code, slope, itemsize,
                        )  # fmt: skip
        give_back(plane_at)
        return 1

    return CompiledKernel(convolve, _ARGUMENTS, {"putter": putting(lanes, itemsize)})


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
class _AlongTile:
    """A tile of the pass along: one like those of the pass down; or, where taps share vectors, some of one row.

    Attributes:
        count: rows of output; or the vectors of the one row.
        vectors: side by side in each row; or 1.
        lanes: of a vector.
        taps: how many values of a filter share a vector; 1 where none do.
    """

    count: int
    vectors: int
    lanes: int
    taps: int


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

    tile: _AlongTile
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
                shared = _AlongTile(count=count, vectors=1, lanes=lanes, taps=taps)
                return _Along(shared, spacing=dilation, turns=lanes)
    alone = _AlongTile(count=rows, vectors=vectors, lanes=vector_bytes // size, taps=1)
    return _Along(alone, spacing=1, turns=p.kw)


def _should_stream(problem: Problem, values: int) -> bool:
    """Return whether results go past the caches, so many at a time."""
    return should_stream(problem.output_shape, item_bytes(problem.dtype), values, problem.ow * problem.k)


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
        compute += _rates.activation_seconds(p)
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
        return PackedKernel(functools.partial(_compiled, *constants), p, values, len(jobs), config.threads)


#: In products: a load along the row, of which many lie across two cache lines; and what a vector takes in each pass.
_LOAD_ALONG, _PASS = 1.5, 2
#: Of an output that is woven by whole vectors, or stored one by one.
_WOVEN_SECONDS, _SCATTERED_SECONDS = 2.5e-10, 1e-9
_BYTES_PER_SECOND = 4e10


def _tile(config: Config) -> tuple[int, int]:
    return register_tile(config, "separable", _TILES[registers()])
