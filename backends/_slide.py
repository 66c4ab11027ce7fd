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


@intrinsic
def slide_down(
    typing: Any, tile: Any, high: Any, down: Any, taps: Any, stride: Any, inputs: Any, line: Any, step: Any,
    weights: Any,
) -> tuple[Any, Codegen]:  # fmt: skip
    """Do as ``slide`` does for ``high`` rows of outputs, ``stride`` apart too: a pixel is loaded once for all of them.

    The tile is ``[high, outputs of a row]``; every channel has one filter.
    """
    window = _Window(taps.literal_value, stride.literal_value, 1, 1)
    filter_rows, vector, across = down.literal_value, tile.dtype, len(tile) // high.literal_value

    def met(pixel: int, outputs: int, size: int) -> list[tuple[int, int]]:
        """Return the outputs that see a pixel, and by which tap."""
        taps = [(o, pixel - o * window.stride) for o in range(outputs)]
        return [(o, tap) for o, tap in taps if 0 <= tap < size]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, _, _, _, _, first, line, step, packed = arguments
        sums, size = parts_of(b, values, len(tile)), vector.itemsize
        numbers = range(filter_rows * window.taps)
        weights = [load_at(b, vector.ir, packed, number * vector.lanes * size, size) for number in numbers]
        for i in range((high.literal_value - 1) * window.stride + filter_rows):
            for p, place in enumerate(_few_steps(b, first, step, window.span(across))):
                x = load_at(b, vector.ir, place, 0, size)
                for row, tap_row in met(i, high.literal_value, filter_rows):
                    for o, tap in met(p, across, window.taps):
                        weight = weights[tap_row * window.taps + tap]
                        sums[row * across + o] = fused_multiply_add(b, x, weight, sums[row * across + o], vector)
            first = b.add(first, line)
        return context.make_tuple(b, tile, sums)

    return tile(tile, high, down, taps, stride, inputs, line, step, weights), codegen
