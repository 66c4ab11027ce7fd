"""What people do with whole profiles: compare, join, ship and tidy them. It is ``profile_file.edit`` that writes."""

import datetime as dt
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from convdispatch import calibration, fingerprint, profile, quarantine, registry, settings, times
from convdispatch.errors import ArgumentError
from convdispatch.fingerprint import Grade
from convdispatch.machine import Machine
from convdispatch.profile import CALIBRATION, MACHINE, NOTES, Entry, Key
from convdispatch.profile_file import Profile


def grade(where: Profile, key: Key, here: Machine) -> Grade:
    """Return how much an entry of a profile counts on this machine."""
    if key.machine == here.id:
        return "exact"
    fields = where.machines().get(key.machine)
    if fields is None:
        return "hard"
    return "hard" if fingerprint.compare(fields, here, key.threads).hard else "soft"


def versions(entry: Entry) -> dict[str, int]:
    """Return the version of every backend that was measured."""
    return {row.backend: row.version for row in entry.failures} | {row.backend: row.version for row in entry.results}


# Compare ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A key whose winner differs between two profiles.

    Attributes:
        first, second: the entries.
        ratio: the second winner's time over the first's.
        cost: what the second's winner took in the first profile, over the first's winner there; None if it was not
            measured there. Near 1 it is a tie that fell the other way.
    """

    first: Entry
    second: Entry

    @property
    def ratio(self) -> float:  # noqa: D102  # an attribute to its users
        return times.ratio(self.second.winner.median, self.first.winner.median)

    @property
    def cost(self) -> float | None:  # noqa: D102
        name = self.second.winner.name
        measured = [row.median for row in self.first.results if row.name == name]
        return times.ratio(measured[0], self.first.winner.median) if measured else None


@dataclass(frozen=True)
class Difference:
    """What two profiles say differently: entries of one only, keys whose winner differs, and keys where it agrees."""

    only_first: tuple[Entry, ...]
    only_second: tuple[Entry, ...]
    changed: tuple[Change, ...]
    same: tuple[Key, ...]


def diff(first: Profile, second: Profile, *, across: bool = False) -> Difference:
    """Compare two profiles key by key.

    Args:
        first, second: the profiles.
        across: whether entries of different machines are compared too, by problem, deployment and threads.
    """

    def same_question(key: Key) -> Key:
        return replace(key, machine="") if across else key

    one, two = ({same_question(entry.key): entry for entry in each.entries()} for each in (first, second))
    both = [key for key in one if key in two]
    return Difference(
        tuple(entry for key, entry in one.items() if key not in two),
        tuple(entry for key, entry in two.items() if key not in one),
        tuple(Change(one[key], two[key]) for key in both if one[key].winner.name != two[key].winner.name),
        tuple(key for key in both if one[key].winner.name == two[key].winner.name),
    )


# Join -------------------------------------------------------------------------------------------------------------


def width(entry: Entry) -> float:
    """Return the width of the winner's interval over its median; infinite where there is no interval."""
    ends, median = entry.winner.interval, entry.winner.median
    return (ends[1] - ends[0]) / median if ends is not None and median else math.inf


def choose(entries: Sequence[Entry]) -> Entry:
    """Return the entry to trust of several for one key, whatever their order.

    Measurements of the newest versions of the backends come first, then those without doubts, then the tighter
    interval of the winner, the higher effort, the newer date.
    """
    newest: dict[str, int] = {}
    for entry in entries:
        for name, version in versions(entry).items():
            newest[name] = max(version, newest.get(name, version))

    def rank(entry: Entry) -> tuple[bool, bool, bool, float, int, float, str]:
        old = any(newest[name] != version for name, version in versions(entry).items())
        when = _when(entry.tuned)
        effort = settings.EFFORTS.index(entry.effort)
        # The text decides only between entries that are equal in all that matters, so that order never does.
        doubtful, flagged = bool(entry.doubts), bool(entry.flags)
        return old, doubtful, flagged, width(entry), -effort, -(when.timestamp() if when else 0), repr(entry)

    return min(entries, key=rank)


def _when(text: str) -> dt.datetime | None:
    try:
        when = dt.datetime.fromisoformat(text)
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=dt.UTC)


