"""Winograd: exact transforms, right results everywhere it does not refuse, honest claims."""

import pickle
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import walls
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, judge, numbers

from convdispatch import machine
from convdispatch.arguments import Array
from convdispatch.backend import Config
from convdispatch.backends import winograd
from convdispatch.backends._lines import odd_lines
from convdispatch.backends._toomcook import Matrix, amplification, points, strided, transforms
from convdispatch.backends._vector import vector_bytes
from convdispatch.backends.winograd import BLOCK_BYTES, Winograd, _form, _jobs
from convdispatch.backends.winograd import SIZES as ALL_SIZES
from convdispatch.errors import ArgumentError
from convdispatch.memory import CACHE_LINE, aligned
from convdispatch.problem import Problem

WINOGRAD = Winograd()
SIZES = ALL_SIZES[3, 1]
Row = tuple[Fraction, ...]


def draw_arrays(problem: Problem, seed: int = 0) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    x = random.standard_normal(problem.input_shape).astype(problem.dtype)
    w = random.standard_normal(problem.filter_shape).astype(problem.dtype)
    return x, w


def run(problem: Problem, config: Config, x: Array, w: Array) -> Array:
    out = np.full(problem.output_shape, np.nan, problem.dtype)
    WINOGRAD.prepare(problem, w, None, config)(x, out, None)
    return out


def check(problem: Problem, config: Config, seed: int = 0) -> float:
    x, w = draw_arrays(problem, seed)
    verdict = judge(problem, WINOGRAD.numerics, config, x, w, run(problem, config, x, w))
    assert verdict.reason is None, f"{problem}: {verdict.reason}"
    return verdict.excess


def times(matrix: Matrix, vector: Row) -> Row:
    return tuple(sum((a * b for a, b in zip(row, vector, strict=True)), Fraction(0)) for row in matrix)


# The matrices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 4, 6])
@pytest.mark.parametrize("r", [3, 5])
def test_transforms_correlate_exactly(m: int, r: int) -> None:
    random = np.random.default_rng(m * r)
    t = transforms(m, r)
    g, d = (tuple(Fraction(int(a), 7) for a in random.integers(-99, 99, size)) for size in (r, m + r - 1))
    products = tuple(a * b for a, b in zip(times(t.g, g), times(t.bt, d), strict=True))
    direct = tuple(sum((g[s] * d[i + s] for s in range(r)), Fraction(0)) for i in range(m))
    assert times(t.at, products) == direct


def test_f23_is_lavins_up_to_signs() -> None:
    t = transforms(2, 3)
    assert [[abs(x) for x in row] for row in t.bt] == [[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    half = Fraction(1, 2)
    assert [[abs(x) for x in row] for row in t.g] == [[1, 0, 0], [half] * 3, [half] * 3, [0, 0, 1]]


@pytest.mark.parametrize("m", SIZES)
def test_input_and_output_transforms_are_exact_in_float32(m: int) -> None:
    t = transforms(m, 3)
    at, _, bt = t.arrays("float32")
    for array, matrix in ((at, t.at), (bt, t.bt)):
        assert [[Fraction(float(x)) for x in row] for row in array] == [list(row) for row in matrix]


def test_chosen_points_amplify_less_than_the_usual_ones() -> None:
    usual = transforms(4, 3, tuple(map(Fraction, (0, 1, -1, 2, -2))))
    at, g, bt = (np.abs(matrix) for matrix in usual.arrays("float64"))
    forms = np.einsum("ip,ps,pt->ist", at, g, bt)
    assert 3 * amplification(4, 3) ** 2 < np.linalg.norm(forms, 2, axis=(1, 2)).max() ** 2


@pytest.mark.parametrize("wrong", [points(4), points(6), (*points(5)[:4], points(5)[0])])
def test_wrong_points_are_refused(wrong: Row) -> None:
    with pytest.raises(ValueError, match="needs 5 different finite points"):
        transforms(4, 3, wrong)


# Results --------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    low = 1 if groups == 1 else 2
    c, k = (groups * draw(st.integers(start, 9)) for start in (low, 1))
    pads = draw(st.tuples(*[st.integers(0, 7)] * 4))
    taps = draw(st.sampled_from([3, 3, 5]))
    stride = draw(st.sampled_from([1, 1, 2]))
    dilations = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (3, 2)])) if stride == 1 else (1, 1)
    reach = [(taps - 1) * d + 1 for d in dilations]
    sides = zip(reach, (pads[:2], pads[2:]), strict=True)
    h, w = (draw(st.integers(max(1, least - sum(pair)), 14 + least)) for least, pair in sides)
    # Each combination of dtype, taps, stride, and whether there are groups, is a kernel to compile.
    few = taps != 3 or stride == 2 or groups > 1
    n, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(["float32"] if few else ["float32", "float64"]))
    return Problem(
        n=n, h=h, w=w, c=c, k=k, kh=taps, kw=taps, pads=pads, strides=(stride, stride), dilations=dilations,
        groups=groups, dtype=dtype,
    )  # fmt: skip


