"""A window that slides along a row, for ``depthwise``: vectors of channels, and a tile that is a run of outputs."""

from typing import Any

from convdispatch.backends._vector import (
    Codegen,
    fused_multiply_add,
    intrinsic,
    load_at,
    parts_of,
)


def _slide(b: Any, tile: Any, arguments: Any, taps: int, stride: int) -> list[Any]:
    values, _, _, address, step, filters, *clip = arguments
    vector, count = tile.dtype, len(tile)
    sums = parts_of(b, values, count)
    weights = [load_at(b, vector.ir, filters, j * vector.lanes * vector.itemsize, vector.itemsize) for j in range(taps)]
    column, jump, width, zero = clip or [None] * 4
    for p in range((count - 1) * stride + taps):
        users = [o for o in range(count) if 0 <= p - o * stride < taps]
        if users:
            # As unsigned, -1 is large.
            place = b.select(b.icmp_unsigned("<", column, width), address, zero) if clip else address
            x = load_at(b, vector.ir, place, 0, vector.itemsize)
            for o in users:
                sums[o] = fused_multiply_add(b, x, weights[p - o * stride], sums[o], vector)
        address = b.add(address, step)
        column = b.add(column, jump) if clip else None
    return sums


@intrinsic
def slide(typing: Any, tile: Any, taps: Any, stride: Any, inputs: Any, step: Any, filters: Any) -> tuple[Any, Codegen]:
    """Return a run of outputs plus one row of a filter: output ``o`` gains tap ``j`` times pixel ``o * stride + j``.

    Pixels are the vectors ``step`` bytes apart from ``inputs`` on, each loaded once for all who need it; taps lie side
    by side at ``filters``.
    """

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        sums = _slide(b, tile, arguments, taps.literal_value, stride.literal_value)
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, taps, stride, inputs, step, filters), codegen


@intrinsic
def slide_clipped(
    typing: Any,
    tile: Any, taps: Any, stride: Any, inputs: Any, step: Any, filters: Any,
    column: Any, jump: Any, width: Any, zero: Any,
) -> tuple[Any, Codegen]:  # fmt: skip
    """Do as ``slide`` does where pixels may lie outside the image: these are read at the address ``zero`` instead.

    Pixel ``p`` is in column ``column + p * jump`` of ``width`` columns.
    """

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        sums = _slide(b, tile, arguments, taps.literal_value, stride.literal_value)
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, taps, stride, inputs, step, filters, column, jump, width, zero), codegen