@dataclass(frozen=True)
class Joined:
    """What joining profiles into one does.

    Attributes:
        changes: the new texts by key, for ``profile_file.edit``.
        new: keys that were not there.
        better: keys whose entry gives way to a better one.
        kept: keys whose entry stays.
        by_hand: keys that keep a winner that was chosen by hand, in a better entry or in the one that stays for it.
        refused: what cannot be read of the sources, and why.
        grades: how many of the sources' entries match this machine exactly, softly or not at all.
    """

    changes: Mapping[str, str | None]
    new: tuple[Key, ...]
    better: tuple[Key, ...]
    kept: tuple[Key, ...]
    by_hand: tuple[Key, ...]
    refused: Mapping[str, str]
    grades: Mapping[Grade, int]


def join(target: Profile, sources: Sequence[Profile], here: Machine) -> Joined:
    """Add what other profiles know to one: new keys, and better entries for keys that it has."""
    groups: dict[Key, list[Entry]] = {}
    refused: dict[str, str] = {}
    counts: Counter[Grade] = Counter()
    others: dict[str, str] = {}
    for source in sources:
        bad = source.broken()
        bad |= {key: f"line {n[0]}: line {n[-1]} has it too" for key, n in source.doubled().items() if key not in bad}
        refused |= {f"{source.name}: {key}": reason for key, reason in bad.items()}
        for entry in _readable(source):
            groups.setdefault(entry.key, []).append(entry)
            counts[grade(source, entry.key, here)] += 1
        for head, text in source.chunks().items():
            if head.startswith(CALIBRATION):
                others[head] = calibration.better_text(head, others.get(head, text), text)
            elif head.startswith((MACHINE, *NOTES)):
                others.setdefault(head, text)
    there, broken = target.chunks(), target.broken()
    changes: dict[str, str | None] = {}
    sorted_keys: dict[str, list[Key]] = {"new": [], "better": [], "kept": [], "by_hand": []}
    for key, group in groups.items():
        old = None if target.spelling(key) in broken else target.get(key)
        best, kept_by_hand = _joined(old, group)
        sorted_keys["by_hand"] += [key] * kept_by_hand
        sorted_keys["new" if old is None else "kept" if best == old else "better"].append(key)
        if best != old:
            changes |= {spelt: None for spelt in (target.spelling(key),) if spelt is not None}
            changes[str(key)] = profile.dump_entry(best)
    used = {f"{MACHINE}{key.machine}" for key in groups}
    for head, text in others.items():
        if head.startswith(CALIBRATION) and head in there:
            if calibration.better_text(head, there[head], text) != there[head]:
                changes[head] = text
        elif head not in there and (head in used or head.startswith(NOTES)):
            changes[head] = text
    keys = {name: tuple(found) for name, found in sorted_keys.items()}
    return Joined(changes, **keys, refused=refused, grades=counts)


def _joined(old: Entry | None, group: Sequence[Entry]) -> tuple[Entry, bool]:
    """Return the entry to trust, and whether its winner is a choice by hand: the old entry's, if there is one."""
    best = choose(group if old is None else [old, *group])
    wanted = [entry for entry in (group if old is None else [old]) if entry.by_hand]
    if not wanted or best in wanted:
        return best, False
    choice = choose(wanted)
    return best.with_winner(choice.winner.name) or choice, True


def _readable(source: Profile) -> list[Entry]:
    """Return the entries that can be read, without a warning of those that cannot."""
    return source.entries(skip=source.broken())


# Ship -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """A profile to be given away: its text, how many entries it has, and which were left out and why."""

    text: str
    entries: int
    left_out: Mapping[str, str]


def export(source: Profile, *, portable: bool) -> Exported:
    """Return a clean copy of a profile: its machines, its quarantines and every entry that can be read.

    Args:
        source: the profile.
        portable: whether to leave out what tells one machine from others of its kind, so that all of these use the
            entries, softly: processor model, cores, caches, library versions. Doubtful entries stay behind then, and
            of several machines of one kind the best entry is taken.
    """
    left_out = dict(source.broken())
    changes: dict[str, str | None] = {}
    groups: dict[Key, list[Entry]] = {}
    for entry in _readable(source):
        key = entry.key
        fields = source.machines().get(key.machine)
        if portable:
            if entry.doubts or fields is None:
                left_out[str(key)] = (
                    f"flagged {', '.join(entry.doubts)}" if entry.doubts else "its machine is not described"
                )
                continue
            fields = fingerprint.portable(fields)
            digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:8]
            key = replace(key, machine=f"{fields['cpu'].strip('()') or 'cpu'}-portable-{digest}")
        if fields is not None:
            changes[MACHINE + key.machine] = profile.dump_machine(key.machine, fields)
        groups.setdefault(key, []).append(replace(entry, key=key))
    changes |= {str(key): profile.dump_entry(choose(group)) for key, group in groups.items()}
    if not portable:
        changes |= {key: text for key, text in source.chunks().items() if key.startswith(NOTES)}
    return Exported(Profile("", "").changed(changes), len(groups), left_out)


