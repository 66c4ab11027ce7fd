"""Changing a file that other processes change too: one at a time, and as a whole or not at all."""

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: Nobody holds a file for a tenth of this; who seems to is gone, or on a machine that is.
_SECONDS_TO_WAIT = 30.0
#: Who takes a marker writes its name into it at once; one that stays empty for so long was left by a killed process.
_SECONDS_WITHOUT_NAME = 2.0
_SECONDS_BETWEEN_TRIES = 0.01
_HELD_BY_ANOTHER = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}


def real(path: Path) -> Path:
    """Return the file behind a path and its links, so that all who change it take turns at one place."""
    return Path(os.path.realpath(path))


def _check_regular(path: Path) -> None:
    """Raise OSError for a device, a pipe or a folder: a file would take its place, and it would be gone."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is there and is no regular file", str(path))


@contextlib.contextmanager
def exclusive(path: Path, seconds: float = _SECONDS_TO_WAIT) -> Iterator[None]:
    """Hold the sole right to change a file, among all processes that ask for it this way.

    The lock is on ``PATH.lock``, an empty file that stays. On a filesystem that has no locks, it is that
    ``PATH.held`` exists; one that a killed process left behind is taken away by the next who wants it: at once if
    that was on this machine, soon if it has no name in it, else when it has stood unchanged for the whole wait.

    Args:
        path: the file, which need not exist; its folder must.
        seconds: how long to wait for others.

    Raises:
        OSError: if it is no regular file, or cannot be locked; ``TimeoutError``, which is one, if others hold it for
            so long.
    """
    import filelock  # noqa: PLC0415  # needed only where something is written

    _check_regular(path)
    lock = path.with_name(path.name + ".lock")
    if _can_lock(lock):
        with filelock.FileLock(lock, timeout=seconds, poll_interval=_SECONDS_BETWEEN_TRIES):
            yield
        return
    marker = path.with_name(path.name + ".held")
    held = filelock.SoftFileLock(marker, timeout=seconds, poll_interval=_SECONDS_BETWEEN_TRIES)
    _wait_for_a_name(marker, seconds)
    before = _stamp(marker)
    try:
        held.acquire()
    except filelock.Timeout:
        if before is None or _stamp(marker) != before or _is_of_this_machine(marker):
            raise  # others come and go, or one is slow: it is only crowded
        _take_away(marker, before)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def _can_lock(lock: Path) -> bool:
    """Return whether the filesystem has locks; makes the lock's file."""
    try:
        import fcntl  # noqa: PLC0415  # Windows has no such module, and its filesystems have locks
    except ImportError:
        return True
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _HELD_BY_ANOTHER
    finally:
        os.close(descriptor)
    return True


class _Stamp(NamedTuple):
    """What tells a file from another one at the same path."""

    number: int
    changed: int
    size: int


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return _Stamp(status.st_ino, status.st_mtime_ns, status.st_size)


def _is_of_this_machine(marker: Path) -> bool:
    """Return whether a marker's holder is on this machine, and alive: else filelock would have taken it away."""
    import socket  # noqa: PLC0415  # needed only in this rare case

    try:
        return socket.gethostname() in marker.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):
        return False


def _wait_for_a_name(marker: Path, seconds: float) -> None:
    """Wait until there is no empty marker, but no longer than that; take one away that stood for long enough."""
    until = time.monotonic() + min(seconds, _SECONDS_WITHOUT_NAME)
    if (first := _stamp(marker)) is None or first.size > 0:
        return
    while _stamp(marker) == first:
        if time.monotonic() > until:
            if seconds >= _SECONDS_WITHOUT_NAME:
                _take_away(marker, first)
            return
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _take_away(marker: Path, stamp: _Stamp) -> None:
    """Remove a marker that nobody holds, and no other one that came in its place meanwhile."""
    aside = marker.with_name(f".{marker.name}-{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        marker.rename(aside)
        if _stamp(aside) != stamp:
            marker.hardlink_to(aside)  # back again, unless there is yet another one
        aside.unlink()


def replace(path: Path, content: bytes) -> None:
    """Replace a file's content at one stroke; to be called by who holds it. Readers see the old file or the new.

    Raises:
        OSError: if that is impossible; the old file is unchanged then, and nothing else is left.
    """
    _check_regular(path)
    # Not by tempfile: its files are for their owner only, and this one may be everyone's.
    beside = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    draft = re.compile(rf"\.{re.escape(path.name)}-\d+\.tmp")  # no wider: the folder has other files' drafts too
    for stale in path.parent.glob(".*.tmp"):
        if draft.fullmatch(stale.name):
            stale.unlink(missing_ok=True)  # a killed process's: the living do this one at a time
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
