"""Vectors along a row of pixels: a tile's rows share what they read, and channels are woven into pixels, and apart."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llvmlite import ir
from numba import types

from convdispatch.backends._vector import (
    I32,
    I64,
    Codegen,
    Vector,
    address_of,
    broadcast,
    fused_multiply_add,
    intrinsic,
    load_at,
    opaque,
    parts_of,
    spaced,
    stream_at,
)


def _slide_down(
    b: Any, vector: Vector, sums: list[Any], lines: Iterable[Sequence[Any]], filters: Sequence[Sequence[Any]]
) -> None:
    """Add to a tile's sums, ``[row, filter, vector]``, each line of input times the taps by which rows meet it."""
    for i, line in enumerate(lines):
        a_row = len(filters) * len(line)
        height = len(filters[0])
        for r in range(max(0, i - height + 1), min(len(sums) // a_row, i + 1)):
            for k, taps in enumerate(filters):
                for v, x in enumerate(line):
                    at = r * a_row + k * len(line) + v
                    sums[at] = fused_multiply_add(b, x, taps[i - r], sums[at], vector)


@intrinsic
def add_rows(typing: Any, tile: Any, rows: Any, inputs: Any, step: Any, filters: Any, taps: Any) -> tuple[Any, Codegen]:
    """Return the tile plus one column of ``taps`` filter values, at ``filters``, slid down over rows of input.

    The input's rows are ``step`` bytes apart. Each is loaded once, for all the rows of the tile that it is part of.
    """
    count, height, vector = rows.literal_value, taps.literal_value, tile.dtype
    vectors, size = len(tile) // count, vector.itemsize

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, place, down, packed, _ = arguments
        sums, scalar = parts_of(b, values, len(tile)), vector.ir.element
        weights = [broadcast(b, load_at(b, scalar, packed, t * size, size), vector.lanes) for t in range(height)]

        def lines(place: Any) -> Iterator[list[Any]]:
            twice = b.shl(down, ir.Constant(I64, 1))
            for i in range(count + height - 1):
                if i and i % 3 == 0:  # addresses of three rows are one sum each, for nothing
                    place = opaque(b, b.add(b.add(place, twice), down))
                row = (place, b.add(place, down), b.add(place, twice))[i % 3]
                yield [load_at(b, vector.ir, row, v * vector.lanes * size, size) for v in range(vectors)]

        _slide_down(b, vector, sums, lines(place), [weights])
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, rows, inputs, step, filters, taps), codegen


@intrinsic
def add_rows_of_all(
    typing: Any, tile: Any, rows: Any, inputs: Any, step: Any, filters: Any, apart: Any, taps: Any
) -> tuple[Any, Codegen]:
    """Do as ``add_rows`` does for some filters, whose values are ``apart`` bytes apart: each input is loaded for all.

    Of each row of the tile there is a vector for each of the filters.
    """
    count, height, vector = rows.literal_value, taps.literal_value, tile.dtype
    together, size = len(tile) // count, vector.itemsize

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, place, down, packed, between, _ = arguments
        sums, scalar = parts_of(b, values, len(tile)), vector.ir.element
        weights = [
            [broadcast(b, load_at(b, scalar, each, t * size, size), vector.lanes) for t in range(height)]
            for each in spaced(b, packed, between, together)
        ]

        def lines(place: Any) -> Iterator[list[Any]]:
            for _ in range(count + height - 1):
                yield [load_at(b, vector.ir, place, 0, size)]
                place = b.add(place, down)

        _slide_down(b, vector, sums, lines(place), weights)
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, rows, inputs, step, filters, apart, taps), codegen


def _pick(b: Any, vectors: list[Any], places: list[tuple[int, int]]) -> Any:
    """Return a vector of which lane ``i`` is lane ``places[i][1]`` of vector ``places[i][0]``."""
    picked, lanes = vectors[0], len(places)
    kept = [lane if which == 0 else 0 for which, lane in places]
    for number in range(1, len(vectors)):
        mask = [lanes + lane if which == number else kept[i] for i, (which, lane) in enumerate(places)]
        picked = b.shuffle_vector(picked, vectors[number], ir.Constant(ir.VectorType(I32, lanes), mask))
        kept = list(range(lanes))
    return picked


def _together(b: Any, vectors: list[Any]) -> list[Any]:
    """Return some vectors interleaved, as many as there are of them."""
    number, lanes = len(vectors), vectors[0].type.count
    items = [divmod(item, number) for item in range(number * lanes)]
    places = [(which, lane) for lane, which in items]
    return [_pick(b, vectors, places[v * lanes : (v + 1) * lanes]) for v in range(number)]