# Tidy -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """What ``prune`` takes out: any of the kinds, of those that the rest selects; all of these if no kind is named.

    Attributes:
        stale: the winner's backend was older than the one that is installed.
        flagged: the measurement is marked as doubtful.
        broken: cannot be read; and the earlier of two entries with one key.
        quarantined: quarantines, so that the backends are tried again.
        machine: only what was measured there.
        older_than: only what is older than so many days.
    """

    stale: bool = False
    flagged: bool = False
    broken: bool = False
    quarantined: bool = False
    machine: str | None = None
    older_than: float | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is selected."""
        return self == Selection()

    @property
    def names_no_kind(self) -> bool:
        """Whether no kind is named."""
        return not (self.stale or self.flagged or self.broken or self.quarantined)


@dataclass(frozen=True)
class Pruned:
    """What is to go: the changes for ``profile_file.edit``, and each key with the reason."""

    changes: Mapping[str, str | None]
    reasons: Mapping[str, str]


def prune(source: Profile, what: Selection, now: dt.datetime | None = None) -> Pruned:
    """Return what a selection takes out of a profile.

    Raises:
        ArgumentError: if ``older_than`` is no number of days that a calendar goes back.
    """
    limit = None if what.older_than is None else _ago(what.older_than, now or dt.datetime.now(dt.UTC))

    def selected(machine: str, when: str) -> bool:
        date = _when(when)
        old = limit is None or (date is not None and date < limit)
        return what.machine in {None, machine} and old

    reasons: dict[str, str] = {}
    for entry in _readable(source):
        reason = "selected" if what.names_no_kind else stale_reason(entry) if what.stale else ""
        if what.flagged and entry.doubts:
            reason = reason or f"flagged {', '.join(entry.doubts)}"
        if reason and selected(entry.key.machine, entry.tuned):
            reasons[source.spelling(entry.key) or str(entry.key)] = reason
    if what.quarantined or what.names_no_kind:
        held, _ = quarantine.written(source)
        reasons |= {one.key: "quarantined" for one in held if selected(one.machine, one.when)}
    changes: dict[str, str | None] = dict.fromkeys(reasons)
    if what.broken and what.older_than is None:
        for key, reason in (source.broken() | broken_notes(source)).items():
            if what.machine is None or key.endswith(f" {what.machine}"):
                reasons[key], changes[key] = reason, None
        for key, lines in source.doubled().items():
            if key not in changes and what.machine is None:
                reasons[key], changes[key] = f"doubled, line {lines[0]}", source.chunks()[key]
    if what.names_no_kind and what.machine is not None and what.older_than is None:
        sections = (MACHINE + what.machine, CALIBRATION + what.machine)
        changes |= {section: None for section in sections if section in source.chunks()}
    return Pruned(changes, reasons)


def _ago(days: float, now: dt.datetime) -> dt.datetime:
    most = (now - dt.datetime.min.replace(tzinfo=dt.UTC)).days
    if not 0 <= days <= most:
        raise ArgumentError(f"older_than must be a number of days from 0 to {most}, e.g. 30; got {days}")
    return now - dt.timedelta(days=days)


def broken_notes(source: Profile) -> dict[str, str]:
    """Return the keys of quarantines and calibrations that cannot be read, with why."""
    return quarantine.written(source)[1] | calibration.broken(source)


def stale_reason(entry: Entry, *, every_backend: bool = False) -> str:
    """Return whether the winner's backend has another version than was measured, in words, or nothing.

    Args:
        entry: the entry.
        every_backend: whether to ask that of all who were measured.
    """
    measured = versions(entry) if every_backend else {entry.winner.backend: entry.winner.version}
    now = registry.available()
    return ", ".join(
        f"{name} was version {version}, is {now[name].version}"
        for name, version in measured.items()
        if name in now and version != now[name].version
    )
