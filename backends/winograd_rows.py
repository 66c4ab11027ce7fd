"""``winograd_rows``: many filters on few channels, by minimal filtering along rows alone, F(m, KW).

Where there are few channels, there is little to multiply at each point of a tile that is transformed down and across,
as those of ``winograd`` are, and transforms take longer than products. So here the rows of a filter are summed as they
are defined to be, and only along a row m outputs take n = m + KW - 1 products for each row of the filter, where the
definition takes m * KW: half as many for F(4, 3), 2.8 times fewer for F(4, 7). The image's transformed rows serve all
rows of outputs that see them, and all filters; sums of all points are held in registers, transformed back there, and
nothing is written but outputs. With stride 2 along rows, even and odd pixels are filtered by even and odd taps; strides
and dilations down the image are as good as none.

Source: A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015 (arXiv:1509.09308); the
matrices and their errors are in ``_toomcook``, the kernel is in ``_winograd_rows``.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort, Numerics, item_bytes
from convdispatch.backends import _rates
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._memory import CACHE_LINE, aligned, streams
from convdispatch.backends._packed import PackedBackend
from convdispatch.backends._threads import grid, too_many
from convdispatch.backends._toomcook import amplification, roundings, strided
from convdispatch.backends._vector import registers, vector_bytes
from convdispatch.backends._winograd_rows import compiled, row_bytes
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine
from convdispatch.problem import Problem

#: Outputs of a tile, the best first; more gain nothing, since transforms take longer then.
SIZES = (4, 3, 2)
#: Taps of a row at most, and those and a tile's outputs together: good points are known for so many.
_MOST_TAPS, _MOST_TOGETHER = 11, 13
#: Strides along rows.
_STRIDES = (1, 2)
#: Rows of a filter times channels, above which ``winograd`` has the better way, and filters do not stay in L1.
_MOST_DEPTH = 96
_LEAST_FILTERS = 8
#: Several channels have room for four at least, so that one kernel serves two to four of them.
_FEW_CHANNELS = 4
#: Registers that hold no sums.
_OTHER_REGISTERS = 2
#: Transformed rows that are worked on together, so that they stay in L2; a strip has the rows of some outputs at least.
_STAGE_BYTES, _LEAST_ROWS = 256 << 10, 4
_PARTS = 2  # jobs a thread, so that one that comes late finds work left
_LEAST_TILES = 4  # of a job that is cut from a row


@dataclass(frozen=True)
class _Cut:
    """How a problem is cut.

    Attributes:
        m: outputs of a tile.
        n: its points.
        lanes: filters of a vector.
        room: values of a point: channels, as they fill vectors up.
        tiles: of a row of outputs.
        together: tiles whose sums are held in registers.
        strip: tiles of a row that are worked on together.
        at_once: rows of outputs that are.
    """

    m: int
    n: int
    lanes: int
    room: int
    tiles: int
    together: int
    strip: int
    at_once: int


@functools.lru_cache(maxsize=4096)
def _cut(problem: Problem, m: int) -> _Cut:
    p, size = problem, item_bytes(problem.dtype)
    n, tiles = p.strides[1] * (m - 1) + p.kw, -(-p.ow // m)
    lanes = min(vector_bytes() // size, 1 << (p.k.bit_length() - 1))
    room = min(max(_FEW_CHANNELS, 1 << (p.c - 1).bit_length()), -(-p.c // lanes) * lanes) if p.c > 1 else 1
    fitting = range(1, min(tiles, (registers() - _OTHER_REGISTERS) // n) + 1)
    together = min(fitting, key=lambda count: -(-tiles // count) * _pass(1, n, m, count))
    window = (p.kh - 1) * p.dilations[0] + 1
    least = row_bytes(1, n, room, size) * (window + (_LEAST_ROWS - 1) * p.strides[0])
    strips = -(-tiles // max(together, min(tiles, _STAGE_BYTES // least)))
    strip = max(together, -(-tiles // strips))
    rows = (_STAGE_BYTES // row_bytes(strip, n, room, size) - window) // p.strides[0] + 1
    return _Cut(m, n, lanes, room, tiles, together, strip, max(1, min(p.oh, rows)))


def _sizes(problem: Problem) -> tuple[int, ...]:
    """Return the tiles' outputs that there are for a problem."""
    p = problem
    if not 1 < p.kw <= _MOST_TAPS or p.strides[1] not in _STRIDES or p.strides[1] >= p.kw:
        return ()
    most = registers() - _OTHER_REGISTERS
    return tuple(
        m
        for m in SIZES
        if m <= p.ow and p.strides[1] * (m - 1) + p.kw <= most and m + -(-p.kw // p.strides[1]) <= _MOST_TOGETHER
    )


def _size(problem: Problem, config: Config) -> int:
    sizes = _sizes(problem)
    m = config.integer("m", sizes[0] if sizes else SIZES[0])
    if m not in sizes:
        known = " or ".join(f"m={size}" for size in sizes) or "another problem"
        raise ArgumentError(f"winograd_rows' config needs {known}, the outputs of a tile; got m={m!r}")
    return m


def _parts(problem: Problem, cut: _Cut, threads: int) -> Array:
    """Return jobs, each some rows of all images and some tiles of these: rows are cut, or else what few there are."""
    rows, jobs = problem.n * problem.oh, 1 if threads == 1 else _PARTS * threads
    if rows >= jobs:
        return grid((rows, jobs), (cut.tiles, 1))
    return grid((rows, 1), (cut.tiles, max(1, min(jobs, cut.tiles // max(_LEAST_TILES, cut.together)))))


def _growth(problem: Problem, config: Config) -> float:
    """Return the bound's factor: roundings along the way (in eps / 2), times what the transforms make of them."""
    axis = (_size(problem, config), problem.kw, problem.strides[1])
    along_the_way = roundings(*axis) + 1  # and one as transformed filters are stored
    return (problem.kh * problem.c + along_the_way) / 2 * amplification(*axis)


class WinogradRows(PackedBackend):
    """Minimal filtering along rows: up to 11 columns of taps, stride 1 or 2 along rows, any down, few channels."""

    name = "winograd_rows"
    packing_cost = (6e-5, 2e-9)
    numerics = Numerics("transform", growth=_growth)

    def rejects_plain(self, problem: Problem) -> str | None:
        """Return the first thing about the problem that the algorithm has no answer to."""
        p = problem
        checks = (
            (p.groups > 1, "it wants filters of all channels, and here are groups"),
            (p.c == 0, "there are no input channels"),
            (p.k < _LEAST_FILTERS, f"vectors are of filters, at least {_LEAST_FILTERS}; here are {p.k}"),
            (
                p.kh * p.c > _MOST_DEPTH,
                f"it is for few channels, up to {_MOST_DEPTH} of all rows of a filter; here are {p.kh} rows of {p.c}",
            ),
            (p.dilations[1] > 1, "its tiles are neighbours along rows, where filters are dilated"),
            (
                not _sizes(p),
                f"rows of {p.kw} taps with stride {p.strides[1]} for {p.ow} columns save nothing, or lack good points",
            ),
        )
        return next((reason for bad, reason in checks if bad), None) or too_many(p.n * p.oh * p.ow)

    def configs_plain(self, problem: Problem, effort: Effort) -> Sequence[Config]:
        """Return sizes of tiles, the one with the smallest estimate first."""
        choices = [Config(m=m) for m in _sizes(problem)]
        return _rates.ranked(choices, functools.partial(self.estimate_plain, problem), effort, 2)

    def step(self, problem: Problem, config: Config) -> int:
        """Return 1, or a tile's outputs where there is one row of output."""
        return _size(problem, config) if problem.oh == 1 else 1

    def workspace_plain(self, problem: Problem, config: Config) -> int:
        """Return the bytes of each thread's transformed rows, and of the line that is copied for them."""
        p, cut, size = problem, _cut(problem, _size(problem, config)), item_bytes(problem.dtype)
        reach = (cut.at_once - 1) * p.strides[0] + (p.kh - 1) * p.dilations[0] + 1
        line = ((cut.strip * cut.m - 1) * p.strides[1] + p.kw) * p.c * size + cut.room * size
        each: int = reach * row_bytes(cut.strip, cut.n, cut.room, size) + line + CACHE_LINE + 8 * cut.strip
        return min(config.threads, len(_parts(p, cut, config.threads))) * each

    def estimate_plain(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return the time of the passes over tiles, and of transforming rows of the image, more than once at edges."""
        p, cut, size = problem, _cut(problem, _size(problem, config)), item_bytes(problem.dtype)
        instruction = 2 * machine.vector_bytes / size / _rates.peak(machine, size)
        passes = p.n * p.oh * -(-cut.tiles // cut.together) * -(-p.k // cut.lanes)
        work = passes * _pass(p.kh * p.c, cut.n, cut.m, cut.together)
        parts = len(_parts(p, cut, config.threads))
        window = (p.kh - 1) * p.dilations[0] + 1
        blocks = max(parts, p.n * -(-p.oh // cut.at_once))
        rows = p.n * p.oh * p.strides[0] + blocks * max(0, window - p.strides[0])
        work += rows * cut.tiles * _ENTERING * cut.n * -(-cut.room // cut.lanes)
        return _rates.shared(work * instruction, min(config.threads, machine.cores, parts))

    def prepare_plain(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Transform the filters in float64 and round them once."""
        p, cut, size = problem, _cut(problem, _size(problem, config)), item_bytes(problem.dtype)
        g = np.array(strided(cut.m, p.kw, p.strides[1]).g, np.float64)
        transformed = np.matmul(g, filters.astype(np.float64).transpose(0, 2, 1, 3))
        packed = aligned((-(-p.k // cut.lanes), p.kh, p.c, cut.n, cut.lanes), p.dtype)
        for block, values in enumerate(packed):
            k0 = min(block * cut.lanes, p.k - cut.lanes)
            values[...] = transformed[..., k0 : k0 + cut.lanes]
        parts = _parts(p, cut, config.threads)
        values = {
            "filters": packed, "bias": np.empty(0, p.dtype) if bias is None else np.array(bias), "pads": p.pads[::2],
            "strides": p.strides, "dilation": p.dilations[0], "stage": (cut.at_once, cut.strip),
            "streamed": streams(p.output_shape, size, cut.lanes, p.k, _CACHED_OUTPUT),
            "code": p.epilogue.code, "slope": p.epilogue.slope, "parts": parts,
        }  # fmt: skip
        make = functools.partial(compiled, cut.m, p.kw, p.strides[1], cut.together, cut.room, cut.lanes, size)
        return PackedKernel(make, p, values, len(parts), config.threads)


#: An output is written past the caches only if it is as large as the last of them, as ``implicit_gemm`` does.
_CACHED_OUTPUT = 1.0
_ENTERING = 2.2  # instructions of a vector for a point of a tile, its load and store included


def _pass(depth: int, n: int, m: int, together: int) -> float:
    """Return how many products' time a pass over so many tiles takes, for a vector of filters.

    Every point's filters are loaded once for all tiles; what narrow vectors multiply is loaded, too.
    """
    beside = 0.1 if registers() > 16 else 1.0
    return depth * n * (together + beside) + together * (0.8 * n + 2 * m) + 5
