"""Tiles of 32-bit sums of products of bytes, four at a time, for ``int8_dot``: the processor's VNNI instructions.

A sum is a vector of the same width as floats are, and is handled as their bits.
"""

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from convdispatch import machine
from convdispatch.backends._vector import (
    I32,
    I64,
    WIDEST,
    Codegen,
    Vector,
    broadcast,
    intrinsic,
    load_at,
    parts_of,
    vector_bytes,
)

#: Lanes of 32 bits.
LANES = 16


@functools.cache
def available() -> bool:
    """Return whether compiled code may use 512-bit VNNI here."""
    return "avx512_vnni" in machine.current().isa and vector_bytes() == WIDEST


def _multiply_add(b: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Return each lane's total plus the four products of its bytes, wrapping."""
    kind = ir.VectorType(I32, LANES)
    function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
        b.module, ir.FunctionType(kind, [kind] * 3), "llvm.x86.avx512.vpdpbusd.512"
    )
    return b.call(function, [total, unsigned, signed])


@intrinsic
def start(typing: Any, rows: Any, vectors: Any, address: Any) -> tuple[Any, Codegen]:
    """Return a tile of which every row is the vectors at ``address``."""
    vector = Vector(4, LANES)
    kind = types.UniTuple(vector, rows.literal_value * vectors.literal_value)  # type: ignore[no-untyped-call]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        first = [load_at(b, vector.ir, arguments[2], v * LANES * 4) for v in range(vectors.literal_value)]
        return context.make_tuple(b, kind, first * rows.literal_value)

    return kind(rows, vectors, types.int64), codegen


@intrinsic
def dot_add(typing: Any, tile: Any, rows: Any, inputs: Any, offset: Any, filters: Any) -> tuple[Any, Codegen]:
    """Return the tile plus four channels: each row's four unsigned bytes times the signed ones of every filter.

    ``inputs`` is the address of one input address a row; the bytes are ``offset`` behind them.
    """
    count = rows.literal_value
    vectors, whole = len(tile) // count, ir.VectorType(I32, LANES)

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, table, behind, packed = arguments
        sums = [b.bitcast(value, whole) for value in parts_of(b, values, len(tile))]
        weights = [load_at(b, whole, packed, v * LANES * 4) for v in range(vectors)]
        for row in range(count):
            place = b.add(load_at(b, I64, table, row * 8, 8), behind)
            x = broadcast(b, load_at(b, I32, place), LANES)
            for v in range(vectors):
                sums[row * vectors + v] = _multiply_add(b, sums[row * vectors + v], x, weights[v])
        return context.make_tuple(b, signature.return_type, [b.bitcast(total, tile.dtype.ir) for total in sums])

    return tile(tile, rows, inputs, offset, filters), codegen
