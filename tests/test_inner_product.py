"""Inner product: right for few filters on any number of channels, at every end of a run and of a line."""

import pickle

import numpy as np
import pytest
import walls
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, numbers

from convdispatch import registry
from convdispatch.arguments import Array
from convdispatch.backend import Config
from convdispatch.backends import inner_product
from convdispatch.backends._vector import registers, vector_bytes
from convdispatch.backends.inner_product import InnerProduct
from convdispatch.errors import ArgumentError
from convdispatch.problem import Problem
from convdispatch.tuning.engines import Case

BACKEND = InnerProduct()
LANES = vector_bytes() // 4
MOST = int(0.75 * LANES)


def check(text: str, config: Config | None = None, seed: int = 0) -> Array:
    return walls.check(BACKEND, Problem.parse(text), config or Config(pixels=2), seed)


@pytest.mark.parametrize("filters", sorted({1, 2, 3, MOST}))
def test_every_config_of_few_filters(filters: int) -> None:
    problem = Problem.parse(f"1x5x27x{LANES} * 3x3x{LANES}x{filters} SAME +bias +residual +relu")
    for config in BACKEND.configs(problem, "exhaustive"):
        walls.check(BACKEND, problem, config)


@pytest.mark.parametrize("channels", [LANES - 1, LANES, LANES + 1, 2 * LANES, 2 * LANES + 5])
@pytest.mark.parametrize("text", ["SAME", "SAME dilation=2 +bias", "pad=2,0,3,1 stride=2 +residual +silu"])
def test_runs_that_fill_vectors_and_runs_that_do_not(channels: int, text: str) -> None:
    if "dilation" in text and channels < LANES:
        channels = LANES
    check(f"2x4x9x{channels} * 3x3x{channels}x3 {text}")


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9])
def test_lines_shorter_and_longer_than_a_tile(width: int) -> None:
    check(f"1x3x{width}x{LANES} * 3x3x{LANES}x2 SAME +bias", Config(pixels=4))
    check(f"1x3x{width}x{LANES} * 1x1x{LANES}x2 VALID +bias", Config(pixels=4))


@pytest.mark.parametrize("text", ["SAME", "pad=4 stride=2 +bias +tanh", "VALID stride=1x3"])
def test_tiles_that_slide(text: str) -> None:
    for channels in (LANES, 3 * LANES):
        check(f"1x6x17x{channels} * 3x4x{channels}x2 {text}", Config(pixels=4, slides=True))


@given(
    images=st.integers(1, 2), height=st.integers(1, 9), width=st.integers(1, 20), channels=st.integers(1, 40),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 6)), stride=st.sampled_from(("1", "2", "3x1", "1x2")),
    dilation=st.sampled_from(("1", "2", "1x3")), pads=st.tuples(*[st.integers(0, 6)] * 4), threads=st.integers(1, 3),
    words=st.sampled_from(("", "+bias +relu6", "+bias +residual +gelu")), seed=st.integers(0, 99),
)  # fmt: skip
@examples(60)
def test_any_problem_is_right(
    images: int, height: int, width: int, channels: int, kernel: tuple[int, int], stride: str, dilation: str,
    pads: tuple[int, ...], threads: int, words: str, seed: int,
) -> None:  # fmt: skip
    text = f"{images}x{height}x{width}x{channels} * {kernel[0]}x{kernel[1]}x{channels}x3"
    options = f"pad={','.join(map(str, pads))} stride={stride} dilation={dilation} {words}"
    try:
        problem = Problem.parse(f"{text} {options}")
    except ArgumentError:
        return  # the filter is larger than the padded image
    if BACKEND.rejects(problem) is None:
        walls.check(BACKEND, problem, Config(pixels=2, threads=threads), seed)


@pytest.mark.parametrize("shape", [
    f"1x{LANES + 3}x4x9 NCHW", f"1x4x9x{LANES + 3}-float64", f"1x4x9x{LANES + 3}-float16", f"1x4x9x{LANES + 3}-uint8",
])  # fmt: skip
def test_other_layouts_and_dtypes(shape: str) -> None:
    shape, _, dtype = shape.partition("-")
    check(f"{shape} * 3x3x{LANES + 3}x2 SAME {dtype}")


def test_a_wide_image_is_walked_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner_product, "_CACHED_ROWS", 6 * 3 * LANES * 4)
    inner_product._cut.cache_clear()
    assert inner_product._cut(Problem.parse(f"1x5x40x{LANES} * 3x3x{LANES}x3 SAME"), 2, 1)[3] == 7
    check(f"1x5x40x{LANES} * 3x3x{LANES}x3 SAME +bias")
    inner_product._cut.cache_clear()


