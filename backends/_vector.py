"""SIMD vectors inside Numba kernels, for the loops where Numba's own code does not reach the machine's limit.

A kernel handles memory by address, in bytes, and values as tuples of vectors. The compiler keeps such a tuple in
registers, so a kernel holds a *tile* of sums there while it walks over the input: ``rows`` output pixels times
``vectors`` vectors of output channels. Every step of the innermost loop loads ``vectors`` vectors of packed filters
and, for each row, multiplies them with one input value. Sizes are compile-time constants: literal arguments or
integers that the kernel closes over. Lanes and ``itemsize`` (4: float32, 8: float64) make the vector's type.
"""

import operator
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.core.datamodel import models

from convdispatch import machine


def intrinsic(function: Callable[..., Any]) -> Any:
    """Make what writes LLVM instructions a function that kernels call; integers among its arguments are literal."""
    return extending.intrinsic(prefer_literal=True)(function)


I32, I64 = ir.IntType(32), ir.IntType(64)
_SCALARS = {4: (types.float32, ir.FloatType(), "f32"), 8: (types.float64, ir.DoubleType(), "f64")}


def vector_bytes() -> int:
    """Return the width of the vectors that Numba compiles for: this CPU's, unless Numba was told of another."""
    settings: Any = numba.config
    if settings.CPU_NAME or settings.CPU_FEATURES:
        told = settings.CPU_FEATURES or ""
        return 64 if "+avx512f" in told else 32 if "+avx2" in told else 16
    return machine.current().vector_bytes


#: Tiles, rows x vectors, by the number of vector registers: sums, one input and the filters' vectors fit in them.
_TILES = {32: ((6, 4), (14, 2), (8, 3), (28, 1)), 16: ((6, 2), (4, 3), (12, 1))}


def register_tiles() -> tuple[tuple[int, int], ...]:
    """Return the tiles, rows x vectors, that suit the registers: 16 on x86 without AVX-512, 32 elsewhere."""
    x86 = any(name in machine.current().system for name in ("x86_64", "AMD64"))
    return _TILES[16 if x86 and vector_bytes() < 64 else 32]


class Vector(types.Type):
    """The Numba type of a vector of floats."""

    def __init__(self, itemsize: int, lanes: int) -> None:
        """Make the type of ``lanes`` floats of ``itemsize`` bytes."""
        self.itemsize, self.lanes = itemsize, lanes
        super().__init__(name=f"Vector({itemsize}, {lanes})")

    @property
    def ir(self) -> Any:
        """The LLVM type."""
        return ir.VectorType(_SCALARS[self.itemsize][1], self.lanes)


@extending.register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.ir)  # type: ignore[no-untyped-call]


# What the intrinsics below are built of: each adds a few LLVM instructions through `b`, an IRBuilder.


def _at(b: Any, address: Any, offset: int, kind: Any) -> Any:
    return b.inttoptr(b.add(address, ir.Constant(I64, offset)), ir.PointerType(kind))


def _load(b: Any, kind: Any, address: Any, offset: int = 0, align: int = 4) -> Any:
    return b.load(_at(b, address, offset, kind), align=align)


