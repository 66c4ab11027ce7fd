"""Exact transform matrices of the minimal algorithm F(m, r): m outputs of an r-tap filter with m + r - 1 products.

Toom-Cook multiplication evaluates two polynomials at m + r - 1 points, multiplies there, and interpolates; its
transpose correlates, which is what Winograd's minimal filtering is. With n = m + r - 1, n - 1 finite points
``p[i]`` and the point at infinity, ``y = A^T [(G g) * (B^T d)]``, where

- row i of B^T holds the coefficients of ``prod over j != i of (x - p[j])`` (infinity: of the whole product),
- row i of G holds the powers of ``p[i]`` over ``prod over j != i of (p[i] - p[j])`` (infinity: 0, ..., 0, 1),
- column i of A^T holds the powers of ``p[i]`` (infinity: 0, ..., 0, 1).

Sources: A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015 (arXiv:1509.09308);
K. Vincent, K. Stephano, M. Frumkin, B. Ginsburg and J. Demouth, "On Improving the Numerical Stability of Winograd
Convolutions", ICLR 2017 workshop; B. Barabasz, A. Anderson, K. M. Soodhalter and D. Gregg, "Error Analysis and
Improving the Accuracy of Winograd Convolution for Deep Neural Networks", ACM TOMS 46(4), 2020 (arXiv:1803.10986);
S. A. Alam, A. Anderson, B. Barabasz and D. Gregg, "Winograd Convolution for Deep Neural Networks: Efficient Point
Selection", ACM TECS 21(6), 2022 (arXiv:2201.10369).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Matrix = tuple[tuple[Fraction, ...], ...]

#: Finite points by how many are needed: of those that are short binary numbers, so that A and B are exact in every
#: dtype, the ones with the least ``amplification`` (F(4, 3) has 66, and has 299 with 1 and 2), in pairs of opposite
#: signs, which save operations (``_linear``; Alam et al.).
_POINTS = {
    0: "",
    1: "0",
    2: "0 1",
    3: "0 1 -1",
    4: "1/2 -1/2 5/4 -5/4",
    5: "0 5/8 -5/8 3/2 -3/2",
    6: "1/4 -1/4 7/8 -7/8 7/4 -7/4",
    7: "0 1 -1 1/2 -1/2 2 -2",
}
#: Of more, so many: powers of two next to their negative reciprocals.
_MORE_POINTS = "0 1 -1 1/2 -2 -1/2 2 1/4 -4 -1/4 4"


def points(count: int) -> tuple[Fraction, ...]:
    """Return so many good finite points, or as many as are known."""
    return tuple(map(Fraction, _POINTS.get(count, _MORE_POINTS).split()[:count]))


@dataclass(frozen=True)
class Transforms:
    """The matrices of F(m, r), exact.

    All denominators stand in G, which meets only the filters, in float64 and before any call: scaling a row of G
    down and one of B^T up by the same factor (Vincent et al.) changes no product, and B^T keeps short numbers.

    Attributes:
        at: A^T, ``m x n``: from products to outputs.
        g: G, ``n x r``: from filter to products.
        bt: B^T, ``n x n``: from input to products.
    """

    at: Matrix
    g: Matrix
    bt: Matrix

    def arrays(self, dtype: str) -> tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]:
        """Return A^T, G and B^T in a floating dtype, each value rounded once."""
        at, g, bt = (np.array(matrix, np.float64).astype(dtype) for matrix in (self.at, self.g, self.bt))
        return at, g, bt


def _times(polynomial: Sequence[Fraction], root: Fraction) -> tuple[Fraction, ...]:
    """Multiply a polynomial, constant term first, by ``x - root``."""
    zero = Fraction(0)
    shifted, scaled = (zero, *polynomial), (*(root * a for a in polynomial), zero)
    return tuple(a - b for a, b in zip(shifted, scaled, strict=True))


def _powers(point: Fraction | None, count: int) -> tuple[Fraction, ...]:
    """Return ``point**0 ... point**(count - 1)``; of infinity (None) the limit, 0 ... 0, 1."""
    if point is None:
        return (*(Fraction(0),) * (count - 1), Fraction(1))
    return tuple(point**power for power in range(count))


@functools.cache
def transforms(m: int, r: int, finite: tuple[Fraction, ...] | None = None) -> Transforms:
    """Return the matrices of F(m, r).

    Args:
        m: outputs, at least 1.
        r: taps, at least 1.
        finite: ``m + r - 2`` different finite points; good ones if not given.

    Raises:
        ValueError: if there are not that many different points.
    """
    finite = points(m + r - 2) if finite is None else finite
    if min(m, r) < 1 or not len(set(finite)) == len(finite) == m + r - 2:
        raise ValueError(f"F({m}, {r}) needs {m + r - 2} different finite points; got {len(set(finite))}")
    bt, g = [], []
    for point in (*finite, None):
        row: tuple[Fraction, ...] = (Fraction(1),)
        divisor = Fraction(1)
        for other in finite:
            if other != point:
                row = _times(row, other)
                divisor *= 1 if point is None else point - other
        bt.append(row + (Fraction(0),) * (m + r - 1 - len(row)))
        g.append(tuple(power / divisor for power in _powers(point, r)))
    columns = [_powers(point, m) for point in (*finite, None)]
    return Transforms(at=tuple(zip(*columns, strict=True)), g=tuple(g), bt=tuple(bt))


@functools.cache
def strided(m: int, r: int, stride: int) -> Transforms:
    """Return matrices for m outputs ``stride`` inputs apart: those of each phase of the input, side by side.

    Inputs and taps that are ``stride`` apart belong together: a phase q has the taps ``q, q + stride, ...`` and is a
    problem of unit stride, F(m, taps of the phase); the phases' outputs are summed. A phase with one tap needs no
    transform. In all there are as many products as inputs, ``stride * (m - 1) + r``: for 3 taps of stride 2 and
    m = 4, 9 where the definition takes 12.
    """
    if stride == 1:
        return transforms(m, r)
    n = stride * (m - 1) + r
    at: list[tuple[Fraction, ...]] = []
    g: list[tuple[Fraction, ...]] = []
    bt: list[tuple[Fraction, ...]] = []
    for phase in range(min(stride, r)):
        taps = range(phase, r, stride)
        part = transforms(m, len(taps)) if len(taps) > 1 else _identity(m)
        inputs = [phase + stride * i for i in range(m + len(taps) - 1)]
        for row in part.bt:
            placed = dict(zip(inputs, row, strict=True))
            bt.append(tuple(placed.get(i, Fraction(0)) for i in range(n)))
        for row in part.g:
            placed = dict(zip(taps, row, strict=True))
            g.append(tuple(placed.get(j, Fraction(0)) for j in range(r)))
        at += zip(*part.at, strict=True)
    return Transforms(at=tuple(zip(*at, strict=True)), g=tuple(g), bt=tuple(bt))


def _identity(m: int) -> Transforms:
    one = tuple(tuple(Fraction(i == j) for j in range(m)) for i in range(m))
    return Transforms(at=one, g=((Fraction(1),),) * m, bt=one)


@functools.cache
def amplification(m: int, r: int, stride: int = 1) -> float:
    """Return how much F(m, r) can enlarge relative rounding errors, normwise.

    Rounding anywhere on the way changes output i by at most a count of roundings times the sum over the products p
    of ``|A^T|[i,p] (|G||g|)[p] (|B^T||d|)[p]``, a bilinear form in ``|g|`` and ``|d|``; the 2-norm of its matrix
    is the factor before ``||g|| ||d||`` (Barabasz et al., theorem 1, without splitting that norm into three). In two
    dimensions the form is the Kronecker product of those of each, so its norm is their product.
    """
    at, g, bt = (np.abs(matrix) for matrix in strided(m, r, stride).arrays("float64"))
    forms = np.einsum("ip,ps,pt->ist", at, g, bt)
    return float(np.linalg.norm(forms, ord=2, axis=(1, 2)).max())


def roundings(m: int, r: int, stride: int = 1) -> int:
    """Return how many roundings one value meets in the three transforms along one axis, products' sums aside.

    A sum of t products rounds each term t times at most. One rounding more is G's own. A single output of a single tap
    is not transformed; its filter is stored as it is.
    """
    if m == r == 1:
        return 0
    matrices = strided(m, r, stride)
    return sum(max(sum(x != 0 for x in row) for row in rows) for rows in (matrices.at, matrices.g, matrices.bt)) + 1
