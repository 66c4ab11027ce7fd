"""``depthwise``: every channel, or every few, have their own filters, so vectors lie along the channels.

A tile is a run of outputs along one row, a vector of channels each, summed in registers. For each row of the filter
that lies inside the image, every pixel under the tile is loaded once and multiplied with all the taps that meet it
(as in Zhang, Lo & Lu: High Performance Depthwise and Pointwise Convolutions on Mobile Devices, 2020). Channels are
the innermost loop, as they are in memory, and then come columns and rows: the image is walked once. One too wide for
that is walked in strips of columns, so that the rows a filter needs again stay in L2. Groups of a few channels share
vectors: a pixel's channels are spread so that each meets the lanes of all its group's filters. Under a dilated
filter, outputs share pixels with those a dilation away, so these make a tile. Where a 3x3 filter lies inside the
image, a tile may have two rows of outputs, which share half of the rows that they see. Rows outside the image are
skipped, columns outside it are read at the address of a vector of zeros: nothing is copied. Bias, residual and
activation are applied in registers.

Ends overlap: the last tile of a row and the last vector of a pixel are moved back until they fit, and do some outputs
again. A row shorter than a tile gets a shorter tile. So nothing outside the arrays is touched, and every vector is
whole.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort, item_bytes
from convdispatch.backends import _rates
from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._atomics import add
from convdispatch.backends._epilogue import RELU, RELU6, finish
from convdispatch.backends._jit import compilable, inlined
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._memory import aligned
from convdispatch.backends._packed import PackedBackend
from convdispatch.backends._slide import slide, slide_found
from convdispatch.backends._threads import grid
from convdispatch.backends._tile import add_to_all, add_to_each, clamp, store, zeros
from convdispatch.backends._vector import hold, registers, vector_bytes
from convdispatch.backends._windows import taps_inside
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine, current
from convdispatch.problem import Problem, dtype_of

#: Outputs of a tile, by the number of vector registers: sums, one row of taps and an input fit in them.
_TILES = {32: (14, 7, 4), 16: (7, 4)}
#: Tiles for rows that are shorter than those.
_SHORTER = (7, 4, 1)
#: Rows of outputs that share the pixels they see, and the columns of such a tile, by the number of vector registers:
#: sums, all taps of a filter and an input fit in them.
_HIGH_TILES = {32: ((2, 7),), 16: ()}
#: Taps of a row that are done together, held in registers, if the filter's width is a multiple of theirs.
_TAPS = (7, 5, 3)
#: Filters of so many rows and columns, one a channel, are done whole where they lie inside the image.
_DOWN = 3
_MOST_HIGH = 4
#: A filter up to this width that is no such multiple is done a row at a time, a wider one by taps.
_WIDEST = 31
#: Channels of a group, each written out as code.
_CHANNELS = 16
#: The rows of a strip that a filter needs again stay in L2 up to this size.
_CACHED_ROWS = 256 << 10


@compilable
def _find(pixels, first, column, width, rows, zero, steps):  # type: ignore[no-untyped-def]
    """Fill the table with the addresses of the pixels under a tile, of zeros where they are beside the image.

    The table is ``[rows, chunks of taps, pixels under a tile]``. Return how many runs of pixels there are.
    """
    row_step, chunks, chunk_columns, span, jump, pixel = steps
    at = 0
    for _ in range(rows):
        for j in range(chunks):
            for p in range(span):
                moved = j * chunk_columns + p * jump
                pixels[at] = first + moved * pixel if 0 <= column + moved < width else zero
                at += 1
        first += row_step
    return rows * chunks


@compilable
def _place(outputs, first, down, across):  # type: ignore[no-untyped-def]
    """Fill a table with the addresses of a tile's outputs, ``down`` and ``across`` bytes apart."""
    for i in range(outputs.shape[0]):
        for j in range(outputs.shape[1]):
            outputs[i, j] = first + i * down + j * across