@examples(50)
@given(problems(), st.data(), st.integers(1, 3), st.integers(0, 99))
def test_any_problem_is_within_the_bound(problem: Problem, data: st.DataObject, threads: int, seed: int) -> None:
    assert WINOGRAD.rejects(problem) is None
    config = data.draw(st.sampled_from(WINOGRAD.configs(problem, "exhaustive")))
    check(problem, Config(config, threads=threads), seed)


@examples(35)
@given(
    st.sampled_from([(1, 7, 6), (9, 1, 4)]), st.tuples(st.integers(1, 3), st.integers(1, 30)),
    st.sampled_from([(1, 1), (1, 1), (2, 3)]), st.tuples(*[st.integers(0, 9)] * 4), st.tuples(st.integers(1, 40),
    st.sampled_from([9, 35])), st.integers(1, 3),  # filters of one vector, and of three: each is to be compiled
)  # fmt: skip
def test_filters_of_one_row_or_column(
    kernel: tuple[int, int, int], size: tuple[int, int], dilations: tuple[int, int], pads: tuple[int, int, int, int],
    channels: tuple[int, int], threads: int,
) -> None:  # fmt: skip
    kh, kw, m = kernel
    across, along = size
    h, w = (across, along + (kw - 1) * dilations[1]) if kh == 1 else (along + (kh - 1) * dilations[0], across)
    c, k = channels
    check(Problem(1, h, w, c, k, kh, kw, pads, (1, 1), dilations), Config(m=m, threads=threads))


def kernels(sizes: list[tuple[int, int, tuple[int, int], int]]) -> list[object]:
    """Return rows and columns of filters, strides and tiles; the first few for every run: each is to be compiled."""
    return [pytest.param(*size, marks=pytest.mark.slow) if i > 4 else size for i, size in enumerate(sizes)]


@pytest.mark.parametrize(("kh", "kw", "strides", "m"), kernels([
    (4, 4, (1, 1), 4), (7, 7, (1, 1), 2), (3, 5, (1, 1), 4), (4, 4, (2, 2), 4), (1, 3, (1, 2), 6),
    (2, 2, (1, 1), 4), (4, 4, (1, 1), 3), (7, 3, (1, 1), 2), (3, 4, (2, 2), 2), (7, 1, (2, 3), 4), (1, 2, (1, 1), 2),
    (1, 4, (5, 2), 6), (5, 1, (2, 1), 6), (1, 4, (1, 1), 6),
]))  # fmt: skip
@examples(12)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 25), st.integers(1, 30)), st.tuples(*[st.integers(0, 5)] * 4),
    st.tuples(st.integers(1, 40), st.integers(1, 16)), st.integers(1, 3),
)  # fmt: skip
def test_other_sides_and_strides(
    kh: int, kw: int, strides: tuple[int, int], m: int, size: tuple[int, int, int], pads: tuple[int, int, int, int],
    channels: tuple[int, int], threads: int,
) -> None:  # fmt: skip
    (n, down, across), (c, k) = size, channels
    problem = Problem(n, down + kh - 1, across + kw - 1, c, k, kh, kw, pads, strides)
    check(problem, Config(m=m, threads=threads))


