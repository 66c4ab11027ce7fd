"""Folders for what children are to hand over, which go also where nobody is left to remove them.

A process that a signal ends removes nothing. So each holds a lock on its folder, which ends with it in whatever way,
and who makes the next folder removes those that nobody holds.
"""

import contextlib
import os
import shutil
import tempfile
import time
import weakref
from pathlib import Path

_PREFIX = "convdispatch-trial-"
#: Seconds in which whoever makes a folder comes to hold it.
_NEW = 60.0


class TrialFolder:
    """A folder that goes with this object, with this process, or soon after."""

    def __init__(self) -> None:
        """Make it, and remove what others have left behind."""
        _remove_abandoned()
        self.path = tempfile.mkdtemp(prefix=_PREFIX)
        self.remove = weakref.finalize(self, _remove, self.path, _hold(self.path), os.getpid())


def _hold(folder: str) -> int | None:
    """Return a descriptor that holds the folder for as long as it is open; None if somebody else does, or none can."""
    try:
        import fcntl  # noqa: PLC0415  # Windows has no such module; it ends no process by a signal
    except ImportError:
        return None
    with contextlib.suppress(OSError):
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(held)
        else:
            return held
    return None


def _remove(folder: str, held: int | None, process: int) -> None:
    """Remove a folder, unless this process is a copy that a fork made of the one whose it is."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def _remove_abandoned() -> None:
    """Remove this user's folders that nobody holds."""
    with contextlib.suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                status = folder.lstat()
                mine = not hasattr(os, "getuid") or status.st_uid == os.getuid()
                if mine and time.time() - status.st_mtime > _NEW and (held := _hold(str(folder))) is not None:
                    _remove(str(folder), held, os.getpid())
