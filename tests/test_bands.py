"""Layouts and storages: every bit as NumPy converts it, nothing outside touched, and bands that cover an image once."""

import functools
import pickle
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
import walls
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOAT_DTYPES, USABLE_DTYPES, examples, judge, numbers

import convdispatch
from convdispatch import registry
from convdispatch.backend import Config
from convdispatch.backends import _bands
from convdispatch.backends._exact import exact_floats, obstacle
from convdispatch.backends._layout import SAME, STORAGES, stage, unstage
from convdispatch.backends._packed import PackedBackend
from convdispatch.backends._vector import vector_bytes
from convdispatch.backends.implicit_gemm import ImplicitGemm
from convdispatch.problem import Problem, dtype_of

pytestmark = pytest.mark.usefixtures("few_kernels")

DTYPES = [
    name for name in FLOAT_DTYPES if name in USABLE_DTYPES and name in (*_bands.convertible(), "float32", "float64")
]
PACKED = [backend for backend in convdispatch.registry.available().values() if isinstance(backend, PackedBackend)]
WALL = 64


@functools.cache
def copies(dtype: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return ``stage`` and ``unstage`` for a dtype."""
    size = 8 if dtype == "float64" else 4
    lanes, code = vector_bytes() // size, STORAGES.get(dtype, SAME)

    @numba.njit
    def into(source, target, first, rows, shape, planar):  # type: ignore[no-untyped-def]
        stage(source, target, first, rows, shape, planar, lanes, size, code)

    @numba.njit
    def back(source, target, first, rows, shape, planar):  # type: ignore[no-untyped-def]
        unstage(source, target, first, rows, shape, planar, lanes, size, code)

    return into, back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", PACKED, ids=lambda backend: backend.name)
@pytest.mark.parametrize(("channels", "filters"), [(1, (3, 3, 1, 1)), (4, (3, 3, 4, 6)), (4, (3, 3, 1, 4))])
def test_an_image_without_rows_is_all_padding(
    backend: PackedBackend, channels: int, filters: tuple[int, ...], dtype: str
) -> None:
    x, w = np.ones((1, channels, 0, 7), dtype_of(dtype)), np.ones(filters, dtype_of(dtype))
    bias = np.ones(filters[3], "f8" if dtype == "float64" else "f4")
    groups = channels // filters[2]
    y = convdispatch.conv2d(x, w, padding=2, data_format="NCHW", groups=groups, bias=bias, backend=backend.name)
    assert y.shape == (1, filters[3], 2, 9)
    assert (y == 1).all()


shapes = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 40))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planar", [False, True])
@given(shape=shapes, first=st.integers(-6, 12), rows=st.integers(1, 14))
@examples(45)
def test_rows_arrive_as_numpy_would_convert_them(
    dtype: str, planar: bool, shape: tuple[int, int, int], first: int, rows: int
) -> None:
    height, width, channels = shape
    kind, sums = dtype_of(dtype), dtype_of("float64" if dtype == "float64" else "float32")
    image = np.random.default_rng(0).standard_normal(shape).astype(kind)
    source = np.ascontiguousarray(image.transpose(2, 0, 1)) if planar else image
    target = np.full(WALL + rows * width * channels + WALL, 7, sums)
    inner = target[WALL:]
    copies(dtype)[0](source.ctypes.data, inner.ctypes.data, first, rows, shape, planar)
    expected = np.zeros((rows, width, channels), sums)
    for row in range(rows):
        if 0 <= first + row < height:
            expected[row] = image[first + row]
    np.testing.assert_array_equal(inner[:-WALL].reshape(expected.shape), expected)
    assert (target[:WALL] == 7).all()
    assert (target[-WALL:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planar", [False, True])
@given(shape=shapes, data=st.data())
@examples(45)
def test_rows_go_back_rounded_once_and_nothing_else_is_written(
    dtype: str, planar: bool, shape: tuple[int, int, int], data: st.DataObject
) -> None:
    height, width, channels = shape
    first = data.draw(st.integers(0, height - 1))
    rows = data.draw(st.integers(1, height - first))
    kind, sums = dtype_of(dtype), dtype_of("float64" if dtype == "float64" else "float32")
    made = np.random.default_rng(1).standard_normal((rows, width, channels)).astype(sums)
    made.flat[0], made.flat[-1] = np.nan, np.inf
    source = np.concatenate([made.ravel(), np.full(WALL, 5, sums)])
    target = np.full(WALL + height * width * channels + WALL, 7, kind)
    inner = target[WALL:-WALL].reshape((channels, height, width) if planar else shape)
    copies(dtype)[1](source.ctypes.data, inner.ctypes.data, first, rows, shape, planar)
    expected = np.full(shape, 7, kind)
    expected[first : first + rows] = made.astype(kind)
    np.testing.assert_array_equal(inner.transpose(1, 2, 0) if planar else inner, expected)
    assert (target[:WALL] == kind.type(7)).all()
    assert (target[-WALL:] == kind.type(7)).all()


@pytest.mark.parametrize("dtype", [name for name in ("float16", "bfloat16") if name in DTYPES])
def test_all_roundings_to_sixteen_bits_are_numpys(dtype: str) -> None:
    exponents = np.arange(2**16, dtype=np.uint32) << 16
    bits = np.concatenate([exponents + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF, 0x1001)])
    values = bits.astype(np.uint32).view(np.float32)
    target = np.empty(values.size, dtype_of(dtype))
    copies(dtype)[1](values.ctypes.data, target.ctypes.data, 0, 1, (1, values.size, 1), False)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(target.astype("f4"), values.astype(dtype_of(dtype)).astype("f4"))


TEXTS = [
    "2x3x64x40 NCHW * 3x3x3x20 SAME +bias +residual +relu",
    "1x16x90x31 NCHW * 5x5x16x17 pad=3,0,1,2 +silu",
    "1x20x64x64 NCHW * 3x3x20x32 SAME stride=2 +residual",
    "1x32x90x40 NCHW * 3x3x1x32 SAME stride=2x1 +bias",
    "1x32x64x40 NCHW * 3x3x4x32 SAME dilation=2 +relu6",
    "2x1x90x130 NCHW * 7x7x1x3 SAME",
    "1x1x90x130 NCHW * 7x7x1x1 SAME +bias",
    "3x7x7x40 * 1x1x40x9 VALID +residual",
]


@pytest.mark.parametrize(
    "dtype", [pytest.param(name, marks=pytest.mark.slow) if name == "float64" else name for name in DTYPES]
)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("backend", PACKED, ids=lambda backend: backend.name)
def test_banded_and_whole_images_are_right_and_pickle(backend: PackedBackend, text: str, dtype: str) -> None:
    problem = Problem.parse(text).replace(dtype=dtype)
    if backend.rejects(problem):
        return
    case = numbers(problem)
    out = []
    for threads in (1, 2, 5):
        config = Config(backend.configs(problem, "measure")[0], threads=threads)
        kernel = backend.prepare(
            problem, case.w, None if case.bias is None else case.bias.astype(problem.sum_dtype), config
        )
        for one in (kernel, pickle.loads(pickle.dumps(kernel))):
            y = np.zeros(problem.output_shape, dtype_of(dtype))
            one(case.input, y, case.addend)
            out.append(y)
        nhwc = y.transpose(0, 2, 3, 1) if problem.data_format == "NCHW" else y
        found = judge(problem, backend.numerics, config, case.x, case.w, nhwc, case.bias, case.residual)
        assert found.reason is None, f"{config}: {found.reason}"


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16"])
@pytest.mark.parametrize(
    "text",
    [
        "1x90x131x3 * 5x5x1x3 SAME", "2x40x64x4 * 3x3x4x6 SAME stride=2 +relu", "1x4x50x60 NCHW * 3x3x4x9 SAME",
        "1x33x40x3 * 5x5x3x2 SAME +bias +residual", "1x2x3x33 * 1x1x33x17 VALID +relu6",
    ],
)  # fmt: skip
def test_integers_are_exact_as_floats(text: str, dtype: str) -> None:
    """Of their whole range, and all of the largest size; each as ``numba`` sums them."""
    problem = Problem.parse(f"{text} {dtype}")
    about = np.iinfo(dtype)
    case, far = numbers(problem), np.array([about.min if about.min else about.max], dtype)
    extremes = np.broadcast_to(far, case.input.shape).copy(), np.broadcast_to(far, case.w.shape).copy()
    how: dict[str, Any] = {
        "strides": problem.strides, "padding": problem.padding, "data_format": problem.data_format,
        "groups": problem.groups, "activation": problem.epilogue.activation, "bias": case.bias,
        "residual": case.addend,
    }  # fmt: skip
    for x, w in ((case.input, case.w), extremes):
        expected = convdispatch.conv2d(x, w, backend="numba", **how)
        assert expected.dtype == np.int32
        for backend in PACKED:
            if backend.rejects(problem) is None:
                for threads in (1, 3):
                    found = convdispatch.conv2d(x, w, backend=(backend.name, {"threads": threads}), **how)
                    np.testing.assert_array_equal(found, expected, strict=True)


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("1x9x9x1 * 16x16x1x1 SAME uint8", "float32"),
        ("1x9x9x1 * 17x17x1x1 SAME uint8", "float64"),
        ("1x9x9x64 * 4x4x64x1 SAME int8", "float32"),
        ("1x9x9x64 * 4x5x64x1 SAME int8", "float64"),
        ("1x9x9x1 * 1x1x1x1 SAME int8 +bias", "float64"),
        ("1x9x9x1 * 1x1x1x1 SAME uint8 +relu", "float32"),
        ("1x9x9x1 * 1x1x1x1 SAME uint8 +bias +relu", None),  # relu sees what has wrapped
        ("1x9x9x1 * 3x3x1x1 SAME int16", "float64"),
        ("1x9x9x1 * 3x3x1x1 SAME int16 +relu", None),
    ],
)
def test_integers_are_summed_in_floats_that_hold_every_sum(text: str, dtype: str | None) -> None:
    problem = Problem.parse(text)
    assert exact_floats(problem) == dtype
    assert (obstacle(problem) is None) == (dtype is not None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1x9x9x8 * 3x3x8x8 int8 +bias +relu", "do not wrap before an activation"),
        ("1x9x9x8 * 3x3x8x8 int32 +relu", "sums of int32 may not be exact"),
    ],
)
def test_why_integers_are_refused_is_told(text: str, reason: str) -> None:
    assert reason in str(registry.get("implicit_gemm").rejects(Problem.parse(text)))


@given(
    h=st.integers(1, 300), w=st.integers(1, 64), c=st.integers(1, 64), stride=st.integers(1, 3),
    step=st.sampled_from([1, 2, 4, 6]), threads=st.integers(1, 4),
)  # fmt: skip
def test_bands_fit_and_are_enough(h: int, w: int, c: int, stride: int, step: int, threads: int) -> None:
    problem = Problem.parse(f"1x{c}x{h}x{w} NCHW * 3x3x{c}x{c} SAME stride={stride}")
    rows = _bands.band_rows(problem, step, threads)
    if rows is None:
        return
    part = _bands.band(problem, rows)
    assert (part.oh, part.ow) == (rows, problem.ow)
    assert 1 <= rows <= problem.oh
    assert _bands.scratch_bytes(problem, rows) <= _bands._LARGEST_BAND or rows == 1
    assert -(-problem.oh // rows) >= threads


@given(
    w=st.integers(1, 3000), kw=st.integers(1, 9), c=st.integers(1, 40), stride=st.integers(1, 3),
    dilation=st.integers(1, 3), pads=st.tuples(st.integers(0, 9), st.integers(0, 9)), threads=st.integers(1, 3),
    words=st.sampled_from(["", "float16 +relu", "+bias +residual"]),
)  # fmt: skip
def test_lines_are_cut_into_bands(
    w: int, kw: int, c: int, stride: int, dilation: int, pads: tuple[int, int], threads: int, words: str
) -> None:
    w = max(w, (kw - 1) * dilation + 1)
    text = (
        f"2x{c}x1x{w} NCHW * 1x{kw}x{c}x7 pad=0,0,{pads[0]},{pads[1]} stride=2x{stride} dilation=1x{dilation} {words}"
    )
    problem = Problem.parse(text)
    walls.check(ImplicitGemm(), problem, Config(rows=14, vectors=1, threads=threads), 0)


@pytest.mark.parametrize("pads", ["1,0", "0,1"])
def test_a_row_beside_the_image_is_no_line(pads: str) -> None:
    problem = Problem.parse(f"2x5x1x400 NCHW * 1x3x5x7 pad={pads},1,1 stride=2x1 +bias")
    assert problem.oh == 1
    walls.check(ImplicitGemm(), problem, Config(rows=14, vectors=1, threads=2), 0)


def test_a_line_is_cut_where_one_thread_would_convert_it() -> None:
    problem = Problem.parse("1x64x1x9000 NCHW * 1x3x64x64 SAME")
    rows = _bands.band_rows(problem, 4, 2)
    assert rows is not None
    assert -(-9000 // rows) >= 4
    assert (part := _bands.band(problem, rows)).oh == 1
    assert part.ow == rows