@pytest.mark.parametrize("text", ["2x5x21x24 * 1x3x8x24 SAME", "2x21x5x24 * 3x1x8x24 SAME"])
@pytest.mark.parametrize("words", ["", "+bias +residual +relu6", "+bias +residual +silu"])
def test_lines_of_groups_with_all_that_comes_after(text: str, words: str) -> None:
    walls.check(WINOGRAD, Problem.parse(f"{text} {words}"), Config(m=4, threads=2))


def test_long_tiles_are_for_few_channels() -> None:
    def sizes(text: str) -> set[int]:
        return {config.integer("m", 0) for config in WINOGRAD.configs(Problem.parse(text), "exhaustive")}

    assert sizes("1x1x99x256 * 1x7x256x8 SAME") == {2, 4, 6}
    assert sizes("1x1x99x257 * 1x7x257x8 SAME") == {2, 4}
    assert sizes("1x99x1x257 * 9x1x257x8 SAME") == {2}
    assert sizes("1x1x99x512 * 1x3x512x8 SAME stride=2") == {4, 6}


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("m", [1, 2, 4, 6])
@pytest.mark.parametrize("r", [2, 3, 5, 7])
def test_strided_transforms_correlate_exactly(m: int, r: int, stride: int) -> None:
    random = np.random.default_rng(m * r)
    t = strided(m, r, stride)
    n = stride * (m - 1) + r
    g, d = (tuple(Fraction(int(a), 7) for a in random.integers(-99, 99, size)) for size in (r, n))
    products = tuple(a * b for a, b in zip(times(t.g, g), times(t.bt, d), strict=True))
    assert len(products) <= n
    direct = tuple(sum((g[s] * d[stride * i + s] for s in range(r)), Fraction(0)) for i in range(m))
    assert times(t.at, products) == direct


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("text", [
    "2x40x37x24 * 3x3x24x200 SAME",  # several blocks, the last one short, tiles of two images in one block
    pytest.param("1x50x50x64 * 3x3x64x64 VALID float64", marks=pytest.mark.slow),
    "1x9x9x32 * 3x3x4x32 SAME_LOWER",  # 8 groups
    pytest.param("1x9x9x64 * 3x3x2x64 SAME_LOWER", marks=pytest.mark.slow),
    "1x9x9x8 * 3x3x4x8 SAME",  # all groups together fill the vector that one of them is padded to
    "1x1x1x300 * 3x3x300x1 SAME",
    "1x200x3x1 * 3x3x1x1 SAME",
])  # fmt: skip
def test_special_cases(text: str, m: int) -> None:
    check(Problem.parse(text), Config(m=m, threads=2))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("text", "m"), [
    ("7x9x7x32 * 3x3x16x32 SAME", 4),  # a job's tiles are of several images, and begin within one
    ("3x29x31x24 * 3x3x3x24 SAME_LOWER +bias", 2),
    ("2x30x90x24 * 5x5x12x24 pad=1,3,0,2 +bias +residual +relu", 4),
    ("2x31x40x48 * 3x3x24x48 SAME stride=2", 4),
])  # fmt: skip
def test_groups_are_copied_image_by_image(text: str, m: int, threads: int) -> None:
    walls.check(WINOGRAD, Problem.parse(text), Config(m=m, threads=threads))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("share", "groups", "rest", "m"), [
    (2, 6, "SAME_LOWER +bias +residual +relu", 4),
    (2, 2, "pad=1,3,0,2 stride=2 +bias +gelu", 2),
    (4, 8, "SAME +bias +residual", 6),
    (2, 3, "SAME +bias", 4),  # one too many: none share
])  # fmt: skip
def test_groups_that_fill_a_vector_share_it(share: int, groups: int, rest: str, m: int, threads: int) -> None:
    each = vector_bytes() // 4 // share
    problem = Problem.parse(f"3x11x14x{groups * each} * 3x3x{each}x{groups * each} {rest}")
    walls.check(WINOGRAD, problem, Config(m=m, threads=threads))


