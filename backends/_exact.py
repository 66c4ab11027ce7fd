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

    An activation sees what has wrapped, so there is none either where sums with an activation may wrap: with a bias or
    a residual, either of which may have any value of 32 bits, they may.
    """
    sums = largest_sum(problem)
    if problem.epilogue.activation and sums >= _WRAPS:
        return None
    return next((name for name, limit in _WHOLE.items() if sums <= limit), None)


def obstacle(problem: Problem) -> str | None:
    """Return why sums of a problem's integers cannot be made in vectors of floats, or None."""
    if problem.dtype in NARROW and exact_floats(problem):
        return None
    if problem.dtype in NARROW and largest_sum(problem) <= max(_WHOLE.values()):
        return "its vectors hold floats, which do not wrap before an activation as sums in int32 may"
    return f"its vectors hold floats, in which sums of {problem.dtype} may not be exact"
