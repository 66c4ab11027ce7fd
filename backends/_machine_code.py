"""Compiled kernels on disk, to be loaded by every later process.

Numba's own cache has two faults for us: before it looks, all that Numba can compile must be made ready, which takes as
long as importing Numba; and it notices a change of the file that a function is in, but not of those it is built of. So
here a kernel's object code is kept under a name that is a digest of all that decides over it: the sources, the
constants, the versions of compilers, the CPU and its features. It is read from any folder that has it, and written to
the first that lets itself be written: so what is compiled when a package is installed serves users who must not write.
"""

import contextlib
import functools
import importlib
import os
import platform
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import platformdirs
from numba.core.registry import cpu_target
from numba.core.runtime.nrt import rtsys

from convdispatch.backends._compiling import compiling
from convdispatch.backends._jit import DIGEST_BYTES, FOR_C, check_wanted, digest, sources
from convdispatch.locks import module_rlock

_SUFFIX = ".kernel"
#: Seconds that another process is waited for which compiles the same.
_LONGEST_COMPILATION = 30.0
_HERE = Path(__file__).parent

#: What holds machine code: it would go with these.
_alive: list[Any] = []
#: Names of what was compiled here and could not be kept.
_unkept: set[str] = set()
_one_thread_at_a_time = module_rlock()


@functools.cache
def _target() -> Any:
    """Return Numba's context for this CPU, with the functions of its runtime known to LLVM."""
    context: Any = cpu_target.target_context
    rtsys.initialize(context)
    return context


def _name(signature: Any, function: Callable[..., Any]) -> str:
    """Return the name of the file for a function compiled for a signature; TypeError as ``compiled_address``."""
    settings: Any = numba.config
    module = importlib.import_module(function.__module__)
    described = (
        _described(function), str(signature), _target().codegen().magic_tuple(), numba.__version__,
        llvmlite.__version__, platform.python_implementation(), sys.version_info[:2], settings.OPT,
    )  # fmt: skip
    key = digest(repr(described).encode(), Path(module.__file__ or "").read_bytes())
    return f"{function.__module__.rpartition('.')[2]}-{sources()}-{key.hex()}{_SUFFIX}"


def _described(function: Callable[..., Any]) -> tuple[str, str, list[Any]]:
    """Return a function's module, its name and the constants it closes over; of functions among these, the same.

    These are of its module or of this package: what they are made of is known by ``sources``.
    """
    values: list[Any] = [cell.cell_contents for cell in function.__closure__ or ()]
    known = function.__module__, __package__
    near = [isinstance(v, types.FunctionType) and v.__module__.startswith(known) for v in values]
    if strange := [v for v, is_near in zip(values, near, strict=True) if not (is_near or isinstance(v, int))]:
        raise TypeError(f"a kernel's constants must be whole numbers; {function.__qualname__} closes over {strange}")
    constants = [_described(v) if is_near else v for v, is_near in zip(values, near, strict=True)]
    return function.__module__, function.__qualname__, constants


def _folders() -> Iterator[Path]:
    """Yield where machine code may lie, first where it is best kept."""
    settings: Any = numba.config
    if settings.CACHE_DIR:
        yield Path(settings.CACHE_DIR)
        return
    yield _HERE / "__pycache__"
    yield platformdirs.user_cache_path("convdispatch", appauthor=False) / "kernels"


def _read(name: str) -> tuple[str, bytes] | None:
    """Return the symbol and the object code of a file that is whole, from the first folder that has one."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            whole = (folder / name).read_bytes()
            content = whole[DIGEST_BYTES:]
            if whole.startswith(digest(content)):
                symbol, _, code = content.partition(b"\0")
                return symbol.decode(), code
    return None


def _write(name: str, symbol: str, code: bytes) -> bool:
    """Keep object code in the first folder that lets itself be written; return whether there is one."""
    content = symbol.encode() + b"\0" + code
    for folder in _folders():
        beside = folder / f".{name}-{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(digest(content) + content)
            beside.replace(folder / name)
        except OSError:
            _remove(beside)
            continue
        if folder.parent == _HERE:
            _remove_outdated(folder)
        return True
    return False


@contextlib.contextmanager
def _one_process_at_a_time(name: str) -> Iterator[None]:
    """Wait in case another process compiles the same, as where several start at once.

    Nothing depends on the lock but time: where there is none to be had nobody waits, and its file may be removed though
    others wait for it.
    """
    import filelock  # noqa: PLC0415  # needed only where something is compiled

    with contextlib.ExitStack() as held:
        for folder in _folders():
            file = folder / f".{name}.lock"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(filelock.FileLock(file, timeout=_LONGEST_COMPILATION))
            except (OSError, NotImplementedError):  # it cannot be written, has no locks, or somebody takes very long
                continue
            held.callback(_remove, file)
            break
        yield


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()


@functools.cache
def _remove_outdated(folder: Path) -> None:
    """Remove what was compiled of other sources than those that this folder belongs to."""
    for file in folder.glob(f"*{_SUFFIX}"):
        if f"-{sources()}-" not in file.name:
            file.unlink(missing_ok=True)


def _load(symbol: str, code: bytes) -> int:
    """Return the address of a function in object code, where it stays."""
    with compiling():
        machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine()
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _alive.append(engine)
        return int(engine.get_function_address(symbol))


def _compile(signature: Any, function: Callable[..., Any]) -> tuple[int, str, bytes]:
    """Return the address of a compiled function, where it stays, its symbol, and its object code."""
    with compiling():
        dispatcher: Any = numba.njit([signature], **FOR_C)(function)
        _alive.append(dispatcher)
        compiled = dispatcher.overloads[signature.args]
        symbol, library = compiled.fndesc.llvm_cfunc_wrapper_name, compiled.library
        address = library.get_pointer_to_function(symbol)
        _, _, (code, _) = library.serialize_using_object_code()
        return address, symbol, code


def compiled_address(signature: Any, function: Callable[..., Any]) -> int:
    """Return the address where C finds a function compiled for a signature, for ever; compile it if that is not done.

    Args:
        signature: Numba's.
        function: what to compile; it may close over whole numbers.

    Raises:
        TypeError: if it closes over anything else.
        NotCompiledError: if ``compiling_only`` forbids to compile it.
    """
    with _one_thread_at_a_time:
        if not sources():
            _unkept.add(function.__qualname__)
            return _compile(signature, function)[0]
        name = _name(signature, function)
        if known := _read(name):
            return _load(*known)
        check_wanted(name)
        with _one_process_at_a_time(name):
            if known := _read(name):  # another has compiled it meanwhile
                return _load(*known)
            address, symbol, code = _compile(signature, function)
            if not _write(name, symbol, code):
                _unkept.add(name)
            return address


def complaint() -> str:
    """Return why later processes must compile again what this one has compiled; nothing if they need not."""
    if not _unkept:
        return ""
    if not sources():
        return "it cannot be told from what else other sources give, since the package's cannot be read as files"
    return f"none of its folders could be written: {', '.join(map(str, _folders()))}; name another in NUMBA_CACHE_DIR"
