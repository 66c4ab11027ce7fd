"""A backend's child process: sends it candidates, watches its time and memory, and judges what comes back."""

import base64
import contextlib
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convdispatch import registry
from convdispatch.arguments import Array
from convdispatch.backend import Backend, Candidate
from convdispatch.problem import Problem, dtype_of
from convdispatch.tuning.child import ChildLostError, start
from convdispatch.tuning.gate import trial
from convdispatch.tuning.trial_folder import TrialFolder

#: Multiply-adds a second below which a candidate counts as hanging.
_CRAWL = 1e7
#: How many times the bytes of arrays and declared workspace a candidate may take.
_ROOM = 16
#: Part of the machine's free memory that is never exceeded.
_FREE = 0.5
#: Seconds for the child to import what it needs.
_START = 60.0
_TICK = 0.02
#: Bytes that a measured workspace may be off: allocators, code that is compiled.
_SLACK = 8 << 20


@dataclass(frozen=True)
class Limits:
    """What a candidate may take in its child process.

    Attributes:
        seconds: for all its runs, the first of which may compile; a problem that is slow for anybody has more.
        memory: bytes above what the process has before; a problem with large arrays has more.
    """

    seconds: float = 20.0
    memory: int = 1 << 30


@dataclass(frozen=True)
class Finding:
    """What came of trying a candidate.

    Attributes:
        reason: None if it may be measured, else why not, as in "crashed (SIGSEGV)".
        lasting: whether that speaks against this version of the backend, and not this candidate alone.
        note: what the user should know besides.
    """

    reason: str | None = None
    lasting: bool = False
    note: str = ""


class UnsentError(Exception):
    """The candidate could not be tried; the message says why."""


