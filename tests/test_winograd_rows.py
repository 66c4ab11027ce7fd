"""Minimal filtering along rows: right for all that tiles and strips leave over, honest about scratch and errors."""

import tracemalloc

import numpy as np
import pytest
import walls
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, numbers

from convdispatch.arguments import Array
from convdispatch.backend import Config
from convdispatch.backends import winograd_rows
from convdispatch.backends._vector import vector_bytes
from convdispatch.backends.winograd_rows import SIZES, SIZES_OF_CHUNKS, WinogradRows
from convdispatch.errors import ArgumentError
from convdispatch.memory import aligned
from convdispatch.problem import Problem

BACKEND = WinogradRows()
LANES = vector_bytes() // 4


def check(problem: Problem, config: Config, seed: int = 0) -> Array:
    return walls.check(BACKEND, problem, config, seed)


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 20), st.sampled_from([4, 11, 43]), st.sampled_from([3, 4, 2, 1])),
    kh=st.integers(1, 5),
    filters=st.integers(LANES, 3 * LANES),
    down=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    across=st.sampled_from([(3, 1, 4), (3, 1, 4), (5, 2, 2)]),  # taps, stride and m: each compiles kernels
    pads=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2), st.integers(0, 2)),
    words=st.sampled_from(["", "", "+bias", "+bias +residual +relu", "+residual +gelu"]),
    in_turn=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@examples(24)
def test_any_shape_is_right(
    shape: tuple[int, int, int, int], kh: int, filters: int, down: tuple[int, int], across: tuple[int, int, int],
    pads: tuple[int, int, int, int], words: str, in_turn: bool, threads: int, seed: int,
) -> None:  # fmt: skip
    n, h, w, c = shape
    (stride, dilation), (taps, stride_across, m) = down, across
    h = max(h, (kh - 1) * dilation + 1 - pads[0] - pads[1])
    w = max(w, (m - 1) * stride_across + taps - pads[2] - pads[3])
    epilogue = Problem.parse(f"1x1x1x1 * 1x1x1x1 SAME {words}").epilogue
    problem = Problem(
        n, h, w, c, filters, kh, taps, pads=pads, strides=(stride, stride_across), dilations=(dilation, 1),
        epilogue=epilogue,
    )  # fmt: skip
    assert BACKEND.rejects(problem) is None
    many = problem.ow > 3 * m  # tiles, four and more
    check(problem, Config(m=m, in_turn=in_turn and many, threads=threads), seed)


@pytest.mark.parametrize("width", [*range(4, 14), 61])
def test_widths_around_tiles_and_passes(width: int) -> None:
    check(Problem.parse(f"1x5x{width}x3 * 3x3x3x{LANES} SAME +residual"), Config(m=4))


@pytest.mark.parametrize(
    ("text", "m"),
    [
        ("1x9x30x1 * 2x2x1x16 SAME", 3),
        ("1x9x30x8 * 4x9x8x16 SAME", 4),
        pytest.param("1x3x30x24 * 3x10x24x16 SAME", 3, marks=pytest.mark.slow),
        ("1x9x30x17 * 1x11x17x20 SAME", 2),  # channels that fill vectors, and some beyond
        ("1x9x40x3 * 7x7x3x8 SAME stride=2 +bias", 4),
        pytest.param("2x9x40x2 * 3x3x2x40 SAME float64 +bias +silu", 4, marks=pytest.mark.slow),
        ("1x9x43x3 * 3x13x3x16 SAME +bias", 5),  # taps by chunks
        pytest.param("1x9x43x1 * 2x31x1x16 SAME +residual +gelu", 4, marks=pytest.mark.slow),
        ("1x9x71x2 * 3x23x2x16 SAME stride=2 +residual", 4),
        pytest.param("1x2x201x1 * 1x38x1x16 SAME stride=4", 4, marks=pytest.mark.slow),
        ("1x4x14x3 * 3x300x3x16 pad=1,1,200,250", 5),  # most of the taps beside the image
        ("1x1x19x36 * 1x30x12x48 SAME +bias +residual +silu", 4),  # groups, and chunks beside the image
        pytest.param("2x7x19x16 * 2x5x8x40 SAME +bias", 4, marks=pytest.mark.slow),
        ("1x1x300x4 * 1x3x4x16 SAME", 4),  # a single row, whose tiles are shared out
        ("1x60x3x1 * 10x2x1x16 pad=20,30,4,0", 2),  # rows of outputs that see nothing of the image
        ("2x3x12x11 NCHW * 3x3x3x16 SAME +residual +relu", 4),
        ("1x12x11x3 * 3x3x3x16 SAME float16", 4),
    ],
)
def test_special_shapes(text: str, m: int) -> None:
    for threads in (1, 2):
        check(Problem.parse(text), Config(m=m, threads=threads))


