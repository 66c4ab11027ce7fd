"""A window that slides along a row, for ``depthwise``: vectors of channels, and a tile that is a run of outputs."""

import itertools
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
    """The integers that an intrinsic is compiled for.

    Attributes:
        high: rows of outputs.
        down: rows of taps.
        taps: of a row.
        stride: of the outputs among the pixels, across, and down where there are several rows of outputs.
        channels: of a group.
        filters: of a group.
    """

    high: int
    down: int
    taps: int
    stride: int
    channels: int
    filters: int

    @classmethod
    def of(cls, *literals: Any) -> "_Window":
        return cls(*(literal.literal_value for literal in literals))

    def span(self, outputs: int) -> int:
        """Return how many pixels of a row so many outputs of a row see."""
        return (outputs - 1) * self.stride + self.taps

    def height(self) -> int:
        """Return how many rows of pixels the outputs see."""
        return (self.high - 1) * self.stride + self.down

    def met(self, pixel: int, outputs: int, taps: int) -> list[tuple[int, int]]:
        """Return the outputs, along one axis, that see a pixel, and by which tap."""
        seen = [(output, pixel - output * self.stride) for output in range(outputs)]
        return [(output, tap) for output, tap in seen if 0 <= tap < taps]


def _slide(b: Any, tile: Any, window: _Window, values: Any, lines: list[list[Any]], filters: Any) -> Any:
    """Return the sums plus all products of a window's taps and the pixels at these places, row by row."""
    vector, across, channels = tile.dtype, len(tile) // window.high, window.channels
    size, groups, row_weights = vector.itemsize, vector.lanes // window.filters, window.taps * channels
    sums = parts_of(b, values, len(tile))
    weights: list[Any] = []
    pixel = ir.VectorType(vector.ir.element, groups * channels)
    for i, places in enumerate(lines):
        if i < window.down:
            numbers = range(i * row_weights, (i + 1) * row_weights)
            weights += [load_at(b, vector.ir, filters, number * vector.lanes * size, size) for number in numbers]
        for p, place in enumerate(places):
            users = window.met(p, across, window.taps)
            if users:
                loaded = load_at(b, pixel, place, 0, size)
                for c in range(channels):
                    x = _spread(b, loaded, groups, channels, window.filters, c)
                    for (row, down), (o, tap) in itertools.product(window.met(i, window.high, window.down), users):
                        weight, at = weights[down * row_weights + tap * channels + c], row * across + o
                        sums[at] = fused_multiply_add(b, x, weight, sums[at], vector)
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
    typing: Any, tile: Any, high: Any, down: Any, taps: Any, stride: Any, channels: Any, filters: Any,
    inputs: Any, line: Any, step: Any, weights: Any,
) -> tuple[Any, Codegen]:  # fmt: skip
    """Return outputs plus ``down`` rows of a filter: output ``o`` of a row gains tap ``j`` times ``o * stride + j``.

    The tile is ``high`` rows of outputs, ``stride`` apart too. A vector holds the outputs of whole groups of
    ``filters`` filters each, every group with its own ``channels`` channels. Pixels are ``step`` bytes apart from
    ``inputs`` on, rows of them ``line`` bytes; each is loaded once for all who need it. ``weights`` are
    ``[down, taps, channels, lanes]``.
    """
    window = _Window.of(high, down, taps, stride, channels, filters)

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        first, line, step, packed = arguments[-4:]
        lines = []
        for _ in range(window.height()):
            lines.append(_few_steps(b, first, step, window.span(len(tile) // window.high)))
            first = b.add(first, line)
        return context.make_tuple(b, tile, _slide(b, tile, window, arguments[0], lines, packed))

    return tile(tile, high, down, taps, stride, channels, filters, inputs, line, step, weights), codegen


@intrinsic
def slide_found(
    typing: Any, tile: Any, high: Any, down: Any, taps: Any, stride: Any, channels: Any, filters: Any,
    table: Any, offset: Any, weights: Any,
) -> tuple[Any, Codegen]:  # fmt: skip
    """Do as ``slide`` does with pixels that lie anywhere: ``offset`` bytes behind a table's addresses, row by row."""
    window = _Window.of(high, down, taps, stride, channels, filters)

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        table, offset, packed = arguments[-3:]
        span, lines = window.span(len(tile) // window.high), []
        for row in range(window.height()):
            starts = [load_at(b, I64, table, 8 * (row * span + p), 8) for p in range(span)]
            lines.append([b.add(start, offset) for start in starts])
        return context.make_tuple(b, tile, _slide(b, tile, window, arguments[0], lines, packed))

    return tile(tile, high, down, taps, stride, channels, filters, table, offset, weights), codegen
