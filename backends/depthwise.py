"""``depthwise``: every channel, or every few, have their own filters, so vectors lie along the channels.

A tile is a run of outputs along one row, a vector of channels each, summed in registers. For each row of the filter
that lies inside the image, every pixel under the tile is loaded once and multiplied with all the taps that meet it (as
in Zhang, Lo & Lu: High Performance Depthwise and Pointwise Convolutions on Mobile Devices, 2020). Channels are the
innermost loop, as they are in memory, and then come columns and rows: the image is walked once. One too wide for that
is walked in strips of columns, so that the rows a filter needs again stay in L2. Groups of a few channels share
vectors: a pixel's channels are spread so that each meets the lanes of all its group's filters. Under a dilated filter,
outputs share pixels with those a dilation away, so these make a tile. Under a filter of 3x3, 5x5 or 7x7, a tile may
have several rows of outputs, which share most of the rows that they see. What is outside the image is skipped, or read
at the address of a vector of zeros, and not copied. But where the pixels under a tile want the same few places of
L1, what a tile sees may be staged. Bias, residual and activation are applied in registers.

Ends overlap: the last tile of a row, that of some rows, and the last vector of a pixel are moved back until they fit,
and do some outputs again; there are tiles of several lengths, so that this is little. So nothing outside the arrays is
touched, and every vector is whole.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort, item_bytes
from convdispatch.backends import _rates
from convdispatch.backends._caches import in_last_caches, should_stream
from convdispatch.backends._depthwise import in_place
from convdispatch.backends._depthwise_staged import staged
from convdispatch.backends._depthwise_tile import DepthwiseForm, shared_out
from convdispatch.backends._jobs import grid, pieces
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._lines import odd_lines
from convdispatch.backends._packed import PackedBackend
from convdispatch.backends._packing import by_vectors
from convdispatch.backends._vector import registers, vector_bytes
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine, current
from convdispatch.memory import CACHE_LINE, aligned
from convdispatch.problem import Problem, dtype_of

#: Outputs of a tile, by the number of vector registers: sums, one row of taps and an input fit in them.
_TILES = {32: (14, 7, 4), 16: (7, 4)}
#: All lengths of tiles: enough that those of a row overlap little, and few enough that kernels serve many shapes.
_LENGTHS = (14, 12, 10, 9, 7, 5, 4, 1)
#: Of those whose tiles overlap least, or a little more, so many are tried; shorter ones only where no other fits.
_OVERLAP, _TRIED, _SHORT = 1.04, 3, 4
#: Rows of outputs that share the pixels they see, and the columns of such a tile, by the number of vector registers:
#: sums, the rows of taps that a row of pixels meets, and an input fit in them.
_HIGH_TILES = {32: ((2, 7), (4, 4)), 16: ((2, 4), (2, 3))}
#: Taps of a row that are done together, held in registers, if the filter's width is a multiple of theirs.
_TAPS = (7, 5, 3)
#: Filters of so many rows and as many columns, one a channel, are done whole where they lie inside the image; by tiles
#: of one row only the smallest, since others gain little by it, and would each be a kernel.
_WHOLE = (3, 5, 7)
_MOST_HIGH = 4
#: A filter up to this width that is no such multiple is done a row at a time, a wider one by taps.
_WIDEST = 31
#: Channels of a group, each written out as code.
_CHANNELS = 16
#: The rows of a strip that a filter needs again stay in L2 up to this size.
_CACHED_ROWS = 256 << 10
#: What is staged at once, so that it stays in L2.
_STAGE_BYTES = 512 << 10


@dataclass(frozen=True)
class _Tiling:
    """What a config makes of a problem.

    Attributes:
        seen: the problem as tiles see it: where its rows are staged, the padding is part of the image.
        columns: outputs of a tile along a row.
        rows: rows of outputs of a tile.
        is_staged: whether the rows that outputs see are copied first.
    """

    seen: Problem
    columns: int
    rows: int
    is_staged: bool

    @functools.cached_property
    def chunk(self) -> tuple[int, int]:
        """The taps done together, and the stride between outputs among the pixels they share."""
        return _chunk(self.seen, self.columns)

    @functools.cached_property
    def pixels(self) -> int:
        """How many pixels a tile sees."""
        p = self.seen
        return ((self.rows - 1) * p.strides[0] + p.kh) * ((self.columns - 1) * p.strides[1] + p.kw)

    @functools.cached_property
    def whole(self) -> int:
        """Columns of as many outputs as tiles of all phases of a dilation have together."""
        return self.columns * self.seen.dilations[1]

    @functools.cached_property
    def strip(self) -> int:
        """How many columns of output are walked down together: whole tiles."""
        p = self.seen
        bytes_of_rows = p.kh * p.strides[1] * p.c * item_bytes(p.dtype) * self.whole
        return max(1, _CACHED_ROWS // bytes_of_rows) * self.whole

    @functools.cached_property
    def stage(self) -> tuple[int, int, int]:
        """The rows and columns of outputs whose pixels are staged at once, and the bytes from pixel to pixel."""
        p, strip = self.seen, min(self.strip, -(-self.seen.ow // self.columns) * self.columns)
        size = item_bytes(p.dtype)
        pixel = odd_lines(p.c, size) * size
        line = ((strip - 1) * p.strides[1] + p.kw) * pixel
        rows = max(1, min(p.oh, (_STAGE_BYTES // line - p.kh) // p.strides[0] + 1))
        return rows, strip, pixel

    def cut(self, threads: int) -> tuple[tuple[int, int], tuple[int, int], int]:
        """Return how long rows, of all images, and columns are, and into how many pieces they are cut.

        Rows are shared out; or columns, if there are too few rows. Channels are not: every pixel would have a line of
        cache that two threads write. Columns are counted by whole tiles, and so are rows, unless threads would have
        unequal shares. Last is how many rows are counted as one.
        """
        rows, wide = self.seen.n * self.seen.oh, max(1, self.seen.ow // self.whole)
        jobs = pieces(self.seen.flops / _FLOPS, threads)
        if rows < _ROWS * jobs and wide > rows:
            return (rows, 1), (wide, min(jobs, wide)), 1
        tiles = -(-rows // self.rows)
        as_one = self.rows if jobs > threads or tiles % jobs == 0 else 1
        high = -(-rows // as_one)
        return (high, max(1, min(jobs, high))), (wide, 1), as_one

    def jobs(self, threads: int) -> Array:
        """Return jobs, each some rows of all images and some columns of these: where they begin and end."""
        p, (down, across, as_one) = self.seen, self.cut(threads)
        jobs = grid(down, across).copy()
        jobs[:, :2] = np.minimum(jobs[:, :2] * as_one, p.n * p.oh)
        jobs[:, 2:] *= self.whole
        whole = across[0] * self.whole
        jobs[jobs[:, 3] == whole, 3] = p.ow  # less than a tile is moved back, but not into another job
        return jobs

    @property
    def prefetches(self) -> bool:
        """Whether pixels are prefetched a tile ahead; those that are copied first are in L2."""
        return self.rows > 1 and not self.is_staged and _prefetches(self.seen)

    def form(self) -> DepthwiseForm:
        """Return what a kernel is compiled for."""
        p, (taps, stride) = self.seen, self.chunk
        group = (p.group_c, p.group_k) if _shares_vectors(p) else (1, 1)
        is_whole = _done_whole(p, self.columns) and (self.rows > 1 or p.kh == _WHOLE[0])
        return DepthwiseForm(
            self.columns, self.rows, p.kh if is_whole else 0, taps, stride,
            taps > 1 and p.dilations[1] > 1, *group, _lanes(p, vector_bytes()), item_bytes(p.dtype), _is_streamed(p),
            self.prefetches,
        )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _tiling(problem: Problem, config: Config) -> _Tiling:
    """Return what a config makes of a problem.

    Raises:
        ArgumentError: if it makes nothing of it.
    """
    p, tile, staged_first = problem, _tile(config), _is_staged(problem, config)
    if staged_first:
        ends = zip((p.oh, p.ow), p.strides, (p.kh, p.kw), strict=True)
        h, w = ((out - 1) * stride + taps if out else 0 for out, stride, taps in ends)
        p = p.replace(h=h, w=w, pads=(0, 0, 0, 0))
    return _Tiling(p, _fitting(p, tile), _high(p, config), staged_first)


class Depthwise(PackedBackend):
    """Vectors along the channels, each of a group of few or of its own; any filter, stride, dilation and padding."""

    name = "depthwise"
    version = 11

    def rejects_plain(self, problem: Problem) -> str | None:
        """Return None, or why the problem is not depthwise."""
        if problem.groups == 1:
            return "it wants groups, and there is one for all"
        if not _shares_vectors(problem) and problem.group_c != 1:
            return f"groups of {problem.group_c} channels and {problem.group_k} filters do not share vectors well"
        return None

    def configs_plain(self, problem: Problem, effort: Effort) -> Sequence[Config]:  # noqa: ARG002  # they are few
        """Return tiles, the one with the smallest estimate first."""
        here = current()

        def estimate(config: Config) -> float:
            return self.estimate_plain(problem, config, here)

        choices = sorted((Config(columns=length) for length in _lengths(problem)), key=estimate)[:_TRIED]
        high = [Config(columns=columns, rows=rows) for rows, columns in _HIGH_TILES[registers()]]
        choices += [config for config in high if _fits(problem, config)]
        if _may_stage(problem):
            choices += [Config(config, staged=True) for config in choices if _waits(problem, config, here)]
        return sorted(choices, key=estimate)

    def workspace_plain(self, problem: Problem, config: Config) -> int:
        """Return the bytes of each thread's stage, or its tile and an address for each pixel under it, by taps."""
        tiling = _tiling(problem, config)
        p, outputs = tiling.seen, 8 * tiling.rows * tiling.columns
        if tiling.is_staged:
            rows, strip, pixel = tiling.stage
            window = ((rows - 1) * p.strides[0] + p.kh) * ((strip - 1) * p.strides[1] + p.kw)
            return config.threads * (window * pixel + CACHE_LINE + outputs)
        form = tiling.form()
        addresses = max(p.kh * (p.kw // form.taps), form.seen_rows) * form.span
        return config.threads * (8 * addresses + outputs + tiling.columns * vector_bytes())

    def estimate_plain(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return the time of products, loads and stores by tile, or of the traffic if that takes longer."""
        tiling = _tiling(problem, config)
        p, tile = tiling.seen, tiling.columns
        lanes, size = _lanes(p, machine.vector_bytes), item_bytes(p.dtype)
        tiles = p.n * p.oh * -(-p.ow // tile) * -(-p.k // lanes)
        (_, down), (_, across), _ = tiling.cut(config.threads)
        rows = max(1, min(p.oh, -(-p.n * p.oh // down)))  # of a job, in one image
        together, alone = shared_out(rows, tiling.rows)
        seconds = together * _row_seconds(tiling, tiling.rows, machine)
        seconds += alone * _row_seconds(tiling, 1, machine) if alone else 0
        seconds *= tiles / rows
        if not _shares_vectors(p):
            seconds += tiles * tile * lanes * _VALUE_SECONDS
        seconds += _rates.activation_seconds(p, machine)
        if tiling.is_staged:
            again = (p.kh - 1) / (tiling.stage[0] * p.strides[0])
            seconds += math.prod(p.input_shape) * size * (1 + again) / _STAGED_BYTES
        used = min(config.threads, machine.cores, down * across)
        traffic = (math.prod(problem.input_shape) + math.prod(p.output_shape)) * size
        rate = _AHEAD_BYTES_PER_SECOND if tiling.prefetches else _MEMORY_BYTES_PER_SECOND
        missed = max(0, traffic - machine.caches[2] // 2) / rate
        return _rates.shared(seconds + missed, used)

    def prepare_plain(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Pack the filters by vectors of channels; compile for the tile if that has not been done."""
        p, tiling = problem, _tiling(problem, config)
        if reason := self.rejects_plain(p):  # a kernel that goes by addresses must not be wrong about shapes
            raise ArgumentError(f"depthwise cannot do {p}: {reason}")
        form = tiling.form()
        lanes, members = form.lanes, 1 if _shares_vectors(p) else p.group_k
        by_member = filters.reshape(p.kh, p.kw, p.group_c, p.k // members, members).transpose(4, 0, 1, 2, 3)
        kept = np.empty(0, dtype_of(p.dtype)) if bias is None else np.array(bias)
        jobs = tiling.jobs(config.threads)
        values = {
            "filters": by_vectors(by_member, lanes), "bias": kept, "zero": aligned((p.c + 2 * lanes,), p.dtype),
            "window": (p.kh, p.kw, p.pads[0], p.pads[2], *p.strides, *p.dilations),
            "code": p.epilogue.code, "slope": p.epilogue.slope, "jobs": jobs,
            **({"stage": tiling.stage} if tiling.is_staged else {"strip": tiling.strip}),
        }  # fmt: skip
        make = functools.partial(staged if tiling.is_staged else in_place, form)
        return PackedKernel(make, p, values, len(jobs), config.threads)


_FLOPS = 8e10  # a second of a core, about, by which work is cut
_ROWS = 2  # of a job at least, or jobs are too uneven
_FMA_SECONDS_PER_BYTE = 3e-12  # of a vector
_LOAD_SECONDS = 8e-10  # of a pixel's vector, from L2 as often as not
_SPILLED = 1.6  # a tile and the filters of several channels do not all stay in registers, as a shorter tile's do
_CROWDED = 1.3  # they do, but nothing else does
_TILE_SECONDS = 8e-9
_WAITING_SECONDS = 9e-9  # of a pixel for which L1 has a single place; measured with 8, 16 and 32
_CACHED = 0.5  # of the last cache; what takes more is expected to come from memory
_FEW_PLACES = 32  # with so many it does not pay to stage pixels
_STAGED_BYTES = 8e10  # a second
_VALUE_SECONDS = 1.5e-9  # of an output that is finished by itself
_MEMORY_BYTES_PER_SECOND, _AHEAD_BYTES_PER_SECOND = 2e10, 4e10


def _row_seconds(tiling: _Tiling, high: int, machine: Machine) -> float:
    """Return what one row takes of a tile of so many, for a vector of filters."""
    p, tile, (taps, stride) = tiling.seen, tiling.columns, tiling.chunk
    lanes, size = _lanes(p, machine.vector_bytes), item_bytes(p.dtype)
    loads: float = p.kw // taps * ((tile - 1) * stride + taps)
    loads *= ((high - 1) * p.strides[0] + p.kh) / (high * p.kh)
    row = _FMA_SECONDS_PER_BYTE * lanes * size * tile * p.kw + _LOAD_SECONDS * loads
    row *= 1 if p.group_c == 1 else 0.75 * p.group_c
    beside = taps * p.group_c + 2  # a row of taps, a pixel, and what that is spread to
    if p.group_c > 1 and tile + beside > registers() >= _TILES[registers()][-1] + beside:
        row *= _SPILLED
    elif p.group_c > 3 and tile > _TILES[registers()][1]:
        row *= _CROWDED
    seconds = row * _rows_inside(p) + _TILE_SECONDS / high
    places, pixels = _places(p, machine), tiling.pixels
    if pixels > places and p.group_c == 1 and not tiling.is_staged:
        seconds = max(seconds, pixels / tiling.rows * _WAITING_SECONDS / math.sqrt(places))
    return seconds


def _tile(config: Config) -> int:
    choices = _TILES[registers()]
    tile = config.integer("columns", choices[0])
    if not 1 <= tile <= 2 * choices[0]:
        raise ArgumentError(
            f"config columns of depthwise must be sums that fit in registers, such as "
            f"{' or '.join(map(str, choices))}; got {tile}"
        )
    return tile


def _is_staged(problem: Problem, config: Config) -> bool:
    """Return whether the rows that outputs see are copied first."""
    asked = config.get("staged", False)
    if not isinstance(asked, bool) or (asked and not _may_stage(problem)):
        raise ArgumentError(
            f"config staged of depthwise is for one filter a channel, without dilation; got {asked!r} for {problem}"
        )
    return asked


def _may_stage(problem: Problem) -> bool:
    return problem.group_c == problem.group_k == 1 and problem.dilations == (1, 1)


def _places(problem: Problem, machine: Machine) -> float:
    """Return how many pixels L1 has places for; neighbours in a single row come in time anyway."""
    p = problem
    apart = p.c * item_bytes(p.dtype) * p.dilations[1]
    return math.inf if p.kh == p.dilations[1] == 1 else _rates.places(apart, machine)


def _waits(problem: Problem, config: Config, machine: Machine) -> bool:
    """Return whether a tile's pixels want so few places of L1 that staging them may pay."""
    places = _places(problem, machine)
    return places < _FEW_PLACES and places < _tiling(problem, config).pixels


def _high(problem: Problem, config: Config) -> int:
    """Return the rows of outputs of a tile."""
    rows = config.integer("rows", 1)
    if not 1 <= rows <= _MOST_HIGH:
        raise ArgumentError(f"config rows of depthwise must be 1 to {_MOST_HIGH}; got {rows}")
    return rows if _fits(problem, config) else 1


def _fits(problem: Problem, config: Config) -> bool:
    """Return whether a problem has tiles of so many rows and columns."""
    p, rows, columns = problem, config.integer("rows", 1), _tile(config)
    met = min(p.kh, (rows - 1) * p.strides[0] + 1) * p.kw  # taps that a row of pixels meets
    return (
        p.group_k == 1 and p.strides[0] == p.strides[1] and p.dilations == (1, 1) and _done_whole(p, columns)
        and rows <= p.oh and columns <= p.ow and rows * columns + met < registers()
    )  # fmt: skip


def _fitting(problem: Problem, tile: int) -> int:
    """Return the tile, or a shorter one, so that it is no longer than the shortest run of outputs that share pixels."""
    least = max(1, problem.ow // problem.dilations[1])
    return next(length for length in (tile, *_LENGTHS) if length <= least)


def _lengths(problem: Problem) -> list[int]:
    """Return the lengths of tiles that registers hold and that overlap little."""
    longest, least = _TILES[registers()][0], max(1, problem.ow // problem.dilations[1])
    fitting = [length for length in _LENGTHS if length <= min(longest, least)]
    done = {length: -(-least // length) * length for length in fitting if length >= _SHORT or length == fitting[0]}
    return [length for length, outputs in done.items() if outputs <= _OVERLAP * min(done.values())]


def _chunk(problem: Problem, tile: int) -> tuple[int, int]:
    """Return the taps done together, and the stride between outputs among the pixels they share.

    A single output shares none: its sum waits for itself, tap by tap, however its taps are loaded.
    """
    p, stride = problem, problem.strides[1]
    if tile == 1 or stride > 2 or (stride == 2 and p.dilations[1] > 1):
        return 1, 1
    wide = p.kw if p.kw <= _WIDEST else 1
    taps = next((taps for taps in _TAPS if p.kw % taps == 0), wide)
    return taps, stride if taps > 1 else 1


def _is_streamed(problem: Problem) -> bool:
    """Return whether outputs are written past the caches; not those that are read again to be finished."""
    p = problem
    at_once = _shares_vectors(p) or p.group_k == 1
    return at_once and should_stream(p, _lanes(p, vector_bytes()), p.k)


def _prefetches(problem: Problem) -> bool:
    """Return whether pixels are prefetched a tile ahead: of images from memory, or nearly.

    From caches, it takes a twentieth longer. With stride 2 there is as much to come from memory, and less to do
    meanwhile: the cores wait for it in any case.
    """
    return problem.strides == (1, 1) and in_last_caches(problem) > _CACHED


def _done_whole(problem: Problem, tile: int) -> bool:
    """Return whether all rows of a filter are done together, where they lie inside the image."""
    p = problem
    whole = p.kh == p.kw == _chunk(p, tile)[0] and p.kh in _WHOLE
    return whole and (p.group_c == p.group_k == 1 or not _shares_vectors(p))


def _shares_vectors(problem: Problem) -> bool:
    """Return whether whole groups of filters fill a vector, and their channels two at most."""
    p, lanes = problem, vector_bytes() // item_bytes(problem.dtype)
    return p.group_k & (p.group_k - 1) == 0 and p.group_k <= lanes and p.group_c <= min(2 * p.group_k, _CHANNELS)


def _lanes(problem: Problem, vector: int) -> int:
    """Return the lanes for vectors of this many bytes: fewer if there are not as many outputs."""
    wide = problem.k if _shares_vectors(problem) else problem.c
    return min(vector // item_bytes(problem.dtype), 1 << (wide.bit_length() - 1))


def _rows_inside(problem: Problem) -> float:
    """Return how many rows of a filter lie inside the image, on average."""
    p, total = problem, 0
    for i in range(p.kh):
        above = p.pads[0] - i * p.dilations[0]
        total += max(0, min(p.oh, -(-(above + p.h) // p.strides[0])) - max(0, -(-above // p.strides[0])))
    return total / p.oh
