"""Image rows: right at every size around a tile, the same on any number of threads, honest about its scratch."""

import numpy as np
import pytest
import walls
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, numbers

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort
from convdispatch.backends import _panels, image_rows
from convdispatch.backends._caches import should_stream
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._panels import panels_of
from convdispatch.backends._vector import registers, vector_bytes
from convdispatch.backends.image_rows import ImageRows
from convdispatch.errors import ArgumentError
from convdispatch.machine import current
from convdispatch.problem import Problem

BACKEND = ImageRows()
LANES = vector_bytes() // 4
EFFORT: Effort = "exhaustive"


def check(problem: Problem, config: Config | None = None, seed: int = 0) -> Array:
    return walls.check(BACKEND, problem, config or Config(), seed)


@pytest.mark.parametrize("filters", ["3x3x1x1", "3x5x1x2"])
@pytest.mark.parametrize("width", [1, LANES - 1, LANES, 2 * LANES - 1, 2 * LANES, 2 * LANES + 1, 5 * LANES + 3])
def test_widths_around_a_tile(filters: str, width: int) -> None:
    check(Problem.parse(f"1x19x{width}x1 * {filters} SAME +bias +residual +relu"))


@pytest.mark.parametrize("height", [1, 2, 7, 8, 9, 15, 16, 17, 31])
def test_heights_around_a_tile(height: int) -> None:
    check(Problem.parse(f"2x{height}x{3 * LANES}x1 * 3x3x1x1 SAME +residual +gelu"))
    check(Problem.parse(f"2x{height}x{3 * LANES}x3 * 3x3x3x3 SAME +bias"))


@pytest.mark.parametrize(
    "text",
    [
        "1x9x5x1 * 3x13x1x1 SAME",  # filters wider than the image, and higher ones
        "1x5x90x1 * 31x31x1x1 SAME",
        "1x40x70x1 * 31x29x1x1 SAME",
        "1x40x70x1 * 10x1x1x1 VALID",
        "1x12x50x1 * 3x3x1x1 pad=5,0,0,7",
        "1x12x50x2 * 4x2x2x1 pad=0,3,40,1",
        "1x1x1x1 * 1x1x1x1 pad=9,2,40,1",
        "2x30x70x1 * 3x3x1x1 SAME dilation=3x2",
        "1x17x70x1 * 3x3x1x1 SAME dilation=2x1",  # one phase of the rows has a row more than the other
        "1x9x40x4 * 3x5x4x5 SAME dilation=4 +bias +residual +tanh",
        "1x3x40x1 * 3x3x1x1 SAME dilation=7",
        "1x20x70x3 * 5x5x1x3 SAME",  # each channel blurred by itself
        "1x20x70x4 * 3x3x2x6 SAME float64 +bias +relu6",
        "1x33x67x1 * 3x3x1x1 SAME float64 +residual",
        "3x11x37x16 * 3x3x16x16 SAME",
        "1x6x5000x2 * 15x15x2x1 SAME",  # a row that is cut into several panels
        "1x61x139x1 * 5x5x1x1 SAME stride=2 +bias +residual +relu",  # an image pyramid's
        "2x40x90x3 * 6x5x1x3 SAME stride=2 +gelu",
        "1x33x71x4 * 4x4x4x4 SAME stride=4 +residual",  # patches
        "1x33x131x4 * 15x16x2x6 pad=3,0,0,9 stride=4x2 float64",
        "1x30x200x8 * 1x3x8x1 SAME stride=1x2 +bias",
        "1x30x200x1 * 3x3x1x2 pad=4,7,9,40 stride=1x3",
        "1x30x200x2 * 9x2x2x1 SAME stride=3x1",
        "1x3x4x1 * 5x5x1x1 SAME stride=2",  # fewer rows and columns than strides and filters have
        "1x1x1x1 * 9x9x1x1 SAME stride=9",
        "1x6x5000x2 * 15x15x2x1 SAME stride=2",
        "2x3x40x90 NCHW * 3x5x3x4 SAME +bias +residual +relu",
        "1x3x40x90 NCHW * 5x5x1x3 SAME stride=2 +gelu",
        "1x4x9x40 NCHW * 3x5x2x6 SAME dilation=4 +bias +residual +tanh",
        "2x2x5x9 NCHW * 3x3x2x3 SAME +bias +residual",  # smaller than a tile
        "1x3x40x200 NCHW * 13x13x3x2 SAME +bias",  # too large to be read in place
        "1x1x33x67 NCHW * 3x3x1x5 SAME float64 +residual",
        "1x2x33x131 NCHW * 15x16x1x6 pad=3,0,0,9 stride=4x2 float64",
    ],
)
def test_special_shapes(text: str) -> None:
    check(Problem.parse(text))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [1, 2 * LANES - 1, 6 * LANES + 5])
