"""A process that runs one engine, and the handle by which the benchmark holds it.

Requests and replies are lines of JSON on the worker's stdin and stdout; results are compared through a file. An
engine in its own process brings its own thread pools and memory, and may crash or hang without taking the others
along. A worker that is not asked anything is stopped: pools that spin after a call would take the cores from
whoever is measured next.
"""

import contextlib
import ctypes
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convdispatch.problem import Problem
from convdispatch.tuning.clock import Clock, system_clock
from convdispatch.tuning.engines import Case, Deployment, Engine, make
from convdispatch.tuning.race import Run

#: Calls shorter than this are timed several at once.
_CHUNK = 2e-4
#: A call longer than this is timed once a sample.
_SLOW = 0.1
_MOST_CHUNKS = 1000
#: Seconds that idle pools spin at most, where idle processes cannot be stopped.
_SPIN = 0.15
_REASON = 300
#: Seconds in which a worker that says no more has to end by itself.
_LAST_WORDS = 5.0
#: Seconds of a sample that decides between deployments, and how many more there are for those that are close.
_TRIAL, _TRIALS = 0.005, 2


def sample(run: Run, seconds: float, clock: Clock = system_clock) -> tuple[float, int]:
    """Return the median seconds of a call over about this much time, and how many calls; the first is not timed."""
    once = _SLOW
    for _ in range(2):  # the first is for caches and sleeping threads; where calls are quick, a second tells how many
        before = clock()
        run()
        once = max(clock() - before, 1e-9)
        if once > _SLOW:
            break
    chunk = max(1, round(_CHUNK / once))
    chunks = max(1 if once > _SLOW else 3, min(_MOST_CHUNKS, round(seconds / (once * chunk))))
    times = []
    for _ in range(chunks):
        before = clock()
        for _ in range(chunk):
            run()
        times.append((clock() - before) / chunk)
    return statistics.median(times), chunk * chunks


# Inside the worker --------------------------------------------------------------------------------------------------


class Server:
    """Answers requests with one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ready: Deployment | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Build what is asked or take a sample of it; any error is the reply's reason."""
        try:
            if request["do"] == "build":
                return self._build(Problem.parse(request["problem"]), Path(request["output"]))
            assert self._ready is not None, "sample before build"  # noqa: S101
            seconds, calls = sample(self._ready.run, request["seconds"])
        except Exception as error:  # noqa: BLE001  # whatever an engine raises is its result
            return {"reason": _short(error)}
        return {"seconds": seconds, "calls": calls}

    def _build(self, problem: Problem, output: Path) -> dict[str, Any]:
        self._ready = None
        if reason := self._engine.rejects(problem):
            return {"reason": reason}
        built: dict[str, Deployment] = {}
        failed: dict[str, str] = {}
        for name, build in self._engine.deployments(Case.of(problem)).items():
            try:
                built[name] = build()
                built[name].run()
            except Exception as error:  # noqa: BLE001  # one way less
                built.pop(name, None)
                failed[name] = _short(error)
        if not built:
            return {"reason": "; ".join(f"{name}: {why}" for name, why in failed.items()) or "no way to run it"}
        times = _tried(built) if len(built) > 1 else {}
        best = min(built, key=lambda name: times.get(name, 0.0))
        self._ready = built[best]
        result = self._ready.result(self._ready.run())
        np.save(output, np.ascontiguousarray(result[sorted({0, problem.n - 1})]))
        return {"deployment": best, "tried": times, "passed_over": failed}


def _tried(built: Mapping[str, Deployment]) -> dict[str, float]:
    """Return the best sample of each deployment; who is twice as slow as the fastest has but one."""
    times = {name: sample(deployment.run, _TRIAL)[0] for name, deployment in built.items()}
    near = [name for name in built if times[name] < 2 * min(times.values())]
    for _ in range(_TRIALS if len(near) > 1 else 0):
        for name in near:
            times[name] = min(times[name], sample(built[name].run, _TRIAL)[0])
    return times


