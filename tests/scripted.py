"""A clock that tests move, and backends that take, do and fail as scripted."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from convdispatch import reference, registry
from convdispatch.arguments import Array
from convdispatch.backend import Backend, Config, Effort, Kernel
from convdispatch.machine import Machine
from convdispatch.problem import Problem
from convdispatch.tuning import problem_race
from convdispatch.tuning.race import Rules

PROBLEM = Problem.parse("1x6x6x2 * 3x3x2x3 SAME")
RULES = Rules(rounds=7, sample_seconds=0.0, race_seconds=1e9)


class FakeClock:
    """A clock that stands still until it is told how long something took; can slow down everything for a while."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slow: Callable[[float], float] = lambda now: 1.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds * self.slow(self.now)


class Scripted(Backend):
    """Right by default, and as slow as its script says."""

    def __init__(self, name: str, clock: FakeClock, seconds: float | Callable[[int], float] = 1.0, **changes: Any):
        self.name = name  # type: ignore[misc]
        self.clock = clock
        self.seconds = seconds
        self.off = 0.0
        self.space = 0
        self.expected: float | None = 1.0
        self.packing = 0.0
        self.fails_in: Callable[[str, int], bool] = lambda where, call: False
        self.error: Callable[[], BaseException] = lambda: ValueError("scripted")
        self.reason: str | None = None
        self.tried: tuple[Config, ...] = (Config(),)
        self.calls = 0
        self.prepared = 0
        for attribute, value in changes.items():
            setattr(self, attribute, value)

    def rejects(self, problem: Problem) -> str | None:
        return self.reason

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Config]:
        return self.tried

    def workspace(self, problem: Problem, config: Config) -> int:
        self.fail("workspace", 0)
        return self.space

    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float | None:
        return self.expected

    def fail(self, where: str, call: int) -> None:
        if self.fails_in(where, call):
            raise self.error()

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:
        self.prepared += 1
        self.fail("prepare", self.prepared)
        self.clock.spend(self.packing)
        kept = np.array(filters)

        def kernel(input: Array, out: Array, residual: Array | None) -> None:
            self.calls += 1
            self.fail("call", self.calls)
            seconds = self.seconds if isinstance(self.seconds, int | float) else self.seconds(self.calls)
            self.clock.spend(seconds * float(config.get("factor", 1.0)))
            self.store(problem, input, kept, out)

        return kernel

    def store(self, problem: Problem, input: Array, filters: Array, out: Array) -> None:
        sums = reference.convolve(problem, input, filters)
        if self.off:
            sums = sums + self.off
        out[...] = sums.astype(out.dtype)


def race_by(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    """Have the tuner race by a clock that tests move, with rules that are quick to run."""
    for name in ("tune_problem", "confirm"):
        monkeypatch.setattr(
            problem_race, name, functools.partial(getattr(problem_race, name), clock=clock, rules=RULES)
        )


def only(*backends: Backend) -> None:
    """Make these the only backends there are."""
    for name in registry.names():
        registry.unregister(name)
    for backend in backends:
        registry.register(backend)
