"""The store under stress: many writers, killed writers, no locks, cut files; and what a large profile costs."""

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_profile_tools import HERE, OTHER, PROBLEM, entry, row, text_of

from convdispatch import machine, profile, profile_file, safe_file, settings
from convdispatch.errors import ConvDispatchError, ProfileError, ProfileWarning
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Key
from convdispatch.profile_file import Profile
from convdispatch.tuning import record
from convdispatch.tuning.workload import Layer, Workload

fcntl = pytest.importorskip("fcntl", reason="without locks can be tried only where locks are to be had")

#: A process that stores entries and says so; with a third argument, on what seems to be a filesystem without locks.
WRITER = """
import errno, fcntl, sys
from pathlib import Path
from convdispatch import machine, profile, profile_file
from convdispatch.backend import Config
from convdispatch.problem import Problem
path, number, count, locks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")
if locks == "without":
    fcntl.flock = refuse
row = profile.Result("fft", 1, Config(), 1e-3, 0.0, 1, 0.0, 0)
for height in range(1, count + 1):
    about = profile.Key(Problem.parse(f"{number}x{height}x6x2 * 1x1x2x3 VALID"), "plan", 1, "there")
    profile_file.write(path, [profile.Entry(about, (row,))], machine.current())
    print(about, flush=True)
"""


def writer(path: Path, number: int, count: int, locks: str = "with") -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WRITER, str(path), str(number), str(count), locks]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profile.yaml"


def leftovers(path: Path) -> list[str]:
    return [child.name for child in path.parent.iterdir() if child.name not in {path.name, path.name + ".lock"}]


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    yield
    monkeypatch.undo()


# Many writers, and killed ones --------------------------------------------------------------------------------------

full = pytest.mark.slow
SIZES = [pytest.param(3, 12, id="few"), pytest.param(8, 100, marks=full, id="8x100")]


@pytest.mark.parametrize(("processes", "count"), SIZES)
@pytest.mark.parametrize("locks", ["with", "without"])
def test_processes_that_write_at_once_lose_nothing(path: Path, processes: int, count: int, locks: str) -> None:
    running = [writer(path, number, count, locks) for number in range(1, processes + 1)]
    for process in running:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
    found = {str(one.key) for one in profile_file.read(path).entries()}
    assert len(found) == processes * count
    assert leftovers(path) == []


