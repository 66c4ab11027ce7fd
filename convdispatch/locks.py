"""Locks of modules: a forked child finds them free, since who held them in the parent is not there to release them."""

import os
import threading
from typing import Any


def _free_after_fork(lock: Any) -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lock._at_fork_reinit)  # noqa: SLF001  # as the standard library does


def module_lock() -> threading.Lock:
    """Return a lock for the life of the process."""
    lock = threading.Lock()
    _free_after_fork(lock)
    return lock


def module_rlock() -> Any:
    """Return a lock for the life of the process that its holder may take again."""
    lock = threading.RLock()
    _free_after_fork(lock)
    return lock
