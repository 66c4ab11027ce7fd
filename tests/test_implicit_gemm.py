"""What is special to ``implicit_gemm``: tiles, remainders, tables of addresses, and other machines' vectors."""

import dataclasses
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import walls
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import judge, numbers

from convdispatch import registry
from convdispatch.backend import Config
from convdispatch.backends import _caches, _indirect, implicit_gemm
from convdispatch.backends._register_tiles import few_tiles, narrow_tiles, odd_tiles, pair_tiles, register_tiles
from convdispatch.backends._vector import registers, vector_bytes
from convdispatch.backends.implicit_gemm import ImplicitGemm
from convdispatch.errors import ArgumentError
from convdispatch.machine import current
from convdispatch.memory import aligned
from convdispatch.problem import Problem
from convdispatch.tuning.gate import Trial

GEMM = ImplicitGemm()
SPECIAL = (
    "1x5x5x3 * 3x3x3x5 SAME",  # fewer filters than lanes
    "1x6x7x3 * 7x7x3x64 pad=3 stride=2",  # windows larger than the image
    "2x9x9x8 * 3x3x8x70 SAME",  # filters that fill a block and a bit, tiles across images
    "1x7x7x600 * 3x3x600x80 SAME",  # filters larger than a cache: the other order of loops
    "1x12x10x64 * 3x3x16x128 SAME dilation=2",  # groups as wide as a vector
    "1x12x10x24 * 3x3x4x36 SAME stride=2x1",  # groups narrower than one
    "1x40x40x16 * 1x1x16x64 VALID",
    "2x11x9x48 * 1x1x12x80 VALID",  # groups that are read where they lie
    "1x19x30x24 * 1x1x8x24 pad=1,0,2,3 stride=2",
    "1x3x28x8 * 3x41x8x20 SAME",  # tiles with taps beside the image
    "1x1x30x24 * 1x40x8x24 pad=0,0,50,61 stride=1x2",
    "1x2x28x8 * 1x3x8x16 SAME dilation=1x20",
    "1x11x13x8 * 3x3x8x20 SAME dilation=7",
    "2x5x4x6 * 5x5x6x16 pad=9,8,7,9",  # some pixels have no tap inside
    pytest.param("1x11x9x5 * 2x5x5x7 pad=0,1,2,4 float64", marks=pytest.mark.slow),
)


def check(problem: Problem, config: Config) -> None:
    arrays = Trial.random(problem)
    out = np.full(problem.output_shape, np.nan, problem.dtype)
    kernel = GEMM.prepare(problem, arrays.filters, arrays.bias, config)
    kernel(arrays.input, out, arrays.residual)
    verdict = judge(problem, GEMM.numerics, config, arrays.input, arrays.filters, out, arrays.bias, arrays.residual)
    assert verdict.reason is None, f"{problem} {config}: {verdict.reason}"


@pytest.mark.parametrize("tile", register_tiles(), ids=str)
@pytest.mark.parametrize("text", SPECIAL)
def test_every_tile_does_every_remainder(text: str, tile: tuple[int, int]) -> None:
    for threads in (1, 3):
        check(Problem.parse(text), Config(rows=tile[0], vectors=tile[1], threads=threads))


NARROW = [pytest.param(tile, marks=pytest.mark.slow) if tile[1] == 5 else tile for tile in narrow_tiles()]


@pytest.mark.parametrize("tile", NARROW, ids=str)
@pytest.mark.parametrize("text", SPECIAL)
def test_so_does_every_tile_of_half_vectors(text: str, tile: tuple[int, int]) -> None:
    problem = Problem.parse(text)
    half = vector_bytes() // np.dtype(problem.dtype).itemsize // 2
    for threads in (1, 3):
        check(problem, Config(rows=tile[0], vectors=tile[1], lanes=half, threads=threads))


