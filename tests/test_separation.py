"""Which filters are taken for a column times a row: those that are, and no others."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import convdispatch
from convdispatch.arguments import Array
from convdispatch.errors import BackendRejectedError
from convdispatch.problem import Problem
from convdispatch.separation import drawn, factors, noticed, tolerance, unsuited

FLOATS = st.floats(-100, 100, width=32).filter(lambda value: value == 0 or abs(value) > 1e-3)


def image(filters: Array) -> Problem:
    """Return the problem of some filters on an image of one channel."""
    kh, kw, _, k = filters.shape
    return Problem(1, 500, 500, 1, k, kh, kw, (kh, kh, kw, kw), dtype=filters.dtype.name)


def outer(column: Array, row: Array, dtype: str = "float32") -> Array:
    return np.outer(column, row).astype(dtype)[:, :, np.newaxis, np.newaxis]


def gaussian(side: int, sigma: float) -> Array:
    values = np.exp(-((np.arange(side) - side // 2) ** 2) / (2 * sigma**2))
    return np.asarray(values / values.sum())


WIDE = np.outer(*2 * (gaussian(31, 2),))


@given(
    column=st.lists(FLOATS, min_size=4, max_size=15), row=st.lists(FLOATS, min_size=4, max_size=15),
    dtype=st.sampled_from(("float32", "float64")),
)  # fmt: skip
def test_products_of_a_column_and_a_row_are_found_and_are_near(
    column: list[float], row: list[float], dtype: str
) -> None:
    filters = outer(np.array(column), np.array(row), dtype)
    found = factors(image(filters), filters)
    assert found is not None
    down, along = (values.astype(np.float64) for values in found)
    assert found[0].dtype == found[1].dtype == dtype
    near = tolerance(len(column), len(row)) * np.finfo(dtype).eps * np.abs(filters[:, :, 0, 0])
    assert (np.abs(np.outer(down[0], along[0]) - filters[:, :, 0, 0]) <= near).all()


@given(
    column=st.lists(FLOATS, min_size=4, max_size=9), row=st.lists(FLOATS, min_size=4, max_size=9),
    place=st.tuples(st.integers(0, 99), st.integers(0, 99)), change=st.sampled_from((1e-4, -1e-5, 0.5, np.nan, np.inf)),
)  # fmt: skip
def test_one_value_that_differs_is_enough(
    column: list[float], row: list[float], place: tuple[int, int], change: float
) -> None:
    filters = outer(np.array(column), np.array(row))
    i, j = place[0] % len(column), place[1] % len(row)
    filters[i, j] += np.float32(change) * (abs(filters[i, j]) + 1)
    # With one column or row of values beside it, anything is a product.
    others = np.delete(np.delete(filters[:, :, 0, 0], i, 0), j, 1)
    if others.any() and filters[i].any() and filters[:, j].any():
        same_row, same_column = np.delete(filters[i, :, 0, 0], j), np.delete(filters[:, j, 0, 0], i)
        if same_row.any() and same_column.any():
            assert factors(image(filters), filters) is None


@pytest.mark.parametrize(
    ("name", "filters"),
    [
        ("gaussian", np.outer(gaussian(31, 5), gaussian(31, 5))),
        ("gaussian of exp(-(x^2 + y^2))", np.exp(-np.add.outer(*2 * ((np.arange(15.0) - 7) ** 2 / 18,)))),
        ("box", np.full((7, 7), 1 / 49)),
        ("gaussian, ten sigma wide", np.outer(*2 * (gaussian(31, 1.5),))),
        ("gaussian, thirty sigma wide, whose tails are zeros in float32", np.outer(*2 * (gaussian(31, 0.5),))),
        ("binomial", np.outer(np.array([1, 4, 6, 4, 1]), np.array([1, 4, 6, 4, 1]) / 256)),
        ("sobel, large", np.outer(np.array([1, 4, 6, 4, 1]), np.array([-1, -2, 0, 2, 1]))),
        ("zeros", np.zeros((5, 5))),
        ("one value", np.eye(5)[:, 2:3] * np.eye(5)[1]),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_filters_of_text_books_are_found(name: str, filters: Array, dtype: str) -> None:
    given = filters.reshape(*filters.shape[:2], 1, 1).astype(dtype)
    assert factors(image(given), given) is not None, name


@pytest.mark.parametrize(
    ("name", "filters"),
    [
        ("gaussian whose tails are cut off", np.where(WIDE > 1e-9, WIDE, 0)),
        ("disk", (np.add.outer(*2 * ((np.arange(9.0) - 4) ** 2,)) <= 16) * 1.0),
        ("difference of Gaussians", np.outer(*2 * (gaussian(9, 1),)) - np.outer(*2 * (gaussian(9, 2),))),
        ("diagonal", np.eye(9)),
        ("rounded before it was widened", np.float32(np.outer(*2 * (gaussian(9, 2),)))),
        ("random", np.random.default_rng(0).standard_normal((9, 9))),
    ],
)
def test_others_are_not(name: str, filters: Array) -> None:
    given = filters[:, :, np.newaxis, np.newaxis].astype("f8")
    assert factors(image(given), given) is None, name


@given(
    column=st.lists(st.integers(-99, 99), min_size=4, max_size=9),
    row=st.lists(st.integers(-99, 99), min_size=4, max_size=9),
    power=st.integers(-40, 4),
)  # fmt: skip
@example(column=[3, 5, 7, 5, 3], row=[3, 5, 7, 5, 3], power=0)
@example(column=[1, 4, 6, 4, 1], row=[2, 8, 12, 8, 2], power=-8)
def test_whole_numbers_stay_whole_numbers_of_a_power_of_two(column: list[int], row: list[int], power: int) -> None:
    filters = outer(np.array(column), np.array(row)) * np.float32(2.0**power)
    found = factors(image(filters), filters)
    assert found is not None
    np.testing.assert_array_equal(np.outer(found[0], found[1]), filters[:, :, 0, 0])
    for values in found:
        parts = np.frexp(values)
        whole = np.ldexp(values, np.where(values == 0, -999, 24 - parts[1]).max())  # of the smallest value's last bit
        np.testing.assert_array_equal(whole, np.round(whole))
        few = np.gcd.reduce(whole.astype(np.int64), axis=None)
        assert np.abs(whole / max(few, 1)).max() <= 99 * 99


@pytest.mark.parametrize("size", [1e-30, 1e-6, 0.9, 1.0, 1.9, 1e6])
def test_what_lies_between_the_passes_is_no_larger_than_the_image_and_no_smaller_than_results(size: float) -> None:
    filters = outer(gaussian(9, 2), gaussian(9, 2) * size)
    found = factors(image(filters), filters)
    assert found is not None
    down, along = (float(np.abs(values).sum()) for values in found)
    assert down <= 1 + 1e-6
    assert along <= max(2 * size, 1 + 1e-6)
    assert down * along == pytest.approx(size, rel=1e-5)


@pytest.mark.parametrize(
    ("column", "row", "pixel"),
    [
        ([1e-20, 1, 1, 1, 1], [1e25] * 5, 1e-26),
        ([1e-12, 1, 1, 1, 1], [1e20] * 5, 1e-30),
        ([1e15] * 5, [1e15] * 5, 2.8e-45),
        ([1e-20, 1e-19, 1e-19, 1e-19, 1e-20], [1e-21] * 5, 1e20),  # values below the smallest normal number
        ([1.0] * 5, [1.0] * 5, 1e-38),
    ],
)
def test_sizes_that_a_pass_would_lose_are_kept(column: list[float], row: list[float], pixel: float) -> None:
    with np.errstate(all="ignore"):
        filters = np.outer(np.array(column, "f4"), np.array(row, "f4"))[:, :, np.newaxis, np.newaxis]
    x = np.zeros((1, 40, 60, 1), np.float32)
    x[0, 20, 30] = pixel
    found = convdispatch.conv2d(x, filters)
    expected = convdispatch.conv2d(x.astype("f8"), filters.astype("f8"), backend="direct")
    np.testing.assert_allclose(found, expected, rtol=20 * 2.0**-23, atol=1.5e-45)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (4, 4)])
def test_values_that_are_not_finite_are_no_products(value: float, place: tuple[int, int]) -> None:
    filters = np.ones((5, 5, 1, 3), "f4")
    filters[(*place, 0, 1)] = value
    assert factors(image(filters), filters) is None


@pytest.mark.parametrize("eps", [20, 100, 400])
def test_what_is_nearly_a_product_is_none(eps: int) -> None:
    filters = outer(gaussian(31, 5), gaussian(31, 5))
    filters[3:, 3:] *= 1 + np.float32(eps * 2.0**-23)
    assert factors(image(filters), filters) is None


def test_several_channels_must_have_the_same_filter() -> None:
    one = outer(gaussian(9, 2), gaussian(9, 2))
    problem = Problem(1, 99, 99, 3, 3, 9, 9, groups=3)
    assert noticed(problem, np.repeat(one, 3, axis=3)).separable
    assert not noticed(problem, np.concatenate([one, one, 2 * one], axis=3)).separable
    assert noticed(Problem(1, 99, 99, 1, 3, 9, 9), np.concatenate([one, -one, 2 * one], axis=3)).separable


@pytest.mark.parametrize(
    "text",
    [
        "1x500x500x1 * 3x3x1x1 SAME",
        "1x500x500x1 * 1x9x1x1 SAME",
        "1x500x500x1 * 9x9x1x1 SAME stride=2",
        "1x500x500x1 * 9x9x1x17 SAME",
        "1x500x500x2 * 9x9x1x4 SAME",
        "1x500x500x2 * 9x9x2x2 SAME",
        "1x500x500x3 * 9x9x1x3 SAME +bias",
        "1x500x500x999 * 9x9x1x999 SAME",
        "1x500x500x1 * 9x9x1x1 SAME int32",
        "1x500x500x1 * 9x9x1x1 SAME float16",
        "0x500x500x1 * 9x9x1x1 SAME",
        "1x500x500x1 * 9x9x1x0 SAME",
    ],
)
def test_nobody_looks_where_nothing_would_be_gained(text: str) -> None:
    problem = Problem.parse(text)
    filters = np.ones(problem.filter_shape, problem.dtype)
    assert noticed(problem, filters) is problem


@pytest.mark.parametrize("text", ["1x9x9x1 * 1x9x1x1 SAME", "1x9x9x1 * 9x1x1x1 SAME", "1x9x9x1 * 5x5x1x0 SAME"])
def test_what_has_no_rows_and_columns_has_no_factors(text: str) -> None:
    problem = Problem.parse(text)
    assert factors(problem, np.ones(problem.filter_shape, "f4")) is None


@pytest.mark.parametrize("text", ["1x50x50x1 * 9x7x1x3 SAME", "2x50x50x4 * 4x6x1x4 SAME", "1x9x9x1 * 5x5x1x0 SAME"])
def test_drawn_filters_are_what_a_problem_says(text: str) -> None:
    whole, rng = Problem.parse(text), np.random.default_rng(0)
    separable = whole.replace(separable=True)
    for problem in (whole, separable):
        filters = drawn(problem, lambda shape: rng.standard_normal(shape).astype("f4"))
        assert filters.shape == problem.filter_shape
        if filters.size:
            assert (factors(problem, filters) is not None) == problem.separable


@pytest.mark.parametrize(("kh", "kw"), [(4, 4), (3, 6), (6, 3), (5, 5), (31, 31)])
def test_two_passes_that_take_half_of_the_products_leave_room_for_what_rounding_does(kh: int, kw: int) -> None:
    assert unsuited(Problem(1, 99, 99, 1, 1, kh, kw)) is None
    assert tolerance(kh, kw) >= 2.5  # of a product of two roundings, divided by one of them, times another


def test_explain_shows_what_it_found_of_arrays_and_takes_shapes_as_they_are() -> None:
    ones = np.ones((9, 9, 1, 1), "f4")
    found = convdispatch.explain((1, 200, 200, 1), ones)
    assert found.problem.separable
    assert next(row for row in found.rows if row.backend == "separable").reason == ""
    whole = convdispatch.explain((1, 200, 200, 1), ones.shape)
    assert not whole.problem.separable
    assert "column times a row" in next(row for row in whole.rows if row.backend == "separable").reason


def test_explain_takes_filters_in_either_order_and_those_of_other_libraries() -> None:
    class Foreign:
        shape, dtype = (9, 9, 1, 1), "of its own"

        def __array__(self, dtype: object = None, copy: object = None) -> Array:
            return np.ones(self.shape, "f4")

    assert convdispatch.explain((1, 200, 200, 1), Foreign()).problem.separable
    assert convdispatch.explain((1, 200, 200, 1), np.ones((1, 1, 9, 9), "f4"), filter_format="OIHW").problem.separable


def test_small_calls_are_looked_at_too() -> None:
    x, ones = np.ones((1, 20, 20, 1), "f4"), np.ones((9, 9, 1, 1), "f4")
    y = convdispatch.conv2d(x, ones, backend="separable")
    np.testing.assert_array_equal(y, convdispatch.conv2d(x, ones, backend="direct"))


def test_filters_that_change_between_calls_are_looked_at_anew() -> None:
    x, w = np.ones((1, 300, 300, 1), "f4"), np.ones((9, 9, 1, 1), "f4")
    first = convdispatch.conv2d(x, w, backend="separable").copy()
    w *= 2
    np.testing.assert_array_equal(convdispatch.conv2d(x, w, backend="separable"), 2 * first)
    w[0, 0] = 5
    with pytest.raises(BackendRejectedError, match="column times a row"):
        convdispatch.conv2d(x, w, backend="separable")
