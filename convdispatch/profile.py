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
When a broken one is measured anew, its old text goes to ``PROFILE.broken``.

An entry counts fully on the machine it was measured on. On one that is much like it (``fingerprint``) it is used,
with evidence that says what differs, until that problem is tuned there.
"""

import contextlib
import datetime as dt
import itertools
import math
import re
import threading
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from convdispatch import fingerprint, machine, safe_file, safe_yaml, settings
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
#: First words of top-level keys that are neither machines nor entries; other modules know what they hold.
NOTES = (CALIBRATION, "quarantine ")
_LARGEST_FILE = 256 << 20


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
        lost_before: backends with versions that were not measured, since they had lost to the winner on a machine
            much like this one.
    """

    key: Key
    results: tuple[Result, ...]
    failures: tuple[Failure, ...] = ()
    effort: str = "measure"
    tuned: str = field(default_factory=lambda: dt.datetime.now(dt.UTC).isoformat(timespec="seconds"))
    flags: tuple[str, ...] = ()
    lost_before: tuple[tuple[str, int], ...] = ()

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


def dump_entry(entry: Entry) -> str:
    """Return the text of an entry."""
    lines = [f"{entry.key}:", f"  {_line('winner', entry.winner.name)}", f"  effort: {entry.effort}"]
    lines.append(f"  tuned: {entry.tuned}")
    if entry.flags:
        lines.append(f"  flags: [{', '.join(entry.flags)}]")
    if entry.lost_before:
        lines.append(f"  lost_before: {_flow(dict(entry.lost_before))}")
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


def dump_machine(machine_id: str, fields: Mapping[str, Any]) -> str:
    """Return the text of a machine's section."""
    lines = [f"{_MACHINE}{machine_id}:"]
    for name, value in fields.items():
        lines.append(f"  {_flow({name: value})[1:-1]}")
    return "\n".join(lines) + "\n"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


class Chunk(NamedTuple):
    """One top-level key of a profile's text: the key as written, and the span of the text up to the next key."""

    key: str
    start: int
    end: int

    @property
    def is_entry(self) -> bool:
        """Whether this should be an entry."""
        return not self.key.startswith((_MACHINE, *NOTES))


_BEFORE_A_KEY = re.compile(r"\n(?=[^\s#\-])")


def _chunks(text: str) -> Iterator[Chunk]:
    """Cut a profile's text at its top-level keys."""
    starts = [0, *(match.end() for match in _BEFORE_A_KEY.finditer(text)), len(text)]
    for start, end in itertools.pairwise(starts):
        line_end = text.find("\n", start, end)
        head = text[start : end if line_end < 0 else line_end].rstrip()
        if head and not head.startswith("#"):
            key = head if head.startswith("format:") else head.partition(": ")[0].removesuffix(":")
            yield Chunk(key.strip().strip("'\""), start, end)


def _behind(text: str) -> str:
    """Return the comments and empty lines that end an entry's text: they are about what comes next."""
    lines = text.split("\n")
    end = len(lines)
    while end > 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
        end -= 1
    return "\n".join(lines[end:])


_SIGNATURE = re.compile(r"\s*([\dx]+)[^*|]*\*\s*([\dx]+)[^|]*\|\s*(\w+)\s*\|\s*(\d+)[^|]*\|\s*(\S*)")


def _signature(key: str) -> tuple[str, ...]:
    """Return what all ways to write one key have in common, quickly: shapes, deployment, threads, machine."""
    match = _SIGNATURE.match(key)
    return match.groups() if match else ()


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


