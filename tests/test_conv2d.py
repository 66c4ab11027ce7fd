"""``conv2d`` and ``plan`` mean what they say they mean: shapes, values, dtypes, odd arrays, ``out=``."""

import itertools
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import USABLE_DTYPES, Case, cases, from_format, judge, numbers

import convdispatch
from convdispatch import reference, registry
from convdispatch.arguments import Array
from convdispatch.errors import ArgumentError
from convdispatch.plan import _overlaps_itself
from convdispatch.problem import Problem, dtype_of

pytestmark = pytest.mark.usefixtures("few_kernels")

RNG = np.random.default_rng(20)


def by_hand(x: Array, w: Array, stride: int, same: bool) -> Array:
    """Convolve with nothing but loops over single elements, straight from the definition."""
    n, h, width, channels = x.shape
    kh, kw, _, filters = w.shape
    if same:
        oh, ow = -(-h // stride), -(-width // stride)
        top, left = max((oh - 1) * stride + kh - h, 0) // 2, max((ow - 1) * stride + kw - width, 0) // 2
    else:
        oh, ow = -(-(h - kh + 1) // stride), -(-(width - kw + 1) // stride)
        top = left = 0
    y = np.zeros((n, oh, ow, filters))
    for image, row, column, k in np.ndindex(y.shape):
        for i, j, c in np.ndindex(kh, kw, channels):
            r, s = row * stride + i - top, column * stride + j - left
            if 0 <= r < h and 0 <= s < width:
                y[image, row, column, k] += float(x[image, r, s, c]) * float(w[i, j, c, k])
    return y


def normal(*shape: int, dtype: Any = np.float32) -> Array:
    return RNG.standard_normal(shape).astype(dtype)


# The eight cases of the tutorial ----------------------------------------------------------------------------------

TUTORIAL = [
    ((1, 2, 2, 1), (1, 1, 1, 1), 1, "SAME", (1, 2, 2, 1)),
    ((1, 2, 2, 1), (1, 1, 1, 1), 1, "VALID", (1, 2, 2, 1)),
    ((1, 3, 3, 5), (1, 1, 5, 1), 1, "VALID", (1, 3, 3, 1)),
    ((1, 3, 3, 5), (3, 3, 5, 1), 1, "VALID", (1, 1, 1, 1)),
    ((1, 5, 5, 5), (3, 3, 5, 1), 1, "VALID", (1, 3, 3, 1)),
    ((1, 5, 5, 5), (3, 3, 5, 1), 1, "SAME", (1, 5, 5, 1)),
    ((1, 5, 5, 5), (3, 3, 5, 7), 1, "SAME", (1, 5, 5, 7)),
    ((1, 5, 5, 5), (3, 3, 5, 7), [1, 2, 2, 1], "SAME", (1, 3, 3, 7)),
    ((10, 5, 5, 5), (3, 3, 5, 7), [1, 2, 2, 1], "SAME", (10, 3, 3, 7)),
]


@pytest.mark.parametrize("backend", [None, *convdispatch.backends()])
@pytest.mark.parametrize(("image", "kernel", "strides", "padding", "output"), TUTORIAL)
def test_tutorial_case(
    image: tuple[int, ...], kernel: tuple[int, ...], strides: Any, padding: str, output: tuple[int, ...],
    backend: str | None,
) -> None:  # fmt: skip
    x, w = normal(*image), normal(*kernel)
    try:
        y = convdispatch.conv2d(x, w, strides=strides, padding=padding, backend=backend)
    except convdispatch.BackendRejectedError as error:
        pytest.skip(str(error))
    assert y.shape == output
    assert y.dtype == np.float32
    stride = strides if isinstance(strides, int) else strides[1]
    np.testing.assert_allclose(y, by_hand(x, w, stride, padding == "SAME"), rtol=1e-4, atol=1e-4)


def test_tutorial_values_with_ones_count_the_elements_under_the_filter() -> None:
    ones = np.ones((1, 5, 5, 5), np.float32)
    y = convdispatch.conv2d(ones, np.ones((3, 3, 5, 1), np.float32), padding="SAME")[0, :, :, 0]
    assert y[0, 0] == y[0, -1] == y[-1, 0] == y[-1, -1] == 4 * 5
    assert y[0, 2] == 6 * 5
    assert (y[1:-1, 1:-1] == 45).all()


def test_a_1x1_filter_multiplies_every_pixel_by_its_one_value() -> None:
    x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32).reshape(1, 2, 2, 1)
    w = np.full((1, 1, 1, 1), 2.5, np.float32)
    for padding in ("SAME", "SAME_LOWER", "VALID", 0):
        np.testing.assert_array_equal(convdispatch.conv2d(x, w, padding=padding), 2.5 * x)


def test_filters_are_not_flipped() -> None:
    x = np.arange(9, dtype=np.float32).reshape(1, 3, 3, 1)
    w = np.zeros((2, 2, 1, 1), np.float32)
    w[0, 1] = 1
    y = convdispatch.conv2d(x, w, padding="VALID")
    np.testing.assert_array_equal(y[0, :, :, 0], [[1, 2], [4, 5]])


# Shapes and forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "kernel", "stride", "dilation"), [
    (5, 3, 1, 1), (5, 3, 2, 1), (6, 3, 2, 1), (7, 2, 3, 1), (5, 1, 2, 1), (9, 3, 1, 2), (9, 3, 2, 3), (4, 3, 5, 1),
])  # fmt: skip
def test_output_sizes(length: int, kernel: int, stride: int, dilation: int) -> None:
    x, w = normal(1, length, 1, 1), normal(kernel, 1, 1, 1)
    how: dict[str, Any] = {"strides": (stride, 1), "dilations": (dilation, 1)}
    extent = (kernel - 1) * dilation + 1
    for padding in ("SAME", "SAME_LOWER"):
        assert convdispatch.conv2d(x, w, padding=padding, **how).shape[1] == -(-length // stride)
    if extent <= length:
        assert convdispatch.conv2d(x, w, padding="VALID", **how).shape[1] == -(-(length - extent + 1) // stride)
    padded = convdispatch.conv2d(x, w, padding=((2, 3), (0, 0)), **how).shape[1]
    assert padded == (length + 5 - extent) // stride + 1


def test_same_puts_the_odd_zero_last_and_same_lower_first() -> None:
    x = np.array([1.0, 2.0, 3.0], np.float32).reshape(1, 1, 3, 1)
    w = np.array([1.0, 10.0], np.float32).reshape(1, 2, 1, 1)
    np.testing.assert_array_equal(convdispatch.conv2d(x, w, padding="SAME").ravel(), [21, 32, 3])
    np.testing.assert_array_equal(convdispatch.conv2d(x, w, padding="SAME_LOWER").ravel(), [10, 21, 32])


def test_explicit_padding_in_all_its_forms() -> None:
    x, w = normal(1, 6, 7, 2), normal(3, 3, 2, 3)

    def run(padding: Any, **more: Any) -> Array:
        return convdispatch.conv2d(x, w, padding=padding, backend="direct", **more)

    np.testing.assert_array_equal(run(1), run("SAME"))
    np.testing.assert_array_equal(run(0), run("VALID"))
    np.testing.assert_array_equal(run((1, 2)), run(((1, 1), (2, 2))))
    np.testing.assert_array_equal(run([[0, 0], [1, 2], [3, 4], [0, 0]]), run(((1, 2), (3, 4))))
    np.testing.assert_array_equal(run(np.array([[1, 2], [3, 4]])), run(((1, 2), (3, 4))))
    padded = np.pad(x, ((0, 0), (1, 2), (3, 4), (0, 0)))
    np.testing.assert_array_equal(
        run(((1, 2), (3, 4))), convdispatch.conv2d(padded, w, padding="VALID", backend="direct")
    )
    channels_first = convdispatch.conv2d(
        x.transpose(0, 3, 1, 2), w, padding=((0, 0), (0, 0), (1, 2), (3, 4)), data_format="NCHW", backend="direct"
    )
    np.testing.assert_array_equal(channels_first.transpose(0, 2, 3, 1), run(((1, 2), (3, 4))))


def test_an_array_of_no_dimension_is_a_number() -> None:
    x, w = normal(2, 9, 10, 3), normal(3, 2, 3, 4)
    how: dict[str, Any] = {"strides": 2, "dilations": 3, "padding": 3}
    for same in ({key: np.array(value) for key, value in how.items()}, {**how, "padding": [np.array(3), np.array(3)]}):
        np.testing.assert_array_equal(
            convdispatch.conv2d(x, w, **same, backend="direct"), convdispatch.conv2d(x, w, **how, backend="direct")
        )


def test_lists_of_four_stand_in_data_format_order() -> None:
    x, w = normal(2, 9, 10, 3), normal(3, 2, 3, 4)
    expected = convdispatch.conv2d(x, w, strides=(2, 1), dilations=(1, 2), padding="VALID", backend="direct")
    last = convdispatch.conv2d(
        x, w, strides=[1, 2, 1, 1], dilations=(1, 1, 2, 1), padding="VALID", data_format="NHWC", backend="direct"
    )
    first = convdispatch.conv2d(
        x.transpose(0, 3, 1, 2), w, strides=[1, 1, 2, 1], dilations=np.array([1, 1, 1, 2]), padding="VALID",
        data_format="NCHW", backend="direct",
    )  # fmt: skip
    np.testing.assert_array_equal(last, expected)
    np.testing.assert_array_equal(first.transpose(0, 2, 3, 1), expected)


@pytest.mark.parametrize("backend", [None, "direct", "im2col"])
def test_data_formats_and_filter_formats_agree(backend: str | None) -> None:
    x, w = normal(2, 7, 6, 4), normal(3, 2, 2, 6)
    expected = by_hand(x[..., :2], w[..., :3], 1, same=True), by_hand(x[..., 2:], w[..., 3:], 1, same=True)
    wanted = np.concatenate(expected, axis=-1)
    for data_format, filter_format in itertools.product(("NHWC", "NCHW"), ("HWIO", "OIHW")):
        first = data_format == "NCHW"
        y = convdispatch.conv2d(
            np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if first else x,
            np.ascontiguousarray(w.transpose(3, 2, 0, 1)) if filter_format == "OIHW" else w,
            data_format=data_format,
            filter_format=filter_format,
            backend=backend,
        )
        assert y.flags.c_contiguous
        np.testing.assert_allclose(y.transpose(0, 2, 3, 1) if first else y, wanted, rtol=1e-4, atol=1e-5)


def test_groups_are_inferred_from_the_filters_and_may_be_said() -> None:
    x = normal(1, 5, 5, 6)
    for groups in (1, 2, 3, 6):
        w = normal(3, 3, 6 // groups, 6)
        np.testing.assert_array_equal(
            convdispatch.conv2d(x, w, backend="direct"), convdispatch.conv2d(x, w, groups=groups, backend="direct")
        )
    depthwise, multiplied = normal(3, 3, 1, 6), normal(3, 3, 1, 12)
    for w, each in ((depthwise, 1), (multiplied, 2)):
        y = convdispatch.conv2d(x, w)
        for channel in range(6):
            alone = by_hand(x[..., channel : channel + 1], w[..., channel * each : (channel + 1) * each], 1, same=True)
            np.testing.assert_allclose(y[..., channel * each : (channel + 1) * each], alone, rtol=1e-4, atol=1e-5)


# Dtypes -----------------------------------------------------------------------------------------------------------


@given(case=cases())
@settings(max_examples=80)
def test_any_drawn_call_is_within_the_bound_of_the_reference(case: Case) -> None:
    p = case.problem
    y = convdispatch.conv2d(case.input, case.w, residual=case.addend, **case.arguments)
    chosen = convdispatch.plan(
        case.input, case.w, residual=p.epilogue.residual, **case.arguments
    )  # fmt: skip
    candidate = chosen.candidate
    verdict = judge(
        p, candidate.backend.numerics, candidate.config, case.x, case.w, from_format(p, y), case.bias, case.residual
    )
    assert verdict.reason is None or p.is_empty, candidate
    assert y.shape == p.output_shape
    assert chosen(case.input, residual=case.addend).shape == p.output_shape


@pytest.mark.parametrize("dtype", USABLE_DTYPES)
def test_the_result_has_the_promised_dtype(dtype: str) -> None:
    case = numbers(Problem.parse(f"1x5x6x2 * 3x3x2x4 SAME {dtype}"))
    y = convdispatch.conv2d(case.x, case.w)
    wide = {"int8": "int32", "uint8": "int32", "int16": "int32", "uint16": "int32"}
    assert y.dtype == dtype_of(wide.get(dtype, dtype))
    assert y.dtype.isnative


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "int64"])
def test_integers_are_exact_and_wrap_as_numpys_do(dtype: str) -> None:
    about = np.iinfo(dtype)
    wide = np.int64 if dtype == "int64" else np.int32
    x = np.full((1, 4, 4, 70), about.max, dtype)
    x[0, 1, 1] = about.min
    w = np.full((3, 3, 70, 2), about.max, dtype)
    w[..., 1] = about.min
    for backend in ("direct", "im2col", "numba"):
        y = convdispatch.conv2d(x, w, padding="VALID", backend=backend)
        with np.errstate(over="ignore"):
            windows = np.lib.stride_tricks.sliding_window_view(x[0], (3, 3), axis=(0, 1)).astype(wide)
            exact = windows.reshape(2, 2, -1) @ w.transpose(2, 0, 1, 3).reshape(-1, 2).astype(wide)
        np.testing.assert_array_equal(y[0], exact)


@pytest.mark.parametrize("backend", ["direct", "im2col", "numba"])
def test_integer_epilogues_wrap_before_the_activation(backend: str) -> None:
    x = np.array([2**31 - 1, 5, -5], np.int32).reshape(1, 1, 3, 1)
    w = np.ones((1, 1, 1, 1), np.int32)
    y = convdispatch.conv2d(x, w, bias=np.array([2], np.int32), activation="relu", backend=backend)
    assert y.ravel().tolist() == [0, 7, 0]  # 2**31 + 1 is negative in 32 bits
    y = convdispatch.conv2d(x, w, activation="relu6", backend=backend)
    assert y.ravel().tolist() == [6, 5, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("backend", [None, *convdispatch.backends()])
def test_low_precision_sums_in_float32_and_rounds_once(dtype: str, backend: str | None) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    # 256 + 1 + ... + 1 does not get past 256 in bfloat16 steps, nor 2048 in float16's.
    start = {"float16": 2048, "bfloat16": 256}[dtype]
    x = np.ones((1, 3, 3, 8)).astype(dtype_of(dtype))
    x[0, 0, 0, 0] = start
    w = np.ones((3, 3, 8, 1)).astype(dtype_of(dtype))
    y = convdispatch.conv2d(x, w, padding="VALID", backend=backend)
    assert y.dtype == dtype_of(dtype)
    assert y.ravel()[0] == np.float32(start + 71).astype(dtype_of(dtype))


def test_float16_overflows_to_infinity_without_a_warning() -> None:
    x = np.full((1, 2, 2, 2), 60000, np.float16)
    y = convdispatch.conv2d(x, np.ones((1, 1, 2, 1), np.float16))
    assert np.isposinf(y).all()


# Epilogue ---------------------------------------------------------------------------------------------------------


def test_bias_then_residual_then_activation() -> None:
    x, w = normal(2, 5, 5, 3), normal(3, 3, 3, 4)
    bias, residual = normal(4), normal(2, 5, 5, 4)
    sums = by_hand(x, w, 1, same=True)
    how: list[tuple[Any, Callable[[Array], Array]]] = [
        (None, lambda y: y),
        ("relu", lambda y: np.maximum(y, 0)),
        ("relu6", lambda y: np.clip(y, 0, 6)),
        ("silu", lambda y: y / (1 + np.exp(-y))),
        ("sigmoid", lambda y: 1 / (1 + np.exp(-y))),
        ("tanh", np.tanh),
        ("hardswish", lambda y: y * np.clip(y + 3, 0, 6) / 6),
        (("leaky_relu", 0.1), lambda y: np.where(y < 0, 0.1 * y, y)),
    ]
    for activation, function in how:
        y = convdispatch.conv2d(x, w, bias=bias, residual=residual, activation=activation)
        np.testing.assert_allclose(y, function(sums + bias + residual), rtol=1e-4, atol=1e-4)
        y = convdispatch.conv2d(x, w, activation=activation)
        np.testing.assert_allclose(y, function(sums), rtol=1e-4, atol=1e-4)


def test_gelu_is_the_exact_one() -> None:
    x = np.array([-3, -1, 0, 0.5, 2], np.float64).reshape(1, 1, 5, 1)
    y = convdispatch.conv2d(x, np.ones((1, 1, 1, 1)), activation="gelu").ravel()
    # v * Phi(v), with the normal distribution's own table.
    table = np.array([0.0013498980316301, 0.1586552539314571, 0.5, 0.6914624612740131, 0.9772498680518208])
    np.testing.assert_allclose(y, x.ravel() * table, rtol=1e-10)


@pytest.mark.parametrize(
    ("activation", "value", "dtype", "expected"),
    [
        ("hardswish", 1e308, "f8", 1e308),
        ("gelu", 1e308, "f8", 1e308),
        ("silu", -89, "f4", -89 * np.exp(-89.0)),
        ("sigmoid", -95, "f4", np.exp(-95.0)),
        ("sigmoid", 95, "f4", 1.0),
    ],
)
@pytest.mark.parametrize("backend", ["direct", "im2col", "implicit_gemm"])
def test_activations_lose_nothing_at_the_ends(
    activation: str, value: float, dtype: str, expected: float, backend: str
) -> None:
    x = np.full((1, 1, 1, 1), value, dtype)
    y = convdispatch.conv2d(x, np.ones((1, 1, 1, 1), dtype), activation=activation, backend=backend)
    np.testing.assert_allclose(y.ravel(), expected, rtol=1e-5)


# Odd arrays -------------------------------------------------------------------------------------------------------


def misaligned(array: Array) -> Array:
    raw = np.zeros(array.nbytes + 1, np.uint8)[1:]
    view = raw.view(array.dtype).reshape(array.shape)
    view[...] = array
    assert not view.flags.aligned
    return view


def reversed_in_memory(array: Array) -> Array:
    return np.ascontiguousarray(array[::-1, ::-1, ::-1, ::-1])[::-1, ::-1, ::-1, ::-1]


def read_only(array: Array) -> Array:
    array = array.copy()
    array.flags.writeable = False
    return array


def every_second(array: Array) -> Array:
    wide = np.zeros([2 * size for size in array.shape], array.dtype)
    wide[::2, 1::2, ::2, 1::2] = array
    return wide[::2, 1::2, ::2, 1::2]


ODD: dict[str, Callable[[Array], Any]] = {
    "negative strides": reversed_in_memory,
    "Fortran order": np.asfortranarray,
    "read-only": read_only,
    "misaligned": misaligned,
    "byte-swapped": lambda array: array.astype(array.dtype.newbyteorder()),
    "not contiguous": every_second,
    "channels first in memory": lambda array: np.ascontiguousarray(array.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1),
    "a subclass": lambda array: array.view(type("Own", (np.ndarray,), {})),
    "memory-mapped read-only bytes": lambda array: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
}


@pytest.mark.parametrize("form", ODD)
@pytest.mark.parametrize("backend", [None, *convdispatch.backends()])
def test_odd_arrays_give_the_same_result_and_are_left_alone(form: str, backend: str | None) -> None:
    make = ODD[form]
    x, w, bias, residual = normal(2, 6, 7, 4), normal(3, 3, 4, 5), normal(5), normal(2, 6, 7, 5)
    expected = convdispatch.conv2d(x, w, bias=bias, residual=residual, backend=backend)
    odd = make(x), make(w), make(residual)
    kept = [array.tobytes() for array in odd]
    y = convdispatch.conv2d(odd[0], odd[1], bias=bias, residual=odd[2], backend=backend)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)
    assert [array.tobytes() for array in odd] == kept
    assert type(y) is np.ndarray
    assert y.flags.c_contiguous
    assert y.flags.writeable
    assert y.dtype.isnative
    plan = convdispatch.plan(x, w, bias=bias, residual=True, backend=backend)
    np.testing.assert_allclose(plan(odd[0], residual=odd[2]), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", [None, *convdispatch.backends()])
def test_broadcast_arrays_are_read_through_their_zero_strides(backend: str | None) -> None:
    row, tap, level = normal(1, 1, 7, 1), normal(1, 1, 4, 1), normal(1, 1, 1, 5)
    x, w = np.broadcast_to(row, (2, 6, 7, 4)), np.broadcast_to(tap, (3, 3, 4, 5))
    residual = np.broadcast_to(level, (2, 6, 7, 5))
    bias = np.broadcast_to(np.float32(0.5), 5)
    y = convdispatch.conv2d(x, w, bias=bias, residual=residual, backend=backend)
    expected = by_hand(x, w, 1, same=True) + 0.5 + level
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_odd_biases() -> None:
    x, w, bias = normal(1, 4, 4, 2), normal(3, 3, 2, 3), normal(3)
    expected = convdispatch.conv2d(x, w, bias=bias)
    for odd in (bias[::-1].copy()[::-1], bias.astype(">f4"), read_only(bias), misaligned(bias)):
        np.testing.assert_array_equal(convdispatch.conv2d(x, w, bias=odd), expected)


def test_nested_lists_are_arrays_too() -> None:
    x, w = normal(1, 4, 4, 2, dtype=np.float64), normal(3, 3, 2, 3, dtype=np.float64)
    residual = normal(1, 4, 4, 3, dtype=np.float64)
    expected = convdispatch.conv2d(x, w, bias=np.ones(3), residual=residual)
    y = convdispatch.conv2d(x.tolist(), w.tolist(), bias=[1.0, 1.0, 1.0], residual=residual.tolist())
    np.testing.assert_array_equal(y, expected)
    plan = convdispatch.plan(x, w.tolist(), bias=[1.0] * 3, residual=True)  # by another backend, it may be
    expected = plan(x, residual=residual)
    np.testing.assert_array_equal(plan(x.tolist(), residual=residual.tolist()), expected)
    out = np.empty_like(expected)
    assert plan(x.tolist(), residual=residual.tolist(), out=out) is out
    np.testing.assert_array_equal(out, expected)


# out= -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("backend", [None, *convdispatch.backends()])
def test_out_of_any_form_is_filled_and_returned(backend: str | None, data_format: str) -> None:
    x, w = normal(2, 6, 6, 6), normal(3, 3, 6, 6)
    how: dict[str, Any] = {"backend": backend, "data_format": data_format, "activation": "relu"}
    expected = convdispatch.conv2d(x, w, **how)
    shape = expected.shape
    outs = {
        "fresh": np.empty(shape, np.float32),
        "strided": every_second(np.full(shape, 9, np.float32)),
        "Fortran": np.empty(shape, np.float32, order="F"),
        "negative": np.empty(shape, np.float32)[::-1, ::-1, ::-1, ::-1],
        "byte-swapped": np.empty(shape, ">f4" if sys.byteorder == "little" else "<f4"),
        "misaligned": misaligned(np.zeros(shape, np.float32)),
    }
    for name, out in outs.items():
        assert convdispatch.conv2d(x, w, out=out, **how) is out, name
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5, err_msg=name)
    base = outs["strided"].base
    assert isinstance(base, np.ndarray)
    assert not base[1::2].any()
    assert not base[:, ::2].any()


@pytest.mark.parametrize("backend", [None, *convdispatch.backends()])
@pytest.mark.parametrize("shift", [0, 1, 3, 100])
def test_out_may_overlap_the_input_and_the_residual(backend: str | None, shift: int) -> None:
    w = normal(3, 3, 4, 4)
    memory = normal(2 * 6 * 7 * 4 + 100)
    size = 2 * 6 * 7 * 4
    x = memory[:size].reshape(2, 6, 7, 4)
    expected = convdispatch.conv2d(x.copy(), w, residual=x.copy(), backend=backend)
    out = memory[shift : shift + size].reshape(2, 6, 7, 4)
    convdispatch.conv2d(x, w, residual=x, out=out, backend=backend)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [None, *convdispatch.backends()])
