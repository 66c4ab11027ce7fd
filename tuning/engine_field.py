"""The engines of one benchmark, each in its process, through losses and restarts."""

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from convdispatch import settings
from convdispatch.arguments import Array
from convdispatch.problem import Problem
from convdispatch.tuning.engine_worker import EngineLostError, Worker

#: An engine whose process was lost this often is not started again.
_MOST_LOST = 2


class EngineField:
    """The engines' workers: started, started again when lost, ended."""

    def __init__(self, names: Mapping[str, object], threads: int, timeout: float) -> None:
        """Take the engines' names in order, their threads, and the seconds for each answer; nothing starts yet."""
        self.names = list(names)
        self.versions: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self.workers: dict[str, Worker] = {}
        self._start: Callable[[str], Worker] = lambda name: Worker(name, threads, timeout, _environment(threads))
        self._lost = dict.fromkeys(self.names, 0)
        self._gone = 0.0
        self._folder = tempfile.TemporaryDirectory(prefix="convdispatch-bench-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()
        self._folder.cleanup()

    def ready(self, name: str) -> str | None:
        """Start an engine if it does not run; return the reason if it cannot be had."""
        if name in self.workers or name in self.missing:
            return self.missing.get(name)
        try:
            self.workers[name] = self._start(name)
        except EngineLostError as error:
            self.missing[name] = str(error)
            return str(error)
        self.versions[name] = self.workers[name].version
        return None

    def ask(self, name: str, **request: Any) -> dict[str, Any]:
        """Return an engine's answer; the loss of its process is a reason like any other."""
        try:
            return self.workers[name].ask(**request)
        except EngineLostError as error:
            self._gone += self.workers.pop(name).cpu_seconds()
            self._lost[name] += 1
            if self._lost[name] >= _MOST_LOST:
                self.missing[name] = f"{error}; not started again"
            return {"reason": str(error)}

    def build(self, name: str, problem: Problem) -> tuple[dict[str, Any], Array | None]:
        """Have an engine build its best deployment; return its answer and its result's first and last image."""
        file = Path(self._folder.name) / "result.npy"
        with contextlib.suppress(FileNotFoundError):
            file.unlink()  # another engine's
        if reason := self.ready(name):
            return {"reason": reason}, None
        reply = self.ask(name, do="build", problem=problem.text, output=str(file))
        return reply, None if "reason" in reply else np.load(file)

    def cpu_seconds(self) -> float:
        """Return the processor time of all workers so far."""
        return self._gone + sum(worker.cpu_seconds() for worker in self.workers.values())


def _environment(threads: int) -> dict[str, str]:
    """Return what the workers' environment adds, so that convdispatch there finds what was tuned here."""
    given = {"THREADS": str(threads)}
    if path := settings.current().profile:
        given["PROFILE"] = str(path)
    return {settings.PREFIX + name: value for name, value in given.items()}