def _lost_before(data: Any) -> tuple[tuple[str, int], ...]:
    lost = data.get("lost_before") or {}
    if not isinstance(lost, dict) or not all(isinstance(n, str) and type(v) is int for n, v in lost.items()):
        raise ProfileError(f"lost_before must map backends to versions; got {lost!r:.60}")
    return tuple(lost.items())


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
    return Entry(key, (chosen, *others), tuple(failures), effort, when, _flags(data), _lost_before(data))


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
        self._notes: dict[str, dict[str, str]] = {}
        self._spellings: dict[tuple[str, ...], list[str]] | None = None
        self._machines: dict[str, dict[str, Any]] | None = None
        self._text = text
        self._chunks: list[Chunk] = []
        self._places: dict[str, list[int]] = {}
        self._format: Chunk | None = None
        self._end_marks: list[Chunk] = []
        for chunk in _chunks(text):
            if chunk.key.startswith("format:"):
                self._format = chunk
            elif chunk.key == "...":
                self._end_marks.append(chunk)
            elif chunk.key != "---":
                self._places.setdefault(chunk.key, []).append(len(self._chunks))
                self._chunks.append(chunk)
        form = self._format and self._format.key.removeprefix("format:").partition("#")[0].strip()
        if form != str(FORMAT) and (self._format or self._chunks):  # but comments alone are an empty profile
            found = "no format" if form is None else f"format {form}"
            raise ProfileError(f"{name} is not a profile of format {FORMAT} (it has {found})")

    def chunks(self) -> dict[str, str]:
        """Return every top-level key with its text, machines too; of a key that stands twice, the last."""
        return {chunk.key: self._text[chunk.start : chunk.end] for chunk in self._chunks}

    def notes(self, kind: str) -> dict[str, str]:
        """Return the texts of the keys that begin with one of ``NOTES``, by key."""
        if kind not in self._notes:
            self._notes[kind] = {key: self._texts(key)[-1] for key in self._places if key.startswith(kind)}
        return self._notes[kind]

    def get(self, key: Key) -> Entry | None:
        """Return the entry of a key, or None; a broken one is warned of once and missing."""
        text = self.spelling(key)
        if text is None:
            return None
        if text not in self._parsed:
            self._parsed[text] = self._parse(key, text)
        return self._parsed[text]

    def entries(self, skip: Container[str] = ()) -> list[Entry]:
        """Return every entry that can be read, in the order of the file, but for the keys to skip."""
        found = []
        for text, places in self._places.items():
            if text in skip or not self._chunks[places[-1]].is_entry:
                continue
            try:
                key = parse_key(text)
            except ConvDispatchError as error:
                self._warn(text, error)
                continue
            if self.spelling(key) == text and (entry := self.get(key)) is not None:
                found.append(entry)
        return found

    def broken(self) -> dict[str, str]:
        """Return the keys of what should be entries and cannot be read, with where and why; nothing is warned of."""
        return {key: said for key in self._places if (said := self._complaint(key))}

    def doubled(self) -> dict[str, tuple[int, ...]]:
        """Return the keys that stand more than once with different texts, and the lines where; the last counts."""
        return {key: self._lines(key) for key in self._places if self._is_doubled(key)}

    def is_doubtful(self, key: str) -> bool:
        """Return whether what stands under a key is a broken entry, or several."""
        return key in self._places and (self._is_doubled(key) or bool(self._complaint(key)))

    def _lines(self, key: str) -> tuple[int, ...]:
        return tuple(self._text.count("\n", 0, self._chunks[place].start) + 1 for place in self._places[key])

    def _texts(self, key: str) -> list[str]:
        spans = (self._chunks[place] for place in self._places.get(key, ()))
        return [self._text[chunk.start : chunk.end].rstrip() + "\n" for chunk in spans]

    def _is_doubled(self, key: str) -> bool:
        return len(self._places[key]) > 1 and len(set(self._texts(key))) > 1

    def _complaint(self, key: str) -> str:
        if self._chunks[self._places[key][-1]].is_entry and self._parsed.get(key) is None:
            try:
                self._parsed[key] = self._read(parse_key(key), key)
            except Exception as error:  # noqa: BLE001  # as in _parse
                return f"line {self._lines(key)[-1]}: {' '.join(str(error).split())}"
        return ""

    def machines(self) -> dict[str, dict[str, Any]]:
        """Return each machine that the file describes: its id, and its fields as in ``Machine.describe``."""
        if self._machines is None:
            self._machines = {}
            for key in self._places:
                if key.startswith(_MACHINE):
                    try:
                        fields = next(iter(safe_yaml.load(self._texts(key)[-1]).values()))
                        self._machines[key.removeprefix(_MACHINE).strip()] = dict(fields)
                    except Exception as error:  # noqa: BLE001  # as in _parse
                        self._warn(key, error)
        return self._machines

    def alike(self, key: Key, here: Machine) -> list[tuple[Entry, tuple[str, ...]]]:
        """Return the entries of a key from machines much like this one, each with what differs in words."""
        found = []
        for machine_id, fields in self.machines().items():
            if machine_id != key.machine and self.spelling(there := replace(key, machine=machine_id)) is not None:
                likeness = fingerprint.compare(fields, here, key.threads)
                if likeness.grade != "hard" and (entry := self.get(there)) is not None:
                    found.append((entry, likeness.soft or ("the machine's id",)))
        return found

    def answers(self, key: Key, here: Machine) -> list["Found"]:
        """Return the file's entries of a key: the exact one, then those of machines much like this one, by likeness."""
        entry = self.get(key)
        exact = [] if entry is None else [Found(self.name, entry)]
        soft = [Found(self.name, *found) for found in self.alike(key, here)] if key.machine == here.id else []
        return exact + sorted(soft, key=lambda found: len(found.differences))

    def spelling(self, key: Key) -> str | None:
        """Return how the file writes a key, in our words and spaces or others; None if it is not there."""
        text = str(key)
        if text in self._places:
            return text
        if self._spellings is None:
            self._spellings = {}
            for chunk in self._chunks:
                if chunk.is_entry:
                    self._spellings.setdefault(_signature(chunk.key), []).append(chunk.key)
        for other in self._spellings.get(_signature(text), ()):
            with contextlib.suppress(ConvDispatchError):
                if parse_key(other) == key:
                    return other
        return None

    def changed(self, changes: Mapping[str, str | None]) -> str:
        """Return the file's text with some keys' texts replaced, added or, where None, taken out; the rest verbatim."""
        text, head_end = self._text, self._format.end if self._format else 0
        if not head_end:  # there is nothing yet, or comments
            text = f"{text.rstrip() or _HEADER.rstrip()}\nformat: {FORMAT}\n"
        edits: list[tuple[int, int, str]] = [(chunk.start, chunk.end, "") for chunk in self._end_marks]
        added = []
        for key, new in changes.items():
            chunks = [self._chunks[place] for place in self._places.get(key, ())]
            for chunk in chunks:
                behind = _behind(text[chunk.start : chunk.end])
                if new is not None and chunk is chunks[-1]:
                    edits.append((chunk.start, chunk.end, f"{new.rstrip()}\n{behind}"))
                else:
                    edits.append((chunk.start, chunk.end, behind.lstrip() if "#" in behind else ""))
            if new is not None and not chunks:
                if key.startswith(_MACHINE) and 0 < head_end < len(text):
                    edits.append((head_end, head_end, f"{new.rstrip()}\n\n"))
                else:
                    added.append(new.rstrip())
        pieces, position = [], 0
        for start, end, new_text in sorted(edits, key=lambda edit: edit[0]):
            pieces += [text[position:start], new_text]
            position = end
        pieces.append(text[position:])
        while pieces and not (last := pieces.pop().rstrip()):
            pass
        return "".join((*pieces, "\n\n".join((last, *added)), "\n"))

    def text(self, key: str) -> str:
        """Return all that stands under a key of the file, as written; nothing if it is not there."""
        return "\n".join(self._texts(key))

    def _read(self, key: Key, text: str) -> Entry:
        data = safe_yaml.load(self._texts(text)[-1])
        return _parse_entry(key, next(iter(data.values())) if isinstance(data, dict) else data)

    def _parse(self, key: Key, text: str) -> Entry | None:
        if self._is_doubled(text):
            *before, last = self._lines(text)
            said = f"entry {text!r:.120} stands at lines {', '.join(map(str, before))} and {last}: the last counts"
            warnings.warn(f"{self.name}: {said}", ProfileWarning, stacklevel=2)
        try:
            return self._read(key, text)
        except Exception as error:  # noqa: BLE001  # whatever a hand-made or hostile text brings about is a miss
            self._warn(text, error)
            return None

    def _warn(self, text: str, error: Exception) -> None:
        line = self._lines(text)[-1]
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
        # Some editors put a mark first; and a byte that is no UTF-8 spoils its own entry, not the file.
        text = path.read_text(encoding="utf-8", errors="surrogateescape").removeprefix("\ufeff")
    except FileNotFoundError:
        text = ""
    except OSError as error:
        raise ProfileError(f"{path} cannot be read as a profile: {error}") from error
    return Profile(text, str(path))


