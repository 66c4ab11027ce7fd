"""``image_rows``: images of few channels, with neighbouring columns side by side in a vector.

A tile of outputs, some rows times some vectors of columns, is summed in registers. For each column of the filter the
kernel goes down the rows of the input under the tile: a vector of input is loaded once, shifted by its unaligned
address, and multiplied with every filter value that meets it in some row of the tile. Tall filters are taken a few
taps at a time, so that those stay in registers too. Filters of one row meet no input twice that way. For them a tile is
a run of vectors along one row, and taps that are as many apart as a vector has lanes do what those of neighbouring rows
do elsewhere. (Georganas et al.: Anatomy of High-Performance Deep Learning
Convolutions on SIMD Architectures, 2018, has such register tiles with vectors of channels; vectors along the columns
are as old as image processing.)

Where an image has one channel, a small filter reads it where it lies, and only tiles at the border read a copy of
their window with zeros around it. Otherwise a panel of rows is copied, so that its channels lie apart in planes and the
border is no special case. NCHW images are planes already: small filters read all of them where they lie, each filter's
results are a plane of their own, and groups are images, each with its own filters. Rows dilated by d are d images, each
of every d-th row. With strides, every s-th row and every s-th column get planes of their own, and each plane meets its
own part of the filter without strides. Nothing is ever written outside the output: the last tile of a row or column
moves back over its neighbour, and what is smaller than a tile is staged in scratch memory. So are the results of
several filters, which have to be interleaved; but a tile of one vector in each row may have the sums of all of two to
four filters: then each input is loaded once for all of them, and they are interleaved in registers.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort, item_bytes
from convdispatch.backends import _rates
from convdispatch.backends._caches import should_stream
from convdispatch.backends._image_rows import compiled
from convdispatch.backends._jobs import several, split
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._packed import PackedBackend
from convdispatch.backends._packing import for_columns
from convdispatch.backends._panels import Panels, panels_of
from convdispatch.backends._planes import UNWOVEN, WOVEN
from convdispatch.backends._register_tiles import register_tile
from convdispatch.backends._taps import by_chunks, chunks, taps_together
from convdispatch.backends._vector import halves_are_free, registers, vector_bytes
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine
from convdispatch.memory import aligned
from convdispatch.problem import Problem

#: Beyond these, vectors of filters do better, which need neither planes nor interleaving. A single plane under filters
#: that make planes needs no interleaving either.
_CHANNELS, _FILTERS, _FILTERS_OF_PLANE = 16, 16, 128
#: Tiles, rows x vectors, by the number of vector registers: sums, one row of input and some taps fit in them.
_TILES = {32: ((8, 2), (12, 1), (4, 4), (4, 2)), 16: ((4, 2), (8, 1), (4, 1))}
#: Vectors of a tile along one row, likewise, and their bytes. Of unaligned vectors of 64 bytes nearly all lie across
#: two cache lines, which takes as long as two; of those of 32 bytes half do.
_RUNS, _RUN_BYTES = {32: 16, 16: 8}, 32
#: A filter of up to this many values is not worth a copy of what it reads.
_IN_PLACE = 100
#: Filters at most whose sums are in one tile, by the number of vector registers; least and most rows of such a tile.
_TOGETHER, _ROWS = {32: 4, 16: 3}, {32: (4, 12), 16: (3, 5)}


@dataclass(frozen=True)
class _Tile:
    """A tile, and how it takes a filter.

    Attributes:
        rows: of outputs; or vectors of one row.
        vectors: side by side in each row; or 1.
        lanes: of a vector.
        along: whether the tile lies along one row.
        turns: of a filter of one row, values that are so many apart are taken together; 0 for other tiles.
        height: most rows of a filter that share what is loaded; or values of its row.
        taps: of these, so many are taken at a time, or one fewer.
        together: filters whose sums a tile has, all there are, to be interleaved in registers; or 1.
    """

    rows: int
    vectors: int
    lanes: int
    along: bool
    turns: int
    height: int
    together: int = 1

    @property
    def taps(self) -> int:
        return taps_together(self.height)

    @property
    def run(self) -> int:
        """Neighbouring outputs of a row of sums."""
        return self.vectors * self.lanes

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of outputs."""
        return (1, self.rows * self.run) if self.along else (self.rows, self.run)


