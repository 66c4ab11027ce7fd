"""Which filters are a column times a row, so that two short passes do the work of one long one.

Gaussians, boxes, binomials and products of windows are; most others are not. (MATLAB's ``imfilter`` looks for them,
too.) A filter counts as such if each of its values is the product of two floats, but for what rounding does to them: a
few epsilons of the value itself, so that small ones count as much as large ones. Results stay within the bound of the
plain sum, which rounds each term KH * KW times, two passes KH + KW times.
"""

import functools
from collections.abc import Callable

import numpy as np

from convdispatch.arguments import Array
from convdispatch.problem import SEPARABLE_DTYPES, Problem

#: Most filters of an image of one channel, and most values of a row that a result may see besides its own.
_MOST_FILTERS, _WIDEST = 16, 4096
#: Whole numbers up to this are small: sums of their products with pixels of a few bits are exact.
_SMALL = 2**24
#: Filters whose sizes have a larger sum than this are no filters of images; between two passes they might lose what is
#: small, or overflow.
_LARGEST_SUM = 2.0**24
#: Filters of which no value is larger have none that numbers below the smallest normal one are small beside.
_LEAST = 2.0**-60


def unsuited(problem: Problem) -> str | None:
    """Return why two passes would not do for a problem, whatever its filters are, or None."""
    p = problem
    several, reach = p.c > 1, (p.extent[1] - 1) * p.c
    usual = f"up to {_MOST_FILTERS} filters of one channel, or one for each of several"
    reasons = (
        (p.dtype not in SEPARABLE_DTYPES, f"two passes are made in {' or '.join(SEPARABLE_DTYPES)} only"),
        (p.strides != (1, 1), "two passes are made without strides"),
        (
            p.kh * p.kw < 2 * (p.kh + p.kw),
            f"two passes must save half of the products: they take {p.kh + p.kw} of {p.kh}x{p.kw} here",
        ),
        (
            not p.c == p.k == p.groups if several else p.k > _MOST_FILTERS,
            f"two passes are for {usual}; here are {p.k} of {p.c} channels in {p.groups} groups",
        ),
        (several and p.epilogue.bias, "two passes take several channels for one, and a bias has a value for each"),
        (reach > _WIDEST, f"in two passes a filter may reach over {_WIDEST} values of a row, not {reach}"),
    )
    return next((reason for against, reason in reasons if against), None)


@functools.lru_cache(maxsize=4096)
def _suited(problem: Problem) -> bool:
    return unsuited(problem) is None and not problem.is_trivial


def noticed(problem: Problem, filters: Array) -> Problem:
    """Return a problem that says of its filters ``[KH, KW, C // groups, K]`` that they are separable, if they are."""
    return _separable(problem) if _suited(problem) and factors(problem, filters) is not None else problem


@functools.lru_cache(maxsize=4096)
def _separable(problem: Problem) -> Problem:
    return problem.replace(separable=True)


def different(problem: Problem) -> int:
    """Return how many different filters there may be: those of separable problems are the same for all channels."""
    return 1 if problem.separable and problem.c > 1 else problem.k


