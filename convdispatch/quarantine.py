"""Backends that may not be chosen on this machine, because a version of theirs did harm when it was tried.

A quarantine is a top-level key of the profile, for example::

    quarantine mine version 3 | zen4-2c-1f3a99c0:
      reason: crashed (SIGSEGV) in kernel
      origin: my_package.conv:Mine
      problem: 1x56x56x64 * 3x3x64x64 SAME
      config: {tile: 8, threads: 2}
      when: 2026-11-22T18:50:00+00:00

It holds for that version of that code: another version, or other code that goes by the same name, is not meant by it.
"""

import contextlib
import datetime as dt
import functools
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from convdispatch import fingerprint, machine, profile, profile_file, registry, safe_yaml
from convdispatch.backend import Backend, Candidate, Config
from convdispatch.errors import ConvDispatchError, ProfileError, ProfileWarning, in_a_line, warn
from convdispatch.problem import Problem
from convdispatch.profile_file import Profile

KIND = profile.QUARANTINE
#: What the reason of a failure begins with that put its backend into quarantine.
FAILED = "quarantined: "
_KEY = re.compile(r"quarantine (?P<backend>.+) version (?P<version>-?\d+) \| (?P<machine>\S+)")

_UNREADABLE = (ConvDispatchError, AttributeError, TypeError, ValueError, RecursionError)

_apart: ContextVar[dict[str, str] | None] = ContextVar("convdispatch_quarantines", default=None)

#: The quarantines that hold on this machine.
Held = Sequence["Quarantine"]


@dataclass(frozen=True)
class Quarantine:
    """Why a version of a backend may not be chosen on a machine.

    Attributes:
        backend, version, machine: what may not be chosen where.
        reason: what it did, in one line.
        origin: where its code is, as ``registry.origin`` tells; empty where a person left it out.
        problem, config: what it was tried on; the problem in text.
        when: as ISO 8601 in UTC.
    """

    backend: str
    version: int
    machine: str
    reason: str
    origin: str = ""
    problem: str = ""
    config: Config = field(default_factory=Config)
    when: str = field(default_factory=lambda: dt.datetime.now(dt.UTC).isoformat(timespec="seconds"))

    @property
    def key(self) -> str:
        """The profile's key for it."""
        return f"{KIND}{self.backend} version {self.version} | {self.machine}"

    @property
    def text(self) -> str:
        """The profile's text of it."""
        return _dumped(self)

    def means(self, backend: Backend) -> bool:
        """Return whether it is this version of this backend's code that may not be chosen."""
        same = (self.backend, self.version) == (backend.name, backend.version)
        return same and self.origin in {"", registry.origin(backend)}

    def __str__(self) -> str:
        return f"{self.backend} version {self.version} is quarantined: {self.reason}"


def held() -> Held:
    """Return every quarantine that holds on this machine, from all layers of the profile and of this process."""
    return on(None)


def on(where: str | None) -> list[Quarantine]:
    """Return every quarantine on the machine of this id, from all layers together.

    For None, those on this machine, and on others of which entries would be used here too.
    """
    apart = _apart.get()
    notes = profile.notes(KIND) if apart is None else apart
    if not notes:
        return []
    here = where is None
    where = where or machine.current().id
    found = (_parsed(key, text) for key, text in notes.items())
    return [each for each in found if each is not None and (each.machine == where or (here and _is_like(each.machine)))]


def _is_like(other: str) -> bool:
    """Return whether a machine is like this one: what crashed with another NumPy, or more cores, will do so here."""
    described = (file.machines().get(other) for file in profile.files())
    here = machine.current()
    return any(fields is not None and fingerprint.compare(fields, here).grade != "hard" for fields in described)


def written(where: Profile) -> tuple[list[Quarantine], dict[str, str]]:
    """Return what one profile has in quarantine, on whatever machine; and why each key that cannot be read is not."""
    found, broken = [], {}
    for key, text in where.notes(KIND).items():
        try:
            found.append(_read(key, text))
        except _UNREADABLE as error:
            broken[key] = in_a_line(error)
    return found, broken


def of(backend: Backend, among: Held | None = None) -> Quarantine | None:
    """Return what holds this version of a backend, or None.

    Args:
        backend: the backend.
        among: what ``held`` returned, if somebody has asked already.
    """
    return next((each for each in (held() if among is None else among) if each.means(backend)), None)


def add(candidate: Candidate, problem: Problem, reason: str) -> Quarantine:
    """Quarantine a candidate's backend, for this process and in the profile file if that can be written."""
    backend = candidate.backend
    made = Quarantine(
        backend.name, backend.version, machine.current().id, in_a_line(reason), registry.origin(backend),
        str(problem), candidate.config,
    )  # fmt: skip
    _keep({made.key: made.text})
    return made


def lift(backends: Iterable[Backend]) -> tuple[str, ...]:
    """Take these backends out of quarantine, and return the names of those that were in it."""
    lifted = [(backend.name, each.key) for backend in backends for each in on(None) if each.means(backend)]
    if lifted:
        _keep(dict.fromkeys(key for _, key in lifted))
    return tuple(dict.fromkeys(name for name, _ in lifted))


@contextlib.contextmanager
def kept_apart(texts: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Go by these quarantines alone within a block, and keep new ones with them: in no process and no file.

    Args:
        texts: the quarantines' texts by key, as a profile has them.

    Yields:
        The same with those that are added in the block.
    """
    now = dict(texts)
    token = _apart.set(now)
    try:
        yield now
    finally:
        _apart.reset(token)
        if now != texts:
            profile.forget_decisions()


def _keep(texts: Mapping[str, str | None]) -> None:
    if (apart := _apart.get()) is not None:
        for key, text in texts.items():
            apart.pop(key, None)
            apart.update({} if text is None else {key: text})
        profile.forget_decisions()
        return
    profile.remember_notes(texts)
    try:
        profile_file.write(profile.writable_path(), (), machine.current(), texts)
    except ProfileError as error:
        warn(f"the quarantine is kept for this process only: {error}", ProfileWarning)


def _dumped(one: Quarantine) -> str:
    body = {
        "reason": one.reason, "origin": one.origin, "problem": one.problem, "config": dict(one.config),
        "when": one.when,
    }  # fmt: skip
    text = safe_yaml.dump(body, flow=None)
    return f"{one.key}:\n{textwrap.indent(text, '  ')}"


@functools.lru_cache(maxsize=256)
def _parsed(key: str, text: str) -> Quarantine | None:
    """Read one from the profile; one that cannot be read is warned of once, and missing."""
    try:
        return _read(key, text)
    except _UNREADABLE as error:
        said = in_a_line(error)
        warn(f"profile: {key!r:.120} is ignored: {said}", ProfileWarning)
        return None


def _read(key: str, text: str) -> Quarantine:
    match = _KEY.fullmatch(key)
    if match is None:
        raise ProfileError("its key does not read like 'quarantine NAME version N | MACHINE'")
    data = next(iter(safe_yaml.load(text).values()))
    if not isinstance(data, dict) or not isinstance(data.get("reason"), str):
        raise ProfileError("it gives no reason")
    origin, problem, when = (str(data.get(name, "")) for name in ("origin", "problem", "when"))
    config = Config(data.get("config") or {})
    about = match["backend"], int(match["version"]), match["machine"]
    return Quarantine(*about, data["reason"], origin, problem, config, when)
