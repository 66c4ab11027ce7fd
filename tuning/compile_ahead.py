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
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from convdispatch import heuristic, registry, settings
from convdispatch.backend import Candidate
from convdispatch.backends._jit import NotCompiledError, compiling_only
from convdispatch.locks import module_lock
from convdispatch.plan import Plan
from convdispatch.problem import Problem
from convdispatch.tuning.child import Child, ChildLostError, start
from convdispatch.tuning.compile_worker import need
from convdispatch.tuning.gate import Trial

#: Each child takes a quarter of a gigabyte.
_MOST_CHILDREN = 7
#: Seconds after which a child is given up that does not begin, or not end with a kernel.
_PATIENCE_AT_START, _PATIENCE = 20.0, 60.0


class Job(NamedTuple):
    """Who is to have all its kernels, and for what."""

    problem: Problem
    candidate: Candidate


_Kernels = collections.deque[tuple[str, Job]]
_Made = TypeVar("_Made")


def plans(arrays: Trial, candidates: Iterable[Candidate]) -> Iterator[tuple[Candidate, Plan]]:
    """Yield candidates with their plans, as soon as all kernels of one are compiled.

    Of built-in backends only; and who raises is left out, to raise again where somebody listens.
    """

    def make(job: Job) -> Plan:
        with compiling_only(()):
            plan = arrays.plan(job.candidate)
            plan.complete()
        return plan

    for job, plan in _ready([Job(arrays.problem, candidate) for candidate in candidates], make):
        yield job.candidate, plan


def kernels(jobs: Iterable[Job], on_wait: Callable[[str], object] = lambda _: None) -> None:
    """Compile what candidates lack for many problems: the more at once, the better it is shared out.

    Args:
        jobs: who is to have all its kernels. Some may still be lacking afterwards: it is not tried for every shape.
        on_wait: told in words how many kernels are compiled next.
    """
    alike = {_kind(job): job for job in jobs}
    for _ in _ready(map(_smaller, alike.values()), lambda job: need(*job, ()), on_wait):
        pass


def close() -> None:
    """End the child processes; who needs some again starts others."""
    with _lock:
        _children.close()


#: Filters that are enough to have any kernel: more than any tile is wide.
_FILTERS = 96


def _kind(job: Job) -> tuple[object, ...]:
    """Return what is the same for jobs that need the same kernels: not sizes, but for those that decide about tiles."""
    p, candidate = job
    config = tuple((key, value) for key, value in candidate.config.items() if key != "threads")
    layout = p.dtype, p.data_format, p.epilogue, p.groups > 1, p.groups == p.c, p.group_c if p.groups > 1 else 0
    return candidate.backend.name, config, layout, p.kh, p.kw, p.strides, p.dilations, p.ow


def _smaller(job: Job) -> Job:
    """Return a job that needs the same kernels, with fewer filters to be packed."""
    p = job.problem
    return Job(p.replace(k=min(p.k, _FILTERS)), job.candidate) if p.groups == 1 else job


def _ready(
    jobs: Iterable[Job], make: Callable[[Job], _Made], on_wait: Callable[[str], object] = lambda _: None
) -> Iterator[tuple[Job, _Made]]:
    """Yield jobs with what is made of them, as soon as all kernels of one are compiled."""
    waiting = [job for job in jobs if registry.is_built_in(job.candidate.backend)]
    seen: set[str] = set()
    while waiting:
        lacking: dict[str, Job] = {}
        unfinished = []
        for job in waiting:
            try:
                yield job, make(job)
            except NotCompiledError as error:
                lacking.setdefault(error.name, job)
                unfinished.append((error.name, job))
            except Exception:  # noqa: BLE001, S112  # whatever a backend raises
                continue
        for name in seen.intersection(lacking):  # compiled in vain: a child was lost, or no folder keeps it
            del lacking[name]
        waiting = [job for name, job in unfinished if name in lacking]
        seen.update(lacking)
        if lacking:
            on_wait(f"compiling {len(lacking)} kernel{'s' * (len(lacking) > 1)}")
            _compile(lacking)


def _compile(lacking: Mapping[str, Job]) -> None:
    """Compile kernels, each by way of a candidate that needs it."""
    wanted = collections.deque(lacking.items())
    helpers = max(1, min(heuristic.thread_budget(settings.current()), len(wanted), 1 + _MOST_CHILDREN)) - 1
    with _lock, _children.taking(wanted, helpers):
        while job := _next(wanted):
            kernel, (problem, candidate) = job
            with contextlib.suppress(Exception):  # it raises again where somebody listens
                need(problem, candidate, {kernel})


def _next(wanted: _Kernels) -> tuple[str, Job] | None:
    try:
        return wanted.popleft()
    except IndexError:  # the others were faster
        return None


class _Children:
    """Child processes that compile; they wait from one time to the next. If one is lost, no more are started."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._known: dict[int, Child] = {}
        self._lost = False

    @contextlib.contextmanager
    def taking(self, wanted: _Kernels, count: int) -> Iterator[None]:
        """Have so many children take kernels in this block; what they have taken is done, or given up, at its end."""
        self._know_own()
        if not count:
            yield
            return
        threads = [threading.Thread(target=self._take, args=(wanted, number)) for number in range(count)]
        begun = []
        try:
            with contextlib.suppress(RuntimeError):  # no more threads, or the program is about to end
                for thread in threads:
                    thread.start()
                    begun.append(thread)
            yield
        except BaseException:
            wanted.clear()
            self.close()
            raise
        finally:
            for thread in begun:
                thread.join()

    def _take(self, wanted: _Kernels, number: int) -> None:
        """Pass kernels on to a child until there are no more, or the child is lost."""
        try:
            if number not in self._known:
                if self._lost:
                    return
                self._known[number] = start("convdispatch.tuning.compile_worker")
                self._known[number].receive(_PATIENCE_AT_START)
            child = self._known[number]
            while job := _next(wanted):
                kernel, (problem, candidate) = job
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
