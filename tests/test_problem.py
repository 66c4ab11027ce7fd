"""A problem's text and back: one line, canonical, the same in every process."""

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import USABLE_DTYPES, problems

from convdispatch.epilogue import Epilogue
from convdispatch.errors import ArgumentError, ArgumentTypeError
from convdispatch.problem import Problem, output_length, same_pads


@given(problems(dtypes=USABLE_DTYPES))
def test_text_parses_back_to_an_equal_problem_with_an_equal_hash(problem: Problem) -> None:
    again = Problem.parse(str(problem))
    assert again == problem
    assert hash(again) == hash(problem)
    assert str(again) == str(problem)


@given(problems(dtypes=USABLE_DTYPES))
def test_pickling_keeps_a_problem_and_its_hash(problem: Problem) -> None:
    hash(problem)
    again = pickle.loads(pickle.dumps(problem))
    assert again == problem
    assert hash(again) == hash(problem)
    assert (again.oh, again.ow, again.text) == (problem.oh, problem.ow, problem.text)


@given(problems(), st.randoms(use_true_random=False))
def test_words_after_the_shapes_may_stand_in_any_order(problem: Problem, random: object) -> None:
    left, right = str(problem).split(" * ")
    shape, *words = right.split()
    words.reverse()
    assert Problem.parse(f"{left} * {shape} {' '.join(words)}") == problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1x56x56x64 * 3x3x64x64 SAME", Problem(n=1, h=56, w=56, c=64, k=64, kh=3, kw=3, pads=(1, 1, 1, 1))),
        (
            "1x224x224x3 * 7x7x3x64 pad=3 stride=2 +bias +relu",
            Problem(
                n=1, h=224, w=224, c=3, k=64, kh=7, kw=7, pads=(3, 3, 3, 3), strides=(2, 2),
                epilogue=Epilogue(bias=True, activation="relu"),
            ),
        ),
        (
            "8x32x14x14 NCHW * 3x3x1x32 SAME dilation=2x1 float64",
            Problem(
                n=8, h=14, w=14, c=32, k=32, kh=3, kw=3, pads=(2, 2, 1, 1), dilations=(2, 1), groups=32,
                dtype="float64", data_format="NCHW",
            ),
        ),
        (
            "2x5x6x4 * 1x2x2x6 VALID stride=1x2 int8 +residual",
            Problem(
                n=2, h=5, w=6, c=4, k=6, kh=1, kw=2, strides=(1, 2), groups=2, dtype="int8",
                epilogue=Epilogue(residual=True),
            ),
        ),
        (
            "1x4x4x1 * 2x2x1x1 SAME_LOWER +bias +residual +leaky_relu(0.01)",
            Problem(
                n=1, h=4, w=4, c=1, k=1, kh=2, kw=2, pads=(1, 0, 1, 0),
                epilogue=Epilogue(bias=True, residual=True, activation="leaky_relu", slope=0.01),
            ),
        ),
        (
            "1x9x9x2 * 5x5x1x2 VALID separable float64 +residual",
            Problem(
                n=1, h=9, w=9, c=2, k=2, kh=5, kw=5, groups=2, dtype="float64", epilogue=Epilogue(residual=True),
                separable=True,
            ),
        ),
        ("1x4x4x0 * 3x3x0x4 VALID groups=2", Problem(n=1, h=4, w=4, c=0, k=4, kh=3, kw=3, groups=2)),
        ("1x9x9x2 * 3x3x2x2 pad=0,1,2,3", Problem(n=1, h=9, w=9, c=2, k=2, kh=3, kw=3, pads=(0, 1, 2, 3))),
    ],
)  # fmt: skip
def test_canonical_text_of(text: str, problem: Problem) -> None:
    assert str(problem) == text
    assert Problem.parse(text) == problem