@pytest.mark.parametrize("kills", [pytest.param(6, id="few"), pytest.param(200, marks=full, id="200")])
@pytest.mark.parametrize("locks", ["with", "without"])
def test_what_was_reported_stored_survives_kills_at_random_moments(path: Path, kills: int, locks: str) -> None:
    when = random.Random(4)
    stored: set[str] = set()
    for kill in range(1, kills + 1):
        process = writer(path, kill, 10_000, locks)
        assert process.stdout is not None
        stored.add(process.stdout.readline().strip())  # it has begun to write
        time.sleep(when.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
        stored.update(line for line in said.splitlines() if line.endswith("| there"))
        found = profile_file.read(path)
        assert found.broken() == {}
        assert stored <= {str(one.key) for one in found.entries()}
        assert len(leftovers(path)) <= 2  # at most the last one's, and what it held
    _, said = (last := writer(path, kills + 1, 1, locks)).communicate(timeout=60)
    assert last.returncode == 0, said
    assert leftovers(path) == []
    assert len(profile_file.read(path).entries()) > kills


# Without locks ------------------------------------------------------------------------------------------------------


def test_without_locks_a_marker_is_held_while_writing(path: Path, no_locks: None) -> None:
    marker = path.with_name("profile.yaml.held")
    with safe_file.exclusive(path):
        assert marker.exists()
        with pytest.raises(TimeoutError), safe_file.exclusive(path, seconds=0.0):
            pytest.fail("held twice, though the first holder lives")
    assert not marker.exists()
    profile_file.write(path, [entry()], HERE)
    assert profile_file.read(path).entries() == [entry()]
    assert leftovers(path) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path) -> None:
    """As root, /dev/null would become a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writes: tuple[Callable[[], None], ...] = (
        lambda: safe_file.replace(pipe, b"text"),
        lambda: profile_file.replace_file(pipe, "text"),
        lambda: record.merge(pipe, Workload("calls", (Layer(Problem.parse("1x9x9x1 * 3x3x1x1 SAME"), 1),))),
    )
    for write in writes:
        with pytest.raises((OSError, ConvDispatchError), match="no regular file"):
            write()
    with pytest.raises(ProfileError):
        profile_file.write(pipe, [], machine.current())
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_dead_writers_marker_on_this_machine_is_taken_away_at_once(path: Path, no_locks: None) -> None:
    code = "import os, sys, filelock; lock = filelock.SoftFileLock(sys.argv[1]); lock.acquire(); os._exit(0)"
    marker = path.with_name("profile.yaml.held")
    subprocess.run([sys.executable, "-c", code, str(marker)], check=True)
    assert marker.exists()
    profile_file.write(path, [entry()], HERE)
    assert leftovers(path) == []


def test_a_marker_from_elsewhere_that_never_changes_is_taken_away_after_the_wait(path: Path, no_locks: None) -> None:
    marker = path.with_name("profile.yaml.held")
    marker.write_text("1\nanother-host\n")
    with safe_file.exclusive(path, seconds=0.05):
        assert "another-host" not in marker.read_text()
    assert leftovers(path) == []


def test_an_empty_marker_of_a_killed_process_is_taken_away_soon(
    path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_file, "_SECONDS_WITHOUT_NAME", 0.05)
    marker = path.with_name("profile.yaml.held")
    marker.touch()
    seen = []
    acquire = filelock.SoftFileLock.acquire

    def watched(self: Any, *words: Any, **more: Any) -> Any:
        seen.append(marker.exists())
        return acquire(self, *words, **more)

    monkeypatch.setattr(filelock.SoftFileLock, "acquire", watched)
    profile_file.write(path, [entry()], HERE)
    assert seen == [False]
    assert leftovers(path) == []


def test_an_empty_marker_whose_holder_writes_its_name_is_left(
    path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = path.with_name("profile.yaml.held")
    marker.touch()
    monkeypatch.setattr(time, "sleep", lambda _: marker.write_text("1\nanother-host\n"))
    safe_file._wait_for_a_name(marker, 3600)
    assert marker.read_text() == "1\nanother-host\n"


def test_an_empty_marker_that_may_be_a_living_writers_is_left(path: Path, no_locks: None) -> None:
    marker = path.with_name("profile.yaml.held")
    marker.touch()
    safe_file._wait_for_a_name(marker, 0.03)
    assert marker.exists()


def test_a_marker_that_changed_hands_while_waiting_is_left(
    path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = path.with_name("profile.yaml.held")
    marker.write_text("1\nanother-host\n")

    def passed_on(self: Any, *_: Any, **__: Any) -> None:
        marker.unlink()
        time.sleep(0.001)
        marker.write_text("2\nanother-host\n")
        raise filelock.Timeout(str(marker))

    monkeypatch.setattr(filelock.SoftFileLock, "acquire", passed_on)
    with pytest.raises(ProfileError, match=r"profile\.yaml cannot be written"):
        profile_file.write(path, [entry()], HERE)
    assert marker.read_text() == "2\nanother-host\n"
    assert not path.exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_every_way_to_have_no_locks_is_known(path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(fcntl, "flock", refuse)
    profile_file.write(path, [entry()], HERE)
    assert profile_file.read(path).entries() == [entry()]


def test_a_link_and_its_file_have_one_lock(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    profile_file.write(link, [entry()], HERE)
    assert {child.name for child in tmp_path.iterdir()} == {"profile.yaml", "profile.yaml.lock", "link.yaml"}


def test_a_killed_writers_halves_are_cleared_away(path: Path) -> None:
    for number in range(3):
        (path.parent / f".profile.yaml-{10**7 + number}.tmp").write_text("half")
    others = {".other.yaml-1.tmp", ".profile.yaml-b.yaml-1.tmp", ".profile.yaml-1.yaml-1.tmp"}
    for name in others:
        (path.parent / name).write_text("of a file that somebody else is writing")
    profile_file.write(path, [entry()], HERE)
    assert set(leftovers(path)) == others


# Cut and broken files -----------------------------------------------------------------------------------------------

THIRD = PROBLEM.replace(n=3)
MANY = text_of(entry(), entry(problem=OTHER), entry(problem=THIRD))


@given(st.integers(0, len(MANY)))
def test_a_cut_file_keeps_every_entry_that_is_whole_and_can_be_written_again(path: Path, length: int) -> None:
    text = MANY[:length]
    path.write_text(text)
    path.with_name("profile.yaml.broken").unlink(missing_ok=True)
    if text and not text.startswith("format: 1"):
        with pytest.raises(ProfileError, match="is not a profile"):
            profile_file.write(path, [entry()], HERE)
        assert path.read_text() == text
        return
    whole = [one for one in (entry(), entry(problem=OTHER), entry(problem=THIRD)) if profile.dump_entry(one) in text]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ProfileWarning)
        before = profile_file.read(path).entries()
        assert [one for one in before if one in whole] == whole
        new = entry(problem=PROBLEM.replace(n=4))
        profile_file.write(path, [new], HERE)
        assert [one for one in profile_file.read(path).entries() if one in whole] == whole
        assert new in profile_file.read(path).entries()
    assert text.rstrip() in path.read_text()  # what is broken stays to be mended


def test_what_a_person_broke_is_kept_aside_when_it_is_measured_anew(path: Path) -> None:
    broken = MANY.replace("  effort: measure", "  effort: much  # my edit", 1)
    path.write_text(broken)
    profile_file.write(path, [entry(problem=OTHER)], HERE)
    aside = path.with_name("profile.yaml.broken")
    assert "# my edit" in path.read_text()  # another's entry was written: this one stays where it is
    assert not aside.exists()
    profile_file.write(path, [entry()], HERE)
    assert "# my edit" not in path.read_text()
    assert "effort: much  # my edit" in aside.read_text()
    assert aside.read_text().startswith(f"{entry().key}:")
    profile_file.write(path, [entry()], HERE)
    assert aside.read_text().count("my edit") == 1
    assert len(profile_file.read(path).entries()) == 3


def test_lines_at_the_edge_that_belong_nowhere_survive_even_if_they_are_alike(path: Path) -> None:
    text = MANY.replace("\n  winner:", "\nwinner:")  # a person's editor lost its place, three times
    path.write_text(text)
    profile_file.write(path, [entry(problem=PROBLEM.replace(n=4))], HERE)
    assert path.read_text().count("\nwinner: ") == 3
    assert text.rstrip() in path.read_text()


def test_a_byte_that_is_no_utf8_spoils_its_own_entry_only(path: Path) -> None:
    content = MANY.encode().replace(b"  effort: measure", b"  effort: measure  # caf\xe9", 1)
    path.write_bytes(content)
    with settings.options(profile=path):
        with pytest.warns(ProfileWarning, match="is ignored") as told:
            assert profile.find(entry().key) == []
        assert len(told) == 1
        assert [found.entry for found in profile.find(entry(problem=OTHER).key)] == [entry(problem=OTHER)]
    profile_file.write(path, [entry(problem=THIRD)], HERE)
    assert b"caf\xe9" in path.read_bytes()
    profile_file.write(path, [entry()], HERE)
    assert b"caf\xe9" not in path.read_bytes()
    assert b"caf\xe9" in path.with_name("profile.yaml.broken").read_bytes()


def test_of_a_key_that_stands_twice_the_last_counts_with_one_warning(path: Path) -> None:
    path.write_text(MANY + "\n" + profile.dump_entry(entry(row("direct"))))
    found = profile_file.read(path)
    with pytest.warns(ProfileWarning, match=r"stands at lines \d+ and \d+: the last counts") as told:
        assert found.get(entry().key) == entry(row("direct"))
    assert found.get(entry().key) == entry(row("direct"))
    assert len(told) == 1
    profile_file.write(path, [entry(row("numba"))], HERE)
    assert path.read_text().count(f"{entry().key}:") == 1
    aside = path.with_name("profile.yaml.broken").read_text()
    assert aside.count(f"{entry().key}:") == 2


def test_the_same_text_twice_is_no_matter(path: Path) -> None:
    path.write_text(MANY + "\n" + MANY)
    assert profile_file.read(path).get(entry().key) == entry()
    assert len(profile_file.read(path).entries()) == 3


def test_comments_stay_with_what_they_stand_before(path: Path) -> None:
    text = MANY.replace(f"{entry(problem=OTHER).key}:", f"# why this one\n{entry(problem=OTHER).key}:")
    text = text.replace("format: 1\n", "format: 1\n\n# the box in the corner\n")
    path.write_text(text)
    profile_file.write(path, [entry(row("direct"))], HERE)
    written = path.read_text()
    assert f"# why this one\n{entry(problem=OTHER).key}:" in written
    assert f"# the box in the corner\n\nmachine {HERE.id}:" in written
    assert "winner: direct" in written
    profile_file.edit(path, lambda old: {str(entry().key): None})
    assert f"# why this one\n{entry(problem=OTHER).key}:" in path.read_text()
    assert len(profile_file.read(path).entries()) == 2


def test_comments_alone_are_an_empty_profile(path: Path) -> None:
    path.write_text("# A convdispatch profile: which backe")
    assert profile_file.read(path).entries() == []
    profile_file.write(path, [entry()], HERE)
    assert path.read_text().startswith("# A convdispatch profile: which backe\nformat: 1\n")
    assert profile_file.read(path).entries() == [entry()]


# Like machines ------------------------------------------------------------------------------------------------------

LIKE = {**HERE.describe(), "libraries": ["numpy 1.0", *HERE.libraries[1:]]}
LESS = {**HERE.describe(), "libraries": ["numpy 1.0"], "caches": [1, 2, 3]}
FAR = {**HERE.describe(), "system": "Plan9 mips"}


def winners(key: Key) -> list[tuple[str, str, bool]]:
    return [(found.layer, found.entry.winner.backend, found.exact) for found in profile.find(key)]


def one(backend: str, where: str = HERE.id) -> Entry:
    return entry(row(backend), where=where)


def test_exact_entries_of_every_layer_come_before_soft_ones_and_the_more_alike_first(path: Path) -> None:
    machines = {HERE.id: HERE.describe(), "less": LESS, "like": LIKE, "far": FAR}
    path.write_text(text_of(one("a", "less"), one("b", "far"), one("c", "lost"), machines=machines))
    for place, entries in ((profile.user_path(), [one("d", "like"), one("e")]), (profile.system_path(), [one("f")])):
        place.parent.mkdir(parents=True)
        place.write_text(text_of(*entries, machines=machines))
    with settings.options(profile=path):
        assert winners(one("x").key) == [
            ("user", "e", True), ("system", "f", True), ("user", "d", False), ("project", "a", False),
        ]  # fmt: skip
        profile.remember(one("g"))
        assert winners(one("x").key)[0] == ("in-process", "g", True)
        soft = profile.find(one("x").key)[-2]
        assert soft.differences == (f"numpy 1.0 instead of {HERE.libraries[0].split()[1]}",)
        assert soft.entry.key.machine == "like"


def test_an_entry_for_more_threads_than_a_like_machine_has_is_not_used(path: Path) -> None:
    cores = {**HERE.describe(), "cores": HERE.cores + 1}
    threads = HERE.cores + 1
    path.write_text(text_of(entry(where="big", threads=threads), machines={"big": cores}))
    with settings.options(profile=path):
        assert profile.find(entry(threads=threads).key) == []


def test_a_broken_description_of_a_machine_is_one_warning_and_no_match(path: Path) -> None:
    path.write_text(text_of(one("a", "like"), machines={}, more="machine like:\n  [cpu\n"))
    with settings.options(profile=path):
        with pytest.warns(ProfileWarning, match="machine like"):
            assert profile.find(one("x").key) == []
        assert profile.find(one("x").key) == []


def test_a_file_that_was_replaced_within_a_tick_of_the_clock_is_noticed(path: Path) -> None:
    path.write_text(text_of(one("aa")))
    status = path.stat()
    with settings.options(profile=path):
        assert winners(one("x").key) == [("project", "aa", True)]
        beside = path.with_name("beside")
        beside.write_text(text_of(one("bb")))
        os.utime(beside, ns=(status.st_atime_ns, status.st_mtime_ns))
        beside.replace(path)
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
        assert winners(one("x").key) == [("project", "bb", True)]


# Large profiles -----------------------------------------------------------------------------------------------------


def noted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Return a list that fills with the first argument of each call of one of the profile's functions."""
    function, calls = getattr(profile_file, name), []

    def wrapped(first: Any, *rest: Any) -> Any:
        calls.append(first)
        return function(first, *rest)

    monkeypatch.setattr(profile_file, name, wrapped)
    return calls