class Cell:
    """A backend's child process."""

    def __init__(self, backend: Backend) -> None:
        """Start the process.

        Raises:
            UnsentError: if the backend cannot be sent to it.
        """
        self.process = os.getpid()
        self._served = False
        self._sent = _payload(backend)
        self._folder = TrialFolder()
        try:
            self._child = start(
                "convdispatch.tuning.isolation_worker",
                [os.path.abspath(entry) for entry in sys.path],  # noqa: PTH100  # "" is here
            )
        except ChildLostError as error:  # it is tried here instead
            self._folder.remove()
            raise UnsentError(f"its process {error}") from None

    @property
    def usable(self) -> bool:
        """Whether it can be asked: its process lives, and is this one's."""
        return self.process == os.getpid() and self._child.running

    def run(self, problem: Problem, candidate: Candidate, limits: Limits) -> Finding:
        """Try a candidate; the process is gone afterwards unless it is as good as before.

        Raises:
            UnsentError: if it cannot be tried there.
        """
        try:
            declared = candidate.workspace(problem)
        except Exception as error:  # noqa: BLE001  # whatever a backend raises
            return Finding(f"{type(error).__name__}: {error}")
        seconds = limits.seconds + problem.flops / 2 / _CRAWL
        request = {
            "problem": str(problem), "config": dict(candidate.config), "outputs": self._folder.path,
            "seconds": 2 * seconds + 10,
        }  # fmt: skip
        try:
            before = self._begin(self._sent | request)
            if isinstance(before, Finding):
                finding = before
            else:
                told = self._watched(problem, declared, seconds, before, limits.memory)
                finding = told if isinstance(told, Finding) else self._judged(told, problem, candidate, declared)
        except BaseException:  # an interruption leaves an answer behind that nobody waits for
            self.close()
            raise
        if finding.lasting:  # who knows what it did to its process
            self.close()
        elif self._child.running:
            self._child.pause()
        return finding

    def _begin(self, request: dict[str, Any]) -> int | Finding:
        """Send a request, and return the bytes that the process has when it is ready for it.

        A process that was ready before, and is no more, was spoilt by what ran in it: that is found then.
        """
        try:
            self._child.go_on()
            self._child.send(request)
            told = self._child.receive(_START)
        except (OSError, TimeoutError, ChildLostError) as error:
            if self._served and isinstance(error, ChildLostError):
                return Finding(f"{error}, after a run that had gone well", lasting=True)
            raise UnsentError(str(error) or f"it did not start within {_START:g} s") from None
        if "lost" in told:
            raise UnsentError(told["lost"])
        self._served = True
        return int(told["ready"])

    def _watched(
        self, problem: Problem, declared: int, seconds: float, before: int, memory: int
    ) -> Finding | dict[str, Any]:  # fmt: skip
        """Wait for the answer, and return it, or what was found instead of one."""
        import psutil  # noqa: PLC0415  # needed only where something is tried

        arrays = sum(math.prod(shape) for shape in (problem.input_shape, problem.filter_shape, problem.output_shape))
        room = max(memory, _ROOM * (declared + 8 * arrays))
        limit = min(room, int(_FREE * psutil.virtual_memory().available))
        process = None
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have crashed already
            process = psutil.Process(self._child.pid)
        end = time.monotonic() + seconds
        taken = 0
        while taken <= limit:
            try:
                return self._child.receive(_TICK)
            except ChildLostError as error:
                return self._crashed(str(error))
            except TimeoutError:
                if time.monotonic() > end:
                    return Finding(f"hung: no result within {seconds:.3g} s{self._where()}", lasting=True)
            if process is not None:
                with contextlib.suppress(psutil.Error):
                    taken = process.memory_info().rss - before
        self._child.kill()
        reason = f"took more than {limit >> 20} MiB of memory, and says it needs {declared >> 20} MiB"
        return Finding(reason, lasting=taken > room)

    def _crashed(self, how: str) -> Finding:
        # Only the system kills so, for want of memory, which may not be the backend's fault.
        killed = "(SIGKILL)" in how
        short = re.match(r"crashed \([^)]*\)", how)
        return Finding(f"{short[0] if short else how}{_innermost(self._child.said())}", lasting=not killed)

    def _where(self) -> str:
        """Return where a hanging kernel is, as far as it can be made to tell."""
        with contextlib.suppress(OSError, ChildLostError, TimeoutError, AttributeError):
            os.kill(self._child.pid, signal.SIGABRT)  # the child's fault handler then writes down where it is
            self._child.receive(1.0)
        return _innermost(self._child.said())

    def _judged(self, told: dict[str, Any], problem: Problem, candidate: Candidate, declared: int) -> Finding:
        """Turn the child's last answer into a finding: first of all, its results must be right."""
        if "raised" in told:
            return Finding(told["raised"])
        for when, name in told.get("files", ()):
            file = Path(self._folder.path, name)
            verdict = trial(problem).judge(candidate, _array(problem, file))
            file.unlink()
            if verdict.reason is not None:
                return Finding(f"wrong result {when}: {verdict.reason}", lasting=True)
        if "fault" in told:
            return Finding(told["fault"], lasting=True)
        return Finding(note=_note(candidate, declared, told["workspace"]))

    def close(self) -> None:
        """End the process."""
        if self.process == os.getpid():  # not where this is a copy that a fork made
            self._child.close()
            self._folder.remove()


def _payload(backend: Backend) -> dict[str, str]:
    """Return what makes the backend in another process: its name if it is installed, else the thing itself."""
    if registry.installed(backend):
        return {"name": backend.name}
    import cloudpickle  # noqa: PLC0415

    try:
        return {"pickle": base64.b64encode(cloudpickle.dumps(backend)).decode("ascii")}
    except Exception as error:  # noqa: BLE001  # whatever an object's own pickling may raise
        raise UnsentError(f"it cannot be pickled ({type(error).__name__}: {error})") from None


def _array(problem: Problem, file: Path) -> Array:
    raw = np.frombuffer(file.read_bytes(), np.uint8)
    return raw.view(dtype_of(problem.result_dtype)).reshape(problem.output_shape)


def _innermost(said: str) -> str:
    """Return the innermost line of the traceback that Python's fault handler wrote, in brackets, if there is one."""
    found = re.findall(r'most recent call first\):\n  File "([^"]*)", line (\d+) in (.*)', said)
    if not found:
        return ""
    file, line, function = found[-1]
    return f" in {function} ({Path(file).name}, line {line})"


def _note(candidate: Candidate, declared: int, measured: int) -> str:
    """Return a word on a workspace that is far from what was declared; a plain function has none to declare."""
    if isinstance(candidate.backend, registry.FunctionBackend) or measured <= 2 * declared + _SLACK:
        return ""
    return (
        f"backend {candidate.backend.name!r} says that {candidate} needs {declared >> 10} KiB of workspace, and was "
        f"seen to take {measured >> 10} KiB: memory_limit cannot be kept with it"
    )
