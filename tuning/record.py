"""Recording: what a program really calls, how often and for how long, as a workload to tune.

A recording is process-wide: the calls of all threads count, those of worker threads too. A call that another call
makes inside, or that tuning makes to measure, is not the program's and does not count. Nor does what only a first call
waits for: it counts as long as the later ones of its kind do on average.
"""

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from convdispatch import observe, safe_file, settings
from convdispatch.errors import ConvDispatchError, WorkloadError, warn
from convdispatch.locks import module_lock
from convdispatch.problem import Problem
from convdispatch.tuning import workload as workloads
from convdispatch.tuning.workload import Layer, Workload

#: A recording of a whole program is written at its end, and this often before: not every program ends well.
_SECONDS_BETWEEN_WRITES = 30.0


#: What a call is counted under: its problem, deployment and thread budget.
_Key = tuple[Problem, str, int | None]


@dataclass(frozen=True, slots=True)
class Tally:
    """How often one thing was called, and for how long.

    Attributes:
        first: calls that began before the first one had ended. They may have waited for a compiler, an import or a
            race, which no later call does.
        first_seconds: what those took.
        later, later_seconds: all others.
    """

    first: int = 0
    first_seconds: float = 0.0
    later: int = 0
    later_seconds: float = 0.0

    @property
    def count(self) -> int:
        """How many calls there were."""
        return self.first + self.later

    @property
    def seconds(self) -> float:
        """What the calls take without waiting: first ones count like later ones, where there were any."""
        return self.later_seconds / self.later * self.count if self.later else self.first_seconds

    def plus(self, other: "Tally") -> "Tally":
        """Return this tally with another's calls added."""
        return Tally(
            self.first + other.first,
            self.first_seconds + other.first_seconds,
            self.later + other.later,
            self.later_seconds + other.later_seconds,
        )


