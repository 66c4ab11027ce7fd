"""What tuning learnt, in YAML: the winner of each problem, and the measurements behind it.

A profile is one YAML mapping that people can read and edit. ``format`` and the machines come first; then each
entry is a top-level key that says what was measured where, for example::

    format: 1

    machine zen4-2c-1f3a99c0:
      cpu: AMD EPYC (zen4)
      ...

    1x56x56x64 * 3x3x64x64 SAME | plan | 2 threads | zen4-2c-1f3a99c0:
      winner: winograd(m=4, threads=2)
      effort: measure
      tuned: 2026-11-22T18:50:00+00:00
      results:
      - {backend: winograd, version: 1, config: {m: 4, threads: 2}, median_us: 612.1, spread: 0.02, rounds: 15, ...}
      failures: []

Writing another candidate of ``results`` behind ``winner`` makes it the choice. Entries are cut out of the text by
their first column and parsed one by one, when asked for: a broken entry is a warning and a miss, the rest stays.
"""

import contextlib
import datetime as dt
import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from convdispatch import safe_yaml, settings
from convdispatch.backend import Config, candidate_name
from convdispatch.errors import ConvDispatchError, ProfileError, ProfileWarning
from convdispatch.machine import Machine
from convdispatch.problem import Problem

FORMAT = 1
DEPLOYMENTS = ("plan", "call")
_HEADER = (
    "# A convdispatch profile: which backend won each problem, and the measurements behind it.\n"
    "# Times are in microseconds; spread is the interquartile range over the median; error is relative to the\n"
    "# largest output. To choose by hand, write another candidate of `results` behind `winner`.\n"
)
_MACHINE = "machine "
CALIBRATION = "calibration "
#: Top-level keys that begin so are not entries.
_NO_ENTRIES = (_MACHINE, CALIBRATION)
_LARGEST_FILE = 256 << 20
_SECONDS_TO_WAIT = 30.0


@dataclass(frozen=True)
class Key:
    """What an entry is about.

    Attributes:
        problem: what was computed.
        deployment: ``"plan"`` (filters packed before) or ``"call"`` (packed in every call).
        threads: the most threads a candidate could use.
        machine: id of the machine's fingerprint.
    """

    problem: Problem
    deployment: str
    threads: int
    machine: str

    def __str__(self) -> str:
        return f"{self.problem} | {self.deployment} | {self.threads} threads | {self.machine}"


@dataclass(frozen=True)
class Result:
    """One candidate's measurement.

    Attributes:
        backend, version, config: the candidate, and its backend's version when measured.
        median: seconds of a call.
        spread: interquartile range over median; 0 for a single round.
        rounds: how many rounds of the race it ran in.
        error: largest deviation from the reference, over the largest exact output.
        workspace: scratch bytes.
        interval: seconds between which the median lies with 95 % confidence, where there were rounds enough to tell.
        estimate: seconds that the backend predicted, uncorrected, so that how wrong it was can serve other problems.
    """

    backend: str
    version: int
    config: Config
    median: float
    spread: float
    rounds: int
    error: float
    workspace: int
    interval: tuple[float, float] | None = None
    estimate: float | None = None

    @property
    def name(self) -> str:
        """The candidate as people write it."""
        return candidate_name(self.backend, self.config)


@dataclass(frozen=True)
class Failure:
    """A candidate that may not win: it raised, or was wrong."""

    backend: str
    version: int
    config: Config
    reason: str

    @property
    def name(self) -> str:
        """The candidate as people write it."""
        return candidate_name(self.backend, self.config)


