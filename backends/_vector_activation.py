"""Activations that are no clamps, of float32 values that lie side by side, in vectors; of float64, one by one.

``exp`` is two to the power of a whole number times a polynomial on what is left (Cephes' for float32, by S. Moshier;
argument reduction after Cody and Waite), ``tanh`` of small values his polynomial, too. The Gaussian error function's
complement is ``exp(-z^2) t Q(t)`` with ``t = 1 / (1 + p z)``, as in Abramowitz and Stegun's 7.1.26; our Q has degree 8,
fitted to within 5e-10. All results are within some units in the last place, NaN stays NaN, and infinity times zero is
NaN, as in the definitions.

The function is compiled once for all kernels, which call it by a symbol's name.
"""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from convdispatch.backends._activation import (
    GELU,
    HARDSWISH,
    LEAKY_RELU,
    RELU,
    RELU6,
    SIGMOID,
    SILU,
    TANH,
    activate,
)
from convdispatch.backends._arguments import array_at
from convdispatch.backends._atomics import stack
from convdispatch.backends._jit import compilable, inlined
from convdispatch.backends._machine_code import compiled_address
from convdispatch.backends._tuples import load_apart, save_apart
from convdispatch.backends._vector import (
    I32,
    I64,
    Codegen,
    Vector,
    broadcast,
    copy,
    fused_multiply_add,
    intrinsic,
    parts_of,
    vector_bytes,
)

#: Down to here, exp is more than 0: its results are denormal from -87.3 on.
_LOWEST = -103.9
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
#: Added to a float32 it leaves the nearest whole number in the lowest bits; these are its own.
_ROUNDER, _ROUNDER_BITS = 12582912.0, 0x4B400000
_EXP = (1.0, 1.0, 5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4)
#: Of tanh(x) / x - 1, over x^2, by powers of x^2; for values less than this.
_TANH = (-3.33332819422e-1, 1.33314422036e-1, -5.37397155531e-2, 2.06390887954e-2, -5.70498872745e-3)
_SMALL = 0.625
_P = 0.45
_Q = (
    2.538078722e-01, 2.560902414e-01, 2.059551950e-01, 2.897607414e-01, -2.242610442e-01, 6.228615548e-01,
    -6.237793653e-01, 2.608793862e-01, -4.131458124e-02,
)  # fmt: skip


class _Floats:
    """Instructions on vectors of float32, where whole numbers are as vectors of them."""

    def __init__(self, b: Any, vector: Vector) -> None:
        self.b, self.vector = b, vector
        self.integers = ir.VectorType(I32, vector.lanes)

    def constant(self, value: Any) -> Any:
        return ir.Constant(self.vector.ir, [value] * self.vector.lanes) if isinstance(value, float) else value

    def whole(self, value: int) -> Any:
        return ir.Constant(self.integers, [value] * self.vector.lanes)

    def plus(self, x: Any, y: Any) -> Any:
        return self.b.fadd(self.constant(x), self.constant(y))

    def times(self, x: Any, y: Any) -> Any:
        return self.b.fmul(self.constant(x), self.constant(y))

    def over(self, x: Any, y: Any) -> Any:
        return self.b.fdiv(self.constant(x), self.constant(y))

    def times_plus(self, x: Any, y: Any, z: Any) -> Any:
        return fused_multiply_add(self.b, self.constant(x), self.constant(y), self.constant(z), self.vector)

    def polynomial(self, x: Any, coefficients: tuple[float, ...]) -> Any:
        *others, value = map(self.constant, coefficients)
        for coefficient in reversed(others):
            value = self.times_plus(value, x, coefficient)
        return value

    def where(self, x: Any, sign: str, y: float, yes: Any, no: Any) -> Any:
        """Return ``yes`` where a comparison holds, ``no`` where it does not, as with NaN."""
        return self.b.select(self.b.fcmp_ordered(sign, x, self.constant(y)), self.constant(yes), self.constant(no))

    def bits(self, x: Any) -> Any:
        return self.b.bitcast(x, self.integers)

    def floats(self, bits: Any) -> Any:
        return self.b.bitcast(bits, self.vector.ir)

    def magnitude(self, x: Any) -> Any:
        return self.floats(self.b.and_(self.bits(x), self.whole(0x7FFFFFFF)))

    def with_sign_of(self, magnitude: Any, x: Any) -> Any:
        return self.floats(self.b.or_(self.bits(magnitude), self.b.and_(self.bits(x), self.whole(-0x80000000))))

    def exp(self, x: Any) -> Any:
        """Return the exponential of values that are not positive."""
        held = self.where(x, "<", _LOWEST, _LOWEST, x)
        shifted = self.times_plus(held, _LOG2_E, _ROUNDER)
        count = self.plus(shifted, -_ROUNDER)
        rest = self.times_plus(count, -_LN2_LOW, self.times_plus(count, -_LN2_HIGH, held))
        # What counts is in the lowest bits. It becomes an exponent, in two steps, since it may be too low for one.
        whole = self.b.sub(self.bits(shifted), self.whole(_ROUNDER_BITS))
        half = self.b.ashr(whole, self.whole(1))
        value = self.polynomial(rest, _EXP)
        for power in (half, self.b.sub(whole, half)):
            bits = self.b.shl(self.b.add(power, self.whole(127)), self.whole(23))
            value = self.times(value, self.floats(bits))
        return self.where(x, "<", _LOWEST, 0.0, value)

    def sigmoid(self, x: Any) -> Any:
        small = self.exp(self.times(self.magnitude(x), -1.0))
        return self.over(self.where(x, ">=", 0.0, 1.0, small), self.plus(small, 1.0))

    def tanh(self, x: Any) -> Any:
        size, square = self.magnitude(x), self.times(x, x)
        near = self.times_plus(self.times(self.polynomial(square, _TANH), square), size, size)
        small = self.exp(self.times(size, -2.0))
        far = self.times_plus(self.over(small, self.plus(small, 1.0)), -2.0, 1.0)
        return self.with_sign_of(self.where(size, "<", _SMALL, near, far), x)

    def normal_probability(self, x: Any) -> Any:
        """Return twice how probable values up to x are under the normal distribution."""
        z = self.times(self.magnitude(x), 0.5**0.5)
        t = self.over(1.0, self.times_plus(z, _P, 1.0))
        beyond = self.times(self.times(self.polynomial(t, _Q), t), self.exp(self.times(self.times(z, z), -1.0)))
        return self.where(x, ">=", 0.0, self.plus(self.times(beyond, -1.0), 2.0), beyond)

    def activated(self, x: Any, code: int, slope: Any) -> Any:  # noqa: PLR0911  # one line an activation
        if code == RELU:
            return self.where(x, "<", 0.0, 0.0, x)
        if code == RELU6:
            return self.where(x, "<", 0.0, 0.0, self.where(x, ">", 6.0, 6.0, x))
        if code == SILU:
            return self.times(x, self.sigmoid(x))
        if code == GELU:
            return self.times(x, self.times(self.normal_probability(x), 0.5))
        if code == SIGMOID:
            return self.sigmoid(x)
        if code == TANH:
            return self.tanh(x)
        if code == HARDSWISH:
            shifted = self.plus(x, 3.0)
            held = self.where(shifted, "<", 0.0, 0.0, self.where(shifted, ">", 6.0, 6.0, shifted))
            return self.times(x, self.times(held, 1 / 6))
        return self.where(x, "<", 0.0, self.times(x, slope), x)


