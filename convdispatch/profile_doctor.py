"""What is wrong with the profiles that are in force here, and the command that mends each thing."""

import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from convdispatch import fingerprint, profile, profile_file, profile_tools, quarantine, registry, settings
from convdispatch.backend import Candidate
from convdispatch.errors import ProfileError
from convdispatch.machine import Machine
from convdispatch.profile import Entry, Key
from convdispatch.profile_file import Profile
from convdispatch.quarantine import Quarantine

_A_PAGE = 4096
#: Layers whose file somebody has named, and so may be anything.
_NAMED = ("project", "only")


@dataclass(frozen=True)
class Finding:
    """One thing that a person may want to know of a profile.

    Attributes:
        kind: what sort of thing, e.g. ``"stale"``.
        layer, path: where.
        about: the entry, backend or machine in question.
        reason: what is the matter with it.
        command: what mends it, as typed into a shell.
        wrong: whether it needs mending; else it is only said.
    """

    kind: str
    layer: str
    path: str
    about: str
    reason: str
    command: str
    wrong: bool = True


def examine(layers: Sequence[tuple[str, Path]], writable: Path, here: Machine) -> list[Finding]:
    """Look through profile files.

    Args:
        layers: names and files, those that win first; an entry hides those of its key in the layers after it.
        writable: the file that tuning writes.
        here: this machine.
    """
    found = list(_unwritable(writable))
    seen: set[Key] = set()
    for layer, path in layers:
        try:
            contents = profile_file.read(path)
        except ProfileError as error:
            found += _unreadable(layer, path, error)
            continue
        found += _Layer(layer, path, writable, here).findings(contents, seen)
        kept = path.with_name(path.name + ".broken")
        if kept.exists():
            said = "holds what was broken in the profile and has been taken out of it"
            command = shlex.join(["rm", str(kept)])
            found.append(Finding("broken text", layer, str(path), str(kept), said, command, wrong=False))
    return found


def _unreadable(layer: str, path: Path, error: ProfileError) -> Iterator[Finding]:
    cause = error.__cause__
    if isinstance(cause, NotADirectoryError):
        return  # nothing is there; what keeps tuning from writing it is another finding
    if layer in _NAMED and isinstance(cause, IsADirectoryError):
        command = _use(shlex.quote(str(path / "profile.yaml")))
    elif isinstance(cause, PermissionError):
        closed = next((place for place in reversed(path.parents) if not os.access(place, os.X_OK)), None)
        command = shlex.join(["chmod", "u+rw", str(path)] if closed is None else ["chmod", "u+x", str(closed)])
    else:
        command = _aside(path)
    yield Finding("unreadable file", layer, str(path), str(path), str(error), command)


def _unwritable(path: Path) -> Iterator[Finding]:
    place = path
    while not _is_there(place) and place != place.parent:
        place = place.parent
    folder = path.parent if place == path else place
    if place == path and path.is_dir():
        return  # it cannot be read either, which is said
    if not folder.is_dir():
        reason, command = f"{folder} is no folder", _aside(folder)
    elif (refusal := _refusal(folder)) is None and os.access(folder, os.W_OK | os.X_OK):
        return
    elif refusal is None or isinstance(refusal, PermissionError):
        reason, command = f"nothing may be written in {folder}", shlex.join(["chmod", "u+wx", str(folder)])
    else:  # whatever permissions are given, as on a disk that is full or is only read
        why = refusal.strerror or str(refusal)
        reason, command = f"no file can be made in {folder}: {why}", _elsewhere(path)
    yield Finding("unwritable file", "written by tune", str(path), str(path), reason, command)


def _aside(path: Path) -> str:
    return shlex.join(["mv", str(path), f"{path}.aside"])


def _use(path: str) -> str:
    """Return the command that makes another file the profile; the path is quoted for a shell."""
    return f"export {settings.PREFIX}PROFILE={path}"


def _elsewhere(path: Path) -> str:
    """Return the command that has tuning write another file than this: the user's, unless it is that."""
    user = profile.user_path()
    return _use('"$HOME/convdispatch-profile.yaml"' if path == user else shlex.quote(str(user)))


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except OSError:  # in a folder that may not be looked into, too
        return False
    return True


