"""How ``winograd_rows`` passes over some tiles of a row: multiplies point by point, transforms back, and stores.

Sums of all points are held in registers *at once*, and transformed back there, where registers hold those of several
tiles. Each vector of filters is loaded for these only; where they are one or two, or filters lie in L2, points are
better taken *in turn*, so that many tiles share a vector of filters, and their sums meet in L1.
"""

import functools
from dataclasses import dataclass
from typing import Any

from convdispatch.backends._jit import compilable, inlined
from convdispatch.backends._lines import odd_lines, whole_lines
from convdispatch.backends._put import put_tile
from convdispatch.backends._tile import add_to_all, multiply_points, store, zeros
from convdispatch.backends._transforms import transform_output
from convdispatch.backends._tuples import add_doubts, load_apart, part

#: Tiles of fewer bytes follow one another.
_SMALL = 1024


@dataclass(frozen=True)
class RowForm:
    """What a kernel is compiled for.

    Attributes:
        m: outputs of a tile.
        r: taps of a chunk; of several chunks ``m * stride``, so that each sees a tile further on.
        stride: of outputs along rows.
        together: tiles of a pass.
        in_turn: whether points are taken one after another.
        room: values of a point, as many as channels or more: what ``lanes`` is a multiple of, or a multiple of that.
        lanes: filters of a vector.
        itemsize: bytes of a value.
    """

    m: int
    r: int
    stride: int
    together: int
    in_turn: bool
    room: int
    lanes: int
    itemsize: int

    @functools.cached_property
    def n(self) -> int:
        """A tile's inputs, and its points."""
        return self.stride * (self.m - 1) + self.r

    @property
    def tile_bytes(self) -> int:
        """Bytes from a tile's transformed values to the next one's."""
        values = self.n * self.room
        return (values if values * self.itemsize < _SMALL else odd_lines(values, self.itemsize)) * self.itemsize

    @property
    def vector(self) -> int:
        """Bytes of a vector."""
        return self.lanes * self.itemsize

    @property
    def sums_bytes(self) -> int:
        """Bytes of a pass's sums in memory."""
        return self.together * self.n * self.vector if self.in_turn else 0

    def row_bytes(self, tiles: int) -> int:
        """Return the bytes of a transformed row of so many tiles."""
        lines: int = whole_lines(tiles * self.tile_bytes)
        return lines


def _multiplying(form: RowForm, points: int) -> Any:
    """Return what multiplies so many points of a pass."""
    lanes, itemsize, together = form.lanes, form.itemsize, form.together
    point, tile_bytes, step = form.room * itemsize, form.tile_bytes, points * form.vector

    @inlined
    def multiply(values, apart, packed, row_bytes, size):  # type: ignore[no-untyped-def]
        """Return the sums over so many rows, chunks and channels of filters.

        Rows of values are ``apart``, those of filters ``row_bytes``.
        """
        rows, chunks, channels = size
        rest = row_bytes - chunks * channels * step
        sums = zeros(together, points, lanes, itemsize)
        for _ in range(rows):
            for chunk in range(chunks):
                for c in range(channels):
                    value = chunk * tile_bytes + c * itemsize
                    sums = multiply_points(sums, points, (values, tile_bytes), value, point, packed)
                    packed += step
            values += apart
            packed += rest
        return sums

    return multiply


def _finishing(form: RowForm) -> Any:
    """Return what transforms a tile's sums back, finishes and stores them."""
    m, r, stride = form.m, form.r, form.stride

    @inlined
    def finish(sums, number, outputs, step, offset, bias, adds, code, streams, doubts):  # type: ignore[no-untyped-def]
        """Do so; return the doubts.

        Of each tile, ``outputs`` has the address, and how far its residual is from there; pixels are ``step`` apart.
        """
        results = transform_output(sums, m, r, stride)
        doubts = add_doubts(doubts, results)
        if bias:
            results = add_to_all(results, m, bias)
        put_tile(results, m, (outputs[number, 0], step), offset, adds, outputs[number, 1], code, streams)
        return doubts

    return finish


def _leaving(form: RowForm, number: int) -> Any:
    """Return what finishes tiles whose sums are in registers, from one on.

    One after another, so that the next ones' sums may stay where they are meanwhile.
    """
    n, finish = form.n, _finishing(form)

    @inlined
    def leave_one(sums, outputs, step, offset, bias, adds, code, streams, doubts):  # type: ignore[no-untyped-def]
        return finish(part(sums, number, n), number, outputs, step, offset, bias, adds, code, streams, doubts)

    if number + 1 == form.together:
        return leave_one
    leave_others = _leaving(form, number + 1)

    @inlined
    def leave(sums, outputs, step, offset, bias, adds, code, streams, doubts):  # type: ignore[no-untyped-def]
        doubts = leave_one(sums, outputs, step, offset, bias, adds, code, streams, doubts)
        return leave_others(sums, outputs, step, offset, bias, adds, code, streams, doubts)

    return leave


@functools.cache
def passing(form: RowForm) -> Any:
    """Return what makes a pass.

    Its first argument tells of the values: where the first tile's are, the bytes from row to row, and how many rows,
    chunks and channels there are. The second one tells of the filters: where they are, the bytes from row to row, and
    from point to point where points are taken in turn. Then come the address of ``form.sums_bytes``, and what
    ``_finishing``'s function takes, of all tiles.
    """
    if not form.in_turn:
        multiply, leave = _multiplying(form, form.n), _leaving(form, 0)

        @inlined
        def at_once(where, filters, _, outputs, step, offset, bias, adds, code, streams, doubts):  # type: ignore[no-untyped-def]
            values, apart, rows, chunks, channels = where
            packed, row_bytes, _ = filters
            sums = multiply(values, apart, packed, row_bytes, (rows, chunks, channels))
            return leave(sums, outputs, step, offset, bias, adds, code, streams, doubts)

        return at_once
    n, together, lanes, itemsize, vector = form.n, form.together, form.lanes, form.itemsize, form.vector
    multiply, finish, point = _multiplying(form, 1), _finishing(form), form.room * form.itemsize

    @compilable
    def in_turn(where, filters, memory, outputs, step, offset, bias, adds, code, streams, doubts):  # type: ignore[no-untyped-def]
        values, apart, rows, chunks, channels = where
        packed, row_bytes, turn = filters
        for number in range(n):
            sums = multiply(values + number * point, apart, packed + number * turn, row_bytes, (rows, chunks, channels))
            store(sums, together, (memory + number * vector, n * vector), 0)
        for number in range(together):
            sums = load_apart(memory + number * n * vector, vector, n, lanes, itemsize)
            doubts = finish(sums, number, outputs, step, offset, bias, adds, code, streams, doubts)
        return doubts

    return in_turn
