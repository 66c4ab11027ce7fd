"""The fft backend: right for every kind of problem, honest about memory, threads and time."""

import pickle
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import judge

import convdispatch
from convdispatch.arguments import Array
from convdispatch.backend import Config
from convdispatch.backends.fft import Fft, _good_length
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine
from convdispatch.problem import Problem

FFT = Fft()
MACHINE = Machine("test (test)", ("avx2", "fma"), 4, (32 << 10, 1 << 20, 16 << 20), "Linux x86_64", ())

SPECIAL = {
    "one pixel": "1x1x1x1 * 1x1x1x1 VALID",
    "1x1 filters": "2x5x6x3 * 1x1x3x4 VALID",
    "1x1 filters, stride 3": "2x7x8x3 * 1x1x3x4 VALID stride=3",
    "one channel": "1x40x50x1 * 5x5x1x1 SAME",
    "filter bank on one channel": "2x20x21x1 * 7x7x1x6 SAME",
    "many channels to one": "1x20x21x6 * 3x3x6x1 SAME",
    "lopsided pads": "1x9x8x3 * 3x3x3x4 pad=0,3,5,1",
    "pads larger than image and filter": "1x2x3x2 * 2x3x2x3 pad=7,8,9,6",
    "windows entirely in the padding": "1x3x3x2 * 2x2x2x2 pad=9,9,9,9 stride=5",
    "rectangular filters and strides": "1x17x23x3 * 2x7x3x4 SAME stride=3x2",
    "stride larger than the filter": "1x19x20x2 * 2x3x2x3 VALID stride=5x4",
    "strided one channel": "1x33x30x1 * 5x4x1x3 SAME stride=2x3",
    "dilated": "1x20x22x3 * 3x2x3x4 SAME dilation=3x4",
    "dilated and strided": "2x20x22x3 * 3x3x3x4 SAME dilation=2x3 stride=2",
    "groups": "1x12x13x6 * 3x3x2x9 SAME",
    "strided groups": "1x12x13x6 * 3x3x3x4 SAME stride=2",
    "depthwise": "2x12x13x5 * 3x3x1x5 SAME",
    "depthwise with a multiplier": "1x12x13x4 * 3x3x1x12 SAME",
    "strided depthwise with a multiplier": "1x15x13x4 * 3x5x1x8 SAME stride=2",
    "filter as large as the image": "1x9x11x3 * 9x11x3x4 VALID",
    "filter as large as the padded image": "1x5x6x2 * 9x8x2x3 pad=2,2,1,1",
    "a row": "1x1x90x2 * 1x9x2x3 SAME",
    "a column": "3x90x1x2 * 9x1x2x3 SAME",
    "no channels": "2x6x5x0 * 3x3x0x4 SAME",
    "batch": "9x7x7x4 * 3x3x4x4 SAME",
    "float64": "2x13x12x3 * 4x4x3x5 SAME_LOWER float64",
}