@dataclass(frozen=True)
class Entry:
    """What was measured for one key.

    Attributes:
        key: what was measured.
        results: the winner first, then the others by time.
        failures: candidates that may not win.
        effort: how hard was looked.
        tuned: when, as ISO 8601 in UTC.
        flags: what is doubtful about the measurement, in single words such as ``"busy"``; empty for a good one.
    """

    key: Key
    results: tuple[Result, ...]
    failures: tuple[Failure, ...] = ()
    effort: str = "measure"
    tuned: str = field(default_factory=lambda: dt.datetime.now(dt.UTC).isoformat(timespec="seconds"))
    flags: tuple[str, ...] = ()

    @property
    def winner(self) -> Result:
        """The result that was chosen."""
        return self.results[0]

    def best(self, allows: Callable[[Result], bool]) -> Result | None:
        """Return the winner, or the fastest other result that is allowed, or None."""
        return next((result for result in self.results if allows(result)), None)


# Text -----------------------------------------------------------------------------------------------------------


def _flow(data: Mapping[str, Any]) -> str:
    import yaml  # noqa: PLC0415  # loaded with the first profile

    return str(yaml.safe_dump(dict(data), default_flow_style=True, sort_keys=False, width=math.inf)).strip()


def _line(name: str, text: str) -> str:
    import yaml  # noqa: PLC0415

    return str(yaml.safe_dump({name: text}, width=math.inf)).strip()


def _dump_entry(entry: Entry) -> str:
    lines = [f"{entry.key}:", f"  {_line('winner', entry.winner.name)}", f"  effort: {entry.effort}"]
    lines.append(f"  tuned: {entry.tuned}")
    if entry.flags:
        lines.append(f"  flags: [{', '.join(entry.flags)}]")
    lines.append("  results:")
    for result in entry.results:
        row = {
            "backend": result.backend, "version": result.version, "config": dict(result.config),
            "threads": result.config.threads,
            "median_us": _rounded(result.median * 1e6), "spread": _rounded(result.spread), "rounds": result.rounds,
            "error": _rounded(result.error), "workspace": result.workspace,
        }  # fmt: skip
        if result.interval is not None:
            row["interval_us"] = [_rounded(seconds * 1e6) for seconds in result.interval]
        if result.estimate is not None:
            row["estimate_us"] = _rounded(result.estimate * 1e6)
        lines.append(f"  - {_flow(row)}")
    if entry.failures:
        lines.append("  failures:")
    for failure in entry.failures:
        row = {"backend": failure.backend, "version": failure.version, "config": dict(failure.config)}
        lines.append(f"  - {_flow({**row, 'reason': failure.reason})}")
    return "\n".join(lines) + "\n"


def _dump_machine(machine: Machine) -> str:
    lines = [f"{_MACHINE}{machine.id}:"]
    for name, value in machine.describe().items():
        lines.append(f"  {_flow({name: value})[1:-1]}")
    return "\n".join(lines) + "\n"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _chunks(text: str) -> Iterator[tuple[str, int, str]]:
    """Cut a profile's text at its top-level keys: key, line number, text."""
    line = 1
    for chunk in re.split(r"^(?=[^\s#\-])", text, flags=re.MULTILINE):
        head = chunk.split("\n", 1)[0].rstrip()
        if head and not head.startswith("#"):
            key = head if head.startswith("format:") else head.partition(": ")[0].removesuffix(":")
            yield key.strip().strip("'\""), line, chunk
        line += chunk.count("\n")


def _take(data: Any, name: str, kind: type | tuple[type, ...], where: str = "") -> Any:
    if not isinstance(data, dict):
        raise ProfileError(f"{where or 'the entry'} must be a mapping; got {data!r:.60}")
    value = data.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProfileError(f"{where}{name} is {'missing' if name not in data else f'{value!r:.60}'}")
    return value


def _number(data: Any, name: str) -> float:
    value = float(_take(data, name, (int, float)))
    if not 0 <= value < math.inf:
        raise ProfileError(f"{name} must be a number of at least 0; got {value}")
    return value


def _interval(data: Any) -> tuple[float, float] | None:
    if "interval_us" not in data:
        return None
    ends = _take(data, "interval_us", list)
    if (
        len(ends) != 2
        or not all(isinstance(end, int | float) for end in ends)
        or not 0 <= ends[0] <= ends[1] < math.inf
    ):
        raise ProfileError(f"interval_us must be two numbers, the smaller first; got {ends!r:.60}")
    return ends[0] / 1e6, ends[1] / 1e6