def _tile(problem: Problem, config: Config, vector: int) -> _Tile:
    """Return the tile that a config asks for, of vectors of so many bytes.

    Raises:
        ArgumentError: if registers cannot hold its sums, or it cannot lie along a row.
    """
    p, along, size = problem, config.get("along", False), item_bytes(problem.dtype)
    if not isinstance(along, bool) or (along and not _has_lines(p)):
        raise ArgumentError(f"config along of image_rows is for filters of one row without strides; got {along!r}")
    rows, vectors = register_tile(config, "image_rows", _TILES[registers()])
    if not along:
        lanes, height = vector // size, _without_strides(p).kh
        together = p.k if vectors == 1 and rows <= _rows_together(p, lanes) else 1
        return _Tile(rows, vectors, lanes, along=False, turns=0, height=height, together=together)
    lanes = min(vector, _RUN_BYTES) // size
    turns = min(p.kw, lanes) if p.dilations[1] == 1 else p.kw  # dilated, no two values meet the same vectors
    return _Tile(rows * vectors, 1, lanes, along=True, turns=turns, height=-(-p.kw // turns))


def _rows_together(problem: Problem, lanes: int) -> int:
    """Return the rows of the highest tile that has the sums of all filters, and room for their taps; 0 if none does."""
    p, (least, most) = problem, _ROWS[registers()]
    if p.groups > 1 or not 2 <= p.k <= _TOGETHER[registers()] or _planar(p):
        return 0
    rows = min(most, max(least, registers() // p.k - taps_together(_without_strides(p).kh)), p.oh // p.dilations[0])
    return rows if rows >= least and p.ow >= lanes else 0


def _has_lines(problem: Problem) -> bool:
    """Return whether filters have one row, and neighbouring outputs neighbouring inputs."""
    return problem.kh == 1 and problem.strides == (1, 1)


@functools.lru_cache(maxsize=1024)
def _without_strides(problem: Problem) -> Problem:
    """Return the problem of every stride-th row and column: more channels under smaller filters, without strides."""
    p, (sh, sw) = problem, problem.strides
    if p.strides == (1, 1):
        return p
    kh, kw, channels = -(-p.kh // sh), -(-p.kw // sw), p.c * min(sh, p.kh) * sw
    h, w = (out + taps - 1 if out else 0 for out, taps in ((p.oh, kh), (p.ow, kw)))
    return p.replace(h=h, w=w, c=channels, kh=kh, kw=kw, groups=1, pads=(0, 0, 0, 0), strides=(1, 1))


def _packed(filters: Array, strides: tuple[int, int], tile: _Tile) -> Array:
    """Return filters as ``[K, C, KH * KW]``, in the order in which they are taken, ``by_chunks``.

    First come the rows that meet every stride-th row of an image from the first on, then those that meet the next; and
    so do the columns of each. For a tile along a row, first come the columns ``tile.turns`` apart that are one more.
    """
    kh, kw, *_ = filters.shape
    if tile.along:
        turns = [filters[0, b :: tile.turns].transpose(2, 1, 0) for b in range(tile.turns)]
        alike = ([turn for turn in turns if turn.shape[-1] == height] for height in (tile.height, tile.height - 1))
        return np.concatenate([by_chunks(np.stack(part, -1), tile.taps) for part in alike if part], axis=-1)
    columns = np.concatenate([filters[:, b :: strides[1]] for b in range(min(strides[1], kw))], axis=1)
    parts = [by_chunks(columns[a :: strides[0]].transpose(3, 2, 0, 1), tile.taps) for a in range(min(strides[0], kh))]
    return np.concatenate(parts, axis=-1)


def _chunks(problem: Problem, tile: _Tile) -> Array:
    """Return of each part of a filter into how many chunks it is cut, and which columns those are of."""
    p = problem
    if tile.along:
        longer = p.kw - tile.turns * (tile.height - 1)  # so many turns have one value more than the others
        parts = [(*chunks(tile.height, tile.taps), 0, longer)]
        if longer < tile.turns:
            parts.append((*chunks(tile.height - 1, tile.taps), longer, tile.turns))
    else:
        rows = [-(-(p.kh - a) // p.strides[0]) for a in range(min(p.strides[0], p.kh))]
        parts = [(*chunks(each, tile.taps), 0, p.kw) for each in rows]
    return np.array(parts, np.int64)


def _shifts(problem: Problem, window: tuple[int, int]) -> Array:
    """Return how many bytes a tile's input under each column of a filter lies behind that under the first."""
    p, size, stride = problem, item_bytes(problem.dtype), problem.strides[1]
    places = [(b, i) for b in range(min(stride, p.kw)) for i in range(-(-(p.kw - b) // stride))]
    between = math.prod(window) * (1 if _planar(p) else p.c)  # planes of neighbouring columns are so far apart
    return np.array([(b * between + i * p.dilations[1]) * size for b, i in places], np.int64)


def _panels(problem: Problem, tile: _Tile) -> Panels:
    """Return how a problem is cut: planes, or one channel, under a small filter or lines are read where they lie."""
    p = problem
    in_place = (p.c == 1 or _planar(p)) and p.strides == (1, 1) and (tile.along or p.kh * p.kw <= _IN_PLACE)
    return panels_of(_without_strides(p), *tile.shape, in_place, woven=_woven(p) > tile.together)


@functools.lru_cache(maxsize=1024)
def _by_groups(problem: Problem) -> Problem:
    """Return the problem with groups of planes as so many images."""
    p = problem
    if p.groups == 1 or not _planar(p):
        return p
    return p.replace(n=p.n * p.groups, c=p.group_c, k=p.group_k, groups=1)


def _planar(problem: Problem) -> bool:
    """Return whether channels and filters lie in planes of their own."""
    return problem.data_format == "NCHW"


def _woven(problem: Problem) -> int:
    """Return how many filters' results are interleaved."""
    return 1 if _planar(problem) else problem.k


class ImageRows(PackedBackend):
    """Vectors of neighbouring columns, for images of few channels and filters of any size."""

    name = "image_rows"
    version = 8
    packing_cost = (5e-5, 1e-8)
    takes_planes = True

    def rejects_plain(self, problem: Problem) -> str | None:
        """Return None, or what about the dtype, the channels or the strides stands against it."""
        p = _by_groups(problem) if _has_lines(problem) else problem  # in vectors of channels, groups go faster
        most = _FILTERS_OF_PLANE if _planar(p) and p.c == 1 else _FILTERS
        if p.c > _CHANNELS or p.k > most:
            return f"it is for up to {_CHANNELS} channels and {most} filters; here are {p.c} and {p.k}"
        if p.strides != (1, 1) and p.dilations != (1, 1):
            return "strides take every so many rows and columns of an image, and so does dilation; it does either"
        if p.strides[0] > p.kh or p.strides[1] > p.kw:
            return "it copies all of an image, and strides longer than the filter leave parts out"
        if p.c * p.strides[1] > _CHANNELS:
            return f"with strides it is for up to {_CHANNELS} values from one column to the next"
        return None

    def configs_plain(self, problem: Problem, effort: Effort) -> Sequence[Config]:
        """Return tiles, the one with the smallest estimate first."""
        rows = _rows_together(problem, vector_bytes() // item_bytes(problem.dtype))
        tiles = dict.fromkeys((*_TILES[registers()], *[(rows, 1)] * (rows > 0)))
        choices = [Config(rows=rows, vectors=vectors) for rows, vectors in tiles]
        if _has_lines(problem):
            choices.append(Config(rows=_RUNS[registers()], vectors=1, along=True))
        return _rates.ranked(choices, functools.partial(self.estimate_plain, problem), effort, 2)

    def workspace_plain(self, problem: Problem, config: Config) -> int:
        """Return the bytes of each thread's copy of the input and staged results."""
        p, tile = _by_groups(problem), _tile(problem, config, vector_bytes())
        panels = _panels(p, tile)
        values = _without_strides(p).c * math.prod(panels.window) + p.k * tile.shape[0] * panels.width * panels.staged
        return config.threads * (values * item_bytes(p.dtype) + 8 * tile.rows)

    def estimate_plain(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return products of whole tiles by what is loaded for them; copies in and out of scratch; memory."""
        tile, p, size = _tile(problem, config, machine.vector_bytes), _by_groups(problem), item_bytes(problem.dtype)
        panels, (high, across) = _panels(p, tile), tile.shape
        inner, phases = _without_strides(p), min(p.dilations[0], p.oh)
        tiles = p.n * phases * -(-p.oh // (phases * high)) * -(-p.ow // across)
        if tile.along:
            loads = _LOAD_ALONG * tile.turns * (tile.rows * -(-tile.height // tile.taps) + tile.height)
            products = max(tile.rows * p.kw, loads)
        else:
            rows_loaded = p.strides[0] * (tile.rows + tile.taps - 1) * -(-inner.kh // tile.taps)
            step = _PRODUCT * max(tile.rows * p.kh * tile.together, 2 * rows_loaded) + _ROW_LOAD * rows_loaded
            products = p.kw * (step * tile.vectors + _COLUMN)
        peak = _rates.peak(machine, size)
        if tile.lanes * size < machine.vector_bytes and not halves_are_free():
            peak /= 2
        passes = p.k // tile.together * p.group_c
        compute = tiles * passes * products * tile.lanes * 2 / peak + tiles * _TILE_SECONDS
        copies = 0.0
        if not panels.in_place:
            woven = (1 if _planar(p) else p.c) * p.strides[1] in UNWOVEN
            again = (inner.kh - 1) / (panels.shape[0] * high)
            copies += math.prod(p.input_shape) * (1 + again) * (_PIXEL_SECONDS if woven else _PICKED_SECONDS)
        if panels.staged:
            copies += math.prod(p.output_shape) * (_WOVEN_SECONDS if _woven(p) <= WOVEN else _SCATTERED_SECONDS)
        copies += _rates.activation_seconds(p, machine)
        moved = _rates.moved_bytes(p)
        far = max(0.0, moved - _rates.FOUND * machine.caches[2])
        used = min(config.threads, machine.cores, panels.total)
        return _rates.shared(compute + copies + moved / _BYTES_PER_SECOND + far / _FAR_BYTES_PER_SECOND, used)

    def prepare_plain(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Reorder the filters; compile for the tile and the filter's height if that has not been done."""
        p, tile, size = _by_groups(problem), _tile(problem, config, vector_bytes()), item_bytes(problem.dtype)
        packed = aligned((problem.k, p.group_c, p.kh * p.kw), p.dtype)
        packed[...] = _packed(filters, p.strides, tile)
        panels = _panels(p, tile)
        jobs = split(panels.total, several(config.threads))
        values = {
            "filters": packed, "bias": for_columns(bias, p.dtype, tile.run), "strides": p.strides, "pads": p.pads,
            "chunks": _chunks(p, tile), "shifts": _shifts(p, panels.window),
            "reach": _without_strides(p).extent[1] - 1,
            "dilations": p.dilations, "shape": panels.shape, "counts": panels.counts, "window": panels.window,
            "stage_width": panels.width * panels.staged, "planar": _planar(p), "in_place": panels.in_place,
            "streamed": should_stream(p, tile.run, p.ow * _woven(p)),
            "code": p.epilogue.code, "slope": p.epilogue.slope, "jobs": np.array(jobs, np.int64),
        }  # fmt: skip
        constants = tile.rows, tile.vectors, tile.together, tile.taps, tile.along, tile.lanes, size
        return PackedKernel(functools.partial(compiled, *constants), p, values, len(jobs), config.threads)


#: Fitted, like the rest: what loads along rows take, of which many lie across two cache lines, and what is left of a
#: step's products, what its loads add, and a column of taps; in products of a vector.
_LOAD_ALONG, _PRODUCT, _ROW_LOAD, _COLUMN = 1.5, 0.8, 0.25, 4
#: Of a tile; of a pixel that is copied by whole vectors, or picked one by one; of an output that is woven likewise.
_TILE_SECONDS = 2e-8
_PIXEL_SECONDS, _PICKED_SECONDS = 1e-10, 4e-10
_WOVEN_SECONDS, _SCATTERED_SECONDS = 5e-10, 1e-9
#: Of all that is read and written, and besides of what the last cache does not keep.
_BYTES_PER_SECOND, _FAR_BYTES_PER_SECOND = 4e10, 2.7e10
