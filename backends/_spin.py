"""A short wait that watches memory, for threads between two calls that follow each other closely.

Waking a sleeping thread takes tens of microseconds, as long as a small layer. A thread that has just worked looks out
for more for about a twentieth of a millisecond before it goes to sleep.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from convdispatch import machine
from convdispatch.backends._jit import array, njit
from convdispatch.backends._vector import I64, Codegen, intrinsic

_X86 = any(name in machine.current().system for name in ("x86_64", "AMD64"))
#: Looks at the memory; each takes some 20 ns where the processor has an instruction to pause.
TURNS = 2500


@intrinsic
def _look(typing: Any, address: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Return the integer at an address as it is now, and pause for a moment."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse2.pause"), [])  # type: ignore[no-untyped-call]
        return b.load_atomic(b.inttoptr(arguments[0], ir.PointerType(I64)), "monotonic", 8)

    return types.int64(address), codegen


@njit(types.void(array("int64", 1), types.int64))
def spin(counter, seen):  # type: ignore[no-untyped-def]
    """Return when ``counter[0]`` is no longer ``seen``, or after ``TURNS`` looks at it."""
    address = counter.ctypes.data
    for _ in range(TURNS):
        if _look(address) != seen:
            return