class Recording:
    """The calls that were made while it was active; an iterable of layers, the most time first.

    ``convdispatch.tune`` takes it as it is.
    """

    def __init__(self) -> None:
        """Begin without calls."""
        self._lock = threading.Lock()
        self._calls: dict[_Key, Tally] = {}
        self._first_ended: dict[_Key, float] = {}

    def add(self, problem: Problem, deployment: str, threads: int | None, seconds: float) -> None:
        """Count one call, which has just ended."""
        if problem.is_trivial:
            return  # there is nothing to tune
        key = problem, deployment, threads
        now = time.perf_counter()
        with self._lock:
            is_first = now - seconds < self._first_ended.setdefault(key, now)
            one = Tally(first=1, first_seconds=seconds) if is_first else Tally(later=1, later_seconds=seconds)
            self._calls[key] = self._calls.get(key, Tally()).plus(one)

    def take(self) -> dict[_Key, Tally]:
        """Return the calls and begin anew."""
        with self._lock:
            calls, self._calls = self._calls, {}
        return calls

    def put_back(self, calls: Mapping[_Key, Tally]) -> None:
        """Add the calls that ``take`` took."""
        with self._lock:
            for key, tally in calls.items():
                self._calls[key] = self._calls.get(key, Tally()).plus(tally)

    def __iter__(self) -> Iterator[Layer]:
        with self._lock:
            calls = dict(self._calls)
        return iter(_layers(calls))

    def after_fork(self) -> None:
        """Have a forked child count on, whatever its parent's other threads were doing."""
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<recording of {self.calls} calls of {len(list(self))} problems, {self.seconds:.3g} s>"

    @property
    def calls(self) -> int:
        """How many calls were made."""
        return sum(layer.count for layer in self)

    @property
    def seconds(self) -> float:
        """How long all of them take together; see ``Tally.seconds``."""
        return sum(layer.seconds or 0.0 for layer in self)

    @property
    def workload(self) -> Workload:
        """The recording as a workload.

        Raises:
            WorkloadError: if nothing was called.
        """
        return Workload("recording", tuple(self), title="recorded calls")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a workload file; to one that is there already, the calls are added.

        Raises:
            WorkloadError: if nothing was called, the file there is no workload, or it cannot be written.
        """
        merge(settings.user_file("path", path), self.workload)


def _layers(calls: Mapping[_Key, Tally]) -> tuple[Layer, ...]:
    rows = [
        Layer(problem, tally.count, seconds=tally.seconds, deployment=deployment, threads=threads)
        for (problem, deployment, threads), tally in calls.items()
    ]
    return tuple(sorted(rows, key=lambda layer: -(layer.seconds or 0.0)))


def merge(path: Path, recorded: Workload) -> None:
    """Add a workload's calls to those of a file, under a lock: many processes may do so at once.

    Raises:
        WorkloadError: if the file there is no workload, or it cannot be written; it is then as it was.
    """
    try:
        place = workloads.place_of(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with safe_file.exclusive(place):
            if place.exists() and place.stat().st_size:
                old = workloads.load(place)
                recorded = Workload(old.name, old.layers + recorded.layers, old.title, old.source)
            both = recorded.distinct()
            rows = sorted(both.layers, key=lambda layer: -(layer.seconds or 0.0))
            safe_file.replace(place, replace(both, layers=tuple(rows)).to_yaml().encode())
    except WorkloadError:
        raise
    except (OSError, ValueError) as error:
        raise WorkloadError(f"{path}: the recording cannot be written: {error}") from None


# Who records ----------------------------------------------------------------------------------------------------

_active: list[Recording] = []
_change = module_lock()


def _tell(problem: Problem, deployment: str, threads: int | None, seconds: float) -> None:
    for recording in tuple(_active):
        recording.add(problem, deployment, threads, seconds)


def _start(recording: Recording) -> None:
    with _change:
        _active.append(recording)
        observe.watch(_tell)


def _stop(recording: Recording) -> None:
    with _change:
        if recording in _active:
            _active.remove(recording)
        if not _active:
            observe.watch(None)


def _after_fork() -> None:
    for recording in _active:
        recording.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def record(path: str | os.PathLike[str] | None = None) -> Iterator[Recording]:
    """Record every ``conv2d`` and every call of a plan in this process, of all threads, while the block runs.

    Args:
        path: a workload file to add the calls to at the end, also where the block raises.

    Yields:
        The recording. It can be looked at any time, and tuned afterwards: ``convdispatch.tune(recording)``.

    Raises:
        WorkloadError: if the file is there and is no workload, at once; at the end, if it cannot be written; a note on
            what the block raised, where it did.

    Examples:
        >>> import numpy as np, convdispatch
        >>> with record() as workload:
        ...     y = convdispatch.conv2d(np.ones((1, 8, 8, 3), "f4"), np.ones((3, 3, 3, 4), "f4"))
        >>> [(str(layer.problem), layer.count, layer.deployment) for layer in workload]
        [('1x8x8x3 * 3x3x3x4 SAME', 1, 'call')]
    """
    recording = Recording()
    target = None if path is None else settings.user_file("path", path)
    if target is not None:
        place = workloads.place_of(target)
        if place.exists() and (not place.is_file() or place.stat().st_size):
            workloads.load(target)  # or it could not be added to
    _start(recording)
    try:
        yield recording
    except BaseException as error:
        _stop(recording)
        try:
            _save(recording, target)
        except WorkloadError as failed:
            error.add_note(str(failed))  # what stopped the program matters more
        raise
    else:
        _stop(recording)
        _save(recording, target)


def _save(recording: Recording, path: Path | None) -> None:
    if path is not None and recording.calls:
        recording.save(path)


# A whole program ------------------------------------------------------------------------------------------------


class ProgramRecording(Recording):
    """Records the process from now to its end into a file, and each forked child's calls beside its parent's."""

    def __init__(self, path: Path) -> None:
        """Keep the path; absolute, since a program may go elsewhere."""
        super().__init__()
        self.path = path.absolute()
        self._writing = threading.Lock()
        self._written = time.monotonic()

    def add(self, problem: Problem, deployment: str, threads: int | None, seconds: float) -> None:
        """Count one call, and now and then write, in the background."""
        super().add(problem, deployment, threads, seconds)
        now = time.monotonic()
        if now - self._written > _SECONDS_BETWEEN_WRITES:
            self._written = now
            # Where there is no thread to be had, the call goes on; the next attempt writes these calls too.
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=self.write, name="convdispatch-record", daemon=True).start()

    def write(self, *, last: bool = False) -> None:
        """Move what was counted into the file; into one beside it, with a warning, if that one cannot be used.

        Args:
            last: whether the program is about to end.
        """
        with self._writing:
            calls = self.take()
            if not calls:
                return
            try:
                said = self._move(Workload("recording", _layers(calls), title="recorded calls"))
            except BaseException as error:
                self.put_back(calls)  # for the next attempt
                if not isinstance(error, ConvDispatchError):
                    raise
                said = f"{'lost' if last else 'kept for another attempt'}: {error}"
        if said:
            warn(f"recorded calls are {said}")

    def _move(self, recorded: Workload) -> str:
        """Write to the file or beside it, or into the folder; return what to say of that, if anything."""
        try:
            merge(self.path, recorded)
        except ConvDispatchError as error:
            name = f"{self.path.stem}-{os.getpid()}.yaml"
            beside = self.path / name if self.path.is_dir() else self.path.with_name(name)
            try:
                merge(beside, recorded)
            except ConvDispatchError:
                raise error from None  # the file that was asked for matters
            return f"written to {beside}: {error}"
        return ""

    def after_fork(self) -> None:
        """Begin anew in a forked child: what was counted before is the parent's to write."""
        super().after_fork()
        self._writing = threading.Lock()
        self._calls = {}
        self._written = time.monotonic()


def record_program(path: Path | None = None) -> ProgramRecording | None:
    """Record this process to its end into the file that ``CONVDISPATCH_RECORD`` names, if it names one.

    Forked children record too. One that ends by ``os._exit`` or a signal keeps what was written up to then; those
    that multiprocessing starts write when they end.
    """
    target = path or settings.record_path()
    if target is None:
        return None
    recording = ProgramRecording(target)
    _start(recording)
    atexit.register(recording.write, last=True)
    if hasattr(os, "fork"):
        # A child of multiprocessing ends without atexit, and forgets what was to be done at its parent's end.
        from multiprocessing import parent_process, util  # noqa: PLC0415

        util.register_after_fork(recording, _write_at_the_end_of_a_child)
        if parent_process() is not None:  # this is one, and has begun already: what is to be done then is over
            _write_at_the_end_of_a_child(recording)
    return recording


def _write_at_the_end_of_a_child(recording: ProgramRecording) -> None:
    from multiprocessing import util  # noqa: PLC0415

    util.Finalize(None, recording.write, kwargs={"last": True}, exitpriority=100)
