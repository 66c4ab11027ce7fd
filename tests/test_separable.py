"""Separable: two passes make the same as one at every size around a tile, and for channels side by side or apart."""

import numpy as np
import pytest
import walls
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, numbers

import convdispatch
from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort
from convdispatch.backends import separable
from convdispatch.backends._vector import vector_bytes
from convdispatch.backends.separable import Separable
from convdispatch.errors import ArgumentError
from convdispatch.machine import current
from convdispatch.problem import Problem

BACKEND = Separable()
LANES = vector_bytes() // 4
EFFORT: Effort = "exhaustive"


def check(text: str, config: Config | None = None, seed: int = 0) -> Array:
    return walls.check(BACKEND, Problem.parse(f"{text} separable"), config or Config(), seed)


@pytest.mark.parametrize("filters", ["9x9x1x1", "9x4x1x2"])
@pytest.mark.parametrize("width", [1, LANES - 1, LANES, 2 * LANES - 1, 2 * LANES, 2 * LANES + 1, 5 * LANES + 3])
def test_widths_around_a_tile(filters: str, width: int) -> None:
    check(f"1x19x{width}x1 * {filters} SAME +bias +residual +relu")


@pytest.mark.parametrize("data_format", ["", "NCHW"])
@pytest.mark.parametrize("height", [1, 2, 7, 8, 9, 15, 16, 17, 31])
def test_heights_around_a_tile(height: int, data_format: str) -> None:
    width = 3 * LANES
    shapes = ("1x{}x{}", "3x{}x{}") if data_format else ("{}x{}x1", "{}x{}x3")
    one, three = (f"2x{shape.format(height, width)} {data_format} *" for shape in shapes)
    check(f"{one} 9x9x1x1 SAME +residual +gelu")
    check(f"{one} 9x9x1x3 SAME +bias")
    check(f"{three} 9x9x1x3 SAME +residual +relu6")


@pytest.mark.parametrize(
    "text",
    [
        "1x9x5x1 * 5x13x1x1 SAME",  # filters wider than the image, and higher ones
        "1x5x90x1 * 31x31x1x1 SAME",
        "1x40x70x1 * 9x29x1x1 SAME",
        "1x40x70x1 * 9x9x1x1 VALID",
        "1x12x50x1 * 9x9x1x1 pad=5,0,0,7",
        "1x12x50x1 * 5x5x1x3 pad=0,3,40,1",
        "1x1x1x1 * 9x9x1x1 pad=9,2,40,1",
        "2x30x70x1 * 5x5x1x1 SAME dilation=3x2",
        "1x17x70x1 * 5x5x1x1 SAME dilation=2x1",  # one phase of the rows has a row more than the other
        "1x9x40x1 * 5x5x1x5 SAME dilation=4 +bias +residual +tanh",
        "1x1x9x40 NCHW * 5x5x1x1 SAME",
        "1x3x40x1 * 5x5x1x1 SAME dilation=7",
        "1x20x70x3 * 5x5x1x3 SAME",
        "1x20x70x3 * 5x5x1x3 pad=1,2,3,4 dilation=2x3",
        "2x7x9x33 * 5x5x1x33 SAME +residual +silu",
        "2x33x9x11 NCHW * 5x5x1x33 SAME +residual +hardswish",
        "1x20x70x1 * 5x5x1x6 SAME float64 +bias +relu6",
        "2x1x20x70 NCHW * 5x5x1x6 SAME float64 +bias +relu6",
        "1x33x67x1 * 5x5x1x1 SAME float64 +residual",
        "1x12x20000x1 * 9x9x1x1 SAME",  # a row that is cut into several panels
        "1x12x900x100 * 9x9x1x100 SAME",
    ],
)
def test_special_shapes(text: str) -> None:
    check(text)


def test_both_passes_tiles_fit_into_what_is_as_narrow_as_one() -> None:
    problem = Problem.parse(f"1x12x{4 * LANES}x1 * 9x{2 * LANES}x1x1 SAME separable")
    for config in BACKEND.configs(problem, EFFORT):
        walls.check(BACKEND, problem, config)


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 90)),
    kernel=st.tuples(st.sampled_from((5, 9)), st.integers(5, 13)),  # few heights: each compiles a kernel
    dilations=st.sampled_from(((1, 1), (1, 1), (2, 3), (5, 1))),
    pads=st.tuples(*[st.integers(0, 20)] * 4),
    channels=st.sampled_from((1, 1, 2, 3, 5)),
    filters=st.integers(1, 5),
    planar=st.booleans(),
    which=st.integers(0, 1),
    seed=st.integers(0, 99),
)
@examples(50)
def test_any_shape_with_any_tile(
    size: tuple[int, int], kernel: tuple[int, int], dilations: tuple[int, int], pads: tuple[int, int, int, int],
    channels: int, filters: int, planar: bool, which: int, seed: int,
) -> None:  # fmt: skip
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    h, w = max(size[0], extent[0] - pads[0] - pads[1]), max(size[1], extent[1] - pads[2] - pads[3])
    problem = Problem(
        2, h, w, channels, filters if channels == 1 else channels, *kernel, pads=pads, dilations=dilations,
        groups=channels, data_format="NCHW" if planar else "NHWC", separable=True,
    )  # fmt: skip
    if BACKEND.rejects(problem) is None:
        configs = BACKEND.configs(problem, EFFORT)
        walls.check(BACKEND, problem, configs[which % len(configs)], seed)


