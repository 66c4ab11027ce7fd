"""Rows of images from one layout and dtype to another: NCHW, 16-bit floats and integers, and kernels' own.

Channels and pixels change places by squares of vectors that are transposed in registers. Ends overlap: the last
square is moved back until it fits.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from convdispatch.backends._jit import compilable
from convdispatch.backends._tuples import load_apart, save_apart
from convdispatch.backends._vector import (
    I32,
    I64,
    Codegen,
    Vector,
    address_of,
    clear,
    copy,
    hold,
    intrinsic,
    load_at,
    parts_of,
    spaced,
)
from convdispatch.memory import CACHE_LINE

#: How numbers lie in memory: as the kernel computes with them, as floats of 16 bits, or as integers.
SAME, FLOAT16, BFLOAT16, INT8, UINT8, INT16, UINT16, INT32 = range(8)
STORAGES = {
    "float16": FLOAT16, "bfloat16": BFLOAT16, "int8": INT8, "uint8": UINT8, "int16": INT16, "uint16": UINT16,
    "int32": INT32,
}  # fmt: skip
_BYTES = {FLOAT16: 2, BFLOAT16: 2, INT8: 1, UINT8: 1, INT16: 2, UINT16: 2, INT32: 4}
_UNSIGNED = {UINT8, UINT16}


def _stored_bytes(storage: int, itemsize: int) -> int:
    return _BYTES.get(storage, itemsize)


@intrinsic
def stored_bytes(typing: Any, storage: Any, itemsize: Any) -> tuple[Any, Codegen]:
    """Return the bytes of a number in some storage."""
    size = _stored_bytes(storage.literal_value, itemsize.literal_value)

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(I64, size)

    return types.int64(storage, itemsize), codegen


def _decoded(b: Any, vector: Vector, storage: int, address: Any) -> Any:
    if storage == SAME:
        return load_at(b, vector.ir, address, 0, vector.itemsize)
    if storage == FLOAT16:
        return b.fpext(load_at(b, ir.VectorType(ir.HalfType(), vector.lanes), address, 0, 2), vector.ir)
    if storage != BFLOAT16:
        size = _BYTES[storage]
        whole = load_at(b, ir.VectorType(ir.IntType(8 * size), vector.lanes), address, 0, size)
        return (b.uitofp if storage in _UNSIGNED else b.sitofp)(whole, vector.ir)
    halves = load_at(b, ir.VectorType(ir.IntType(16), vector.lanes), address, 0, 2)
    wide = b.zext(halves, ir.VectorType(I32, vector.lanes))
    return b.bitcast(b.shl(wide, _all(wide.type, 16)), vector.ir)


def _encoded(b: Any, vector: Vector, storage: int, value: Any) -> Any:
    """Return a vector rounded to nearest, to even between two; NaN stays NaN. Whole numbers as integers wrap."""
    if storage == SAME:
        return value
    if storage == FLOAT16:
        return b.fptrunc(value, ir.VectorType(ir.HalfType(), vector.lanes))
    if storage != BFLOAT16:
        wide = b.fptosi(value, ir.VectorType(ir.IntType(8 * vector.itemsize), vector.lanes))
        narrow = ir.VectorType(ir.IntType(8 * _BYTES[storage]), vector.lanes)
        return wide if wide.type == narrow else b.trunc(wide, narrow)
    bits = b.bitcast(value, ir.VectorType(I32, vector.lanes))
    odd = b.and_(b.lshr(bits, _all(bits.type, 16)), _all(bits.type, 1))
    rounded = b.add(b.add(bits, _all(bits.type, 0x7FFF)), odd)
    quiet = b.or_(bits, _all(bits.type, 1 << 22))
    kept = b.select(b.fcmp_unordered("uno", value, value), quiet, rounded)
    return b.trunc(b.lshr(kept, _all(bits.type, 16)), ir.VectorType(ir.IntType(16), vector.lanes))


def _all(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


@intrinsic
def decode(
    typing: Any, address: Any, step: Any, count: Any, lanes: Any, itemsize: Any, storage: Any
) -> tuple[Any, Codegen]:
    """Return ``count`` vectors that lie ``step`` bytes apart in some storage."""
    vector = Vector(itemsize.literal_value, lanes.literal_value)
    kind = types.UniTuple(vector, count.literal_value)  # type: ignore[no-untyped-call]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        places = spaced(b, arguments[0], arguments[1], count.literal_value)
        values = [_decoded(b, vector, storage.literal_value, place) for place in places]
        return context.make_tuple(b, kind, values)

    return kind(types.int64, types.int64, count, lanes, itemsize, storage), codegen


@intrinsic
def encode(typing: Any, address: Any, step: Any, tile: Any, storage: Any) -> tuple[Any, Codegen]:
    """Store vectors ``step`` bytes apart in some storage."""
    vector = tile.dtype

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        places = spaced(b, arguments[0], arguments[1], len(tile))
        for value, place in zip(parts_of(b, arguments[2], len(tile)), places, strict=True):
            stored = _encoded(b, vector, storage.literal_value, value)
            align = _stored_bytes(storage.literal_value, vector.itemsize)
            b.store(stored, address_of(b, place, 0, stored.type), align=align)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, tile, storage), codegen


@intrinsic
def transposed(typing: Any, tile: Any) -> tuple[Any, Codegen]:
    """Return as many vectors as they have lanes with rows and columns exchanged."""
    lanes = tile.dtype.lanes

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, half = parts_of(b, arguments[0], lanes), lanes // 2
        while half:  # exchange the squares of this size that lie off the diagonal of larger ones
            upper = [lane if not lane & half else lanes + lane - half for lane in range(lanes)]
            lower = [lane + half if not lane & half else lanes + lane for lane in range(lanes)]
            for row in range(lanes):
                if not row & half:
                    pair = values[row], values[row + half]
                    for place, mask in ((row, upper), (row + half, lower)):
                        values[place] = b.shuffle_vector(*pair, ir.Constant(ir.VectorType(I32, lanes), mask))
            half //= 2
        return context.make_tuple(b, tile, values)

    return tile(tile), codegen


@compilable
def _convert(source, target, count, into, lanes, itemsize, storage):  # type: ignore[no-untyped-def]
    """Copy ``count`` numbers that lie side by side, from storage (``into`` is false) or into it."""
    stored = stored_bytes(storage, itemsize)
    for i in range(0, count, lanes):
        if count >= lanes:
            at = min(i, count - lanes)
            if into:
                encode(target + at * stored, 0, load_apart(source + at * itemsize, 0, 1, lanes, itemsize), storage)
            else:
                save_apart(target + at * itemsize, 0, decode(source + at * stored, 0, 1, lanes, itemsize, storage))
        else:
            for at in range(count):
                if into:
                    encode(target + at * stored, 0, load_apart(source + at * itemsize, 0, 1, 1, itemsize), storage)
                else:
                    save_apart(target + at * itemsize, 0, decode(source + at * stored, 0, 1, 1, itemsize, storage))


@compilable
def _before_line(address, size, lanes):  # type: ignore[no-untyped-def]
    """Return a start, 0 or less, from which steps of so many lanes come to where a cache line begins.

    Planes of a power of two are all in the same few places of the cache; a line that is needed twice is gone by then.
    """
    short = (-address % CACHE_LINE // size) % lanes
    return short - lanes if short else 0


@compilable
def gather_planes(source, plane, target, channels, pixels, lanes, itemsize, storage):  # type: ignore[no-untyped-def]
    """Copy ``pixels`` of planes ``plane`` bytes apart to ``[pixels, channels]``.

    With fewer channels than lanes, each pixel's vector is stored whole and the next covers its surplus; so the last
    pixels go by way of scratch memory.
    """
    stored = stored_bytes(storage, itemsize)
    if pixels < lanes:
        for p in range(pixels):
            for c in range(channels):
                value = decode(source + c * plane + p * stored, 0, 1, 1, itemsize, storage)
                save_apart(target + (p * channels + c) * itemsize, 0, value)
        return
    some = np.empty(2 * lanes * lanes * itemsize if channels < lanes else 0, np.uint8)
    for j in range(0, channels, lanes):  # the outer loop: of so many planes, hardware foresees what is read next
        c = max(0, min(j, channels - lanes))
        for i in range(_before_line(source, stored, lanes), pixels, lanes):
            p = max(0, min(i, pixels - lanes))
            to = target + (p * channels + c) * itemsize
            if channels >= lanes:
                square = decode(source + c * plane + p * stored, plane, lanes, lanes, itemsize, storage)
                save_apart(to, channels * itemsize, transposed(square))
                continue
            square = transposed(_few_planes(source + p * stored, plane, channels, lanes, itemsize, storage))
            if (p + lanes - 1) * channels + lanes <= pixels * channels:
                save_apart(to, channels * itemsize, square)
            else:
                save_apart(some.ctypes.data, channels * itemsize, square)
                copy(to, some.ctypes.data, lanes * channels * itemsize)
    hold(some)


@intrinsic
def _few_planes(
    typing: Any, address: Any, step: Any, planes: Any, lanes: Any, itemsize: Any, storage: Any
) -> tuple[Any, Codegen]:
    """Return as many vectors as they have lanes, from planes that are fewer: the last one again and again."""
    vector = Vector(itemsize.literal_value, lanes.literal_value)
    kind = types.UniTuple(vector, vector.lanes)  # type: ignore[no-untyped-call]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, last = [], b.sub(arguments[2], ir.Constant(arguments[2].type, 1))
        for number in range(vector.lanes):
            which = ir.Constant(last.type, number)
            plane = b.select(b.icmp_signed("<", which, last), which, last)
            place = b.add(arguments[0], b.mul(plane, arguments[1]))
            values.append(_decoded(b, vector, storage.literal_value, place))
        return context.make_tuple(b, kind, values)

    return kind(types.int64, types.int64, types.int64, lanes, itemsize, storage), codegen


@compilable
def _scatter_planes(source, target, plane, channels, pixels, lanes, itemsize, storage):  # type: ignore[no-untyped-def]
    """Undo ``gather_planes``; a vector may be read beyond the last pixel, where the source has room for it."""
    stored = stored_bytes(storage, itemsize)
    if pixels < lanes:
        for p in range(pixels):
            for c in range(channels):
                value = load_apart(source + (p * channels + c) * itemsize, 0, 1, 1, itemsize)
                encode(target + c * plane + p * stored, 0, value, storage)
        return
    some = np.empty(lanes * lanes * itemsize, np.uint8)
    for j in range(0, channels, lanes):
        c = max(0, min(j, channels - lanes))
        for i in range(_before_line(target, stored, lanes), pixels, lanes):
            p = max(0, min(i, pixels - lanes))
            square = load_apart(source + (p * channels + c) * itemsize, channels * itemsize, lanes, lanes, itemsize)
            if channels >= lanes:
                encode(target + c * plane + p * stored, plane, transposed(square), storage)
            else:
                save_apart(some.ctypes.data, lanes * itemsize, transposed(square))
                for k in range(channels):
                    row = load_apart(some.ctypes.data + k * lanes * itemsize, 0, 1, lanes, itemsize)
                    encode(target + k * plane + p * stored, 0, row, storage)
    hold(some)


@compilable
def stage(source, target, first, rows, shape, planar, lanes, itemsize, storage):  # type: ignore[no-untyped-def]
    """Copy rows of an image to NHWC: ``rows`` of them from ``first`` on, zeros where these lie outside.

    Args:
        source: address of the image in its own layout.
        target: address of ``[rows, width, channels]``.
        first: the first row, which may be negative.
        rows: how many.
        shape: height, width and channels of the image.
        planar: whether its layout is CHW and not HWC.
        lanes, itemsize, storage: literal; see ``decode``.
    """
    height, width, channels = shape
    stored = stored_bytes(storage, itemsize)
    line = width * channels * itemsize
    low, high = max(0, -first), min(rows, height - first)
    if high > low:
        if planar:
            at = source + (first + low) * width * stored
            plane = height * width * stored
            gather_planes(at, plane, target + low * line, channels, (high - low) * width, lanes, itemsize, storage)
        else:
            at = source + (first + low) * width * channels * stored
            _convert(at, target + low * line, (high - low) * width * channels, False, lanes, itemsize, storage)
    clear(target, min(low, rows) * line)
    if high < rows:
        clear(target + max(high, 0) * line, (rows - max(high, 0)) * line)


@compilable
def unstage(source, target, first, rows, shape, planar, lanes, itemsize, storage):  # type: ignore[no-untyped-def]
    """Undo ``stage`` for rows that lie inside: from ``[rows, width, channels]`` to the image's layout."""
    height, width, channels = shape
    stored = stored_bytes(storage, itemsize)
    if planar:
        at = target + first * width * stored
        _scatter_planes(source, at, height * width * stored, channels, rows * width, lanes, itemsize, storage)
    else:
        at = target + first * width * channels * stored
        _convert(source, at, rows * width * channels, True, lanes, itemsize, storage)
