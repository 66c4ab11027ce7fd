"""What tuning learnt: profile files, in layers, and what this process has learnt itself.

A file (``profile_file``) is read as it is when first needed, and again when it has changed.

An entry counts fully on the machine it was measured on. On one that is much like it (``fingerprint``) it is used,
with evidence that says what differs, until that problem is tuned there.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import replace
from importlib import resources
from pathlib import Path

from convdispatch import machine, profile_file, settings
from convdispatch.errors import ProfileError, ProfileWarning, warn
from convdispatch.locks import module_lock
from convdispatch.profile_file import Found, Profile
from convdispatch.profile_text import (
    BUSY,
    CALIBRATION,
    MACHINE,
    NOTES,
    QUARANTINE,
    Entry,
    Failure,
    Key,
    Result,
    dump_entry,
    dump_machine,
    parse_key,
)

__all__ = [
    "BUSY", "CALIBRATION", "MACHINE", "NOTES", "QUARANTINE", "Entry", "Failure", "Key", "Result", "dump_entry",
    "dump_machine", "files", "find", "find_in", "forget", "forget_decisions", "generation", "keep", "layers",
    "looked_at_once", "notes", "only", "parse_key", "remember", "remember_notes", "remembered", "system_path",
    "user_path", "writable_path",
]  # fmt: skip

#: The layer of what this process keeps for itself.
IN_PROCESS = "in-process"


@functools.cache
def user_path() -> Path:
    """Return the file that tuning writes where no project profile is set."""
    import platformdirs  # noqa: PLC0415

    return platformdirs.user_cache_path("convdispatch", appauthor=False) / "profile.yaml"


@functools.cache
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
    if (packaged := _packaged_path()) is not None:
        found.append(("packaged", packaged))
    return found


@functools.cache
def _packaged_path() -> Path | None:
    path = resources.files("convdispatch.configs") / "profile.yaml"
    return path if isinstance(path, Path) else None


class _Store:
    """What this process knows: its own entries, and each file as last read."""

    def __init__(self) -> None:
        self.generation = 0
        self.own: dict[Key, Entry] = {}
        self.notes: dict[str, str | None] = {}
        self.files: dict[Path, tuple[tuple[int, int, int] | None, Profile]] = {}

    def file(self, path: Path) -> Profile:
        """Return the file's profile, read again if it has changed; a bad file is warned of and empty."""
        looked_at = _looked_at.get()
        if looked_at is None:
            return self._newest(path)
        if path not in looked_at:
            looked_at[path] = self._newest(path)
        return looked_at[path]

    def _newest(self, path: Path) -> Profile:
        try:
            status = path.stat()
            stamp = status.st_mtime_ns, status.st_size, status.st_ino
        except OSError:
            stamp = None
        known = self.files.get(path)
        if known is not None and known[0] == stamp:
            return known[1]
        try:
            profile = profile_file.read(path) if stamp else Profile("", str(path))
        except ProfileError as error:
            warn(f"profile ignored: {error}", ProfileWarning)
            profile = Profile("", str(path))
        self.files[path] = stamp, profile
        return profile


_store = _Store()
_lock = module_lock()
_sole: Path | None = None
_looked_at: ContextVar[dict[Path, Profile] | None] = ContextVar("convdispatch_looked_at", default=None)


@contextlib.contextmanager
def looked_at_once() -> Iterator[None]:
    """Look whether files have changed only once inside the block, where all that is decided rests on one state."""
    token = _looked_at.set({})
    try:
        yield
    finally:
        _looked_at.reset(token)


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
    with _lock:
        return [_store.file(path) for _, path in layers()]


def forget_decisions() -> None:
    """Let what was decided from the profile be decided anew, entries in memory kept."""
    with _lock:
        _store.generation += 1


def remembered() -> list[Entry]:
    """Return the entries that this process keeps above every file."""
    with _lock:
        return list(_store.own.values())


def find(key: Key) -> list[Found]:
    """Return the entries of a key, those that win first: exact ones by layer, then soft ones by how much differs.

    What this process measured while others disturbed it gives way to what was measured in quiet since.
    """
    here = machine.current()
    with _lock:
        found = [Found(IN_PROCESS, _store.own[key])] if key in _store.own else []
        for layer, path in layers():
            found += [replace(each, layer=layer) for each in _store.file(path).answers(key, here)]
    quiet = any(each.exact and not each.entry.is_busy for each in found)
    own_last = quiet and found[0].layer == IN_PROCESS and found[0].entry.is_busy
    return sorted(found[1:] + found[:1] if own_last else found, key=lambda each: len(each.differences))


def find_in(path: Path, key: Key) -> list[Found]:
    """Return the entries of a key in one file, ordered as by ``find``."""
    with _lock:
        return _store.file(path).answers(key, machine.current())


def remember(entry: Entry) -> None:
    """Keep an entry for the rest of this process, above every file."""
    with _lock:
        _store.own[entry.key] = entry
        _store.generation += 1


def keep(entry: Entry) -> None:
    """Keep an entry for this process, and in the file that tuning writes if that can be written."""
    remember(entry)
    try:
        profile_file.write(writable_path(), [entry], machine.current())
    except ProfileError as error:
        warn(f"what tuning learnt is kept for this process only: {error}", ProfileWarning)


def notes(kind: str) -> dict[str, str]:
    """Return the texts of the keys that begin with one of ``NOTES``, by key, from all layers together."""
    with _lock:
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
    with _lock:
        _store.notes.update(texts)
        _store.generation += 1


def forget() -> None:
    """Drop what this process remembers; files are read again when next needed."""
    with _lock:
        _store.own.clear()
        _store.notes.clear()
        _store.files.clear()
        _store.generation += 1


def generation() -> int:
    """Return a number that changes whenever what was decided may have to be decided anew."""
    return _store.generation
