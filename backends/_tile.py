"""Tiles: tuples of vectors that the compiler keeps in registers while a kernel walks over its input.

A tile is ``rows`` times ``vectors``: of ``implicit_gemm``, output pixels times vectors of filters. Every step of its
innermost loop loads ``vectors`` vectors of packed filters and, for each row, multiplies them with one input value.

Where a tile's rows lie in memory is told in one of two ways: by the address of a table that has an address for each
row; or, if they are equally far apart, by a pair, the first row's address and the bytes from one to the next.
"""

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from convdispatch.backends._vector import (
    I32,
    I64,
    SCALARS,
    Codegen,
    Vector,
    address_of,
    broadcast,
    fused_multiply_add,
    intrinsic,
    load_at,
    parts_of,
    prefetch_at,
    shuffled,
    spaced_in_turn,
    stream_at,
    upper_half,
)
from convdispatch.memory import CACHE_LINE

#: Addresses that registers hold at once, besides what else a loop needs.
AT_ONCE = 10


@intrinsic
def zeros(typing: Any, rows: Any, vectors: Any, lanes: Any, itemsize: Any) -> tuple[Any, Codegen]:
    """Return a tile of ``rows * vectors`` zero vectors."""
    vector, count = Vector(itemsize.literal_value, lanes.literal_value), rows.literal_value * vectors.literal_value
    kind = types.UniTuple(vector, count)  # type: ignore[no-untyped-call]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return context.make_tuple(b, kind, [ir.Constant(vector.ir, None)] * count)

    return kind(rows, vectors, lanes, itemsize), codegen


@intrinsic
def multiply_add(
    typing: Any, tile: Any, rows: Any, inputs: Any, offset: Any, filters: Any, share: Any
) -> tuple[Any, Codegen]:
    """Return the tile plus an outer product: one input value of each row times the vectors at ``filters``.

    The values are ``offset`` bytes behind where ``inputs`` tells that the rows lie. If ``share`` groups share a vector,
    lane by lane in turn, there are as many neighbouring values, one for each group.
    """
    count, vector = rows.literal_value, tile.dtype
    vectors, size = len(tile) // count, vector.itemsize

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, where, behind, packed, _ = arguments
        sums = parts_of(b, values, len(tile))
        weights = [load_at(b, vector.ir, packed, v * vector.lanes * size, size) for v in range(vectors)]
        for row, start in enumerate(starts(b, count, inputs, where, behind)):
            x = _for_all_lanes(b, start, share.literal_value, vector)
            for v in range(vectors):
                sums[row * vectors + v] = fused_multiply_add(b, x, weights[v], sums[row * vectors + v], vector)
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, rows, inputs, offset, filters, share), codegen


@intrinsic
def multiply_pairs(typing: Any, tile: Any, rows: Any, inputs: Any, between: Any, filters: Any) -> tuple[Any, Codegen]:
    """Return the tile plus an outer product as of ``multiply_add``, where a row is of two pixels.

    ``inputs`` is the first row's address and the bytes from one to the next. The second pixel's value is ``between``
    bytes behind the first one's, and has the second half of the vectors at ``filters``; one halfway has both values.
    """
    count, vector = rows.literal_value, tile.dtype
    vectors, size, lanes = len(tile) // count, vector.itemsize, vector.lanes
    middle = vectors // 2 if vectors % 2 else None

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, where, apart, packed = arguments
        sums = parts_of(b, values, len(tile))
        weights = [load_at(b, vector.ir, packed, v * lanes * size, size) for v in range(vectors)]
        (start, step), upper = parts_of(b, where, 2), upper_half(b, lanes)
        for row, place in enumerate(spaced_in_turn(b, start, step, count)):
            first, second = (_for_all_lanes(b, address, 1, vector) for address in (place, b.add(place, apart)))
            for v in range(vectors):
                x = b.select(upper, second, first) if v == middle else first if v < vectors / 2 else second
                sums[row * vectors + v] = fused_multiply_add(b, x, weights[v], sums[row * vectors + v], vector)
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, rows, inputs, between, filters), codegen


