"""``winograd_rows``: many filters on few channels, by minimal filtering along rows alone, F(m, KW).

Where there are few channels, there is little to multiply at each point of a tile that is transformed down and across,
as those of ``winograd`` are, and transforms take longer than products. So here the rows of a filter are summed as they
are defined to be, and only along a row m outputs take n = m + KW - 1 products for each row of the filter, where the
definition takes m * KW: half as many for F(4, 3), 2.8 times fewer for F(4, 7). The image's transformed rows serve all
rows of outputs that see them, and all filters; sums of all points are held in registers, transformed back there, and
nothing is written but outputs. With stride 2 along rows, even and odd pixels are filtered by even and odd taps; strides
and dilations down the image are as good as none.

Rows of more taps are cut into chunks of m, or of m * stride. What a chunk sees of one tile, the chunk before sees of
the next, so that tiles are transformed once for all chunks: F(5, 5) takes 9 products for each 5 of the taps and 5
outputs, 0.36 of all.

Source: A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015 (arXiv:1509.09308); the
matrices and their errors are in ``_toomcook``, the kernel is in ``_winograd_rows``.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort, Numerics, item_bytes
from convdispatch.backends import _rates
from convdispatch.backends._caches import should_stream
from convdispatch.backends._jobs import grid, pieces, too_many
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._packed import PackedBackend
from convdispatch.backends._packing import by_vectors
from convdispatch.backends._row_passes import RowForm
from convdispatch.backends._toomcook import amplification, roundings, strided
from convdispatch.backends._vector import registers, vector_bytes, whole_units
from convdispatch.backends._winograd_rows import compiled
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine
from convdispatch.memory import CACHE_LINE
from convdispatch.problem import Problem

#: Outputs of a tile, the best first: more gain nothing, since transforms take longer then. Fewer are tried where they
#: take fewer products, as for few columns.
SIZES = (4, 3, 2)
#: Taps of a row at most that are one chunk, and those and a tile's outputs together: so many good points are known.
_MOST_TAPS, _MOST_TOGETHER = 11, 13
#: Outputs of a tile where there are several chunks, of as many taps as there are pixels from one tile to the next.
SIZES_OF_CHUNKS = (5, 4)
#: Strides along rows at most: of phases of few taps, little is saved.
_MOST_STRIDE, _MOST_STRIDE_OF_CHUNKS = 2, 4
#: Rows of a filter times channels, times chunks.
_MOST_DEPTH = 2048
#: Transforms that enlarge errors more than this are for no more of these: errors grow with both, and 1024 brought
#: F(4, 8) near the bound of `standard`.
_ROUGH, _DEPTH_OF_ROUGH = 300, 640
#: Filters of so many rows and columns, of the same stride, are better transformed down, too, with more channels.
_SQUARE_SIDES, _SQUARE_CHANNELS = (3, 7), 32
_LEAST_FILTERS = 8
#: With fewer columns of outputs, what takes a few products less need not be faster.
_FEW_COLUMNS = 9
#: Several channels have room for four at least, so that one kernel serves two to four of them.
_FEW_CHANNELS = 4
#: Points of a tile at most, and registers that hold no sums.
_MOST_POINTS, _OTHER_REGISTERS = 30, 2
#: Tiles of a pass, at once and, by the number of vector registers, in turn: few numbers, so that kernels serve many
#: shapes.
_TOGETHER = (7, 5, 4, 3, 2, 1)
_TOGETHER_IN_TURN = {32: (14, 10, 7, 4), 16: (12, 9, 6, 4)}
#: Transformed rows that are worked on together, so that they stay in L2; a strip has the rows of some outputs at least.
_STAGE_BYTES, _LEAST_ROWS = 256 << 10, 4
_FLOPS = 2.5e11  # of the definition, a second of a core, about, by which work is cut
_LEAST_TILES = 4  # of a job that is cut from a row


@dataclass(frozen=True)
class _Cut:
    """How a problem is cut.

    Attributes:
        form: what the kernel is compiled for.
        chunks: of a filter's row.
        tiles: of a row of outputs.
        strip: tiles of a row that are worked on together.
        seen: tiles that are transformed for them: those that only later chunks see, too.
        at_once: rows of outputs that are.
    """

    form: RowForm
    chunks: int
    tiles: int
    strip: int
    seen: int
    at_once: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a transformed row of a strip."""
        return self.form.row_bytes(self.seen)