def _flags(data: Any) -> tuple[str, ...]:
    flags = data.get("flags") or []
    if not isinstance(flags, list) or not all(isinstance(flag, str) and flag.isidentifier() for flag in flags):
        raise ProfileError(f"flags must be a list of words; got {flags!r:.60}")
    return tuple(flags)


def _candidate_fields(data: Any, key: Key) -> tuple[str, int, Config]:
    values = _take(data, "config", dict)
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, int | float | str | bool):
            raise ProfileError(f"config must map names to plain values; got {values!r:.60}")
        if isinstance(value, int) and value.bit_length() > 63:
            raise ProfileError(f"config {name:.60} is a larger number than any kernel takes")
    config = Config(values)
    if not 1 <= config.threads <= key.threads:
        raise ProfileError(f"config threads must be between 1 and {key.threads}; got {config.threads}")
    return _take(data, "backend", str), _take(data, "version", int), config


def _parse_entry(key: Key, data: Any) -> Entry:
    results = []
    for row in _take(data, "results", list):
        backend, version, config = _candidate_fields(row, key)
        results.append(
            Result(
                backend, version, config, _number(row, "median_us") / 1e6, _number(row, "spread"),
                int(_number(row, "rounds")), _number(row, "error"), int(_number(row, "workspace")), _interval(row),
                _number(row, "estimate_us") / 1e6 if "estimate_us" in row else None,
            )
        )  # fmt: skip
    failures = []
    for row in data.get("failures") or []:
        failures.append(Failure(*_candidate_fields(row, key), reason=_take(row, "reason", str)))  # noqa: PERF401
    winner = _take(data, "winner", str)
    chosen = next((result for result in results if result.name == winner), None)
    if chosen is None:
        names = ", ".join(result.name for result in results)
        raise ProfileError(f"winner {winner!r} is none of the results: {names}")
    effort = data.get("effort")
    if effort not in settings.EFFORTS:
        raise ProfileError(f"effort must be one of {', '.join(settings.EFFORTS)}; got {effort!r:.60}")
    tuned = data.get("tuned", "")
    when = tuned.isoformat() if isinstance(tuned, dt.datetime | dt.date) else str(tuned)
    others = sorted((result for result in results if result is not chosen), key=lambda result: result.median)
    return Entry(key, (chosen, *others), tuple(failures), effort, when, _flags(data))


def parse_key(text: str) -> Key:
    """Read an entry's key.

    Raises:
        ConvDispatchError: if it is not one.
    """
    parts = [part.strip() for part in text.split("|")]
    if len(parts) != 4:
        raise ProfileError("a key reads PROBLEM | plan or call | N threads | MACHINE")
    problem, deployment, threads, machine = parts
    if deployment not in DEPLOYMENTS:
        raise ProfileError(f"deployment must be plan or call; got {deployment!r}")
    match = re.fullmatch(r"([1-9]\d{0,3}) threads?", threads)
    if not match:
        raise ProfileError(f"threads must read like '2 threads'; got {threads!r}")
    return Key(Problem.parse(problem), deployment, int(match[1]), machine)


# Files ----------------------------------------------------------------------------------------------------------