def _refusal(folder: Path) -> OSError | None:
    """Return why no file can be written in a folder, if none can; trying leaves nothing behind."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_A_PAGE))  # an empty file has room on a full disk
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


@dataclass(frozen=True)
class _Layer:
    name: str
    path: Path
    writable: Path
    here: Machine

    def finding(self, kind: str, about: str, reason: str, command: Sequence[str], *, wrong: bool = True) -> Finding:
        return Finding(kind, self.name, str(self.path), about, reason, shlex.join(command), wrong)

    def prune(self, *words: str) -> list[str]:
        return ["convdispatch", "profile", "prune", *words, "--profile", str(self.path)]

    def tune(self, key: Key, *words: str) -> list[str]:
        where = [] if self.writable == profile.user_path() else ["--profile", str(self.writable)]
        how = ["--deployment", key.deployment, "--threads", str(key.threads)]
        return ["convdispatch", "tune", str(key.problem), *how, *words, *where]

    def findings(self, contents: Profile, seen: set[Key]) -> Iterator[Finding]:
        broken = contents.broken()
        for key, reason in broken.items():
            yield self.finding("unreadable", ascii(key)[1:-1], reason, self.prune("--broken"))
        for key, lines in contents.doubled().items():
            said = f"stands at lines {', '.join(map(str, lines))} and differs; the last counts"
            yield self.finding("doubled", key, said, self.prune("--broken"))
        elsewhere: dict[str, list[Key]] = {}
        for entry in contents.entries(skip=broken):
            if entry.key.machine != self.here.id:
                elsewhere.setdefault(entry.key.machine, []).append(entry.key)
            elif entry.key not in seen:
                seen.add(entry.key)
                yield from self._own(entry)
        for machine_id, keys in elsewhere.items():
            yield self._foreign(contents, machine_id, keys)
        for one in quarantine.written(contents)[0]:
            yield self._quarantined(one)
        for key, reason in profile_tools.broken_notes(contents).items():
            yield self.finding("unreadable", ascii(key)[1:-1], reason, self.prune("--broken"))

    def _own(self, entry: Entry) -> Iterator[Finding]:
        about, winner = str(entry.key), entry.winner.backend
        if winner not in registry.available():
            why = registry.unavailable().get(winner, "there is no such backend here")
            yield self.finding("unknown backend", about, f"won by {winner}: {why}", self.tune(entry.key))
        if stale := profile_tools.stale_reason(entry, every_backend=True):
            yield self.finding("stale", about, stale, self.tune(entry.key))
        for complaint in _complaints(entry):
            yield self.finding("unusable config", about, complaint, self.tune(entry.key, "--retune"))
        if entry.doubts:
            command = self.tune(entry.key, *[] if entry.is_busy else ["--retune"])
            yield self.finding("flagged", about, ", ".join(entry.doubts), command)

    def _foreign(self, contents: Profile, machine_id: str, keys: Sequence[Key]) -> Finding:
        count = f"{len(keys)} {'entry' if len(keys) == 1 else 'entries'}"
        fields = contents.machines().get(machine_id)
        command = self.prune("--machine", machine_id)
        if fields is None:
            said = f"{count} of a machine that the file does not describe are not used here"
            return self.finding("other machine", machine_id, said, command, wrong=False)
        likenesses = [fingerprint.compare(fields, self.here, key.threads) for key in keys]
        if all(likeness.hard for likeness in likenesses):
            said = f"{count} not used here: {'; '.join(likenesses[0].hard)}"
            return self.finding("other machine", machine_id, said, command, wrong=False)
        first = next(key for key, likeness in zip(keys, likenesses, strict=True) if not likeness.hard)
        said = f"{count} used where this machine has none of its own: {'; '.join(likenesses[0].soft)}"
        return self.finding("like machine", machine_id, said, self.tune(first), wrong=False)

    def _quarantined(self, one: Quarantine) -> Finding:
        about = f"{one.backend} version {one.version} on {one.machine}"
        now = registry.available().get(one.backend)
        matters = one.machine == self.here.id and now is not None and one.means(now)
        reason = f"{one.reason}{f' ({one.when})' if one.when else ''}"
        return self.finding("quarantined", about, reason, self.prune("--quarantined"), wrong=matters)


def _complaints(entry: Entry) -> Iterator[str]:
    """Yield what backends hold against the configs that an entry says they were measured with."""
    problem, there = entry.key.problem, registry.available()
    for result in entry.results:
        backend = there.get(result.backend)
        if backend is None or backend.version != result.version:
            continue  # other findings say so
        candidate = Candidate(backend, result.config)
        try:
            candidate.check_keys(problem)
            candidate.workspace(problem)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a backend raises
            yield f"{result.name}: {error}"
