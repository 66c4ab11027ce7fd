"""The way from Python into a compiled kernel without the interpreter: a C function that takes two arrays.

To check two arrays, put their addresses into a block and start a kernel takes the interpreter some three microseconds,
as long as a small layer. So a plan's usual call goes to a function of CPython's own kind, compiled like the kernels: it
reads what it must know of the arrays from their objects, copies the block of arguments to the stack, releases the
interpreter's lock and runs the jobs. It answers True if all is done. It answers None, and has done nothing that
matters, wherever something is out of the ordinary (another dtype, shape or layout, arrays that overlap, sums that are
not finite, helpers that are missing or on the caller's core): then the call goes the long way, which knows all cases
and has the words for errors.

Arrays and functions are read as C code reads them, by the layout that NumPy's and CPython's headers promise. Where
that, or the platform, is not as expected, there is no such way in, and every call goes the long way.
"""

import ctypes
import functools
import math
import sysconfig
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from convdispatch.arguments import Array
from convdispatch.backends import _team
from convdispatch.backends._arguments import INTEGER, Arguments, CompiledKernel, integers_of
from convdispatch.backends._atomics import CAN_SLEEP, read, stack, write
from convdispatch.backends._jit import compilable
from convdispatch.backends._machine_code import compiled_address
from convdispatch.backends._shares import MOST_WORDS, layout, own_block, spoiled_word
from convdispatch.backends._vector import I64, Codegen, intrinsic
from convdispatch.memory import address

Entry = Callable[[Array, Array], bool | None]
ArrayKind = tuple[tuple[int, ...], np.dtype[Any]]

# Bytes from an object's address: CPython's object.h, NumPy's ndarraytypes.h.
_TYPE = 8
_HEAD = object.__basicsize__
_DATA, _NDIM, _SHAPE, _DTYPE, _FLAGS = (_HEAD + 8 * word for word in (0, 1, 2, 5, 6))
_CONTIGUOUS, _ALIGNED, _WRITABLE = 0x1, 0x100, 0x400
_READABLE, _STORABLE = _CONTIGUOUS | _ALIGNED, _CONTIGUOUS | _ALIGNED | _WRITABLE
_INT = (1 << 32) - 1  # a C int is the lower half of a word

_MOST_DIMENSIONS = 6
_WITH_RESIDUAL = 3  # arrays
_FASTCALL = 0x80

#: What the function must know of a kernel: ``template`` is its block but for so many arrays that are ``given``: two
#: addresses go where ``layout`` says, and a residual's to word ``added_at``; ``whereabouts`` has the address of the
#: team's words, ``shapes`` are input's and out's.
_RECIPE = Arguments(
    template=INTEGER, given=INTEGER, layout=INTEGER, added_at=INTEGER, is_shared=INTEGER, kernel=INTEGER,
    jobs=INTEGER, threads=INTEGER, whereabouts=INTEGER, array_type=INTEGER, dtypes=integers_of(2),
    sizes=integers_of(2), ndim=INTEGER, shapes=integers_of(2 * _MOST_DIMENSIONS), answers=integers_of(2),
)  # fmt: skip
unpack = _RECIPE.unpack


def _word(b: Any, place: Any) -> Any:
    return b.inttoptr(place, ir.PointerType(I64))


@intrinsic
def _at(typing: Any, place: Any) -> tuple[Any, Codegen]:
    """Return the word at an address."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.load(_word(b, arguments[0]), align=8)

    return types.int64(types.int64), codegen


def _call(b: Any, name: str, *words: Any) -> Any:
    """Call a function of CPython's; its arguments and result are words."""
    kind = ir.FunctionType(I64, [I64] * len(words))
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), words)  # type: ignore[no-untyped-call]


@intrinsic
def _release_lock(typing: Any) -> tuple[Any, Codegen]:
    """Release the interpreter's lock; return what takes it back."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return _call(b, "PyEval_SaveThread")

    return types.int64(), codegen


def _told(name: str) -> Any:
    """Return an intrinsic that calls a function of CPython's with one word and expects nothing back."""

    @intrinsic
    def tell(typing: Any, word: Any) -> tuple[Any, Codegen]:
        def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            _call(b, name, arguments[0])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return tell


#: Take the interpreter's lock back; count one more reference to the object at an address.
_take_lock, _count_reference = _told("PyEval_RestoreThread"), _told("Py_IncRef")


@compilable
def _is_usual(array, flags, kind, dtype, ndim, shape, first):  # type: ignore[no-untyped-def]
    """Return whether the object at an address is an array of this dtype and shape, with these flags set."""
    if _at(array + _TYPE) != kind or _at(array + _DTYPE) != dtype:
        return False
    if _at(array + _FLAGS) & flags != flags or _at(array + _NDIM) & _INT != ndim:
        return False
    lengths = _at(array + _SHAPE)
    for axis in range(ndim):  # noqa: SIM110  # Numba has no all()
        if _at(lengths + 8 * axis) != shape[first + axis]:
            return False
    return True


@compilable
def _are_apart(one, size, other, its_size):  # type: ignore[no-untyped-def]
    """Return whether so many bytes from two addresses on have none in common."""
    return one + size <= other or other + its_size <= one


