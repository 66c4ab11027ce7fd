"""Profiles: what is written is read again, people may edit it, and nothing that a file holds can do harm."""

import os
import re
import string
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convdispatch import machine, profile, profile_file, safe_yaml, settings
from convdispatch.arguments import DEPLOYMENTS
from convdispatch.backend import Config
from convdispatch.errors import ProfileError, ProfileWarning
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Failure, Key, Result, parse_key
from convdispatch.profile_file import Profile

HERE = machine.current()
PROBLEM = Problem.parse("1x6x6x2 * 3x3x2x3 SAME")
OTHER = Problem.parse("1x5x5x2 * 1x1x2x3 VALID +bias +leaky_relu(0.1)")
FORM = "format: 1\n"


def key(problem: Problem = PROBLEM, deployment: str = "plan", threads: int = 2, where: str = HERE.id) -> Key:
    return Key(problem, deployment, threads, where)


def result(backend: str = "fft", median: float = 1e-3, **more: Any) -> Result:
    values = {"version": 1, "config": Config(threads=1), "spread": 0.02, "rounds": 7, "error": 1e-7, "workspace": 64}
    return Result(backend, median=median, **{**values, **more})


def entry(about: Key | None = None, *results: Result, **more: Any) -> Entry:
    chosen = results or (result("fft"), result("direct", 2e-3))
    return Entry(about or key(), chosen, **{"tuned": "2026-11-22T18:50:00+00:00", **more})


def written(path: Path, *entries: Entry) -> str:
    profile_file.write(path, entries, HERE)
    return path.read_text()


def quiet(text: str, about: Key | None = None) -> Entry | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ProfileWarning)
        return Profile(text, "some.yaml").get(about or key())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profile.yaml"


# What is written is read -----------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z][a-z0-9_.-]{0,12}", fullmatch=True) | st.sampled_from(["null", "true", "no", "y", "e1"])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["a: b", "a #b", "- c", "{", "null", "1", "2026-11-22", "line\nline\n", "x\n\n# no comment\ny: 2", "'", '"', "%"]
)
values = st.integers(1 - 2**63, 2**63 - 1) | st.floats(allow_nan=False) | texts | st.booleans()
configs = st.builds(
    lambda items, threads: Config(items, threads=threads),
    st.dictionaries(texts.filter(lambda text: text != "threads"), values, max_size=3),
    st.integers(1, 2),
)
positive = st.floats(0, 1e6)
problems = st.sampled_from([PROBLEM, OTHER, PROBLEM.replace(data_format="NCHW", dtype="bfloat16")])
keys = st.builds(Key, problems, st.sampled_from(DEPLOYMENTS), st.integers(2, 9999), st.just("zen4-2c-1f3a99c0"))
intervals = st.none() | st.tuples(positive, positive).map(lambda ends: (min(ends), max(ends)))
counts = st.integers(0, 99)
results = st.builds(
    Result, names, counts, configs, positive, positive, counts, positive, st.integers(0, 2**40), intervals
)
failures = st.builds(Failure, names, st.integers(0, 99), configs, texts)
entries = st.builds(
    lambda about, results, failures, effort, flags: Entry(
        about, (results[0], *sorted(results[1:], key=lambda one: one.median)), tuple(failures), effort, flags=flags
    ),
    keys,
    st.lists(results, min_size=1, max_size=4, unique_by=lambda one: one.name),
    st.lists(failures, max_size=2),
    st.sampled_from(settings.EFFORTS),
    st.sampled_from([(), ("busy",), ("busy", "soft")]),
)


def rounded(one: Result) -> tuple[Any, ...]:
    ends = [seconds * 1e6 for seconds in one.interval or ()]
    numbers = (float(f"{value:.4g}") for value in (one.median * 1e6, one.spread, one.error, *ends))
    return (one.backend, one.version, one.config, *numbers, one.rounds, one.workspace)


