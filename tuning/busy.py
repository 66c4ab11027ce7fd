"""Whether others use the machine: what is timed meanwhile says little about it when it is quiet.

A fixed piece of work is timed again and again between whatever is measured, and the system's own account of its
cores is read where there is one. The piece is also run by several threads at once, right after one thread alone: where
a core is missing that ratio shows it, though nothing that runs in one thread became slower. That case matters most to
a tuner, since it would write down one-thread winners.
"""

import contextlib
import hashlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from convdispatch import machine
from convdispatch.backends._threads import run_all
from convdispatch.errors import BusyMachineError
from convdispatch.times import spread

#: Rounds of hashing in the piece of work: about a millisecond.
_HASHES = 4000
#: Core seconds below which the system's account is too coarse.
_ENOUGH = 0.5
#: Calibrations that there always are, and the part of the time that more of them may take.
_FEWEST, _SHARE = 7, 0.05
#: Seconds that tuning waits for a busy machine to become quiet, before it refuses.
PATIENCE = 10.0
#: Seconds of one look at the machine, between its calibrations, and between two looks.
_LOOK, _PAUSE, _BETWEEN = 0.3, 0.02, 0.7

#: From which on a machine was busy. A machine whose cores differ in speed, or share their arithmetic, loses up to a
#: third when all threads run; one of two cores that is taken away is a half.
LIMITS = {"spread": 0.10, "waiting": 0.05, "others": 0.10, "steal": 0.02, "missing": 0.42, "load": 0.25}
_WORDS = {
    "spread": "a fixed loop's time varied by {:.1%}",
    "waiting": "a fixed loop waited for a core for {:.1%} of its time",
    "others": "other processes used {:.1%} of the cores",
    "steal": "the hypervisor kept {:.1%} of the cores",
    "missing": "{:.1%} of the threads' speed was missing when all ran",
    "load": "other tasks wanted {:.1%} of the cores",
}


#: Use of the cores by others that is none.
_IDLE = 0.02


@dataclass(frozen=True)
class Conditions:
    """What the machine was like during a measurement, as parts of 1; None where the system does not say.

    Attributes:
        spread: interquartile range of the calibration loop's times over their median.
        waiting: part of the loop's time in which this process did not run.
        others: part of the usable cores' time that processes other than ours used.
        steal: part of it that the hypervisor gave to others.
        missing: by how much threads that run at once are each slower than one alone.
        load: tasks of others that ran or waited to run, over all cores of the machine.
    """

    spread: float
    waiting: float
    others: float | None = None
    steal: float | None = None
    missing: float | None = None
    load: float | None = None

    def complaints(self) -> list[str]:
        """Return in words what says that the machine was busy; nothing if it was quiet.

        Tasks that seem to run count only where nobody tells how much of the cores they used, or where they used some:
        a glance may catch an engine that is just being stopped.
        """
        values = {name: getattr(self, name) for name in LIMITS}
        if self.others is not None and self.others < _IDLE:
            del values["load"]
        return [
            _WORDS[name].format(value) for name, value in values.items() if value is not None and value > LIMITS[name]
        ]


@dataclass(frozen=True)
class Ticks:
    """Seconds of the usable cores since the system started: worked, kept by the hypervisor, in all."""

    worked: float
    stolen: float
    total: float


