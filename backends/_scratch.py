"""Memory in which a part of a kernel works: rooms that stay where they are, some for each core, on huge pages.

The pages that malloc gives lie wherever the system had some: of the places of a core's own cache they want some often
and others never, each process in its own way, which makes some slower by a few per cent for as long as they live. A
huge page wants all places alike. A core has rooms of its own, so that what they hold is in its cache, and nobody waits
for one: who finds all of them taken, or needs more than a room, goes to malloc.
"""

import os
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from convdispatch.arguments import Array
from convdispatch.backends._atomics import CAN_SLEEP, allocate, current_core, exchange_if, free, read, write
from convdispatch.backends._jit import compilable
from convdispatch.backends._vector import I64, Codegen, intrinsic
from convdispatch.memory import CACHE_LINE, address, aligned, on_huge_pages

#: Bytes of a room, and rooms of a core: a kernel that converts a band of an image runs another on it, and a thread that
#: must give way while it works takes its rooms with it.
ROOM, _EACH = 1 << 20, 4


def _mapped() -> Array:
    """Return the rooms' memory, their number a power of two; none where address space is short."""
    try:
        return on_huge_pages(ROOM * _EACH << ((os.cpu_count() or 1) - 1).bit_length())
    except MemoryError:
        return np.empty(0, np.uint8)


_memory = _mapped()
_COUNT = len(_memory) // ROOM
#: Whether each room is taken, on a line of cache of its own.
_taken = aligned((_COUNT, CACHE_LINE // 8), "int64")
#: Where compiled code finds the rooms: their address, that of the words above, and how many there are.
_table = np.array([address(_memory), address(_taken), _COUNT])
_NAME = "convdispatch_rooms"
llvm.add_symbol(_NAME, address(_table))


def _after_fork() -> None:
    _taken[...] = 0  # who held one is not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@intrinsic
def _rooms(typing: Any) -> tuple[Any, Codegen]:
    """Return the address of the table."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        symbol = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), _NAME)  # type: ignore[no-untyped-call]
        return b.ptrtoint(symbol, I64)

    return types.int64(), codegen


@compilable
def _any_core():  # type: ignore[no-untyped-def]
    """Return 0: where nobody tells, all begin with the same rooms."""
    return 0


_core = current_core if CAN_SLEEP else _any_core


@compilable
def borrow(size):  # type: ignore[no-untyped-def]
    """Return the address of so many bytes, which begins a line of cache; 0 if there are none to be had."""
    if size <= ROOM:
        table = _rooms()
        first, rooms = _core() * _EACH, read(table + 16)
        for turn in range(min(_EACH, rooms)):
            number = (first + turn) & (rooms - 1)
            if exchange_if(read(table + 8) + number * CACHE_LINE, 0, 1):
                return read(table) + number * ROOM
    found = allocate(size + 2 * CACHE_LINE)
    if found == 0:
        return 0
    place = (found + 2 * CACHE_LINE) & -CACHE_LINE
    write(place - 8, found)
    return place


@compilable
def give_back(place):  # type: ignore[no-untyped-def]
    """Give back what was borrowed."""
    table = _rooms()
    number = (place - read(table)) // ROOM
    if 0 <= number < read(table + 16):
        write(read(table + 8) + number * CACHE_LINE, 0)
    else:
        free(read(place - 8))
