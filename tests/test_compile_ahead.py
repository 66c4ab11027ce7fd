"""Compiling ahead: each kernel once, by several processes, and as if there were none where they fail."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from scripted import PROBLEM, FakeClock, Scripted

from convdispatch import heuristic, registry
from convdispatch.arguments import Array
from convdispatch.backend import Backend, Candidate, Config, Kernel
from convdispatch.backends._jit import check_wanted
from convdispatch.plan import Plan
from convdispatch.problem import Problem
from convdispatch.tuning import compile_ahead, compile_worker, session
from convdispatch.tuning.child import ChildLostError
from convdispatch.tuning.gate import Trial

ROOT = Path(__file__).parent.parent


class Disk:
    """Which kernels are compiled, and by whom each was."""

    def __init__(self, *, keeps: bool = True) -> None:
        self.keeps = keeps
        self.kernels: set[str] = set()
        self.compiled: list[tuple[str, str]] = []

    def need(self, name: str, who: str) -> None:
        if name not in self.kernels:
            if who == "here":
                check_wanted(name)
            self.compiled.append((name, who))
            if self.keeps:
                self.kernels.add(name)


class Compiled(Scripted):
    """A backend whose plans need kernels: one that they share, and one for each config."""

    def __init__(self, disk: Disk, *, raises: bool = False) -> None:
        super().__init__("compiled", FakeClock())
        self.disk, self.raises = disk, raises

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:
        if self.raises:
            raise ValueError("scripted")
        for name in ("shared", f"kernel {config['size']}"):
            self.disk.need(name, "here")
        return super().prepare(problem, filters, bias, config)


class FakeChild:
    """A child that compiles at once, or is lost."""

    def __init__(self, disk: Disk, *, lost: bool = False) -> None:
        self.disk, self.lost, self.closed = disk, lost, False
        self.request: dict[str, Any] | None = None

    def send(self, request: Mapping[str, Any]) -> None:
        self.request = json.loads(json.dumps(request))

    def receive(self, timeout: float) -> dict[str, Any]:
        if self.lost:
            raise ChildLostError("crashed")
        if self.request is None:
            return {"ready": True}
        self.disk.need(self.request["kernel"], "child")
        return {"done": True}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeChild]]:
    """The children that were started; the usual number of them may be."""
    monkeypatch.setattr(compile_ahead, "_MOST_CHILDREN", 7)
    monkeypatch.setattr(registry, "is_built_in", lambda backend: True)
    monkeypatch.setattr(heuristic, "thread_budget", lambda options: 4)
    started: list[FakeChild] = []
    yield started
    session.end()
    assert all(child.closed for child in started)
    assert not compile_ahead._children._known


def plans(backend: Backend, sizes: int = 3) -> dict[str, Any]:
    arrays = Trial.random(PROBLEM)
    candidates = [Candidate(backend, Config(size=size)) for size in range(sizes)]
    return {candidate.name: plan for candidate, plan in compile_ahead.plans(arrays, candidates)}


def start_of(started: list[FakeChild], disk: Disk, *, lost: bool = False) -> Any:
    def start(module: str) -> FakeChild:
        started.append(FakeChild(disk, lost=lost))
        return started[-1]

    return start


def test_each_kernel_is_compiled_once(monkeypatch: pytest.MonkeyPatch, children: list[FakeChild]) -> None:
    disk = Disk()
    monkeypatch.setattr(compile_ahead, "start", start_of(children, disk))
    found = plans(Compiled(disk))
    assert len(found) == 3
    assert sorted(name for name, _ in disk.compiled) == ["kernel 0", "kernel 1", "kernel 2", "shared"]
    assert disk.compiled[0] == ("shared", "here")  # of one kernel, nothing can be shared out
    before = list(children)
    assert len(plans(Compiled(disk))) == 3
    assert children == before


def test_kernels_for_many_problems_are_compiled_together(
    monkeypatch: pytest.MonkeyPatch, children: list[FakeChild]
) -> None:
    disk, told = Disk(), list[str]()
    disk.kernels.add("shared")
    monkeypatch.setattr(compile_ahead, "start", start_of(children, disk))
    backend = Compiled(disk)
    made: list[Problem] = []
    prepare = backend.prepare

    def counted(problem: Problem, *rest: Any) -> Kernel:
        made.append(problem)
        return prepare(problem, *rest)

    monkeypatch.setattr(backend, "prepare", counted)
    sizes = [PROBLEM.replace(k=k, h=h) for k in (8, 1000) for h in (9, 16)]
    jobs = [compile_ahead.Job(p, Candidate(backend, Config(size=n))) for n, p in enumerate([*sizes, *sizes])]
    compile_ahead.kernels(jobs, told.append)
    assert sorted(name for name, _ in disk.compiled) == [f"kernel {number}" for number in range(8)]
    assert told == ["compiling 8 kernels"]
    assert max(problem.k for problem in made) < 100  # packing a thousand filters would be for nothing
    made.clear()
    compile_ahead.kernels([job._replace(candidate=Candidate(backend, Config(size=0))) for job in jobs], told.append)
    assert len(made) == 1  # once will do for all that are of a kind
    assert len(told) == 1


def test_children_wait_for_the_next_round(monkeypatch: pytest.MonkeyPatch, children: list[FakeChild]) -> None:
    disk = Disk()
    monkeypatch.setattr(compile_ahead, "start", start_of(children, disk))
    for _ in range(5):
        disk.kernels.clear()
        plans(Compiled(disk), 6)
    assert len(children) <= 3


def test_lost_children_are_done_without(monkeypatch: pytest.MonkeyPatch, children: list[FakeChild]) -> None:
    disk = Disk()
    monkeypatch.setattr(compile_ahead, "start", start_of(children, disk, lost=True))
    found = plans(Compiled(disk), 8)
    assert {who for _, who in disk.compiled} == {"here"}
    # What a child had taken when it was lost is left to who needs it.
    assert len(found) >= 8 - len(children)
    assert all(child.closed for child in children)
    before = list(children)
    disk.kernels.clear()
    plans(Compiled(disk), 8)
    assert children == before  # another would be lost, too


def test_a_child_that_does_not_begin_costs_no_kernel(
    monkeypatch: pytest.MonkeyPatch, children: list[FakeChild]
) -> None:
    class Silent(FakeChild):
        def receive(self, timeout: float) -> dict[str, Any]:
            raise TimeoutError

    def start(module: str) -> FakeChild:
        children.append(Silent(disk))
        return children[-1]

    disk = Disk()
    monkeypatch.setattr(compile_ahead, "start", start)
    assert len(plans(Compiled(disk), 8)) == 8
    assert all(child.closed for child in children)


def test_no_child_can_be_started(monkeypatch: pytest.MonkeyPatch, children: list[FakeChild]) -> None:
    def start(module: str) -> FakeChild:
        raise OSError("no more processes")

    disk = Disk()
    monkeypatch.setattr(compile_ahead, "start", start)
    assert len(plans(Compiled(disk))) == 3


def test_what_nobody_keeps_is_not_compiled_again_and_again(
    monkeypatch: pytest.MonkeyPatch, children: list[FakeChild]
) -> None:
    disk = Disk(keeps=False)
    monkeypatch.setattr(compile_ahead, "start", start_of(children, disk))
    assert plans(Compiled(disk)) == {}
    assert len(disk.compiled) == 1


def test_who_raises_is_left_to_who_listens(children: list[FakeChild]) -> None:
    assert plans(Compiled(Disk(), raises=True)) == {}


def test_third_parties_are_not_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Compiled(Disk())
    assert plans(backend) == {}
    assert backend.disk.compiled == []


def test_an_interrupt_ends_the_children(monkeypatch: pytest.MonkeyPatch, children: list[FakeChild]) -> None:
    disk, at_work, ended = Disk(), threading.Event(), threading.Event()
    disk.kernels.add("shared")

    class Slow(FakeChild):
        def receive(self, timeout: float) -> dict[str, Any]:
            if self.request is None:
                return {"ready": True}
            at_work.set()
            assert ended.wait(20)
            raise ChildLostError("killed")

        def close(self) -> None:
            super().close()
            ended.set()

    def start(module: str) -> FakeChild:
        children.append(Slow(disk))
        return children[-1]

    def interrupted(problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:
        disk.need(f"kernel {config['size']}", "here")
        at_work.wait(20)
        raise KeyboardInterrupt

    backend = Compiled(disk)
    monkeypatch.setattr(backend, "prepare", interrupted)
    monkeypatch.setattr(compile_ahead, "start", start)
    with pytest.raises(KeyboardInterrupt):
        plans(backend)
    assert ended.is_set()


SCRIPT = """
import sys
import convdispatch
from convdispatch.backends import _machine_code
from convdispatch.tuning.warmup import warm_up

