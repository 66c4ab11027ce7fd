"""How Numba compiles kernels and what they call, and array types that fit every array."""

import contextlib
import contextvars
import functools
import hashlib
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import extending, types

from convdispatch import epilogue, memory
from convdispatch.backends._compiling import compiling
from convdispatch.backends._whole import ApartCompiler, IngredientCompiler, WholeCompiler

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
    files = *sorted(Path(__file__).parent.glob("*.py")), Path(epilogue.__file__), Path(memory.__file__)
    try:
        return digest(*(file.read_bytes() for file in files)).hex()
    except OSError:
        return ""


#: What may be compiled; everything where None.
_wanted: contextvars.ContextVar[Container[str] | None] = contextvars.ContextVar("wanted", default=None)


class NotCompiledError(Exception):
    """Something would have to be compiled, and may not be.

    Attributes:
        name: of what is lacking, the same in all processes.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is on no disk, and was not to be compiled")
        self.name = name


@contextlib.contextmanager
def compiling_only(names: Container[str]) -> Iterator[None]:
    """Have nothing compiled in this block but what has one of these names: what else is lacking is an error.

    Raises:
        NotCompiledError: from within the block, where something else is on no disk.
    """
    before = _wanted.set(names)
    try:
        yield
    finally:
        _wanted.reset(before)


def check_wanted(name: str) -> None:
    """Raise ``NotCompiledError`` for what may not be compiled."""
    wanted = _wanted.get()
    if wanted is not None and name not in wanted:
        raise NotCompiledError(name)


def njit(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function that Python calls, without the GIL, kept on disk by Numba where some folder is writable.

    Args:
        signature: the types of its arguments.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled: Any = numba.njit(**OPTIONS)(function)
        if sources():
            _keep(compiled)
            if _wanted.get() is not None and not _is_kept(compiled, signature):
                check_wanted(f"{function.__module__}.{function.__qualname__}{signature}")
        with compiling():
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


def _is_kept(compiled: Any, signature: Any) -> bool:
    """Return whether Numba has a function's machine code for a signature on disk."""
    if not compiled._cache.cache_path:  # noqa: SLF001
        return False
    key = compiled._cache._index_key(signature, compiled.targetctx.codegen())  # noqa: SLF001
    return compiled._cache._cache_file.load(key) is not None  # noqa: SLF001


#: How Numba is to compile a function that only C calls, and one that only others call which are compiled.
FOR_C: dict[str, Any] = {**OPTIONS, "pipeline_class": WholeCompiler, "no_cpython_wrapper": True}
_FOR_OTHERS: dict[str, Any] = {**FOR_C, "pipeline_class": IngredientCompiler, "no_cfunc_wrapper": True}


def compilable(function: Callable[..., Any]) -> Any:
    """Let compiled functions call this one, with integers that they know as literals; for Python it stays Python."""
    return _let_call(function, {})


def inlined(function: Callable[..., Any]) -> Any:
    """Do as ``compilable`` does, in the place of each call: tiles would be handed over in memory otherwise."""
    return _let_call(function, {"forceinline": True})


def outlined(function: Callable[..., Any]) -> Any:
    """Do as ``compilable`` does, and leave it where it is: what is seldom called would take registers from the rest."""
    return _let_call(function, {"pipeline_class": ApartCompiler})


def _let_call(function: Callable[..., Any], more: dict[str, Any]) -> Any:
    options: Any = {**_FOR_OTHERS, **more}

    @extending.overload(function, jit_options=options, strict=False, prefer_literal=True)
    def choose(*_: Any) -> Any:
        return function

    return function


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
