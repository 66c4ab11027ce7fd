"""Vectors along a row, for ``image_rows``: the tile's rows share what they read, and channels weave into pixels."""

from typing import Any

from llvmlite import ir
from numba import types

from convdispatch.backends._vector import (
    I32,
    I64,
    Codegen,
    address_of,
    broadcast,
    fused_multiply_add,
    intrinsic,
    load_at,
    opaque,
    parts_of,
    store_past,
)


@intrinsic
def add_rows(typing: Any, tile: Any, rows: Any, inputs: Any, step: Any, filters: Any, taps: Any) -> tuple[Any, Codegen]:
    """Return the tile plus one column of ``taps`` filter values, at ``filters``, slid down over rows of input.

    The input's rows are ``step`` bytes apart. Each is loaded once, for all the rows of the tile that it is part of.
    """
    count, height, vector = rows.literal_value, taps.literal_value, tile.dtype
    vectors, size = len(tile) // count, vector.itemsize

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, place, down, packed, _ = arguments
        sums = parts_of(b, values, len(tile))
        scalar = vector.ir.element
        weights = [broadcast(b, load_at(b, scalar, packed, t * size, size), vector.lanes) for t in range(height)]
        twice = b.shl(down, ir.Constant(I64, 1))
        for i in range(count + height - 1):
            if i and i % 3 == 0:  # addresses of three rows are one sum each, for nothing
                place = opaque(b, b.add(b.add(place, twice), down))
            row = (place, b.add(place, down), b.add(place, twice))[i % 3]
            inputs = [load_at(b, vector.ir, row, v * vector.lanes * size, size) for v in range(vectors)]
            for r in range(max(0, i - height + 1), min(count, i + 1)):
                for v in range(vectors):
                    sums[r * vectors + v] = fused_multiply_add(
                        b, inputs[v], weights[i - r], sums[r * vectors + v], vector
                    )
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, rows, inputs, step, filters, taps), codegen


def _pick(b: Any, vectors: list[Any], places: list[tuple[int, int]]) -> Any:
    """Return a vector of which lane ``i`` is lane ``places[i][1]`` of vector ``places[i][0]``."""
    picked, lanes = vectors[0], len(places)
    kept = [lane if which == 0 else 0 for which, lane in places]
    for number in range(1, len(vectors)):
        mask = [lanes + lane if which == number else kept[i] for i, (which, lane) in enumerate(places)]
        picked = b.shuffle_vector(picked, vectors[number], ir.Constant(ir.VectorType(I32, lanes), mask))
        kept = list(range(lanes))
    return picked


@intrinsic
def weave(typing: Any, target: Any, source: Any, apart: Any, count: Any, past: Any, like: Any) -> tuple[Any, Codegen]:
    """Interleave ``count`` vectors, ``apart`` bytes apart at ``source``, into as many in a row at ``target``.

    If ``past`` is 1, they are stored past the caches, and must begin at a multiple of a vector's bytes. ``like`` is a
    tuple of vectors of the kind that is meant.
    """
    vector, number, streamed = like.dtype, count.literal_value, past.literal_value

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        place, values = arguments[1], []
        for _ in range(number):
            values.append(load_at(b, vector.ir, place, 0, vector.itemsize))
            place = b.add(place, arguments[2])
        for v in range(number):
            items = range(v * vector.lanes, (v + 1) * vector.lanes)
            woven = _pick(b, values, [(item % number, item // number) for item in items])
            to = address_of(b, arguments[0], v * vector.lanes * vector.itemsize, vector.ir)
            if streamed:
                store_past(b, woven, to, vector)
            else:
                b.store(woven, to, align=vector.itemsize)
        return context.get_dummy_value()

    return types.void(target, source, apart, count, past, like), codegen


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
        step = vector.lanes * vector.itemsize
        values = [load_at(b, vector.ir, arguments[1], v * step, vector.itemsize) for v in range(number)]
        place = arguments[0]
        for plane in _apart(b, values):
            b.store(plane, address_of(b, place, 0, vector.ir), align=vector.itemsize)
            place = b.add(place, arguments[2])
        return context.get_dummy_value()

    return types.void(target, source, apart, count, like), codegen