@inlined
def _biased(count, bias, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Return ``count`` sums that begin as the bias at an address."""
    return add_to_all(zeros(count, 1, lanes, itemsize), count, bias)


@inlined
def _leave(sums, count, outputs, offset, adds, beside, low, most):  # type: ignore[no-untyped-def]
    """Store sums brought between two limits; with the residual ``beside`` bytes away, if there is one."""
    if adds:
        sums = add_to_each(sums, count, outputs, beside + offset)
    store(clamp(sums, low, most), count, outputs, offset)


@compilable
def _spread(out, residual, bias, scratch, where, k0, member):  # type: ignore[no-untyped-def]
    """Store the sums of one of several filters of each channel, value by value, with bias and residual."""
    outputs, lanes = scratch.shape
    for o in range(outputs):
        ow = where[0] + o * where[1]
        for lane in range(lanes):
            k = (k0 + lane) * member[0] + member[1]
            total = scratch[o, lane]
            if bias.size:
                total += bias[k]
            if residual.size:
                total += residual[ow, k]
            out[ow, k] = total


#: ``filters`` is ``[blocks, members, KH, KW, C // groups, lanes]``, a block being what a vector of outputs needs.
_ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(6), bias=array_of(1), residual=array_of(4), out=array_of(4), zero=array_of(1),
    window=integers_of(8), strip=INTEGER, code=INTEGER, slope=FLOAT, parts=array_of(2, "int64"),
)  # fmt: skip
unpack = _ARGUMENTS.unpack
_DONE_AT = 8 * _ARGUMENTS.done_at


@functools.cache
def _compiled(  # noqa: C901, PLR0915
    tile: int, high: int, down: int, taps: int, stride: int, dilated: bool, group_c: int, group_k: int, lanes: int,
    itemsize: int,
) -> CompiledKernel:  # fmt: skip
    """Return the kernel of one tile: ``taps`` of a filter's row at a time, whose outputs are ``stride`` pixels apart.

    With one tap at a time any stride and dilation will do, since then outputs share no pixel. A vector holds whole
    groups of ``group_k`` filters, each group with ``group_c`` channels; or, if both are 1, one filter each of
    neighbouring channels. If ``down`` is not 0, that many rows of a filter are done together where all lie inside, and
    for ``high`` rows of outputs, where these are a stride apart in the image.
    What is no dilation is compiled apart: with pixels a variable number of columns apart, the compiler keeps more
    differences of addresses than there are registers, and the kernel takes half as long again.
    """
    span, all_sums = (tile - 1) * stride + taps, high * tile

    def convolve(arguments, job):  # type: ignore[no-untyped-def]  # noqa: C901, PLR0912, PLR0915
        """Compute some rows of all images and some columns of these, as the job says."""
        x, w, bias, residual, out, zero, window, strip, code, slope, parts = unpack(arguments, itemsize)
        first_row, last_row, first_column, last_column = parts[job]
        kh, kw, top, left, sh, sw, dh, dw = window
        height, width, channels = x.shape[1:]
        rows, columns, filters = out.shape[1:]
        blocks, members = w.shape[:2]
        pixel, result, tap_bytes = channels * itemsize, filters * itemsize, group_c * lanes * itemsize
        apart = dw if dilated else 1
        jump, phases = apart if taps > 1 else sw, min(apart, columns)
        line, reach = width * pixel, (span - 1) * jump + (kw - taps) * dw
        chunk, filter_bytes = dw * taps * pixel, kh * kw * tap_bytes
        adds, more = residual.size > 0, residual.ctypes.data - out.ctypes.data
        # Without a bias, vectors of zeros: a step of 0 stays with the first.
        start, start_step = (bias.ctypes.data, itemsize) if bias.size else (zero.ctypes.data, 0)
        low, most = (0.0 if RELU <= code <= RELU6 else -math.inf), (6.0 if code == RELU6 else math.inf)
        finishes = code > RELU6 or (code > 0 and members > 1)
        pixels = np.empty(kh * (kw // taps) * span, np.int64)
        scratch = np.empty((tile, lanes), out.dtype)
        outputs = np.empty((high, tile), np.int64)
        for begin in range(first_column, last_column, strip):
            tiles = (min(strip, last_column - begin) + tile * apart - 1) // (tile * apart)
            row = first_row
            while row < last_row:
                n, oh = divmod(row, rows)
                above = oh * sh - top
                fits = above >= 0 and above + (high - 1) * sh + kh <= height and oh + high <= rows
                together = high if fits and row + high <= last_row else 1
                for task in range(tiles * phases):
                    number, phase = divmod(task, phases)
                    o0 = min(begin // apart + number * tile, (last_column - phase + apart - 1) // apart - tile)
                    ow = phase + o0 * apart
                    column = ow * sw - left
                    inside = column >= 0 and column + reach < width
                    shared = inside and together > 1
                    if shared:
                        _place(outputs, out.ctypes.data + (row * columns + ow) * result, columns * result, result)
                        to = outputs.ctypes.data
                        from_row = x.ctypes.data + ((n * height + above) * width + column) * pixel
                        for block in range(blocks):
                            k0 = min(block * lanes, filters - lanes)
                            here, packed = from_row + k0 * itemsize, w.ctypes.data + block * filter_bytes
                            sums = _biased(all_sums, start + k0 * start_step, lanes, itemsize)
                            sums = slide(sums, high, down, taps, stride, 1, 1, here, line, pixel, packed)
                            _leave(sums, all_sums, to, k0 * itemsize, adds, more, low, most)
                    for upper in range(0 if shared else together):
                        from_top = above + upper * sh
                        first, last = taps_inside(from_top, dh, kh, height)
                        places = (np.int64(out.ctypes.data) + ((row + upper) * columns + ow) * result, apart * result)
                        from_row = x.ctypes.data + ((n * height + from_top + first * dh) * width + column) * pixel
                        weights = w.ctypes.data + first * kw * tap_bytes
                        if members == 1 and inside:
                            for block in range(blocks):
                                k0 = min(block * lanes, filters - lanes)
                                here = from_row + k0 // group_k * group_c * itemsize
                                packed = weights + block * filter_bytes
                                sums = _biased(tile, start + k0 * start_step, lanes, itemsize)
                                if last - first == down:
                                    sums = slide(
                                        sums, 1, down, taps, stride, group_c, group_k, here, dh * line, jump * pixel,
                                        packed,
                                    )  # fmt: skip
                                else:
                                    for _ in range(first, last):
                                        for j in range(kw // taps):
                                            at, taps_at = here + j * chunk, packed + j * taps * tap_bytes
                                            sums = slide(
                                                sums, 1, 1, taps, stride, group_c, group_k, at, 0, jump * pixel, taps_at
                                            )
                                        here += dh * line
                                        packed += kw * tap_bytes
                                _leave(sums, tile, places, k0 * itemsize, adds, more, low, most)
                            continue
                        found = _find(pixels, from_row, column, width, last - first, zero.ctypes.data, (
                            dh * line, kw // taps, taps * dw, span, jump, pixel))  # fmt: skip
                        for block in range(blocks):
                            k0 = min(block * lanes, filters // members - lanes)
                            offset = k0 // group_k * group_c * itemsize
                            for member in range(members):
                                packed = weights + (block * members + member) * filter_bytes
                                sums = zeros(tile, 1, lanes, itemsize)
                                if members == 1:
                                    sums = add_to_all(sums, tile, start + k0 * start_step)
                                for i in range(found):
                                    sums = slide_found(
                                        sums, taps, stride, group_c, group_k, pixels.ctypes.data + i * span * 8,
                                        offset, packed + i * taps * tap_bytes,
                                    )  # fmt: skip
                                if members == 1:
                                    _leave(sums, tile, places, k0 * itemsize, adds, more, low, most)
                                else:
                                    store(sums, tile, (np.int64(scratch.ctypes.data), lanes * itemsize), 0)
                                    added = residual[n, oh + upper] if adds else residual.reshape(0, 0)
                                    _spread(
                                        out[n, oh + upper], added, bias, scratch, (ow, apart), k0, (members, member)
                                    )
                    if finishes:
                        for upper in range(together):
                            for o in range(tile):
                                finish(out[n, oh + upper, ow + o * apart], code, slope)
                row += together
        hold(pixels), hold(outputs)
        add(arguments + _DONE_AT, 1)

    return CompiledKernel(convolve, _ARGUMENTS)


class Depthwise(PackedBackend):
    """Vectors along the channels, each of a group of few or of its own; any filter, stride, dilation and padding."""

    name = "depthwise"
    version = 7

    def rejects_plain(self, problem: Problem) -> str | None:
        """Return None, or why the problem is not depthwise, or that integers are missing."""
        if problem.groups == 1:
            return "it wants groups, and there is one for all"
        if not _shares_vectors(problem) and problem.group_c != 1:
            return f"groups of {problem.group_c} channels and {problem.group_k} filters do not share vectors well"
        return None

    def configs_plain(self, problem: Problem, effort: Effort) -> Sequence[Config]:  # noqa: ARG002  # they are few
        """Return tiles, the one with the smallest estimate first."""
        here = current()
        tiles = _TILES[registers()]
        fit = [columns for columns in tiles if columns == _fitting(problem, columns)] or tiles[-1:]
        choices = [Config(columns=columns) for columns in fit]
        high = [Config(columns=columns, rows=rows) for rows, columns in _HIGH_TILES[registers()]]
        choices += [config for config in high if _fits(problem, config)]
        return sorted(choices, key=lambda config: self.estimate_plain(problem, config, here))

    def workspace_plain(self, problem: Problem, config: Config) -> int:
        """Return the bytes of each thread's addresses, one for each pixel under a tile and chunk of taps, and tile."""
        tile = _fitting(problem, _tile(config))
        taps, stride = _taps(problem, tile)
        addresses = problem.kh * (problem.kw // taps) * ((tile - 1) * stride + taps) + _high(problem, config) * tile
        return config.threads * (8 * addresses + tile * vector_bytes())

    def estimate_plain(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return the time of products, loads and stores by tile, or of the traffic if that takes longer."""
        p, tile, high = problem, _fitting(problem, _tile(config)), _high(problem, config)
        lanes, size = _lanes(p, machine.vector_bytes), item_bytes(p.dtype)
        tiles = p.n * p.oh * -(-p.ow // tile) * -(-p.k // lanes)
        taps, stride = _taps(p, tile)
        loads: float = p.kw // taps * ((tile - 1) * stride + 2 * taps)
        loads *= ((high - 1) * p.strides[0] + p.kh) / (high * p.kh)
        row = _FMA_SECONDS_PER_BYTE * lanes * size * tile * p.kw + _LOAD_SECONDS * loads
        row *= 1 if p.group_c == 1 else 0.75 * p.group_c
        beside = taps * p.group_c + 2  # a row of taps, a pixel, and what that is spread to
        if p.group_c > 1 and tile + beside > registers() >= _TILES[registers()][-1] + beside:
            row *= _SPILLED
        elif p.group_c > 3 and tile > _TILES[registers()][1]:
            row *= _CROWDED
        seconds = tiles * (row * _rows_inside(p) + _TILE_SECONDS / high)
        if not _shares_vectors(p) or p.epilogue.code > RELU6:
            seconds += tiles * tile * lanes * (_VALUE_SECONDS if p.epilogue.code <= RELU6 else 3 * _VALUE_SECONDS)
        used = min(config.threads, machine.cores, math.prod(_cut(p, tile, config.threads)))
        traffic = (math.prod(p.input_shape) + math.prod(p.output_shape)) * size
        missed = max(0, traffic - machine.caches[2] // 2) / _MEMORY_BYTES_PER_SECOND
        return _rates.shared(seconds + missed, used, call=3e-6)

    def prepare_plain(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Pack the filters by vectors of channels; compile for the tile if that has not been done."""
        p, tile = problem, _fitting(problem, _tile(config))
        if reason := self.rejects_plain(p):  # a kernel that goes by addresses must not be wrong about shapes
            raise ArgumentError(f"depthwise cannot do {p}: {reason}")
        lanes = _lanes(p, vector_bytes())
        members = 1 if _shares_vectors(p) else p.group_k
        by_member = filters.reshape(p.kh, p.kw, p.group_c, p.k // members, members).transpose(4, 0, 1, 2, 3)
        packed = aligned((-(-p.k // (members * lanes)), members, p.kh, p.kw, p.group_c, lanes), p.dtype)
        for block, vectors in enumerate(packed):
            k0 = min(block * lanes, p.k // members - lanes)
            vectors[...] = by_member[..., k0 : k0 + lanes]
        kept = np.empty(0, dtype_of(p.dtype)) if bias is None else np.array(bias)
        parts = _jobs(p, tile, config.threads)
        values = {
            "filters": packed, "bias": kept, "zero": aligned((p.c + 2 * lanes,), p.dtype),
            "window": (p.kh, p.kw, p.pads[0], p.pads[2], *p.strides, *p.dilations), "strip": _strip(p, tile),
            "code": p.epilogue.code, "slope": p.epilogue.slope, "parts": parts,
        }  # fmt: skip
        return PackedKernel(
            functools.partial(_kernel_of, p, tile, _high(p, config), lanes), p, values, len(parts), config.threads
        )


_PARTS = 2  # jobs a thread, so that one that comes late finds work left
_ROWS = 2  # of a job at least, or jobs are too uneven
_FMA_SECONDS_PER_BYTE = 4.3e-12  # of a vector
_LOAD_SECONDS = 2e-10
_SPILLED = 1.6  # a tile and the filters of several channels do not all stay in registers, as a shorter tile's do
_CROWDED = 1.3  # they do, but nothing else does
_TILE_SECONDS = 15e-9
_VALUE_SECONDS = 1.5e-9  # of an output that is finished by itself
_MEMORY_BYTES_PER_SECOND = 8e9


def _tile(config: Config) -> int:
    choices = _TILES[registers()]
    tile = config.integer("columns", choices[0])
    if not 1 <= tile <= 2 * choices[0]:
        raise ArgumentError(
            f"config columns of depthwise must be sums that fit in registers, such as "
            f"{' or '.join(map(str, choices))}; got {tile}"
        )
    return tile


def _high(problem: Problem, config: Config) -> int:
    """Return the rows of outputs of a tile."""
    rows = config.integer("rows", 1)
    if not 1 <= rows <= _MOST_HIGH:
        raise ArgumentError(f"config rows of depthwise must be 1 to {_MOST_HIGH}; got {rows}")
    return rows if _fits(problem, config) else 1


def _fits(problem: Problem, config: Config) -> bool:
    """Return whether a problem has tiles of so many rows and columns, all of whose windows lie inside the image."""
    p, rows, columns = problem, config.integer("rows", 1), _tile(config)
    return (
        p.group_k == 1 and p.strides[0] == p.strides[1] and p.dilations == (1, 1) and _done_whole(p, columns)
        and (rows - 1) * p.strides[0] + p.kh <= p.h and (columns - 1) * p.strides[1] + p.kw <= p.w
    )  # fmt: skip


def _fitting(problem: Problem, tile: int) -> int:
    """Return the tile, or a shorter one, so that it is no longer than the shortest run of outputs that share pixels."""
    least = max(1, problem.ow // problem.dilations[1])
    return next(length for length in (tile, *_SHORTER) if length <= least)


def _taps(problem: Problem, tile: int) -> tuple[int, int]:
    """Return the taps done together, and the stride between outputs among the pixels they share.

    A single output shares none: its sum waits for itself, tap by tap, however its taps are loaded.
    """
    p, stride = problem, problem.strides[1]
    if tile == 1 or stride > 2 or (stride == 2 and p.dilations[1] > 1):
        return 1, 1
    wide = p.kw if p.kw <= _WIDEST else 1
    taps = next((taps for taps in _TAPS if p.kw % taps == 0), wide)
    return taps, stride if taps > 1 else 1


def _done_whole(problem: Problem, tile: int) -> bool:
    """Return whether all rows of a filter are done together, where they lie inside the image."""
    p = problem
    return p.kh == p.kw == _taps(p, tile)[0] == _DOWN and (p.group_c == p.group_k == 1 or not _shares_vectors(p))


def _kernel_of(problem: Problem, tile: int, high: int, lanes: int) -> CompiledKernel:
    taps, stride = _taps(problem, tile)
    dilated = taps > 1 and problem.dilations[1] > 1
    group = (problem.group_c, problem.group_k) if _shares_vectors(problem) else (1, 1)
    down = _DOWN if _done_whole(problem, tile) else 0
    return _compiled(tile, high, down, taps, stride, dilated, *group, lanes, item_bytes(problem.dtype))


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


def _whole_tiles(problem: Problem, tile: int) -> int:
    """Return how many tiles of all phases a row has, at least one; what is less than a tile is moved back."""
    return max(1, problem.ow // (tile * problem.dilations[1]))


def _cut(problem: Problem, tile: int, threads: int) -> tuple[int, int]:
    """Return into how many pieces rows, of all images, and columns are cut.

    Rows are shared out; or columns, by whole tiles, if there are too few rows. Channels are not: every pixel would have
    a line of cache that two threads write.
    """
    rows, tiles = problem.n * problem.oh, _whole_tiles(problem, tile)
    jobs = 1 if threads == 1 else _PARTS * threads
    by_columns = rows < _ROWS * jobs and tiles > rows
    return (1, min(jobs, tiles)) if by_columns else (max(1, min(jobs, rows)), 1)


def _jobs(problem: Problem, tile: int, threads: int) -> Array:
    """Return jobs, each some rows of all images and some columns of these: where they begin and end."""
    p, whole, tiles = problem, tile * problem.dilations[1], _whole_tiles(problem, tile)
    down, across = _cut(p, tile, threads)
    parts = grid((p.n * p.oh, down), (tiles, across)).copy()
    parts[:, 2:] *= whole
    parts[parts[:, 3] == tiles * whole, 3] = p.ow  # what is less than a tile is moved back, but not into another job
    return parts


def _strip(problem: Problem, tile: int) -> int:
    """Return how many columns of output are walked down together: whole tiles."""
    p = problem
    whole = tile * p.dilations[1]
    return max(1, _CACHED_ROWS // (p.kh * p.strides[1] * p.c * item_bytes(p.dtype) * whole)) * whole
