"""Numba's ``njit`` with the settings that every kernel here wants, and array types that fit every array."""

import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types

from convdispatch import epilogue

#: Products may fuse with sums (FMA); nothing that changes what NaN, infinity or signed zero mean.
FASTMATH = {"contract"}
#: How Numba is to compile all functions here.
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": FASTMATH, "error_model": "numpy"}

DIGEST_BYTES = 16


def digest(*parts: bytes) -> bytes:
    """Return what tells some bytes from all others."""
    whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.digest()


@functools.cache
def sources() -> str:
    """Return a digest of all that kernels are built of: what was compiled of other sources is not to be run.

    It is empty where the sources cannot be read, as in an archive; then nothing is kept on disk.
    """
    files = *sorted(Path(__file__).parent.glob("*.py")), Path(epilogue.__file__)
    try:
        return digest(*(file.read_bytes() for file in files)).hex()
    except OSError:
        return ""


def njit(signature: Any = None) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function without the GIL, kept on disk by Numba where some folder is writable.

    Args:
        signature: compile for these argument types now; without, for each call's types on the first call.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled: Any = numba.njit(**OPTIONS)(function)
        if sources():
            _keep(compiled)
        if signature is not None:
            compiled.compile(signature)
            compiled.disable_compile()
        return compiled

    return decorate


def _keep(compiled: Any) -> None:
    """Have Numba keep a function's machine code, as long as no source changes: by itself it minds the one file only."""
    with contextlib.suppress(RuntimeError):  # "no locator available": no folder is writable
        compiled.enable_caching()
        file = compiled._cache._cache_file  # noqa: SLF001
        file._source_stamp = file._source_stamp, sources()  # noqa: SLF001


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
