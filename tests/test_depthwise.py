"""Depthwise: channels that fill no vector, rows that fill no tile, filters that reach over the image."""

import numpy as np
import pytest
import walls
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, examples, numbers

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort
from convdispatch.backends import depthwise
from convdispatch.backends._activation import RELU6
from convdispatch.backends._vector import registers, vector_bytes
from convdispatch.backends.depthwise import Depthwise, _tiling
from convdispatch.epilogue import ACTIVATIONS, Epilogue
from convdispatch.errors import ArgumentError
from convdispatch.memory import aligned
from convdispatch.problem import Problem

DEPTHWISE = Depthwise()
PLAIN = Config(columns=7)


def run(case: Case, config: Config, *, pickled: bool = False) -> Array:
    return walls.run(DEPTHWISE, case, config, pickled=pickled)


def check(problem: Problem, config: Config = PLAIN, seed: int = 0) -> None:
    walls.check(DEPTHWISE, problem, config, seed)


@pytest.mark.parametrize("channels", [2, 3, 7, 15, 16, 17, 31, 32, 50])
def test_channels_below_at_and_above_a_vector(channels: int) -> None:
    check(Problem.parse(f"2x6x9x{channels} * 3x3x1x{channels} SAME +bias +residual +relu6"))


@pytest.mark.parametrize("width", [1, 2, 6, 7, 8, 13, 14, 15])
@pytest.mark.parametrize("text", ["SAME +bias +residual +relu", "pad=1,1,3,0 stride=2 +residual +silu"])
def test_rows_shorter_and_longer_than_a_tile(width: int, text: str) -> None:
    check(Problem.parse(f"1x4x{width}x20 * 3x3x1x20 {text}"))


@pytest.mark.parametrize("size", ["1x1", "2x4", "3x3", "1x6", "5x5", "7x7", "4x8", "9x9", "3x11"])
def test_filters_wider_and_higher_than_the_image(size: str) -> None:
    check(Problem.parse(f"1x3x2x16 * {size}x1x16 SAME"))
    check(Problem.parse(f"1x2x3x16 * {size}x1x16 pad=7,8,9,6 +bias"))


@pytest.mark.parametrize("text", [
    "stride=2", "stride=3", "dilation=2", "dilation=3", "stride=2 dilation=2", "stride=1x2", "dilation=1x5",
    "dilation=2x12",
])  # fmt: skip
def test_strides_and_dilations(text: str) -> None:
    check(Problem.parse(f"1x13x23x16 * 3x3x1x16 SAME {text} +bias +gelu"))
    check(Problem.parse(f"1x9x9x16 * 5x5x1x16 SAME {text}"))


@pytest.mark.parametrize("text", ["", "stride=2 +relu", "dilation=2 +bias +residual", "+bias +residual +tanh"])
@pytest.mark.parametrize("multiplier", [2, 3])
def test_several_filters_of_a_channel(text: str, multiplier: int) -> None:
    check(Problem.parse(f"2x5x9x18 * 3x3x1x{18 * multiplier} SAME {text}"))


