"""Activations in vectors: what they are defined as to within some units in the last place, and no value beside them."""

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convdispatch import epilogue
from convdispatch.arguments import Array
from convdispatch.backends import _vector_activation
from convdispatch.backends._machine_code import compiled_address
from convdispatch.epilogue import ACTIVATIONS, Epilogue

#: Worst of what is allowed, in units of float32's epsilon times the value that goes in.
_MOST = 3.0
_EPS = float(np.finfo(np.float32).eps)


def epilogue_of(name: str) -> Epilogue:
    return Epilogue(activation=name, slope=0.1 if name == "leaky_relu" else 0.0)


def applied(values: Array, of: Epilogue) -> Array:
    """Return values with an activation applied, from an odd place in memory on, between others that must not change."""
    function = {4: _vector_activation._float32, 8: _vector_activation._float64}[values.itemsize]
    address = compiled_address(_vector_activation._SIGNATURE, function)
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_double)
    room = np.full(len(values) + 3, 7, values.dtype)
    room[1:-2] = values
    kind(address)(room[1:].ctypes.data, len(values), of.code, of.slope)
    assert (room[[0, -2, -1]] == 7).all()
    return room[1:-2]


def exact(values: Array, of: Epilogue) -> Array:
    with np.errstate(invalid="ignore"):
        return epilogue.activate(values.astype(np.float64), of.activation, of.slope)


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(
    values=st.lists(st.floats(width=32, allow_subnormal=False), max_size=70),
    scale=st.sampled_from([1.0, 1e-3, 1e-20]),
)
def test_activations_are_what_they_are_defined_as(name: str, values: list[float], scale: float) -> None:
    of, given_values = epilogue_of(name), np.array(values, np.float32) * np.float32(scale)
    made, right = applied(given_values, of), exact(given_values, of)
    known = np.isfinite(right)
    np.testing.assert_array_equal(np.isnan(made), np.isnan(right))
    np.testing.assert_array_equal(made[np.isinf(right)], right[np.isinf(right)])
    size = np.abs(given_values[known].astype(np.float64))
    allowed = _MOST * _EPS * (np.ones_like(size) if name == "sigmoid" else size) + float(np.finfo(np.float32).tiny)
    assert (np.abs(made[known] - right[known]) <= allowed).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_they_are_right_all_along_the_range_where_they_bend(name: str) -> None:
    of, values = epilogue_of(name), np.linspace(-14, 14, 200_003, dtype=np.float32)
    off = np.abs(applied(values, of) - exact(values, of))
    size = np.ones_like(off) if name == "sigmoid" else np.abs(values.astype(np.float64))
    assert (off <= _MOST * _EPS * size).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float64_is_done_in_float64(name: str) -> None:
    of, values = epilogue_of(name), np.linspace(-9, 9, 1001)
    np.testing.assert_allclose(applied(values, of), exact(values, of), rtol=0, atol=1e-14)
