"""The same problems through PyTorch, which was written by others."""

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from strategies import FLOAT_DTYPES, Case, cases, from_format

import convdispatch
from convdispatch import reference
from convdispatch.arguments import Array
from convdispatch.problem import Problem

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it deprecates in itself is not ours to see to
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch==2.13.0")


def by_torch(problem: Problem, x: Array, w: Array, bias: Array | None) -> Array:
    """Return PyTorch's sums ``[N, OH, OW, K]`` in float64 from NHWC and HWIO arrays."""
    p = problem
    top, bottom, left, right = p.pads
    image = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)).astype(np.float64))
    padded = torch.nn.functional.pad(image, (left, right, top, bottom))
    weights = torch.from_numpy(np.ascontiguousarray(w.transpose(3, 2, 0, 1)).astype(np.float64))
    y = torch.nn.functional.conv2d(
        padded,
        weights,
        None if bias is None else torch.from_numpy(bias.astype(np.float64)),
        stride=p.strides,
        dilation=p.dilations,
        groups=p.groups,
    )
    result: Array = y.numpy().transpose(0, 2, 3, 1)
    return result


@given(case=cases(dtypes=FLOAT_DTYPES, empty=False, plain=True))
@settings(max_examples=100)
def test_the_reference_agrees_with_torch(case: Case) -> None:
    expected = by_torch(case.problem, case.x, case.w, None)
    assert expected.shape == (case.problem.n, case.problem.oh, case.problem.ow, case.problem.k)
    np.testing.assert_allclose(reference.convolve(case.problem, case.x, case.w), expected, rtol=1e-12, atol=1e-11)


@given(case=cases(dtypes=FLOAT_DTYPES, empty=False, plain=True))
@settings(max_examples=60)
def test_conv2d_agrees_with_torch(case: Case) -> None:
    tolerance = 1e-3 if case.problem.dtype == "float32" else 1e-10
    y = from_format(case.problem, convdispatch.conv2d(case.input, case.w, **case.arguments))
    np.testing.assert_allclose(y, by_torch(case.problem, case.x, case.w, None), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", convdispatch.backends())
@pytest.mark.parametrize(
    "text",
    [
        "2x12x11x6 * 3x3x6x8 SAME",
        "1x13x12x6 * 3x3x6x8 VALID",
        "1x12x13x6 * 3x3x2x9 pad=0,2,1,3",
        "2x15x14x4 * 5x3x4x6 SAME stride=2",
        "1x17x18x3 * 3x3x3x4 VALID dilation=2x3",
        "2x12x12x8 * 3x3x1x8 SAME",
        "2x12x12x4 * 3x3x1x12 SAME_LOWER stride=2",
        "1x9x9x16 * 1x1x16x24 VALID",
        "1x40x41x1 * 11x9x1x3 SAME",
    ],
)
def test_every_backend_agrees_with_torch(backend: str, text: str) -> None:
    problem = Problem.parse(text)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((problem.n, problem.h, problem.w, problem.c)).astype(np.float32)
    w, bias = rng.standard_normal(problem.filter_shape).astype(np.float32), rng.standard_normal(problem.k)
    how: dict[str, Any] = {
        "strides": problem.strides, "dilations": problem.dilations, "padding": (problem.pads[:2], problem.pads[2:]),
    }  # fmt: skip
    expected = by_torch(problem, x, w, bias.astype(np.float32))
    try:
        y = convdispatch.conv2d(x, w, bias=bias.astype(np.float32), backend=backend, **how)
    except convdispatch.BackendRejectedError as error:
        pytest.skip(str(error))
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)


def test_same_padding_is_torchs_where_both_have_it() -> None:
    rng = np.random.default_rng(6)
    x, w = rng.standard_normal((1, 8, 9, 3)), rng.standard_normal((3, 5, 3, 4))
    image, weights = (np.ascontiguousarray(array) for array in (x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1)))
    y = torch.nn.functional.conv2d(torch.from_numpy(image), torch.from_numpy(weights), padding="same").numpy()
    ours = convdispatch.conv2d(image, weights, padding="SAME", data_format="NCHW", filter_format="OIHW")
    np.testing.assert_allclose(ours, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", "relu"),
        ("relu6", "relu6"),
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("sigmoid", "sigmoid"),
        ("tanh", "tanh"),
        ("hardswish", "hardswish"),
        (("leaky_relu", 0.2), "leaky_relu"),
    ],
)
def test_activations_are_torchs(activation: Any, function: str) -> None:
    x = np.linspace(-12, 12, 97).reshape(1, 1, 97, 1)
    ours = convdispatch.conv2d(x, np.ones((1, 1, 1, 1)), activation=activation)
    more = (0.2,) if function == "leaky_relu" else ()
    theirs = getattr(torch.nn.functional, function)(torch.from_numpy(x), *more).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)