@pytest.mark.parametrize(
    ("loose", "canonical"),
    [
        ("1x8x8x2*3x3x2x4", "1x8x8x2 * 3x3x2x4 SAME"),
        ("  1x8x8x2  *  3x3x2x4   VALID ", "1x8x8x2 * 3x3x2x4 VALID"),
        ("1x8x8x2 * 3x3x2x4 pad=1", "1x8x8x2 * 3x3x2x4 SAME"),
        ("1x8x8x2 * 3x3x2x4 pad=2,0", "1x8x8x2 * 3x3x2x4 pad=2,0"),
        ("1x8x8x2 * 3x3x2x4 pad=2,2,0,0", "1x8x8x2 * 3x3x2x4 pad=2,0"),
        ("1x8x8x2 * 3x3x2x4 pad=2,2,2,2", "1x8x8x2 * 3x3x2x4 pad=2"),
        ("1x8x8x2 * 3x3x2x4 pad=0 stride=2x2", "1x8x8x2 * 3x3x2x4 VALID stride=2"),
        ("1x8x8x2 * 3x3x2x4 NHWC float32 stride=1 dilation=1 groups=1", "1x8x8x2 * 3x3x2x4 SAME"),
        ("1x8x8x2 * 1x1x2x4 SAME", "1x8x8x2 * 1x1x2x4 VALID"),
    ],
)
def test_other_ways_to_write_a_problem_have_one_canonical_text(loose: str, canonical: str) -> None:
    assert str(Problem.parse(loose)) == canonical


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "input shape"),
        ("1x8x8x2", "input shape"),
        ("1x8x8x2 *", "filter shape"),
        ("1x8x8 * 3x3x2x4", "'1x8x8'"),
        ("1x8x8x2 * 3x3x2", "'3x3x2'"),
        ("1x8x8x-2 * 3x3x2x4", "'1x8x8x-2'"),
        ("1x8x8x2 * 3x3x2x4 SAMEISH", "'SAMEISH'"),
        ("1x8x8x2 * 3x3x2x4 stride=", "'stride='"),
        ("1x8x8x2 * 3x3x2x4 stride=2x2x2", "'stride=2x2x2'"),
        ("1x8x8x2 * 3x3x2x4 stride=-1", "'stride=-1'"),
        ("1x8x8x2 * 3x3x2x4 pad=1,2,3", "'pad=1,2,3'"),
        ("1x8x8x2 * 3x3x2x4 pad=-1", "'pad=-1'"),
        ("1x8x8x2 * 3x3x2x4 stride=2 stride=3", "second time"),
        ("1x8x8x2 * 3x3x2x4 SAME VALID", "second time"),
        ("1x8x8x2 * 3x3x2x4 +bias +bias", "second time"),
        ("1x8x8x2 * 3x3x2x4 +swish", "swish"),
        ("1x8x8x2 * 3x3x2x4 +leaky_relu", "slope"),
        ("1x8x8x2 * 3x3x2x4 +leaky_relu(nan)", "slope"),
        ("1x8x8x5 * 3x3x2x4", "5 input channels"),
        ("1x8x8x4 * 3x3x2x4 groups=3", "groups=3"),
        ("1x8x8x4 * 3x3x2x5", "groups=2"),
        ("1x8x8x2 * 3x3x2x4 stride=0", "at least 1"),
        ("1x8x8x2 * 0x3x2x4", "at least 1"),
        ("1x8x8x2 * 9x3x2x4 VALID", "9 rows"),
        ("1x8x8x2 * 3x3x2x4 int8 +gelu", "gelu"),
        ("1x8x8x2 * 3x3x2x4 separable", "4 filters for 2 channels, groups=1"),
        ("1x8x8x2 * 3x3x1x4 separable", "4 filters for 2 channels, groups=2"),
        ("1x8x8x1 * 3x3x1x4 separable float16", "got float16"),
        ("1x8x8x1 * 3x3x1x4 separable separable", "second time"),
    ],
)
def test_text_that_is_no_problem_is_refused_by_what_is_wrong(text: str, named: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Problem.parse(text)
    assert named in str(caught.value)


@pytest.mark.parametrize("thing", [None, 3, b"1x8x8x2 * 3x3x2x4", ["1x8x8x2"]])
def test_what_is_not_text_is_a_type_error(thing: object) -> None:
    with pytest.raises(ArgumentTypeError, match="problem must be text"):
        Problem.parse(thing)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pads": (1, 1)}, ("pads", "4", "(1, 1)")),
        ({"pads": 1}, ("pads", "4", "1")),
        ({"strides": 2}, ("strides", "2", "got 2")),
        ({"strides": [2, 2]}, ("strides", "tuple", "[2, 2]")),
        ({"strides": (1, 2.0)}, ("strides", "ints", "(1, 2.0)")),
        ({"dilations": (1, True)}, ("dilations", "ints", "(1, True)")),
        ({"dilations": None}, ("dilations", "None")),
        ({"epilogue": "+relu"}, ("epilogue", "Epilogue", "'+relu'")),
        ({"separable": 1}, ("separable", "True", "got 1")),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused_by_name(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        Problem(1, 5, 5, 3, 8, 3, 3, **changes)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@given(st.text(alphabet="0123456789x*=,+ SAMEVLIDstrideNHWC()", max_size=40))
def test_any_text_either_parses_or_is_an_argument_error(text: str) -> None:
    try:
        problem = Problem.parse(text)
    except (ArgumentError, ArgumentTypeError):
        return
    assert Problem.parse(str(problem)) == problem


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3))
def test_same_padding_gives_as_many_outputs_as_strides_fit(
    length: int, kernel: int, stride: int, dilation: int
) -> None:
    upper, lower = (same_pads(length, kernel, stride, dilation, lower=lower) for lower in (False, True))
    assert output_length(length, kernel, stride, dilation, *upper) == -(-length // stride)
    assert upper == lower[::-1]
    assert 0 <= upper[1] - upper[0] <= 1


def test_a_problem_cannot_be_changed() -> None:
    problem = Problem.parse("1x8x8x2 * 3x3x2x4")
    with pytest.raises(AttributeError):
        problem.n = 2  # type: ignore[misc]
    assert problem.replace(n=2).n == 2
    assert problem.n == 1


def test_flops_count_multiplications_and_additions() -> None:
    assert Problem.parse("2x8x8x3 * 3x3x3x4 VALID").flops == 2 * (2 * 6 * 6 * 4) * (3 * 3 * 3)


def test_other_filters_are_not_known_to_be_separable() -> None:
    problem = Problem.parse("2x40x40x3 * 5x5x1x3 SAME separable")
    assert problem.replace(n=1, h=30, k=3, data_format="NCHW").separable
    for changes in ({"kh": 3}, {"c": 6, "k": 6, "groups": 6}, {"dtype": "float64"}, {"separable": False}):
        assert not problem.replace(**changes).separable
    assert problem.replace(c=1, k=1, groups=1, separable=True).separable