def test_any_number_of_planes_is_taken_apart(channels: int, stride: int, width: int) -> None:
    check(Problem.parse(f"1x11x{width}x{channels} * 3x5x{channels}x1 pad=1,1,3,2 stride=1x{stride}"))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("filters", [1, 2, 3, 4, 5])
def test_few_channels_and_filters(channels: int, filters: int) -> None:
    check(Problem.parse(f"1x11x{2 * LANES + 5}x{channels} * 3x3x{channels}x{filters} SAME +bias +residual +relu"))


@given(
    size=st.tuples(st.integers(5, 30), st.integers(LANES, 90)), filters=st.sampled_from((2, 3)),
    kernel=st.tuples(st.sampled_from((3, 5)), st.integers(1, 7)), pads=st.tuples(*[st.integers(0, 9)] * 4),
    steps=st.sampled_from(("", "stride=2", "dilation=2x3")), channels=st.sampled_from((1, 3)), seed=st.integers(0, 99),
    words=st.sampled_from(["", "+bias +relu", "+bias +residual", "+residual +silu"]),
)  # fmt: skip
@examples(20)
def test_filters_whose_sums_are_in_one_tile(
    size: tuple[int, int], filters: int, kernel: tuple[int, int], pads: tuple[int, ...], steps: str, channels: int,
    seed: int, words: str,
) -> None:  # fmt: skip
    (kh, kw), height, width = kernel, 2 * size[0] + 12, 2 * size[1] + 19
    shapes = f"2x{height}x{width}x{channels} * {kh}x{kw}x{channels}x{filters}"
    problem = Problem.parse(f"{shapes} pad={','.join(map(str, pads))} {steps} {words}")
    config = Config(rows=4 if registers() == 32 else 3, vectors=1)
    assert image_rows._tile(problem, config, vector_bytes()).together == filters
    check(problem, config, seed)


def test_who_interleaves_in_registers() -> None:
    def together(text: str, rows: int) -> int:
        return image_rows._tile(Problem.parse(text), Config(rows=rows, vectors=1), vector_bytes()).together

    assert together("1x40x70x1 * 3x3x1x2 SAME", 4) == 2
    for text in ("1x40x70x1 * 3x3x1x5 SAME", "1x2x40x70 NCHW * 3x3x2x2 SAME", "1x40x70x2 * 3x3x1x2 SAME"):
        assert together(text, 4) == 1
    assert together(f"1x40x{LANES - 1}x1 * 3x3x1x2 SAME", 4) == together("1x3x70x1 * 3x3x1x2 SAME", 4) == 1
    assert together("1x5x70x1 * 3x3x1x2 SAME", 5) == 2
    assert together("1x40x70x1 * 9x9x1x2 SAME", 12) == 1  # their taps would not stay in registers
    tried = BACKEND.configs(Problem.parse("1x480x640x1 * 3x3x1x2 SAME"), "measure")
    assert image_rows._tile(Problem.parse("1x480x640x1 * 3x3x1x2 SAME"), tried[0], vector_bytes()).together == 2


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 90)),
    kernel=st.tuples(st.sampled_from((3, 9)), st.integers(1, 12)),  # few heights: each compiles a kernel
    steps=st.sampled_from(((1, 1), (1, 1), (2, 3), (5, 1))),
    strided=st.booleans(),
    pads=st.tuples(*[st.integers(0, 20)] * 4),
    channels=st.integers(1, 5),
    filters=st.integers(1, 5),
    planar=st.booleans(),
    which=st.integers(0, 1),
    seed=st.integers(0, 99),
)
@examples(24)
def test_any_shape_with_any_tile(
    size: tuple[int, int], kernel: tuple[int, int], steps: tuple[int, int], strided: bool,
    pads: tuple[int, int, int, int], channels: int, filters: int, planar: bool, which: int,
    seed: int,
) -> None:  # fmt: skip
    strides, dilations = (steps, (1, 1)) if strided else ((1, 1), steps)
    kernel = kernel[0] * strides[0] - seed % strides[0], max(kernel[1], strides[1])
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    h, w = max(size[0], extent[0] - pads[0] - pads[1]), max(size[1], extent[1] - pads[2] - pads[3])
    problem = Problem(2, h, w, channels, filters, *kernel, pads=pads, strides=strides, dilations=dilations)
    problem = problem.replace(data_format="NCHW" if planar else "NHWC")
    configs = BACKEND.configs(problem, EFFORT)
    check(problem, configs[which % len(configs)], seed)