@pytest.mark.parametrize(
    ("text", "m"),
    [
        ("1x9x61x3 * 7x7x3x16 SAME +bias +relu", 4),
        ("1x9x43x40 * 2x9x40x16 SAME +residual", 4),  # tiles of more than a kibibyte
        ("1x9x73x2 * 2x31x2x24 SAME +residual +silu", 5),
        ("1x9x60x3 * 3x13x3x8 SAME stride=2 float64", 4),
    ],
)
def test_points_in_turn(text: str, m: int) -> None:
    for threads in (1, 2):
        check(Problem.parse(text), Config(m=m, in_turn=True, threads=threads))


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("rest", ["3x3x24 SAME", "3x3x24 SAME +bias +residual +tanh", "17x3x24 SAME"])
def test_threads_strips_and_pickling_do_not_change_a_bit(
    rest: str, in_turn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, config = Problem.parse(f"1x23x47x3 * 3x{rest}"), Config(m=4, in_turn=in_turn)
    expected = check(problem, config).tobytes()
    for stage in (1, 20_000):
        winograd_rows._cut.cache_clear()
        monkeypatch.setattr(winograd_rows, "_STAGE_BYTES", stage)
        walls.check_bits(BACKEND, problem, config, expected)
    winograd_rows._cut.cache_clear()


def test_what_goes_past_the_caches_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.parse(f"1x9x21x3 * 3x3x3x{2 * LANES} SAME +bias")
    expected = check(problem, Config(m=4))
    monkeypatch.setattr(winograd_rows, "should_stream", lambda *_: True)
    case, out = numbers(problem), aligned(problem.output_shape, "float32")
    BACKEND.prepare(problem, case.w, case.bias, Config(m=4))(case.x, out, None)
    np.testing.assert_array_equal(out, expected)
    assert check(problem, Config(m=4)).tobytes() == expected.tobytes()  # an output that begins anywhere


@pytest.mark.usefixtures("rooms_taken")
@pytest.mark.parametrize("text", ["1x60x61x3 * 3x3x3x16 SAME", "1x60x61x3 * 5x5x3x16 SAME stride=2"])
@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_workspace_is_what_a_call_allocates(text: str, in_turn: bool, threads: int) -> None:
    problem, config = Problem.parse(text), Config(m=4, in_turn=in_turn, threads=threads)
    case = numbers(problem)
    out, kernel = np.empty(problem.output_shape, np.float32), BACKEND.prepare(problem, case.w, None, config)
    kernel(case.x, out, None)
    tracemalloc.start()
    try:
        kernel(case.x, out, None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    most, slack = BACKEND.workspace(problem, config), 16 << 10  # of Python's own objects
    # A thread that comes late may find its jobs done by another, in memory already given back.
    assert most / threads - slack < peak < most + slack


def test_scratch_does_not_grow_with_the_image() -> None:
    problem = Problem.parse("8x4000x4000x3 * 7x7x3x64 SAME")
    for config in BACKEND.configs(problem, "exhaustive"):
        assert 0 < BACKEND.workspace(problem, Config(config, threads=2)) < 2 * 400 << 10


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_it_says_when_a_sum_is_not_finite(value: float) -> None:
    problem = Problem.parse(f"1x9x30x3 * 3x3x3x{LANES} SAME +relu6")
    case = numbers(problem)
    kernel = BACKEND.prepare(problem, case.w, None, Config(m=4))
    out = np.empty(problem.output_shape, np.float32)
    assert not kernel(case.x, out, None)
    case.x[0, 8, 29, 2] = value
    assert kernel(case.x, out, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1x9x9x3 * 3x3x3x16 SAME int8", "exact"),
        ("1x9x9x8 * 3x3x4x16 SAME", "3x3 filters of groups, or of over 32 channels, are better transformed down"),
        ("1x9x9x0 * 3x3x0x16 SAME", "no input channels"),
        ("1x9x9x3 * 3x3x3x7 SAME", "at least 8; here are 7"),
        ("1x9x9x683 * 3x9x683x16 SAME", "few channels and rows, 2048 of both at most; here are 3 rows of 683"),
        ("1x9x90x32 * 3x151x32x16 SAME", "here are 3 rows of 32, of more than 11 taps"),
        ("1x9x9x33 * 3x3x33x16 SAME", "3x3 filters of groups, or of over 32 channels, are better transformed down"),
        ("1x9x9x32 * 1x3x4x16 SAME", "at least 8; here are 2"),
        ("1x9x9x3 * 3x3x3x16 SAME dilation=1x2", "dilated"),
        ("1x9x9x3 * 3x1x3x16 SAME", "rows of 1 taps"),
        ("1x9x3x3 * 3x12x3x16 SAME", "rows of 12 taps"),
        ("1x9x9x3 * 3x3x3x16 SAME stride=3", "with stride 3"),
        ("1x9x99x3 * 3x33x3x16 SAME stride=5", "with stride 5"),
        ("1x9x9x3 * 2x2x3x16 SAME stride=2", "with stride 2"),
        ("1x9x3x3 * 3x3x3x16 VALID", "for 1 columns"),
    ],
)
def test_what_it_cannot_do_has_a_reason(text: str, reason: str) -> None:
    assert reason in (BACKEND.rejects(Problem.parse(text)) or "")


@pytest.mark.parametrize("m", [1, 5, True, "4"])
def test_a_wrong_size_says_what_would_do(m: int | str) -> None:
    problem = Problem.parse("1x9x9x3 * 3x3x3x16 SAME")
    with pytest.raises(ArgumentError, match=r"m=4 or m=3 or m=2 or m=2, in_turn=True, the outputs.*got m="):
        BACKEND.prepare(problem, numbers(problem).w, None, Config(m=m))


def test_rough_transforms_are_for_few_rows_and_channels() -> None:
    sizes = {
        c: {config["m"] for config in BACKEND.configs(Problem.parse(f"1x9x64x{c} * 9x9x{c}x16 SAME"), "exhaustive")}
        for c in (64, 80)
    }
    assert sizes == {64: {4}, 80: {2}}


def test_all_sizes_that_there_are_have_points() -> None:
    for taps in range(2, 40):
        for stride in (1, 2):
            if stride < taps:
                problem = Problem(1, 9, 64, 1, 16, 1, taps, strides=(1, stride))
                configs = BACKEND.configs(problem, "exhaustive")
                assert configs
                assert {config["m"] for config in configs} <= set(SIZES if taps <= 11 else SIZES_OF_CHUNKS)
                assert all(BACKEND.numerics.growth(problem, config) > 0 for config in configs)
