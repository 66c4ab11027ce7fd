"""Fast FIR: right at every size around a tile and a panel, honest about its scratch and its errors."""

import numpy as np
import pytest
import walls
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, numbers

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort
from convdispatch.backends import fast_fir
from convdispatch.backends._vector import vector_bytes
from convdispatch.backends.fast_fir import SIZES, FastFir
from convdispatch.errors import ArgumentError
from convdispatch.machine import current
from convdispatch.problem import Problem

BACKEND = FastFir()
ACROSS = 2 * vector_bytes() // 4
EFFORT: Effort = "exhaustive"


def check(problem: Problem, config: Config | None = None, seed: int = 0) -> Array:
    return walls.check(BACKEND, problem, config or Config(), seed)


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("width", [1, 2, 5, ACROSS - 1, 3 * ACROSS, 4 * ACROSS, 4 * ACROSS + 1, 9 * ACROSS + 3])
def test_widths_around_a_tile(width: int, m: int) -> None:
    check(Problem.parse(f"1x19x{width}x1 * 9x9x1x1 SAME +bias +residual +relu"), Config(m=m))


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("height", [1, 2, 11, 12, 13, 15, 16, 17, 33, 49])
def test_heights_around_a_tile(height: int, m: int) -> None:
    check(Problem.parse(f"2x{height}x{3 * ACROSS}x1 * 9x9x1x1 SAME +residual +gelu"), Config(m=m))
    check(Problem.parse(f"2x{height}x{3 * ACROSS}x3 * 9x9x3x3 SAME +bias"), Config(m=m))


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize(
    "text",  # of few heights, since each compiles a kernel
    [
        "1x9x5x1 * 9x13x1x1 SAME",  # filters wider than the image, and higher ones
        "1x5x90x1 * 12x31x1x1 SAME",
        "1x40x70x1 * 11x29x1x1 SAME",
        "1x60x70x1 * 47x7x1x1 SAME",  # rows of a short filter in two chunks
        "1x40x70x1 * 12x7x1x1 VALID",
        "1x12x50x1 * 9x7x1x1 pad=5,0,0,7",
        "1x12x50x2 * 9x9x2x1 pad=0,3,40,1",
        "1x1x1x1 * 9x7x1x1 pad=9,2,40,1",
        "1x20x70x3 * 9x9x1x3 SAME",  # each channel blurred by itself
        "1x20x70x4 * 9x9x2x6 SAME float64 +bias +relu6",
        "1x33x67x1 * 9x9x1x1 SAME float64 +residual",
        "2x21x37x16 * 9x9x16x16 SAME",
        "1x7x5000x2 * 12x15x2x1 SAME",  # a row that is cut into several panels
    ],
)
def test_special_shapes(text: str, m: int) -> None:
    check(Problem.parse(text), Config(m=m))


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
@pytest.mark.parametrize("filters", [1, 2, 3, 4, 5, 9, 16])
def test_few_channels_and_filters(channels: int, filters: int) -> None:
    for width in (9, 4 * ACROSS + 5):
        check(Problem.parse(f"1x11x{width}x{channels} * 9x9x{channels}x{filters} SAME +bias +residual +relu"))


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 200)),
    kernel=st.tuples(st.sampled_from((9, 12)), st.integers(7, 17)),  # few heights: each compiles a kernel
    pads=st.tuples(*[st.integers(0, 20)] * 4),
    channels=st.integers(1, 5),
    filters=st.integers(1, 9),
    which=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@examples(40)
def test_any_shape_with_any_tile(
    size: tuple[int, int], kernel: tuple[int, int], pads: tuple[int, int, int, int],
    channels: int, filters: int, which: int, seed: int,
) -> None:  # fmt: skip
    h, w = max(size[0], kernel[0] - pads[0] - pads[1]), max(size[1], kernel[1] - pads[2] - pads[3])
    problem = Problem(2, h, w, channels, filters, *kernel, pads=pads)
    configs = BACKEND.configs(problem, EFFORT)
    check(problem, configs[which % len(configs)], seed)


@pytest.mark.parametrize("text", ["1x61x300x1 * 9x9x1x1 SAME", "2x40x90x3 * 9x9x3x2 SAME +bias +silu"])
def test_threads_and_pickling_do_not_change_a_bit(text: str) -> None:
    problem = Problem.parse(text)
    walls.check_bits(BACKEND, problem, Config(), check(problem).tobytes())


@pytest.mark.parametrize("values", [1, 100_000])
def test_panels_of_any_size_give_the_same_bits(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.parse("1x61x300x2 * 9x9x2x2 SAME")
    expected = check(problem).tobytes()
    fast_fir._cut.cache_clear()
    monkeypatch.setattr(fast_fir, "_VALUES", values)
    monkeypatch.setattr(fast_fir, "_STAGE", values // 4)
    assert check(problem).tobytes() == expected
    fast_fir._cut.cache_clear()


@pytest.mark.parametrize("text", ["1x1080x1920x4 * 31x31x4x8 SAME", "1x50x100000x3 * 15x15x3x16 SAME"])
def test_scratch_does_not_grow_with_the_image(text: str) -> None:
    problem = Problem.parse(text)
    for config in BACKEND.configs(problem, EFFORT):
        one = BACKEND.workspace(problem, config)
        assert 0 < one <= 2 << 20
        assert BACKEND.workspace(problem, Config(config, threads=3)) == 3 * one


def test_it_says_when_a_sum_is_not_finite() -> None:
    problem = Problem.parse("1x30x80x1 * 9x9x1x1 SAME +relu")
    case = numbers(problem)
    kernel = BACKEND.prepare(problem, case.w, None, Config())
    out = np.empty(problem.output_shape, np.float32)
    assert not kernel(case.x, out, None)
    case.x[0, 29, 79, 0] = np.inf
    assert kernel(case.x, out, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1x9x9x1 * 9x9x1x1 SAME int32", "integer"),
        ("1x9x9x17 * 9x9x17x1 SAME", "17 and 1"),
        ("1x9x9x1 * 9x9x1x64 SAME", "1 and 64"),
        ("1x9x9x1 * 9x9x1x1 SAME stride=1x2", "strides"),
        ("1x9x9x1 * 9x9x1x1 SAME dilation=2x1", "dilation"),
        ("1x9x9x1 * 3x9x1x1 SAME", "here are 3x9"),
    ],
)
def test_it_says_what_it_does_not_do(text: str, reason: str) -> None:
    assert reason in (BACKEND.rejects(Problem.parse(text)) or "")


@pytest.mark.parametrize(("config", "words"), [({"m": 5}, "m=4 or m=3.*got m=5"), ({"rows": 8, "vectors": 8}, "8x8")])
def test_configs_that_make_no_sense_are_refused_by_name(config: dict[str, int], words: str) -> None:
    problem = Problem.parse("1x9x9x1 * 9x9x1x1 SAME")
    with pytest.raises(ArgumentError, match=words):
        BACKEND.prepare(problem, np.zeros((9, 9, 1, 1), np.float32), None, Config(config))


def test_more_work_is_estimated_to_take_longer() -> None:
    small, large = Problem.parse("1x99x99x1 * 9x9x1x1 SAME"), Problem.parse("1x99x99x1 * 31x31x1x1 SAME")
    assert BACKEND.estimate(small, Config(), current()) < BACKEND.estimate(large, Config(), current())