@pytest.mark.parametrize("text", [
    "1x1x1x40 * 1x1x40x150 VALID +bias +gelu", "2x1x1x33 * 1x1x33x20 VALID +residual", "1x3x3x8 * 3x3x8x70 VALID +relu",
    "1x1x1x6 * 3x3x6x9 SAME", "2x1x1x48 * 1x1x16x48 VALID +bias", "1x1x1x40 * 1x1x40x150 VALID float64",
])  # fmt: skip
def test_few_pixels_have_tiles_of_their_own(text: str) -> None:
    problem = Problem.parse(text)
    pixels = problem.n * problem.oh * problem.ow
    configs = GEMM.configs(problem, "exhaustive")
    few = [config for config in configs if config.integer("rows", 0) == pixels]
    assert few
    assert {(pixels, config.integer("vectors", 0)) for config in few} <= set(few_tiles(pixels))
    assert problem.group_k < vector_bytes() // 4 * 2 or configs[0] in few
    for config in few:
        for threads in (1, 3):
            check(problem, Config(config, threads=threads))


@pytest.mark.parametrize(
    ("wide", "vectors"), [(5, [5]), (25, [5]), (7, [7]), (35, [5, 7]), (10, []), (15, []), (11, [])]
)
def test_filters_that_leave_vectors_of_other_tiles_empty_have_tiles_of_their_own(wide: int, vectors: list[int]) -> None:
    if registers() == 16:
        vectors = [count for count in vectors if count == 5]
    assert [tile[1] for tile in odd_tiles(wide)] == vectors
    problem = Problem.parse(f"1x28x28x8 * 1x1x8x{wide * vector_bytes() // 4 - 3} VALID")
    offered = {config.integer("vectors", 0) for config in GEMM.configs(problem, "exhaustive")}
    assert offered & {5, 7} == set(vectors)