class Profile:
    """One profile file as it was when read; entries are parsed when asked for."""

    def __init__(self, text: str, name: str) -> None:
        """Cut the text into entries.

        Args:
            text: the file's text.
            name: what warnings call the file.

        Raises:
            ProfileError: if this is no profile that this version can read.
        """
        self.name = name
        self._parsed: dict[str, Entry | None] = {}
        self._raw: dict[str, tuple[int, str]] = {}
        self._by_key: dict[Key, str] | None = None
        self.head = re.match(r"(?:#.*\n|[ \t]*\n)*", text)[0]  # type: ignore[index]  # matches the empty text too
        form = None
        for key, line, chunk in _chunks(text):
            if key.startswith("format:"):
                form = key.removeprefix("format:").partition("#")[0].strip()
            elif key not in {"---", "..."}:
                self._raw[key] = line, chunk
        if form != str(FORMAT) and text.strip():
            found = "no format" if form is None else f"format {form}"
            raise ProfileError(f"{name} is not a profile of format {FORMAT} (it has {found})")

    def chunks(self) -> dict[str, str]:
        """Return every top-level key with its text, machines too."""
        return {key: chunk for key, (_, chunk) in self._raw.items()}

    def get(self, key: Key) -> Entry | None:
        """Return the entry of a key, or None; a broken one is warned of once and missing."""
        text = str(key)
        if text not in self._raw:
            text = self._spelt_otherwise().get(key, text)
        if text not in self._parsed:
            self._parsed[text] = self._parse(key, text)
        return self._parsed[text]

    def entries(self) -> list[Entry]:
        """Return every entry that can be read, in the order of the file."""
        found = []
        for text in self._raw:
            if text.startswith(_NO_ENTRIES):
                continue
            try:
                key = parse_key(text)
            except ConvDispatchError as error:
                self._warn(text, error)
                continue
            if (entry := self.get(key)) is not None:
                found.append(entry)
        return found

    def _spelt_otherwise(self) -> dict[Key, str]:
        """Return the entries whose keys a person wrote, in words or spaces that differ from ours."""
        if self._by_key is None:
            self._by_key = {}
            for text in self._raw:
                with contextlib.suppress(ConvDispatchError):
                    self._by_key[parse_key(text)] = text
        return self._by_key

    def _parse(self, key: Key, text: str) -> Entry | None:
        if text not in self._raw:
            return None
        try:
            data = safe_yaml.load(self._raw[text][1])
            return _parse_entry(key, next(iter(data.values())) if isinstance(data, dict) else data)
        except Exception as error:  # noqa: BLE001  # whatever a hand-made or hostile text brings about is a miss
            self._warn(text, error)
            return None

    def _warn(self, text: str, error: Exception) -> None:
        line = self._raw[text][0]
        said = " ".join(str(error).split())
        warnings.warn(f"{self.name}, line {line}: entry {text!r:.120} is ignored: {said}", ProfileWarning, stacklevel=2)


def user_path() -> Path:
    """Return the file that tuning writes where no project profile is set."""
    import platformdirs  # noqa: PLC0415

    return platformdirs.user_cache_path("convdispatch", appauthor=False) / "profile.yaml"


def system_path() -> Path:
    """Return the file an administrator may write for all users."""
    import platformdirs  # noqa: PLC0415

    return platformdirs.site_config_path("convdispatch", appauthor=False) / "profile.yaml"


def writable_path() -> Path:
    """Return the file that tuning writes: the project's if one is set, else the user's."""
    return _sole or settings.current().profile or user_path()


def layers() -> list[tuple[str, Path]]:
    """Return the profile files by layer, those that win first; they need not exist."""
    if _sole is not None:
        return [("only", _sole)]
    project = settings.current().profile
    found = [("project", project)] if project else []
    found += [("user", user_path()), ("system", system_path())]
    packaged = resources.files("convdispatch.configs") / "profile.yaml"
    if isinstance(packaged, Path):
        found.append(("packaged", packaged))
    return found