@given(entries)
def test_every_entry_survives_the_file_to_four_digits(one: Entry) -> None:
    text = FORM + profile.dump_entry(one)
    again = Profile(text, "some.yaml").get(one.key)
    assert again is not None
    assert rounded(again.winner) == rounded(one.winner)
    assert sorted(map(repr, map(rounded, again.results))) == sorted(map(repr, map(rounded, one.results)))
    assert again.failures == one.failures
    assert (again.key, again.effort, again.tuned, again.flags) == (one.key, one.effort, one.tuned, one.flags)


@given(st.lists(entries, max_size=4, unique_by=lambda one: one.key))
def test_a_written_profile_is_one_yaml_mapping_of_all_that_was_written(many: list[Entry]) -> None:
    chunks = [profile.dump_machine(HERE.id, HERE.describe()), *map(profile.dump_entry, many)]
    text = FORM + "\n".join(chunks)
    data = safe_yaml.load(text)
    assert list(data) == ["format", f"machine {HERE.id}", *(str(one.key) for one in many)]
    found = Profile(text, "some.yaml").entries()
    assert [one.key for one in found] == [one.key for one in many]
    assert [one.winner.name for one in found] == [one.winner.name for one in many]


@pytest.mark.parametrize("bad", ["3", "[1]", "[2, 1]", "[1, .inf]", "[a, b]", "[1, 2, 3]"])
def test_an_interval_that_is_none_makes_the_entry_a_miss(bad: str) -> None:
    text = FORM + profile.dump_entry(entry(None, result(interval=(9e-4, 2e-3))))
    assert quiet(text) is not None
    assert quiet(re.sub(r"interval_us: \[.*?\]", f"interval_us: {bad}", text)) is None


@pytest.mark.parametrize("bad", ["busy", "[1]", "[two words]", "{a: b}"])
def test_flags_that_are_no_words_make_the_entry_a_miss(bad: str) -> None:
    text = FORM + profile.dump_entry(entry(flags=("busy",)))
    assert quiet(text) is not None
    assert quiet(text.replace("flags: [busy]", f"flags: {bad}")) is None


def test_a_key_reads_as_it_is_written() -> None:
    assert str(key()) == f"1x6x6x2 * 3x3x2x3 SAME | plan | 2 threads | {HERE.id}"
    assert parse_key(str(key())) == key()
    assert parse_key("1x6x6x2*3x3x2x3   SAME|call|1 thread|m") == Key(PROBLEM, "call", 1, "m")


@pytest.mark.parametrize(
    "text",
    ["", "a | b", "1x6x6x2 * 3x3x2x3 | both | 2 threads | m", "1x6x6x2 * 3x3x2x3 | plan | two threads | m",
     "1x6x6x2 * 3x3x2x3 | plan | 0 threads | m", "1x6x6x2 | plan | 2 threads | m"],
)  # fmt: skip
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_key(text)


def test_write_then_read(path: Path) -> None:
    text = written(path, entry(), entry(key(OTHER), failures=(Failure("mine", 1, Config(threads=1), "no"),)))
    assert text.startswith("# A convdispatch profile")
    assert "\n  winner: fft(threads=1)\n" in text
    assert f"cpu: {HERE.cpu}" in text or f"cpu: '{HERE.cpu}'" in text
    found = profile_file.read(path).entries()
    assert found == [entry(), entry(key(OTHER), failures=(Failure("mine", 1, Config(threads=1), "no"),))]


def test_a_file_that_is_not_there_or_empty_is_an_empty_profile(path: Path) -> None:
    assert profile_file.read(path).entries() == []
    path.write_text("\n")
    assert profile_file.read(path).entries() == []
    assert profile_file.read(path).get(key()) is None


def test_a_second_write_replaces_its_keys_and_keeps_the_rest(path: Path) -> None:
    written(path, entry(), entry(key(OTHER)))
    text = written(path, entry(key(), result("numba")))
    assert text.count(str(key())) == 1
    found = {one.key: one.winner.backend for one in profile_file.read(path).entries()}
    assert found == {key(): "numba", key(OTHER): "fft"}


