"""Transforms the filters of ``winograd``: G g G'^T for every channel and filter, in float64, rounded once.

A call that packs its filters pays for this, so it is compiled; NumPy's way took ten times as long.
"""

import functools
import math

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backends._arguments import Arguments, CompiledKernel, array_of
from convdispatch.backends._jit import compilable
from convdispatch.backends._kernel import run
from convdispatch.memory import aligned

#: Channels that are transformed together: loops must be long, and what they work on must stay in a core's caches.
_TOGETHER = 32

#: ``packed`` is ``[groups, blocks of a group, points, C // groups, block]``.
_ARGUMENTS = Arguments(
    filters=array_of(4), down=array_of(2, "float64"), across=array_of(2, "float64"), packed=array_of(5)
)
unpack = _ARGUMENTS.unpack


@compilable
def _add_products(sums, factors, values, some):  # type: ignore[no-untyped-def]
    """Set ``some`` of the sums to those of ``factors [r]`` times ``values [r, any]``."""
    first = factors[0]
    for i in range(some):
        sums[i] = first * values[0, i]
    for a in range(1, factors.size):
        factor = factors[a]
        for i in range(some):
            sums[i] += factor * values[a, i]


@functools.cache
def _compiled(block: int, itemsize: int) -> CompiledKernel:
    def transform(arguments, job):  # type: ignore[no-untyped-def]
        """Transform the filters of one block."""
        w, down, across, packed = unpack(arguments, itemsize)
        groups, per_group, _, depth, _ = packed.shape
        (high, taps_down), (wide, taps_across) = down.shape, across.shape
        group, member = divmod(job, per_group)
        group_k = w.shape[3] // groups
        first, count = group * group_k + member * block, min(block, group_k - member * block)
        taps = np.zeros(
            (taps_across, taps_down, _TOGETHER * block)
        )  # [column, row, ...]: those of a column are summed first
        columns, sums = np.empty((high, taps_across, _TOGETHER * block)), np.empty(_TOGETHER * block)
        for c0 in range(0, depth, _TOGETHER):
            some = min(_TOGETHER, depth - c0)
            for tap in range(taps_down * taps_across):
                row, column = divmod(tap, taps_across)
                for c in range(some):
                    for k in range(count):
                        taps[column, row, c * block + k] = w[row, column, c0 + c, first + k]
            for i in range(high):
                for column in range(taps_across):
                    _add_products(columns[i, column], down[i], taps[column], some * block)
                for j in range(wide):
                    _add_products(sums, across[j], columns[i], some * block)
                    target = packed[group, member, i * wide + j].reshape(-1)[c0 * block :]
                    for place in range(some * block):
                        target[place] = sums[place]
        return 1

    return CompiledKernel(transform, _ARGUMENTS)


def transformed(filters: Array, matrices: tuple[Array, Array], groups: int, block: int, threads: int) -> Array:
    """Return ``[groups, blocks of a group, points, C // groups, block]``, the last block filled up with zeros.

    Args:
        filters: ``[KH, KW, C // groups, K]``.
        matrices: G for a filter's columns, ``[points, KH]``, and for its rows, ``[points, KW]``, of float64.
        groups: of the filters.
        block: how many filters lie side by side.
        threads: most threads to use.
    """
    *_, depth, k = filters.shape
    blocks = -(-(k // groups) // block)
    packed = aligned((groups, blocks, math.prod(map(len, matrices)), depth, block), filters.dtype, zero=False)
    source = np.ascontiguousarray(filters)
    arguments = _ARGUMENTS.pack(filters=source, down=matrices[0], across=matrices[1], packed=packed)
    run(_compiled(block, filters.dtype.itemsize), arguments, groups * blocks, threads)
    return packed
