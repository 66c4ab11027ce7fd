"""The fingerprint: what it says of the processor that Numba was told to compile for."""

from collections.abc import Iterator

import pytest

from convdispatch import machine


@pytest.fixture(autouse=True)
def _measured_anew() -> Iterator[None]:
    machine.current.cache_clear()
    yield
    machine.current.cache_clear()


@pytest.mark.parametrize(
    ("features", "isa", "width"),
    [
        ("+avx,+avx2,+fma", {"avx2", "fma"}, 32),
        ("+avx2,+fma,+avx512f,+avx512vnni", {"avx2", "fma", "avx512f", "avx512_vnni"}, 64),
        ("", set(), 16),
    ],
)
def test_it_is_of_what_numba_was_told_to_compile_for(
    monkeypatch: pytest.MonkeyPatch, features: str, isa: set[str], width: int
) -> None:
    here = machine.current()
    if not isa <= set(here.isa) or "asimd" in here.isa:
        pytest.skip("this machine has no such instructions")
    monkeypatch.setenv("NUMBA_CPU_NAME", "x86-64")
    monkeypatch.setenv("NUMBA_CPU_FEATURES", features)
    machine.current.cache_clear()
    told = machine.current()
    assert (set(told.isa), told.vector_bytes) == (isa, width)
    assert told.id != here.id or set(here.isa) == isa
