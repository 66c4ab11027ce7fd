"""The sizes that register tiles have: sums, one input and the filters' vectors fit in registers."""

from collections.abc import Sequence

from convdispatch.backend import Config
from convdispatch.backends._vector import WIDEST, registers, vector_bytes
from convdispatch.errors import ArgumentError

#: Tiles, rows x vectors, by the number of vector registers: sums, one input and the filters' vectors fit in them.
_TILES = {
    32: ((6, 4), (5, 4), (14, 2), (8, 2), (7, 2), (8, 3), (10, 1), (20, 1)),
    16: ((6, 2), (4, 3), (5, 2), (12, 1), (7, 1)),
}

#: The same for filters that fill so many vectors, or some times as many, and would leave some of the others' empty.
_ODD_TILES = {
    32: ((4, 5), (3, 7)),
    16: ((2, 5),),
}

#: The same for so few pixels that the others would do most of their rows for nothing. With 16 registers, filters of the
#: widest are used straight from memory.
_FEW_TILES = {
    32: ((1, 8), (1, 4), (1, 2), (2, 8), (2, 4), (2, 2)),
    16: ((1, 8), (1, 4), (1, 2), (2, 6), (2, 4), (2, 2)),
}

#: Tiles of half vectors, with 32 registers, for filters that do not fill whole ones.
_NARROW_TILES = ((8, 3), (5, 5), (14, 1))

#: Tiles of 32 registers whose rows are two pixels side by side: filters that fill a half vector more than whole ones.
_PAIR_TILES = ((7, 3), (4, 5))

_MOST_ROWS, _MOST_VECTORS = 28, 8


def register_tiles() -> tuple[tuple[int, int], ...]:
    """Return the tiles, rows x vectors, that suit the registers."""
    return _TILES[registers()]


def odd_tiles(wide: int) -> list[tuple[int, int]]:
    """Return the tiles, rows x vectors, that filters of so many vectors fill, where none of several vectors else is."""
    usual = [vectors for _, vectors in register_tiles() if vectors > 1]
    if any(wide % vectors == 0 for vectors in usual):
        return []
    return [tile for tile in _ODD_TILES[registers()] if wide % tile[1] == 0]


def few_tiles(pixels: int) -> list[tuple[int, int]]:
    """Return the tiles, rows x vectors, for fewer pixels than the others have rows; none where there are more."""
    enough = [tile for tile in _FEW_TILES[registers()] if tile[0] >= pixels]
    return [tile for tile in enough if tile[0] == enough[0][0]]


def narrow_tiles() -> tuple[tuple[int, int], ...]:
    """Return the tiles, rows x half vectors, where vectors are the widest that there are."""
    return _NARROW_TILES if vector_bytes() == WIDEST else ()


def pair_tiles() -> tuple[tuple[int, int], ...]:
    """Return the tiles, pairs of pixels x vectors for both of a pair."""
    return _PAIR_TILES if registers() == 32 else ()


def register_tile(config: Config, backend: str, tiles: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the tile that a config asks for by ``rows`` and ``vectors``; of ``tiles`` the first if it does not say.

    Raises:
        ArgumentError: if registers cannot hold its sums.
    """
    rows, vectors = config.integer("rows", tiles[0][0]), config.integer("vectors", tiles[0][1])
    if 1 <= rows <= _MOST_ROWS and 1 <= vectors <= _MOST_VECTORS and rows * vectors < 32:
        return rows, vectors
    known = " or ".join(f"{rows}x{vectors}" for rows, vectors in tiles)
    raise ArgumentError(
        f"config rows x vectors of {backend} must be sums that fit in registers, such as {known}; got {rows}x{vectors}"
    )
