"""SIMD vectors inside Numba kernels, for the loops where Numba's own code does not reach the machine's limit.

A vector is a value of a kernel like any other; memory is handled by address, in bytes. Lanes and ``itemsize`` (4:
float32, 8: float64) make the vector's type, and are compile-time constants: literal arguments, or integers that the
kernel closes over. What kernels do with tuples of vectors is in ``_tile``.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numba
from llvmlite import binding, ir
from numba import extending, types
from numba.core import cgutils
from numba.core.datamodel import models

from convdispatch import machine


def intrinsic(function: Callable[..., Any]) -> Any:
    """Make what writes LLVM instructions a function that kernels call; integers among its arguments are literal."""
    return extending.intrinsic(prefer_literal=True)(function)


I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
SCALARS = {4: (types.float32, ir.FloatType(), "f32"), 8: (types.float64, ir.DoubleType(), "f64")}


#: Bytes of the widest vectors, and LLVM's names of processors that do two halves of one as fast.
WIDEST = 64
_HALVES = ("znver4", "cannonlake", "icelake-client", "tigerlake", "rocketlake")


def vector_bytes() -> int:
    """Return the width of the vectors that Numba compiles for: this CPU's, unless Numba was told of another."""
    return machine.current().vector_bytes


def halves_are_free() -> bool:
    """Return whether two vectors of half the width take no longer than one of all of it.

    So it is where whole ones are made of halves, or of the two units that do halves: with AVX-512 on Zen 4, and on what
    Intel makes for desks and laps.
    """
    return _processor() in _HALVES


def whole_units() -> bool:
    """Return whether cores have two units for the widest vectors: twice as fast, then, as those that make do."""
    return vector_bytes() == WIDEST and not halves_are_free()


@functools.cache
def _processor() -> str:
    """Return LLVM's name of what Numba compiles for."""
    settings: Any = numba.config
    name: str = settings.CPU_NAME or binding.get_host_cpu_name()
    return name


def is_x86() -> bool:
    """Return whether compiled code is for x86."""
    return any(name in machine.current().system for name in ("x86_64", "AMD64"))


def registers() -> int:
    """Return how many vector registers there are: 16 on x86 without AVX-512, 32 elsewhere."""
    return 16 if is_x86() and vector_bytes() < 64 else 32


class Vector(types.Type):
    """The Numba type of a vector of floats."""

    def __init__(self, itemsize: int, lanes: int) -> None:
        """Make the type of ``lanes`` floats of ``itemsize`` bytes."""
        self.itemsize, self.lanes = itemsize, lanes
        super().__init__(name=f"Vector({itemsize}, {lanes})")

    @property
    def ir(self) -> Any:
        """The LLVM type."""
        return ir.VectorType(SCALARS[self.itemsize][1], self.lanes)


@extending.register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.ir)  # type: ignore[no-untyped-call]


# What the intrinsics below are built of: each adds a few LLVM instructions through `b`, an IRBuilder.


def address_of(b: Any, address: Any, offset: int, kind: Any) -> Any:
    return b.inttoptr(b.add(address, ir.Constant(I64, offset)), ir.PointerType(kind))


def load_at(b: Any, kind: Any, address: Any, offset: int = 0, align: int = 4) -> Any:
    return b.load(address_of(b, address, offset, kind), align=align)


