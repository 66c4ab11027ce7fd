"""What is done to a convolution's sums before they are stored: bias, residual, activation, in this order."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convdispatch.errors import ArgumentError, ArgumentTypeError, shown

Array = NDArray[Any]

#: Activations by name; the order is the code that compiled kernels switch on, 0 being none.
ACTIVATIONS = ("relu", "relu6", "silu", "gelu", "sigmoid", "tanh", "hardswish", "leaky_relu")
#: Those that map integers to integers.
INTEGER_ACTIVATIONS = ("relu", "relu6")
_LEAKY = re.compile(r"leaky_relu\((.+)\)")


@dataclass(frozen=True)
class Epilogue:
    """The last step of a convolution.

    Attributes:
        bias: whether ``[K]`` values are added to the sums.
        residual: whether an array of the output's shape is added next.
        activation: name of the function applied last, or None.
        slope: the factor below zero of ``leaky_relu``; 0 for every other activation.
    """

    bias: bool = False
    residual: bool = False
    activation: str | None = None
    slope: float = 0.0

    def __bool__(self) -> bool:
        return self.bias or self.residual or self.activation is not None

    @property
    def code(self) -> int:
        """The activation as a small number: 0 for none, else its place in ``ACTIVATIONS`` plus one."""
        return 0 if self.activation is None else ACTIVATIONS.index(self.activation) + 1

    def __str__(self) -> str:
        words = ["+bias"] * self.bias + ["+residual"] * self.residual
        if self.activation == "leaky_relu":
            words.append(f"+leaky_relu({self.slope!r})")
        elif self.activation is not None:
            words.append(f"+{self.activation}")
        return " ".join(words)


def parse_activation(value: Any) -> tuple[str | None, float]:
    """Return an activation's name and slope from ``conv2d``'s argument or from its canonical text.

    Args:
        value: None, a name, ``("leaky_relu", slope)`` or ``"leaky_relu(slope)"``.

    Raises:
        ArgumentTypeError: not a name or pair at all.
        ArgumentError: an unknown name, or a slope that is missing or not finite.
    """
    if value is None:
        return None, 0.0
    name, slope = value, None
    if isinstance(value, tuple | list) and len(value) == 2:
        name, slope = value
    if not isinstance(name, str):
        raise ArgumentTypeError(f"activation must be a name or ('leaky_relu', slope); got {shown(value)}")
    if match := _LEAKY.fullmatch(name):
        if slope is not None:
            raise ArgumentError(f"activation must not have its slope twice; got {shown(value)}")
        name, slope = "leaky_relu", match[1]
    if name not in ACTIVATIONS:
        raise ArgumentError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {shown(name)}")
    if name != "leaky_relu":
        if slope is not None:
            raise ArgumentError(f"activation {name!r} takes no slope; got {shown(value)}")
        return name, 0.0
    try:
        number = float(slope)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ArgumentError(f"activation 'leaky_relu' needs a finite slope: ('leaky_relu', 0.01); got {shown(value)}")
    return name, number


def _sigmoid(y: Array) -> Array:
    # exp of a negative number only, so that nothing overflows.
    small = np.exp(-np.abs(y))
    result: Array = np.where(y >= 0, 1, small) / (1 + small)
    return result


def _gelu(y: Array) -> Array:
    from scipy.special import erf  # noqa: PLC0415  # scipy is loaded only where it is used

    result: Array = y * ((erf(y * math.sqrt(0.5)) + 1) * 0.5)
    return result


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda y: np.maximum(y, 0),
    "relu6": lambda y: np.clip(y, 0, 6),
    "silu": lambda y: y * _sigmoid(y),
    "gelu": _gelu,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "hardswish": lambda y: y * (np.clip(y + 3, 0, 6) / 6),
}


def activate(y: Array, activation: str | None, slope: float = 0.0) -> Array:
    """Apply an activation to an array of any shape, in its own dtype; NaN stays NaN."""
    if activation is None:
        return y
    with np.errstate(all="ignore"):  # infinities are the caller's; they need no warning here
        if activation == "leaky_relu":
            return np.where(y < 0, y * y.dtype.type(slope), y)
        return _FUNCTIONS[activation](y).astype(y.dtype, copy=False)


#: Elements finished at a time: small enough that the passes over one block stay in the L2 cache.
_BLOCK = 1 << 16


def finish(out: Array, epilogue: Epilogue, bias: Array | None, residual: Array | None) -> None:
    """Apply an epilogue in place to sums that a kernel has stored.

    Args:
        out: ``[N, OH, OW, K]``, any strides.
        epilogue: what to apply.
        bias: ``[K]``, present if the epilogue says so.
        residual: of ``out``'s shape, present if the epilogue says so.
    """
    rows = max(1, _BLOCK // max(1, out.shape[2] * out.shape[3]))
    wide = max(1, _BLOCK // max(1, out.shape[3]))
    places = itertools.product(range(out.shape[0]), range(0, out.shape[1], rows), range(0, out.shape[2], wide))
    with np.errstate(all="ignore"):
        for n, top, left in places:
            part = out[n, top : top + rows, left : left + wide]
            if bias is not None:
                part += bias
            if residual is not None:
                part += residual[n, top : top + rows, left : left + wide]
            if epilogue.activation is not None:
                part[...] = activate(part, epilogue.activation, epilogue.slope)
