"""A process that runs one engine, and the handle by which the benchmark holds it.

Results are compared through a file. An engine in its own process brings its own thread pools and memory, and may
crash or hang without taking the others along. A worker that is not asked anything is stopped: pools that spin after
a call would take the cores from whoever is measured next.
"""

import contextlib
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convdispatch.errors import LONGEST_REASON, in_a_line
from convdispatch.problem import Problem
from convdispatch.tuning.child import Child, ChildLostError, requests, search_path
from convdispatch.tuning.clock import Clock, system_clock
from convdispatch.tuning.engines import Case, Deployment, Engine, make
from convdispatch.tuning.gate import compared_images
from convdispatch.tuning.race import Run

#: Calls shorter than this are timed several at once.
_CHUNK = 2e-4
#: A call longer than this is timed once a sample.
_SLOW = 0.1
_MOST_CHUNKS = 1000
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
        np.save(output, np.ascontiguousarray(result[compared_images(problem.n)]))
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
    return _cut(f"{type(error).__name__}: {error}")


def _cut(reason: str) -> str:
    return in_a_line(reason, LONGEST_REASON)


def main() -> None:
    """Serve the engine named by the first argument, with as many threads as the second says."""
    asked, reply = requests()
    try:
        engine = make(sys.argv[1], int(sys.argv[2]))
    except Exception as error:  # noqa: BLE001  # not installed, or broken: it is the same to the benchmark
        reply({"reason": _short(error)})
        return
    reply({"version": str(engine.version)})
    server = Server(engine)
    for request in asked:
        reply(server.answer(request))


# The other end of the pipe ------------------------------------------------------------------------------------------


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
        environment = os.environ | {"PYTHONPATH": search_path()} | dict(options)
        command = [python or sys.executable, "-m", "convdispatch.tuning.engine_worker", engine, str(threads)]
        try:
            self._child = Child(command, environment)
        except ChildLostError as error:
            raise EngineLostError(f"{command[0]} {error}") from None
        self.version = self._greeting()
        self._child.pause()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            EngineLostError: if there is none; the process is gone then.
        """
        try:
            self._child.go_on()
            self._child.send(request)
            reply = self._receive()
        except (OSError, EngineLostError) as error:
            reason = str(error) if isinstance(error, EngineLostError) else _cut(self._child.end())
            self.close()
            raise EngineLostError(reason) from None
        self._child.pause()
        return reply

    def cpu_seconds(self) -> float:
        """Return the processor time it has used, 0 where the system does not say."""
        import psutil  # noqa: PLC0415  # the engine's own process does not need it

        with contextlib.suppress(psutil.Error):
            times = psutil.Process(self._child.pid).cpu_times()
            self._cpu = times.user + times.system
        return self._cpu

    def close(self) -> None:
        """End the process."""
        self.cpu_seconds()
        self._child.close()

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

    def _receive(self) -> dict[str, Any]:
        try:
            return self._child.receive(self._timeout)
        except TimeoutError:
            raise EngineLostError(f"gave no answer within {self._timeout:g} s") from None
        except ChildLostError as error:
            raise EngineLostError(_cut(str(error))) from None


if __name__ == "__main__":
    main()
