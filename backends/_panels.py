"""Panels: the parts of images with few channels that one thread computes at a time, for tiles of neighbouring columns.

A panel is some tiles down times some across. Rows dilated by d are d images, or phases, each of every d-th row. The
last panel of a row or column takes over a rest that is smaller than a tile.
"""

import functools
import sys
from dataclasses import dataclass

from convdispatch.backend import item_bytes
from convdispatch.backends._jit import compilable
from convdispatch.problem import Problem

#: Bytes of a panel's input, and of its staged results.
_PANEL, _STAGE = 192 << 10, 48 << 10
#: Where rows make fewer panels than these, they are cut across, so that threads share them.
_FEW = 8


def _pieces(length: int, unit: int, least: int) -> int:
    """Return into how many pieces of ``unit`` a length is cut; the last takes over a rest less than ``least``."""
    return max(1, length // unit + (length % unit >= least))


@compilable
def panel_at(panel, counts, all_rows, columns, dilation, down, along):  # type: ignore[no-untyped-def]
    """Return where the panel of this number lies: image, phase, first row and the one behind its last, and columns.

    Rows are counted in the phase. ``counts`` are phases, and panels down and across; ``down`` and ``along`` a panel's
    rows and columns.
    """
    rest, strip = divmod(panel, counts[2])
    rest, block = divmod(rest, counts[1])
    image, phase = divmod(rest, counts[0])
    own = (all_rows - phase + dilation - 1) // dilation  # rows of this phase
    bottom = own if block == counts[1] - 1 else (block + 1) * down
    right = columns if strip == counts[2] - 1 else (strip + 1) * along
    return image, phase, block * down, bottom, strip * along, right


@dataclass(frozen=True)
class Panels:
    """How a problem is cut into panels.

    Attributes:
        in_place: whether the input is read where it lies.
        shape: tiles of a panel, down and across.
        counts: phases, and panels down and across.
        total: how many panels there are in all.
        window: most rows and columns of input that are copied at a time.
        width: most columns of a panel.
        staged: whether results are staged in some of them, before they are stored.
    """

    in_place: bool
    shape: tuple[int, int]
    counts: tuple[int, int, int]
    total: int
    window: tuple[int, int]
    width: int
    staged: bool


@functools.lru_cache(maxsize=1024)
def panels_of(
    problem: Problem, rows: int, across: int, in_place: bool, woven: bool, widest: int = sys.maxsize
) -> Panels:
    """Return how a problem is cut.

    Args:
        problem: the problem.
        rows, across: pixels of a tile.
        in_place: whether the input is read where it lies.
        woven: whether results of several filters are staged, to be interleaved.
        widest: most tiles across.
    """
    p, size = problem, item_bytes(problem.dtype)
    own_rows, around = -(-p.oh // p.dilations[0]), p.extent[1] - 1
    beside, below = -(-p.ow // across), p.n * max(1, p.oh // rows)
    most = min(widest, beside, max(1, beside * below // _FEW))
    staged = woven or p.ow < across or p.oh // p.dilations[0] < rows
    wide = min(most, max(1, _STAGE // (p.k * rows * across * size))) if staged else most
    high = 1
    if not in_place:
        line = p.c * size
        wide = max(1, min(wide, (_PANEL // (line * (2 * rows + p.kh - 1)) - around) // across - 1))
        fitting = _PANEL // (line * ((wide + 1) * across + around)) - p.kh + 1
        high = max(1, min(-(-own_rows // rows), fitting // rows - 1))
    phases = min(p.dilations[0], p.oh)
    down = _pieces(max(1, p.oh // p.dilations[0]), high * rows, rows)  # of the phases with the fewest rows
    counts = phases, down, _pieces(p.ow, wide * across, across)
    copied_rows, copied_columns = (1, 1) if in_place else (high, wide)
    window = (
        min((copied_rows + 1) * rows, own_rows + rows) + p.kh - 1,
        min((copied_columns + 1) * across, p.ow + across) + around,
    )
    width = min((wide + 1) * across, p.ow + across)
    return Panels(in_place, (high, wide), counts, p.n * phases * down * counts[2], window, width, staged)
