"""1x1 filters on NCHW images: right whatever the sizes, nothing outside touched, the same bits by any threads."""

import pickle

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import Case, judge, numbers

from convdispatch import registry
from convdispatch.arguments import Array
from convdispatch.backend import Candidate, Config
from convdispatch.backends import _pixel_panels
from convdispatch.backends._pixel_panels import PanelKernel
from convdispatch.backends._tile import register_tiles
from convdispatch.problem import Problem

BACKEND = registry.get("implicit_gemm")
WALL = 64


def planes(array: Array) -> Array:
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2))


def run(problem: Problem, case: Case, config: Config, *, pickled: bool = False) -> Array:
    """Convolve between walls: who reads outside the input finds NaN, who writes outside is found; return NHWC."""
    x = np.full(case.x.size + 2 * WALL, np.nan, case.x.dtype)
    x[WALL:-WALL] = planes(case.x).ravel()
    n, oh, ow, k = problem.n, problem.oh, problem.ow, problem.k
    out = np.full(n * k * oh * ow + 2 * WALL, 77, case.x.dtype)
    kernel = BACKEND.prepare(problem, case.w, case.bias, config)
    assert isinstance(kernel, PanelKernel)
    kernel = pickle.loads(pickle.dumps(kernel)) if pickled else kernel
    inside = out[WALL:-WALL].reshape(n, k, oh, ow)
    shaped = x[WALL:-WALL].reshape(n, problem.c, problem.h, problem.w)
    kernel(shaped, inside, None if case.residual is None else planes(case.residual))
    assert (out[:WALL] == 77).all()
    assert (out[-WALL:] == 77).all()
    return inside.transpose(0, 2, 3, 1)


def check(text: str, config: Config) -> None:
    problem = Problem.parse(text)
    case = numbers(problem)
    y = run(problem, case, config)
    verdict = judge(problem, BACKEND.numerics, config, case.x, case.w, y, case.bias, case.residual)
    assert verdict.reason is None, f"{problem} {config}: {verdict.reason}"
    for threads in (1, 2, 5):
        np.testing.assert_array_equal(run(problem, case, Config(config, threads=threads)), y)
    np.testing.assert_array_equal(run(problem, case, config, pickled=True), y)


@given(
    n=st.integers(1, 3),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    channels=st.integers(1, 70),
    filters=st.integers(1, 70),
    tile=st.sampled_from(register_tiles()),
    dtype=st.sampled_from(["", " float64"]),
    then=st.sampled_from(["", " +bias", " +residual", " +bias +residual +relu", " +relu6", " +bias +gelu"]),
)
@settings(max_examples=40, deadline=None)
def test_any_sizes_are_right(
    n: int, shape: tuple[int, int], channels: int, filters: int, tile: tuple[int, int], dtype: str, then: str
) -> None:
    assume(tile[0] <= filters <= shape[0] * shape[1])
    sizes = f"{n}x{channels}x{shape[0]}x{shape[1]} NCHW * 1x1x{channels}x{filters} VALID"
    check(sizes + dtype + then, Config(rows=tile[0], vectors=tile[1], threads=2))


@pytest.mark.parametrize("sizes", ["1x300x40x40 NCHW * 1x1x300x500 VALID +bias", "2x20x100x101 NCHW * 1x1x20x30 VALID"])
def test_many_panels_and_many_ranges_of_filters_are_right(sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pixel_panels, "_FILTERS", 100_000)
    monkeypatch.setattr(_pixel_panels, "_PANEL", 50_000)
    check(sizes, Config(BACKEND.configs(Problem.parse(sizes), "estimate")[0], threads=3))


@pytest.mark.parametrize(
    "text",
    [
        "1x64x56x56 NCHW * 1x1x64x64 VALID stride=2",
        "1x64x56x56 NCHW * 1x1x64x64 pad=1",
        "1x64x56x56 NCHW * 1x1x32x64 VALID",
        "1x64x56x56 NCHW * 1x1x64x64 VALID float16",
        "1x64x7x7 NCHW * 1x1x64x64 VALID",  # more filters than pixels
        "1x56x56x64 * 1x1x64x64 VALID",
        "1x64x56x56 NCHW * 3x3x64x64 SAME",
    ],
)
def test_what_it_is_not_for(text: str) -> None:
    assert not _pixel_panels.suits(Problem.parse(text))


def test_scratch_memory_is_bounded_and_estimates_are_those_of_the_turned_problem() -> None:
    large = Problem.parse("1x3x4096x4096 NCHW * 1x1x3x64 VALID")
    candidate = Candidate(BACKEND, Config(BACKEND.configs(large, "estimate")[0], threads=2))
    assert 0 < candidate.workspace(large) < 1 << 20
    few = Problem.parse("1x32x112x112 NCHW * 1x1x32x16 VALID")
    assert BACKEND.configs(few, "estimate")[0] == BACKEND.configs(_pixel_panels.turned(few), "estimate")[0]
