"""A kernel's arguments as one block of whole numbers, so that any thread can call any kernel by two of them.

A kernel is compiled as ``kernel(block, job)``: the address of its arguments, and which job of its work to do. So a
team of threads can run it without the interpreter (``_team``), and Python fills in a few addresses instead of taking
five arrays apart in every call. An array is its address and its shape; it is C-contiguous, and empty where the
address is 0. A float is its bits.

Kernels may call functions that are compiled likewise, once for all of them: their addresses are among the arguments.

Compiled code that is called like this cannot raise. So a kernel returns 1 at its end, and a job that lacked memory
returned 0. Threads write nothing into a block that others read: each miss of such a line would take as long as some
dozens of products.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np import arrayobj

from convdispatch.arguments import Array
from convdispatch.backends._atomics import write_call
from convdispatch.backends._jit import array, integers
from convdispatch.backends._machine_code import compiled_address
from convdispatch.backends._vector import I64, Codegen, intrinsic, parts_of
from convdispatch.memory import address

_SIGNATURE = types.int64(types.int64, types.int64)


@dataclass(frozen=True)
class Field:
    """One argument: an array of ``ndim`` dimensions, a tuple of ``count`` whole numbers, a number, or a float.

    Attributes:
        ndim: dimensions of an array; 0 for what is none.
        count: how many whole numbers a tuple has; 0 for a single number.
        dtype: NumPy's name of an array's dtype; None for the floats that the kernel computes with.
        floating: whether a single number is a float.
    """

    ndim: int = 0
    count: int = 0
    dtype: str | None = None
    floating: bool = False

    @property
    def words(self) -> int:
        """How many whole numbers of a block it takes."""
        return 1 + self.ndim if self.ndim else max(1, self.count)

    def numba_type(self, itemsize: int) -> Any:
        """Return what kernels see it as."""
        if self.ndim:
            return array(self.dtype or f"float{8 * itemsize}", self.ndim, writable=True)
        if self.count:
            return integers(self.count)
        return types.float64 if self.floating else types.int64


class Arguments:
    """The arguments of one kind of kernel, by name."""

    def __init__(self, **fields: Field) -> None:
        """Lay out a block; the order is the order in which kernels take them."""
        self.fields: Mapping[str, Field] = fields
        self.at: dict[str, int] = {}
        self.words = 0
        for name, field in fields.items():
            self.at[name] = self.words
            self.words += field.words
        self.unpack = _unpacker(tuple(fields.values()))

    def pack(self, **values: Any) -> Array:
        """Return a block with these values; arrays are not kept alive by it, and those left out are empty."""
        words = [0] * self.words
        for name, value in values.items():
            at, field = self.at[name], self.fields[name]
            if field.ndim:
                if not value.flags.c_contiguous or value.ndim != field.ndim:
                    raise ValueError(f"{name} must be C-contiguous with {field.ndim} dimensions; it is {value.strides}")
                words[at] = address(value) if value.size else 0
                words[at + 1 : at + 1 + field.ndim] = value.shape
            elif field.count:
                words[at : at + field.count] = map(int, value)
            elif field.floating:
                words[at] = struct.unpack("q", struct.pack("d", value))[0]
            else:
                words[at] = int(value)
        return np.array(words, np.int64)


@intrinsic
def call(typing: Any, function: Any, words: Any) -> tuple[Any, Codegen]:
    """Call ``function(block, 0)`` by its address, with a block of these words: whole numbers, and floats."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        block = cgutils.alloca_once(b, ir.ArrayType(I64, len(words)))  # type: ignore[no-untyped-call]
        first = b.bitcast(block, ir.PointerType(I64))
        for number, value in enumerate(parts_of(b, arguments[1], len(words))):
            word = b.bitcast(value, I64) if isinstance(words[number], types.Float) else value
            b.store(word, b.gep(first, [ir.Constant(I64, number)]))
        write_call(b, arguments[0], b.ptrtoint(first, I64), ir.Constant(I64, 0))
        return context.get_dummy_value()

    return types.void(types.int64, words), codegen


def _unpacker(fields: tuple[Field, ...]) -> Any:
    @intrinsic
    def unpack(typing: Any, block: Any, itemsize: Any) -> tuple[Any, Codegen]:
        """Return the tuple of arguments that a block holds."""
        kinds = [field.numba_type(itemsize.literal_value) for field in fields]

        def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            words = b.inttoptr(arguments[0], ir.PointerType(I64))
            values, at = [], 0
            for field, kind in zip(fields, kinds, strict=True):
                taken = [b.load(b.gep(words, [ir.Constant(I64, at + i)]), align=8) for i in range(field.words)]
                at += field.words
                if field.ndim:
                    values.append(_array(context, b, kind, taken[0], taken[1:]))
                elif field.count:
                    values.append(context.make_tuple(b, kind, taken))
                else:
                    values.append(b.bitcast(taken[0], ir.DoubleType()) if field.floating else taken[0])
            return context.make_tuple(b, signature.return_type, values)

        return types.Tuple(kinds)(block, itemsize), codegen  # type: ignore[no-untyped-call]

    return unpack


def _array(context: Any, b: Any, kind: Any, address: Any, shape: list[Any]) -> Any:
    size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    strides = [ir.Constant(I64, size)]
    for length in reversed(shape[1:]):
        strides.insert(0, b.mul(strides[0], length))
    made: Any = arrayobj.make_array(kind)(context, b)  # type: ignore[no-untyped-call]
    pointer = b.inttoptr(address, context.get_data_type(kind.dtype).as_pointer())
    arrayobj.populate_array(  # type: ignore[no-untyped-call]
        made, data=pointer, shape=shape, strides=strides, itemsize=ir.Constant(I64, size), meminfo=None
    )
    return made._getvalue()  # noqa: SLF001  # how Numba's own code takes a structure's value


@intrinsic
def array_at(typing: Any, address: Any, shape: Any, itemsize: Any) -> tuple[Any, Codegen]:
    """Return the C-contiguous array of the kernel's floats, of this shape, that begins at an address."""
    kind = array(f"float{8 * itemsize.literal_value}", len(shape), writable=True)

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return _array(context, b, kind, arguments[0], list(parts_of(b, arguments[1], len(shape))))

    return kind(types.int64, shape, itemsize), codegen


class CompiledKernel:
    """A compiled kernel, called by its address, and what arguments it takes."""

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Arguments,
        calls: Mapping[str, int] | None = None,
        *,
        is_shared: bool = False,
    ) -> None:
        """Compile ``function(block, job)``, which returns 1, kept on disk where some folder is writable.

        Args:
            function: what to compile.
            arguments: what a block is made of.
            calls: addresses of functions that it calls, by the names of the arguments.
            is_shared: whether jobs change words of the block that others read: all threads must have the same one.
        """
        self.is_shared = is_shared
        self.address = compiled_address(_SIGNATURE, function)
        self.arguments = arguments
        self.calls = calls or {}


def array_of(ndim: int, dtype: str | None = None) -> Field:
    """Return a field for an array, of the kernel's floats unless a dtype is named."""
    return Field(ndim=ndim, dtype=dtype)


def integers_of(count: int) -> Field:
    """Return a field for a tuple of whole numbers."""
    return Field(count=count)


INTEGER = Field()
FLOAT = Field(floating=True)