@pytest.mark.parametrize(("count", "k"), [(1, 64), (4, 16), (4, 32), (7, 48), (16, 64), (9, 200)])
def test_small_problems_waste_few_products(count: int, k: int) -> None:
    """So many tiles of 4x4 outputs, and filters."""
    if vector_bytes() < 64:
        pytest.skip("widths that are whole vectors of AVX-512")
    problem = Problem.parse(f"{count}x4x4x32 * 3x3x32x{k} SAME")
    jobs = _jobs(problem, _form(problem, Config(m=4)), 1)
    assert jobs.waste <= {1: 2, 4: 1, 7: 1, 16: 1, 9: 1.3}[count]


@pytest.mark.parametrize(
    ("k", "vectors"), [(80, 5), (78, 5), (240, 3), (400, 5), (112, 1), (128, 4), (16, 1), (160, 2)]
)
def test_filters_are_multiplied_with_by_a_width_that_they_fill(k: int, vectors: int) -> None:
    if vector_bytes() < 64:
        pytest.skip("widths that are whole vectors of AVX-512")
    problem = Problem.parse(f"1x28x28x32 * 3x3x32x{k} SAME")
    assert _jobs(problem, _form(problem, Config(m=4)), 1).vectors == vectors


@pytest.mark.parametrize("threads", [1, 2])
def test_five_vectors_of_filters(threads: int) -> None:
    lanes = vector_bytes() // 4
    for text in (f"2x11x14x20 * 3x3x20x{5 * lanes} SAME +bias +relu", f"1x9x26x7 * 3x3x7x{5 * lanes - 1} SAME"):
        walls.check(WINOGRAD, Problem.parse(text), Config(m=4, threads=threads))


FOLDED = Config(m=4, folded=True)


@pytest.mark.parametrize("text", [
    *(f"1x{side}x{side + 5}x3 * 7x7x3x20 pad=3 stride=2" for side in (1, 2, 7, 8, 15, 16, 17, 40)),
    *(f"1x19x23x{channels} * 7x7x{channels}x9 SAME stride=2" for channels in (1, 2, 4, 5, 7, 8, 13, 16)),
    "2x33x29x3 * 5x5x3x70 SAME stride=2",
    "1x30x27x3 * 4x4x3x20 SAME stride=2",
    "2x70x61x3 * 11x11x3x10 VALID stride=4",
    "2x40x33x5 * 8x8x5x10 pad=0,7,9,2 stride=3",
    pytest.param("1x20x31x3 * 7x7x3x8 VALID stride=2 float64", marks=pytest.mark.slow),
])  # fmt: skip
def test_folded_images(text: str) -> None:
    """Between walls of NaN, which whoever reads outside the input finds."""
    problem = Problem.parse(text)
    x, w = draw_arrays(problem)
    walled = np.full(x.size + 128, np.nan, x.dtype)
    inside = walled[64:-64].reshape(x.shape)
    inside[...] = x
    for threads in (1, 2):
        config = Config(FOLDED, threads=threads)
        verdict = judge(problem, WINOGRAD.numerics, config, x, w, run(problem, config, inside, w))
        assert verdict.reason is None, verdict.reason


def test_a_folded_image_finishes_and_reports_as_others_do() -> None:
    problem = Problem.parse("1x31x20x3 * 7x7x3x20 pad=3 stride=2 +bias +residual +gelu")
    x, w = draw_arrays(problem)
    random = np.random.default_rng(1)
    bias, residual = (random.standard_normal(shape).astype("f4") for shape in ((20,), problem.output_shape))
    out, kernel = np.empty(problem.output_shape, "f4"), WINOGRAD.prepare(problem, w, bias, FOLDED)
    assert kernel(x, out, residual) is False
    assert judge(problem, WINOGRAD.numerics, FOLDED, x, w, out, bias, residual).reason is None
    x[0, 30, 19, 2] = np.inf
    assert kernel(x, out, residual) is True