ALONG = Config(rows=16, vectors=1, along=True)


@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 700)),
    taps=st.one_of(st.integers(1, 40), st.sampled_from((71, 72, 73, 80, 145))),
    dilation=st.sampled_from((1, 1, 2, 5)),
    pads=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 150), st.integers(0, 150)),
    channels=st.sampled_from(((1, 1, 1), (1, 1, 3), (1, 2, 1), (1, 3, 4), (2, 2, 2), (5, 1, 2))),
    planar=st.booleans(),
    words=st.sampled_from(["", "+bias +relu", "+residual +bias", "+residual +gelu"]),
    threads=st.integers(1, 3),
)
@examples(35)
def test_lines(
    size: tuple[int, int, int], taps: int, dilation: int, pads: tuple[int, int, int, int],
    channels: tuple[int, int, int], planar: bool, words: str, threads: int,
) -> None:  # fmt: skip
    (n, h, w), (groups, c, k) = size, channels
    w = max(w, (taps - 1) * dilation + 1 - pads[2] - pads[3])
    epilogue = Problem.parse(f"1x1x1x1 * 1x1x1x1 VALID {words}").epilogue
    problem = Problem(
        n, h, w, groups * c, groups * k, 1, taps, pads, dilations=(1, dilation), groups=groups, epilogue=epilogue
    ).replace(data_format="NCHW" if planar else "NHWC")  # fmt: skip
    assert Config(ALONG, rows=image_rows._RUNS[registers()]) in BACKEND.configs(problem, EFFORT)
    check(problem, Config(ALONG, threads=threads))


def test_planes_of_many_groups_are_for_lines() -> None:
    assert BACKEND.rejects(Problem.parse("1x64x1x90 NCHW * 1x9x1x64 SAME")) is None
    for text in ("1x64x9x90 NCHW * 3x3x1x64 SAME", "1x1x90x64 * 1x9x1x64 SAME", "1x64x1x90 NCHW * 1x9x32x64 SAME"):
        assert "up to 16 channels" in (BACKEND.rejects(Problem.parse(text)) or "")


@pytest.mark.parametrize("text", ["2x48x1x70 NCHW * 1x7x1x48 SAME +bias", "2x12x3x70 NCHW * 1x4x3x20 SAME +bias +relu"])
def test_groups_of_planes(text: str) -> None:
    for config in BACKEND.configs(Problem.parse(text), EFFORT):
        check(Problem.parse(text), Config(config, threads=2))


def test_a_plane_may_have_many_filters() -> None:
    check(Problem.parse("2x1x20x50 NCHW * 3x3x1x70 SAME +bias +residual"))
    assert "up to 16 channels and 16 filters" in (BACKEND.rejects(Problem.parse("2x20x50x1 * 3x3x1x70 SAME")) or "")


@pytest.mark.parametrize("text", ["1x9x90x1 * 3x3x1x1 SAME", "1x1x90x1 * 1x3x1x1 SAME stride=2"])
def test_what_is_no_line_has_no_tile_along_it(text: str) -> None:
    problem = Problem.parse(text)
    assert not any("along" in config for config in BACKEND.configs(problem, EFFORT))
    with pytest.raises(ArgumentError, match="along of image_rows is for filters of one row without strides; got True"):
        BACKEND.workspace(problem, ALONG)


def test_threads_share_a_single_line() -> None:
    problem = Problem.parse("1x1x100000x1 * 1x31x1x1 SAME")
    kernel = BACKEND.prepare(problem, np.ones(problem.filter_shape, "f4"), None, Config(ALONG, threads=2))
    assert isinstance(kernel, PackedKernel)
    assert kernel.count >= 8


@pytest.mark.parametrize(
    "text",
    [
        "1x61x300x1 * 3x5x1x1 SAME",
        "2x40x90x3 * 11x3x3x2 SAME dilation=2 +bias +silu",
        "1x97x301x3 * 5x5x1x3 SAME stride=2 +bias",
        "1x3x61x300 NCHW * 5x5x3x4 SAME +bias",
    ],
)
def test_threads_tiles_and_pickling_do_not_change_a_bit(text: str) -> None:
    problem = Problem.parse(text)
    expected = check(problem).tobytes()
    for config in BACKEND.configs(problem, "measure"):
        walls.check_bits(BACKEND, problem, config, expected)