def _enter(recipe, given, count):  # type: ignore[no-untyped-def]
    """Run a recipe's kernel on its arrays: a ``PyObject *(*)(PyObject *, PyObject *const *, Py_ssize_t)``."""
    (
        template, arrays, form, added_at, is_shared, kernel, jobs, threads, whereabouts, array_type, dtypes, sizes,
        ndim, shapes, answers,
    ) = unpack(_at(recipe + _DATA), 4)  # fmt: skip
    answer = answers[0]
    if count == arrays:
        x, y, team = _at(given), _at(given + 8), _at(whereabouts)
        usual = _is_usual(x, _READABLE, array_type, dtypes[0], ndim, shapes, 0)
        usual = usual and _is_usual(y, _STORABLE, array_type, dtypes[1], ndim, shapes, _MOST_DIMENSIONS)
        residual = _at(given + 16) if count == _WITH_RESIDUAL else 0
        if residual:
            usual = usual and _is_usual(residual, _READABLE, array_type, dtypes[1], ndim, shapes, _MOST_DIMENSIONS)
        source = target = added = 0  # which overlap
        if usual and (threads <= 1 or _team.ready(team, threads - 1)):
            source, target = _at(x + _DATA), _at(y + _DATA)
            added = _at(residual + _DATA) if residual else target + sizes[1]
        if _are_apart(source, sizes[0], target, sizes[1]) and _are_apart(added, sizes[1], target, sizes[1]):
            block = own_block(template, form, source, target, stack(MOST_WORDS))
            if residual:
                write(block + 8 * added_at, added)
            state = _release_lock()
            if threads <= 1:
                ended = _team.alone(kernel, block, 0, jobs)
            else:
                common, how = (block, 0) if is_shared or residual else (template, form)
                ended = _team.share(team, (kernel, common, how, source, target), block, jobs, threads - 1)
            _take_lock(state)
            word = spoiled_word(block, form)
            if ended == jobs and (word == 0 or read(word) == 0):
                answer = answers[1]
    _count_reference(answer)
    return answer


class _Method(ctypes.Structure):
    """CPython's ``PyMethodDef``."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


def _is_known() -> bool:
    """Return whether arrays lie in memory as their headers say, under the interpreter that this is made for."""
    if not CAN_SLEEP or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return False
    known = np.empty((2, 3))
    word = ctypes.c_int64.from_address
    start = id(known)
    shape = word(start + _SHAPE).value
    return (
        word(start + _TYPE).value == id(np.ndarray)
        and word(start + _DATA).value == known.ctypes.data
        and word(start + _NDIM).value & _INT == known.ndim
        and (word(shape).value, word(shape + 8).value) == known.shape
        and word(start + _DTYPE).value == id(known.dtype)
        and word(start + _FLAGS).value & _INT & (_STORABLE | 0x2) == _STORABLE
    )


#: For ever, since bound functions point to it; there are several where threads were the first at the same moment.
_methods: list[_Method] = []


@functools.cache
def _method() -> tuple[_Method, Callable[[Any, Array, None], Entry]] | None:
    """Return the compiled function in CPython's form, and what binds it to a recipe; None where it cannot be had."""
    if not _is_known():
        return None
    function = compiled_address(types.int64(types.int64, types.int64, types.int64), _enter)
    bind = ctypes.pythonapi.PyCFunction_NewEx
    bind.argtypes, bind.restype = (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p), ctypes.py_object
    _methods.append(_Method(b"entry", function, _FASTCALL, None))
    return _methods[-1], bind


def entry(
    kernel: CompiledKernel, block: Array, places: tuple[int, int], added_at: int | None, spoiled_at: int | None,
    count: int, threads: int, input_like: ArrayKind, out_like: ArrayKind,
) -> Entry | None:  # fmt: skip
    """Return the short way into a kernel, or None where there is none.

    Args:
        kernel: the compiled kernel.
        block: its arguments but for the arrays of a call; what it means must outlive the entry.
        places: where in the block the addresses of input and out go.
        added_at: where a residual's address goes, if there is one; it is given last, and of out's shape and dtype.
        spoiled_at: where it reports sums that are not finite, if it does.
        count: jobs of its work.
        threads: most threads to use.
        input_like, out_like: shape and dtype of the arrays that are taken.
    """
    method, ndim = _method(), len(input_like[0])
    if method is None or len(block) > MOST_WORDS or ndim > _MOST_DIMENSIONS:
        return None
    like = (input_like, out_like)
    recipe = _RECIPE.pack(
        template=address(block), given=2 if added_at is None else _WITH_RESIDUAL,
        layout=layout(len(block), places, spoiled_at), added_at=added_at or 0,
        is_shared=kernel.is_shared, kernel=kernel.address, jobs=count,
        threads=_team.useful(threads, count), whereabouts=address(_team.whereabouts), array_type=id(np.ndarray),
        dtypes=[id(dtype) for _, dtype in like], sizes=[math.prod(shape) * dtype.itemsize for shape, dtype in like],
        ndim=ndim, shapes=[length for shape, _ in like for length in (*shape, *[0] * (_MOST_DIMENSIONS - ndim))],
        answers=(id(None), id(True)),
    )  # fmt: skip
    definition, bind = method
    return bind(ctypes.byref(definition), recipe, None)