@pytest.mark.parametrize("m", SIZES)
def test_bound_is_not_silly(m: int) -> None:
    """One tile of the worst proportions, with random signs: observed errors come near the bound."""
    problem = Problem.parse(f"1x{m + 2}x{m + 2}x1 * 3x3x1x1 VALID")
    at, g, bt = (np.abs(matrix) for matrix in transforms(m, 3).arrays("float64"))
    form = max(np.einsum("ip,ps,pt->ist", at, g, bt), key=lambda a: float(np.linalg.norm(a, 2)))
    left, _, right = np.linalg.svd(form)
    worst = 0.0
    for seed in range(300):
        x, w = draw_arrays(problem, seed)
        x *= np.outer(right[0], right[0]).reshape(x.shape).astype("f4")
        w *= np.outer(left[:, 0], left[:, 0]).reshape(w.shape).astype("f4")
        verdict = judge(problem, WINOGRAD.numerics, Config(m=m), x, w, run(problem, Config(m=m), x, w))
        worst = max(worst, verdict.excess)
    assert 1 / 200 < worst <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_sums_that_are_not_finite_are_reported_whatever_the_activation_hides(value: float) -> None:
    problem = Problem.parse("1x9x9x4 * 3x3x4x10 SAME +bias +relu6")
    x, w = draw_arrays(problem)
    out, bias = np.empty(problem.output_shape, "f4"), np.zeros(10, "f4")
    for m in SIZES:
        kernel = WINOGRAD.prepare(problem, w, bias, Config(m=m))
        assert kernel(x, out, None) is False
        spoiled = x.copy()
        spoiled[0, 4, 4, 2] = value
        assert kernel(spoiled, out, None) is True or value == 1e38


def test_whole_numbers_come_out_exact_by_f23() -> None:
    problem = Problem.parse("1x11x11x8 * 3x3x8x8 SAME")
    x, w = (np.round(a * 4) for a in draw_arrays(problem))
    exact = run(problem.replace(dtype="float64"), Config(m=4), x.astype("f8"), w.astype("f8")).round()
    np.testing.assert_array_equal(run(problem, Config(m=2), x, w), exact)


def test_filters_of_any_strides_and_a_read_only_input_are_left_alone() -> None:
    problem = Problem.parse("1x8x9x6 * 3x3x3x4 SAME")
    x, w = draw_arrays(problem)
    x.flags.writeable = False
    odd = np.asfortranarray(w)[::-1]
    before = x.copy(), odd.copy()
    np.testing.assert_array_equal(run(problem, Config(), x, odd), run(problem, Config(), x, odd.copy()))
    np.testing.assert_array_equal(before[0], x)
    np.testing.assert_array_equal(before[1], odd)


@pytest.mark.parametrize(("m", "filters"), [(2, 200), (4, 48), (5, 200), (6, 200)])
def test_threads_and_pickling_change_nothing(m: int, filters: int) -> None:
    problem = Problem.parse(f"2x40x37x24 * 3x3x24x{filters} SAME")
    x, w = draw_arrays(problem)
    one = run(problem, Config(m=m), x, w)
    for threads in (2, 5):
        np.testing.assert_array_equal(run(problem, Config(m=m, threads=threads), x, w), one)
    kernel = pickle.loads(pickle.dumps(WINOGRAD.prepare(problem, w, None, Config(m=m))))
    again = np.empty_like(one)
    kernel(x, again, None)
    np.testing.assert_array_equal(again, one)


@pytest.mark.parametrize(
    "text", ["1x13x15x40 * 3x3x40x70 SAME", "2x9x9x64 * 3x3x8x64 SAME", "1x1x50x24 * 1x3x24x70 SAME"]
)
def test_prefetched_filters_change_nothing(text: str) -> None:
    problem = Problem.parse(text)
    x, w = draw_arrays(problem)
    sent, read = (run(problem, Config(m=4, threads=2, prefetch=prefetch), x, w) for prefetch in (True, False))
    np.testing.assert_array_equal(sent, read)


