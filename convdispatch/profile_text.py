"""An entry of a profile, and its text in YAML: the winner of a problem, and the measurements behind it.

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

import datetime as dt
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from convdispatch import safe_yaml, settings
from convdispatch.arguments import check_deployment
from convdispatch.backend import Config, candidate_name
from convdispatch.errors import ArgumentError, ArgumentTypeError, ProfileError
from convdispatch.problem import Problem

MACHINE = "machine "
CALIBRATION = "calibration "
QUARANTINE = "quarantine "
#: Flag of what was measured while others used the machine.
BUSY = "busy"
#: Flag of what was measured on live traffic, which is as good an end as another.
ONLINE = "online"
#: First words of top-level keys that are neither machines nor entries; other modules know what they hold.
NOTES = (CALIBRATION, QUARANTINE)


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
        flags: what is to be known of the measurement, in single words such as ``"busy"``; empty for a plain one.
        lost_before: backends with versions that were not measured, since they had lost to the winner on a machine
            much like this one.
        by_hand: whether somebody wrote another winner than was measured.
    """

    key: Key
    results: tuple[Result, ...]
    failures: tuple[Failure, ...] = ()
    effort: str = "measure"
    tuned: str = field(default_factory=lambda: dt.datetime.now(dt.UTC).isoformat(timespec="seconds"))
    flags: tuple[str, ...] = ()
    lost_before: tuple[tuple[str, int], ...] = ()
    by_hand: bool = False

    @property
    def winner(self) -> Result:
        """The result that was chosen."""
        return self.results[0]

    @property
    def is_busy(self) -> bool:
        """Whether others used the machine meanwhile; such an entry is used, and measured again."""
        return BUSY in self.flags

    @property
    def doubts(self) -> tuple[str, ...]:
        """The flags that make the measurement doubtful."""
        return tuple(flag for flag in self.flags if flag != ONLINE)

    def with_winner(self, name: str) -> "Entry | None":
        """Return this entry with another winner, chosen by hand; None if no result has that name."""
        chosen = next((result for result in self.results if result.name == name), None)
        if chosen is None:
            return None
        others = sorted((result for result in self.results if result is not chosen), key=lambda result: result.median)
        return replace(self, results=(chosen, *others), by_hand=True)

    def best(self, allows: Callable[[Result], bool]) -> Result | None:
        """Return the winner, or the fastest other result that is allowed, or None."""
        return next((result for result in self.results if allows(result)), None)


# Text -----------------------------------------------------------------------------------------------------------


def flow(data: Mapping[str, Any]) -> str:
    """Return a mapping in one line of YAML."""
    return safe_yaml.dump(dict(data), flow=True).strip()


def _line(name: str, text: str) -> str:
    return safe_yaml.dump({name: text}, flow=False).strip()


def dump_entry(entry: Entry) -> str:
    """Return the text of an entry."""
    lines = [f"{entry.key}:", f"  {_line('winner', entry.winner.name)}", f"  effort: {entry.effort}"]
    lines.append(f"  tuned: {entry.tuned}")
    if entry.flags:
        lines.append(f"  flags: [{', '.join(entry.flags)}]")
    if entry.lost_before:
        lines.append(f"  lost_before: {flow(dict(entry.lost_before))}")
    lines.append("  results:")
    first, *others = entry.results
    # The measured winner comes first. So where another result is behind `winner`, somebody has chosen it.
    for result in (others[0], first, *others[1:]) if entry.by_hand and others else entry.results:
        row = {
            "backend": result.backend, "version": result.version, "config": dict(result.config),
            "threads": result.config.threads,
            "median_us": rounded(result.median * 1e6), "spread": rounded(result.spread), "rounds": result.rounds,
            "error": rounded(result.error), "workspace": result.workspace,
        }  # fmt: skip
        if result.interval is not None:
            row["interval_us"] = [rounded(seconds * 1e6) for seconds in result.interval]
        if result.estimate is not None:
            row["estimate_us"] = rounded(result.estimate * 1e6)
        lines.append(f"  - {flow(row)}")
    if entry.failures:
        lines.append("  failures:")
    for failure in entry.failures:
        row = {"backend": failure.backend, "version": failure.version, "config": dict(failure.config)}
        lines.append(f"  - {flow({**row, 'reason': failure.reason})}")
    return "\n".join(lines) + "\n"


def dump_machine(machine_id: str, fields: Mapping[str, Any]) -> str:
    """Return the text of a machine's section."""
    lines = [f"{MACHINE}{machine_id}:"]
    for name, value in fields.items():
        lines.append(f"  {flow({name: value})[1:-1]}")
    return "\n".join(lines) + "\n"


def parse_machine(text: str) -> dict[str, Any]:
    """Read a machine's section: its fields as in ``Machine.describe``.

    Raises:
        ProfileError: if it is something else.
    """
    fields = next(iter(safe_yaml.load(text).values()))
    if not isinstance(fields, dict):
        raise ProfileError(f"a machine must be described by names and values; got {fields!r:.60}")
    return fields


