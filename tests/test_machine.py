"""The fingerprint: what it says of the processor that Numba was told to compile for."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import archspec.cpu
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


def test_what_a_hypervisor_hides_does_not_take_the_rest_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one feature of a processor is missing, archspec knows it as one of a common level only."""
    told = SimpleNamespace(vendor="AuthenticAMD", features={"avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16"})
    monkeypatch.setattr(archspec.cpu, "host", lambda: archspec.cpu.TARGETS["x86_64_v4"])
    monkeypatch.setattr("archspec.cpu.detect.detected_info", lambda: told)
    monkeypatch.setattr(machine, "_model", lambda: "family26-model2")
    monkeypatch.delenv("NUMBA_CPU_NAME", raising=False)
    monkeypatch.delenv("NUMBA_CPU_FEATURES", raising=False)
    machine.current.cache_clear()
    here = machine.current()
    assert {"avx512_vnni", "avx512_bf16"} <= set(here.isa)
    assert here.cpu.endswith("(family26-model2)")
    assert here.id.startswith("family26-model2-")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux tells so")
def test_a_model_is_read_where_the_processor_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD\n")
    assert machine._model() == "family25-model17"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "Features\t: fp asimd\n")
    assert machine._model() == ""


def test_a_fingerprint_pickled_here_is_the_same_in_a_process_with_other_string_hashes() -> None:
    here = machine.current()
    hash(here)  # which is kept, and is to stay behind
    program = (
        "import pickle, sys; from convdispatch import machine;"
        "assert {pickle.load(sys.stdin.buffer): 1}[machine.Machine(**machine.current().__getstate__())] == 1"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            input=pickle.dumps(here),
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONHASHSEED": seed},
            timeout=120,
        )
