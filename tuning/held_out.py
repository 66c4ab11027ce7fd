"""Problems drawn at random as networks and image filters pose them, to try choices on that nobody prepared."""

import math
import random

from convdispatch.problem import Problem

#: Larger problems than this cost an oracle too long, and are no different.
_MOST_FLOPS = 400_000_000
_MOST_ELEMENTS = 8_000_000
_SIDES = (7, 8, 10, 13, 14, 16, 19, 20, 24, 26, 28, 32, 38, 40, 48, 52, 56, 64, 76, 80, 96, 112, 128, 160)


def _channels(draw: random.Random, least: int, most: int) -> int:
    """Draw a multiple of 8, small ones as often as large ones."""
    return max(least, 8 * round(2 ** draw.uniform(math.log2(least / 8), math.log2(most / 8))))


def _dense(draw: random.Random) -> str:
    kernel = draw.choices((3, 1, 5, 7), (6, 5, 1, 0.5))[0]
    side, c, k = draw.choice(_SIDES), _channels(draw, 8, 512), _channels(draw, 8, 512)
    return f"x{side}x{side}x{c} * {kernel}x{kernel}x{c}x{k} SAME"


def _strided(draw: random.Random) -> str:
    return f"{_dense(draw)} stride=2"


def _dilated(draw: random.Random) -> str:
    side, c, k = draw.choice(_SIDES), _channels(draw, 16, 256), _channels(draw, 16, 256)
    return f"x{side}x{side}x{c} * 3x3x{c}x{k} SAME dilation={draw.choice((2, 4))}"


def _depthwise(draw: random.Random) -> str:
    side, c, kernel = draw.choice(_SIDES), _channels(draw, 16, 960), draw.choice((3, 3, 5, 7))
    return f"x{side}x{side}x{c} * {kernel}x{kernel}x1x{c} SAME{draw.choice(('', '', ' stride=2'))}"


def _grouped(draw: random.Random) -> str:
    groups, each = draw.choice((2, 4, 8, 32)), draw.choice((4, 8, 16, 32))
    side = draw.choice(_SIDES)
    return f"x{side}x{side}x{groups * each} * 3x3x{each}x{groups * each} SAME"


def _first_layer(draw: random.Random) -> str:
    side, kernel, k = draw.choice((96, 128, 160, 192, 224, 256)), draw.choice((3, 3, 5, 7)), _channels(draw, 16, 64)
    return f"x{side}x{side}x3 * {kernel}x{kernel}x3x{k} SAME stride={draw.choice((1, 2, 2))}"


def _image(draw: random.Random) -> str:
    height, width = draw.choice(((240, 320), (480, 640), (512, 512), (720, 1280), (1080, 1920)))
    kernel = draw.choice((3, 5, 7, 9, 15, 31))
    c, k = draw.choice((1, 1, 3)), draw.choice((1, 1, 2, 8))
    if c == k == 3:
        return f"x{height}x{width}x3 * {kernel}x{kernel}x1x3 SAME"
    return f"x{height}x{width}x{c} * {kernel}x{kernel}x{c}x{k} SAME"


_KINDS = {_dense: 9, _strided: 3, _dilated: 1, _depthwise: 3, _grouped: 1, _first_layer: 1, _image: 3}
_ENDINGS = {"": 5, " +bias +relu": 4, " +bias": 1, " +bias +residual +relu": 1}


def draw_problems(count: int, seed: int = 0) -> tuple[Problem, ...]:
    """Return different problems, float32, mostly of one image, each of at most 0.4 GFLOP.

    The same seed draws the same problems, and fewer of them are the first of more.
    """
    draw = random.Random(seed)  # noqa: S311  # shapes, not secrets
    found: dict[Problem, None] = {}
    while len(found) < count:
        kind = draw.choices(list(_KINDS), list(_KINDS.values()))[0]
        ending = draw.choices(list(_ENDINGS), list(_ENDINGS.values()))[0]
        batch = draw.choices((1, 4, 8), (8, 1, 1))[0]
        problem = Problem.parse(f"{batch}{kind(draw)}{ending}")
        elements = math.prod(problem.input_shape) + math.prod(problem.output_shape)
        if problem.flops <= _MOST_FLOPS and elements <= _MOST_ELEMENTS:
            found[problem] = None
    return tuple(found)