def drawn(problem: Problem, draw: Callable[[tuple[int, ...]], Array]) -> Array:
    """Return filters ``[KH, KW, C // groups, K]`` of drawn values; separable ones where the problem says so."""
    if not problem.separable:
        return draw(problem.filter_shape)
    kinds = different(problem)
    products = draw((problem.kh, 1, 1, kinds)) * draw((1, problem.kw, 1, kinds))
    return np.repeat(products, problem.k // kinds, axis=3) if kinds else products


def factors(problem: Problem, filters: Array) -> tuple[Array, Array] | None:
    """Return columns ``[K, KH]`` and rows ``[K, KW]`` whose products are filters ``[KH, KW, 1, K]``; None if none are.

    Several channels must have the same filter, whose one column and row are returned. Columns and rows are of the
    filters' dtype, and not to be written to. A column's sizes have a sum of about 1 at most, so that nothing overflows
    on the way to a finite result; and so have a row's, if the filter's have, so that what is small is not lost on the
    way. Filters of enormous values, of which only one is possible, count as not separable. Small whole numbers remain
    whole numbers of some power of two: their sums are exact.
    """
    kh, kw, _, k = filters.shape
    if min(kh, kw) < 2 or not k or _differ_at_once(filters[:, :, 0, 0]):
        return None
    if problem.c > 1:
        if not (filters == filters[..., :1]).all():
            return None
        filters, k = filters[..., :1], 1
    return _factors(filters[:, :, 0, :].transpose(2, 0, 1).tobytes(), (k, kh, kw), filters.dtype.name)


def _differ_at_once(values: Array) -> bool:
    """Return whether four neighbours in the middle of a filter show it to be no product: most filters' do."""
    i, j = values.shape[0] // 2, values.shape[1] // 2
    (a, b), (c, d) = values[i - 1 : i + 1, j - 1 : j + 1].tolist()
    one, other = a * d, b * c
    few = 4 * tolerance(*values.shape) * float(np.finfo(values.dtype).eps)
    return bool(abs(one - other) > few * max(abs(one), abs(other)) + float(np.finfo(values.dtype).tiny))


def tolerance(kh: int, kw: int) -> float:
    """Return by how many epsilons, relative to itself, a filter's value may differ from a product of two.

    At most by what is left of the plain sum's bound; and by no more than the rounding of a Gaussian's exponents makes.
    """
    return min((kh * kw - kh - kw) / 2, 8)


@functools.lru_cache(maxsize=64)  # who packs looks again, and a program's next call has the same filters
def _factors(values: bytes, shape: tuple[int, int, int], dtype: str) -> tuple[Array, Array] | None:
    filters, about = np.frombuffer(values, dtype).reshape(shape), np.finfo(dtype)
    wide, every, (k, kh, kw) = filters.astype(np.float64), np.arange(shape[0]), shape
    sizes = np.abs(wide)
    # The column and the row through the largest value are as precise as any.
    where = sizes.reshape(k, -1).argmax(axis=1)
    with np.errstate(all="ignore"):
        columns, rows = wide[every, :, where % kw], wide[every, where // kw, :]
        columns = columns / _common(columns)
        through = columns[every, where // kw, np.newaxis]
        rows = np.where(through == 0, 0, rows / through)
        down, along = (np.abs(found).sum(axis=1, keepdims=True) for found in (columns, rows))
        scale = np.exp2(np.minimum(-np.ceil(np.log2(down)), np.ceil(np.log2(along))))
        scale = np.where((scale > 0) & np.isfinite(scale), scale, 1)
        modest = down * along <= _LARGEST_SUM
        columns, rows = (found.astype(dtype) for found in (columns * scale, rows / scale))
        product = columns[:, :, np.newaxis].astype(np.float64) * rows[:, np.newaxis, :]
        # What is below the smallest normal number, as tails are, was rounded to a multiple of the smallest, or to zero.
        tails = sizes.max(axis=(1, 2), keepdims=True) > _LEAST
        allowed = tolerance(kh, kw) * float(about.eps) * sizes + tails * float(about.smallest_subnormal)
        near = np.abs(product - wide) <= allowed
    if not near.all() or not modest.all() or not np.isfinite(wide).all():
        return None
    for found in (columns, rows):
        found.flags.writeable = False
    return columns, rows


def _common(columns: Array) -> Array:
    """Return ``[K, 1]``: the largest common divisor of a column's values if they are small multiples of a power of two.

    Divided by it, columns of whole numbers make rows of whole numbers. It is 1 for other columns.
    """
    parts, powers = np.frexp(columns)
    bits = np.ldexp(parts, 53).astype(np.int64)
    last = powers - 53 + np.frexp((bits & -bits).astype(np.float64))[1] - 1  # of each value, its last bit's power
    unit = np.where(bits == 0, np.iinfo(np.int32).max, last).min(axis=1, keepdims=True)
    whole = np.ldexp(columns, -unit)
    small = np.abs(whole).max(axis=1, keepdims=True) <= _SMALL
    common = np.gcd.reduce(np.where(small, whole, 0).astype(np.int64), axis=1, keepdims=True)
    return np.where(small & (common > 0), np.ldexp(common.astype(np.float64), unit), 1.0)
