"""Tuples of vectors that lie apart in memory, or hang together otherwise than as a tile."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from convdispatch.backends._linear import Arithmetic, product
from convdispatch.backends._vector import (
    I64,
    Codegen,
    Vector,
    address_of,
    fused_multiply_add,
    intrinsic,
    load_at,
    parts_of,
    shuffled,
    spaced,
)


@intrinsic
def gather(
    typing: Any, table: Any, step: Any, offset: Any, count: Any, lanes: Any, itemsize: Any
) -> tuple[Any, Codegen]:
    """Return ``count`` vectors, each ``offset`` bytes behind an address; the addresses are ``step`` bytes apart."""
    vector = Vector(itemsize.literal_value, lanes.literal_value)
    kind = types.UniTuple(vector, count.literal_value)  # type: ignore[no-untyped-call]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        table, step, offset, *_ = arguments
        starts = [load_at(b, I64, place, 0, 8) for place in spaced(b, table, step, count.literal_value)]
        values = [load_at(b, vector.ir, b.add(start, offset), 0, vector.itemsize) for start in starts]
        return context.make_tuple(b, kind, values)

    return kind(types.int64, types.int64, types.int64, count, lanes, itemsize), codegen


@intrinsic
def load_apart(typing: Any, address: Any, step: Any, count: Any, lanes: Any, itemsize: Any) -> tuple[Any, Codegen]:
    """Return ``count`` vectors that lie ``step`` bytes apart."""
    vector = Vector(itemsize.literal_value, lanes.literal_value)
    kind = types.UniTuple(vector, count.literal_value)  # type: ignore[no-untyped-call]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        places = spaced(b, arguments[0], arguments[1], count.literal_value)
        values = [load_at(b, vector.ir, place, 0, vector.itemsize) for place in places]
        return context.make_tuple(b, kind, values)

    return kind(types.int64, types.int64, count, lanes, itemsize), codegen


@intrinsic
def save_apart(typing: Any, address: Any, step: Any, tile: Any) -> tuple[Any, Codegen]:
    """Store vectors ``step`` bytes apart."""
    vector = tile.dtype

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        places = spaced(b, arguments[0], arguments[1], len(tile))
        for value, place in zip(parts_of(b, arguments[2], len(tile)), places, strict=True):
            b.store(value, address_of(b, place, 0, vector.ir), align=vector.itemsize)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, tile), codegen


@intrinsic
def add_doubts(typing: Any, doubts: Any, tile: Any) -> tuple[Any, Codegen]:
    """Return a vector that becomes NaN where any of the tile's values is NaN or infinite, and stays 0 elsewhere.

    Values that overflow when summed are doubted too. Their sum keeps what waits for the doubts before short.
    """

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values = parts_of(b, arguments[1], len(tile))
        while len(values) > 1:
            values = [b.fadd(*pair) for pair in zip(values[::2], values[1::2], strict=False)] + values[
                len(values) & ~1 :
            ]
        return fused_multiply_add(b, values[0], ir.Constant(doubts.ir, None), arguments[0], doubts)

    return doubts(doubts, tile), codegen


@intrinsic
def any_doubt(typing: Any, doubts: Any) -> tuple[Any, Codegen]:
    """Return whether a lane of ``add_doubts``' vector is not 0."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        lanes = b.fcmp_unordered("!=", arguments[0], ir.Constant(doubts.ir, None))
        every = ir.IntType(doubts.lanes)
        return b.icmp_unsigned("!=", b.bitcast(lanes, every), ir.Constant(every, 0))

    return types.boolean(doubts), codegen


@intrinsic
def part(typing: Any, tile: Any, number: Any, count: Any) -> tuple[Any, Codegen]:
    """Return part ``number`` of a tile, each of ``count`` vectors."""
    length = count.literal_value
    first = number.literal_value * length
    kind = types.UniTuple(tile.dtype, length)  # type: ignore[no-untyped-call]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return context.make_tuple(b, kind, parts_of(b, arguments[0], len(tile))[first : first + length])

    return kind(tile, number, count), codegen


@intrinsic
def separate(typing: Any, tile: Any, groups: Any) -> tuple[Any, Codegen]:
    """Return the tile with the lanes of so many groups, which lie in turn, one group after another."""
    lanes = [
        lane for first in range(groups.literal_value) for lane in range(tile.dtype.lanes)[first :: groups.literal_value]
    ]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values = parts_of(b, arguments[0], len(tile))
        if groups.literal_value > 1:
            values = [shuffled(b, value, lanes) for value in values]
        return context.make_tuple(b, signature.return_type, values)

    return tile(tile, groups), codegen


def linear(matrices: Callable[..., Any]) -> Any:
    """Return an intrinsic that multiplies a tuple of vectors with a constant matrix, written out.

    Args:
        matrices: from literal integers to the matrix, rows of fractions.
    """

    @intrinsic
    def combine(typing: Any, tile: Any, m: Any, r: Any, stride: Any) -> tuple[Any, Codegen]:
        """Return ``matrices(m, r, stride) @ tile``."""
        matrix = matrices(m.literal_value, r.literal_value, stride.literal_value)
        kind = types.UniTuple(tile.dtype, len(matrix))  # type: ignore[no-untyped-call]

        def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            values = parts_of(b, arguments[0], len(tile))
            return context.make_tuple(b, kind, product(matrix, values, _arithmetic(b, tile.dtype)))

        return kind(tile, m, r, stride), codegen

    return combine


def _arithmetic(b: Any, vector: Vector) -> Arithmetic:
    """Return what writes instructions on vectors."""

    def constant(value: float) -> Any:
        return ir.Constant(vector.ir, [value] * vector.lanes)

    return Arithmetic(
        add=b.fadd,
        subtract=b.fsub,
        scale=lambda value, weight: b.fmul(value, constant(weight)),
        multiply_add=lambda value, weight, total: fused_multiply_add(b, value, constant(weight), total, vector),
        zero=ir.Constant(vector.ir, None),
    )
