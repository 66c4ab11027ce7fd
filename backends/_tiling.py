"""Where the tiles of ``winograd`` lie, and which one follows: counted on, since divisions take as long as a transform.

With dilation d, every d-th row and column of an image is a picture of its own, and a tile is of one of the d * d
pictures. A place is: the image, the row and column of the picture among its pictures, and of the tile among its tiles.
"""

from convdispatch.backends._jit import compilable


@compilable
def tiles_of_picture(shape, m, dilations):  # type: ignore[no-untyped-def]
    """Return the rows and columns of tiles of ``m`` outputs, enough for every picture; ``shape`` is the output's."""
    rows, columns = -(-shape[1] // dilations[0]), -(-shape[2] // dilations[1])
    return -(-rows // m[0]), -(-columns // m[1])


@compilable
def place_of(number, tiles, dilations):  # type: ignore[no-untyped-def]
    """Return the place of the tile with this number among those of all images."""
    image, rest = divmod(number, dilations[0] * dilations[1] * tiles[0] * tiles[1])
    picture, rest = divmod(rest, tiles[0] * tiles[1])
    return image, picture // dilations[1], picture % dilations[1], rest // tiles[1], rest % tiles[1]


@compilable
def following(place, tiles, dilations):  # type: ignore[no-untyped-def]
    """Return the place of the next tile."""
    image, a, b, i, j = place
    j += 1
    if j == tiles[1]:
        j, i = 0, i + 1
        if i == tiles[0]:
            i, b = 0, b + 1
            if b == dilations[1]:
                b, a = 0, a + 1
                if a == dilations[0]:
                    a, image = 0, image + 1
    return image, a, b, i, j


@compilable
def corner(place, m, dilations):  # type: ignore[no-untyped-def]
    """Return the first output row and column of a tile."""
    return place[1] + place[3] * m[0] * dilations[0], place[2] + place[4] * m[1] * dilations[1]


@compilable
def outputs_inside(size, first, m, dilation):  # type: ignore[no-untyped-def]
    """Return how many of a tile's m rows, or columns, from ``first`` on lie within so many."""
    left = size - first
    return min(m, left if dilation == 1 else -(-left // dilation))
