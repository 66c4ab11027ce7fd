"""The kernel of ``winograd``: transform some tiles, multiply, transform back, all while they are in cache.

A tile is n0 x n1 input pixels and m0 x m1 outputs, down and across, n = stride * (m - 1) + r for r taps. Where a filter
has one row or one column, so have tiles, and nothing is transformed along the other axis. A folded pixel is fold x fold
of the image's. The transformed values are ``[n0 * n1, tiles, C]``, C being the values of a pixel. For each of the
n0 * n1 points they are multiplied with the transformed filters ``[C, block]`` by the register tiles of
``implicit_gemm``, and the products ``[n0 * n1, tiles, block]`` of one block of filters are transformed back before the
next block's are made.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convdispatch.backends._activation import RELU6, activate
from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_at, array_of, integers_of
from convdispatch.backends._jit import compilable, inlined, outlined
from convdispatch.backends._lines import odd_lines
from convdispatch.backends._put import clamped, put_whole
from convdispatch.backends._scratch import borrow, give_back
from convdispatch.backends._tile import add_to_all, add_to_each, multiply_add, prefetch_filters, store, zeros
from convdispatch.backends._tiling import corner, following, outputs_inside, place_of, tiles_of_picture
from convdispatch.backends._transforms import leave_columns, report, transform_input, transform_output
from convdispatch.backends._tuples import add_doubts, load_apart, save_apart, separate
from convdispatch.backends._vector import clear, copy
from convdispatch.backends._vector_activation import activate_pixels
from convdispatch.backends._windows import copy_columns, copy_group
from convdispatch.memory import CACHE_LINE


@dataclass(frozen=True)
class Algorithm:
    """F(m, r), down and across.

    Attributes:
        m: outputs of a tile.
        r: taps of a filter.
        stride: of a tile's outputs among its inputs.
    """

    m: tuple[int, int]
    r: tuple[int, int]
    stride: int

    @functools.cached_property
    def n(self) -> tuple[int, int]:
        """A tile's inputs."""
        down, across = (self.stride * (m - 1) + r for m, r in zip(self.m, self.r, strict=True))
        return down, across


@dataclass(frozen=True)
class Passes:
    """What the products of a kernel are compiled for.

    Attributes:
        heights: rows of the register tiles, the highest first.
        vectors: of a row.
        share: groups that share a vector.
        prefetches: whether filters are prefetched a point ahead.
        lanes: values of a vector.
        itemsize: bytes of a value.
    """

    heights: tuple[int, ...]
    vectors: int
    share: int
    prefetches: bool
    lanes: int
    itemsize: int

    @property
    def step(self) -> int:
        """Bytes of a block's filters, or products, of one value that is summed."""
        return self.vectors * self.lanes * self.itemsize


@outlined
def _copy_patch(patch, x, where, steps, fold, group_c, high, wide, itemsize):  # type: ignore[no-untyped-def]
    """Copy a tile's high x wide pixels to a patch, zeros where they lie outside the image.

    ``patch`` is its address, and how many values apart its pixels are. ``where`` is the image's number, the first row
    and column, and the first channel; ``steps`` are from one row or column to the next. A pixel is ``group_c`` channels
    of each of ``fold`` columns.
    """
    image, top, left, channel = where
    _, _, height, width, channels = x
    pieces, span = wide, fold
    if steps[1] == fold and group_c == channels and patch[1] == fold * channels:  # a row is one run in both
        pieces, span = 1, wide * fold
    for i in range(high):
        ih = top + i * steps[0]
        for j in range(pieces):
            iw, target = left + j * steps[1], patch[0] + (i * wide + j) * patch[1] * itemsize
            if 0 <= ih < height:
                source = x[0] + (((image * height + ih) * width + iw) * channels + channel) * itemsize
                copy_columns(target, source, iw, span, width, group_c * itemsize)
            else:
                clear(target, span * group_c * itemsize)


def is_staged(groups: int, dilations: tuple[int, int]) -> bool:
    """Return whether tiles are read from a copy of a group's channels."""
    return groups > 1 and dilations == (1, 1)


