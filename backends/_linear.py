"""Products with a constant matrix, written out with few operations.

The matrices of minimal filtering are made from points a and -a. So two rows of one often differ in the signs of some
terms only: their even and their odd part are summed once, and added for the one and subtracted for the other. In the
transposed matrices it is columns that come in pairs, whose two values are added and subtracted before.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

#: A row's terms: which value, and its weight, which is not 0.
Terms = dict[int, Fraction]


@dataclass(frozen=True)
class Arithmetic:
    """What a product is written in: on numbers, or on vectors that a compiler will know.

    Attributes:
        add, subtract: from two values to their sum or difference.
        scale: from a value and a weight to their product.
        multiply_add: from a value, a weight and a total to the product plus the total.
        zero: a value of 0.
    """

    add: Callable[[Any, Any], Any]
    subtract: Callable[[Any, Any], Any]
    scale: Callable[[Any, float], Any]
    multiply_add: Callable[[Any, float, Any], Any]
    zero: Any

    def plus(self, total: Any, weight: Fraction, value: Any) -> Any:
        """Return a total plus a weighted value."""
        if abs(weight) == 1:
            return (self.add if weight > 0 else self.subtract)(total, value)
        return self.multiply_add(value, float(weight), total)

    def weighted(self, terms: Terms, values: Sequence[Any]) -> Any:
        """Return a sum of weighted values, a value of weight 1 first if there is one."""
        total = None
        for number, weight in sorted(terms.items(), key=lambda term: term[1] != 1):
            if total is None:
                total = values[number] if weight == 1 else self.scale(values[number], float(weight))
            else:
                total = self.plus(total, weight, values[number])
        return self.zero if total is None else total


def product(matrix: Sequence[Sequence[Fraction]], values: Sequence[Any], arithmetic: Arithmetic) -> list[Any]:
    """Return ``matrix @ values``."""
    rows = [{number: weight for number, weight in enumerate(row) if weight} for row in matrix]
    values = list(values)
    for pair in _paired(range(len(values)), lambda j, k: _saved_by_columns(rows, j, k)):
        _join_columns(rows, values, *pair, arithmetic)
    sums: dict[int, Any] = {}
    for i, k in _paired(range(len(rows)), lambda i, k: _saved_by_rows(rows[i], rows[k])):
        same, other, weight = _parts(rows[i], rows[k])
        even, odd = arithmetic.weighted(same, values), arithmetic.weighted(other, values)
        sums |= {i: arithmetic.plus(even, weight, odd), k: arithmetic.plus(even, -weight, odd)}
    return [sums[i] if i in sums else arithmetic.weighted(row, values) for i, row in enumerate(rows)]


def _paired(numbers: Sequence[int], saved: Callable[[int, int], int]) -> Iterator[tuple[int, int]]:
    """Yield pairs of numbers that save something, no number twice."""
    taken: set[int] = set()
    for first in numbers:
        second = next((k for k in numbers[first + 1 :] if not {first, k} & taken and saved(first, k) > 0), None)
        if second is not None:
            taken |= {first, second}
            yield first, second


def _saved_by_columns(rows: Sequence[Terms], j: int, k: int) -> int:
    """Return how many operations fewer there are if two values are added and subtracted first."""
    pairs = [(row.get(j, 0), row.get(k, 0)) for row in rows if j in row or k in row]
    if any(abs(a) != abs(b) for a, b in pairs):
        return 0
    return len(pairs) - len({a == b for a, b in pairs})


def _join_columns(rows: Sequence[Terms], values: list[Any], j: int, k: int, arithmetic: Arithmetic) -> None:
    """Let every row use the sum or the difference of two values instead of both."""
    for is_same, combine in ((True, arithmetic.add), (False, arithmetic.subtract)):
        users = [row for row in rows if j in row and k in row and (row[j] == row[k]) == is_same]
        if users:
            values.append(combine(values[j], values[k]))
        for row in users:
            row[len(values) - 1] = row.pop(j)
            del row[k]


def _saved_by_rows(a: Terms, b: Terms) -> int:
    """Return how many operations fewer there are if two rows share their even and odd parts."""
    if a.keys() != b.keys() or any(abs(a[number]) != abs(b[number]) for number in a):
        return 0
    same, other, _ = _parts(a, b)
    return _operations(a) + _operations(b) - _operations(same) - _operations(other) - 2 if same and other else 0


def _parts(a: Terms, b: Terms) -> tuple[Terms, Terms, Fraction]:
    """Return the terms of the same sign in both rows; those that differ, divided by a weight; and this weight, in a."""
    same = {number: weight for number, weight in a.items() if weight == b[number]}
    other = {number: weight for number, weight in a.items() if weight != b[number]}
    weight = min(other.values(), key=lambda w: (not _is_exact(w), abs(w) != 1, w < 0, abs(w)), default=Fraction(1))
    if not _is_exact(weight):
        return same, other, Fraction(1)
    return same, {number: each / weight for number, each in other.items()}, weight


def _is_exact(weight: Fraction) -> bool:
    """Return whether dividing by a weight rounds nothing: a power of two."""
    top, bottom = abs(weight.numerator), weight.denominator
    return top & (top - 1) == bottom & (bottom - 1) == 0


def _operations(terms: Terms) -> int:
    return len(terms) - (1 in terms.values())
