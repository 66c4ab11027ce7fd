"""The kernel of ``separable``: sums down a filter's column into scratch memory, and along its row of those."""

import functools
from dataclasses import dataclass

import numpy as np

from convdispatch.backends._activation import RELU6
from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_at, array_of, integers_of
from convdispatch.backends._jit import compilable, inlined
from convdispatch.backends._panels import panel_at
from convdispatch.backends._planes import fill_line, put_line, putting
from convdispatch.backends._put import put_tile
from convdispatch.backends._scratch import borrow, give_back
from convdispatch.backends._taps import chunks
from convdispatch.backends._tile import add_to_all, store, zeros
from convdispatch.backends._vector_activation import activate_all
from convdispatch.backends._weave import add_rows
from convdispatch.memory import CACHE_LINE


@dataclass(frozen=True)
class AlongTile:
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


#: ``down`` is ``[K, KH]``; ``along`` ``[K, KW]``, ordered as ``_Along`` has it; ``bias`` ``[K, a tile's columns]`` or
#: empty; ``width`` the most columns of results, and ``stage_width`` of those that are staged.
ARGUMENTS = Arguments(
    input=array_of(4), down=array_of(2), along=array_of(2), bias=array_of(2), residual=array_of(4), out=array_of(4),
    pads=integers_of(4), dilations=integers_of(2), shape=integers_of(2), counts=integers_of(3), width=INTEGER,
    stage_width=INTEGER, spacing=INTEGER, turns=INTEGER, planar=INTEGER, streamed=INTEGER, code=INTEGER, slope=FLOAT,
    jobs=array_of(2, "int64"), putter=INTEGER,
)  # fmt: skip
unpack = ARGUMENTS.unpack


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
def compiled(  # noqa: C901, PLR0915
    rows: int, vectors: int, taps: int, lanes: int, along: AlongTile, itemsize: int
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
            made, phase, top, bottom, left, right = panel_at(
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
                                    found = results[made, row + each * dh, left + ow :]
                                    activate_all(np.int64(found.ctypes.data), block, code, slope, itemsize)
                if staged:
                    for r in range(min(rows, bottom - oh)):
                        row = phase + (oh + r) * dh
                        put_line(
                            putter, results, added, made, row, left, right, stage, r, streamed, code, slope, itemsize,
                        )  # fmt: skip
        give_back(plane_at)
        return 1

    return CompiledKernel(convolve, ARGUMENTS, {"putter": putting(lanes, itemsize)})
