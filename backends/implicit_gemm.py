"""``implicit_gemm``: the matrix product of ``im2col``, with a patch matrix that is never made.

A tile of outputs, some pixels times some vectors of filters, is summed in registers while the kernel walks over the
taps, and reads the input where it lies. Where lines of output are long enough, the pixels of a tile are neighbours in
one, equally far apart (``_in_line``); else the kernel finds its inputs through a table of addresses (``_indirect``). So
every filter size, stride, dilation and padding will do, no patch matrix is written, and bias, residual and activation
are applied before a sum leaves its register.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort, Kernel, item_bytes
from convdispatch.backends import _in_line, _indirect, _pixel_panels, _rates
from convdispatch.backends._activation import unclamped
from convdispatch.backends._caches import in_last_caches, should_stream
from convdispatch.backends._jobs import even_grid, grid, pieces
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._packed import PackedBackend, flat
from convdispatch.backends._packing import by_blocks
from convdispatch.backends._register_tiles import (
    few_tiles,
    narrow_tiles,
    odd_tiles,
    pair_tiles,
    register_tile,
    register_tiles,
)
from convdispatch.backends._tile import AT_ONCE
from convdispatch.backends._vector import halves_are_free, vector_bytes, whole_units
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine
from convdispatch.memory import CACHE_LINE, aligned
from convdispatch.problem import Problem

#: Bytes of a job's input, and of its tables of addresses, that stay in a core's L2 cache; and of the input where
#: filters come from far caches, once for each job's input.
_CACHED_INPUT, _CACHED_INPUT_OF_FAR = 384 << 10, 512 << 10
_CACHED_TABLE = 96 << 10
#: Ranges of tiles: more would take longer to list than what they leave in the caches is worth.
_MOST_RANGES = 1 << 16
#: Tiles cut from a line overlap at its end. If they have more than so many times its pixels together, tiles are cut
#: from the list of all pixels; and also if windows at the border, copied for every block of filters, have more bytes.
_WASTE, _MOST_COPIED = 1.08, 16 << 10
#: In copies of lines, where a group's channels lie side by side, more waste is worth it.
_WASTE_OF_COPIED = 1.15
#: A padded image of so few channels and bytes is copied with zeros around it, not window by window.
_FEW_CHANNELS, _SMALL_IMAGE = 8, 64 << 10
#: An output is written past the caches only if it is as large as the last of them. One of half that size takes 1.3 to
#: 1.5 times as long that way, however it is with what is written in other orders; a larger one as long either way.
_CACHED_OUTPUT = 1.0
#: Where input and output together are larger than it, smaller ones too, since the input drives them out: of so many
#: filters and more.
_CROWDED_OUTPUT, _MANY_FILTERS = 0.2, 64
#: Where input and output together have more than so many times the last cache, cache lines of the input are
#: prefetched: with few filters, where there is little to do meanwhile and the input must be most of it, and with many.
_CACHED_TRAFFIC = 0.8, 0.5
#: FLOP a second of a core, about, by which work is cut.
_FLOPS = 1.5e11
#: Tiles of a thread, if all have as many, from which on one more or less makes no difference.
_MANY_TILES = 32
#: Fewer sums than these wait for one another, unless a wider tile would waste more: with a single vector of filters.
_LEAST_SUMS = 8
#: With one pixel or two, these are enough: reading filters takes as long.
_FEW_SUMS = 4


@dataclass(frozen=True)
class _Form:
    """A register tile.

    Attributes:
        high, vectors: rows of sums, and the vectors of each.
        lanes: values of a vector.
        pixels: neighbours in one row, 1 or 2.
    """

    high: int
    vectors: int
    lanes: int
    pixels: int

    @property
    def rows(self) -> int:
        """Pixels of a tile."""
        return self.high * self.pixels

    @property
    def block(self) -> int:
        """Filters of a tile."""
        return self.vectors * self.lanes // self.pixels


def _is_turned(problem: Problem, config: Config) -> bool:
    """Return whether pixels and filters change places."""
    return _pixel_panels.suits(problem, _tile(config)[0])


@functools.lru_cache(maxsize=4096)
def _is_in_line(problem: Problem, rows: int) -> bool:
    """Return whether tiles are cut from lines of output: where that wastes little, and little is copied at borders."""
    p = problem
    wasted = -(-p.ow // rows) * rows / max(1, p.ow)
    if _is_staged(p):
        return rows <= p.ow and wasted <= _WASTE_OF_COPIED
    copied = _window(p, rows) if any(p.pads[2:]) else 0
    return rows <= p.ow and wasted <= _WASTE and copied <= _MOST_COPIED


def _window(problem: Problem, rows: int) -> int:
    """Return the bytes of the input under a tile of pixels."""
    p = problem
    return p.kh * ((rows - 1) * p.strides[1] + (p.kw - 1) * p.dilations[1] + 1) * p.c * item_bytes(p.dtype)


def _is_staged(problem: Problem) -> bool:
    """Return whether each group's channels are copied to where they lie side by side; or a small image, with zeros."""
    p = problem
    is_small = any(p.pads) and p.c <= _FEW_CHANNELS and p.h * p.w * p.c * item_bytes(p.dtype) <= _SMALL_IMAGE
    return not p.is_pointwise and (p.groups > 1 or is_small)