def draw_arrays(problem: Problem, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((problem.n, problem.h, problem.w, problem.c)).astype(problem.dtype)
    return x, rng.standard_normal(problem.filter_shape).astype(problem.dtype)


def run(problem: Problem, config: Config, x: Array, w: Array) -> Array:
    out = np.full((problem.n, problem.oh, problem.ow, problem.k), np.nan, problem.dtype)
    FFT.prepare(problem, w, None, config)(x, out, None)
    return out


def check(problem: Problem, config: Config) -> None:
    x, w = draw_arrays(problem)
    kept = x.copy(), w.copy()
    verdict = judge(problem, FFT.numerics, config, x, w, run(problem, config, x, w))
    assert verdict.reason is None, (problem, config, verdict)
    assert np.array_equal(x, kept[0])
    assert np.array_equal(w, kept[1])


@pytest.mark.parametrize("text", SPECIAL.values(), ids=SPECIAL)
def test_special_cases_are_right_in_every_config(text: str) -> None:
    problem = Problem.parse(text)
    for config in (Config(), *FFT.configs(problem, "exhaustive")):
        for threads in (1, 3):
            check(problem, Config(config, threads=threads))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    (kh, kw), strides, dilations = pair(1, 5), pair(1, 3), pair(1, 3)
    pads = (*pair(0, 6), *pair(0, 6))
    extents = [(k - 1) * d + 1 for k, d in zip((kh, kw), dilations, strict=True)]
    h = draw(st.integers(max(1, extents[0] - pads[0] - pads[1]), 24))
    w = draw(st.integers(max(1, extents[1] - pads[2] - pads[3]), 24))
    return Problem(
        draw(st.integers(1, 3)), h, w, groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4)), kh, kw,
        pads=pads, strides=strides, dilations=dilations, groups=groups,
        dtype=draw(st.sampled_from(["float32", "float64"])),
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(0, 40), st.integers(1, 3))
def test_any_problem_in_any_tile_is_right(problem: Problem, spare: int, threads: int) -> None:
    reach = max((e - 1) // s + 1 for e, s in zip(problem.extent, problem.strides, strict=True))
    check(problem, Config(tile=reach + spare, threads=threads))


def ramp(shape: tuple[int, ...]) -> Array:
    return np.linspace(0, 1000, int(np.prod(shape))).reshape(shape)


@pytest.mark.parametrize("make", [np.ones, ramp])
@pytest.mark.parametrize("text", ["1x61x59x8 * 5x5x8x4 SAME", "1x128x128x1 * 31x31x1x1 SAME"])
def test_bound_holds_where_errors_do_not_cancel(text: str, make: Callable[[tuple[int, ...]], Array]) -> None:
    problem = Problem.parse(text)
    x, w = (make(shape).astype(problem.dtype) for shape in (problem.input_shape, problem.filter_shape))
    for config in FFT.configs(problem, "exhaustive"):
        assert judge(problem, FFT.numerics, config, x, w, run(problem, config, x, w)).reason is None


def test_bound_is_tight_enough_to_notice_a_tap_that_is_off_by_a_hundredth() -> None:
    problem = Problem.parse("1x32x32x4 * 3x3x4x4 SAME")
    (config, *_), (x, w) = FFT.configs(problem, "estimate"), draw_arrays(problem)
    wrong = w.copy()
    wrong[0, 0, 0, 0] *= 1.01
    assert judge(problem, FFT.numerics, config, x, w, run(problem, config, x, wrong)).reason


def test_integers_are_rejected_with_a_reason() -> None:
    assert "integers must be exact" in str(FFT.rejects(Problem.parse("1x8x8x1 * 3x3x1x1 SAME int32")))
    assert FFT.rejects(Problem.parse("1x8x8x1 * 3x3x1x1 SAME")) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [({"tile": 4}, "tile of fft must be at least 5 .* got 4"), ({"tile": 16.0}, "whole number 'tile'"),
     ({"tile": "large"}, "whole number 'tile'"), ({"tile": 16, "threads": 0}, "threads .* at least 1; got 0")],
)  # fmt: skip
def test_impossible_configs_are_refused(values: dict[str, int | float | str], message: str) -> None:
    problem = Problem.parse("1x20x20x3 * 5x3x3x2 SAME")
    check(problem, Config(tile=16))  # a good config equal to a bad one must not let it in
    with pytest.raises(ArgumentError, match=message):
        FFT.prepare(problem, draw_arrays(problem)[1], None, Config(values))


