"""Pointwise: right for every number of channels and filters, at every end of a run, in planes and woven."""

import numpy as np
import pytest
import walls
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from convdispatch.arguments import Array
from convdispatch.backend import Config
from convdispatch.backends import pointwise
from convdispatch.backends._vector import vector_bytes
from convdispatch.backends.pointwise import Pointwise
from convdispatch.problem import Problem

BACKEND = Pointwise()
LANES = vector_bytes() // 4


def check(problem: Problem, config: Config | None = None, seed: int = 0) -> Array:
    return walls.check(BACKEND, problem, config or Config(), seed)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("filters", [1, 2, 3, 4])
def test_every_number_of_channels_and_filters(channels: int, filters: int) -> None:
    check(Problem.parse(f"2x3x{LANES}x{channels} * 1x1x{channels}x{filters} VALID"))


@pytest.mark.parametrize("layout", ["{n}x{h}x{w}x3", "{n}x3x{h}x{w} NCHW"])
@pytest.mark.parametrize("pixels", [1, LANES - 1, LANES, LANES + 1, 3 * LANES - 1, 3 * LANES, 5 * LANES + 3])
@pytest.mark.parametrize("epilogue", ["", "+bias +residual +relu6", "+bias +residual +gelu"])
def test_runs_of_any_length_with_any_epilogue(layout: str, pixels: int, epilogue: str) -> None:
    shape = layout.format(n=2, h=1, w=pixels)
    shape, _, order = shape.partition(" ")
    check(Problem.parse(f"{shape} {order} * 1x1x3x2 VALID {epilogue}"))


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 70)),
    planar=st.booleans(),
    dtype=st.sampled_from(("float32", "uint8", "int16", "float16")),
    threads=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@examples(25)
def test_any_shape_and_dtype_in_any_number_of_parts(
    shape: tuple[int, int, int], planar: bool, dtype: str, threads: int, seed: int
) -> None:
    whole, pointwise._PART = pointwise._PART, LANES
    try:
        order = "NCHW" if planar else "NHWC"
        problem = Problem(*shape, 3, 2, 1, 1, dtype=dtype, data_format=order)
        check(problem, Config(threads=threads), seed)
    finally:
        pointwise._PART = whole


@pytest.mark.parametrize("pixels", [3, 5 * LANES])
def test_an_infinite_filter_value_makes_infinite_results(pixels: int) -> None:
    problem = Problem.parse(f"1x1x{pixels}x2 * 1x1x2x1 VALID")
    x, w = np.ones(problem.input_shape, "f4"), np.array([np.inf, 1], "f4").reshape(1, 1, 2, 1)
    out = np.empty(problem.output_shape, "f4")
    BACKEND.prepare(problem, w, None, Config())(x, out, None)
    assert (out == np.inf).all()


@pytest.mark.parametrize("text", ["1x97x301x3 * 1x1x3x3 VALID +bias", "2x3x97x301 NCHW * 1x1x3x2 VALID +silu"])
def test_threads_and_pickling_do_not_change_a_bit(text: str) -> None:
    problem = Problem.parse(text)
    walls.check_bits(BACKEND, problem, Config(), check(problem).tobytes())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_prefetched_pixels_change_nothing(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.parse(f"2x5x70x{channels} * 1x1x{channels}x3 VALID +bias")
    cached = check(problem)
    monkeypatch.setattr(pointwise, "_CACHED_TRAFFIC", 0.0)
    np.testing.assert_array_equal(check(problem), cached)


@pytest.mark.parametrize("text", ["1x64x64x3 * 1x1x3x2 VALID +residual", "1x3x64x64 NCHW * 1x1x3x2 VALID"])
def test_what_goes_past_the_caches_arrives(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.parse(text)
    expected = check(problem).tobytes()
    monkeypatch.setattr(pointwise, "should_stream", lambda *_: True)
    assert check(problem).tobytes() == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1x9x9x1 * 3x3x1x1 SAME", "1x1 filters"),
        ("1x9x9x1 * 1x1x1x1 SAME stride=2", "stride 1"),
        ("1x9x9x1 * 1x1x1x1 pad=1", "padding"),
        ("1x9x9x2 * 1x1x1x2 VALID", "groups"),
        ("1x9x9x5 * 1x1x5x1 VALID", "5 and 1"),
        ("1x9x9x1 * 1x1x1x5 VALID", "1 and 5"),
        ("1x9x9x3 * 1x1x3x3 VALID int64", "int64"),
    ],
)
def test_it_says_what_it_does_not_do(text: str, reason: str) -> None:
    assert reason in (BACKEND.rejects(Problem.parse(text)) or "")
