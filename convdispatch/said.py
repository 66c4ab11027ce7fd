"""What somebody's backend says, as plain values.

Profiles are written in plain values, and refuse what is no measurement. So NumPy's scalars become Python's here, and
what cannot be written, or would not be read again, is an error of the candidate that it is of.
"""

import math
import operator
from typing import Any

import numpy as np

from convdispatch.errors import ArgumentError, ArgumentTypeError, BackendError, shown

#: What a config maps names to.
Value = int | float | str | bool
#: Numbers beyond are larger than any kernel takes, or any memory holds.
LARGEST = 2**63 - 1
#: Estimates beyond are no times of a call: the backend cannot tell.
_SHORTEST, _LONGEST = 1e-12, 1e12


def whole_number(value: Any) -> int | None:
    """Return a whole number, NumPy's too, as Python's; None for what is none, a truth value among them."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _number(value: Any) -> float | None:
    """Return a number, NumPy's too, as Python's; None for what is none, infinity where it is too large."""
    if isinstance(value, str | bytes | bytearray | bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
    except OverflowError:
        return math.inf


def plain_value(key: Any, value: Any) -> Value:
    """Return a config's value as a plain one that a profile can hold."""
    if type(key) is str and key.isascii() and (type(value) is bool or (type(value) is int and abs(value) <= LARGEST)):
        return value  # as nearly all are
    if not isinstance(key, str) or not _is_text(key):
        raise ArgumentTypeError(f"config must map names to plain values; got the name {shown(key)}")
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, str):
        if not _is_text(value):
            raise ArgumentError(f"config {key:.60} must be a text that can be written; got {shown(value)}")
        return str(value)
    if (whole := whole_number(value)) is not None:
        if abs(whole) > LARGEST:
            raise ArgumentError(f"config {key:.60} is a larger number than any kernel takes")
        return whole
    number = _number(value)
    if number is None:
        raise ArgumentTypeError(f"config must map names to plain values; got {shown(value)} for {key:.60}")
    if math.isnan(number):
        raise ArgumentError(f"config {key:.60} must be a number; got {number}")
    return number


def _is_text(value: str) -> bool:
    """Return whether a text has no half letters, which no file can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def bytes_said(backend: str, value: Any) -> int:
    """Return what a backend says of its workspace, as bytes."""
    count = value if type(value) is int else whole_number(value)
    if count is None and (number := _number(value)) is not None and math.isfinite(number):
        count = math.ceil(number)
    if count is None or not 0 <= count <= LARGEST:
        raise BackendError(
            f"backend {backend!r} says that its workspace is {shown(value)}; it must be bytes, 0 or more"
        )
    return count


def seconds_said(backend: str, value: Any) -> float | None:
    """Return what a backend estimates, as seconds; None for what is no time of a call."""
    if value is None:
        return None
    seconds = value if type(value) is float else _number(value)
    if seconds is None:
        raise BackendError(f"backend {backend!r} estimates {shown(value)}; it must be seconds, or None")
    return seconds if _SHORTEST <= seconds <= _LONGEST else None


def reason_said(value: Any) -> str | None:
    """Return what a backend says against a problem, in words; None if nothing."""
    if not value:
        return None
    return value if isinstance(value, str) else f"it gives no reason but {shown(value)}"
