"""One profile file: its text, the entries in it, and how it is changed as a whole or not at all.

``profile_text`` has the entries and how they are written. They are parsed when asked for: a broken one is a warning and
a miss, the rest stays. When a broken one is measured anew, its old text goes to ``PROFILE.broken``.
"""

import contextlib
import stat
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convdispatch import fingerprint, safe_file, safe_yaml
from convdispatch.errors import ConvDispatchError, ProfileError, ProfileWarning, in_a_line, warn
from convdispatch.machine import Machine
from convdispatch.profile_text import (
    MACHINE,
    Chunk,
    Entry,
    Key,
    behind_comments,
    cut,
    dump_entry,
    dump_machine,
    first_shape,
    parse_entry,
    parse_key,
    parse_machine,
    signature,
)

FORMAT = 1
_HEADER = (
    "# A convdispatch profile: which backend won each problem, and the measurements behind it.\n"
    "# Times are in microseconds; spread is the interquartile range over the median; error is relative to the\n"
    "# largest output. To choose by hand, write another candidate of `results` behind `winner`.\n"
)
_LARGEST_FILE = 256 << 20


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
        self._spellings: dict[str, list[str]] | None = None
        self._machines: dict[str, dict[str, Any]] | None = None
        self._text = text
        self._chunks: list[Chunk] = []
        self._places: dict[str, list[int]] = {}
        self._format: Chunk | None = None
        self._end_marks: list[Chunk] = []
        for chunk in cut(text):
            if chunk.key.startswith("format:") and self._format is None:
                self._format = chunk
            elif chunk.key == "..." or chunk.key.startswith("format:"):  # a second one says nothing
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

    def keys(self) -> Iterable[str]:
        """Return every top-level key, machines too."""
        return self._places.keys()

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
        """Return the keys of entries and machines that cannot be read, with where and why; nothing is warned of."""
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
        is_entry = self._chunks[self._places[key][-1]].is_entry
        if (is_entry and self._parsed.get(key) is None) or key.startswith(MACHINE):
            try:
                if is_entry:
                    self._parsed[key] = self._read(parse_key(key), key)
                else:
                    parse_machine(self._texts(key)[-1])
            except Exception as error:  # noqa: BLE001  # as in _parse
                return f"line {self._lines(key)[-1]}: {in_a_line(error)}"
        return ""

    def machines(self) -> dict[str, dict[str, Any]]:
        """Return each machine that the file describes: its id, and its fields as in ``Machine.describe``."""
        if self._machines is None:
            found = {}  # other threads are to see all of them, or none
            for key in self._places:
                if key.startswith(MACHINE):
                    try:
                        found[key.removeprefix(MACHINE).strip()] = parse_machine(self._texts(key)[-1])
                    except Exception as error:  # noqa: BLE001  # as in _parse
                        self._warn(key, error)
            self._machines = found
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

    def answers(self, key: Key, here: Machine) -> list[Found]:
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
            spellings: dict[str, list[str]] = {}
            for chunk in self._chunks:
                spellings.setdefault(first_shape(chunk.key), []).append(chunk.key)
            self._spellings = spellings
        for other in self._spellings.get(first_shape(text), ()):
            if signature(other) == signature(text):
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
                behind = behind_comments(text[chunk.start : chunk.end])
                if new is not None and chunk is chunks[-1]:
                    edits.append((chunk.start, chunk.end, f"{new.rstrip()}\n{behind}"))
                else:
                    edits.append((chunk.start, chunk.end, behind.lstrip() if "#" in behind else ""))
            if new is not None and not chunks:
                if key.startswith(MACHINE) and 0 < head_end < len(text):
                    edits.append((head_end, head_end, f"{new.rstrip()}\n\n"))
                else:
                    added.append(new.rstrip())
        pieces, position = [], 0
        for start, end, new_text in sorted(edits, key=lambda edit: edit[:2]):  # what is put before a chunk comes first
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
        return parse_entry(key, next(iter(data.values())) if isinstance(data, dict) else data)

    def _parse(self, key: Key, text: str) -> Entry | None:
        if self._is_doubled(text):
            *before, last = self._lines(text)
            said = f"entry {text!r:.120} stands at lines {', '.join(map(str, before))} and {last}: the last counts"
            warn(f"{self.name}: {said}", ProfileWarning)
        try:
            return self._read(key, text)
        except Exception as error:  # noqa: BLE001  # whatever a hand-made or hostile text brings about is a miss
            self._warn(text, error)
            return None

    def _warn(self, text: str, error: Exception) -> None:
        line = self._lines(text)[-1]
        said = f"entry {text!r:.120} is ignored: {in_a_line(error)}"
        warn(f"{self.name}, line {line}: {said}", ProfileWarning)


def read(path: Path) -> Profile:
    """Read a profile file; one that does not exist is empty.

    Raises:
        ProfileError: if it cannot be read or is no profile.
    """
    try:
        status = path.stat()
        if stat.S_ISFIFO(status.st_mode):
            raise ProfileError(f"{path} is a pipe, which nothing can be read from twice; a profile is a file")
        if status.st_size > _LARGEST_FILE:
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
        changes: dict[str, str | None] = {MACHINE + machine.id: dump_machine(machine.id, machine.describe())}
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
