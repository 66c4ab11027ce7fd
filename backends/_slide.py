"""A window that slides along a row, for ``depthwise``: vectors of channels, and a tile that is a run of outputs."""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from convdispatch.backends._vector import (
    I64,
    Codegen,
    fused_multiply_add,
    intrinsic,
    load_at,
    parts_of,
    shuffled,
)


@dataclass(frozen=True)
class _Window:
    """The integers that an intrinsic is compiled for."""

    taps: int
    stride: int
    channels: int
    filters: int

    @classmethod
    def of(cls, *literals: Any) -> "_Window":
        return cls(*(literal.literal_value for literal in literals))

    def span(self, outputs: int) -> int:
        """Return how many pixels so many outputs see."""
        return (outputs - 1) * self.stride + self.taps


def _slide(b: Any, tile: Any, window: _Window, values: Any, places: list[Any], filters: Any, row: int) -> Any:
    vector, count, taps, channels = tile.dtype, len(tile), window.taps, window.channels
    size, groups = vector.itemsize, vector.lanes // window.filters
    sums = parts_of(b, values, count)
    numbers = range(row * taps * channels, (row + 1) * taps * channels)
    weights = [load_at(b, vector.ir, filters, number * vector.lanes * size, size) for number in numbers]
    pixel = ir.VectorType(vector.ir.element, groups * channels)
    for p, place in enumerate(places):
        users = [o for o in range(count) if 0 <= p - o * window.stride < taps]
        if users:
            loaded = load_at(b, pixel, place, 0, size)
            for c in range(channels):
                x = _spread(b, loaded, groups, channels, window.filters, c)
                for o in users:
                    sums[o] = fused_multiply_add(b, x, weights[(p - o * window.stride) * channels + c], sums[o], vector)
    return sums


def _spread(b: Any, pixel: Any, groups: int, channels: int, filters: int, c: int) -> Any:
    """Return each group's channel ``c`` in the lanes of all the group's filters."""
    if channels == filters == 1:
        return pixel
    lanes = [group * channels + c for group in range(groups) for _ in range(filters)]
    return shuffled(b, pixel, lanes)


def _few_steps(b: Any, first: Any, step: Any, count: int) -> list[Any]:
    """Return addresses ``step`` bytes apart, each a base plus no, one or two steps: what an instruction can add."""
    two, three = b.shl(step, ir.Constant(I64, 1)), b.mul(step, ir.Constant(I64, 3))
    places = []
    for number in range(count):
        if number and number % 3 == 0:
            first = b.add(first, three)
        places.append([first, b.add(first, step), b.add(first, two)][number % 3])
    return places


@intrinsic
def slide(
    typing: Any, tile: Any, down: Any, taps: Any, stride: Any, channels: Any, filters: Any,
    inputs: Any, line: Any, step: Any, weights: Any,
) -> tuple[Any, Codegen]:  # fmt: skip
    """Return a run of outputs plus ``down`` rows of a filter: output ``o`` gains tap ``j`` times ``o * stride + j``.

    A vector holds the outputs of whole groups of ``filters`` filters each, every group with its own ``channels``
    channels. Pixels are ``step`` bytes apart from ``inputs`` on, rows of them ``line`` bytes; each is loaded once for
    all who need it. ``weights`` are ``[down, taps, channels, lanes]``.
    """
    window = _Window.of(taps, stride, channels, filters)

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, _, _, _, _, first, line, step, packed = arguments
        for row in range(down.literal_value):
            places = _few_steps(b, first, step, window.span(len(tile)))
            values = context.make_tuple(b, tile, _slide(b, tile, window, values, places, packed, row))
            first = b.add(first, line)
        return values

    return tile(tile, down, taps, stride, channels, filters, inputs, line, step, weights), codegen


@intrinsic
def slide_found(
    typing: Any, tile: Any, taps: Any, stride: Any, channels: Any, filters: Any, table: Any, offset: Any, weights: Any
) -> tuple[Any, Codegen]:
    """Do as ``slide`` does, for one row, with pixels that lie anywhere: ``offset`` bytes behind a table's addresses."""
    window = _Window.of(taps, stride, channels, filters)

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        starts = [load_at(b, I64, arguments[5], 8 * p, 8) for p in range(window.span(len(tile)))]
        places = [b.add(start, arguments[6]) for start in starts]
        return context.make_tuple(b, tile, _slide(b, tile, window, arguments[0], places, arguments[7], 0))

    return tile(tile, taps, stride, channels, filters, table, offset, weights), codegen