def _staged(problem: Problem, tiles: int, rows: int) -> int:
    """Return the bytes of the copy of a group's channels that so many tiles need."""
    p = problem
    lines = min(p.oh, tiles // -(-p.ow // rows) + 2)
    high = (lines - 1) * p.strides[0] + (p.kh - 1) * p.dilations[0] + 1
    wide = (p.ow - 1) * p.strides[1] + (p.kw - 1) * p.dilations[1] + 1
    return high * wide * p.group_c * item_bytes(p.dtype)


@functools.lru_cache(maxsize=4096)
def _cut(problem: Problem, rows: int, blocks: int, threads: int) -> tuple[int, int, int]:
    """Return the tiles, into how many ranges they are cut, and into how many the blocks of filters.

    A job takes one block of filters after another through its tiles, so that the block is in L1 and the tiles' input,
    read again for every block, in L2.
    """
    p, size = problem, item_bytes(problem.dtype)
    images, filters, cached = p.n * p.h * p.w * p.c * size, p.k * p.taps * size, _CACHED_INPUT
    if filters > _indirect.FAR:
        # Then it matters that what a stride leaves out takes no room; else, that pixels far apart want the same places.
        images = int(images * min(1, p.kh / p.strides[0]) * min(1, p.kw / p.strides[1]))
        cached = _CACHED_INPUT_OF_FAR
    tiles = p.n * p.oh * -(-p.ow // rows) if _is_in_line(p, rows) else -(-p.n * p.oh * p.ow // rows)
    most = max(1, min(cached // max(1, images // tiles), _CACHED_TABLE // ((2 + p.kh * p.kw) * rows * 8)))
    wanted = pieces(p.flops / _FLOPS, threads)
    down = -(-tiles // most)
    if down >= wanted or filters < images or blocks < threads:  # cut the larger of input and filters, if it can be cut
        down = max(down, wanted)
    down = min(tiles, _MOST_RANGES, -(-down // threads) * threads if down > 1 else 1)  # as many for each thread
    return tiles, down, min(blocks, -(-wanted // down))


def _jobs(problem: Problem, rows: int, blocks: int, threads: int) -> Array:
    """Return the parts of the work, each some tiles for some blocks of filters, as many for each thread."""
    tiles, down, across = _cut(problem, rows, blocks, threads)
    if down >= across:
        if tiles % threads == 0 or blocks == 1 or tiles > _MANY_TILES * threads:
            return grid((tiles, down), (blocks, across))
        return even_grid(tiles, blocks, threads, -(-down // threads) + 2)
    # A thread's share is some filters for all tiles.
    by_blocks = (
        grid((blocks, across), (tiles, down)) if down > 1 else even_grid(blocks, tiles, threads, across // threads)
    )
    return np.take(by_blocks, (2, 3, 0, 1), axis=1)


class ImplicitGemm(PackedBackend):
    """Tiles of outputs summed in registers, the input read where it lies; any filter, stride and padding."""

    name = "implicit_gemm"
    version = 19

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Config]:
        """Return tiles, the one with the smallest estimate first."""
        if _pixel_panels.suits(problem):
            turned = _pixel_panels.turned(problem)
            return self._ranked(turned, _whole_tiles(turned), effort)
        plain = self._plain(problem)
        choices = _choices(plain)
        if not self._is_plain(problem):
            # By bands it is not one line: pairs are to fill each line of the image, and a single one is cut.
            choices = [c for c in choices if "pixels" not in c or (plain.oh > 1 and _fits_pairs(plain, *_tile(c)))]
        return self._ranked(plain, choices, effort)

    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return the predicted seconds of a call, copies of pixels or conversions included."""
        if not _is_turned(problem, config):
            return super().estimate(problem, config, machine)
        copying = _pixel_panels.copied_bytes(problem) / _STAGED_BYTES_PER_SECOND / min(config.threads, machine.cores)
        return problem.n * self.estimate_plain(_pixel_panels.turned(problem), config, machine) + copying

    def workspace(self, problem: Problem, config: Config) -> int:
        """Return the bytes of scratch memory of a call."""
        if _is_turned(problem, config):
            return _pixel_panels.workspace(problem, _tile(config), config.threads)
        return super().workspace(problem, config)

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:
        """Pack the filters and return a kernel."""
        if _is_turned(problem, config):
            return _pixel_panels.PanelKernel(problem, filters[0, 0], bias, _tile(config), config.threads)
        return super().prepare(problem, filters, bias, config)

    def configs_plain(self, problem: Problem, effort: Effort) -> Sequence[Config]:
        """Return tiles, the one with the smallest estimate first."""
        return self._ranked(problem, _choices(problem), effort)

    def _ranked(self, problem: Problem, choices: Sequence[Config], effort: Effort) -> Sequence[Config]:
        return _rates.ranked(choices, functools.partial(self.estimate_plain, problem), effort, 4)

    def workspace_plain(self, problem: Problem, config: Config) -> int:
        """Return the bytes of each thread's table, or of a tile."""
        p, form = flat(problem), _form(problem, config)
        rows, block_bytes = form.rows, form.block * item_bytes(p.dtype)
        blocks = p.groups * -(-p.group_k * item_bytes(p.dtype) // block_bytes)
        tiles, down, across = _cut(p, rows, blocks, config.threads)
        each = -(-tiles // down) * (1 + rows * (2 + p.kh * p.kw) * 8)
        if _indirect.is_far(blocks * block_bytes * p.taps, -(-tiles // down)):
            each += -(-tiles // down) * rows * block_bytes
        if _is_in_line(p, rows):
            each = rows * block_bytes
            each += _staged(p, -(-tiles // down), rows) if _is_staged(p) else _window(p, rows)
        return min(config.threads, down * across) * each

    def estimate_plain(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return products, those with padding included, by what a tile loads for each; tables; filters' traffic."""
        return _seconds(flat(problem), _form(problem, config, machine.vector_bytes), config.threads, machine)

    def prepare_plain(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Pack the filters by blocks; compile for the tile if that has not been done."""
        p, form = flat(problem), _form(problem, config)
        tile, lanes, rows, pixels = (form.high, form.vectors), form.lanes, form.rows, form.pixels
        block = form.block * pixels
        grouped = filters.reshape(p.kh, p.kw, p.group_c, p.groups, p.group_k)
        packed = by_blocks(np.tile(grouped, pixels).transpose(3, 0, 1, 2, 4), block)
        added = np.empty(0, p.dtype)
        if bias is not None:
            added = by_blocks(np.tile(bias.reshape(p.groups, p.group_k), pixels), block)
        blocks = p.groups * packed.shape[1]
        jobs = _jobs(p, rows, blocks, config.threads)
        values = {
            "filters": packed, "bias": added.reshape(-1),
            "streamed": should_stream(p, block, pixels * p.group_k, _cached_part(p)),
            "code": p.epilogue.code, "slope": p.epilogue.slope, "jobs": jobs,
        }  # fmt: skip
        make = functools.partial(_indirect.compiled, *tile, lanes, item_bytes(p.dtype))
        if _is_in_line(p, rows):
            values |= {"pads": p.pads[::2], "strides": p.strides, "dilations": p.dilations}
            values["staged"], values["prefetched"] = int(_is_staged(p)), _prefetched(p, rows)
            activates = unclamped(p)
            make = functools.partial(_in_line.compiled, *tile, lanes, item_bytes(p.dtype), pixels, activates)
        else:
            values |= {
                "zero": aligned((p.c + lanes,), p.dtype), "groups": p.groups,
                "window": (p.kh, p.kw, p.pads[0], p.pads[2], *p.strides, *p.dilations),
            }  # fmt: skip
        return PackedKernel(make, p, values, len(jobs), config.threads)


@functools.lru_cache(maxsize=1024)
def _seconds(problem: Problem, form: _Form, threads: int, machine: Machine) -> float:
    """Return what is estimated; asked for twice, to rank tiles and for each number of threads."""
    p = problem
    rows, block, lanes, whole = form.rows, form.block, form.lanes, machine.vector_bytes // item_bytes(p.dtype)
    blocks = p.groups * -(-p.group_k // block)
    tiles, down, across = _cut(p, rows, blocks, threads)
    peak = _rates.peak(machine, item_bytes(p.dtype))
    a_load = _LOAD[whole_units()] * whole / lanes
    in_line = _is_in_line(p, rows)
    addresses = rows if rows > AT_ONCE and not in_line else 0  # from the table, for every step
    loads = 1 + a_load * (rows + form.vectors + addresses) * lanes / (rows * block)
    loads *= _crowding(p, rows, machine)
    if lanes < whole:
        loads *= _NARROW if halves_are_free() else whole / lanes
    compute = 2 * tiles * rows * blocks * block * p.taps * _met(p, rows) / peak * loads
    if in_line:
        copied = _staged(p, -(-tiles // down), rows) * p.groups * down * across if _is_staged(p) else 0
        masked = p.groups * lanes / whole if p.group_k % block else 0  # the last block of each group
        finishing = blocks * _ROW_SECONDS + masked * _MASKED_SECONDS
        each = tiles * rows * finishing + copied / _STAGED_BYTES_PER_SECOND
    else:
        each = tiles * blocks * _TILE_SECONDS
        each += tiles * rows * (_PIXEL_SECONDS + _border(p) * p.kh * p.kw * _TAP_SECONDS)
    filters = blocks * block * p.taps * item_bytes(p.dtype)
    traffic = _rates.filter_seconds(filters, machine) * (down if filters > _KEPT_FILTERS else 1)
    used = min(threads, machine.cores, down * across)
    seconds = compute + each + traffic + _rates.activation_seconds(p, machine)
    return _rates.shared(seconds, used, efficiency=0.98)


def _cached_part(problem: Problem) -> float:
    """Return the part of the last cache that is left to outputs: less where the input alone drives them out."""
    return _CROWDED_OUTPUT if in_last_caches(problem) > 1 and problem.k >= _MANY_FILTERS else _CACHED_OUTPUT


def _prefetched(problem: Problem, rows: int) -> int:
    """Return how many cache lines are prefetched with each tile: of 1x1 layers whose input comes from memory."""
    p = problem
    plain, many = p.kh == p.kw == p.strides[1] == p.groups == 1, p.k >= _MANY_FILTERS
    if not plain or (p.c < p.k and not many) or in_last_caches(p) <= _CACHED_TRAFFIC[many]:
        return 0
    return -(-rows * p.c * item_bytes(p.dtype) // CACHE_LINE)


@functools.lru_cache(maxsize=4096)
def _met(problem: Problem, rows: int) -> float:
    """Return which part of the taps the tiles meet: those that all of a tile's pixels have outside are left out."""
    p = problem
    if not any(p.pads) or p.n * p.oh * p.ow == 0:
        return 1.0
    high = min(p.oh, 1 + (rows - 1) // p.ow)
    return _met_along(p, 0, high) * _met_along(p, 1, min(rows, p.ow))


@functools.lru_cache(maxsize=4096)
def _met_along(problem: Problem, axis: int, run: int) -> float:
    """Return which part of the taps along an axis meet some of so many neighbouring outputs."""
    p = problem
    size, out, taps = (p.h, p.w)[axis], (p.oh, p.ow)[axis], (p.kh, p.kw)[axis]
    stride, dilation, pads = p.strides[axis], p.dilations[axis], p.pads[2 * axis : 2 * axis + 2]
    runs = -(-out // run)
    before, after = (min(runs, -(-pad // (stride * run))) for pad in pads)  # runs with some outside
    if before + after == 0:
        return 1.0
    left_out = 0
    for number in {*range(before), *range(runs - after, runs)}:
        first = min(number * run, out - run) * stride - pads[0]
        last = first + (run - 1) * stride
        inside = min(taps, -(-(size - first) // dilation)) - max(0, -(last // dilation))
        left_out += taps - max(0, inside)
    return 1 - left_out / (runs * taps)


def _crowding(problem: Problem, rows: int, machine: Machine) -> float:
    """Return how many times longer a tile takes whose pixels want the same places of L1, as those 4 KiB apart do."""
    p = problem
    if _is_staged(p):
        return 1.0  # they are copied, side by side
    apart = p.strides[1] * p.c * item_bytes(p.dtype)
    return 1 + _CROWDED * max(0.0, rows / _rates.places(apart, machine) - 1) ** 2


#: What a load for each product would take of its time: otherwise, and with units for whole vectors.
_LOAD = 0.1, 0.03

#: To begin and finish a row of a tile; and to store one through a mask, which may cross a cache line.
_ROW_SECONDS, _MASKED_SECONDS = 1.2e-9, 3e-9

#: Of a tile that goes by a table of addresses; of finding one of its pixels, and a tap that may lie outside the image.
_TILE_SECONDS, _PIXEL_SECONDS, _TAP_SECONDS = 1.5e-8, 4e-9, 2e-9

_KEPT_FILTERS = 1 << 19  # bytes up to which they stay in a core's own caches from one range of tiles to the next

_NARROW = 1.1  # measured: there are more loads and instructions for as many products

_CROWDED = 0.65  # measured: 14 pixels in 8 places take 1.25 to 1.55 times as long, 10 no longer

_STAGED_BYTES_PER_SECOND = 1.2e10


def _choices(problem: Problem) -> list[Config]:
    """Return all tiles that suit a plain problem."""
    return _whole_tiles(problem) + _narrow_tiles(problem) + _tiles_of_pairs(flat(problem))


def _whole_tiles(problem: Problem) -> list[Config]:
    """Return the tiles that are no wider than a group's filters, and at least one."""
    lanes = vector_bytes() // item_bytes(problem.dtype)
    all_of_them = register_tiles()
    least = min(vectors for _, vectors in all_of_them)
    wide = -(-problem.group_k // lanes)
    usual = [tile for tile in all_of_them if tile[1] <= max(least, wide)]
    usual = [(rows, vectors) for rows, vectors in usual if wide == 1 or rows * vectors >= _LEAST_SUMS]
    few = few_tiles(problem.n * problem.oh * problem.ow)
    few = [tile for tile in few if min(wide, _FEW_SUMS) <= tile[1] <= max(2, 2 * wide - 1)]
    return [Config(rows=rows, vectors=vectors) for rows, vectors in few + odd_tiles(wide) + usual]


def _narrow_tiles(problem: Problem) -> list[Config]:
    """Return tiles of half vectors that hold a group's filters with fewer lanes to spare than whole vectors do."""
    whole = vector_bytes() // item_bytes(problem.dtype)
    lanes, filters = whole // 2, problem.group_k
    return [
        Config(rows=rows, vectors=vectors, lanes=lanes)
        for rows, vectors in narrow_tiles()
        if (vectors - 1) * lanes < filters <= vectors * lanes < -(-filters // whole) * whole
    ]


def _tiles_of_pairs(problem: Problem) -> list[Config]:
    """Return tiles of pairs of pixels: their outputs fill vectors, where those of one leave half of one empty."""
    return [
        Config(rows=rows, vectors=vectors, pixels=2)
        for rows, vectors in pair_tiles()
        if _fits_pairs(problem, rows, vectors)
    ]


def _fits_pairs(problem: Problem, rows: int, vectors: int) -> bool:
    """Return whether a tile of pairs is filled by the filters, and lines by pairs."""
    p, lanes = problem, vector_bytes() // item_bytes(problem.dtype)
    return p.groups == 1 and p.ow % 2 == 0 and 2 * p.k == vectors * lanes and _is_in_line(p, 2 * rows)


@functools.lru_cache(maxsize=4096)
def _form(problem: Problem, config: Config, width: int = 0) -> _Form:
    """Return what a config asks for, where vectors have so many bytes; this machine's where 0.

    Raises:
        ArgumentError: if registers, vectors or lines of the output do not hold it.
    """
    (high, vectors), whole = _tile(config), (width or vector_bytes()) // item_bytes(problem.dtype)
    lanes, pixels = config.integer("lanes", whole), config.integer("pixels", 1)
    if width:
        lanes = min(lanes, whole)  # another machine's vectors may be narrower than what suits this one
    if lanes not in {whole, whole // 2}:
        raise ArgumentError(
            f"config lanes of implicit_gemm must be a vector's {whole} values or half of them, {whole // 2}; "
            f"got {lanes}"
        )
    if pixels != 1 and not (pixels == 2 and lanes == whole and _fits_pairs(flat(problem), high, vectors)):
        raise ArgumentError(
            "config pixels of implicit_gemm must be 1, or 2 for tiles of whole vectors that the filters of two pixels "
            f"fill, in lines of an even number of pixels, at least a tile's; got {config}"
        )
    return _Form(high, vectors, lanes, pixels)


@functools.lru_cache(maxsize=1024)
def _tile(config: Config) -> tuple[int, int]:
    return register_tile(config, "implicit_gemm", register_tiles())


def _border(problem: Problem) -> float:
    """Return about which part of the outputs has a window that reaches outside the image."""
    p = problem
    rows = min(1.0, (-(-p.pads[0] // p.strides[0]) + -(-p.pads[1] // p.strides[0])) / max(1, p.oh))
    columns = min(1.0, (-(-p.pads[2] // p.strides[1]) + -(-p.pads[3] // p.strides[1])) / max(1, p.ow))
    return 1 - (1 - rows) * (1 - columns)