@functools.lru_cache(maxsize=4096)
def _cut(problem: Problem, config: Config) -> _Cut:
    p, m, in_turn = problem, *_choice(problem, config)
    form = _form(p, m, in_turn=in_turn)
    chunks, tiles, least = -(-p.kw // form.r), -(-p.ow // m), form.row_bytes(1) * _reach(p, _LEAST_ROWS)
    most = max(form.together, chunks - 1, min(tiles, _STAGE_BYTES // least - (chunks - 1)))
    strip = max(form.together, -(-tiles // -(-tiles // most)))
    seen = strip + chunks - 1
    rows = (_STAGE_BYTES // form.row_bytes(seen) - _reach(p, 1)) // p.strides[0] + 1
    return _Cut(form, chunks, tiles, strip, seen, max(1, min(p.oh, rows)))


def _reach(problem: Problem, rows: int) -> int:
    """Return how many rows of the image so many rows of outputs reach over."""
    return (rows - 1) * problem.strides[0] + (problem.kh - 1) * problem.dilations[0] + 1


def _form(problem: Problem, m: int, *, in_turn: bool) -> RowForm:
    """Return the form whose passes take the least time for a row of tiles."""
    p, size, tiles = problem, item_bytes(problem.dtype), -(-problem.ow // m)
    c, lanes = p.group_c, min(vector_bytes() // size, 1 << (p.group_k.bit_length() - 1))
    room = min(max(_FEW_CHANNELS, 1 << (c - 1).bit_length()), -(-c // lanes) * lanes) if c > 1 else 1
    r = p.kw if p.kw <= _MOST_TAPS else m * p.strides[1]
    one = RowForm(m, r, p.strides[1], 1, in_turn, room, lanes, size)
    most, known = (tiles, _TOGETHER_IN_TURN[registers()]) if in_turn else (min(tiles, _registers() // one.n), _TOGETHER)
    forms = [dataclasses.replace(one, together=together) for together in known if together <= most]
    return min(forms, key=lambda form: -(-tiles // form.together) * _pass(p, form))


def _registers() -> int:
    """Return how many registers may hold sums."""
    return registers() - _OTHER_REGISTERS


def _depth(problem: Problem) -> int:
    """Return the values over which products are summed, by the fewest chunks."""
    p, most = problem, SIZES_OF_CHUNKS[0] * problem.strides[1]
    return p.kh * p.group_c * (1 if p.kw <= _MOST_TAPS else -(-p.kw // most))


def _is_for_two_dimensions(problem: Problem) -> bool:
    """Return whether filters are better transformed down, too."""
    p, (least, most) = problem, _SQUARE_SIDES
    sides = least <= min(p.kh, p.kw) <= max(p.kh, p.kw) <= most
    return sides and p.strides[0] == p.strides[1] and (p.c > _SQUARE_CHANNELS or p.groups > 1)


@functools.lru_cache(maxsize=1024)
def _choices(problem: Problem) -> tuple[tuple[int, bool], ...]:
    """Return the tiles' outputs that there are for a problem, at once and in turn."""
    p, stride = problem, problem.strides[1]
    chunked = p.kw > _MOST_TAPS
    if stride > (_MOST_STRIDE_OF_CHUNKS if chunked else _MOST_STRIDE) or stride >= p.kw:
        return ()
    if chunked:
        sizes = [(m, stride * m) for m in SIZES_OF_CHUNKS]
    else:
        sizes = [(m, p.kw) for m in SIZES if m + -(-p.kw // stride) <= _MOST_TOGETHER]
    if _depth(p) > _DEPTH_OF_ROUGH:
        sizes = [(m, r) for m, r in sizes if amplification(m, r, stride) <= _ROUGH]
    points = {m: stride * (m - 1) + r for m, r in sizes if m <= p.ow}
    at_once = [(m, False) for m, n in points.items() if n <= _registers()]
    least = min(_TOGETHER_IN_TURN[registers()])
    in_turn = [(m, True) for m, n in points.items() if n <= _MOST_POINTS and -(-p.ow // m) >= least]
    return *at_once, *in_turn


def _worth_trying(problem: Problem) -> list[tuple[int, bool]]:
    """Return the choices but for sizes that take no fewer products than one that is better otherwise."""
    p, choices, fewest = problem, _choices(problem), dict[int, int]()
    for m in dict.fromkeys(m for m, _ in choices):
        products = -(-p.ow // m) * (p.strides[1] * (m - 1) + p.kw)
        if max(p.kw - _MOST_TAPS, _FEW_COLUMNS - p.ow) > 0 or products < min(fewest.values(), default=products + 1):
            fewest[m] = products
    return [(m, in_turn) for m, in_turn in choices if m in fewest]


def _choice(problem: Problem, config: Config) -> tuple[int, bool]:
    choices = _choices(problem)
    m, in_turn = config.get("m", choices[0][0] if choices else SIZES[0]), config.get("in_turn", False)
    if isinstance(m, bool) or not isinstance(in_turn, bool) or (m, in_turn) not in choices:
        wanted = " or ".join(f"m={size}" + ", in_turn=True" * turn for size, turn in choices) or "another problem"
        given = f"m={m!r}, in_turn={in_turn!r}" if "in_turn" in config else f"m={m!r}"
        raise ArgumentError(f"winograd_rows' config needs {wanted}, the outputs of a tile; got {given}")
    return int(m), in_turn


def _jobs(problem: Problem, cut: _Cut, threads: int) -> Array:
    """Return jobs, each some rows of all images, some tiles of these, and some groups: one of these axes is cut."""
    p, rows, jobs = problem, problem.n * problem.oh, pieces(problem.flops / _FLOPS, threads)
    if rows >= jobs:
        return grid((rows, jobs), (cut.tiles, 1), (p.groups, 1))
    if p.groups >= jobs:
        return grid((rows, 1), (cut.tiles, 1), (p.groups, jobs))
    least = max(_LEAST_TILES, cut.form.together)
    return grid((rows, 1), (cut.tiles, max(1, min(jobs, cut.tiles // least))), (p.groups, 1))


def _growth(problem: Problem, config: Config) -> float:
    """Return the bound's factor: roundings along the way (in eps / 2), times what the transforms make of them."""
    cut = _cut(problem, config)
    axis = (cut.form.m, cut.form.r, cut.form.stride)
    along_the_way = roundings(*axis) + 1  # and one as transformed filters are stored
    # With several chunks, inputs are part of two tiles at most: the squares of all tiles' norms are twice the image's.
    overlap = 1 if cut.chunks == 1 else math.sqrt(2)
    return (problem.kh * cut.chunks * problem.group_c + along_the_way) / 2 * overlap * amplification(*axis)


class WinogradRows(PackedBackend):
    """Minimal filtering along rows: any number of columns of taps, any stride down, few channels."""

    name = "winograd_rows"
    packing_cost = (5e-5, 1.8e-9)
    numerics = Numerics("transform", growth=_growth)

    def rejects_plain(self, problem: Problem) -> str | None:
        """Return the first thing about the problem that the algorithm has no answer to."""
        p = problem
        checks = (
            (p.c == 0, "there are no input channels"),
            (p.group_k < _LEAST_FILTERS, f"vectors are of filters, at least {_LEAST_FILTERS}; here are {p.group_k}"),
            (
                _depth(p) > _MOST_DEPTH,
                f"it is for few channels and rows, {_MOST_DEPTH} of both at most; here are {p.kh} rows of {p.group_c}"
                + f", of more than {_MOST_TAPS} taps" * (p.kw > _MOST_TAPS),
            ),
            (
                _is_for_two_dimensions(p),
                f"{p.kh}x{p.kw} filters of groups, or of over {_SQUARE_CHANNELS} channels, are better transformed down",
            ),
            (p.dilations[1] > 1, "its tiles are neighbours along rows, where filters are dilated"),
            (
                not _choices(p),
                f"rows of {p.kw} taps with stride {p.strides[1]} for {p.ow} columns save nothing, or lack good points",
            ),
        )
        return next((reason for bad, reason in checks if bad), None) or too_many(p.n * p.oh * p.ow)

    def configs_plain(self, problem: Problem, effort: Effort) -> Sequence[Config]:
        """Return sizes of tiles, the one with the smallest estimate first."""
        choices = [Config(m=m, in_turn=True) if in_turn else Config(m=m) for m, in_turn in _worth_trying(problem)]
        return _rates.ranked(choices, functools.partial(self.estimate_plain, problem), effort, 2)

    def step(self, problem: Problem, config: Config) -> int:
        """Return 1, or a tile's outputs where there is one row of output."""
        return _choice(problem, config)[0] if problem.oh == 1 else 1

    def workspace_plain(self, problem: Problem, config: Config) -> int:
        """Return the bytes of each thread's transformed rows, the line that is copied for them, and a pass's sums."""
        p, cut = problem, _cut(problem, config)
        form = cut.form
        line = ((cut.seen - 1) * form.m * form.stride + form.n) * p.group_c + form.room
        each = _reach(p, cut.at_once) * cut.row_bytes + (line + 2 * form.m * p.k) * form.itemsize + form.sums_bytes
        each += 2 * CACHE_LINE + 16 * cut.strip
        return min(config.threads, len(_jobs(p, cut, config.threads))) * each

    def estimate_plain(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return the time of the passes over tiles, and of transforming rows of the image, more than once at edges."""
        p, cut = problem, _cut(problem, config)
        form = cut.form
        instruction = 2 * machine.vector_bytes / form.itemsize / _rates.peak(machine, form.itemsize)
        passes = p.n * p.oh * -(-cut.tiles // form.together) * p.groups * -(-p.group_k // form.lanes)
        depth = p.kh * cut.chunks * p.group_c
        work = passes * _pass(p, form)
        if not form.in_turn and (filter_bytes := depth * form.n * machine.vector_bytes) > machine.caches[0]:
            work = max(work, passes * filter_bytes / _L2_BYTES / instruction)
        jobs = len(_jobs(p, cut, config.threads))
        blocks = max(jobs, p.n * -(-p.oh // cut.at_once))
        rows = p.n * p.oh * p.strides[0] + blocks * max(0, _reach(p, 1) - p.strides[0])
        entered = rows * p.groups * cut.tiles * (cut.seen / cut.strip)
        work += entered * _ENTERING * form.n * -(-form.room // form.lanes)
        seconds = work * instruction + _rates.activation_seconds(p, machine)
        if (all_filters := depth * form.n * p.k * form.itemsize) > machine.caches[1]:  # each pass has them come
            seconds += p.n * p.oh * -(-cut.tiles // form.together) * _rates.filter_seconds(all_filters, machine)
        return _rates.shared(seconds, min(config.threads, machine.cores, jobs))

    def prepare_plain(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Transform the filters in float64 and round them once."""
        p, cut = problem, _cut(problem, config)
        form, lanes = cut.form, cut.form.lanes
        g = np.array(strided(form.m, form.r, form.stride).g, np.float64)
        chunks = np.zeros((p.kh, cut.chunks * form.r, p.group_c, p.k))
        chunks[:, : p.kw] = filters
        transformed = np.matmul(g, chunks.reshape(p.kh, cut.chunks, form.r, p.group_c, p.k).swapaxes(2, 3))
        turns = (form.n, 1) if form.in_turn else (1, form.n)
        by_groups = transformed.reshape(*transformed.shape[:3], *turns, p.groups, p.group_k)
        by_turns = np.moveaxis(by_groups, (-2, 3), (0, 1)).astype(p.dtype)
        jobs = _jobs(p, cut, config.threads)
        values = {
            "filters": by_vectors(by_turns, lanes), "bias": np.empty(0, p.dtype) if bias is None else np.array(bias),
            "pads": p.pads[::2], "strides": p.strides, "dilation": p.dilations[0],
            "stage": (cut.at_once, cut.strip, cut.row_bytes),
            "streamed": should_stream(p, lanes, p.k, _CACHED_OUTPUT),
            "code": p.epilogue.code, "slope": p.epilogue.slope, "jobs": jobs,
        }  # fmt: skip
        return PackedKernel(functools.partial(compiled, form), p, values, len(jobs), config.threads)


#: An output is written past the caches only if it is as large as the last of them, as ``implicit_gemm`` does.
_CACHED_OUTPUT = 1.0
_L2_BYTES = 8e10  # a second
_ENTERING = 2.2  # instructions of a vector for a point of a tile, its load and store included


def _pass(problem: Problem, form: RowForm) -> float:
    """Return how many products' time a pass takes.

    Every point's filters are loaded once for all tiles, and a value for each of these: where products are done by
    halves, in half the time.
    Points in turn take the loop over rows and chunks once each, and their sums are stored, and loaded again.
    """
    p, tiles, n, m = problem, form.together, form.n, form.m
    loops = p.kh * -(-p.kw // form.r)
    by_halves = registers() == 32 and not whole_units()
    loads = 1.1 + (0.6 if by_halves else 1.0) * tiles
    products = loops * p.group_c * (max(tiles, loads) + 0.1)
    turn = 10 * loops + 1.5 * tiles + 5 if form.in_turn else 0
    leaving = 0.6 * n * (1 + m / 2) + 2 * m + (n if form.in_turn else 0)
    return n * (products + turn) + tiles * leaving + 5
