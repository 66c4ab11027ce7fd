"""What the workers of a test's Dask cluster pretend to be, and what they do instead of racing."""

import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distributed import WorkerPlugin
from quiet import QuietWatch

import convdispatch
from convdispatch import machine, profile_file, quarantine, registry
from convdispatch.backend import Candidate, Config
from convdispatch.errors import BackendError
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Key, Result
from convdispatch.tuning import busy, problem_race, roster
from convdispatch.tuning.problem_race import Outcome

#: Problems are told apart by their batch; of these, each has a fate of its own.
FAILS, RAISES, KILLS_THE_FIRST, KILLS, HANGS, QUARANTINES = 101, 102, 103, 104, 105, 106


@dataclass(frozen=True)
class Part:
    """What one worker pretends to be."""

    host: str = "alpha"
    cpu: str = "One (one)"
    version: str = convdispatch.__version__
    bare: bool = False


@dataclass
class Pretence(WorkerPlugin):
    """A plugin of Dask's workers: by its name, each plays a part, also after it was restarted.

    Attributes:
        parts: the parts by the workers' names.
        folder: where the races leave traces.
        together: a race ends only when so many hosts race at once.
    """

    parts: dict[int, Part]
    folder: Path
    together: int = 1
    name: str = "pretence"
    undo: list[Callable[[], None]] = field(default_factory=list)

    def setup(self, worker: Any) -> None:
        part = self.parts[worker.name]
        real = machine.current()
        self._replace(machine, "current", lambda: replace(real, cpu=part.cpu))
        self._replace(platform, "node", lambda: part.host)
        self._replace(roster, "host", lambda: part.host)
        self._replace(convdispatch, "__version__", part.version)
        self._replace(profile_file, "write", _refuse)
        self._replace(problem_race, "tune_problem", Race(part, self.folder, self.together))
        if part.bare:
            package = sys.modules.pop("convdispatch")
            sys.modules["convdispatch"] = None  # type: ignore[assignment]  # as where it is not installed
            self.undo.append(lambda: sys.modules.update(convdispatch=package))

    def teardown(self, worker: Any) -> None:
        while self.undo:
            self.undo.pop()()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        real = getattr(owner, name)
        setattr(owner, name, value)
        self.undo.append(lambda: setattr(owner, name, real))


def be_quiet() -> None:
    """Have this worker see a machine that nobody else uses."""
    busy.make_watch = QuietWatch


def _refuse(*args: Any) -> None:
    raise AssertionError("a worker wrote a profile")


@dataclass(frozen=True)
class Race:
    """Takes the place of ``tune_problem``: holds its host for a moment, and notices who else does."""

    part: Part
    folder: Path
    together: int

    def __call__(self, key: Key, *, seconds: float | None = None, **more: Any) -> Outcome:
        with (self.folder / "races").open("a") as log:
            log.write(f"{self.part.host} {self.part.cpu.split()[0]} {key.problem.n} {key.deployment} {seconds}\n")
        with self._host():
            self._wait(lambda: len(list(self.folder.glob("racing-*"))) >= self.together)
            (self.folder / f"met-{self.part.host}").touch()  # whoever looks late must not find the others gone
            self._wait(lambda: len(list(self.folder.glob("met-*"))) >= self.together)
            self._meet_fate(key.problem.n)
            time.sleep(0.02)  # a chance for another to come into the way
        result = Result(f"won-on-{self.part.host}", 1, Config(), 1e-3, 0.0, 5, 0.0, 0)
        return Outcome(Entry(key, (result,)), ())

    @contextlib.contextmanager
    def _host(self) -> Iterator[None]:
        held = self.folder / f"racing-{self.part.host}"
        try:
            held.touch(exist_ok=False)
        except FileExistsError:
            (self.folder / f"overlap-{self.part.host}").touch()
        try:
            yield
        finally:
            held.unlink(missing_ok=True)

    def _meet_fate(self, fate: int) -> None:
        if fate == FAILS:
            raise BackendError("no candidate could do it")
        if fate == QUARANTINES and not quarantine.of(direct := registry.get("direct")):
            with (self.folder / "tried").open("a") as log:
                log.write(f"{self.part.host}\n")
            quarantine.add(Candidate(direct, Config()), Problem.parse("1x9x9x4 * 3x3x4x8 SAME"), "crashed")
        if fate == RAISES:
            raise MemoryError("not enough for this")
        first = self.folder / "killed"
        if fate == KILLS or (fate == KILLS_THE_FIRST and not first.exists()):
            first.touch()
            (self.folder / f"racing-{self.part.host}").unlink()
            os._exit(1)
        if fate == HANGS:
            self._wait((self.folder / "released").exists)

    @staticmethod
    def _wait(until: Callable[[], bool]) -> None:
        for _ in range(2000):
            if until():
                return
            time.sleep(0.01)
        raise AssertionError("waited in vain")