@pytest.mark.parametrize(
    "text",
    ["1x300x400x1 * 9x9x1x1 SAME", "1x300x400x1 * 9x9x1x5 SAME stride=2", "2x100x90x24 * 3x3x24x40 SAME",
     "1x60x60x64 * 3x3x1x64 SAME", "1x100x90x16 * 5x5x8x16 SAME stride=2", "4x56x56x32 * 3x3x32x32 SAME float64"],
)  # fmt: skip
def test_workspace_is_what_a_call_allocates(text: str) -> None:
    problem = Problem.parse(text)
    x, w = draw_arrays(problem)
    out = np.empty(problem.output_shape, problem.dtype)
    for config in FFT.configs(problem, "patient"):
        kernel = FFT.prepare(problem, w, None, config)
        kernel(x, out, None)  # caches of the libraries are not the call's
        tracemalloc.start()
        kernel(x, out, None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 0.9 * peak - 60_000 < FFT.workspace(problem, config) < 1.2 * peak, config


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize(
    "text",
    ["1x4000x6000x1 * 5x5x1x1 SAME", "256x56x56x64 * 3x3x64x64 SAME", "1x512x512x64 * 9x9x64x64 SAME",
     "1x7x7x2048 * 3x3x2048x2048 SAME", "1x2000x2000x16 * 200x200x16x16 SAME"],
)  # fmt: skip
def test_workspace_is_bounded(text: str, threads: int) -> None:
    problem = Problem.parse(text)
    for config in FFT.configs(problem, "estimate"):
        assert FFT.workspace(problem, Config(config, threads=threads)) <= 64 << 20


@pytest.mark.parametrize(
    "text", ["1x200x200x3 * 5x5x3x8 SAME", "1x200x200x1 * 9x9x1x2 SAME", "1x14x14x64 * 3x3x64x64 SAME"]
)
def test_threads_agree_and_calls_repeat(text: str) -> None:
    problem = Problem.parse(text)
    x, w = draw_arrays(problem)
    scale = np.abs(one := run(problem, Config(tile=16), x, w)).max()
    for threads in (2, 3):
        config = Config(tile=16, threads=threads)
        many = run(problem, config, x, w)
        assert np.abs(many - one).max() <= 1e-6 * scale
        assert np.array_equal(many, run(problem, config, x, w))


def test_one_kernel_serves_many_threads_at_once() -> None:
    problem = Problem.parse("1x90x90x3 * 5x5x3x8 SAME")
    kernel = FFT.prepare(problem, draw_arrays(problem)[1], None, Config(tile=16, threads=2))
    inputs = [draw_arrays(problem, seed)[0] for seed in range(8)]

    def call(x: Array) -> Array:
        out = np.empty(problem.output_shape, problem.dtype)
        kernel(x, out, None)
        return out

    alone = [call(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(call, inputs))
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1e-6 * np.abs(one).max()


def test_kernels_can_be_pickled() -> None:
    problem = Problem.parse("1x20x20x6 * 3x3x3x4 SAME stride=2")
    x, w = draw_arrays(problem)
    kernel = FFT.prepare(problem, w, None, Config())
    first, second = np.empty((2, 1, problem.oh, problem.ow, problem.k), np.float32)
    kernel(x, first, None)
    pickle.loads(pickle.dumps(kernel))(x, second, None)
    assert np.array_equal(first, second)


def test_filters_are_packed_whatever_their_strides_and_not_kept() -> None:
    problem = Problem.parse("1x20x20x4 * 3x3x4x6 SAME")
    x, w = draw_arrays(problem)
    kernel = FFT.prepare(problem, viewed := np.asfortranarray(w)[::-1][::-1], None, Config())
    viewed[...] = 0
    out = np.empty(problem.output_shape, np.float32)
    kernel(x, out, None)
    assert np.array_equal(out, run(problem, Config(), x, w))


def test_non_finite_and_huge_values_raise_no_warning() -> None:
    problem = Problem.parse("1x20x20x3 * 3x3x3x4 SAME")
    x, w = draw_arrays(problem)
    x[0, 3, 3], x[0, 9, 9], x[0, 15, 15] = np.nan, np.inf, np.finfo(np.float32).max
    for config in (Config(), Config(tile=8, threads=2)):
        assert not np.isfinite(run(problem, config, x, w)).all()


def test_configs_are_distinct_and_more_at_more_effort() -> None:
    problem = Problem.parse("1x1080x1920x1 * 5x5x1x1 SAME")
    previous: set[Config] = set()
    for effort in ("estimate", "measure", "patient", "exhaustive"):
        configs = FFT.configs(problem, effort)
        assert len(set(configs)) == len(configs)
        assert previous < set(configs)
        assert configs[0] == FFT.configs(problem, "estimate")[0]
        previous = set(configs)
    assert Config(tile=1944) in previous  # 1920 + 4, the next length with small factors: the image whole


def seconds(text: str, config: Config | None = None, machine: Machine = MACHINE) -> float:
    problem = Problem.parse(text)
    estimate = FFT.estimate(problem, config or FFT.configs(problem, "estimate")[0], machine)
    assert estimate is not None
    return estimate


@given(problems())
def test_the_config_found_in_a_hurry_is_the_first_of_all(problem: Problem) -> None:
    assert FFT.configs(problem, "estimate")[0] == FFT.configs(problem, "exhaustive")[0]


def test_estimate_grows_with_the_work_and_shrinks_with_the_machine() -> None:
    base = "1x56x56x64 * 3x3x64x64 SAME"
    assert 1e-4 < seconds(base) < 1e-1
    for more in ("4x56x56x64 * 3x3x64x64 SAME", "1x112x112x64 * 3x3x64x64 SAME", "1x56x56x64 * 3x3x64x256 SAME",
                 "1x56x56x256 * 3x3x256x64 SAME", "1x56x56x64 * 9x9x64x64 SAME", base + " float64"):  # fmt: skip
        assert seconds(more) > seconds(base), more
    assert seconds("1x56x56x64 * 3x3x1x64 SAME") < seconds(base)
    assert seconds(base, Config(tile=16, threads=4)) < seconds(base, Config(tile=16))
    wide = Machine(**{**vars(MACHINE), "isa": ("avx512f",)})
    assert seconds(base, Config(tile=16), wide) < seconds(base, Config(tile=16))
    assert all(seconds(text) > 0 for text in SPECIAL.values())


def test_no_thread_warns_of_what_is_not_finite() -> None:
    x, w = np.ones((1, 40, 40, 16), np.float32), np.ones((5, 5, 16, 8), np.float32)
    x[0, 3, 3, 3] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tile in (16, 64):  # blocks for all threads; one block, whose products are shared out
            y = convdispatch.plan(x, w, backend=("fft", {"tile": tile, "threads": 2}))(x)
            assert np.isinf(y[0, 3, 3]).all()
            assert np.isfinite(y[0, 20, 20]).all()


@given(st.one_of(st.integers(1, 5000), st.integers(1, 1 << 24)))
def test_lengths_are_those_that_scipy_finds_fast(least: int) -> None:
    assert _good_length(least) == scipy.fft.next_fast_len(least, real=True)


def test_lines_may_be_longer_than_any_table() -> None:
    for least in (2**24 + 1, 2**40 + 7):
        length = _good_length(least)
        assert least <= length <= 2 * least
        for factor in (2, 3, 5):
            while length % factor == 0:
                length //= factor
        assert length == 1