def write(
    path: Path, entries: Iterable[Entry], machine: Machine, notes: Mapping[str, str | None] | None = None
) -> None:
    """Add entries to a profile file, in place of older ones of the same keys; everything else stays as it is.

    Args:
        path: the file; it and its folder are made if need be.
        entries: what to add.
        machine: the machine they were measured on.
        notes: texts of top-level keys that are no entries, by key; None takes one out.

    Raises:
        ProfileError: if the file is there and is no profile, or cannot be written. Nothing is changed then.
    """
    new = list(entries)

    def add(old: Profile) -> Mapping[str, str | None]:
        changes: dict[str, str | None] = {_MACHINE + machine.id: dump_machine(machine.id, machine.describe())}
        changes |= {other: None for entry in new if (other := old.spelling(entry.key)) is not None}
        return {**changes, **{str(entry.key): dump_entry(entry) for entry in new}, **(notes or {})}

    edit(path, add)


def edit(path: Path, change: Callable[[Profile], Mapping[str, str | None]]) -> None:
    """Change a profile file: one process at a time, and as a whole or not at all.

    Args:
        path: the file; it and its folder are made if need be.
        change: given the file's profile, returns the new text of each top-level key to change; None takes it out.
            Old text that was broken, or that stood twice and differed, is added to ``PATH.broken``.

    Raises:
        ProfileError: if the file is there and is no profile, or cannot be written. Nothing is changed then.
    """
    place = safe_file.real(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with safe_file.exclusive(place):
            old = read(place)
            changes = change(old)
            _keep_broken(place, old, changes)
            safe_file.replace(place, old.changed(changes).encode(errors="surrogateescape"))
    except OSError as error:
        raise ProfileError(f"{path} cannot be written: {error}") from error


def replace_file(path: Path, text: str) -> None:
    """Write a profile's whole text to a file, in place of what is there.

    Raises:
        ProfileError: if it cannot be written.
    """
    place = safe_file.real(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with safe_file.exclusive(place):
            safe_file.replace(place, text.encode(errors="surrogateescape"))
    except OSError as error:
        raise ProfileError(f"{path} cannot be written: {error}") from error


def _keep_broken(path: Path, old: Profile, changes: Mapping[str, str | None]) -> None:
    lost = [old.text(key) for key in changes if old.is_doubtful(key)]
    if lost:
        with path.with_name(path.name + ".broken").open("ab") as file:
            file.write("\n".join(lost).encode(errors="surrogateescape"))


# The layers together --------------------------------------------------------------------------------------------


class _Store:
    """What this process knows: its own entries, and each file as last read."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.generation = 0
        self.own: dict[Key, Entry] = {}
        self.notes: dict[str, str | None] = {}
        self.files: dict[Path, tuple[tuple[int, int, int] | None, Profile]] = {}

    def file(self, path: Path) -> Profile:
        """Return the file's profile, read again if it has changed; a bad file is warned of and empty."""
        try:
            status = path.stat()
            stamp = status.st_mtime_ns, status.st_size, status.st_ino
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


@dataclass(frozen=True)
class Found:
    """An entry that answers for a key.

    Attributes:
        layer: where it is from.
        entry: what was measured.
        differences: in words, how the machine it was measured on differs from this one; empty for an exact match.
    """

    layer: str
    entry: Entry
    differences: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether it was measured for just this key."""
        return not self.differences


def find(key: Key) -> list[Found]:
    """Return the entries of a key, those that win first: exact ones by layer, then soft ones by how much differs."""
    here = machine.current()
    with _store.lock:
        found = [Found("in-process", _store.own[key])] if key in _store.own else []
        for layer, path in layers():
            found += [replace(each, layer=layer) for each in _store.file(path).answers(key, here)]
    return sorted(found, key=lambda each: len(each.differences))


def find_in(path: Path, key: Key) -> list[Found]:
    """Return the entries of a key in one file, ordered as by ``find``."""
    with _store.lock:
        return _store.file(path).answers(key, machine.current())


def remember(entry: Entry) -> None:
    """Keep an entry for the rest of this process, above every file."""
    with _store.lock:
        _store.own[entry.key] = entry
        _store.generation += 1


def notes(kind: str) -> dict[str, str]:
    """Return the texts of the keys that begin with one of ``NOTES``, by key, from all layers together."""
    with _store.lock:
        found: dict[str, str] = {}
        for _, path in reversed(layers()):
            found |= _store.file(path).notes(kind)
        for key, text in _store.notes.items():
            if text is None:
                found.pop(key, None)
            elif key.startswith(kind):
                found[key] = text
    return found


def remember_notes(texts: Mapping[str, str | None]) -> None:
    """Keep notes for the rest of this process, above every file; None hides what files say under a key."""
    with _store.lock:
        _store.notes.update(texts)
        _store.generation += 1


def forget() -> None:
    """Drop what this process remembers; files are read again when next needed."""
    with _store.lock:
        _store.own.clear()
        _store.notes.clear()
        _store.files.clear()
        _store.generation += 1


def generation() -> int:
    """Return a number that changes whenever ``remember``, ``remember_notes`` or ``forget`` does something."""
    return _store.generation