@pytest.mark.parametrize("text", [
    "1x7x9x5 * 3x3x5x{} SAME +bias +residual +relu", "2x11x13x12 * 1x1x6x{} VALID",
    "1x13x6x8 * 3x3x8x{} SAME stride=2 +bias",
])  # fmt: skip
def test_those_do_every_remainder(text: str) -> None:
    for rows, vectors in (odd for wide in (5, 7) for odd in odd_tiles(wide)):
        filters = 2 * (vectors * vector_bytes() // 4 - 1)  # two groups, or more than one block
        for threads in (1, 3):
            check(Problem.parse(text.format(filters)), Config(rows=rows, vectors=vectors, threads=threads))


PAIRS = pytest.mark.skipif(not pair_tiles(), reason="pairs of pixels take more than 16 registers")


@PAIRS
@pytest.mark.parametrize("text", [
    "1x28x28x7 * 1x1x7x{k} VALID +bias +residual +relu",
    "2x5x{w}x5 * 3x3x5x{k} SAME +bias +gelu",  # an activation after they are stored
    "1x9x{w2}x8 * 3x5x8x{k} SAME stride=1x2 +residual",
    "2x7x{w}x6 * 3x4x6x{k} pad=1,0,5,4 dilation=2x3 +bias",
    "1x8x{w}x3 * 7x7x3x{k} SAME",  # a small image, copied with zeros around it
    pytest.param("1x6x{w}x5 * 3x3x5x{k} SAME +bias float64", marks=pytest.mark.slow),
])  # fmt: skip
def test_pairs_of_pixels_fill_vectors_together(text: str) -> None:
    lanes = vector_bytes() // (8 if "float64" in text else 4)
    for rows, vectors in pair_tiles():
        wide = -(-24 // (2 * rows)) * 2 * rows - 2  # tiles that overlap by a pair
        problem = Problem.parse(text.format(k=vectors * lanes // 2, w=wide, w2=2 * wide - 1))
        for threads in (1, 3):
            walls.check(GEMM, problem, Config(rows=rows, vectors=vectors, pixels=2, threads=threads))


@PAIRS
def test_pairs_are_offered_where_they_fill_vectors_and_lines() -> None:
    lanes = vector_bytes() // 4

    def offered(image: str, filters: int) -> set[int]:
        problem = Problem.parse(f"1x{image}x16 * 3x3x16x{filters} SAME")
        return {c.integer("vectors", 0) for c in GEMM.configs(problem, "exhaustive") if "pixels" in c}

    assert offered("28x28", 3 * lanes // 2) == {3}
    assert offered("8x24", 5 * lanes // 2) == {5}
    assert not offered("28x28", 2 * lanes)
    assert not offered("28x28", 3 * lanes // 2 - 1)
    assert not offered("28x27", 3 * lanes // 2)


@PAIRS
@pytest.mark.parametrize(("text", "offered"), [
    ("2x9x28x12 * 1x1x12x{} VALID +residual +relu bfloat16", True),
    ("3x12x28x28 * 3x3x12x{} SAME +bias NCHW", True),
    ("1x28x27x12 * 1x1x12x{} VALID bfloat16", False),  # a band may have an odd number of pixels
    ("1x1x3000x12 * 1x1x12x{} VALID bfloat16", False),
])  # fmt: skip
def test_what_is_converted_by_bands_has_pairs_in_each(text: str, offered: bool) -> None:
    problem = Problem.parse(text.format(3 * vector_bytes() // 4 // 2))
    configs = [config for config in GEMM.configs(problem, "exhaustive") if "pixels" in config]
    assert bool(configs) == offered
    for config in configs:
        for threads in (1, 2, 3):
            walls.check(GEMM, problem, Config(config, threads=threads))


@pytest.mark.parametrize("config", [
    Config(pixels=3), Config(pixels=0), Config(pixels=2, rows=8, vectors=2),
    Config(pixels=2, rows=7, vectors=3, lanes=vector_bytes() // 8),
])  # fmt: skip
def test_pairs_that_do_not_fit_are_refused(config: Config) -> None:
    problem = Problem.parse("1x28x28x8 * 3x3x8x64 SAME")
    arrays = Trial.random(problem)
    with pytest.raises(ArgumentError, match="pixels of implicit_gemm must be 1, or 2 for tiles"):
        GEMM.prepare(problem, arrays.filters, arrays.bias, config)


def test_more_pixels_have_none() -> None:
    for text in ("3x1x1x64 * 1x1x64x64 VALID", "1x2x2x64 * 3x3x64x64 SAME"):
        assert min(config.integer("rows", 0) for config in GEMM.configs(Problem.parse(text), "exhaustive")) >= 4


@pytest.mark.skipif(not narrow_tiles(), reason="half vectors are for AVX-512")
def test_half_vectors_are_for_filters_that_fit_them_better() -> None:
    def narrow(text: str) -> set[tuple[int, int]]:
        configs = GEMM.configs(Problem.parse(text), "exhaustive")
        return {(c.integer("vectors", 0), c.integer("lanes", 0)) for c in configs if "lanes" in c}

    assert narrow("1x14x14x64 * 1x1x64x24 VALID") == {(3, 8)}
    assert narrow("1x14x14x64 * 3x3x64x40 SAME") == {(5, 8)}
    assert narrow("1x14x14x64 * 3x3x8x64 SAME") == {(1, 8)}  # groups of 8
    assert narrow("1x14x14x64 * 1x1x64x12 VALID float64") == {(3, 4)}
    for filters in (16, 25, 32, 48, 56, 96):
        assert not narrow(f"1x14x14x64 * 1x1x64x{filters} VALID")
    assert not narrow("1x64x7x7 * 1x1x64x24 VALID NCHW")  # where pixels lie in vectors


@given(
    size=st.integers(1, 60), taps=st.integers(1, 30), stride=st.integers(1, 3), dilation=st.integers(1, 4),
    pads=st.tuples(st.integers(0, 50), st.integers(0, 50)), run=st.integers(1, 14),
)  # fmt: skip
def test_estimates_know_the_taps_that_are_left_out(
    size: int, taps: int, stride: int, dilation: int, pads: tuple[int, int], run: int
) -> None:
    size = max(size, (taps - 1) * dilation + 1 - sum(pads))
    problem = Problem(1, 1, size, 1, 1, 1, taps, (0, 0, *pads), (1, stride), (1, dilation))
    run = min(run, problem.ow)
    starts = [min(at, problem.ow - run) * stride - pads[0] for at in range(0, problem.ow, run)]
    met = [
        any(0 <= start + o * stride + j * dilation < size for o in range(run)) for start in starts for j in range(taps)
    ]
    told = implicit_gemm._met_along(problem, 1, run)
    # Between the first pixel's last tap and the last pixel's first, none is left out, be there a pixel for it or not.
    assert sum(met) / len(met) <= told + 1e-9
    assert told <= 1
    if stride == 1 == dilation:
        assert told == pytest.approx(sum(met) / len(met))


@pytest.mark.parametrize("lanes", [0, 3, 64])
def test_vectors_have_as_many_lanes_as_there_are(lanes: int) -> None:
    with pytest.raises(ArgumentError, match=f"lanes of implicit_gemm must be .*; got {lanes}"):
        GEMM.workspace(Problem.parse(SPECIAL[0]), Config(lanes=lanes))


@pytest.mark.parametrize(
    "text",
    [
        "1x7x9x520 * 3x3x520x300 SAME +relu",
        "2x6x5x300 * 5x3x300x300 pad=1,2,0,1 stride=1x2 dilation=1x2 +bias +residual +gelu",
        "1x3x13x512 * 3x3x256x512 SAME groups=2 +bias",
        "1x7x9x300 * 3x3x300x300 SAME float64 +residual",
    ],
)
def test_filters_that_come_from_afar_are_taken_by_parts(text: str) -> None:
    problem = Problem.parse(text)
    assert math.prod(problem.filter_shape) * np.dtype(problem.dtype).itemsize > _indirect.FAR
    for rows, vectors in register_tiles()[:2]:
        assert not implicit_gemm._is_in_line(problem, rows)
        check(problem, Config(rows=rows, vectors=vectors, threads=1))


@given(
    columns=st.integers(6, 31), rows=st.integers(1, 4), kh=st.integers(1, 3), kw=st.integers(1, 4),
    groups=st.sampled_from([1, 1, 2]), strides=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 3)), pads=st.tuples(*4 * [st.integers(0, 5)]),
    words=st.sampled_from(["", "+bias", "+bias +residual +gelu", "+relu6"]), threads=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_lines_of_any_window_are_right(
    columns: int, rows: int, kh: int, kw: int, groups: int, strides: tuple[int, int], dilations: tuple[int, int],
    pads: tuple[int, int, int, int], words: str, threads: int,
) -> None:  # fmt: skip
    height, width = rows + (kh - 1) * dilations[0], columns + (kw - 1) * dilations[1]
    problem = Problem(
        2, height, width, 3 * groups, 7 * groups, kh, kw, pads, strides, dilations, groups,
        epilogue=Problem.parse(f"1x1x1x1 * 1x1x1x1 VALID {words}").epilogue,
    )  # fmt: skip
    rows_of_tile, vectors = min(register_tiles(), key=lambda tile: (tile[1], tile[0]))
    check(problem, Config(rows=rows_of_tile, vectors=vectors, threads=threads))


@pytest.mark.parametrize("offset", [0, 4], ids=["aligned", "not aligned"])
@pytest.mark.parametrize(
    ("backend", "text"),
    [
        ("implicit_gemm", "1x20x24x5 * 1x1x5x64 VALID +bias +relu"),
        ("implicit_gemm", "1x9x7x5 * 3x3x5x96 SAME"),
        ("implicit_gemm", "1x9x24x5 * 3x3x5x72 SAME"),  # whose last block is not whole
        ("image_rows", "1x20x192x1 * 3x3x1x1 SAME +bias"),
        ("image_rows", "1x20x200x1 * 3x3x1x1 SAME +residual"),
        ("separable", "1x20x200x1 * 9x9x1x1 SAME separable +residual"),
    ],
)
def test_what_goes_past_the_caches_arrives(
    backend: str, text: str, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = dataclasses.replace(current(), caches=(0, 0, 0))
    monkeypatch.setattr(_caches, "current", lambda: here)  # nothing fits in no cache
    problem, one = Problem.parse(text), registry.get(backend)
    arrays = Trial.random(problem)
    for config in one.configs(problem, "exhaustive"):
        kernel = one.prepare(problem, arrays.filters, arrays.bias, Config(config, threads=2))
        room = aligned((math.prod(problem.output_shape) + 16,), problem.dtype)
        out = room[offset : offset + math.prod(problem.output_shape)].reshape(problem.output_shape)
        kernel(arrays.input, out, arrays.residual)
        verdict = judge(problem, one.numerics, config, arrays.input, arrays.filters, out, arrays.bias, arrays.residual)
        assert verdict.reason is None, f"{problem} {config}: {verdict.reason}"
        assert not room[:offset].any()
        assert not room[offset + out.size :].any()


@pytest.mark.parametrize("epilogue", ["+bias", "+residual", "+bias +residual +relu", "+relu6", "+bias +gelu"])
@pytest.mark.parametrize("k", [64, 37])
def test_epilogues_are_applied_in_registers_and_in_the_remainder(epilogue: str, k: int) -> None:
    check(Problem.parse(f"1x9x9x8 * 3x3x8x{k} SAME {epilogue}"), Config())


def test_threads_and_pickling_change_no_bit() -> None:
    problem = Problem.parse("2x20x20x32 * 3x3x32x96 SAME")
    arrays = Trial.random(problem)
    one, other = (np.empty(problem.output_shape, "f4") for _ in range(2))
    GEMM.prepare(problem, arrays.filters, None, Config())(arrays.input, one, None)
    kernel = GEMM.prepare(problem, arrays.filters, None, Config(threads=4))
    pickle.loads(pickle.dumps(kernel))(arrays.input, other, None)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("text", [
    "1x49x10x1 * 10x4x1x64 SAME stride=2",  # filters larger than the image, but of a single block
    "1x8x8x16 * 3x3x16x16 SAME",
    "1x1x1x480 * 1x1x480x512 VALID",  # a single tile
])  # fmt: skip
def test_small_layers_have_work_for_every_thread(text: str) -> None:
    problem = Problem.parse(text)
    for rows, vectors in register_tiles():
        blocks = -(-problem.k * 4 // (vectors * vector_bytes()))
        tiles = -(-problem.oh * problem.ow // rows)
        assert len(implicit_gemm._jobs(problem, rows, blocks, 2)) >= min(2, max(tiles, blocks))


def test_few_sums_are_for_a_single_vector_of_filters() -> None:
    lanes = vector_bytes() // 4
    for k in (lanes, 2 * lanes, 64 * lanes):
        configs = GEMM.configs(Problem.parse(f"1x28x28x64 * 1x1x64x{k} VALID"), "exhaustive")
        assert configs
        assert k == lanes or all(c.integer("rows") * c.integer("vectors") >= 8 for c in configs)


@pytest.mark.parametrize(("channels", "crowded"), [(1024, True), (1008, False), (512, False)])
def test_estimates_know_when_pixels_want_the_same_places_of_l1(channels: int, crowded: bool) -> None:
    """Those that lie 4 KiB apart do, and others fewer of them."""
    rows, vectors = max(register_tiles())
    problem = Problem.parse(f"1x28x28x{channels} * 1x1x{channels}x256 VALID")
    config, ways = Config(rows=rows, vectors=vectors, threads=1), -(-rows // 2)
    tight, roomy = (
        dataclasses.replace(current(), caches=(4096 * places, *current().caches[1:])) for places in (ways, 2 * rows)
    )
    assert (GEMM.estimate(problem, config, tight) > GEMM.estimate(problem, config, roomy)) == crowded


@pytest.mark.parametrize("tile", [(0, 4), (6, 0), (16, 4), (29, 1)])
def test_a_tile_that_registers_cannot_hold_is_refused(tile: tuple[int, int]) -> None:
    problem = Problem.parse("1x9x9x8 * 3x3x8x64 SAME")
    with pytest.raises(ArgumentError, match=f"rows x vectors.*got {tile[0]}x{tile[1]}"):
        GEMM.prepare(problem, np.ones(problem.filter_shape, "f4"), None, Config(rows=tile[0], vectors=tile[1]))


_ELSEWHERE = """
from convdispatch import registry
from convdispatch.backends import _whole
from convdispatch.backend import Config
from convdispatch.backends._vector import vector_bytes
from convdispatch.problem import Problem
from convdispatch.tuning.gate import Trial
from convdispatch.backend import Candidate

optimise = _whole._Whole._optimize_final_module


def watched(self):
    optimise(self)  # Numba makes floats of addresses where some have signs and some have none
    assert "fptosi double" not in str(self._final_module), self._name


_whole._Whole._optimize_final_module = watched
assert vector_bytes() == {width}, vector_bytes()
for name, text in {problems!r}:
    problem, backend = Problem.parse(text), registry.get(name)
    config = Config(backend.configs(problem, "measure")[0], threads=2)
    candidate, arrays = Candidate(backend, config), Trial.random(problem)
    verdict = arrays.judge(candidate, arrays.plan(candidate)(arrays.input))
    assert verdict.reason is None, (text, name, config, verdict.reason)
print("right")
"""


#: A problem of each kind of kernel; of fast_fir, whose steps are those of image_rows and winograd, none.
_EACH_KERNEL = [
    ("implicit_gemm", "1x9x9x20 * 3x3x20x24 SAME +bias +relu"),
    ("winograd", "1x9x9x20 * 3x3x20x24 SAME"),
    ("winograd_rows", "1x9x19x3 * 3x3x3x16 SAME +bias +relu"),
    ("inner_product", "1x9x20x20 * 3x3x20x3 SAME +bias +relu"),
    ("inner_product", "1x9x20x16 * 3x3x16x1 SAME"),
    ("depthwise", "1x12x12x8 * 3x3x1x8 SAME"),
    ("image_rows", "1x20x40x1 * 5x5x1x1 SAME"),
    ("separable", "1x20x40x1 * 9x9x1x1 SAME separable"),
    ("pointwise", "1x7x9x3 * 1x1x3x2 VALID +bias"),
]
_THEIR_VARIANTS = [
    ("winograd", "1x9x9x16 * 3x3x2x16 SAME +bias"),  # groups that share a vector
    ("image_rows", "1x20x40x1 * 5x5x1x1 SAME uint8"),
    ("image_rows", "1x3x20x40 NCHW * 5x5x3x2 SAME"),
    ("image_rows", "1x40x80x3 * 10x5x1x3 SAME stride=2"),
]


@pytest.mark.parametrize(
    ("cpu", "features", "width"),
    [("haswell", "+avx,+avx2,+fma", 32), ("nehalem", "", 16)],
    ids=["avx2", "portable"],
)
@pytest.mark.parametrize("problems", [_EACH_KERNEL, pytest.param(_THEIR_VARIANTS, marks=pytest.mark.slow)])
def test_code_for_other_machines_is_right_too(
    cpu: str, features: str, width: int, problems: list[tuple[str, str]], tmp_path: Path
) -> None:
    """The same kernels, compiled for narrower vectors than this machine's; and no address is computed in floats."""
    if "x86" not in os.uname().machine or vector_bytes() <= width:
        pytest.skip("needs an x86 machine with wider vectors; all other tests are of its own")
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    code = _ELSEWHERE.format(width=width, problems=problems)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.stdout.strip() == "right", done.stderr


@pytest.mark.parametrize("rest", ["64x80 VALID +bias +relu", "20x64 VALID +silu"])
def test_what_comes_from_memory_and_goes_there(rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Input prefetched and outputs streamed past the caches: the same to the last bit."""
    shape, *more = rest.split()
    problem = Problem.parse(f"3x9x11x{shape.split('x')[0]} * 1x1x{shape} {' '.join(more)}")
    case, config = numbers(problem), Config(rows=6, vectors=1, threads=2)
    expected = walls.run(GEMM, case, config)
    monkeypatch.setattr(implicit_gemm, "_CACHED_TRAFFIC", (0.0, 0.0))
    monkeypatch.setattr(implicit_gemm, "should_stream", lambda *_: problem.k % 16 == 0)
    assert implicit_gemm._prefetched(problem, 6) == -(-6 * problem.c * 4 // 64)
    out = aligned(problem.output_shape, "float32")
    GEMM.prepare(problem, case.w, case.bias, config)(case.x, out, None)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(walls.run(GEMM, case, config), expected)  # an output that begins anywhere
