"""What must not happen while a kernel is compiled: another compilation, a fork, garbage collection, Ctrl-C."""

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator

from numba.core.compiler_lock import global_compiler_lock

if hasattr(os, "register_at_fork"):
    # A child would find the lock held, and LLVM half done, by a thread that it does not have.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Compile in this block, undisturbed: forks and other threads' compilations wait, and so does Ctrl-C."""
    with global_compiler_lock, _interrupts_later(), _no_collection():
        yield


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from looking for garbage: a compiler makes many objects and little of it, and a tenth is saved."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C back until the end: LLVM calls Python back, and what is raised in there is lost on the way."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if came:
            raise KeyboardInterrupt
