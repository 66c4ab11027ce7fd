"""Child processes: what they print on their way is no reply, and what they wrote last can be read meanwhile."""

import os
import sys
import threading
from pathlib import Path

import pytest

from convdispatch.tuning.child import Child, ChildLostError, search_path

_ECHO = """
import sys
from convdispatch.tuning.child import requests
print("printed before it listens, without an end of line", end=END)
asked, reply = requests()
for request in asked:
    print("printed by a library")
    reply({"echo": request["word"]})
    if request["word"] == "write":
        for number in range(20_000):
            print("line", number, file=sys.stderr)
        reply({"written": True})
    if request["word"] == "end":
        print("last words", file=sys.stderr)
        sys.exit(3)
"""


def _child(program: str) -> Child:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((search_path(), str(Path(__file__).parent)))}
    return Child([sys.executable, "-P", "-c", program], environment)


@pytest.mark.parametrize("end", ["", "\n", "\x1e {\n"])
def test_what_a_child_prints_is_no_reply(end: str) -> None:
    child = _child(_ECHO.replace("END", repr(end)))
    try:
        for word in ("one", "two \x1e\n"):
            child.send({"word": word})
            assert child.receive(60) == {"echo": word}
    finally:
        child.close()


def test_what_a_child_says_can_be_read_while_it_writes_and_after_its_end() -> None:
    child = _child(_ECHO.replace("END", "''"))
    try:
        child.send({"word": "write"})
        assert child.receive(60) == {"echo": "write"}
        said = [child.said() for _ in range(1000)]
        assert child.receive(60) == {"written": True}
        assert all(len(text) <= 4000 for text in said)
        child.send({"word": "end"})
        assert child.receive(60) == {"echo": "end"}
        with pytest.raises(ChildLostError, match=r"crashed \(exit code 3\): last words"):
            child.receive(60)
        lines = [line for line in child.said().splitlines() if line.startswith("line ")]
        assert lines[-300:] == [f"line {number}" for number in range(19_700, 20_000)]
    finally:
        child.close()


def test_a_child_that_cannot_be_started_is_an_error() -> None:
    with pytest.raises(ChildLostError, match="could not be started: No such file"):
        Child(["/nowhere/python"], {})


@pytest.mark.parametrize("beginning", [0, 1])
def test_a_child_that_no_thread_can_be_had_for_is_an_error_and_ends(
    monkeypatch: pytest.MonkeyPatch, beginning: int
) -> None:
    begun: list[threading.Thread] = []
    begin = threading.Thread.start

    def some(thread: threading.Thread) -> None:
        if len(begun) == beginning:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", some)
    with pytest.raises(ChildLostError, match="could not be started: can't start new thread"):
        _child(_ECHO.replace("END", "''"))
    for thread in begun:  # it reads until the process has ended
        thread.join(60)
        assert not thread.is_alive()
