"""Which filters are a column times a row, so that two short passes do the work of one long one.

Gaussians, boxes, binomials and products of windows are; most others are not. (MATLAB's ``imfilter`` looks for them,
too.) A filter counts as such if each of its values is the product of two floats, up to so much that results stay within
the bound of the plain sum: two passes round each term KH + KW times, the sum KH * KW times, and a value may differ by
the difference. That holds for each value by itself, so that small ones count as much as large ones.
"""

import functools
from collections.abc import Callable

import numpy as np

from convdispatch.arguments import Array
from convdispatch.problem import SEPARABLE_DTYPES, Problem

#: A call with less to compute takes as long as looking at its filters. A plan looks once.
_LEAST_FLOPS = {"plan": 0.0, "call": 4e6}
#: More filters of one image are for vectors of filters.
FILTERS = 16


def departure(kh: int, kw: int) -> float:
    """Return by how many epsilons, relative to itself, a filter's value may differ from a product of two."""
    return (kh * kw - kh - kw) / 2


def halves_the_work(kh: int, kw: int) -> bool:
    """Return whether two passes take at most half of the products."""
    return kh * kw >= 2 * (kh + kw)


@functools.lru_cache(maxsize=4096)
def worth_a_look(problem: Problem, deployment: str) -> bool:
    """Return whether a problem's filters would make for much less work if they were separable."""
    p = problem
    alike = p.c == p.k == p.groups or (p.c == 1 and p.k <= FILTERS)
    suited = alike and p.dtype in SEPARABLE_DTYPES and p.strides == (1, 1)
    return suited and halves_the_work(p.kh, p.kw) and p.flops >= max(1.0, _LEAST_FLOPS[deployment])


def told(problem: Problem, filters: Array, deployment: str) -> Problem:
    """Return a problem that says of its filters ``[KH, KW, C // groups, K]`` that they are separable, if they are.

    Args:
        problem: which does not say so yet.
        filters: of the problem's dtype.
        deployment: ``"plan"`` or ``"call"``, where small problems are not worth looking at their filters.
    """
    if not worth_a_look(problem, deployment) or factors(problem, filters) is None:
        return problem
    return _separable(problem)


@functools.lru_cache(maxsize=4096)
def _separable(problem: Problem) -> Problem:
    return problem.replace(separable=True)


def drawn(problem: Problem, draw: Callable[[tuple[int, ...]], Array]) -> Array:
    """Return filters ``[KH, KW, C // groups, K]`` of drawn values; separable ones where the problem says so."""
    if not problem.separable:
        return draw(problem.filter_shape)
    kinds = 1 if problem.c > 1 else problem.k
    products = draw((problem.kh, 1, 1, kinds)) * draw((1, problem.kw, 1, kinds))
    return np.repeat(products, problem.k // kinds, axis=3) if kinds else products


def factors(problem: Problem, filters: Array) -> tuple[Array, Array] | None:
    """Return columns ``[K, KH]`` and rows ``[K, KW]`` whose products are filters ``[KH, KW, 1, K]``; None if none are.

    Several channels must have the same filter, whose one column and row are returned. Columns and rows are of the
    filters' dtype. A column's sizes have a sum of at most 1, so that nothing overflows on the way to a finite result.
    Small whole numbers remain whole numbers of some power of two: sums of them stay exact.
    """
    if problem.c > 1:
        if not (filters == filters[..., :1]).all():
            return None
        filters = filters[..., :1]
    kh, kw, _, k = filters.shape
    if _differ_at_once(filters[:, :, 0, 0]):
        return None
    wide = filters[:, :, 0, :].transpose(2, 0, 1).astype(np.float64)
    sizes = np.abs(wide)
    # Dividing by the smallest value: by a larger one, thirds would come of whole numbers.
    where = np.where(sizes > 0, sizes, np.inf).reshape(k, -1).argmin(axis=1)
    every = np.arange(k)
    with np.errstate(all="ignore"):
        columns, rows = wide[every, :, where % kw], wide[every, where // kw, :]
        pivots = columns[every, where // kw, np.newaxis]
        rows = np.where(pivots == 0, 0, rows / pivots)
        scale = np.exp2(-np.ceil(np.log2(np.abs(columns).sum(axis=1, keepdims=True))))
        scale = np.where(np.isfinite(scale), scale, 1)
        columns, rows = (values.astype(filters.dtype) for values in (columns * scale, rows / scale))
        product = columns[:, :, np.newaxis].astype(np.float64) * rows[:, np.newaxis, :]
        near = np.abs(product - wide) <= departure(kh, kw) * float(np.finfo(filters.dtype).eps) * sizes
    return (columns, rows) if near.all() else None


def _differ_at_once(values: Array) -> bool:
    """Return whether four neighbours in the middle of a filter show it to be no product: most filters' do."""
    i, j = values.shape[0] // 2, values.shape[1] // 2
    (a, b), (c, d) = values[i - 1 : i + 1, j - 1 : j + 1].tolist()
    one, other = a * d, b * c
    few = 4 * departure(*values.shape) * float(np.finfo(values.dtype).eps)
    return bool(abs(one - other) > few * max(abs(one), abs(other)))
