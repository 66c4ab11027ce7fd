"""Numba's ``njit`` with the settings that every kernel here wants, and array types that fit every array."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types

#: Products may fuse with sums (FMA); nothing that changes what NaN, infinity or signed zero mean.
FASTMATH = {"contract"}


def njit(signature: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function without the GIL, kept on disk where some folder is writable.

    Args:
        signature: compile for these argument types now; without, for each call's types on the first call.
    """
    given: tuple[Any, ...] = () if signature is None else ([signature],)
    njit: Any = numba.njit  # its stubs do not know every form of the arguments

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options = {"nogil": True, "fastmath": FASTMATH, "error_model": "numpy"}
        try:
            compiled: Callable[..., Any] = njit(*given, cache=True, **options)(function)
        except RuntimeError:  # "no locator available": neither the package's folder nor a cache is writable
            compiled = njit(*given, **options)(function)
        return compiled

    return decorate


_compiled: list[Any] = []


def compiled_address(signature: Any, function: Callable[..., Any]) -> int:
    """Compile a function for a signature, and return the address where C finds it, for ever."""
    dispatcher: Any = njit(signature)(function)
    _compiled.append(dispatcher)  # or the code would go
    result = dispatcher.overloads[signature.args]
    address: int = result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)
    return address


@njit()
def hold(array):  # type: ignore[no-untyped-def]
    """Keep an array alive up to this call, where only its address was used since; else it might be freed before."""
    return array.size


def array(dtype: str, ndim: int, *, strided: bool = False, writable: bool = False) -> types.Array:
    """Return the Numba type of an argument, so that one compiled function takes every array of that kind.

    Args:
        dtype: NumPy's name of the dtype.
        ndim: number of dimensions.
        strided: whether any strides will do; C-contiguous arrays only if not.
        writable: whether the function stores into it; read-only arrays are welcome if not.
    """
    return types.Array(numba.from_dtype(np.dtype(dtype)), ndim, "A" if strided else "C", readonly=not writable)


def integers(count: int) -> types.UniTuple:
    """Return the Numba type of a tuple of this many whole numbers."""
    return types.UniTuple(types.int64, count)  # type: ignore[no-untyped-call]