def test_out_may_overlap_the_filters_and_the_bias_of_a_call(backend: str | None) -> None:
    x, memory = normal(1, 4, 4, 4), normal(3 * 3 * 4 * 4)
    w, bias = memory.reshape(3, 3, 4, 4), memory[:4]
    expected = convdispatch.conv2d(x, w.copy(), bias=bias.copy(), backend=backend)
    y = convdispatch.conv2d(x, w, bias=bias, out=memory[:64].reshape(1, 4, 4, 4), backend=backend)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@given(
    shape=st.tuples(*[st.integers(1, 3)] * 4),
    strides=st.tuples(*[st.integers(-7, 7)] * 4),
)
def test_whether_an_array_overlaps_itself_is_known(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Some that do not overlap are thought to, where strides interlock; no overlap is overlooked."""
    places = {
        sum(step * at for step, at in zip(strides, index, strict=True))
        for index in itertools.product(*map(range, shape))
    }
    memory = np.zeros(200, np.int8)
    array = np.lib.stride_tricks.as_strided(memory[100:], shape, strides)
    if len(places) < math.prod(shape):
        assert _overlaps_itself(array)


def test_views_of_usual_arrays_do_not_overlap_themselves() -> None:
    for array in (np.zeros((2, 3, 4, 5))[:, ::2, ::-1, 1::2], np.zeros((2, 3, 4, 5)).transpose(2, 0, 3, 1)):
        assert not _overlaps_itself(array)


def test_an_out_that_overlaps_itself_is_refused() -> None:
    out = np.lib.stride_tricks.as_strided(np.zeros((1, 4, 4, 2), np.float32), (3, 4, 4, 2), (0, 32, 8, 4))
    with pytest.raises(ArgumentError, match=r"out must have a place for each of its values; got overlapping strides"):
        convdispatch.conv2d(normal(3, 4, 4, 2), normal(1, 1, 2, 2), out=out)


def test_out_takes_low_precision_and_integer_results() -> None:
    for dtype in ("float16", "int8"):
        case = numbers(Problem.parse(f"1x5x5x2 * 3x3x2x3 SAME {dtype}"))
        expected = convdispatch.conv2d(case.x, case.w)
        out = np.empty(expected.shape, expected.dtype.newbyteorder())
        convdispatch.conv2d(case.x, case.w, out=out)
        np.testing.assert_array_equal(out, expected)


# Nothing at all ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, *convdispatch.backends()])
@pytest.mark.parametrize("image", [(0, 5, 6, 3), (2, 0, 6, 3), (2, 5, 0, 3), (2, 0, 0, 3)])
@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER", "VALID"])
def test_empty_images_and_batches_give_empty_results(backend: str | None, image: tuple[int, ...], padding: str) -> None:
    y = convdispatch.conv2d(np.zeros(image, np.float32), normal(3, 3, 3, 4), padding=padding, backend=backend)
    trim = 2 if padding == "VALID" else 0
    assert y.shape == (image[0], max(0, image[1] - trim), max(0, image[2] - trim), 4)
    assert y.dtype == np.float32


@pytest.mark.parametrize("backend", [None, *convdispatch.backends()])
def test_no_filters_give_an_empty_result(backend: str | None) -> None:
    y = convdispatch.conv2d(normal(2, 5, 6, 3), np.zeros((3, 3, 3, 0), np.float32), backend=backend)
    assert y.shape == (2, 5, 6, 0)


@pytest.mark.parametrize("backend", [None, *convdispatch.backends()])
def test_no_channels_give_zeros_plus_bias(backend: str | None) -> None:
    x, w = np.zeros((2, 5, 6, 0), np.float32), np.zeros((3, 3, 0, 4), np.float32)
    bias, residual = normal(4), normal(2, 5, 6, 4)
    try:
        y = convdispatch.conv2d(x, w, bias=bias, residual=residual, activation="relu", backend=backend)
    except convdispatch.BackendRejectedError as error:
        assert backend is not None
        # a reason is as good as a result, if asked for by name
        assert f"{backend!r} cannot do" in str(error)  # noqa: PT017
        return
    np.testing.assert_array_equal(y, np.maximum(np.broadcast_to(bias, y.shape) + residual, 0))
    np.testing.assert_array_equal(convdispatch.conv2d(x, w, backend=backend), np.zeros((2, 5, 6, 4)))


@pytest.mark.parametrize("backend", [None, *convdispatch.backends()])
def test_an_empty_image_with_padding_is_all_padding(backend: str | None) -> None:
    x, w, bias = np.zeros((1, 0, 2, 3), np.float32), normal(3, 3, 3, 4), normal(4)
    y = convdispatch.conv2d(x, w, padding=((2, 2), (1, 1)), bias=bias, backend=backend)
    assert y.shape == (1, 2, 2, 4)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))


def test_an_empty_problem_makes_a_plan_that_takes_out() -> None:
    plan = convdispatch.plan((0, 5, 5, 3), normal(3, 3, 3, 4))
    out = np.empty((0, 5, 5, 4), np.float32)
    assert plan(np.empty((0, 5, 5, 3), np.float32), out=out) is out
    assert pickle.loads(pickle.dumps(plan))(np.empty((0, 5, 5, 3), np.float32)).shape == (0, 5, 5, 4)


# Plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, *convdispatch.backends()])
def test_a_plan_gives_the_same_bits_from_eight_threads_at_once(backend: str | None) -> None:
    inputs = [normal(2, 17, 19, 8) for _ in range(8)]
    inputs[3][0, 2, 2, 2] = np.nan  # a transform has this one redone, in the middle of the others' work
    plan = convdispatch.plan(inputs[0], normal(3, 3, 8, 8), bias=normal(8), activation="gelu", backend=backend)
    expected = [plan(x).tobytes() for x in inputs]
    wrong: list[str] = []
    start = threading.Barrier(8)

    def work(mine: int) -> None:
        start.wait()
        for _ in range(6):
            try:
                if plan(inputs[mine]).tobytes() != expected[mine]:
                    wrong.append(f"other bits in thread {mine}")
            except Exception as error:  # noqa: BLE001  # told below, by the thread that asserts
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_same_call_gives_the_same_bits() -> None:
    x, w = normal(2, 20, 21, 6), normal(3, 3, 6, 7)
    assert len({convdispatch.conv2d(x, w, activation="silu").tobytes() for _ in range(4)}) == 1


@pytest.mark.parametrize("backend", convdispatch.backends())
def test_a_plan_pickled_here_runs_in_a_process_with_other_string_hashes(backend: str, tmp_path: Path) -> None:
    x, w = normal(1, 9, 9, 4), normal(3, 3, 4, 5)
    plan = convdispatch.plan(x, w, bias=normal(5), activation="relu", backend=backend)
    plan(x)
    (tmp_path / "plan.pickle").write_bytes(pickle.dumps((plan, x)))
    program = (
        "import pickle, sys, pathlib; here = pathlib.Path(sys.argv[1]);"
        "plan, x = pickle.loads((here / 'plan.pickle').read_bytes());"
        "from convdispatch.problem import Problem;"
        "assert hash(plan.problem) == hash(Problem.parse(str(plan.problem)));"
        "assert plan.candidate.config == type(plan.candidate.config)(dict(plan.candidate.config));"
        "assert hash(plan.candidate.config) == hash(type(plan.candidate.config)(dict(plan.candidate.config)));"
        "(here / 'y').write_bytes(plan(x).tobytes())"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path)],
        check=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        timeout=120,
    )
    assert (tmp_path / "y").read_bytes() == plan(x).tobytes()


def test_a_plan_takes_a_shape_or_an_example() -> None:
    x, w = normal(2, 5, 6, 3), normal(3, 3, 3, 4)
    for like in (x, x.shape, list(x.shape), np.array(x.shape), np.zeros_like(x)[::-1]):
        given_shape = tuple(like) if isinstance(like, np.ndarray) and like.ndim == 1 else like
        plan = convdispatch.plan(given_shape, w)
        np.testing.assert_allclose(plan(x), by_hand(x, w, 1, same=True), rtol=1e-4, atol=1e-4)
    assert convdispatch.plan((2, 5, 6, 3), w, dtype="float32").problem.dtype == "float32"


def test_a_plan_says_what_it_is() -> None:
    plan = convdispatch.plan((1, 5, 5, 3), normal(3, 3, 3, 4), backend=("im2col", {"threads": 1}))
    assert "im2col" in repr(plan)
    assert "1x5x5x3 * 3x3x3x4 SAME" in repr(plan)
    assert plan.evidence.source == "forced"
    assert plan.workspace >= 0


@pytest.mark.parametrize("backend", ["im2col", "fft", "direct", "numba"])
def test_results_that_are_not_finite_need_no_warning_from_any_backend(backend: str) -> None:
    x, w = np.full((1, 9, 9, 8), 3e38, np.float32), np.ones((3, 3, 8, 8), np.float32)
    bias = np.full(8, -np.inf, np.float32)
    with np.errstate(all="raise"):
        for activation in (None, ("leaky_relu", 0.0)):
            y = convdispatch.conv2d(x, w, bias=bias, activation=activation, backend=backend)
            assert not np.isfinite(y).any()


# Images that a transform spoiled --------------------------------------------------------------------------------

LOCAL = ("im2col", "implicit_gemm", "numba", "direct")


def _redone(**options: Any) -> str:
    """Hold that winograd makes the right thing of an image with a NaN in a corner; return who redid it."""
    x, w = normal(2, 12, 12, 8), normal(3, 3, 8, 8)
    x[0, 0, 0, 0] = np.nan
    with convdispatch.options(**options):
        plan = convdispatch.plan(x, w, backend="winograd")
        y = plan(x)
    right = reference.convolve(plan.problem, x, w)
    np.testing.assert_allclose(y, right, rtol=1e-3, atol=1e-4)
    assert np.isnan(y).any(axis=-1).sum() == 4
    assert plan._redo is not None
    return str(plan._redo.candidate)


def test_spoiled_images_are_redone_by_our_own_whatever_bears_their_names() -> None:
    def wrong(x: Array, w: Array, problem: Problem) -> Array:
        return np.full((problem.n, problem.oh, problem.ow, problem.k), 42.0, x.dtype)

    for name in LOCAL:
        registry.unregister(name)
    for name in ("im2col", "numba"):
        convdispatch.register(name)(wrong)
    assert _redone().startswith("im2col(block_kib=")


def test_spoiled_images_are_redone_by_who_is_allowed() -> None:
    for count, name in enumerate(LOCAL):
        assert _redone(forbid=LOCAL[:count]).startswith(name)
    assert _redone(forbid=LOCAL).startswith("direct")  # somebody must
    assert _redone(memory_limit="20KiB").startswith("implicit_gemm")


def test_a_low_precision_result_is_rounded_without_a_word_of_how_small_it_is() -> None:
    x, w = np.full((1, 4, 4, 1), 1e-4, np.float16), np.full((1, 1, 1, 1), 1e-3, np.float16)
    with np.errstate(all="raise"):
        for backend in ("implicit_gemm", "direct", "im2col", "fft"):
            assert convdispatch.conv2d(x, w, backend=backend).max() == np.float16(1e-7)
