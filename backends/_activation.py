"""Activations of single values, for compiled kernels; they add bias and residual themselves."""

import math
from typing import Any

from numba import types
from numba.extending import overload

from convdispatch.backends._jit import compilable
from convdispatch.epilogue import ACTIVATIONS
from convdispatch.problem import Problem

RELU, RELU6, SILU, GELU, SIGMOID, TANH, HARDSWISH, LEAKY_RELU = range(1, len(ACTIVATIONS) + 1)


def unclamped(problem: Problem) -> int:
    """Return the code of a problem's activation that is more than a clamp, else 0."""
    return problem.epilogue.code if problem.epilogue.code > RELU6 else 0


def activate(v: Any, code: int, slope: float) -> Any:
    """Apply the activation with this ``Epilogue.code`` inside a compiled kernel; NaN stays NaN."""
    raise NotImplementedError


@compilable
def _sigmoid(v: Any) -> Any:
    small = math.exp(-abs(v))  # of a negative number only, so that nothing overflows
    return (1 if v >= 0 else small) / (1 + small)


def _activate_float(v: Any, code: int, slope: float) -> Any:  # noqa: PLR0911  # one line an activation
    if code == 0:
        return v
    if code == RELU:
        return 0.0 if v < 0 else v
    if code == RELU6:
        return 0.0 if v < 0 else (6.0 if v > 6 else v)
    if code == SILU:
        return v * _sigmoid(v)
    if code == GELU:
        return v * ((math.erf(v * math.sqrt(0.5)) + 1) * 0.5)
    if code == SIGMOID:
        return _sigmoid(v)
    if code == TANH:
        return math.tanh(v)
    if code == HARDSWISH:
        return v * (min(max(v + 3, 0), 6) / 6)
    return v * slope if v < 0 else v


def _activate_integer(v: Any, code: int, slope: float) -> Any:  # noqa: ARG001  # one signature for both
    if code != 0 and v < 0:
        return v * 0
    if code == RELU6 and v > 6:
        return v * 0 + 6
    return v


@overload(activate)
def _overload_activate(v: Any, code: int, slope: float) -> Any:  # noqa: ARG001  # Numba matches by name
    return _activate_integer if isinstance(v, types.Integer) else _activate_float