def read(path: Path) -> Profile:
    """Read a profile file; one that does not exist is empty.

    Raises:
        ProfileError: if it cannot be read or is no profile.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ProfileError(f"{path} is larger than {_LARGEST_FILE >> 20} MiB, which no profile is")
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark first
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeError) as error:
        raise ProfileError(f"{path} cannot be read as a profile: {error}") from error
    return Profile(text, str(path))


def write(path: Path, entries: Iterable[Entry], machine: Machine, more: Mapping[str, str] | None = None) -> None:
    """Add entries to a profile file, in place of older ones of the same keys; everything else stays as it is.

    Safe between processes: the file is locked, and replaced as a whole.

    Args:
        path: the file; it and its folder are made if need be.
        entries: what to add.
        machine: the machine they were measured on.
        more: text of other top-level keys to put in, by key.

    Raises:
        ProfileError: if the file is there and is no profile, or cannot be written. Nothing is changed then.
    """
    import filelock  # noqa: PLC0415

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(path.name + ".lock"), timeout=_SECONDS_TO_WAIT):
            old = read(path)
            chunks = old.chunks()
            chunks[_MACHINE + machine.id] = _dump_machine(machine)
            chunks.update(more or {})
            chunks.update({str(entry.key): _dump_entry(entry) for entry in entries})
            ordered = sorted(chunks.items(), key=lambda item: not item[0].startswith(_NO_ENTRIES))
            body = "\n".join(chunk.rstrip() + "\n" for _, chunk in ordered)
            _replace(path.resolve(), f"{old.head or _HEADER}format: {FORMAT}\n\n{body}")
    except (OSError, filelock.Timeout) as error:
        raise ProfileError(f"{path} cannot be written: {error}") from error


def _replace(path: Path, text: str) -> None:
    # Not by tempfile: its files are for their owner only, and a profile may be everyone's.
    beside = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


# The layers together --------------------------------------------------------------------------------------------


class _Store:
    """What this process knows: its own entries, and each file as last read."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.generation = 0
        self.own: dict[Key, Entry] = {}
        self.files: dict[Path, tuple[tuple[int, int] | None, Profile]] = {}

    def file(self, path: Path) -> Profile:
        """Return the file's profile, read again if it has changed; a bad file is warned of and empty."""
        try:
            status = path.stat()
            stamp = status.st_mtime_ns, status.st_size
        except OSError:
            stamp = None
        known = self.files.get(path)
        if known is not None and known[0] == stamp:
            return known[1]
        try:
            profile = read(path) if stamp else Profile("", str(path))
        except ProfileError as error:
            warnings.warn(f"profile ignored: {error}", ProfileWarning, stacklevel=2)
            profile = Profile("", str(path))
        self.files[path] = stamp, profile
        return profile


_store = _Store()
_sole: Path | None = None


@contextlib.contextmanager
def only(path: Path) -> Iterator[None]:
    """Let this whole process know and write one profile file and nothing else, for a block; then as before.

    What the process remembered is put aside meanwhile, and what it comes to remember is dropped at the end.
    """
    global _store, _sole
    before = _store, _sole
    _store, _sole = _Store(), path
    _store.generation = before[0].generation + 1
    try:
        yield
    finally:
        latest = _store.generation
        _store, _sole = before
        _store.generation = latest + 1


def files() -> list[Profile]:
    """Return the profile of each layer as it is now, those that win first."""
    with _store.lock:
        return [_store.file(path) for _, path in layers()]


def forget_decisions() -> None:
    """Let what was decided from the profile be decided anew, entries in memory kept."""
    with _store.lock:
        _store.generation += 1


def remembered() -> list[Entry]:
    """Return the entries that this process keeps above every file."""
    with _store.lock:
        return list(_store.own.values())


def find(key: Key) -> list[tuple[str, Entry]]:
    """Return the entries of a key with the layer each is from, those that win first."""
    with _store.lock:
        found = [("in-process", _store.own[key])] if key in _store.own else []
        for layer, path in layers():
            if (entry := _store.file(path).get(key)) is not None:
                found.append((layer, entry))
    return found


def remember(entry: Entry) -> None:
    """Keep an entry for the rest of this process, above every file."""
    with _store.lock:
        _store.own[entry.key] = entry
        _store.generation += 1


def forget() -> None:
    """Drop what this process remembers; files are read again when next needed."""
    with _store.lock:
        _store.own.clear()
        _store.files.clear()
        _store.generation += 1


def generation() -> int:
    """Return a number that changes whenever ``remember`` or ``forget`` does something."""
    return _store.generation
