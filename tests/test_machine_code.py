"""Machine code on disk: found again, never believed when it is damaged or of other sources, and no need of Numba's."""

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
from numba import types

from convdispatch.backends import _machine_code as machine_code
from convdispatch.backends._jit import NotCompiledError, compiling_only, inlined, njit
from convdispatch.backends._vector import load, save

WORD = types.int64(types.int64)
ROOT = Path(__file__).parent.parent


def times(factor: Any) -> Callable[[int], int]:
    def multiply(value):  # type: ignore[no-untyped-def]
        return value * factor

    return multiply


def called(function: Callable[[int], int], value: int = 7) -> int:
    return int(ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(machine_code.compiled_address(WORD, function))(value))


def increased(value):  # type: ignore[no-untyped-def]
    return value + 1


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two folders in place of the usual ones."""
    found = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setattr(machine_code, "_folders", lambda: iter(found))
    return found


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of functions as they are compiled."""
    names, compile_one = [], machine_code._compile

    def counted(signature: Any, function: Callable[..., Any]) -> tuple[int, str, bytes]:
        names.append(function.__name__)
        return compile_one(signature, function)

    monkeypatch.setattr(machine_code, "_compile", counted)
    return names


def kernels(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kernel"))


def test_what_was_compiled_is_loaded_and_constants_are_told_apart(folders: list[Path], compilations: list[str]) -> None:
    assert [called(times(3)), called(times(3)), called(times(4)), called(times(3))] == [21, 21, 28, 21]
    assert len(compilations) == 2
    assert len(kernels(folders[0])) == 2
    assert not folders[1].exists()
    assert not list(folders[0].glob("*.tmp"))


def test_so_are_those_of_functions_that_are_called(folders: list[Path], compilations: list[str]) -> None:
    def twice(factor: int) -> Callable[[int], int]:
        inner = inlined(times(factor))

        def doubled(value):  # type: ignore[no-untyped-def]
            return 2 * inner(value)

        return doubled

    assert [called(twice(3)), called(twice(4)), called(twice(3))] == [42, 56, 42]
    assert len(compilations) == len(kernels(folders[0])) == 2


def test_code_of_other_sources_or_for_another_cpu_is_not_run(
    folders: list[Path], compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called(times(3))
    name = machine_code._name(WORD, times(3))
    with monkeypatch.context() as patch:
        patch.setattr(machine_code, "sources", lambda: "other")
        assert machine_code._name(WORD, times(3)) != name
    codegen = type(machine_code._target().codegen())
    with monkeypatch.context() as patch:
        patch.setattr(codegen, "magic_tuple", lambda _: ("x86_64", "another", "+features"))
        assert machine_code._name(WORD, times(3)) != name
        called(times(3))
    assert machine_code._name(WORD, times(3)) == name
    assert len(compilations) == len(kernels(folders[0])) == 2


@pytest.mark.parametrize("keep", [0, 10, 16, 100, -1])
def test_a_file_that_is_cut_short_is_compiled_again(folders: list[Path], compilations: list[str], keep: int) -> None:
    called(times(3))
    file = kernels(folders[0])[0]
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    assert called(times(3)) == 21
    assert len(compilations) == 2
    assert machine_code._read(file.name) is not None
    assert called(times(3)) == 21
    assert len(compilations) == 2


def test_a_file_with_a_changed_byte_is_compiled_again(folders: list[Path], compilations: list[str]) -> None:
    called(times(3))
    file = kernels(folders[0])[0]
    changed = bytearray(file.read_bytes())
    changed[len(changed) // 2] ^= 1
    file.write_bytes(changed)
    assert called(times(3)) == 21
    assert len(compilations) == 2


def test_what_is_written_once_serves_where_nothing_can_be_written(folders: list[Path], compilations: list[str]) -> None:
    called(times(3))
    folders[0].rename(folders[1])
    folders[0].write_text("no folder")  # even the superuser writes nothing into a file
    assert called(times(3)) == 21
    assert compilations == ["multiply"]
    assert called(times(4)) == 28
    assert len(kernels(folders[1])) == 2
    folders[1] = folders[0] / "neither"
    assert called(times(5)) == 35
    assert called(times(5)) == 35
    assert len(compilations) == 4


def test_without_sources_nothing_is_kept(
    folders: list[Path], compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_code, "sources", lambda: "")
    assert [called(times(3)), called(times(3))] == [21, 21]
    assert len(compilations) == 2
    assert not folders[0].exists()


def test_outdated_code_is_removed_from_the_packages_own_folder(tmp_path: Path) -> None:
    fresh = tmp_path / machine_code._name(WORD, times(3))
    for file in (fresh, old := tmp_path / "_winograd-0123-4567.kernel", other := tmp_path / "_winograd.cpython.pyc"):
        file.touch()
    machine_code._remove_outdated(tmp_path)
    assert fresh.exists()
    assert other.exists()
    assert not old.exists()


def test_what_is_lacking_is_compiled_only_where_it_may_be(folders: list[Path], compilations: list[str]) -> None:
    with compiling_only(()), pytest.raises(NotCompiledError) as lacking:
        called(times(3))
    assert compilations == []
    with compiling_only({lacking.value.name}):
        assert called(times(3)) == 21
        with pytest.raises(NotCompiledError):
            called(times(4))
    assert lacking.value.name == kernels(folders[0])[0].name
    with compiling_only(()):
        assert called(times(3)) == 21  # it is on disk
    assert called(times(4)) == 28
    assert len(compilations) == 2


_COUNTS = """
import time
from convdispatch.backends import _machine_code
from numba import types
compiled, compile_one = [], _machine_code._compile
def counted(signature, function):
    compiled.append(function)
    time.sleep(0.5)  # so that the other one comes meanwhile
    return compile_one(signature, function)
_machine_code._compile = counted
import convdispatch.backends._team
print(len(compiled))
"""


def test_processes_that_start_together_compile_each_kernel_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _COUNTS]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    counts = [int(process.communicate(timeout=120)[0]) for process in started]
    kept = [path.name for path in cache.iterdir()]
    assert sum(counts) == len(kept) > 0
    assert all(name.endswith(".kernel") for name in kept)  # no lock is left


def test_nothing_is_held_back_while_another_process_is_waited_for(
    folders: list[Path], compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage collection stands for all that ``compiling`` holds back."""
    collects: list[bool] = []

    class Lock:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self) -> None:
            collects.append(gc.isenabled())

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("filelock.FileLock", Lock)
    assert gc.isenabled()
    assert called(times(3)) == 21
    assert (collects, compilations) == ([True], ["multiply"])


def test_where_no_lock_is_to_be_had_it_is_compiled_all_the_same(
    folders: list[Path], compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> object:
        raise NotImplementedError("no locks here")

    monkeypatch.setattr("filelock.FileLock", none)
    assert [called(times(3)), called(times(3))] == [21, 21]
    assert compilations == ["multiply"]


def test_numbas_own_compiling_is_held_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    decorate = njit(types.int64(types.int64))
    with compiling_only(()), pytest.raises(NotCompiledError, match="increased") as lacking:
        decorate(increased)
    with compiling_only({lacking.value.name}):
        assert decorate(increased)(3) == 4
    with compiling_only(()):
        assert decorate(increased)(3) == 4


@pytest.mark.parametrize("constant", ["text", 1.5, load, (1, save)])
def test_constants_that_a_name_cannot_tell_are_refused(folders: list[Path], constant: object) -> None:
    with pytest.raises(TypeError, match=r"must be whole numbers; .*multiply closes over"):
        machine_code.compiled_address(WORD, times(constant))
    assert not folders[0].exists()


_FIRST_CALL = """
import sys
import numpy as np
import convdispatch

problems = [(1, 20, 20, 16), (3, 3, 16, 16)], [(1, 64, 64, 1), (9, 9, 1, 1)], [(1, 20, 20, 16), (3, 3, 1, 16)]
for shape, filters in problems:
    convdispatch.conv2d(np.ones(shape, "f4"), np.ones(filters, "f4"), groups=shape[3] // filters[2])
print("numba.np.arraymath" in sys.modules, "scipy.linalg" in sys.modules)
"""


def test_with_all_compiled_a_first_call_makes_no_compiler_ready() -> None:
    """What Numba loads before it compiles takes as long as all else of a cold start."""
    said = ""
    for _ in range(2):  # the first run may have to compile
        words = [sys.executable, "-c", _FIRST_CALL]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        if (said := done.stdout.strip()) == "False False":
            break
    assert said == "False False"