def _short(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", _REASON, placeholder=" ...")


def main() -> None:
    """Serve the engine named by the first argument, with as many threads as the second says."""
    _die_with_parent()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what an engine prints is no reply

    def reply(data: Mapping[str, Any]) -> None:
        replies.write(json.dumps(data) + "\n")
        replies.flush()

    try:
        engine = make(sys.argv[1], int(sys.argv[2]))
    except Exception as error:  # noqa: BLE001  # not installed, or broken: it is the same to the benchmark
        reply({"reason": _short(error)})
        return
    reply({"version": str(engine.version)})
    server = Server(engine)
    for line in sys.stdin:
        reply(server.answer(json.loads(line)))


def _die_with_parent() -> None:
    """Ask Linux to end this process, stopped or not, when the benchmark ends in whatever way."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)


# The other end of the pipe ------------------------------------------------------------------------------------------


def _search_path() -> str:
    """Return where the worker finds convdispatch if it is not installed, also for another interpreter."""
    root = Path(sys.modules[Problem.__module__].__file__ or "").absolute().parent.parent
    given = os.environ.get("PYTHONPATH", "")
    installed = root.name in {"site-packages", "dist-packages"}  # another interpreter must not see these
    return os.pathsep.join(path for path in ("" if installed else str(root), given) if path)


class EngineLostError(Exception):
    """A worker crashed or did not answer in time; the message says which."""


class Worker:
    """One engine's process, stopped unless it is being asked something."""

    def __init__(self, name: str, threads: int, timeout: float, options: Mapping[str, str]) -> None:
        """Start the process.

        Args:
            name: the engine, or ``engine@python`` for one that is installed for another interpreter.
            threads: how many threads it is to use.
            timeout: seconds for each answer.
            options: additions to the environment.

        Raises:
            EngineLostError: if the engine cannot be had; the message is the reason.
        """
        self._timeout = timeout
        self._cpu = 0.0
        engine, _, python = name.partition("@")
        environment = os.environ | {"PYTHONPATH": _search_path()} | dict(options)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the worker
        command = [python or sys.executable, "-m", "convdispatch.tuning.engine_worker", engine, str(threads)]
        try:
            self._process = subprocess.Popen(  # noqa: S603  # this interpreter or the one the user names
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise EngineLostError(f"{python}: {error.strerror}") from None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.version = self._greeting()
        self._pause()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            EngineLostError: if there is none; the process is gone then.
        """
        try:
            self._signal("SIGCONT")
            assert self._process.stdin is not None  # noqa: S101  # for the type checker
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._receive()
        except (OSError, EngineLostError) as error:
            reason = str(error) if isinstance(error, EngineLostError) else self._end()
            self.close()
            raise EngineLostError(reason) from None
        self._pause()
        return reply

    def cpu_seconds(self) -> float:
        """Return the processor time it has used, 0 where the system does not say."""
        with contextlib.suppress(OSError, ValueError):
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
            self._cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return self._cpu

    def close(self) -> None:
        """End the process."""
        self.cpu_seconds()
        self._kill()
        self._process.wait()
        self._reader.join(timeout=1)
        # A stream that is still being read cannot be closed: something that the engine started has outlived it.
        output = None if self._reader.is_alive() else self._process.stdout
        for stream in (self._process.stdin, output, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _kill(self) -> None:
        """End the process and what it forked: a library's helper would keep the pipe open."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # it leads a session, so this is its group
        self._process.kill()

    def _greeting(self) -> str:
        """Return the engine's version, which is the first thing that a worker says."""
        try:
            first = self._receive()
        except EngineLostError:
            self.close()
            raise
        if "reason" in first:
            self.close()
            raise EngineLostError(str(first["reason"]))
        return str(first["version"])

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101  # for the type checker
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self._timeout)
        except queue.Empty:
            raise EngineLostError(f"gave no answer within {self._timeout:g} s") from None
        if not line:
            raise EngineLostError(self._end())
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _end(self) -> str:
        """Return how the process ended, with the last line that it wrote."""
        try:
            code = self._process.wait(timeout=_LAST_WORDS)
        except subprocess.TimeoutExpired:  # it cannot answer any more, but still runs
            self._kill()
            code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read()[-2000:].decode(errors="replace").strip().splitlines()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return textwrap.shorten(f"crashed ({how}){f': {said[-1]}' if said else ''}", _REASON, placeholder=" ...")

    def _pause(self) -> None:
        if hasattr(signal, "SIGSTOP"):
            self._signal("SIGSTOP")
        else:
            time.sleep(_SPIN)

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):
            self._process.send_signal(getattr(signal, name))


if __name__ == "__main__":
    main()
