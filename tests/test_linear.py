"""Products with constant matrices: the same as by the definition, with fewer operations."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convdispatch.backends import fast_fir, winograd, winograd_rows
from convdispatch.backends._linear import Arithmetic, product
from convdispatch.backends._toomcook import strided

ALGORITHMS = sorted(
    {(m, *axis) for known in (winograd.SIZES, winograd.LENGTHS) for axis, sizes in known.items() for m in sizes}
    | {(m, m, 1) for m in fast_fir.SIZES}
    | {(m, 5, stride) for m in winograd_rows.SIZES for stride in (1, 2)}
    | {(m, m * stride, stride) for m in winograd_rows.SIZES_OF_CHUNKS for stride in (1, 2)}
)
Matrix = list[list[Fraction]]
WEIGHTS = st.sampled_from([Fraction(x) for x in (0, 0, 0, 1, -1, 2, -2, 3, -3)] + [Fraction(1, 2), Fraction(-5, 4)])


def counting(counts: Counter[str]) -> Arithmetic:
    """Return arithmetic on fractions, which rounds nothing, and counts."""

    def count(name: str) -> None:
        counts[name] += 1

    def add(x: Fraction, y: Fraction) -> Fraction:
        count("add")
        return x + y

    def subtract(x: Fraction, y: Fraction) -> Fraction:
        count("subtract")
        return x - y

    def scale(x: Fraction, weight: float) -> Fraction:
        count("scale")
        return x * Fraction(weight)

    def multiply_add(x: Fraction, weight: float, total: Fraction) -> Fraction:
        count("multiply_add")
        return x * Fraction(weight) + total

    return Arithmetic(add, subtract, scale, multiply_add, Fraction(0))


def by_definition(matrix: Matrix, values: list[Fraction]) -> list[Fraction]:
    return [sum((w * x for w, x in zip(row, values, strict=True)), Fraction(0)) for row in matrix]


def one_by_one(matrix: Matrix) -> int:
    """Return the operations of a product whose rows share nothing."""
    return sum(max(0, len(terms) - (1 in terms)) for terms in ([w for w in row if w] for row in matrix))


@given(
    matrix=st.integers(1, 6).flatmap(
        lambda wide: st.lists(st.lists(WEIGHTS, min_size=wide, max_size=wide), min_size=1, max_size=6)
    ),
    data=st.data(),
)
def test_a_product_is_that_of_the_definition_and_takes_no_more_operations(matrix: Matrix, data: st.DataObject) -> None:
    wide = len(matrix[0])
    # Rows that differ in signs, as those of the matrices of minimal filtering.
    signs = data.draw(st.lists(st.sampled_from([1, -1]), min_size=wide, max_size=wide))
    matrix = [*matrix, [w * sign for w, sign in zip(matrix[0], signs, strict=True)]]
    values = [Fraction(n) for n in data.draw(st.lists(st.integers(-99, 99), min_size=wide, max_size=wide))]
    counts: Counter[str] = Counter()
    assert product(matrix, values, counting(counts)) == by_definition(matrix, values)
    assert counts.total() <= one_by_one(matrix)


@pytest.mark.parametrize(("m", "r", "stride"), ALGORITHMS)
def test_transforms_are_exact(m: int, r: int, stride: int) -> None:
    transforms = strided(m, r, stride)
    for matrix in (transforms.bt, transforms.at):
        rows = [list(row) for row in matrix]
        values = [Fraction((-1) ** i * (i + 3) ** 3) for i in range(len(rows[0]))]
        counts: Counter[str] = Counter()
        assert product(rows, values, counting(counts)) == by_definition(rows, values)
        assert counts.total() <= one_by_one(rows)


@pytest.mark.parametrize(("m", "most"), [(2, (4, 4)), (4, (14, 12)), (6, (24, 20))])
def test_even_and_odd_parts_are_summed_once(m: int, most: tuple[int, int]) -> None:
    transforms = strided(m, 3, 1)
    for matrix, least in zip((transforms.bt, transforms.at), most, strict=True):
        counts: Counter[str] = Counter()
        product(matrix, [Fraction(1)] * len(matrix[0]), counting(counts))
        assert counts.total() <= least
