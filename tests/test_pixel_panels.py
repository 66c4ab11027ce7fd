"""1x1 filters on NCHW images: right whatever the sizes, nothing outside touched, the same bits by any threads."""

import pytest
import walls
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import examples, numbers

from convdispatch import registry
from convdispatch.backend import Candidate, Config
from convdispatch.backends import _pixel_panels
from convdispatch.backends._pixel_panels import PanelKernel
from convdispatch.backends._register_tiles import register_tiles
from convdispatch.problem import Problem

BACKEND = registry.get("implicit_gemm")


def check(text: str, config: Config) -> None:
    problem = Problem.parse(text)
    case = numbers(problem)
    assert isinstance(BACKEND.prepare(problem, case.w, case.bias, config), PanelKernel)
    walls.check_bits(BACKEND, problem, config, walls.check(BACKEND, problem, config).tobytes())


@given(
    n=st.integers(1, 3),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    channels=st.integers(1, 70),
    filters=st.integers(1, 70),
    tile=st.sampled_from(register_tiles()),
    dtype=st.sampled_from(["", " float64"]),
    then=st.sampled_from(["", " +bias", " +residual", " +bias +residual +relu", " +relu6", " +bias +gelu"]),
)
@examples(30)
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