@pytest.mark.parametrize("text", ["1x61x300x1 * 5x5x1x1 SAME", "2x40x90x3 * 9x5x1x3 SAME dilation=2 +residual +silu"])
def test_threads_tiles_and_pickling_do_not_change_a_bit(text: str) -> None:
    problem = Problem.parse(f"{text} separable")
    expected = walls.check(BACKEND, problem, Config()).tobytes()
    for config in BACKEND.configs(problem, "measure"):
        walls.check_bits(BACKEND, problem, config, expected)


@pytest.mark.parametrize("middle", [1, 20_000])
def test_panels_of_any_size_give_the_same_bits(middle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "1x61x900x1 * 5x5x1x1 SAME"
    expected = check(text).tobytes()
    monkeypatch.setattr(separable, "_MIDDLE", middle)
    assert check(text).tobytes() == expected


@pytest.mark.parametrize(
    "text", ["1x1080x1920x1 * 9x9x1x1 SAME", "1x1080x1920x1 * 31x31x1x8 SAME", "1x50x100000x3 * 15x15x1x3 SAME"]
)
def test_scratch_does_not_grow_with_the_image(text: str) -> None:
    problem = Problem.parse(f"{text} separable")
    for config in BACKEND.configs(problem, EFFORT):
        one = BACKEND.workspace(problem, config)
        assert 0 < one <= 3 << 20
        assert BACKEND.workspace(problem, Config(config, threads=3)) == 3 * one


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_bad_pixel_spoils_only_the_windows_over_it(value: float) -> None:
    problem = Problem.parse("1x30x80x1 * 9x5x1x1 SAME separable")
    case = numbers(problem)
    case.x[0, 14, 40, 0] = value
    out = np.empty((1, 30, 80, 1), np.float32)
    BACKEND.prepare(problem, case.w, None, Config())(case.x, out, None)
    expected = np.zeros((30, 80), bool)
    expected[10:19, 38:43] = True
    np.testing.assert_array_equal(~np.isfinite(out[0, :, :, 0]), expected)


def test_sums_of_whole_numbers_are_exact() -> None:
    w = np.outer([3, 5, 7, 5, 3], [2, 5, 10, 15, 7]).astype("f4")[:, :, np.newaxis, np.newaxis]
    x = np.random.default_rng(0).integers(-100, 100, (1, 40, 60, 1)).astype("f4")
    y = convdispatch.conv2d(x, w, backend="direct")
    np.testing.assert_array_equal(convdispatch.plan(x, w, backend="separable")(x), y)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1x9x9x1 * 9x9x1x1 SAME", "column times a row"),
        ("1x9x9x1 * 3x3x1x1 SAME separable", "half of the products"),
        ("1x9x9x1 * 9x9x1x1 SAME separable stride=1x2", "strides"),
        ("1x9x9x3 * 9x9x1x3 SAME separable +bias", "bias"),
        ("1x9x9x1 * 9x9x1x17 SAME separable", "17"),
        ("1x9x9x999 * 9x9x1x999 SAME separable", "7992"),
    ],
)
def test_it_says_what_it_does_not_do(text: str, reason: str) -> None:
    assert reason in (BACKEND.rejects(Problem.parse(text)) or "")


def test_filters_that_are_not_what_the_problem_says_are_refused() -> None:
    problem = Problem.parse("1x9x9x1 * 9x9x1x1 SAME separable")
    with pytest.raises(ArgumentError, match="column times a row"):
        BACKEND.prepare(problem, np.eye(9, dtype="f4")[:, :, np.newaxis, np.newaxis], None, Config())


def test_more_work_is_estimated_to_take_longer() -> None:
    small, large = (Problem.parse(f"1x99x99x1 * {side}x{side}x1x1 SAME separable") for side in (5, 31))
    assert BACKEND.estimate(small, Config(), current()) < BACKEND.estimate(large, Config(), current())


@pytest.mark.parametrize("filters", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [3 * LANES, 100 * LANES])
def test_results_written_past_the_caches(filters: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separable, "should_stream", lambda *_: True)
    check(f"1x21x{columns}x1 * 5x5x1x{filters} SAME +bias")
    check(f"1x1x21x{columns} NCHW * 5x5x1x{filters} SAME +residual +gelu")