def rounded(value: float) -> float:
    """Return a number with the digits that a measurement is good for."""
    return float(f"{value:.4g}")


class Chunk(NamedTuple):
    """One top-level key of a profile's text: the key as written, and the span of the text up to the next key."""

    key: str
    start: int
    end: int

    @property
    def is_entry(self) -> bool:
        """Whether this should be an entry."""
        return not self.key.startswith((MACHINE, *NOTES))


_BEFORE_A_KEY = re.compile(r"\n(?=[^\s#\-])")


def cut(text: str) -> Iterator[Chunk]:
    """Cut a profile's text at its top-level keys."""
    starts = [0, *(match.end() for match in _BEFORE_A_KEY.finditer(text)), len(text)]
    for start, end in itertools.pairwise(starts):
        line_end = text.find("\n", start, end)
        head = text[start : end if line_end < 0 else line_end].rstrip()
        if head and not head.startswith("#"):
            key = head if head.startswith("format:") else head.partition(": ")[0].removesuffix(":")
            yield Chunk(key.strip().strip("'\""), start, end)


def behind_comments(text: str) -> str:
    """Return the comments and empty lines that end an entry's text: they are about what comes next."""
    lines = text.split("\n")
    end = len(lines)
    while end > 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
        end -= 1
    return "\n".join(lines[end:])


_SIGNATURE = re.compile(r"\s*([\dx]+)[^*|]*\*\s*([\dx]+)[^|]*\|\s*(\w+)\s*\|\s*(\d+)[^|]*\|\s*(\S*)")


def first_shape(key: str) -> str:
    """Return a key's first word, the input's shape, which stands first in all ways to write it."""
    return key.partition("*")[0].strip().partition(" ")[0]


def signature(key: str) -> tuple[str, ...]:
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


def _when(data: Any) -> str:
    """Return the date, as ISO 8601; empty where there is none."""
    tuned = data.get("tuned", "")
    text = tuned.isoformat() if isinstance(tuned, dt.date) else tuned  # a datetime is a date, too
    try:
        if text != "":
            dt.datetime.fromisoformat(text)
        return str(text)
    except (TypeError, ValueError):
        raise ProfileError(f"tuned must be a date such as 2026-11-22T18:50:00+00:00; got {tuned!r:.60}") from None


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


def parse_config(values: Mapping[Any, Any]) -> Config:
    """Read a config.

    Raises:
        ProfileError: if it is none that any backend could have.
    """
    try:
        return Config(values)
    except (ArgumentError, ArgumentTypeError) as error:
        raise ProfileError(str(error)) from None


def _candidate_fields(data: Any, key: Key) -> tuple[str, int, Config]:
    config = parse_config(_take(data, "config", dict))
    if not 1 <= config.threads <= key.threads:
        raise ProfileError(f"config threads must be between 1 and {key.threads}; got {config.threads}")
    return _take(data, "backend", str), _take(data, "version", int), config


def _words(name: str) -> tuple[str, list[str]]:
    """Return a candidate's name and config however people write it: with other spaces, or keys in another order."""
    backend, _, config = "".join(name.split()).partition("(")
    return backend, sorted(config.removesuffix(")").split(","))


def parse_entry(key: Key, data: Any) -> Entry:
    """Return an entry from what YAML made of its text.

    Raises:
        ProfileError: naming the field that is missing or makes no sense.
    """
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
    alike = [result for result in results if _words(result.name) == _words(winner)]
    chosen = min(alike, key=lambda result: result.name != winner, default=None)
    if chosen is None:
        names = ", ".join(result.name for result in results)
        raise ProfileError(f"winner {winner!r} is none of the results: {names}")
    effort = data.get("effort")
    if effort not in settings.EFFORTS:
        raise ProfileError(f"effort must be one of {', '.join(settings.EFFORTS)}; got {effort!r:.60}")
    others = sorted((result for result in results if result is not chosen), key=lambda result: result.median)
    about = _when(data), _flags(data), _lost_before(data)
    return Entry(key, (chosen, *others), tuple(failures), effort, *about, by_hand=chosen is not results[0])


def parse_key(text: str) -> Key:
    """Read an entry's key.

    Raises:
        ConvDispatchError: if it is not one.
    """
    parts = [part.strip() for part in text.split("|")]
    if len(parts) != 4:
        raise ProfileError("a key reads PROBLEM | plan or call | N threads | MACHINE")
    problem, deployment, threads, machine = parts
    check_deployment(deployment)
    match = re.fullmatch(r"([1-9]\d{0,3}) threads?", threads)
    if not match:
        raise ProfileError(f"threads must read like '2 threads'; got {threads!r}")
    return Key(Problem.parse(problem), deployment, int(match[1]), machine)