@pytest.mark.parametrize(
    ("group_c", "group_k", "text"),
    [
        *((4, 4, text) for text in ("", "stride=2 +relu", "dilation=2 +bias +residual", "+bias +residual +tanh")),
        *((3, 2, text) for text in ("stride=2 +bias", "dilation=2 +residual +relu")),
        *((*group, "") for group in ((3, 2), (8, 8), (16, 16))),
        *(pytest.param(*group, "", marks=pytest.mark.slow) for group in ((2, 4), (8, 4), (1, 16))),
    ],
)
def test_groups_that_share_a_vector(group_c: int, group_k: int, text: str) -> None:
    if group_c > 1 and group_k > vector_bytes() // 4:
        assert "do not share vectors" in (DEPTHWISE.rejects(Problem.parse(f"1x5x9x64 * 3x3x{group_c}x64 SAME")) or "")
        return
    for groups in (32 // group_k + 1,) if text else (2, 5, 32 // group_k + 1):
        shapes = f"{groups * group_c} * 3x3x{group_c}x{groups * group_k}"
        check(Problem.parse(f"2x5x9x{shapes} SAME {text}"))


@pytest.mark.parametrize("text", ["1x7x300x700 * 3x3x1x700 SAME", "1x3x90x2048 * 3x3x1x2048 SAME dilation=2"])
def test_wide_images_are_walked_in_strips(text: str) -> None:
    check(Problem.parse(text), Config(columns=4))


def test_float64() -> None:
    check(Problem.parse("1x9x9x19 * 3x3x1x19 SAME float64 +bias +residual +relu6"))


#: Sides of filters, and tiles of some rows and columns: few, since each pair is compiled.
SIDES_AND_TILES = ((3, (2, 7)), (3, (4, 4)), (5, (2, 7)), (7, (2, 7)))


@given(
    images=st.integers(1, 3), height=st.integers(7, 19), width=st.integers(9, 40), channels=st.sampled_from((16, 21)),
    sides=st.sampled_from(SIDES_AND_TILES), stride=st.sampled_from(("1", "2", "2x1", "1x2")),
    pads=st.tuples(*[st.integers(0, 3)] * 4), threads=st.integers(1, 3),
    words=st.sampled_from(["", "+bias +relu6", "+bias +residual", "+residual +silu"]),
)  # fmt: skip
@examples(24)
def test_rows_of_outputs_that_share_pixels(
    images: int, height: int, width: int, channels: int, sides: tuple[int, tuple[int, int]], stride: str,
    pads: tuple[int, ...], threads: int, words: str,
) -> None:  # fmt: skip
    side, (rows, columns) = sides
    shapes = f"{images}x{height}x{width}x{channels} * {side}x{side}x1x{channels}"
    text = f"{shapes} pad={','.join(map(str, pads))} stride={stride} {words}"
    check(Problem.parse(text), Config(rows=rows, columns=columns, threads=threads))


@pytest.mark.parametrize("staged", [False, True])
def test_the_last_rows_of_a_job_are_a_tile_moved_back(staged: bool) -> None:
    for images, height, threads in ((1, 7, 1), (2, 13, 1), (3, 7, 2), (1, 3, 2)):
        problem = Problem.parse(f"{images}x{height}x9x16 * 3x3x1x16 SAME +bias +residual +silu")
        check(problem, Config(columns=4, rows=4, threads=threads, staged=staged))


@pytest.mark.parametrize(
    ("rest", "config"),
    [
        ("3x3 SAME +bias +relu", {"columns": 7, "rows": 2}),
        ("5x5 SAME +residual", {"columns": 7, "rows": 2}),
        ("3x3 SAME stride=2", {"columns": 7, "rows": 2}),
        ("3x3 SAME +bias", {"columns": 7, "staged": True}),
        ("3x3 SAME +silu", {"columns": 7}),
    ],
)
def test_what_comes_from_memory_and_goes_there(
    rest: str, config: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels prefetched, and outputs streamed where they begin at a cache line: to the last bit the same."""
    side, more = rest.split(" ", 1)
    problem, forced = Problem.parse(f"2x13x23x32 * {side}x1x32 {more}"), Config(config, threads=2)
    expected = run(numbers(problem), forced)
    monkeypatch.setattr(depthwise, "should_stream", lambda problem, *_: problem.epilogue.code <= RELU6)
    monkeypatch.setattr(depthwise, "_CACHED", 0.0)
    assert _tiling(problem, forced).form().is_streamed is ("silu" not in rest)
    assert _tiling(problem, forced).form().prefetches is ("stride" not in rest and "rows" in config)
    case, out = numbers(problem), aligned(problem.output_shape, "float32")
    DEPTHWISE.prepare(problem, case.w, case.bias, forced)(case.x, out, case.residual)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(run(case, forced), expected)  # an output that begins anywhere


def test_only_what_is_done_whole_shares_rows() -> None:
    def most(text: str) -> int:
        configs = DEPTHWISE.configs(Problem.parse(text), "exhaustive")
        return max(config.integer("rows", 1) for config in configs)

    many = registers() == 32
    assert most("1x56x56x144 * 3x3x1x144 SAME") == (4 if many else 2)
    assert most("1x56x56x144 * 5x5x1x144 SAME stride=2") == most("1x56x56x144 * 7x7x1x144 SAME") == (2 if many else 1)
    for text in ("SAME dilation=2", "SAME stride=3", "SAME stride=2x1"):
        assert most(f"1x56x56x144 * 3x3x1x144 {text}") == 1
    for shapes in (
        "56x56x144 * 3x5x1x144",
        "56x56x144 * 9x9x1x144",
        "56x56x144 * 3x3x1x288",
        "56x56x144 * 3x3x4x144",
        "1x56x144 * 3x3x1x144",
    ):
        assert most(f"1x{shapes} SAME") == 1


@given(
    images=st.integers(1, 2), height=st.integers(1, 19), width=st.integers(1, 40), channels=st.sampled_from((16, 21)),
    kernel=st.tuples(st.integers(1, 5), st.sampled_from((3, 4))), stride=st.sampled_from(("1", "2", "3", "2x1", "1x2")),
    pads=st.tuples(*[st.integers(0, 3)] * 4), config=st.sampled_from(({"columns": 7}, {"columns": 7, "rows": 2})),
    threads=st.integers(1, 3), words=st.sampled_from(["", "+bias +relu6", "+bias +residual", "+residual +silu"]),
)  # fmt: skip
@examples(15)
def test_rows_that_are_staged_first(
    images: int, height: int, width: int, channels: int, kernel: tuple[int, int], stride: str, pads: tuple[int, ...],
    config: dict[str, int], threads: int, words: str,
) -> None:  # fmt: skip
    height, width = max(height, kernel[0]), max(width, kernel[1])
    shapes = f"{images}x{height}x{width}x{channels} * {kernel[0]}x{kernel[1]}x1x{channels}"
    text = f"{shapes} pad={','.join(map(str, pads))} stride={stride} {words}"
    check(Problem.parse(text), Config(config, threads=threads, staged=True))


def test_large_images_are_staged_in_parts() -> None:
    for text in ("1x40x300x256 * 3x5x1x256 SAME", "2x30x20x512 * 3x3x1x512 SAME stride=2 +bias"):
        check(Problem.parse(text), Config(columns=7, threads=2, staged=True))
    problem = Problem.parse("1x40x3000x512 * 3x3x1x512 SAME")
    assert DEPTHWISE.workspace(problem, Config(columns=7, threads=2, staged=True)) < 4 << 20


def test_only_pixels_that_want_the_same_places_of_l1_are_staged() -> None:
    def stages(text: str) -> bool:
        return any("staged" in config for config in DEPTHWISE.configs(Problem.parse(text), "exhaustive"))

    assert stages("1x14x14x512 * 3x3x1x512 SAME")
    assert stages("1x7x7x512 * 3x3x1x512 SAME stride=2 float64")
    for text in ("14x14x528 * 3x3x1x528 SAME", "1x900x512 * 1x31x1x512 SAME", "14x14x512 * 3x3x1x512 SAME dilation=2"):
        assert not stages(f"1x{text}")
    for text in ("1x9x9x16 * 3x3x1x16 SAME dilation=2", "1x9x9x16 * 3x3x4x16 SAME"):
        with pytest.raises(ArgumentError, match="one filter a channel, without dilation; got True"):
            check(Problem.parse(text), Config(columns=7, staged=True))


@st.composite
def depthwise_problems(draw: st.DrawFn) -> Problem:
    groups, group_c, group_k = draw(
        st.one_of(
            st.tuples(st.integers(16, 40), st.just(1), st.sampled_from((1, 1, 2, 3))),
            st.tuples(st.integers(2, 9), st.just(4), st.just(4)),
        )
    )
    kernel = draw(st.integers(1, 5)), draw(st.sampled_from((1, 3)))
    dilations = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    pads = draw(st.tuples(*[st.integers(0, 9)] * 4))
    least = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    return Problem(
        n=draw(st.integers(1, 2)),
        h=draw(st.integers(max(1, least[0] - pads[0] - pads[1]), 20)),
        w=draw(st.integers(max(1, least[1] - pads[2] - pads[3]), 40)),
        c=groups * group_c, k=groups * group_k, kh=kernel[0], kw=kernel[1], pads=pads,
        strides=(draw(st.integers(1, 3)), draw(st.integers(1, 3))), dilations=dilations, groups=groups,
        dtype="float32", data_format="NHWC",
        epilogue=Epilogue(draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([None, "relu", "hardswish"]))),
    )  # fmt: skip


@given(problem=depthwise_problems(), seed=st.integers(0, 99), threads=st.integers(1, 3))
@examples(16)
def test_any_depthwise_problem_is_right(problem: Problem, seed: int, threads: int) -> None:
    check(problem, Config(PLAIN, threads=threads), seed)


@pytest.mark.parametrize("text", [
    "1x1x100x32 * 1x4x1x32 VALID +bias +relu", "1x1x61x8 * 1x5x1x24 SAME +residual +gelu",
    "1x2x90x20 * 3x3x1x20 SAME dilation=1x3 +bias +residual +silu", "2x1x70x19 * 1x31x1x19 SAME stride=2",
])  # fmt: skip
def test_threads_share_the_columns_of_lines(text: str) -> None:
    problem = Problem.parse(text)
    assert len(_tiling(problem, Config(columns=7)).jobs(3)) > problem.n * problem.oh
    for threads in (1, 2, 3):
        check(problem, Config(PLAIN, threads=threads))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_threads_give_the_same_bits_and_kernels_pickle(activation: str) -> None:
    problem = Problem.parse("3x11x19x37 * 3x3x1x37 SAME")
    case = numbers(problem.replace(epilogue=Epilogue(bias=True, residual=True, activation=activation)))
    alone = run(case, PLAIN)
    for threads in (2, 3, 64):
        assert run(case, Config(PLAIN, threads=threads)).tobytes() == alone.tobytes()
    assert run(case, Config(PLAIN, threads=2), pickled=True).tobytes() == alone.tobytes()


def test_a_bad_pixel_spoils_only_its_own_channel_and_windows() -> None:
    case = numbers(Problem.parse("1x9x20x33 * 3x3x1x33 SAME"))
    case.x[0, 4, 6, 30] = np.nan
    spoiled = np.zeros((1, 9, 20, 33), bool)
    spoiled[0, 3:6, 5:8, 30] = True
    np.testing.assert_array_equal(np.isnan(run(case, PLAIN)), spoiled)


def test_a_bad_pixel_spoils_only_its_own_group() -> None:
    case = numbers(Problem.parse("1x9x20x36 * 3x3x4x36 SAME"))
    case.x[0, 4, 6, 30] = np.inf
    spoiled = np.zeros((1, 9, 20, 36), bool)
    spoiled[0, 3:6, 5:8, 28:32] = True
    np.testing.assert_array_equal(~np.isfinite(run(case, PLAIN)), spoiled)


@pytest.mark.parametrize(("text", "words"), [
    ("1x8x8x16 * 3x3x1x16 SAME int64", "floats"),
    ("1x8x8x16 * 3x3x16x16 SAME", "one for all"),
    ("1x8x8x64 * 3x3x32x64 SAME", "32 channels"),
    ("1x8x8x16 * 3x3x4x12 SAME", "3 filters"),
])  # fmt: skip
def test_what_it_cannot_do_it_says(text: str, words: str) -> None:
    problem = Problem.parse(text)
    reason = DEPTHWISE.rejects(problem)
    assert reason is not None
    assert words in reason
    with pytest.raises(ArgumentError, match=words):
        DEPTHWISE.prepare(problem, np.ones(problem.filter_shape, problem.dtype), None, PLAIN)


@pytest.mark.parametrize(("columns", "tile"), [(5, 5), (10, 10), (17, 9), (20, 10), (24, 12)])
def test_tiles_of_a_row_overlap_little(columns: int, tile: int) -> None:
    problem = Problem.parse(f"1x9x{columns}x16 * 3x3x1x16 SAME")
    of_a_row = [config for config in DEPTHWISE.configs(problem, "measure") if "rows" not in config]
    lengths = {config.integer("columns") for config in of_a_row}
    assert lengths <= {7, tile, 5, tile // 2, 4}
    assert tile in lengths or registers() == 16
    check(problem, Config(columns=min(max(lengths), tile)))


def test_configs_are_tiles_and_others_are_refused() -> None:
    problem = Problem.parse("1x7x7x32 * 3x3x1x32 SAME")
    effort: Effort = "measure"
    assert DEPTHWISE.configs(problem, effort)[0]["columns"] == 7
    with pytest.raises(ArgumentError, match="columns"):
        DEPTHWISE.prepare(problem, np.ones(problem.filter_shape, np.float32), None, Config(columns=0))
    with pytest.raises(ArgumentError, match="config staged of depthwise is for one filter"):
        DEPTHWISE.prepare(problem, np.ones(problem.filter_shape, np.float32), None, Config(columns=7, staged=1))
    with pytest.raises(ArgumentError, match="rows of depthwise must be 1 to 4; got 5"):
        DEPTHWISE.prepare(problem, np.ones(problem.filter_shape, np.float32), None, Config(columns=7, rows=5))


def test_a_large_filters_addresses_are_part_of_the_workspace() -> None:
    problem = Problem.parse("1x60x60x8 * 251x251x1x8 SAME")
    assert DEPTHWISE.workspace(problem, Config(columns=7, threads=2)) >= 2 * 251 * 251 * 7 * 8