def test_of_a_large_profile_only_what_is_asked_for_is_parsed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = profile.dump_entry(entry())
    texts = [chunk.replace("1x6x6x2", f"{n}x6x6x2", 1) for n in range(1, 1001)]
    path.write_text(text_of(machines={HERE.id: HERE.describe(), "like": LIKE}) + "\n".join(texts))
    parsed = noted(monkeypatch, "parse_entry")
    keys = noted(monkeypatch, "parse_key")
    with settings.options(profile=path):
        asked = entry(problem=PROBLEM.replace(n=777)).key
        for _ in range(3):
            assert [found.entry.key for found in profile.find(asked)] == [asked]
        assert (parsed, keys) == ([asked], [])
        for n in (2000, 2001):
            assert profile.find(replace(asked, problem=PROBLEM.replace(n=n))) == []
        near = replace(asked, problem=PROBLEM.replace(pads=(0, 0, 0, 0)))
        assert profile.find(near) == []
    assert parsed == [asked]
    assert len(keys) <= 1


def test_a_write_to_a_large_profile_parses_nothing_but_what_it_replaces(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text(MANY)
    parsed = noted(monkeypatch, "parse_entry")
    profile_file.write(path, [entry(problem=PROBLEM.replace(n=4))], HERE)
    assert parsed == []
    profile_file.write(path, [entry(row("direct"))], HERE)
    assert parsed == [entry().key]


def test_text_outside_of_what_changes_is_untouched(path: Path) -> None:
    odd = MANY.replace("\n\n", "\n\n\n").replace("  results:", "  results:   # here") + textwrap.dedent("""\
        my notes:
            -   kept:   {as: they,   are: here}


        """)
    path.write_text(odd)
    profile_file.write(path, [entry(problem=OTHER)], HERE)
    changed = f"{entry(problem=OTHER).key}:"
    before, after = (Profile(text, "x").chunks() for text in (odd, path.read_text()))
    same = set(before) - {changed[:-1], f"machine {HERE.id}"}
    assert {key: before[key].rstrip() for key in same} == {key: after[key].rstrip() for key in same}
    assert list(before) == list(after)