def _splat(b: Any, value: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = b.insert_element(undefined, value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def _fma(b: Any, x: Any, y: Any, z: Any, vector: Vector) -> Any:
    name = f"llvm.fma.v{vector.lanes}{_SCALARS[vector.itemsize][2]}"
    function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
        b.module, ir.FunctionType(x.type, [x.type] * 3), name
    )
    return b.call(function, [x, y, z])


def _parts(b: Any, values: Any, count: int) -> list[Any]:
    return [b.extract_value(values, i) for i in range(count)]


Codegen = Callable[[Any, Any, Any, Any], Any]


@intrinsic
def zeros(typing: Any, count: Any, lanes: Any, itemsize: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Return a tuple of ``count`` zero vectors."""
    vector = Vector(itemsize.literal_value, lanes.literal_value)
    kind = types.UniTuple(vector, count.literal_value)  # type: ignore[no-untyped-call]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return context.make_tuple(b, kind, [ir.Constant(vector.ir, None)] * count.literal_value)

    return kind(count, lanes, itemsize), codegen


@intrinsic
def multiply_add(typing: Any, tile: Any, rows: Any, inputs: Any, offset: Any, filters: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Return the tile plus an outer product: one input value of each row times the vectors at ``filters``.

    ``inputs`` is the address of one input address a row; the values are ``offset`` bytes behind them.
    """
    count, vector = rows.literal_value, tile.dtype
    vectors, size = len(tile) // count, vector.itemsize
    scalar = _SCALARS[size][1]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, table, behind, packed = arguments
        sums = _parts(b, values, len(tile))
        weights = [_load(b, vector.ir, packed, v * vector.lanes * size, size) for v in range(vectors)]
        for row in range(count):
            start = _load(b, I64, table, row * 8, 8)
            x = _splat(b, _load(b, scalar, b.add(start, behind), 0, size), vector.lanes)
            for v in range(vectors):
                sums[row * vectors + v] = _fma(b, x, weights[v], sums[row * vectors + v], vector)
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, rows, inputs, offset, filters), codegen


@intrinsic
def add_to_all(typing: Any, tile: Any, rows: Any, address: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Return the tile with the vectors at ``address`` added to every row: a bias."""
    vector, vectors = tile.dtype, len(tile) // rows.literal_value
    size = vector.itemsize

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        bias = [_load(b, vector.ir, arguments[2], v * vector.lanes * size, size) for v in range(vectors)]
        sums = [b.fadd(value, bias[i % vectors]) for i, value in enumerate(_parts(b, arguments[0], len(tile)))]
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, rows, address), codegen


@intrinsic
def add_to_each(typing: Any, tile: Any, rows: Any, outputs: Any, offset: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Return the tile with each row's vectors, ``offset`` bytes behind its address, added to it: a residual."""
    vector, vectors = tile.dtype, len(tile) // rows.literal_value
    size = vector.itemsize

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        sums = _parts(b, arguments[0], len(tile))
        for row in range(rows.literal_value):
            start = b.add(_load(b, I64, arguments[2], row * 8, 8), arguments[3])
            for v in range(vectors):
                more = _load(b, vector.ir, start, v * vector.lanes * size, size)
                sums[row * vectors + v] = b.fadd(sums[row * vectors + v], more)
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, rows, outputs, offset), codegen


@intrinsic
def clamp(typing: Any, tile: Any, low: Any, high: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Return the tile with every value brought between two floats; NaN stays NaN."""
    vector = tile.dtype

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        scalar = _SCALARS[vector.itemsize][0]
        limits = [context.cast(b, value, kind, scalar) for value, kind in zip(arguments[1:], (low, high), strict=True)]
        bottom, top = (_splat(b, limit, vector.lanes) for limit in limits)
        sums = []
        for value in _parts(b, arguments[0], len(tile)):
            raised = b.select(b.fcmp_ordered("<", value, bottom), bottom, value)
            sums.append(b.select(b.fcmp_ordered(">", raised, top), top, raised))
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, low, high), codegen


@intrinsic
def store(typing: Any, tile: Any, rows: Any, outputs: Any, offset: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Store each row's vectors ``offset`` bytes behind its address in the table at ``outputs``."""
    vector, vectors = tile.dtype, len(tile) // rows.literal_value
    size = vector.itemsize

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        sums = _parts(b, arguments[0], len(tile))
        for row in range(rows.literal_value):
            start = b.add(_load(b, I64, arguments[2], row * 8, 8), arguments[3])
            for v in range(vectors):
                b.store(sums[row * vectors + v], _at(b, start, v * vector.lanes * size, vector.ir), align=size)
        return context.get_dummy_value()

    return types.void(tile, rows, outputs, offset), codegen


# Single vectors, for kernels that are written out step by step.


@intrinsic
def load(typing: Any, address: Any, lanes: Any, itemsize: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Return the vector at an address."""
    vector = Vector(itemsize.literal_value, lanes.literal_value)

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return _load(b, vector.ir, arguments[0], 0, vector.itemsize)

    return vector(address, lanes, itemsize), codegen


@intrinsic
def splat(typing: Any, address: Any, lanes: Any, itemsize: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Return a vector whose lanes all are the one value at an address."""
    vector = Vector(itemsize.literal_value, lanes.literal_value)

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return _splat(b, _load(b, vector.ir.element, arguments[0], 0, vector.itemsize), vector.lanes)

    return vector(address, lanes, itemsize), codegen


@intrinsic
def save(typing: Any, address: Any, vector: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Store a vector at an address."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        b.store(arguments[1], _at(b, arguments[0], 0, vector.ir), align=vector.itemsize)
        return context.get_dummy_value()

    return types.void(address, vector), codegen


@intrinsic
def fma(typing: Any, x: Any, y: Any, z: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Return ``x * y + z`` lane by lane, rounded once."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return _fma(b, arguments[0], arguments[1], arguments[2], x)

    return x(x, y, z), codegen


def _elementwise(operation: Any, instruction: str) -> None:
    """Make an operator of Python work on vectors."""

    @intrinsic
    def apply(typing: Any, x: Any, y: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
        def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
            return getattr(b, instruction)(*arguments)

        return x(x, y), codegen

    def call(x: Any, y: Any) -> Any:
        return apply(x, y)

    def choose(x: Any, y: Any) -> Any:
        return call if isinstance(x, Vector) and x == y else None

    extending.overload(operation)(choose)


_elementwise(operator.add, "fadd")
_elementwise(operator.sub, "fsub")
_elementwise(operator.mul, "fmul")


# Tuples of vectors that lie apart in memory, or hang together otherwise.


@intrinsic
def gather(
    typing: Any, table: Any, step: Any, offset: Any, count: Any, lanes: Any, itemsize: Any
) -> tuple[Any, Codegen]:
    """Return ``count`` vectors, each ``offset`` bytes behind an address; the addresses are ``step`` bytes apart."""
    vector = Vector(itemsize.literal_value, lanes.literal_value)
    kind = types.UniTuple(vector, count.literal_value)  # type: ignore[no-untyped-call]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        place, values = arguments[0], []
        for _ in range(count.literal_value):
            values.append(_load(b, vector.ir, b.add(_load(b, I64, place, 0, 8), arguments[2]), 0, vector.itemsize))
            place = b.add(place, arguments[1])
        return context.make_tuple(b, kind, values)

    return kind(types.int64, types.int64, types.int64, count, lanes, itemsize), codegen


@intrinsic
def load_apart(typing: Any, address: Any, step: Any, count: Any, lanes: Any, itemsize: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Return ``count`` vectors that lie ``step`` bytes apart."""
    vector = Vector(itemsize.literal_value, lanes.literal_value)
    kind = types.UniTuple(vector, count.literal_value)  # type: ignore[no-untyped-call]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        place, values = arguments[0], []
        for _ in range(count.literal_value):
            values.append(_load(b, vector.ir, place, 0, vector.itemsize))
            place = b.add(place, arguments[1])
        return context.make_tuple(b, kind, values)

    return kind(types.int64, types.int64, count, lanes, itemsize), codegen


@intrinsic
def save_apart(typing: Any, address: Any, step: Any, tile: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Store vectors ``step`` bytes apart."""
    vector = tile.dtype

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        place = arguments[0]
        for value in _parts(b, arguments[2], len(tile)):
            b.store(value, _at(b, place, 0, vector.ir), align=vector.itemsize)
            place = b.add(place, arguments[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, tile), codegen


@intrinsic
def add_doubts(typing: Any, doubts: Any, tile: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Return a vector that becomes NaN where any of the tile's values is NaN or infinite, and stays 0 elsewhere."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        total = arguments[0]
        for value in _parts(b, arguments[1], len(tile)):
            total = _fma(b, value, ir.Constant(doubts.ir, None), total, doubts)
        return total

    return doubts(doubts, tile), codegen


def linear(matrices: Callable[..., Any]) -> Any:
    """Return an intrinsic that multiplies a tuple of vectors with a constant matrix, written out term by term.

    Args:
        matrices: from literal integers to the matrix, rows of numbers.
    """

    @intrinsic
    def combine(typing: Any, tile: Any, m: Any, r: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
        """Return ``matrices(m, r) @ tile``."""
        matrix = matrices(m.literal_value, r.literal_value)
        kind = types.UniTuple(tile.dtype, len(matrix))  # type: ignore[no-untyped-call]

        def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
            values = _parts(b, arguments[0], len(tile))
            return context.make_tuple(b, kind, [_weighted_sum(b, row, values, tile.dtype) for row in matrix])

        return kind(tile, m, r), codegen

    return combine


def _weighted_sum(b: Any, weights: Any, values: list[Any], vector: Vector) -> Any:
    total = None
    terms = [(float(w), v) for w, v in zip(weights, values, strict=True) if w]
    for weight, value in sorted(terms, key=lambda term: term[0] != 1):
        if total is None:
            total = value if weight == 1 else b.fmul(value, _constant(vector, weight))
        elif weight == 1:
            total = b.fadd(total, value)
        elif weight == -1:
            total = b.fsub(total, value)
        else:
            total = _fma(b, value, _constant(vector, weight), total, vector)
    return ir.Constant(vector.ir, None) if total is None else total


def _constant(vector: Vector, value: float) -> Any:
    return ir.Constant(vector.ir, [value] * vector.lanes)


# A window that slides along a row, for kernels whose vectors lie along the channels: a tile is a run of outputs.


def _slide(b: Any, tile: Any, arguments: Any, taps: int, stride: int, address: Callable[[int, Any], Any]) -> list[Any]:
    values, _, _, start, step, filters = arguments[:6]
    vector, count = tile.dtype, len(tile)
    sums = _parts(b, values, count)
    weights = [_load(b, vector.ir, filters, j * vector.lanes * vector.itemsize, vector.itemsize) for j in range(taps)]
    for p in range((count - 1) * stride + taps):
        users = [o for o in range(count) if 0 <= p - o * stride < taps]
        if users:
            x = _load(b, vector.ir, address(p, b.add(start, b.mul(step, ir.Constant(I64, p)))), 0, vector.itemsize)
            for o in users:
                sums[o] = _fma(b, x, weights[p - o * stride], sums[o], vector)
    return sums


@intrinsic
def slide(typing: Any, tile: Any, taps: Any, stride: Any, inputs: Any, step: Any, filters: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Return a run of outputs plus one row of a filter: output ``o`` gains tap ``j`` times pixel ``o * stride + j``.

    Pixels are the vectors ``step`` bytes apart from ``inputs`` on, each loaded once for all who need it; taps lie side
    by side at ``filters``.
    """

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        sums = _slide(b, tile, arguments, taps.literal_value, stride.literal_value, lambda _, address: address)
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, taps, stride, inputs, step, filters), codegen


@intrinsic
def slide_clipped(
    typing: Any,  # noqa: ARG001
    tile: Any, taps: Any, stride: Any, inputs: Any, step: Any, filters: Any, column: Any, jump: Any, width: Any, zero: Any,
) -> tuple[Any, Codegen]:  # fmt: skip
    """Do as ``slide`` does where pixels may lie outside the image: these are read at the address ``zero`` instead.

    Pixel ``p`` is in column ``column + p * jump`` of ``width`` columns.
    """

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        first, apart, columns, nothing = arguments[6:]

        def address(p: int, inside: Any) -> Any:
            here = b.add(first, b.mul(apart, ir.Constant(I64, p)))
            return b.select(b.icmp_unsigned("<", here, columns), inside, nothing)  # as unsigned, -1 is large

        sums = _slide(b, tile, arguments, taps.literal_value, stride.literal_value, address)
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, taps, stride, inputs, step, filters, column, jump, width, zero), codegen


# For filters that slide over columns: the vectors are neighbouring columns, and the tile's rows share what they read.


@intrinsic
def add_rows(typing: Any, tile: Any, rows: Any, inputs: Any, step: Any, filters: Any, taps: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Return the tile plus one column of ``taps`` filter values, at ``filters``, slid down over rows of input.

    The input's rows are ``step`` bytes apart. Each is loaded once, for all the rows of the tile that it is part of.
    """
    count, height, vector = rows.literal_value, taps.literal_value, tile.dtype
    vectors, size = len(tile) // count, vector.itemsize

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, place, down, packed, _ = arguments
        sums = _parts(b, values, len(tile))
        scalar = vector.ir.element
        weights = [_splat(b, _load(b, scalar, packed, t * size, size), vector.lanes) for t in range(height)]
        for i in range(count + height - 1):
            inputs = [_load(b, vector.ir, place, v * vector.lanes * size, size) for v in range(vectors)]
            place = b.add(place, down)
            for r in range(max(0, i - height + 1), min(count, i + 1)):
                for v in range(vectors):
                    sums[r * vectors + v] = _fma(b, inputs[v], weights[i - r], sums[r * vectors + v], vector)
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
def weave(typing: Any, target: Any, source: Any, apart: Any, count: Any, like: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Interleave ``count`` vectors, ``apart`` bytes apart at ``source``, into as many in a row at ``target``.

    ``like`` is a tuple of vectors of the kind that is meant.
    """
    vector, number = like.dtype, count.literal_value

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        place, values = arguments[1], []
        for _ in range(number):
            values.append(_load(b, vector.ir, place, 0, vector.itemsize))
            place = b.add(place, arguments[2])
        for v in range(number):
            items = range(v * vector.lanes, (v + 1) * vector.lanes)
            woven = _pick(b, values, [(item % number, item // number) for item in items])
            to = _at(b, arguments[0], v * vector.lanes * vector.itemsize, vector.ir)
            b.store(woven, to, align=vector.itemsize)
        return context.get_dummy_value()

    return types.void(target, source, apart, count, like), codegen


@intrinsic
def unweave(typing: Any, target: Any, source: Any, apart: Any, count: Any, like: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Undo ``weave``: of ``count`` vectors in a row at ``source`` make as many, ``apart`` bytes apart at ``target``."""
    vector, number = like.dtype, count.literal_value

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        step = vector.lanes * vector.itemsize
        values = [_load(b, vector.ir, arguments[1], v * step, vector.itemsize) for v in range(number)]
        place = arguments[0]
        for v in range(number):
            items = range(v, vector.lanes * number, number)
            own = _pick(b, values, [(item // vector.lanes, item % vector.lanes) for item in items])
            b.store(own, _at(b, place, 0, vector.ir), align=vector.itemsize)
            place = b.add(place, arguments[2])
        return context.get_dummy_value()

    return types.void(target, source, apart, count, like), codegen


@extending.overload_attribute(Vector, "lanes")
def _lanes(vector: Any) -> Any:
    count = vector.lanes

    def lanes(vector: Any) -> Any:  # noqa: ARG001  # Numba matches by name
        return count

    return lanes
