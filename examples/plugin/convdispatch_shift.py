"""``shift``: for each element of a filter, the image is moved by it, scaled by it, and added to the result.

No patches are copied and nothing is multiplied as a matrix: every step is one pass over a strip of a plane that
stays in the cache. That suits filters over one or a few channels, where a matrix product has hardly any columns.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convdispatch import ArgumentError, Backend, Config, Kernel, Problem
from convdispatch.backend import Effort
from convdispatch.machine import Machine

Array = NDArray[Any]

_MOST_PAIRS = 32
_STRIPS_KIB = (256, 64, 1024)

# Rates of one core, for estimates.
_BYTES_PER_SECOND = 1.2e10  # of the result's strip, moved, scaled and added once
_CALL_SECONDS = 1.3e-6  # of the two NumPy calls that do it
_PAD_BYTES_PER_SECOND = 4e9


@dataclass(frozen=True)
class ShiftKernel:
    """Filters as ``[K, C // groups, KH, KW]``."""

    problem: Problem
    filters: Array
    rows: int

    def __call__(self, input: Array, out: Array, residual: Array | None) -> None:  # noqa: ARG002
        """Convolve ``input`` into ``out``; see ``convdispatch.backend.Kernel``."""
        p = self.problem
        with np.errstate(all="ignore"):  # infinities and NaN are the caller's
            for n, group in itertools.product(range(p.n), range(p.groups)):
                planes = self._planes(input[n, :, :, group * p.group_c : (group + 1) * p.group_c])
                for k in range(group * p.group_k, (group + 1) * p.group_k):
                    for top in range(0, p.oh, self.rows):
                        out[n, top : top + self.rows, :, k] = self._strip(planes, k, top)

    def _planes(self, image: Array) -> Array:
        """Return a group's channels as padded planes, each contiguous: ``[C // groups, rows, columns]``."""
        p = self.problem
        top, bottom, left, right = p.pads
        planes = np.zeros((p.group_c, p.h + top + bottom, p.w + left + right), image.dtype)
        planes[:, top : top + p.h, left : left + p.w] = image.transpose(2, 0, 1)
        return planes

    def _strip(self, planes: Array, k: int, top: int) -> Array:
        """Return some rows of one filter's result."""
        p = self.problem
        (down, right), (dilate_rows, dilate_columns) = p.strides, p.dilations
        rows = min(self.rows, p.oh - top)
        total = np.zeros((rows, p.ow), planes.dtype)
        scaled = np.empty_like(total)
        for (c, i, j), weight in np.ndenumerate(self.filters[k]):
            y, x = top * down + i * dilate_rows, j * dilate_columns
            moved = planes[c, y : y + (rows - 1) * down + 1 : down, x : x + (p.ow - 1) * right + 1 : right]
            np.multiply(moved, weight, out=scaled)
            np.add(total, scaled, out=total)
        return total


class Shift(Backend):
    """Shifted planes, scaled and added."""

    name = "shift"
    strided = True  # planes are copied out of any layout, and results into any

    def rejects(self, problem: Problem) -> str | None:
        """Return a reason where a group has so many channels and filters that a matrix product is far faster."""
        pairs = problem.group_c * problem.group_k
        if pairs > _MOST_PAIRS:
            return (
                f"{problem.group_c} channels x {problem.group_k} filters in a group; "
                f"shifting is for at most {_MOST_PAIRS} pairs of them"
            )
        return None

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Config]:  # noqa: ARG002
        """Return sizes of a strip in KiB."""
        sizes = _STRIPS_KIB if effort in {"patient", "exhaustive"} else _STRIPS_KIB[:1]
        return [Config(strip_kib=size) for size in sizes]

    def workspace(self, problem: Problem, config: Config) -> int:
        """Return the bytes of a group's padded planes, and of the two strips."""
        p = problem
        planes = p.group_c * (p.h + sum(p.pads[:2])) * (p.w + sum(p.pads[2:]))
        return (planes + 2 * _rows(p, config) * p.ow) * _item_bytes(p)

    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float | None:  # noqa: ARG002
        """Return the time of every pass, by its calls and by its bytes, and of the padding."""
        p, size = problem, _item_bytes(problem)
        passes = p.n * p.k * p.taps
        slower = 1 if p.strides[1] == 1 else 2
        run = passes * p.oh * p.ow * size * slower / _BYTES_PER_SECOND
        calls = passes * -(-p.oh // _rows(p, config)) * _CALL_SECONDS
        copies = p.n * (p.h * p.w * p.c + p.oh * p.ow * p.k) * size / _PAD_BYTES_PER_SECOND
        return run + calls + copies + 2e-5

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:  # noqa: ARG002
        """Reorder the filters; bias and activation are left to the plan."""
        return ShiftKernel(problem, np.array(filters.transpose(3, 2, 0, 1), order="C"), _rows(problem, config))


def _item_bytes(problem: Problem) -> int:
    return np.dtype(problem.dtype).itemsize


def _rows(problem: Problem, config: Config) -> int:
    """Return how many rows of the result make a strip."""
    kib = config.integer("strip_kib", _STRIPS_KIB[0])
    if kib < 1:
        raise ArgumentError(f"config strip_kib of shift must be at least 1; got {kib}")
    return max(1, min(problem.oh, (kib << 10) // max(1, problem.ow * _item_bytes(problem))))