@pytest.mark.parametrize("config", [Config(pixels=2), Config(pixels=4, slides=True)])
def test_a_bad_value_spoils_only_the_outputs_that_see_it(config: Config) -> None:
    channels = LANES if config.get("slides") else LANES + 3
    problem = Problem.parse(f"1x5x12x{channels} * 3x3x{channels}x2 SAME")
    case = Case.of(problem)
    x = case.x.copy()
    x[0, 2, 6, channels - 1] = np.nan
    out = np.zeros(problem.output_shape, np.float32)
    BACKEND.prepare(problem, case.w, None, config)(x, out, None)
    spoilt = np.zeros(problem.output_shape[1:3], bool)
    spoilt[1:4, 5:8] = True
    assert (np.isnan(out[0]).all(-1) == spoilt).all()
    assert (np.isnan(out[0]).any(-1) == spoilt).all()


def test_threads_give_the_same_bits_and_kernels_pickle() -> None:
    problem = Problem.parse(f"2x7x19x{LANES + 1} * 3x3x{LANES + 1}x3 SAME +bias +silu")
    case = Case.of(problem)
    outs = []
    for threads in (1, 2, 5):
        kernel = BACKEND.prepare(problem, case.w, case.bias, Config(pixels=2, threads=threads))
        for each in (kernel, pickle.loads(pickle.dumps(kernel))):
            outs.append(np.zeros(problem.output_shape, np.float32))
            each(case.x, outs[-1], None)
    assert all((out == outs[0]).all() for out in outs)


@pytest.mark.parametrize(("text", "words"), [
    (f"1x5x9x{LANES} * 3x3x{LANES}x{MOST + 1} SAME", f"up to {MOST} of them; here are {MOST + 1}"),
    (f"1x5x9x{2 * LANES} * 3x3x{LANES}x2 SAME", "one group"),
    ("1x5x9x1 * 1x3x1x2 SAME", "3 values side by side do not fill a vector"),
    (f"1x5x9x{LANES - 1} * 3x3x{LANES - 1}x2 SAME dilation=2", f"{LANES - 1} values side by side"),
])  # fmt: skip
def test_what_it_cannot_do_it_says(text: str, words: str) -> None:
    problem = Problem.parse(text)
    assert words in (BACKEND.rejects(problem) or "")
    with pytest.raises(ArgumentError, match="inner_product cannot do"):
        BACKEND.prepare(problem, np.ones(problem.filter_shape, np.float32), None, Config())


@pytest.mark.parametrize(("config", "words"), [
    (Config(pixels=0), "pixels"), (Config(pixels=25), "pixels"), (Config(slides=True), "slides"),
    (Config(slides=1), "slides"),
])  # fmt: skip
def test_configs_that_are_none_are_refused(config: Config, words: str) -> None:
    problem = Problem.parse(f"1x5x9x{LANES + 1} * 3x3x{LANES + 1}x2 SAME")
    with pytest.raises(ArgumentError, match=words):
        BACKEND.prepare(problem, np.ones(problem.filter_shape, np.float32), None, config)


def test_tiles_slide_where_taps_and_sums_fit_in_registers() -> None:
    def choices(text: str) -> list[tuple[int, bool]]:
        configs = BACKEND.configs(Problem.parse(text), "measure")
        return sorted((config.integer("pixels", 0), bool(config.get("slides", False))) for config in configs)

    few, many = (16, 24) if registers() == 32 else (8, 12)
    assert choices(f"1x64x64x{LANES} * 3x3x{LANES}x1 SAME") == [(few, False), (few, True), (many, False), (many, True)]
    assert choices(f"1x64x64x{LANES} * 3x3x{LANES}x3 SAME") == [(few // 3, False), (many // 3, False)]
    assert choices(f"1x64x64x{LANES} * 3x3x{LANES}x1 SAME dilation=2") == [(few, False), (many, False)]
    assert choices(f"1x64x64x{LANES + 1} * 3x3x{LANES + 1}x1 SAME") == [(few, False), (many, False)]
    assert choices(f"1x64x64x{LANES} * 1x1x{LANES}x1 VALID") == [(few, False), (many, False)]


@pytest.mark.parametrize("far", ["stride=2x10000000005", "stride=1x100000000", "dilation=1x10000000000"])
def test_windows_of_huge_steps_are_not_copied(far: str) -> None:
    """The image is small, and so is the output: only steps and padding are huge."""
    problem = Problem.parse(f"1x9x17x32 * 3x3x32x2 pad=1,1,10000000000,10000000000 {far}")
    if "dilation" in far:
        assert "copies what a tile sees" in str(BACKEND.rejects(problem))
    else:
        case = numbers(problem, 0)
        expected = walls.run(registry.get("direct"), case, Config())  # the reference would pad the image
        np.testing.assert_allclose(walls.run(BACKEND, case, Config(pixels=8)), expected, rtol=0, atol=1e-4)
