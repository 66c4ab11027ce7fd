"""Compiles the kernels that candidates lack side by side: one in this process, and others in child processes.

A process compiles one kernel at a time, whatever its threads do; but machine code is kept on disk, so it does not
matter who compiled it. That a kernel is lacking is found out by making plans while nothing may be compiled: what one
asks for first is compiled, each kernel once, and then they try again. Whatever goes wrong on the way is no error: the
kernel is compiled by who needs it, as if there were no other processes.
"""

import collections
import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping

from convdispatch import heuristic, registry, settings
from convdispatch.backend import Candidate
from convdispatch.backends._jit import NotCompiledError, compiling_only
from convdispatch.locks import module_lock
from convdispatch.plan import Plan
from convdispatch.problem import Problem
from convdispatch.tuning.child import Child, ChildLostError, start
from convdispatch.tuning.gate import Trial

#: Each child takes a quarter of a gigabyte.
_MOST_CHILDREN = 7
#: Seconds after which a child is given up that does not begin, or not end with a kernel.
_PATIENCE_AT_START, _PATIENCE = 20.0, 60.0

_Jobs = collections.deque[tuple[str, Candidate]]


def plans(arrays: Trial, candidates: Iterable[Candidate]) -> Iterator[tuple[Candidate, Plan]]:
    """Yield candidates with their plans, as soon as all kernels of one are compiled.

    Of built-in backends only; and who raises is left out, to raise again where somebody listens.
    """
    waiting = [each for each in candidates if registry.is_built_in(each.backend)]
    seen: set[str] = set()
    while waiting:
        lacking: dict[str, Candidate] = {}
        unfinished = []
        for candidate in waiting:
            try:
                yield candidate, _plan(arrays, candidate, ())
            except NotCompiledError as error:
                lacking.setdefault(error.name, candidate)
                unfinished.append((error.name, candidate))
            except Exception:  # noqa: BLE001, S112  # whatever a backend raises
                continue
        for name in seen.intersection(lacking):  # compiled in vain: a child was lost, or no folder keeps it
            del lacking[name]
        waiting = [candidate for name, candidate in unfinished if name in lacking]
        seen.update(lacking)
        _compile(arrays, lacking)


def close() -> None:
    """End the child processes; who needs some again starts others."""
    with _lock:
        _children.close()


def _plan(arrays: Trial, candidate: Candidate, kernels: Iterable[str]) -> Plan:
    with compiling_only(frozenset(kernels)):
        plan = arrays.plan(candidate)
        plan.complete()
    return plan


def _compile(arrays: Trial, lacking: Mapping[str, Candidate]) -> None:
    """Compile kernels, each by way of a candidate that needs it."""
    jobs = collections.deque(lacking.items())
    helpers = max(1, min(heuristic.thread_budget(settings.current()), len(jobs), 1 + _MOST_CHILDREN)) - 1
    with _lock, _children.taking(jobs, arrays.problem, helpers):
        while job := _next(jobs):
            kernel, candidate = job
            with contextlib.suppress(Exception):  # it raises again where somebody listens
                _plan(arrays, candidate, {kernel})


def _next(jobs: _Jobs) -> tuple[str, Candidate] | None:
    try:
        return jobs.popleft()
    except IndexError:  # the others were faster
        return None


class _Children:
    """Child processes that compile; they wait from one time to the next. If one is lost, no more are started."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._known: dict[int, Child] = {}
        self._lost = False

    @contextlib.contextmanager
    def taking(self, jobs: _Jobs, problem: Problem, count: int) -> Iterator[None]:
        """Have so many children take jobs within this block; what they have taken is done, or given up, at its end."""
        self._know_own()
        if not count:
            yield
            return
        threads = [threading.Thread(target=self._take, args=(jobs, problem, number)) for number in range(count)]
        begun = []
        try:
            with contextlib.suppress(RuntimeError):  # no more threads, or the program is about to end
                for thread in threads:
                    thread.start()
                    begun.append(thread)
            yield
        except BaseException:
            jobs.clear()
            self.close()
            raise
        finally:
            for thread in begun:
                thread.join()

    def _take(self, jobs: _Jobs, problem: Problem, number: int) -> None:
        """Pass jobs on to a child until there are no more, or the child is lost."""
        try:
            if number not in self._known:
                if self._lost:
                    return
                self._known[number] = start("convdispatch.tuning.compile_worker")
                self._known[number].receive(_PATIENCE_AT_START)
            child = self._known[number]
            while job := _next(jobs):
                kernel, candidate = job
                child.send(
                    {
                        "kernel": kernel, "problem": str(problem), "backend": candidate.backend.name,
                        "config": dict(candidate.config),
                    }
                )  # fmt: skip
                child.receive(_PATIENCE)
        except (OSError, ChildLostError):  # TimeoutError is an OSError
            self._lost = True
            if lost := self._known.pop(number, None):
                lost.close()

    def _know_own(self) -> None:
        """Forget the children of the process that this one was forked from."""
        if self._process != os.getpid():
            self.__init__()  # type: ignore[misc]

    def close(self) -> None:
        """End them."""
        self._know_own()
        self._lost = False
        while self._known:
            _, child = self._known.popitem()
            child.close()


_children = _Children()
_lock = module_lock()