@intrinsic
def activated(typing: Any, tile: Any, code: Any, slope: Any) -> tuple[Any, Codegen]:
    """Return a tile of float32 with the activation of a literal code applied."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        floats = _Floats(b, tile.dtype)
        slopes = broadcast(b, b.fptrunc(arguments[2], ir.FloatType()), tile.dtype.lanes)
        values = [floats.activated(x, code.literal_value, slopes) for x in parts_of(b, arguments[0], len(tile))]
        return context.make_tuple(b, signature.return_type, values)

    return tile(tile, code, slope), codegen


#: Lanes of a vector here, and words of memory that hold one.
_LANES = vector_bytes() // 4
_WORDS = _LANES // 2


@inlined
def _apply(address, count, code, slope):  # type: ignore[no-untyped-def]
    """Apply the activation of a literal code."""
    at, whole = address, count // _LANES
    for _ in range(whole):
        save_apart(at, 0, activated(load_apart(at, 0, 1, _LANES, 4), code, slope))
        at += 4 * _LANES
    rest = count - whole * _LANES
    if rest:
        room = stack(_WORDS)
        copy(room, at, 4 * rest)
        save_apart(room, 0, activated(load_apart(room, 0, 1, _LANES, 4), code, slope))
        copy(at, room, 4 * rest)


def _float32(address, count, code, slope):  # type: ignore[no-untyped-def]
    if code == RELU:
        _apply(address, count, RELU, slope)
    elif code == RELU6:
        _apply(address, count, RELU6, slope)
    elif code == SILU:
        _apply(address, count, SILU, slope)
    elif code == GELU:
        _apply(address, count, GELU, slope)
    elif code == SIGMOID:
        _apply(address, count, SIGMOID, slope)
    elif code == TANH:
        _apply(address, count, TANH, slope)
    elif code == HARDSWISH:
        _apply(address, count, HARDSWISH, slope)
    elif code == LEAKY_RELU:
        _apply(address, count, LEAKY_RELU, slope)
    return 1


def _float64(address, count, code, slope):  # type: ignore[no-untyped-def]
    values = array_at(address, (count,), 8)
    for i in range(count):
        values[i] = activate(values[i], code, slope)
    return 1


#: By the bytes of a value: the name by which kernels call the function.
_NAMES = {4: "convdispatch_activate_float32", 8: "convdispatch_activate_float64"}
_SIGNATURE = types.int64(types.int64, types.int64, types.int64, types.float64)
for _itemsize, _function in ((4, _float32), (8, _float64)):
    llvm.add_symbol(_NAMES[_itemsize], compiled_address(_SIGNATURE, _function))


@intrinsic
def activate_all(
    typing: Any, address: Any, count: Any, code: Any, slope: Any, itemsize: Any
) -> tuple[Any, Codegen]:  # fmt: skip
    """Apply the activation with this ``Epilogue.code`` to so many values that lie side by side, clamps included."""
    kind = ir.FunctionType(I64, [I64, I64, I64, ir.DoubleType()])

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        function = cgutils.get_or_insert_function(b.module, kind, _NAMES[itemsize.literal_value])  # type: ignore[no-untyped-call]
        b.call(function, list(arguments[:4]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float64, itemsize), codegen


@compilable
def activate_pixels(at, steps, counts, values, code, slope, itemsize):  # type: ignore[no-untyped-def]
    """Do as ``activate_all`` does for so many values of each pixel of some rows and columns, ``steps`` bytes apart."""
    for i in range(counts[0]):
        for j in range(counts[1]):
            activate_all(at + i * steps[0] + j * steps[1], values, code, slope, itemsize)
