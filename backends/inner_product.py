"""``inner_product``: few filters on many channels, as last layers of networks have them.

Elsewhere a vector holds the sums of some filters, and with three of them most of it is empty. Here each sum is a vector
by itself, of products along the channels, which lie side by side in memory; its lanes are added in the end. A tile is
some pixels times all filters, so that what is loaded is used several times; with one filter or two, it slides along a
row, and uses what is loaded for all taps that see it.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort, item_bytes
from convdispatch.backends import _rates
from convdispatch.backends._activation import unclamped
from convdispatch.backends._inner_product import compiled
from convdispatch.backends._jobs import grid, pieces, too_many
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._packed import PackedBackend, flat
from convdispatch.backends._vector import registers, vector_bytes
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine, current
from convdispatch.memory import aligned
from convdispatch.problem import Problem, dtype_of

#: Sums of a tile at most, by the number of vector registers, and of the other tiles that are tried.
_SUMS = {32: (24, 16), 16: (12, 8)}
#: From this part of a vector's lanes on, filters fill it well enough by themselves.
_FEW = 0.75
#: With so many filters, tiles may slide: with more, there are enough products for each load.
_FEW_FILTERS = 2
#: Bytes of the rows under a strip of tiles: a second-level cache holds them until the next line needs them again.
_CACHED_ROWS = 256 << 10
#: Most bytes of a tile's window that are copied at the border: only huge strides and dilations have larger ones.
_WINDOW = 8 << 20


def _run(problem: Problem) -> tuple[int, int]:
    """Return how many runs of values there are under a row of taps, and the values of one."""
    p = problem
    return (1, p.kw * p.c) if p.dilations[1] == 1 else (p.kw, p.c)


def _slides(problem: Problem, config: Config) -> int:
    """Return over how many taps of a row tiles slide: all, or 0 where they do not."""
    asked = config.get("slides", False)
    if not isinstance(asked, bool) or (asked and not _may_slide(problem)):
        raise ArgumentError(
            f"config slides of inner_product is for several taps of a row, no dilation, and channels that fill whole "
            f"vectors; got {asked!r} for {problem}"
        )
    return problem.kw if asked else 0


def _may_slide(problem: Problem) -> bool:
    p, lanes = problem, vector_bytes() // item_bytes(problem.dtype)
    return p.kw > 1 and p.dilations[1] == 1 and p.c % lanes == 0


def _pixels(problem: Problem, config: Config) -> int:
    """Return the pixels of a tile."""
    pixels, most = config.integer("pixels", 1), _SUMS[registers()][0]
    if not 1 <= pixels <= most:
        raise ArgumentError(f"config pixels of inner_product must be 1 to {most}; got {pixels}")
    return min(pixels, max(1, problem.ow), _most_pixels(problem))


def _window(problem: Problem, pixels: int) -> int:
    """Return the bytes of what so many pixels of a tile see, which is copied at the border."""
    p = problem
    reach = (pixels - 1) * p.strides[1] + (p.kw - 1) * p.dilations[1] + 1
    return p.kh * reach * p.c * item_bytes(p.dtype) if any(p.pads) else 0


def _most_pixels(problem: Problem) -> int:
    """Return the most pixels of a tile whose window may be copied; 1 at least."""
    another = _window(problem, 2) - _window(problem, 1)
    return 1 + max(0, _WINDOW - _window(problem, 1)) // another if another else problem.ow


@functools.lru_cache(maxsize=4096)
def _cut(problem: Problem, pixels: int, threads: int) -> tuple[int, int, int, int]:
    """Return the lines of output, the tiles of one, and into how many pieces each is cut."""
    p = problem
    lines, tiles, jobs = p.n * p.oh, -(-p.ow // pixels), pieces(p.flops / _FLOPS, threads)
    rows = p.kh * pixels * p.strides[1] * p.c * item_bytes(p.dtype)
    strips = 1 if p.kh == 1 else -(-tiles // max(1, _CACHED_ROWS // rows))
    down = max(1, min(lines, jobs))
    return lines, tiles, down, min(tiles, max(strips, -(-jobs // down)))


class InnerProduct(PackedBackend):
    """Sums along the channels, a vector each; few filters of many channels, any stride, dilation and padding."""

    name = "inner_product"
    packing_cost = (4e-5, 1e-9)

    def rejects_plain(self, problem: Problem) -> str | None:
        """Return None, or that there are groups, too many filters, or too few values under a row of taps."""
        p, lanes = problem, vector_bytes() // item_bytes(problem.dtype)
        if p.groups > 1:
            return "it has one group for all channels"
        if p.k > _FEW * lanes:
            return f"it is for filters that do not fill a vector, up to {int(_FEW * lanes)} of them; here are {p.k}"
        if _run(p)[1] < lanes:
            return f"{_run(p)[1]} values side by side do not fill a vector of {lanes}"
        if _window(p, 1) > _WINDOW:
            return f"it copies what a tile sees at the border, {_window(p, 1)} bytes here"
        return too_many(p.n * p.oh * p.ow)

    def configs_plain(self, problem: Problem, effort: Effort) -> Sequence[Config]:  # noqa: ARG002  # they are few
        """Return tiles, the one with the smallest estimate first."""
        p, here = flat(problem), current()
        lengths = {min(max(1, sums // p.k), max(1, p.ow), _most_pixels(p)) for sums in _SUMS[registers()]}
        choices = [Config(pixels=length) for length in lengths]
        # Sums, the taps of all filters and an input fit in the registers.
        few = (length for length in lengths if (length + p.kw) * p.k < registers())
        if _may_slide(p) and p.k <= _FEW_FILTERS:
            choices += [Config(pixels=length, slides=True) for length in few]
        return sorted(choices, key=lambda config: self.estimate_plain(problem, config, here))

    def workspace_plain(self, problem: Problem, config: Config) -> int:
        """Return the bytes of each thread's window at the border."""
        p = flat(problem)
        return config.threads * _window(p, _pixels(p, config))

    def estimate_plain(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return the time of products or of what they load, of adding lanes, and of what comes from far caches."""
        p, size = flat(problem), item_bytes(problem.dtype)
        pixels, lanes, (runs, values) = _pixels(p, config), machine.vector_bytes // size, _run(p)
        taps = _slides(p, config)
        lines, tiles, down, strips = _cut(p, pixels, config.threads)
        products = lines * tiles * pixels * p.k * p.kh * runs * -(-values // lanes) * lanes
        seen = ((pixels - 1) * p.strides[1] + taps) / taps if taps else pixels
        filters = p.k * p.taps * size
        loads = (_UNALIGNED * seen + p.k * (1 if filters < machine.caches[0] else _FROM_L2)) / (pixels * p.k)
        seconds = 2 * products / _rates.peak(machine, size) * max(1, loads)
        seconds += lines * tiles * (_TILE_SECONDS + pixels * p.k * _SUM_SECONDS)
        seconds += _rates.activation_seconds(p, machine)
        traffic = max(0, math.prod(p.input_shape) * size - machine.caches[1]) / _BYTES_PER_SECOND
        return _rates.shared(max(seconds, traffic), min(config.threads, machine.cores, down * strips))

    def prepare_plain(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Pack the filters by runs; compile for the tile if that has not been done."""
        if reason := self.rejects_plain(problem):  # a kernel that goes by addresses must not be wrong about shapes
            raise ArgumentError(f"inner_product cannot do {problem}: {reason}")
        p, size = flat(problem), item_bytes(problem.dtype)
        pixels, lanes, (runs, values) = _pixels(p, config), vector_bytes() // size, _run(p)
        if taps := _slides(p, config):
            packed = aligned((p.kh, p.c // lanes, taps, p.k, lanes), p.dtype)
            packed[...] = filters.reshape(p.kh, taps, -1, lanes, p.k).transpose(0, 2, 1, 4, 3)
        else:
            packed = aligned((p.kh, runs, -(-values // lanes), p.k, lanes), p.dtype)
            filled = np.zeros((p.kh, runs, packed.shape[2] * lanes, p.k), dtype_of(p.dtype))
            filled[:, :, :values] = filters.reshape(p.kh, runs, values, p.k)
            packed[...] = filled.reshape(p.kh, runs, -1, lanes, p.k).transpose(0, 1, 2, 4, 3)
        repeated = aligned((0 if bias is None else -(-pixels * p.k // lanes) * lanes,), p.dtype)
        if bias is not None:
            repeated[: pixels * p.k] = np.tile(bias, pixels)
        lines, tiles, down, strips = _cut(p, pixels, config.threads)
        jobs = grid((lines, down), (tiles, strips))
        values_by_name = {
            "filters": packed, "bias": repeated, "pads": p.pads[::2], "strides": p.strides, "dilations": p.dilations,
            "window": (p.kw, values), "code": p.epilogue.code, "slope": p.epilogue.slope, "jobs": jobs,
        }  # fmt: skip
        slide = (taps, p.strides[1] if taps else 1)
        make = functools.partial(compiled, pixels, p.k, *slide, lanes, size, unclamped(p))
        return PackedKernel(make, p, values_by_name, len(jobs), config.threads)


_FLOPS = 1e11  # a second of a core, about, by which work is cut
_FROM_L2 = 2  # a load of a filter that L1 does not hold, beside one that it does
_UNALIGNED = 1.5  # vectors of a pixel that lie across two lines of cache take two loads, as many do
_TILE_SECONDS, _SUM_SECONDS = 1e-8, 8e-10
_BYTES_PER_SECOND = 3e10