def test_writing_nothing_again_and_again_changes_nothing(path: Path) -> None:
    first = written(path, entry())
    assert written(path) == first
    assert written(path) == first


# Edited by hand --------------------------------------------------------------------------------------------------


def test_another_winner_may_be_written_by_hand(path: Path) -> None:
    text = written(path, entry()).replace("winner: fft(threads=1)", "winner: direct(threads=1)  # I know better")
    again = Profile(text, "some.yaml").get(key())
    assert again is not None
    assert [one.backend for one in again.results] == ["direct", "fft"]


@pytest.mark.parametrize("name", ["winograd(m=4,threads=1)", "winograd( threads=1, m=4 )", "winograd (m=4, threads=1)"])
def test_a_winner_by_hand_may_have_other_spaces_and_another_order(path: Path, name: str) -> None:
    rows = tuple(result("winograd", config=Config(m=m, threads=1)) for m in (2, 4))
    text = written(path, entry(None, *rows)).replace("winner: winograd(m=2, threads=1)", f"winner: {name}")
    again = Profile(text, "some.yaml").get(key())
    assert again is not None
    assert again.winner.name == "winograd(m=4, threads=1)"


EDITS: dict[str, Callable[[str], str]] = {
    "comments": lambda text: text.replace("\n", "  # why\n").replace(
        "  winner", "\n# at the edge\n  # inside\n  winner"
    ),
    "a quoted key": lambda text: text.replace(f"{key()}:", f"'{key()}':"),
    "a doubly quoted key": lambda text: text.replace(f"{key()}:", f'"{key()}" :'),
    "a comment behind the key": lambda text: text.replace(f"{key()}:", f"{key()}:   # mine"),
    "other spaces in the key": lambda text: text.replace(f"{key()}:", f"{str(key()).replace(' | ', '  |  ')}:"),
    "other words in the key": lambda text: text.replace(" SAME |", " pad=1 stride=1 float32 |"),
    "unknown fields": lambda text: text.replace("  winner", "  note: {by: me, why: [a, b]}\n  winner").replace(
        "{backend", "{mood: good, backend"
    ),
    "no failures, no date": lambda text: re.sub(r"  (failures|tuned):.*\n", "", text),
    "block style": lambda text: re.sub(
        r"  - {(.*)}\n",
        lambda row: "  - " + "\n    ".join(re.split(r", (?=[a-z_]+:)", row[1])) + "\n",
        text.replace("{threads: 1}", "{threads: 1}"),
    ),
    "results first": lambda text: re.sub(r"(  winner.*\n(?:.*\n)*?)(  results:\n(?:  - .*\n)+)", r"\2\1", text),
    "machine last": lambda text: re.sub(r"(machine .*:\n(?:  .*\n)+)((?:.|\n)*)", r"\2\n\1", text),
    "format last": lambda text: text.replace(FORM, "") + FORM,
    "a document's marks": lambda text: "---\n" + text + "...\n",
    "Windows line ends": lambda text: text.replace("\n", "\r\n"),
    "a byte order mark": lambda text: "\ufeff" + text,
    "no final line end": lambda text: text.rstrip(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_harmless_edits_change_nothing(path: Path, edit: Callable[[str], str]) -> None:
    text = written(path, entry())
    edited = edit(text)
    assert edited != text
    path.write_bytes(edited.encode())
    assert profile_file.read(path).get(key()) == entry(tuned=entry().tuned if "tuned" in edited else "")
    assert [one.key for one in profile_file.read(path).entries()] == [key()]
    rewritten = written(path, entry(key(OTHER)))  # and it stays readable when a tuner writes to it
    safe_yaml.load(rewritten)
    assert {one.key for one in profile_file.read(path).entries()} == {key(), key(OTHER)}


def test_a_key_in_canonical_words_wins_over_the_same_in_others(path: Path) -> None:
    text = written(path, entry())
    text += (
        str(key()).replace(" SAME", " pad=1")
        + ":"
        + text.split(f"{key()}:")[1].replace("winner: fft", "winner: direct")
    )
    again = Profile(text, "some.yaml").get(key())
    assert again is not None
    assert again.winner.backend == "fft"


def test_what_others_wrote_survives_a_write_verbatim(path: Path) -> None:
    foreign = textwrap.dedent("""\
        my notes:
          - anything: {at: all}   # kept
          - |
            text: of
              any shape

        machine somebody-else:
          cpu: unknown

        1x6x6x2 * 3x3x2x3 SAME | plan | 4 threads | somebody-else:
          winner: from-the-future(dial=11)
          results: {new: shape}

        9x9 * broken | key:
          [unclosed
        """)
    comments = "# Ours. Do not delete.\n\n# Really.\n"
    path.write_text(comments + FORM + foreign)
    text = written(path, entry())
    assert text.startswith(comments + FORM)
    for chunk in foreign.split("\n\n"):
        assert chunk.rstrip() in text
    assert profile_file.read(path).get(key()) == entry()
    assert written(path, entry()) == text


# Broken, foreign and hostile --------------------------------------------------------------------------------------


def damaged(text: str) -> Iterator[tuple[str, str]]:
    """Yield the ways in which one entry of a good text may be broken."""
    yield "unclosed", text.replace("workspace: 64}", "workspace: 64", 1)
    yield "bad indentation", text.replace("  effort:", "   effort:", 1)
    yield "unknown winner", text.replace("winner: fft(threads=1)", "winner: ftt(threads=1)", 1)
    yield "no winner", re.sub(r"  winner.*\n", "", text, count=1)
    yield "winner is a list", re.sub(r"winner.*\n", "winner: [a]\n", text, count=1)
    yield "results missing", text.replace("  results:", "  outcomes:", 1)
    yield "results empty", re.sub(r"(  results:)\n(  - .*\n)+", r"\1 []\n", text, count=1)
    yield "a result that is a word", text.replace("  - {backend", "  - so\n  - {backend", 1)
    yield "failures are a number", text.replace("  results:", "  failures: 3\n  results:", 1)
    yield "unknown effort", text.replace("effort: measure", "effort: heroic", 1)
    yield "effort is a list", text.replace("effort: measure", "effort: [measure]", 1)
    yield "entry is a list", re.sub(r"(threads \|.*:\n)(?:  .*\n)+", r"\1  - a\n", text, count=1)
    yield "entry is nothing", re.sub(r"(threads \|.*:\n)(?:  .*\n)+", r"\1", text, count=1)
    for bad in ("-1.0", ".nan", ".inf", "1e999", "soon", "true", "null", "[1]", "9" * 5000, "0x" + "f" * 2000):
        yield f"median {bad:.8}", text.replace("median_us: 1000.0", f"median_us: {bad}", 1)
    for bad in ("0", "3", "-1", "many", "1.0", "true", "9" * 5000):
        yield f"threads {bad:.8}", text.replace("threads: 1}", f"threads: {bad}}}", 1)
    for bad in ("{threads: 1, tile: [4]}", "{4: 4}", "{threads: 1, tile: 9223372036854775808}", "[]", "null"):
        yield f"config {bad}", text.replace("config: {threads: 1}", f"config: {bad}", 1)
    yield "version is text", text.replace("version: 1", "version: '1'", 1)
    for tag in ("!!python/object/apply:os.system [touch harm]", "!!python/name:os.system", "!!binary x", "!mine {}"):
        yield f"tag {tag}", text.replace("  effort:", f"  extra: {tag}\n  effort:", 1)
    yield "alias", text.replace("  effort:", "  a: &a [x]\n  b: *a\n  effort:", 1)
    yield "merge key", text.replace("  effort:", "  <<: *what\n  effort:", 1)
    laughs = "".join(f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30))
    yield "alias bomb", text.replace("  effort:", f"  l0: &l0 ha\n{laughs}  effort:", 1)
    for opening in ("[", "{a: "):
        yield f"100000 times {opening}", text.replace("  effort:", f"  deep: {opening * 100_000}\n  effort:", 1)
    yield "a key of a megabyte", text.replace("  effort:", f"  {'k' * 2**20}: 1\n  effort:", 1)
    yield "control characters", text.replace("effort: measure", "effort: \x00\x07measure", 1)
    for bad in ("yesterday", "2026", "[2026-11-22]", "'2026-13-01'", "null"):
        yield f"tuned {bad}", re.sub(r"tuned: .*", f"tuned: {bad}", text, count=1)
    yield "a tab", text.replace("  effort:", "\teffort:", 1)


GOOD = FORM + profile.dump_entry(entry()) + "\n" + profile.dump_entry(entry(key(OTHER)))
DAMAGED = dict(damaged(GOOD))


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_broken_entry_is_one_warning_and_a_miss_and_the_others_work(
    path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert text != GOOD
    monkeypatch.chdir(path.parent)
    path.write_text(text)
    found = profile_file.read(path)
    began = time.process_time()
    with pytest.warns(ProfileWarning, match=r"entry '1x6x6x2 .* is ignored: .+") as told:
        assert found.get(key()) is None
    assert time.process_time() - began < 5  # a bomb would take for ever
    assert len(told) == 1
    message = str(told[0].message)
    assert message.startswith(f"{path}, line 2: ")
    assert len(message) < 1000 + len(str(path))
    assert "\n" not in message
    assert found.get(key()) is None  # told once
    assert found.get(key(OTHER)) == entry(key(OTHER))
    assert [child.name for child in path.parent.iterdir()] == ["profile.yaml"]  # nothing was executed


@given(st.integers(0, len(GOOD)))
def test_a_truncated_file_never_raises_and_yields_only_what_was_written(length: int) -> None:
    text = GOOD[:length]
    if text.strip() and not text.startswith(FORM[:-1]):  # cut within its first line
        with pytest.raises(ProfileError, match="is not a profile"):
            quiet(text)
        return
    found = quiet(text)
    assert found is None or found == entry() or set(found.results) < set(entry().results)


@given(st.text(max_size=200) | st.text("{}[]&*!|>'\"%@`#:-? \n\tab1", max_size=200))
def test_no_text_makes_a_profile_raise(junk: str) -> None:
    about = str(key())
    for text in (f"{FORM}{junk}", f"{FORM}{about}:\n  {junk}", f"{FORM}{about}:{junk}", GOOD.replace("fft", junk, 1)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ProfileWarning)
            found = Profile(text, "some.yaml")
            found.get(key())
            found.entries()


FOREIGN: dict[str, bytes] = {
    "no format": b"a: 1\n",
    "format 2": b"format: 2\n\nrest: unknown\n",
    "format in words": b"format: one\n",
    "another program's YAML": b"version: '3'\nservices:\n  web:\n    image: nginx\n",
    "JSON": b'{"a": [1, 2]}\n',
    "prose": b"milk, bread and a pound of butter\n",
    "binary": bytes(range(256)) * 10,
    "UTF-16": "format: 1\n".encode("utf-16"),
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_one_warning_and_a_miss_and_is_never_overwritten(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with settings.options(profile=path):
        with pytest.warns(ProfileWarning, match=r"profile ignored: .*profile\.yaml") as told:
            assert profile.find(key()) == []
        assert len(told) == 1
        assert profile.find(key()) == []  # told once
    with pytest.raises(ProfileError, match=r"profile\.yaml"):
        profile_file.write(path, [entry()], HERE)
    assert path.read_bytes() == content
    assert leftovers(path) == []


def test_a_file_larger_than_any_profile_is_not_read(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(300 << 20)  # sparse
    with settings.options(profile=path), pytest.warns(ProfileWarning, match="larger than 256 MiB"):
        assert profile.find(key()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_in_the_files_place_is_a_warning_and_a_miss_and_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    with settings.options(profile=path), pytest.warns(ProfileWarning, match="is a pipe"):
        assert profile.find(key()) == []


def test_a_directory_in_the_files_place_is_a_warning_and_a_miss(path: Path) -> None:
    path.mkdir()
    with settings.options(profile=path), pytest.warns(ProfileWarning, match="cannot be read as a profile"):
        assert profile.find(key()) == []
    with pytest.raises(ProfileError, match=r"profile\.yaml"):
        profile_file.write(path, [entry()], HERE)
    assert path.is_dir()
    assert leftovers(path) == []


def test_a_file_that_may_not_be_read_is_a_warning_and_a_miss(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(path, entry())

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with settings.options(profile=path), pytest.warns(ProfileWarning, match="Permission denied"):
        assert profile.find(key()) == []


def test_a_path_through_a_file_is_a_miss_and_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / "profile.yaml"
    with settings.options(profile=path):
        assert profile.find(key()) == []
    with pytest.raises(ProfileError, match="cannot be written"):
        profile_file.write(path, [entry()], HERE)


def test_entries_tells_of_each_entry_that_cannot_be_read(path: Path) -> None:
    text = DAMAGED["unclosed"] + "not a key:\n  a: 1\n"
    path.write_text(text)
    with pytest.warns(ProfileWarning) as told:
        found = profile_file.read(path).entries()
    assert [one.key for one in found] == [key(OTHER)]
    said = [str(one.message) for one in told]
    assert [re.findall(r", line (\d+): ", message) for message in said] == [["2"], [str(text.count("\n") - 1)]]


# Writing ---------------------------------------------------------------------------------------------------------


def leftovers(path: Path) -> list[str]:
    return [child.name for child in path.parent.iterdir() if child.name not in {path.name, path.name + ".lock"}]


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    before = written(path, entry())

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os if step == "fsync" else Path, step, refuse)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ProfileError):
            profile_file.write(path, [entry(key(OTHER))], HERE)
    assert path.read_text() == before
    assert leftovers(path) == []


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_profile_behind_a_link_stays_behind_it(path: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere.yaml"
    path.symlink_to(place)
    profile_file.write(path, [entry()], HERE)
    assert path.is_symlink()
    assert profile_file.read(place).entries() == profile_file.read(path).entries() != []


def test_a_profile_keeps_its_mode_and_a_new_one_is_not_only_its_writers(path: Path) -> None:
    mask = os.umask(0o022)
    try:
        written(path, entry())
        assert path.stat().st_mode & 0o777 == 0o644
        path.chmod(0o664)
        written(path, entry(key(OTHER)))
        assert path.stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(mask)


WRITER = """
import sys
from pathlib import Path
from convdispatch import machine, profile, profile_file
from convdispatch.backend import Config
from convdispatch.problem import Problem
path, number = Path(sys.argv[1]), int(sys.argv[2])
for height in range(1, 21):
    problem = Problem.parse(f"{number}x{height}x6x2 * 1x1x2x3 VALID")
    about = profile.Key(problem, "plan", 1, "there")
    row = profile.Result("fft", 1, Config(), 1e-3, 0.0, 1, 0.0, 0)
    profile_file.write(path, [profile.Entry(about, (row,))], machine.current())
"""


def test_processes_that_write_at_once_lose_nothing(path: Path) -> None:
    written(path, entry())
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(number)], stderr=subprocess.PIPE, text=True)
        for number in (1, 2, 3, 4)
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    found = profile_file.read(path).entries()
    assert len(found) == 81
    assert {(one.key.problem.n, one.key.problem.h) for one in found[1:]} == {
        (number, height) for number in (1, 2, 3, 4) for height in range(1, 21)
    }
    assert leftovers(path) == []


# Layers ----------------------------------------------------------------------------------------------------------


def test_layers_are_asked_in_order(path: Path) -> None:
    written(profile.system_path(), entry(key(), result("direct")))
    with settings.options(profile=path):
        assert layers_and_winners() == [("system", "direct")]
        written(profile.user_path(), entry(key(), result("im2col")))
        assert layers_and_winners() == [("user", "im2col"), ("system", "direct")]
        written(path, entry(key(), result("fft")))
        assert layers_and_winners() == [("project", "fft"), ("user", "im2col"), ("system", "direct")]
        profile.remember(entry(key(), result("numba")))
        assert layers_and_winners() == [
            ("in-process", "numba"), ("project", "fft"), ("user", "im2col"), ("system", "direct"),
        ]  # fmt: skip
        profile.forget()
        assert layers_and_winners()[0] == ("project", "fft")
    assert layers_and_winners() == [("user", "im2col"), ("system", "direct")]


def layers_and_winners() -> list[tuple[str, str]]:
    return [(found.layer, found.entry.winner.backend) for found in profile.find(key())]


def test_the_environment_names_the_projects_profile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(path, entry())
    monkeypatch.setenv("CONVDISPATCH_PROFILE", str(path))
    settings.from_environment.cache_clear()
    assert layers_and_winners() == [("project", "fft")]
    assert profile.writable_path() == path


def test_a_broken_layer_does_not_hide_those_below(path: Path) -> None:
    written(profile.user_path(), entry())
    path.write_text("no: profile\n")
    with settings.options(profile=path), pytest.warns(ProfileWarning, match="profile ignored"):
        assert layers_and_winners() == [("user", "fft")]


@pytest.mark.parametrize(
    "other",
    [
        key(where="zen5-2c-00000000"), key(threads=1), key(deployment="call"), key(PROBLEM.replace(n=2)),
        key(PROBLEM.replace(dtype="float64")), key(PROBLEM.replace(data_format="NCHW")),
    ],
    ids=["machine", "threads", "deployment", "batch", "dtype", "data format"],
)  # fmt: skip
def test_what_was_measured_for_another_key_is_a_miss(other: Key) -> None:
    written(profile.user_path(), entry(other))
    assert profile.find(key()) == []
    assert len(profile.find(other)) == 1


def test_a_file_that_another_process_changed_is_noticed() -> None:
    path = profile.user_path()
    assert layers_and_winners() == []
    written(path, entry())
    assert layers_and_winners() == [("user", "fft")]
    script = textwrap.dedent("""\
        import sys
        from pathlib import Path
        path = Path(sys.argv[1])
        path.write_text(path.read_text().replace("winner: fft(threads=1)", "winner: direct(threads=1)"))
        """)
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert layers_and_winners() == [("user", "direct")]
    path.unlink()
    assert layers_and_winners() == []


def test_best_is_the_winner_or_the_fastest_other_that_is_allowed() -> None:
    one = entry(key(), result("a", 3.0), result("b", 1.0), result("c", 2.0))
    assert one.best(lambda row: True) is one.results[0]
    assert one.best(lambda row: row.backend != "a") is one.results[1]
    assert one.best(lambda row: row.median > 5) is None


def test_names_are_as_people_write_them() -> None:
    assert replace(result("fft"), config=Config()).name == "fft"
    assert result("winograd", config=Config(threads=2, m=4)).name == "winograd(m=4, threads=2)"
    assert Failure("fft", 1, Config(), "no").name == "fft"
    assert all(character in string.printable for character in entry().tuned)


def test_inside_a_block_files_are_looked_at_once_and_afterwards_again() -> None:
    profile_file.write(profile.user_path(), [entry()], machine.current())
    wanted = entry().key
    with profile.looked_at_once():
        before = profile.files()
        profile.user_path().unlink()
        assert profile.files() == before
        assert str(wanted) in {text for file in profile.files() for text in file.keys()}  # noqa: SIM118
    assert str(wanted) not in {text for file in profile.files() for text in file.keys()}  # noqa: SIM118
