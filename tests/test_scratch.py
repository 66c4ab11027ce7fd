"""Scratch memory: what is borrowed is nobody else's, begins a cache line, and comes back whoever held the rooms."""

import ctypes
import functools
import os
from collections.abc import Callable

import numpy as np
import pytest
import walls
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types
from programs import run_well
from strategies import numbers

from convdispatch import registry
from convdispatch.backend import Config
from convdispatch.backends import _scratch
from convdispatch.backends._machine_code import compiled_address
from convdispatch.backends._scratch import ROOM, borrow, give_back
from convdispatch.problem import Problem


def _borrow(size):  # type: ignore[no-untyped-def]
    return borrow(size)


def _give_back(place):  # type: ignore[no-untyped-def]
    give_back(place)
    return 0


@functools.cache
def compiled(which: Callable[[int], int]) -> Callable[[int], int]:
    address = compiled_address(types.int64(types.int64), which)
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)


def free_rooms() -> int:
    return int((_scratch._taken[:, 0] == 0).sum())


@given(st.lists(st.one_of(st.integers(1, 3 * ROOM), st.just(ROOM), st.just(-1)), max_size=24))
@settings(max_examples=60)
def test_what_is_borrowed_is_nobody_elses(steps: list[int]) -> None:
    """Borrow so many bytes, or give the oldest back for -1: no two overlap, and in the end all rooms are free."""
    held: list[tuple[int, int]] = []
    for size in steps:
        if size > 0:
            place = compiled(_borrow)(size)
            assert place % 64 == 0
            assert all(place + size <= other or other + length <= place for other, length in held)
            ctypes.memset(place, 0x5A, size)
            held.append((place, size))
        elif held:
            compiled(_give_back)(held.pop(0)[0])
    for place, _ in held:
        compiled(_give_back)(place)
    assert free_rooms() == len(_scratch._taken)


def test_a_room_is_used_again() -> None:
    places = set()
    for _ in range(20):
        place = compiled(_borrow)(ROOM)
        compiled(_give_back)(place)
        places.add(place)
    assert len(places) <= os.cpu_count()  # type: ignore[operator]  # the thread may move from core to core


def test_more_than_there_is_is_refused() -> None:
    assert compiled(_borrow)(1 << 60) == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("winograd", "1x9x9x20 * 3x3x20x24 SAME"),
        ("winograd", "2x20x9x9 * 3x3x20x24 SAME NCHW"),
        ("winograd_rows", "1x9x17x8 * 5x5x8x16 SAME"),
    ],
)
def test_kernels_find_room_when_all_is_taken(name: str, text: str, request: pytest.FixtureRequest) -> None:
    """Who finds every room taken works in other memory, and the result is the same to the last bit."""
    problem, backend = Problem.parse(text), registry.get(name)
    case, config = numbers(problem, 0), Config(backend.configs(problem, "measure")[0], threads=1)
    expected = walls.run(backend, case, config)
    request.getfixturevalue("rooms_taken")
    np.testing.assert_array_equal(walls.run(backend, case, config), expected)


def test_where_address_space_is_short_there_are_no_rooms_and_kernels_work_all_the_same() -> None:
    said = run_well(
        "import mmap\n"
        "class Short(mmap.mmap):\n"
        "    def __new__(cls, file, size, *more, **options):\n"
        "        if size > 1 << 20:\n"
        "            raise OSError(12, 'Cannot allocate memory')\n"
        "        return super().__new__(cls, file, size, *more, **options)\n"
        "mmap.mmap = Short\n"
        "import numpy as np\n"
        "import convdispatch\n"
        "from convdispatch.backends import _scratch\n"
        "x, w = np.ones((1, 9, 9, 32), np.float32), np.ones((3, 3, 32, 32), np.float32)\n"
        "y = convdispatch.conv2d(x, w, padding='VALID', backend='winograd')\n"
        "print(len(_scratch._taken) if hasattr(mmap, 'MADV_HUGEPAGE') else 0, bool(np.allclose(y, 288, rtol=1e-4)))\n"
    )
    assert said.strip() == "0 True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_all_rooms() -> None:
    said = run_well(
        "import os\n"
        "from convdispatch.backends import _scratch\n"
        "_scratch._taken[:, 0] = 1\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(int(_scratch._taken.any()))\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert said.strip() == "0"