def broadcast(b: Any, value: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    return shuffled(b, b.insert_element(undefined, value, ir.Constant(I32, 0)), [0] * lanes)


def shuffled(b: Any, value: Any, lanes: list[int]) -> Any:
    """Return a vector of these lanes of a vector."""
    undefined = ir.Constant(value.type, ir.Undefined)
    return b.shuffle_vector(value, undefined, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def fused_multiply_add(b: Any, x: Any, y: Any, z: Any, vector: Vector) -> Any:
    name = f"llvm.fma.v{vector.lanes}{SCALARS[vector.itemsize][2]}"
    function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
        b.module, ir.FunctionType(x.type, [x.type] * 3), name
    )
    return b.call(function, [x, y, z])


def parts_of(b: Any, values: Any, count: int) -> list[Any]:
    return [b.extract_value(values, i) for i in range(count)]


def spaced(b: Any, first: Any, step: Any, count: int) -> list[Any]:
    """Return addresses that lie ``step`` bytes apart."""
    places = [first]
    while len(places) < count:
        places.append(b.add(places[-1], step))
    return places


def opaque(b: Any, value: Any) -> Any:
    """Return an integer that the compiler knows nothing of: it cannot compute it ahead and keep it on the stack."""
    return b.call(ir.InlineAsm(ir.FunctionType(I64, [I64]), "", "=r,0"), [value])


def spaced_in_turn(b: Any, first: Any, step: Any, count: int) -> Iterator[Any]:
    """Yield addresses that lie ``step`` bytes apart, each from the one before: for more than registers hold at once."""
    for number in range(count):
        first = opaque(b, b.add(first, step)) if number else first
        yield first


def upper_half(b: Any, lanes: int) -> Any:
    """Return a mask of the upper half of a vector's lanes.

    A constant one would make a permutation of a choice between two vectors, which has fewer units to run on.
    """
    bits = opaque(b, ir.Constant(I64, (1 << lanes) - (1 << lanes // 2)))
    return b.bitcast(b.trunc(bits, ir.IntType(lanes)), ir.VectorType(ir.IntType(1), lanes))


Codegen = Callable[[Any, Any, Any, Any], Any]


# Single vectors, for kernels that are written out step by step.


@intrinsic
def load(typing: Any, address: Any, lanes: Any, itemsize: Any) -> tuple[Any, Codegen]:
    """Return the vector at an address."""
    vector = Vector(itemsize.literal_value, lanes.literal_value)

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return load_at(b, vector.ir, arguments[0], 0, vector.itemsize)

    return vector(address, lanes, itemsize), codegen


@intrinsic
def save(typing: Any, address: Any, vector: Any) -> tuple[Any, Codegen]:
    """Store a vector at an address."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        b.store(arguments[1], address_of(b, arguments[0], 0, vector.ir), align=vector.itemsize)
        return context.get_dummy_value()

    return types.void(address, vector), codegen


@intrinsic
def interleave(typing: Any, vector: Any, groups: Any) -> tuple[Any, Codegen]:
    """Return a vector whose lanes are those of so many groups, taken in turn."""
    numbers = range(vector.lanes)
    each = vector.lanes // groups.literal_value
    lanes = [first + member for member in range(each) for first in numbers[::each]]

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return shuffled(b, arguments[0], lanes) if groups.literal_value > 1 else arguments[0]

    return vector(vector, groups), codegen


# Bytes that lie side by side.


@intrinsic
def clear(typing: Any, address: Any, count: Any) -> tuple[Any, Codegen]:
    """Set bytes to zero."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        pointer = address_of(b, arguments[0], 0, I8)
        memset = b.module.declare_intrinsic("llvm.memset", [pointer.type, I64])
        b.call(memset, [pointer, ir.Constant(I8, 0), arguments[1], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def copy(typing: Any, target: Any, source: Any, count: Any) -> tuple[Any, Codegen]:
    """Copy bytes from one address to another; Numba's own slices move one element at a time."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        to, origin = (address_of(b, address, 0, I8) for address in arguments[:2])
        memcpy = b.module.declare_intrinsic("llvm.memcpy", [to.type, origin.type, I64])
        b.call(memcpy, [to, origin, arguments[2], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def stream_at(b: Any, value: Any, pointer: Any, vector: Vector) -> None:
    """Store a vector past the caches, by a streaming (non-temporal) store, at a multiple of its bytes."""
    hint = b.module.add_metadata([ir.Constant(I32, 1)])
    b.store(value, pointer, align=vector.lanes * vector.itemsize).set_metadata("nontemporal", hint)


def prefetch_at(b: Any, address: Any, offset: int) -> None:
    """Have a cache line on its way to L2, before it is needed; any address will do."""
    pointer = address_of(b, address, offset, I8)
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    call = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
    to_read, to_l2, data = (ir.Constant(I32, value) for value in (0, 2, 1))
    b.call(call, [pointer, to_read, to_l2, data])


@intrinsic
def prefetch(typing: Any, address: Any) -> tuple[Any, Codegen]:
    """Send for the cache line at an address."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        prefetch_at(b, arguments[0], 0)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def hold(typing: Any, array: Any) -> tuple[Any, Codegen]:
    """Keep an array alive up to this call, where only its address was used since; else it might be freed before."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), codegen


@extending.overload_attribute(Vector, "lanes")
def _lanes(vector: Any) -> Any:
    count = vector.lanes

    def lanes(vector: Any) -> Any:  # Numba matches by name
        return count

    return lanes