@intrinsic
def multiply_points(
    typing: Any, tile: Any, points: Any, inputs: Any, offset: Any, between: Any, filters: Any
) -> tuple[Any, Codegen]:
    """Return the tile plus products point by point: each row's value at each of its ``points`` times that's vector.

    A row's values are ``between`` bytes apart, the first ``offset`` bytes behind where ``inputs`` tells that the rows
    lie; the vectors of filters follow one another.
    """
    count, vector = points.literal_value, tile.dtype
    size = vector.itemsize

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, where, behind, _, packed = arguments
        sums = parts_of(b, values, len(tile))
        places = list(starts(b, len(tile) // count, inputs, where, behind))
        for point in range(count):
            weights = load_at(b, vector.ir, packed, point * vector.lanes * size, size)
            for row, start in enumerate(places):
                value = load_at(b, SCALARS[size][1], start, point * between.literal_value, size)
                at = row * count + point
                sums[at] = fused_multiply_add(b, broadcast(b, value, vector.lanes), weights, sums[at], vector)
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, points, inputs, offset, between, filters), codegen


def _for_all_lanes(b: Any, address: Any, share: int, vector: Vector) -> Any:
    """Return a vector that repeats so many values from memory."""
    scalar = SCALARS[vector.itemsize][1]
    if share == 1:
        return broadcast(b, load_at(b, scalar, address, 0, vector.itemsize), vector.lanes)
    values = load_at(b, ir.VectorType(scalar, share), address, 0, vector.itemsize)
    return shuffled(b, values, [lane % share for lane in range(vector.lanes)])


@intrinsic
def prefetch_filters(typing: Any, tile: Any, rows: Any, address: Any) -> tuple[Any, Codegen]:
    """Send for all cache lines of a step's vectors of filters, which begin at ``address``."""
    vector, vectors = tile.dtype, len(tile) // rows.literal_value

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        for offset in range(0, vectors * vector.lanes * vector.itemsize, CACHE_LINE):
            prefetch_at(b, arguments[2], offset)
        return context.get_dummy_value()

    return types.void(tile, rows, address), codegen


@intrinsic
def add_to_all(typing: Any, tile: Any, rows: Any, address: Any) -> tuple[Any, Codegen]:
    """Return the tile with the vectors at ``address`` added to every row: a bias."""
    vector, vectors = tile.dtype, len(tile) // rows.literal_value
    size = vector.itemsize

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        bias = [load_at(b, vector.ir, arguments[2], v * vector.lanes * size, size) for v in range(vectors)]
        sums = [b.fadd(value, bias[i % vectors]) for i, value in enumerate(parts_of(b, arguments[0], len(tile)))]
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, rows, address), codegen


def starts(b: Any, count: int, kind: Any, where: Any, offset: Any) -> Iterator[Any]:
    """Yield the addresses ``offset`` bytes behind rows from what tells where they lie, which is of this Numba type."""
    if isinstance(kind, types.BaseTuple):
        first, step = parts_of(b, where, 2)
        if count > AT_ONCE:
            yield from spaced_in_turn(b, b.add(first, offset), step, count)
            return
        for row in range(count):
            yield b.add(b.add(first, b.mul(step, ir.Constant(I64, row))) if row else first, offset)
    else:
        for row in range(count):
            yield b.add(load_at(b, I64, where, row * 8, 8), offset)


def _places(b: Any, tile: Any, rows: Any, kind: Any, where: Any, offset: Any) -> Iterator[tuple[int, int, Any]]:
    """Yield of each vector of a tile its number, its number within its row, and a pointer to its place.

    A row's places begin ``offset`` bytes behind where the row lies.
    """
    vector, vectors = tile.dtype, len(tile) // rows.literal_value
    for row, start in enumerate(starts(b, rows.literal_value, kind, where, offset)):
        for v in range(vectors):
            yield row * vectors + v, v, address_of(b, start, v * vector.lanes * vector.itemsize, vector.ir)