class Watch:
    """Watches the machine from ``start`` to ``stop``; tests replace ``loop``, ``together``, ``ticks``, ``tasks``."""

    def __init__(self, threads: int = 1) -> None:
        """Make a watch.

        Args:
            threads: how many threads are to run at once; whether they can is not asked for 1.
        """
        self.threads = threads
        self._loops: list[tuple[float, float]] = []
        self._missing: list[float] = []
        self._load: list[float] = []
        self._before: tuple[Ticks | None, float] = (None, 0.0)
        self._began = self._spent = 0.0

    def start(self, workers: float = 0.0) -> None:
        """Begin, being told the processor seconds of our other processes so far."""
        self._began = self.now()
        self._before = self.ticks(), workers + time.process_time()

    def calibrate(self) -> None:
        """Run the loop once; by one thread, then by all."""
        before = self.now()
        wall, cpu = self.loop()
        self._loops.append((wall, cpu))
        if (load := self.tasks()) is not None:
            self._load.append(load)
        if self.threads > 1:
            self._missing.append(1 - wall / self.together())
        self._spent += self.now() - before

    def glance(self) -> None:
        """Calibrate, unless that was done often enough and would take too much of the time."""
        if len(self._loops) < _FEWEST or self._spent < _SHARE * (self.now() - self._began):
            self.calibrate()

    def stop(self, workers: float = 0.0) -> Conditions:
        """Return what the machine was like."""
        (before, used), after = self._before, self.ticks()
        others = steal = None
        if before is not None and after is not None and (total := after.total - before.total) > _ENOUGH:
            ours = workers + time.process_time() - used
            others = max(0.0, after.worked - before.worked - ours) / total
            steal = (after.stolen - before.stolen) / total
        missing = statistics.median(self._missing) if self._missing else None
        load = statistics.median(self._load) if self._load else None
        walls = [wall for wall, _ in self._loops]
        if len(walls) < 2:
            return Conditions(0.0, 0.0, others, steal, missing, load)
        waiting = max(0.0, 1 - sum(cpu for _, cpu in self._loops) / sum(walls))
        return Conditions(spread(walls), waiting, others, steal, missing, load)

    def finish(self, workers: float = 0.0) -> Conditions:
        """Stop, having calibrated often enough."""
        while len(self._loops) < _FEWEST:
            self.calibrate()
        return self.stop(workers)

    def look(self) -> Conditions:
        """Return what the machine is like while nothing of ours runs; takes a third of a second."""
        self.start()
        while self.now() - self._began < _LOOK or len(self._loops) < _FEWEST:
            self.calibrate()
            self.pause(_PAUSE)
        return self.stop()

    def now(self) -> float:
        """Return the time in seconds."""
        return time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leave the machine to others."""
        time.sleep(seconds)

    def loop(self) -> tuple[float, float]:
        """Do the fixed piece of work; return its time by the clock and by the processor."""
        wall, cpu = time.perf_counter(), time.thread_time()
        _work()
        return time.perf_counter() - wall, time.thread_time() - cpu

    def together(self) -> float:
        """Return the seconds in which each of the threads does the piece of work, all at once.

        No more than there are cores for: that more take turns says nothing of others.
        """
        count = min(self.threads, machine.usable_cores())
        before = time.perf_counter()
        run_all([_work] * count, count)
        return time.perf_counter() - before

    def tasks(self) -> float | None:
        """Return how many tasks besides this one run or wait on Linux, over all cores; None elsewhere."""
        try:
            running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
        except (OSError, ValueError, IndexError):
            return None
        return max(0, running - 1) / (os.cpu_count() or 1)

    def ticks(self) -> Ticks | None:
        """Read Linux's account of the cores that this process may use; None elsewhere."""
        try:
            usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
            rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
            cores = [[int(value) for value in row[1:9]] for row in rows if row and row[0] in usable]
            second = os.sysconf("SC_CLK_TCK")
            user, nice, system, _, _, irq, soft, steal = (sum(column) / second for column in zip(*cores, strict=True))
        except (AttributeError, OSError, ValueError):
            return None
        return Ticks(user + nice + system + irq + soft, steal, sum(map(sum, cores)) / second)


def _work() -> None:
    """A chain of hashes: in registers, so that caches do not matter, and without the interpreter's lock."""
    hashlib.pbkdf2_hmac("sha256", b"convdispatch", b"calibration", _HASHES)


def children_seconds() -> float:
    """Return the processor seconds of our child processes, and of theirs: of those that live, and of those that lived.

    Those of who has ended are its parent's to tell, so that they count once and for good.
    """
    import psutil  # noqa: PLC0415  # needed only where something is validated

    times = os.times()
    seconds = times.children_user + times.children_system
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            told = child.cpu_times()
            ended = getattr(told, "children_user", 0.0) + getattr(told, "children_system", 0.0)
            seconds += told.user + told.system + ended
    return seconds


#: Makes what watches the machine for a thread budget; tests replace it.
make_watch: Callable[[int], Watch] = Watch


def since(make: Callable[[], Watch], workers: Callable[[], float] = children_seconds) -> Callable[[], str]:
    """Return what tells, each time it is called, what says that the machine was busy since the time before.

    Args:
        make: makes what watches.
        workers: tells the processor seconds of our other processes so far.
    """
    watch = make()
    watch.start(workers())

    def tell() -> str:
        nonlocal watch
        said = ", ".join(watch.finish(workers()).complaints())
        watch = make()
        watch.start(workers())
        return said

    return tell


def wait_until_quiet(make: Callable[[], Watch], seconds: float, tell: Callable[[str], None]) -> list[str]:
    """Look at the machine until it is quiet, or this much time has passed.

    Args:
        make: makes what looks, anew for each look.
        seconds: how long to wait for a quiet moment.
        tell: is told once, in words, what is waited for.

    Returns:
        What the last look had to complain of; nothing if the machine is quiet.
    """
    first = watch = make()
    began = first.now()
    while complaints := watch.look().complaints():
        if first.now() - began >= seconds:
            break
        if watch is first:
            tell(f"the machine is busy ({', '.join(complaints)}); waiting up to {seconds:.0f} s for a quiet moment")
        watch.pause(_BETWEEN)
        watch = make()
    return complaints


def refuse_if_busy(threads: int, seconds: float, on_wait: Callable[[str], None] | None = None) -> None:
    """Wait for a quiet moment, for so many seconds; raise a ``BusyMachineError`` if there is none."""
    complaints = wait_until_quiet(lambda: make_watch(threads), seconds, on_wait or (lambda _: None))
    if complaints:
        raise BusyMachineError(
            f"the machine is busy: {', '.join(complaints)}. What is measured now may be wrong when it is quiet: "
            "try again then, or measure anyway with --allow-busy (allow_busy=True), which marks the results"
        )


def is_quiet(threads: int, seconds: float) -> bool:
    """Return whether there is a quiet moment within so many seconds."""
    return not wait_until_quiet(lambda: make_watch(threads), seconds, lambda _: None)