@pytest.mark.parametrize(
    "text",
    [
        "1x13x15x8 * 3x3x8x32 SAME +bias +relu",
        "2x11x9x16 * 5x5x8x64 SAME +residual",
        "1x13x15x8 * 3x3x4x48 SAME",
        "1x12x12x8 * 3x3x8x72 SAME stride=2 +bias",
        "2x9x9x8 * 3x3x8x32 SAME dilation=2 +gelu",
        "1x1x70x8 * 1x5x8x32 SAME float64",
        "1x20x20x16 * 3x3x4x16 SAME +relu6",
    ],
)
def test_what_is_stored_past_the_caches_is_the_same(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, config = Problem.parse(text), Config(m=4, threads=2)
    kept = walls.check(WINOGRAD, problem, config)
    monkeypatch.setattr(winograd, "_CACHED_OUTPUT", 0.0)
    case, out = numbers(problem), aligned(problem.output_shape, problem.dtype)
    out[...] = np.nan
    WINOGRAD.prepare(problem, case.w, case.bias, config)(case.x, out, case.residual)
    np.testing.assert_array_equal(out, kept)


# Claims ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rooms_taken")
@pytest.mark.parametrize("text", ["1x60x60x32 * 3x3x32x32 SAME", "1x7x7x128 * 3x3x128x64 SAME float64"])
@pytest.mark.parametrize("config", [Config(m=2), Config(m=4, threads=2)])
def test_workspace_is_what_a_call_allocates(text: str, config: Config) -> None:
    problem = Problem.parse(text)
    x, w = draw_arrays(problem)
    out, kernel = np.empty(problem.output_shape, problem.dtype), WINOGRAD.prepare(problem, w, None, config)
    kernel(x, out, None)
    tracemalloc.start()
    try:
        kernel(x, out, None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    most = WINOGRAD.workspace(problem, config)
    slack = 32 << 10  # Python's own objects
    # A thread that comes late may find its jobs done by another, in memory already given back.
    assert most / config.threads - slack < peak < most + slack


@pytest.mark.parametrize("m", SIZES)
def test_workspace_does_not_grow_with_the_image(m: int) -> None:
    problem = Problem.parse("8x2000x2000x64 * 3x3x64x64 SAME")
    assert WINOGRAD.workspace(problem, Config(m=m, threads=2)) < 1.3 * 2 * BLOCK_BYTES


@pytest.mark.parametrize(("text", "reason"), [
    ("1x9x9x4 * 8x8x4x4 SAME", "8x8; it does sides of 2 to 7 taps, and a single row or column of 2 to 11"),
    ("1x9x9x4 * 1x13x4x4 SAME", "1x13; it does"),
    ("1x9x9x4 * 1x1x4x4 SAME", "1x1; it does"),
    ("1x9x9x4 * 3x9x4x4 SAME", "3x9; it does"),
    ("1x9x9x4 * 1x3x4x4 SAME stride=3", "strides"),
    ("1x9x9x4 * 3x3x4x4 SAME stride=2x1", "strides"),
    ("1x9x9x4 * 3x3x4x4 SAME int8", "exact"),
    ("1x9x9x0 * 3x3x0x4 SAME", "no input channels"),
    ("1x9x9x4 * 3x3x1x4 SAME", "one channel a group"),
    ("1x9x9x17 * 8x8x17x4 SAME stride=2", "8x8; it does"),  # folded, there would be 68 channels
    ("1x9x9x4 * 7x7x4x4 SAME stride=2x1", "strides leave out"),
])  # fmt: skip
def test_what_it_cannot_do_has_a_reason(text: str, reason: str) -> None:
    assert reason in (WINOGRAD.rejects(Problem.parse(text)) or "")


@pytest.mark.parametrize("m", [3, "x", "4", True, 4.0])
def test_a_wrong_size_says_what_would_do(m: int | str) -> None:
    problem = Problem.parse("1x9x9x4 * 3x3x4x4 SAME")
    with pytest.raises(ArgumentError, match=r"m=2 or m=4.*got m="):
        WINOGRAD.prepare(problem, draw_arrays(problem)[1], None, Config(m=m))


def test_whether_to_prefetch_filters_is_tried_where_they_are_large() -> None:
    def tried(text: str) -> set[object]:
        return {config.get("prefetch") for config in WINOGRAD.configs(Problem.parse(text), "measure")}

    assert tried("1x56x56x64 * 3x3x64x64 SAME") == {None}
    large = machine.current().caches[2] // 4 // 64 + 64  # bytes of F(2) for a filter of one channel: 64
    channels = int(large**0.5) + 1
    assert tried(f"1x14x14x{channels} * 3x3x{channels}x{channels} SAME") > {None}
    problem = Problem.parse("1x9x9x4 * 3x3x4x4 SAME")
    with pytest.raises(ArgumentError, match="prefetch of winograd must be true or false; got 1"):
        WINOGRAD.prepare(problem, draw_arrays(problem)[1], None, Config(m=4, prefetch=1))


@pytest.mark.parametrize(("text", "config", "words"), [
    ("1x9x9x4 * 3x3x4x4 SAME", FOLDED, "m=6, the side of.*got m=4, folded=True"),
    ("1x9x9x3 * 8x8x3x4 SAME stride=2", Config(m=2), "needs m=4, folded=True, .*got m=2"),
    ("1x9x9x3 * 5x5x3x4 SAME stride=2", Config(m=6), "needs m=2 or m=4 or m=4, folded=True, .*got m=6"),
])  # fmt: skip
def test_a_folding_that_is_none_says_what_would_do(text: str, config: Config, words: str) -> None:
    problem = Problem.parse(text)
    with pytest.raises(ArgumentError, match=words):
        WINOGRAD.prepare(problem, draw_arrays(problem)[1], None, config)


def test_configs_begin_with_the_smaller_estimate() -> None:
    here = machine.current()
    for text, sizes in (("1x56x56x64 * 3x3x64x64 SAME", {2, 4, 6}), ("1x14x14x512 * 3x3x512x512 SAME", {2, 4, 5, 6})):
        problem = Problem.parse(text)
        configs = WINOGRAD.configs(problem, "estimate")
        seconds = [WINOGRAD.estimate(problem, config, here) for config in configs]
        assert {config["m"] for config in configs} == sizes
        assert seconds == sorted(seconds)
        assert 0 < seconds[0] < 1


@given(st.integers(1, 10**6), st.sampled_from([4, 8]))
def test_points_lie_an_odd_number_of_cache_lines_apart(count: int, itemsize: int) -> None:
    values = odd_lines(count, itemsize)
    lines, rest = divmod(values * itemsize, CACHE_LINE)
    assert (lines % 2, rest) == (1, 0)
    assert count <= values < count + 2 * CACHE_LINE // itemsize


def test_a_dilation_far_beyond_the_image_is_left_to_others() -> None:
    far = Problem.parse("1x5x5x3 * 3x3x3x8 SAME dilation=10000")
    assert WINOGRAD.rejects(far) == "dilated so far, it would be pictures without pixels, most of them"
    assert WINOGRAD.rejects(Problem.parse("1x5x5x3 * 3x3x3x8 SAME dilation=5")) is None


@pytest.mark.parametrize(("shape", "by_tiles"), [
    ("14x14x16", True), ("7x7x32", True), ("14x14x512", False), ("7x7x512", False),
])  # fmt: skip
def test_few_tiles_are_shared_out_where_reading_all_filters_takes_less(shape: str, by_tiles: bool) -> None:
    channels = int(shape.rpartition("x")[2])
    problem = Problem.parse(f"1x{shape} * 3x3x{channels}x{channels} SAME")
    jobs = _jobs(problem, _form(problem, Config(m=2 if shape.startswith("7") else 4)), 2)
    assert (jobs.down, jobs.across) == ((2, 1) if by_tiles else (1, 2))
    assert _jobs(problem, _form(problem, Config(m=4)), 1).down == 1
    for threads in (1, 2, 3) if by_tiles else ():
        check(problem, Config(m=4, threads=threads))
