"""Integers as floats: which of these hold all the sums of a problem exactly, so that they can be made in vectors."""

from convdispatch.backend import item_bytes
from convdispatch.problem import Problem

#: Up to here every whole number is one.
_WHOLE = {"float32": 2**24, "float64": 2**53}
#: From here on, integer results wrap.
_WRAPS = 2**31
#: Those whose products are small enough to be summed.
NARROW = frozenset(("int8", "uint8", "int16", "uint16"))


def largest_sum(problem: Problem) -> int:
    """Return what no sum of a problem's products of integers exceeds, bias and residual included."""
    bits = 8 * item_bytes(problem.dtype)
    largest: int = (1 << bits) - 1 if problem.dtype.startswith("u") else 1 << (bits - 1)
    return problem.taps * largest * largest + (problem.epilogue.bias + problem.epilogue.residual << 31)


def exact_floats(problem: Problem) -> str | None:
    """Return the narrowest float dtype in which a problem's sums of integers are exact, None if there is none.

    An activation sees what has wrapped, so there is none either where sums with an activation may wrap.
    """
    sums = largest_sum(problem)
    if problem.epilogue.activation and sums >= _WRAPS:
        return None
    return next((name for name, limit in _WHOLE.items() if sums <= limit), None)
