"""int8_dot: exact to the bit, at the ends of the range and of the arrays, and wrapping where sums are too large."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import judge, numbers, problems

from convdispatch.backend import Config
from convdispatch.backends import _dot
from convdispatch.backends.int8_dot import Int8Dot
from convdispatch.errors import ArgumentError
from convdispatch.problem import Problem

DOT = Int8Dot()
needs_vnni = pytest.mark.skipif(not _dot.available(), reason="the processor has no AVX-512 VNNI")


def check(problem: Problem, config: Config, seed: int = 0) -> None:
    case = numbers(problem, seed)
    walled = np.full(case.x.size + 256, 99, np.int8)
    x = walled[128:-128].reshape(case.x.shape)
    x[...] = case.x
    around = np.full(int(np.prod(problem.output_shape)) + 256, 77, np.int32)
    out = around[128:-128].reshape(problem.output_shape)
    DOT.prepare(problem, case.w, None, config)(x, out, None)
    verdict = judge(problem, DOT.numerics, config, case.x, case.w, out)
    assert verdict.reason is None, f"{problem} with {config}: {verdict.reason}"
    assert (around[:128] == 77).all()
    assert (around[-128:] == 77).all()


@needs_vnni
@settings(max_examples=150, deadline=None)
@given(
    problem=problems(dtypes=("int8",), empty=False, plain=True).map(lambda p: p.replace(data_format="NHWC")),
    tile=st.sampled_from([(6, 4), (14, 2), (28, 1), (1, 1)]), threads=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_problem_is_exact(problem: Problem, tile: tuple[int, int], threads: int, seed: int) -> None:
    if DOT.rejects(problem) is None:
        check(problem, Config(rows=tile[0], vectors=tile[1], threads=threads), seed)


@needs_vnni
@pytest.mark.parametrize("value", [-128, 127])
def test_the_ends_of_the_range_and_sums_that_wrap(value: int) -> None:
    x = np.full((1, 9, 9, 64), value, np.int8)
    w = np.full((7, 7, 64, 3), -128, np.int8)
    problem = Problem.parse("1x9x9x64 * 7x7x64x3 VALID int8")
    out = np.empty((1, 3, 3, 3), np.int32)
    DOT.prepare(problem, w, None, Config())(x, out, None)
    assert (out == value * -128 * 7 * 7 * 64).all()
    wide = Problem.parse("1x1x1x200000 * 1x1x200000x1 VALID int8")
    x, w = np.full((1, 1, 1, 200_000), -128, np.int8), np.full((1, 1, 200_000, 1), -128, np.int8)
    one = np.empty((1, 1, 1, 1), np.int32)
    DOT.prepare(wide, w, None, Config())(x, one, None)
    assert one[0, 0, 0, 0] == np.array(2**14 * 200_000).astype(np.int32)


@pytest.mark.parametrize(("text", "words"), [
    ("1x8x8x16 * 3x3x16x16 SAME", "int8 only"),
    ("1x8x8x16 * 3x3x16x16 SAME uint8", "int8 only"),
    ("1x8x8x6 * 3x3x3x16 SAME int8", "fours"),
])  # fmt: skip
def test_what_it_cannot_do_it_says(text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dot, "available", lambda: True)
    problem = Problem.parse(text)
    assert words in (DOT.rejects(problem) or "")
    with pytest.raises(ArgumentError, match=words):
        DOT.prepare(problem, np.ones(problem.filter_shape, problem.dtype), None, Config())


def test_without_the_instructions_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dot, "available", lambda: False)
    assert "VNNI" in (DOT.rejects(Problem.parse("1x8x8x16 * 3x3x16x16 SAME int8")) or "")


@needs_vnni
def test_tiles_that_do_not_fit_are_refused() -> None:
    problem = Problem.parse("1x8x8x16 * 3x3x16x16 SAME int8")
    with pytest.raises(ArgumentError, match="rows x vectors"):
        DOT.prepare(problem, np.ones(problem.filter_shape, np.int8), None, Config(rows=28, vectors=4))