@compilable
def stage_shape(
    tiles: int, shape: tuple[int, int], staged: bool, m: tuple[int, int], strides: tuple[int, int], n: tuple[int, int]
) -> tuple[int, int]:
    """Return most rows, and the columns, of the copy from which so many tiles of an image are read; 0 if there is none.

    ``shape`` is the output's rows and columns; ``m`` and ``n`` are a tile's outputs and inputs, down and across.
    """
    if not staged:
        return 0, 0
    down, across = -(-shape[0] // m[0]), -(-shape[1] // m[1])
    rows = min(down, (tiles - 1) // across + 2)
    return (rows - 1) * m[0] * strides[0] + n[0], (across - 1) * m[1] * strides[1] + n[1]


def _transforming(algorithm: Algorithm, lanes: int, itemsize: int) -> Any:
    """Return what transforms one vector of a tile's pixels."""
    (m0, m1), (r0, r1), (n0, n1) = algorithm.m, algorithm.r, algorithm.n
    stride, lane_bytes = algorithm.stride, lanes * itemsize

    @inlined
    def transform(tile, down, across, half, to, between):  # type: ignore[no-untyped-def]
        """Transform one vector of a tile's pixels, ``down`` and ``across`` bytes apart, to points ``between`` apart."""
        if n0 == 1:
            save_apart(to, between, transform_input(load_apart(tile, across, n1, lanes, itemsize), m1, r1, stride))
        elif n1 == 1:
            save_apart(to, between, transform_input(load_apart(tile, down, n0, lanes, itemsize), m0, r0, stride))
        else:
            for j in range(n1):
                column = load_apart(tile + j * across, down, n0, lanes, itemsize)
                save_apart(half + j * lane_bytes, n1 * lane_bytes, transform_input(column, m0, r0, stride))
            for i in range(n0):
                line = load_apart(half + i * n1 * lane_bytes, lane_bytes, n1, lanes, itemsize)
                save_apart(to + i * n1 * between, between, transform_input(line, m1, r1, stride))

    return transform


@functools.cache
def _entering(algorithm: Algorithm, lanes: int, itemsize: int) -> Any:
    """Return what transforms the tiles of images."""
    (m0, m1), (n0, n1), transform = algorithm.m, algorithm.n, _transforming(algorithm, lanes, itemsize)

    @compilable
    def enter(  # type: ignore[no-untyped-def]
        x, tiles, pads, strides, dilations, channel, runs, first, span, values, patch, half
    ):  # fmt: skip
        """Transform tiles of channels ``channel`` on into ``values [points, tiles * padded]``.

        Of ``values`` and ``patch [n0 * n1, a run's values]`` the address and the row's length are given, of ``half``,
        n0 * n1 vectors for what is under way, the address. ``x`` is the images' address and shape. The tiles are
        ``span[0]`` to ``span[1]``, counted from ``first``, which lies first in ``values``. A pixel is ``runs[0]`` rows
        of ``runs[1]`` neighbouring values. Each fills up vectors with what lies behind it, which counts for nothing.
        """
        fold, run = runs
        room, pixel = patch[1], x[4] * itemsize
        steps, between = (fold * dilations[0], fold * dilations[1]), values[1] * itemsize
        beyond = x[0] + x[1] * x[2] * x[3] * pixel
        place = place_of(first + span[0], tiles, dilations)
        for t in range(span[0], span[1]):
            image, (oh, ow) = place[0], corner(place, (m0, m1), dilations)
            place = following(place, tiles, dilations)
            for row in range(fold):
                top, left = oh * strides[0] - pads[0] + row, ow * strides[1] - pads[1]
                start = x[0] + ((image * x[2] + top) * x[3] + left) * pixel + channel * itemsize
                down, across = steps[0] * x[3] * pixel, steps[1] * pixel
                bottom, right = top + (n0 - 1) * steps[0], left + (n1 - 1) * steps[1] + fold
                last = start + (n0 - 1) * down + (n1 - 1) * across + room * itemsize
                if top < 0 or left < 0 or bottom >= x[2] or right > x[3] or last > beyond:
                    _copy_patch(patch, x, (image, top, left, channel), steps, fold, run // fold, n0, n1, itemsize)
                    start, down, across = patch[0], n1 * room * itemsize, room * itemsize
                for c in range(0, room, lanes):
                    to = values[0] + ((t * fold + row) * room + c) * itemsize
                    transform(start + c * itemsize, down, across, half, to, between)

    return enter


@functools.cache
def _entering_groups(algorithm: Algorithm, share: int, lanes: int, itemsize: int) -> Any:
    """Return what transforms the tiles of some channels, of a group or of ``share`` groups that fill a vector."""
    m0, n0, enter = algorithm.m[0], algorithm.n[0], _entering(algorithm, lanes, itemsize)

    @compilable
    def enter_group(  # type: ignore[no-untyped-def]
        x, stage, tiles, pads, strides, runs, channel, first, count, values, patch, half
    ):  # fmt: skip
        """Do as ``enter`` does for the channels of a group, image by image from a copy with zeros around it.

        Of a group's channels, only a few bytes of each pixel are read, more than twice, and pixels may lie apart so
        that all of these want the same places of L1. In ``stage [rows, columns, C // groups]`` they lie side by side,
        those of ``share`` groups that fill a vector in turn.
        """
        rows, columns, group_c = stage.shape
        begin = np.int64(0)  # a literal would make for another `enter`; those below make for one that is a tenth faster
        while begin < count:
            image, _, _, i, _ = place_of(first + begin, tiles, (1, 1))
            end = min(count, (image + 1) * tiles[0] * tiles[1] - first)
            oh, last = i * m0, place_of(first + end - 1, tiles, (1, 1))[3] * m0
            where = image, oh * strides[0] - pads[0], -pads[1]
            copy_group(stage, x, where, channel, (last - oh) * strides[0] + n0, share, lanes, itemsize)
            size = rows * columns * group_c * itemsize
            here = (np.int64(stage.ctypes.data) - image * size, image + 1, rows, columns, group_c)
            enter(
                here, tiles, (oh * strides[0], 0), strides, (1, 1), 0, runs, first, (begin, end), values, patch, half
            )  # fmt: skip
            begin = end

    return enter_group


def _pass(form: Passes, rows: int) -> Any:
    """Return what makes a pass by register tiles of so many rows."""
    vectors, share, prefetches, lanes, itemsize, step = (
        form.vectors, form.share, form.prefetches, form.lanes, form.itemsize, form.step
    )  # fmt: skip

    @inlined
    def make(inputs, weights, point_bytes, runs, outputs):  # type: ignore[no-untyped-def]
        """Store the products of ``rows`` tiles at one point, whose values and products lie as ``_tile`` tells.

        Of each tile, ``runs[0]`` times ``runs[1]`` values count, ``share`` at a time; each run fills up vectors. The
        filters of the next point, prefetched meanwhile or not, are ``point_bytes`` further.
        """
        sums, room = zeros(rows, vectors, lanes, itemsize), -(-runs[1] // lanes) * lanes
        for run in range(runs[0]):
            for c in range(0, runs[1], share):
                sums = multiply_add(sums, rows, inputs, (run * room + c) * itemsize, weights, share)
                if prefetches:
                    prefetch_filters(sums, rows, weights + point_bytes)
                weights += step
        store(sums, rows, outputs, 0)

    return make


def _passes(form: Passes, heights: Sequence[int]) -> Any:
    """Return what makes a pass for so many tiles by the lowest register tile that holds them, of so many rows."""
    rows, *lower = heights
    make_highest = _pass(form, rows)
    if not lower:

        @inlined
        def make_lowest(_, inputs, weights, point_bytes, runs, outputs):  # type: ignore[no-untyped-def]
            make_highest(inputs, weights, point_bytes, runs, outputs)

        return make_lowest
    less, make_lower = lower[0], _passes(form, lower)

    @inlined
    def make(count, inputs, weights, point_bytes, runs, outputs):  # type: ignore[no-untyped-def]
        if count > less:
            make_highest(inputs, weights, point_bytes, runs, outputs)
        else:
            make_lower(count, inputs, weights, point_bytes, runs, outputs)

    return make


@functools.cache
def _multiplier(form: Passes) -> Any:
    """Return what multiplies."""
    most, step, make, lanes, itemsize = (
        form.heights[0], form.step, _passes(form, form.heights), form.lanes, form.itemsize
    )  # fmt: skip

    @compilable
    def multiply(values, count, packed, point_bytes, runs, products, points):  # type: ignore[no-untyped-def]
        """Store ``values [points, count * padded] @ packed [points, values that are summed, block]``.

        A pixel is ``runs[0]`` times ``runs[1]`` values. The tiles are shared out evenly among passes. What a register
        tile is too high is products of the next tiles, or of what lies behind the last.
        """
        padded = runs[0] * -(-runs[1] // lanes) * lanes * itemsize
        passes = -(-count // most)
        each, longer = count // passes, count % passes  # here, since a division takes as long as some steps of a pass
        gap, gap_left = values[1] * itemsize - count * padded, products[1] * itemsize - count * step
        entered, left, number = values[0], products[0], 0
        for _ in range(points * passes):  # a point's filters come from a far cache once, and stay for its other passes
            now = each + (number < longer)
            make(now, (entered, padded), packed, point_bytes, runs, (left, step))
            entered, left, number = entered + now * padded, left + now * step, number + 1
            if number == passes:
                entered, left, number, packed = entered + gap, left + gap_left, 0, packed + point_bytes

    return multiply


@compilable
def _finish(sums, out, residual, image, a, b, k0, count, code, slope):  # type: ignore[no-untyped-def]
    """Finish ``count`` values of one pixel one by one."""
    for lane in range(count):
        total = sums[lane]
        if residual.size:
            total += residual[image, a, b, k0 + lane]
        out[image, a, b, k0 + lane] = activate(total, code, slope)


@functools.cache
def _finishing(algorithm: Algorithm, share: int, lanes: int, itemsize: int) -> Any:
    """Return what makes a line of a tile of transformed products."""
    m, r, n, stride = algorithm.m[1], algorithm.r[1], algorithm.n[1], algorithm.stride

    @inlined
    def line(columns, i, bias, doubts):  # type: ignore[no-untyped-def]
        """Return line ``i`` of a tile, with its bias, and the doubts.

        Of its transformed columns, the address is given and how many bytes these are apart; lines follow one another.
        """
        at = columns[0] + i * n * columns[1]
        sums = transform_output(load_apart(at, columns[1], n, lanes, itemsize), m, r, stride)
        doubts = add_doubts(doubts, sums)
        if bias:
            sums = add_to_all(sums, m, bias)
        return separate(sums, share), doubts

    return line


@functools.cache
def _leaving_one_by_one(algorithm: Algorithm, share: int, lanes: int, itemsize: int) -> Any:
    """Return what finishes and stores a tile's values one by one."""
    line = _finishing(algorithm, share, lanes, itemsize)

    @outlined
    def leave_one_by_one(  # type: ignore[no-untyped-def]
        columns, bias, where, inside, dilations, few, out, residual, code, slope, doubts, rows
    ):  # fmt: skip
        """Do what ``leave`` does with a tile of ``few`` filters; return the doubts.

        ``where`` is the image, the first row and column, and the first filter; ``inside`` counts real rows and columns.
        """
        image, oh, ow, k0 = where
        for i in range(inside[0]):
            sums, doubts = line(columns, i, bias, doubts)
            save_apart(rows.ctypes.data, lanes * itemsize, sums)
            for j in range(inside[1]):
                a, b = oh + i * dilations[0], ow + j * dilations[1]
                _finish(rows[j * lanes :], out, residual, image, a, b, k0, few, code, slope)
        return doubts

    return leave_one_by_one


@functools.cache
def _leaving(algorithm: Algorithm, share: int, lanes: int, itemsize: int) -> Any:  # noqa: C901
    """Return what transforms tiles of products back, finishes and stores them; ``share`` groups fill a vector."""
    (m0, m1), (n0, n1), r0, stride = algorithm.m, algorithm.n, algorithm.r[0], algorithm.stride
    lane_bytes, line = lanes * itemsize, _finishing(algorithm, share, lanes, itemsize)
    leave_one_by_one = _leaving_one_by_one(algorithm, share, lanes, itemsize)

    @compilable
    def leave(  # type: ignore[no-untyped-def]
        products, bias, tiles, first, count, step, out, residual, k0, valid, dilations, streams, code, slope, doubts,
        half, rows,
    ):  # fmt: skip
        """Transform products back, finish them and store ``valid`` filters from ``k0`` on; return the doubts.

        If it ``streams``, whole tiles are stored past the caches.
        ``bias`` is the address of these filters' bias, or 0. ``half``, the address of m0 * n1 vectors, and
        ``rows [2 * m1 * lanes]`` are for what is under way.
        """
        between, room = products[1] * itemsize, -(-valid // lanes) * lanes
        done = np.int64(rows.ctypes.data)
        beside = done + m1 * lane_bytes
        more = np.int64(residual.ctypes.data) - np.int64(out.ctypes.data)
        pixel = out.shape[3] * itemsize
        down, across = dilations[0] * out.shape[2] * pixel, dilations[1] * pixel
        place = place_of(first, tiles, dilations)
        for t in range(count):
            image, (oh, ow) = place[0], corner(place, (m0, m1), dilations)
            place = following(place, tiles, dilations)
            inside = (
                outputs_inside(out.shape[1], oh, m0, dilations[0]),
                outputs_inside(out.shape[2], ow, m1, dilations[1]),
            )
            origin = (
                np.int64(out.ctypes.data) + ((image * out.shape[1] + oh) * out.shape[2] + ow) * pixel + k0 * itemsize
            )
            for k in range(0, room, lanes):
                start, added = products[0] + t * step + k * itemsize, bias + k * itemsize if bias else 0
                columns = (start, between)
                if n0 > 1:
                    leave_columns(start, between, half, m0, r0, stride, n0, n1, lanes, itemsize)
                    columns = (half, lane_bytes)
                if k + lanes > valid:
                    doubts = leave_one_by_one(
                        columns, added, (image, oh, ow, k0 + k), inside, dilations, min(lanes, valid - k), out,
                        residual, code if code <= RELU6 else 0, slope, doubts, rows,
                    )  # fmt: skip
                    continue
                for i in range(inside[0]):
                    sums, doubts = line(columns, i, added, doubts)
                    to = origin + i * down + k * itemsize
                    if inside[1] == m1:
                        if residual.size:
                            sums = add_to_each(sums, m1, (to, across), more)
                        put_whole(clamped(sums, code), m1, (to, across), 0, streams)
                        continue
                    if residual.size:
                        for j in range(inside[1]):
                            copy(beside + j * lane_bytes, to + more + j * across, lane_bytes)
                        sums = add_to_each(sums, m1, (beside, lane_bytes), 0)
                    store(clamped(sums, code), m1, (done, lane_bytes), 0)
                    for j in range(inside[1]):  # the tile reaches beyond the image
                        copy(to + j * across, done + j * lane_bytes, lane_bytes)
            if code > RELU6:
                activate_pixels(origin, (down, across), inside, valid, code, slope, itemsize)
        return doubts

    return leave


#: ``filters`` is ``[groups, blocks of a group, points, values summed, block]``, its ends zeros; so is ``bias``.
ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(5), bias=array_of(1), residual=array_of(4), out=array_of(4),
    pads=integers_of(2), strides=integers_of(2), dilations=integers_of(2), groups=INTEGER, streamed=INTEGER,
    code=INTEGER, slope=FLOAT, jobs=array_of(2, "int64"), spoiled=INTEGER,
)  # fmt: skip
unpack = ARGUMENTS.unpack
_SPOILED_AT = 8 * ARGUMENTS.at["spoiled"]


@compilable
def scratch_of(count, padded, block, room, points, across, least, lanes, itemsize):  # type: ignore[no-untyped-def]
    """Return how a job's scratch memory is divided, in values.

    Args:
        count: tiles.
        padded, block: values of a tile's point, as it enters and as it leaves.
        room: values of a pixel that is copied for a patch.
        points, across: of a tile, and its columns of outputs.
        least: rows of the lowest register tile, which may be longer than what is left.
        lanes, itemsize: of a vector.

    Returns:
        What a point takes of all transformed tiles, and of all products; where the transforms' halves begin, what is
        done and the patch; and how many values there are, the stage not counted, which lies behind them.
    """
    entering, leaving = odd_lines(count * padded, itemsize), odd_lines(count * block, itemsize)
    # What may be stored beyond the products lies behind them and in front of the rest.
    half = points * (entering + leaving) + -(-least * max(padded, block) // lanes) * lanes
    done = half + points * lanes
    patch = done + 2 * across * lanes
    return entering, leaving, half, done, patch, patch + points * room


@functools.cache
def compiled(algorithm: Algorithm, fold: int, staged: int, passes: Passes) -> CompiledKernel:
    """Return the kernel of an algorithm; if ``staged``, groups are copied. Groups that share a vector are one to it."""
    (m0, m1), (n0, n1), share, lanes, itemsize = algorithm.m, algorithm.n, passes.share, passes.lanes, passes.itemsize
    points, step, block = n0 * n1, passes.step, passes.vectors * lanes
    enter, leave = _entering(algorithm, lanes, itemsize), _leaving(algorithm, share, lanes, itemsize)
    enter_group = _entering_groups(algorithm, share, lanes, itemsize)
    least, multiply = passes.heights[-1], _multiplier(passes)

    def convolve(arguments, job):  # type: ignore[no-untyped-def]
        """Compute the tiles ``jobs[job, 0:2]`` for the blocks of filters ``jobs[job, 2:4]``."""
        x, u, bias, residual, out, pads, strides, dilations, groups, streamed, code, slope, jobs, _ = unpack(
            arguments, itemsize
        )
        first, last, first_block, last_block = jobs[job]
        group_k, per_group = out.shape[3] // groups, u.shape[1]
        group_c = x.shape[3] // groups
        runs, point_bytes = (fold, fold * group_c), u.shape[3] * step
        here = (np.int64(x.ctypes.data), x.shape[0], x.shape[1], x.shape[2], x.shape[3])
        room = -(-runs[1] // lanes) * lanes
        streams = streamed and out.ctypes.data % CACHE_LINE == 0
        count, tiles = last - first, tiles_of_picture(out.shape, (m0, m1), dilations)
        entering, leaving, half_at, done_at, patch_at, size = scratch_of(
            count, fold * room, block, room, points, m1, least, lanes, itemsize
        )
        high, wide = stage_shape(count, out.shape[1:3], staged, (m0, m1), strides, (n0, n1))
        scratch = borrow((size + high * wide * group_c) * itemsize)
        if scratch == 0:
            return 0
        values, products = (scratch, entering), (scratch + points * entering * itemsize, leaving)
        half, done = scratch + half_at * itemsize, array_at(scratch + done_at * itemsize, (2 * m1 * lanes,), itemsize)
        patch = (scratch + patch_at * itemsize, room)
        stage = array_at(scratch + size * itemsize, (high, wide, group_c), itemsize)
        doubts = zeros(1, 1, lanes, itemsize)[0]
        entered = -1
        for task in range(first_block, last_block):
            group, member = divmod(task, per_group)
            if group != entered:
                entered = group
                if staged:
                    enter_group(
                        x, stage, tiles, pads, strides, runs, group * group_c, first, count, values, patch, half
                    )  # fmt: skip
                else:
                    enter(
                        here, tiles, pads, strides, dilations, group * group_c, runs, first, (np.int64(0), count),
                        values, patch, half,
                    )  # fmt: skip
            packed = u.ctypes.data + task * points * point_bytes
            added = bias.ctypes.data + task * step if bias.size else 0
            multiply(values, count, packed, point_bytes, runs, products, points)
            valid = min(block, group_k - member * block)
            doubts = leave(
                products, added, tiles, first, count, step, out, residual, group * group_k + member * block, valid,
                dilations, streams, code, slope, doubts, half, done,
            )  # fmt: skip
        report(doubts, arguments + _SPOILED_AT)
        give_back(scratch)
        return 1

    return CompiledKernel(convolve, ARGUMENTS)
