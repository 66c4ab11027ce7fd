"""Folders of trials go with their process, or when the next one is made; never those of the living."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from convdispatch.tuning.trial_folder import TrialFolder

ROOT = Path(__file__).parent.parent
PROGRAM = """
import os, sys, time
from convdispatch.tuning.trial_folder import TrialFolder
folder = TrialFolder()
print(folder.path, flush=True)
time.sleep(600)
"""
LONG_AGO = (0, 0)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary ones."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def other(room: Path) -> tuple["subprocess.Popen[str]", Path]:
    """Return another process that has a folder, and the folder, which looks old and has something in it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(room)}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    (folder / "0").write_bytes(b"result")
    os.utime(folder, LONG_AGO)
    return process, folder


def test_a_folder_goes_with_its_object(room: Path) -> None:
    folder = TrialFolder()
    assert Path(folder.path).parent == room
    del folder
    gc.collect()
    assert list(room.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no signal ends a process there")
def test_what_a_terminated_process_left_behind_goes_when_the_next_folder_is_made(room: Path) -> None:
    process, folder = other(room)
    own = TrialFolder()
    assert folder.exists()  # its process lives, however old it looks
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert folder.exists()
    next_one = TrialFolder()
    assert {own.path, next_one.path} == {str(path) for path in room.iterdir()}


def test_what_is_new_or_of_others_or_no_folder_stays(room: Path) -> None:
    for name in ("convdispatch-trial-new", "convdispatch-bench-x", "convdispatch-mine", "elsewhere"):
        (room / name).mkdir()
    (room / "convdispatch-trial-file").touch()
    (room / "convdispatch-trial-link").symlink_to(room / "elsewhere")
    for name in ("convdispatch-bench-x", "convdispatch-mine", "elsewhere", "convdispatch-trial-file"):
        os.utime(room / name, LONG_AGO)
    os.utime(room / "convdispatch-trial-link", LONG_AGO, follow_symlinks=False)
    before = {path.name for path in room.iterdir()}
    folder = TrialFolder()
    assert {path.name for path in room.iterdir()} == before | {Path(folder.path).name}
