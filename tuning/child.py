"""A child process that answers requests, held so that it may crash, hang or be stopped without harm to its parent.

Requests and replies are lines of JSON on the child's stdin and stdout, a reply behind a mark that keeps it apart from
what else is printed. The child leads a process group of its own, which is killed as a whole.
"""

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convdispatch import settings
from convdispatch.problem import Problem

#: Seconds that idle thread pools spin at most, where idle processes cannot be stopped.
_SPIN = 0.15
#: Seconds in which a child that says no more has to end by itself.
_LAST_WORDS = 5.0
#: The most that is kept of what a child writes to stderr, in characters.
_MOST_SAID = 4000
#: What a reply begins with, the record separator of JSON text sequences (RFC 7464): what Python's start-up files, say,
#: print before the child listens is none.
_MARK = "\x1e"

Reply = Callable[[Mapping[str, Any]], None]


# Inside the child ---------------------------------------------------------------------------------------------------


def requests() -> tuple[Iterator[dict[str, Any]], Reply]:
    """Return what is asked of this process, one by one, and what to answer with; what libraries print is none."""
    _die_with_parent()
    asked = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)

    def reply(data: Mapping[str, Any]) -> None:
        replies.write(f"{_MARK}{json.dumps(data)}\n")
        replies.flush()

    return (json.loads(line) for line in asked), reply


def _die_with_parent() -> None:
    """Ask Linux to end this process, stopped or not, when its parent ends in whatever way."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)


# The other end of the pipe ------------------------------------------------------------------------------------------


def search_path() -> str:
    """Return where a child finds convdispatch if it is not installed, also for another interpreter."""
    root = Path(sys.modules[Problem.__module__].__file__ or "").absolute().parent.parent
    given = os.environ.get("PYTHONPATH", "")
    installed = root.name in {"site-packages", "dist-packages"}  # another interpreter must not see these
    return os.pathsep.join(path for path in ("" if installed else str(root), given) if path)


class ChildLostError(Exception):
    """A child crashed, or could not be started; the message says how, or why."""


class Child:
    """A child process, and the requests to it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the process.

        Args:
            command: what to run.
            environment: all of its environment variables; what it calls is not recorded in any case.

        Raises:
            ChildLostError: if it cannot be started.
        """
        self._said, self._closed = "", False
        self._replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        try:
            self._begin(command, environment)
        except Exception as error:  # no memory, no thread, no process, no such interpreter
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ChildLostError(f"could not be started: {why}") from error

    def _begin(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the process, and the threads that read what it writes."""
        started: queue.SimpleQueue[subprocess.Popen[str] | BaseException] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._run, args=(command, environment, started), daemon=True)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        outcome = started.get()
        if isinstance(outcome, BaseException):
            raise outcome
        self._process = outcome
        try:
            self._listener.start()
        except RuntimeError:
            self._process.kill()
            raise

    def _run(
        self, command: Sequence[str], environment: Mapping[str, str],
        started: "queue.SimpleQueue[subprocess.Popen[str] | BaseException]",
    ) -> None:  # fmt: skip
        # The thread that reads also starts the process: Linux takes the end of the thread that did so for the
        # parent's, and the thread that asks may end long before the child does.
        environment = {name: value for name, value in environment.items() if name != f"{settings.PREFIX}RECORD"}
        try:
            process = subprocess.Popen(  # noqa: S603  # this interpreter or the one the user names
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                encoding="utf-8", errors="replace", env=environment, start_new_session=True,
            )  # fmt: skip
        except BaseException as error:  # noqa: BLE001  # whatever it is, somebody waits
            started.put(error)
            return
        started.put(process)
        assert process.stdout is not None  # noqa: S101  # for the type checker
        for line in process.stdout:
            _, is_reply, reply = line.rpartition(_MARK)
            with contextlib.suppress(ValueError):
                if is_reply:
                    self._replies.put(json.loads(reply))
        self._replies.put(None)
        process.wait()  # see above: it may have closed its stdout, and not ended yet

    def _listen(self) -> None:
        assert self._process.stderr is not None  # noqa: S101  # for the type checker
        for line in self._process.stderr:
            self._said = (self._said + line)[-_MOST_SAID:]

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def send(self, request: Mapping[str, Any]) -> None:
        """Ask something.

        Raises:
            OSError: if the process does not listen any more.
        """
        assert self._process.stdin is not None  # noqa: S101  # for the type checker
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def receive(self, timeout: float) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            TimeoutError: if there is none within this many seconds.
            ChildLostError: if the process ended.
        """
        try:
            reply = self._replies.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None
        if reply is None:
            raise ChildLostError(self.end())
        return reply

    def end(self) -> str:
        """Return how the process ended, or is ended now, with the last line that it wrote."""
        try:
            code = self._process.wait(timeout=_LAST_WORDS)
        except subprocess.TimeoutExpired:  # it cannot answer any more, but still runs
            self.kill()
            code = self._process.wait()
        said = self.said().splitlines()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"crashed ({how}){f': {said[-1]}' if said else ''}"

    def said(self) -> str:
        """Return the last of what it wrote to stderr."""
        if not self.running:
            self._listener.join(timeout=1)  # something that it started may still write
        return self._said.strip()

    def pause(self) -> None:
        """Stop the process while it is not asked anything: pools that spin after a call take others' cores."""
        if hasattr(signal, "SIGSTOP"):
            self._signal("SIGSTOP")
        else:
            time.sleep(_SPIN)

    def go_on(self) -> None:
        """Undo ``pause``."""
        self._signal("SIGCONT")

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):
            self._process.send_signal(getattr(signal, name))

    def kill(self) -> None:
        """End the process and what it forked: a library's helper would keep the pipe open."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # it leads a session, so this is its group
        self._process.kill()

    def close(self) -> None:
        """End the process and close its streams; once is enough."""
        if self._closed:  # its number may be another's by now
            return
        self._closed = True
        self.kill()
        self._process.wait()
        readers = {None: self._process.stdin, self._reader: self._process.stdout, self._listener: self._process.stderr}
        for reader, stream in readers.items():
            if reader is not None:
                reader.join(timeout=1)
            # A stream that is still being read cannot be closed: something that the child started has outlived it.
            if stream is not None and (reader is None or not reader.is_alive()):
                with contextlib.suppress(OSError):
                    stream.close()


def start(module: str, path: Sequence[str] = ()) -> Child:
    """Run a module of convdispatch in a process of this interpreter, which neither tunes nor starts more of them.

    Args:
        module: its full name.
        path: where else it is to find modules. What lies there may hide Python's own, so only who needs it has it.

    Raises:
        ChildLostError: if it cannot be started.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(entry for entry in (search_path(), *path) if entry)),
        f"{settings.PREFIX}TUNING": "off",
        f"{settings.PREFIX}ISOLATION": "off",
    }
    return Child([sys.executable, "-P", "-m", module], environment)