@pytest.mark.parametrize("panel", [1, 20_000])
@pytest.mark.parametrize("text", ["1x61x300x2 * 5x5x2x2 SAME", "1x121x600x2 * 10x5x2x2 SAME stride=2"])
def test_panels_of_any_size_give_the_same_bits(panel: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.parse(text)
    expected = check(problem).tobytes()
    panels_of.cache_clear()
    monkeypatch.setattr(_panels, "_PANEL", panel)
    monkeypatch.setattr(_panels, "_STAGE", panel // 4)
    assert check(problem).tobytes() == expected
    panels_of.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        "1x1080x1920x1 * 3x3x1x1 SAME", "1x1080x1920x4 * 31x31x4x8 SAME", "1x50x100000x3 * 15x15x3x16 SAME",
        "1x1080x1920x4 * 31x31x4x8 SAME stride=4",
    ],
)  # fmt: skip
def test_scratch_does_not_grow_with_the_image(text: str) -> None:
    problem = Problem.parse(text)
    for config in BACKEND.configs(problem, EFFORT):
        one = BACKEND.workspace(problem, config)
        assert 0 < one <= 1 << 20
        assert BACKEND.workspace(problem, Config(config, threads=3)) == 3 * one


def test_one_bad_pixel_spoils_only_the_windows_over_it() -> None:
    problem = Problem.parse("1x30x80x1 * 11x3x1x1 SAME")
    case = numbers(problem)
    case.x[0, 14, 40, 0] = np.nan
    out = np.empty((1, 30, 80, 1), np.float32)
    BACKEND.prepare(problem, case.w, None, Config())(case.x, out, None)
    expected = np.zeros((30, 80), bool)
    expected[9:20, 39:42] = True
    np.testing.assert_array_equal(np.isnan(out[0, :, :, 0]), expected)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1x9x9x1 * 3x3x1x1 SAME int32", "int32 may not be exact"),
        ("1x9x9x17 * 3x3x17x1 SAME", "17 and 1"),
        ("1x9x9x1 * 3x3x1x64 SAME", "1 and 64"),
        ("1x9x9x1 * 3x3x1x1 SAME stride=1x4", "longer"),
        ("1x9x9x1 * 2x3x1x1 SAME stride=3x1", "longer"),
        ("1x9x9x1 * 3x3x1x1 SAME stride=2x1 dilation=1x2", "either"),
        ("1x9x9x9 * 3x3x9x1 SAME stride=2", "16"),
    ],
)
def test_it_says_what_it_does_not_do(text: str, reason: str) -> None:
    assert reason in (BACKEND.rejects(Problem.parse(text)) or "")


def test_a_tile_that_fits_no_registers_is_refused_by_name() -> None:
    problem = Problem.parse("1x9x9x1 * 3x3x1x1 SAME")
    with pytest.raises(ArgumentError, match="8x8"):
        BACKEND.prepare(problem, np.zeros((3, 3, 1, 1), np.float32), None, Config(rows=8, vectors=8))


def test_more_work_is_estimated_to_take_longer() -> None:
    small, large = Problem.parse("1x99x99x1 * 3x3x1x1 SAME"), Problem.parse("1x99x99x1 * 9x9x1x1 SAME")
    assert BACKEND.estimate(small, Config(), current()) < BACKEND.estimate(large, Config(), current())


@pytest.mark.parametrize("filters", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [3 * LANES, 100 * LANES])
def test_results_written_past_the_caches(filters: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_rows, "should_stream", lambda *_: True)
    check(Problem.parse(f"1x21x{columns}x1 * 3x3x1x{filters} SAME +bias"))
    check(Problem.parse(f"1x21x{columns + 16 // filters}x2 * 3x3x2x{filters} SAME +residual +gelu"))
    check(Problem.parse(f"2x2x21x{columns} NCHW * 3x3x2x{filters} SAME +bias +residual"))


def test_outputs_larger_than_their_part_of_the_cache_are_written_past_it() -> None:
    rows = current().caches[2] // (4 * 64)

    def problem(high: int, more: str = "") -> Problem:
        return Problem.parse(f"1x{high}x8x8 * 1x1x8x8 VALID {more}")

    assert should_stream(problem(rows), 16, 64)
    assert should_stream(problem(rows, "+relu"), 16, 64)
    assert not should_stream(problem(rows, "+gelu"), 16, 64)  # it would be read again
    assert not should_stream(problem(rows // 4), 16, 64)
    assert not should_stream(problem(rows), 8, 64)
