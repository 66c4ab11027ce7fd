"""Sums that are vectors along the channels, for ``inner_product``: a tile of some pixels times some filters."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types

from convdispatch.backends._tile import lane_masks, masked, starts
from convdispatch.backends._vector import (
    I32,
    I64,
    Codegen,
    address_of,
    fused_multiply_add,
    intrinsic,
    load_at,
    parts_of,
    spaced,
)


@intrinsic
def multiply_each(typing: Any, tile: Any, pixels: Any, inputs: Any, filters: Any) -> tuple[Any, Codegen]:
    """Return the tile ``[pixels, filters]`` plus the vector of each pixel times that of each filter.

    ``inputs`` are the first pixel's address and the bytes from one to the next; ``filters`` lie side by side.
    """

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, where, packed = arguments
        places = list(starts(b, pixels.literal_value, inputs, where, ir.Constant(I64, 0)))
        seen = [functools.partial(load_at, b, tile.dtype.ir, at, 0, tile.dtype.itemsize) for at in places]
        return context.make_tuple(b, tile, _products(b, tile, values, seen, packed))

    return tile(tile, pixels, inputs, filters), codegen


@intrinsic
def multiply_some(typing: Any, tile: Any, pixels: Any, inputs: Any, filters: Any, count: Any) -> tuple[Any, Codegen]:
    """Do as ``multiply_each`` does with the first ``count`` values of each pixel; the filters' others are zeros."""
    vector = tile.dtype

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, where, packed, valid = arguments
        (mask,) = lane_masks(b, vector, 1, valid)
        seen: list[Callable[[], Any]] = []
        align, none = ir.Constant(I32, vector.itemsize), ir.Constant(vector.ir, None)
        for at in starts(b, pixels.literal_value, inputs, where, ir.Constant(I64, 0)):
            place = address_of(b, at, 0, vector.ir)
            load = masked(b, "load", vector, place)
            seen.append(functools.partial(b.call, load, [place, align, mask, none]))
        return context.make_tuple(b, tile, _products(b, tile, values, seen, packed))

    return tile(tile, pixels, inputs, filters, types.int64), codegen


def _products(b: Any, tile: Any, values: Any, seen: Sequence[Callable[[], Any]], packed: Any) -> list[Any]:
    """Return the sums plus all products; of the longer side of the tile, one vector at a time is in a register."""
    vector, filters = tile.dtype, len(tile) // len(seen)
    sums, step = parts_of(b, values, len(tile)), vector.lanes * vector.itemsize

    def add_product(p: int, f: int, x: Any, weight: Any) -> None:
        at = p * filters + f
        sums[at] = fused_multiply_add(b, x, weight, sums[at], vector)

    def weight(f: int) -> Any:
        return load_at(b, vector.ir, packed, f * step, vector.itemsize)

    if filters < len(seen):
        weights = [weight(f) for f in range(filters)]
        for p, load in enumerate(seen):
            x = load()
            for f in range(filters):
                add_product(p, f, x, weights[f])
    else:
        vectors = [load() for load in seen]
        for f in range(filters):
            w = weight(f)
            for p, x in enumerate(vectors):
                add_product(p, f, x, w)
    return sums


@intrinsic
def slide_each(
    typing: Any, tile: Any, pixels: Any, taps: Any, stride: Any, inputs: Any, filters: Any
) -> tuple[Any, Codegen]:
    """Return the tile ``[pixels, filters]`` plus, tap by tap, a vector of what a pixel sees times that of each filter.

    Output ``o`` sees input ``o * stride + tap``. Each input is loaded once for all that see it. ``inputs`` are the
    first one's address and the bytes from one to the next, ``filters`` ``[taps, filters, lanes]``.
    """
    vector, outputs, length = tile.dtype, pixels.literal_value, taps.literal_value
    count, size = len(tile) // outputs, vector.itemsize

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, _, _, where, packed = arguments
        sums = parts_of(b, values, len(tile))
        weights = [load_at(b, vector.ir, packed, i * vector.lanes * size, size) for i in range(length * count)]
        first, step = parts_of(b, where, 2)
        for number, place in enumerate(spaced(b, first, step, (outputs - 1) * stride.literal_value + length)):
            x = load_at(b, vector.ir, place, 0, size)
            for o in range(outputs):
                tap = number - o * stride.literal_value
                for f in range(count if 0 <= tap < length else 0):
                    at = o * count + f
                    sums[at] = fused_multiply_add(b, x, weights[tap * count + f], sums[at], vector)
        return context.make_tuple(b, tile, sums)

    return tile(tile, pixels, taps, stride, inputs, filters), codegen


@intrinsic
def sum_lanes(typing: Any, tile: Any) -> tuple[Any, Codegen]:
    """Return the sums of each vector's lanes, side by side in as many vectors as they take.

    Two vectors become one, whose halves are the halves of each added up; then two of these one, and so on.
    """
    vector, lanes = tile.dtype, tile.dtype.lanes
    made = types.UniTuple(vector, -(-len(tile) // lanes))  # type: ignore[no-untyped-call]

    def folded(b: Any, values: list[Any], length: int) -> list[Any]:
        """Fold runs of so many lanes to their halves, those of two vectors into one."""
        firsts = [run + lane for run in range(0, 2 * lanes, length) for lane in range(length // 2)]
        halves = [ir.Constant(ir.VectorType(I32, lanes), [at + behind for at in firsts]) for behind in (0, length // 2)]
        pairs = zip(values[::2], values[1::2] + values[-1:], strict=False)
        return [b.fadd(*(b.shuffle_vector(*pair, half) for half in halves)) for pair in pairs]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        sums, results = parts_of(b, arguments[0], len(tile)), []
        for first in range(0, len(sums), lanes):
            some, length = sums[first : first + lanes], lanes
            while length > 1:
                some, length = folded(b, some, length), length // 2
            results += some
        return context.make_tuple(b, made, results)

    return made(tile), codegen