@intrinsic
def weave(
    typing: Any, target: Any, source: Any, apart: Any, count: Any, streams: Any, like: Any
) -> tuple[Any, Codegen]:
    """Interleave ``count`` vectors, ``apart`` bytes apart at ``source``, into as many in a row at ``target``.

    If ``streams`` is 1, they go past the caches, and must begin at a multiple of a vector's bytes. ``like`` is a tuple
    of vectors of the kind that is meant.
    """
    vector, number, streamed = like.dtype, count.literal_value, streams.literal_value

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        place, values = arguments[1], []
        for _ in range(number):
            values.append(load_at(b, vector.ir, place, 0, vector.itemsize))
            place = b.add(place, arguments[2])
        for v, value in enumerate(_together(b, values)):
            to = address_of(b, arguments[0], v * vector.lanes * vector.itemsize, vector.ir)
            if streamed:
                stream_at(b, value, to, vector)
            else:
                b.store(value, to, align=vector.itemsize)
        return context.get_dummy_value()

    return types.void(target, source, apart, count, streams, like), codegen


def _in_a_row(b: Any, vector: Vector, count: int, address: Any) -> list[Any]:
    """Return so many vectors that lie side by side."""
    step = vector.lanes * vector.itemsize
    return [load_at(b, vector.ir, address, v * step, vector.itemsize) for v in range(count)]


def _apart(b: Any, vectors: list[Any]) -> list[Any]:
    """Return the planes that are interleaved in some vectors, as many as there are of these.

    In several steps, if that number has factors: 6 planes take 18 moves by twos and threes, and 30 at once.
    """
    number, lanes = len(vectors), vectors[0].type.count
    if number == 1:
        return vectors
    step = next((factor for factor in (2, 3) if number % factor == 0), number)
    planes = []
    for first in range(step):
        places = [divmod(value, lanes) for value in range(first, step * lanes, step)]
        planes.append(_apart(b, [_pick(b, vectors[i : i + step], places) for i in range(0, number, step)]))
    return [plane for alike in zip(*planes, strict=True) for plane in alike]


@intrinsic
def unweave(typing: Any, target: Any, source: Any, apart: Any, count: Any, like: Any) -> tuple[Any, Codegen]:
    """Undo ``weave``: of ``count`` vectors in a row at ``source`` make as many, ``apart`` bytes apart at ``target``."""
    vector, number = like.dtype, count.literal_value

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        place = arguments[0]
        for plane in _apart(b, _in_a_row(b, vector, number, arguments[1])):
            b.store(plane, address_of(b, place, 0, vector.ir), align=vector.itemsize)
            place = b.add(place, arguments[2])
        return context.get_dummy_value()

    return types.void(target, source, apart, count, like), codegen


@intrinsic
def unwoven(typing: Any, address: Any, count: Any, lanes: Any, itemsize: Any) -> tuple[Any, Codegen]:
    """Return the planes that are interleaved in ``count`` vectors in a row, as a tile of so many."""
    vector, number = Vector(itemsize.literal_value, lanes.literal_value), count.literal_value
    kind = types.UniTuple(vector, number)  # type: ignore[no-untyped-call]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return context.make_tuple(b, kind, _apart(b, _in_a_row(b, vector, number, arguments[0])))

    return kind(types.int64, count, lanes, itemsize), codegen


@intrinsic
def woven(typing: Any, tile: Any, rows: Any) -> tuple[Any, Codegen]:
    """Return the tile with the vectors of each row interleaved."""
    together = len(tile) // rows.literal_value

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        sums = parts_of(b, arguments[0], len(tile))
        lines = [_together(b, sums[at : at + together]) for at in range(0, len(tile), together)]
        return context.make_tuple(b, tile, [value for line in lines for value in line])

    return tile(tile, rows), codegen


@intrinsic
def mixed(typing: Any, tile: Any, filters: Any, count: Any) -> tuple[Any, Codegen]:
    """Return ``count`` sums of a tile's vectors, each times one of the values ``[count, len(tile)]`` at ``filters``."""
    vector, number = tile.dtype, count.literal_value
    kind = types.UniTuple(vector, number)  # type: ignore[no-untyped-call]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        inputs, sums = parts_of(b, arguments[0], len(tile)), []
        for k in range(number):
            total = ir.Constant(vector.ir, None)
            for c, value in enumerate(inputs):
                at = (k * len(inputs) + c) * vector.itemsize
                weight = broadcast(b, load_at(b, vector.ir.element, arguments[1], at, vector.itemsize), vector.lanes)
                total = fused_multiply_add(b, value, weight, total, vector)
            sums.append(total)
        return context.make_tuple(b, kind, sums)

    return kind(tile, types.int64, count), codegen
