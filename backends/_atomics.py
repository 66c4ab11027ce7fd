"""Memory that several threads share, its words that they change, and waiting until one does: for compiled code."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from convdispatch import machine
from convdispatch.backends._jit import compilable
from convdispatch.backends._vector import I32, I64, Codegen, intrinsic, is_x86

_SYSTEM = machine.current().system
#: Linux's number for the system call that sleeps on a word of memory, where this file knows it.
_FUTEX = {"Linux x86_64": 202, "Linux aarch64": 98}.get(_SYSTEM)
_WAIT, _WAKE = 128, 129  # between threads of one process

CAN_SLEEP = _FUTEX is not None
#: The C library's function, or the system's, that lets another thread have the caller's core.
_YIELD = "SwitchToThread" if _SYSTEM.startswith("Windows") else "sched_yield"


def _word(b: Any, address: Any) -> Any:
    return b.inttoptr(address, ir.PointerType(I64))


@intrinsic
def read(typing: Any, address: Any) -> tuple[Any, Codegen]:
    """Return a word as it is now."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.load_atomic(_word(b, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def write(typing: Any, address: Any, value: Any) -> tuple[Any, Codegen]:
    """Store a word, for all threads to see, after everything that was stored before."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        b.store_atomic(arguments[1], _word(b, arguments[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def stack(typing: Any, words: Any) -> tuple[Any, Codegen]:
    """Return the address of room for so many words on the stack of the function that this is written in."""
    count = words.literal_value

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        room = cgutils.alloca_once(b, ir.ArrayType(I64, count))  # type: ignore[no-untyped-call]
        return b.ptrtoint(room, I64)

    return types.int64(words), codegen


@intrinsic
def add(typing: Any, address: Any, value: Any) -> tuple[Any, Codegen]:
    """Add to a word, and return what it was before."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.atomic_rmw("add", _word(b, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def exchange_if(typing: Any, address: Any, expected: Any, value: Any) -> tuple[Any, Codegen]:
    """Store a word if it is as expected; return whether it was."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        done = b.cmpxchg(_word(b, arguments[0]), arguments[1], arguments[2], "seq_cst", "seq_cst")
        return b.extract_value(done, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def fence(typing: Any) -> tuple[Any, Codegen]:
    """Have all that was stored before, past the caches too, seen by who sees anything that is stored after it."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        b.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def pause(typing: Any) -> tuple[Any, Codegen]:
    """Let the processor rest for a moment in a loop that waits."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        if is_x86():
            kind = ir.FunctionType(ir.VoidType(), [])
            b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse2.pause"), [])  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_core(typing: Any) -> tuple[Any, Codegen]:
    """Let another thread have this core, if one wants it."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(I32, [])
        b.call(cgutils.get_or_insert_function(b.module, kind, _YIELD), [])  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def current_core(typing: Any) -> tuple[Any, Codegen]:
    """Return the number of the core that this runs on; only where threads can sleep on memory."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(I32, [])
        call = cgutils.get_or_insert_function(b.module, kind, "sched_getcpu")  # type: ignore[no-untyped-call]
        return b.sext(b.call(call, []), I64)

    return types.int64(), codegen


#: Looks at a word before a thread that waits for it lets others have its core.
_TURNS_BEFORE_YIELDING = 2000


@compilable
def rest(turns):  # type: ignore[no-untyped-def]
    """Rest for a moment between two looks at memory; after many turns, let another thread have this core."""
    pause()
    if turns > _TURNS_BEFORE_YIELDING:
        yield_core()


@compilable
def wait_for(address, least):  # type: ignore[no-untyped-def]
    """Wait until a word is at least so large, for what other threads are doing just now."""
    turns = 0
    while read(address) < least:
        turns += 1
        rest(turns)


@intrinsic
def allocate(typing: Any, size: Any) -> tuple[Any, Codegen]:
    """Return the address of so many bytes of memory, 0 if there are none to be had; ``free`` gives them back."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.ptrtoint(context.nrt.allocate_unchecked(b, arguments[0]), I64)

    return types.int64(types.int64), codegen


@intrinsic
def free(typing: Any, address: Any) -> tuple[Any, Codegen]:
    """Give memory back."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        context.nrt.free(b, b.inttoptr(arguments[0], cgutils.voidptr_t))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _futex(context: Any, b: Any, address: Any, operation: int, value: Any) -> Any:
    kind = ir.FunctionType(I64, [I64] * 7)
    call = cgutils.get_or_insert_function(b.module, kind, "syscall")  # type: ignore[no-untyped-call]
    zero = ir.Constant(I64, 0)
    b.call(call, [ir.Constant(I64, _FUTEX or 0), address, ir.Constant(I64, operation), value, zero, zero, zero])
    return context.get_dummy_value()


@intrinsic
def sleep_while(typing: Any, address: Any, value: Any) -> tuple[Any, Codegen]:
    """Sleep until woken, but only if the lower half of a word is still that of ``value``; may wake for no reason.

    Only where threads can sleep on memory; there is no such function elsewhere, and code that calls it does not load.
    """

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return _futex(context, b, arguments[0], _WAIT, arguments[1])

    return types.void(types.int64, types.int64), codegen


@intrinsic
def wake(typing: Any, address: Any, count: Any) -> tuple[Any, Codegen]:
    """Wake up to ``count`` threads that sleep on a word; only where they can."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return _futex(context, b, arguments[0], _WAKE, arguments[1])

    return types.void(types.int64, types.int64), codegen


def write_call(b: Any, function: Any, block: Any, number: Any) -> Any:
    """Write the call of a compiled kernel by its address."""
    kind = ir.FunctionType(I64, [I64, I64])
    return b.call(b.inttoptr(function, ir.PointerType(kind)), [block, number])


@intrinsic
def call_kernel(typing: Any, function: Any, block: Any, number: Any) -> tuple[Any, Codegen]:
    """Call a compiled kernel by its address; return 1 if this job came to its end, else 0."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return write_call(b, *arguments)

    return types.int64(types.int64, types.int64, types.int64), codegen