compiled, compile_one = [], _machine_code._compile
def counted(signature, function):
    compiled.append(function)
    return compile_one(signature, function)
_machine_code._compile = counted
others = set(convdispatch.registry.names()) - {"depthwise"}
with convdispatch.options(forbid=tuple(others), threads=2):
    warm_up("1x8x40x16 * 3x3x1x16 SAME groups=16")
    print(len(compiled))
    warm_up("1x8x40x16 * 3x3x1x16 SAME groups=16")
    print(len(compiled))
"""


def test_real_children_compile_what_this_process_then_loads(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    here, again = map(int, done.stdout.split())
    kept = len(list(cache.glob("*.kernel")))
    assert 0 < here < kept
    assert again == here


@pytest.mark.parametrize("epilogue", ["", " +bias", " +bias +residual +relu"])
def test_the_child_needs_no_arrays(monkeypatch: pytest.MonkeyPatch, epilogue: str) -> None:
    made: list[Plan] = []
    monkeypatch.setattr(Plan, "complete", lambda plan: made.append(plan))  # noqa: PLW0108  # to be a method
    problem = f"1x4x4x2 * 3x3x2x3 SAME{epilogue}"
    Trial.random(Problem.parse(problem)).plan(Candidate(registry.get("direct"), Config()))  # compiled from here on
    compile_worker._compile({"kernel": "none", "problem": problem, "backend": "direct", "config": {}})
    assert [str(plan.problem) for plan in made] == [problem]


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch, children: list[FakeChild]) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    disk = Disk()
    monkeypatch.setattr(threading.Thread, "start", start)
    assert len(plans(Compiled(disk))) == 3
    assert {who for _, who in disk.compiled} == {"here"}
