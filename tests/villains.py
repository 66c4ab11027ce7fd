"""Backends that break their contract, each in one way; imported by the child process that tries them."""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from convdispatch import reference
from convdispatch.arguments import Array
from convdispatch.backend import Backend, Config, Kernel, Numerics
from convdispatch.machine import Machine
from convdispatch.problem import Problem

kept: list[Any] = []


class Villain(Backend):
    """Right, unless told to misbehave."""

    def __init__(self, name: str = "villain", behaviour: str = "right", version: int = 1) -> None:
        self.name = name  # type: ignore[misc]
        self.version = version  # type: ignore[misc]
        self.behaviour = behaviour

    def rejects(self, problem: Problem) -> str | None:
        return None

    def workspace(self, problem: Problem, config: Config) -> int:
        return 0

    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float | None:
        return None

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:
        owned = filters if self.behaviour == "keeps filters" else np.array(filters)
        if self.behaviour == "changes filters":
            filters[...] = 0
        if self.behaviour == "remembers filters":
            kept[:] = [owned]

        def kernel(input: Array, out: Array, residual: Array | None) -> None:
            weights = kept[0] if self.behaviour == "remembers filters" else owned
            y = reference.convolve(problem, input, weights).astype(out.dtype)
            MISDEEDS.get(self.behaviour, _nothing)(input, y)
            if self.behaviour == "stores too little":
                out[:, 1:] = y[:, 1:]
                return
            out[...] = y
            if self.behaviour in {"stores before", "stores behind"}:
                at = -8 if self.behaviour == "stores before" else out.nbytes
                ctypes.memset(out.ctypes.data + at, 1, 8)
            if self.behaviour == "reads behind":
                out[0, 0, 0, 0] += ctypes.c_float.from_address(input.ctypes.data + input.nbytes).value * 0

        return kernel


class Wavering(Villain):
    """Says that it is not deterministic."""

    numerics = Numerics(deterministic=False)


def _nothing(input: Array, y: Array) -> None:
    pass


def _sleep(input: Array, y: Array) -> None:
    time.sleep(600)


def _spin(input: Array, y: Array) -> None:
    while True:
        pass


def _grow(input: Array, y: Array) -> None:
    for _ in range(2000):
        kept.append(np.ones(1 << 20, np.uint8))
        time.sleep(0.002)


def _change_input(input: Array, y: Array) -> None:
    input[...] = 0


def _last_bit(input: Array, y: Array) -> None:
    kept.append(None)
    y[...] = np.nextafter(y, y.dtype.type(len(kept) % 2))


def _wrong_second(input: Array, y: Array) -> None:
    kept.append(None)
    if len(kept) > 1:
        y += 1


def _raise(error: BaseException) -> Callable[[Array, Array], None]:
    def act(input: Array, y: Array) -> None:
        raise error

    return act


def _abort(input: Array, y: Array) -> None:
    os.abort()


def _exit(input: Array, y: Array) -> None:
    os._exit(3)


def _be_killed(input: Array, y: Array) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _read_null(input: Array, y: Array) -> None:
    ctypes.string_at(0)


def _leak(input: Array, y: Array) -> None:
    kept.append(np.ones(1 << 18, np.uint8))


def _err(input: Array, y: Array) -> None:
    y += 1


def _print(input: Array, y: Array) -> None:
    sys.stdout.write("{not json\n")
    sys.stdout.flush()


def _take(input: Array, y: Array) -> None:
    np.ones(64 << 20, np.uint8)


def _spoil(input: Array, y: Array) -> None:
    """Leave behind what ends this process when it is asked something again."""
    json.loads = lambda *_: os.abort()


MISDEEDS: dict[str, Callable[[Array, Array], None]] = {
    "aborts": _abort,
    "reads null": _read_null,
    "exits": _exit,
    "is killed": _be_killed,
    "raises": _raise(ValueError("not today")),
    "raises SystemExit": _raise(SystemExit(0)),
    "sleeps": _sleep,
    "spins": _spin,
    "grows": _grow,
    "leaks": _leak,
    "is wrong": _err,
    "is wrong later": _wrong_second,
    "wavers": _last_bit,
    "changes input": _change_input,
    "prints": _print,
    "takes a workspace": _take,
    "spoils its process": _spoil,
}