@intrinsic
def add_to_each(typing: Any, tile: Any, rows: Any, outputs: Any, offset: Any) -> tuple[Any, Codegen]:
    """Return the tile with the vectors ``offset`` bytes behind where each row lies added to it: a residual."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        sums = parts_of(b, arguments[0], len(tile))
        for i, _, place in _places(b, tile, rows, outputs, *arguments[2:]):
            sums[i] = b.fadd(sums[i], b.load(place, align=tile.dtype.itemsize))
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, rows, outputs, offset), codegen


@intrinsic
def clamp(typing: Any, tile: Any, low: Any, high: Any) -> tuple[Any, Codegen]:
    """Return the tile with every value brought between two floats; NaN stays NaN."""
    vector = tile.dtype

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        scalar = SCALARS[vector.itemsize][0]
        limits = [context.cast(b, value, kind, scalar) for value, kind in zip(arguments[1:], (low, high), strict=True)]
        bottom, top = (broadcast(b, limit, vector.lanes) for limit in limits)
        sums = []
        for value in parts_of(b, arguments[0], len(tile)):
            raised = b.select(b.fcmp_ordered("<", value, bottom), bottom, value)
            sums.append(b.select(b.fcmp_ordered(">", raised, top), top, raised))
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, low, high), codegen


@intrinsic
def store(typing: Any, tile: Any, rows: Any, outputs: Any, offset: Any) -> tuple[Any, Codegen]:
    """Store each row's vectors ``offset`` bytes behind where ``outputs`` tells that it lies."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        sums = parts_of(b, arguments[0], len(tile))
        for i, _, place in _places(b, tile, rows, outputs, *arguments[2:]):
            b.store(sums[i], place, align=tile.dtype.itemsize)
        return context.get_dummy_value()

    return types.void(tile, rows, outputs, offset), codegen


@intrinsic
def stream(typing: Any, tile: Any, rows: Any, outputs: Any, offset: Any) -> tuple[Any, Codegen]:
    """Do as ``store`` does by streaming (non-temporal) stores, past the caches: for results too large to stay there.

    A line of memory is not loaded before it is written then, which is half of the traffic. Every vector's place must be
    a multiple of its bytes, and lines should be written whole. Threads that report the end of a part make others see it
    by a fence.
    """
    vector = tile.dtype

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        sums = parts_of(b, arguments[0], len(tile))
        for i, _, place in _places(b, tile, rows, outputs, *arguments[2:]):
            stream_at(b, sums[i], place, vector)
        return context.get_dummy_value()

    return types.void(tile, rows, outputs, offset), codegen


@intrinsic
def store_some(typing: Any, tile: Any, rows: Any, outputs: Any, offset: Any, count: Any) -> tuple[Any, Codegen]:
    """Do as ``store`` does for the first ``count`` values of each row only."""
    vector, vectors = tile.dtype, len(tile) // rows.literal_value

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, *where, valid = arguments
        sums, masks = parts_of(b, values, len(tile)), lane_masks(b, vector, vectors, valid)
        align = ir.Constant(I32, vector.itemsize)
        for i, v, place in _places(b, tile, rows, outputs, *where):
            b.call(masked(b, "store", vector, place), [sums[i], place, align, masks[v]])
        return context.get_dummy_value()

    return types.void(tile, rows, outputs, offset, types.int64), codegen


@intrinsic
def add_some_to_each(typing: Any, tile: Any, rows: Any, outputs: Any, offset: Any, count: Any) -> tuple[Any, Codegen]:
    """Do as ``add_to_each`` does for the first ``count`` values of each row only."""
    vector, vectors = tile.dtype, len(tile) // rows.literal_value

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, *where, valid = arguments
        sums, masks = parts_of(b, values, len(tile)), lane_masks(b, vector, vectors, valid)
        align, none = ir.Constant(I32, vector.itemsize), ir.Constant(vector.ir, None)
        for i, v, place in _places(b, tile, rows, outputs, *where):
            sums[i] = b.fadd(sums[i], b.call(masked(b, "load", vector, place), [place, align, masks[v], none]))
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, rows, outputs, offset, types.int64), codegen


def lane_masks(b: Any, vector: Vector, vectors: int, count: Any) -> list[Any]:
    """Return for each vector of a row which of its lanes are among the first ``count`` values."""
    limit = broadcast(b, b.trunc(count, I32), vector.lanes)
    lanes = ir.VectorType(I32, vector.lanes)
    numbers = [[v * vector.lanes + lane for lane in range(vector.lanes)] for v in range(vectors)]
    return [b.icmp_signed("<", ir.Constant(lanes, each), limit) for each in numbers]


def masked(b: Any, what: str, vector: Vector, pointer: Any) -> Any:
    mask = ir.VectorType(ir.IntType(1), vector.lanes)
    name = f"llvm.masked.{what}.v{vector.lanes}{SCALARS[vector.itemsize][2]}.p0"
    if what == "store":
        kind = ir.FunctionType(ir.VoidType(), [vector.ir, pointer.type, I32, mask])
    else:
        kind = ir.FunctionType(vector.ir, [pointer.type, I32, mask, vector.ir])
    return cgutils.get_or_insert_function(b.module, kind, name)  # type: ignore[no-untyped-call]
