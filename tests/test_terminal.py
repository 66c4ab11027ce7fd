"""What commands share: what others wrote is printed as it can be shown, and every output ends well."""

import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from scripted import PROBLEM, FakeClock, Scripted, only

from convdispatch import errors, interruption, profile, registry, terminal, units
from convdispatch.cli import main
from convdispatch.explain import explain_problem

ROOT = Path(__file__).parent.parent
EVIL = "\x1b[31mred\x07\x9b2J\u202egnp"


def run(*words: str | Path) -> Result:
    profile.forget()  # each command is a process of its own
    return CliRunner().invoke(main, [str(word) for word in words])


def started(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more.pop("environment", {})}
    command = [sys.executable, "-m", "convdispatch", *words]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, env=environment, **more)


# What others wrote --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["plain", "two\nlines", "é ü 漢", ""])
def test_what_can_be_shown_is_shown_as_it_is(text: str) -> None:
    assert errors.printable(text) == text


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert errors.printable(EVIL) == r"\x1b[31mred\x07\x9b2J\u202egnp"
    assert errors.printable("\ud800\r\t") == r"\ud800\r\t"
    assert errors.in_a_line(f"a\n{EVIL}") == f"a {errors.printable(EVIL)}"


def test_a_console_prints_nothing_that_a_terminal_would_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    rows = terminal.table(EVIL, (EVIL,))
    rows.add_row(EVIL)
    terminal.print_table(terminal.console(), rows)
    terminal.console().print(EVIL, style="bold")
    terminal.say(EVIL)
    assert stream.getvalue().count(errors.printable(EVIL)) == 5
    assert not set("\x1b\x07\x9b\u202e") & set(stream.getvalue())


@pytest.mark.parametrize("words", [("explain", str(PROBLEM)), ("backends",), ("tune", str(PROBLEM), "--allow-busy")])
def test_no_command_prints_what_a_backend_would_have_the_terminal_obey(words: tuple[str, ...], tmp_path: Path) -> None:
    class Evil(Scripted):
        pass

    def fail() -> Exception:
        return ValueError(EVIL)

    Evil.__doc__ = EVIL
    clock = FakeClock()
    everywhere: dict[str, Any] = {"fails_in": lambda *_: True, "error": fail}
    only(Evil("a", clock, **everywhere), Evil("b", clock, reason=EVIL), Evil("c", clock, tried=None, **everywhere))
    registry._registry.failed[EVIL] = EVIL
    try:
        done = run(*words, *(("--profile", tmp_path / "p.yaml") if words[0] != "backends" else ()))
    finally:
        del registry._registry.failed[EVIL]
    assert not isinstance(done.exception, Exception), done.exception
    assert "31mred" in done.output
    assert not set("\x1b\x07\x9b\u202e") & set(done.output)


def test_an_explanation_at_the_prompt_shows_nothing_to_obey() -> None:
    only(Scripted("a", FakeClock()), Scripted("b", FakeClock(), reason=EVIL))
    assert not set("\x1b\x07\x9b\u202e") & set(str(explain_problem(PROBLEM)))


# JSON ---------------------------------------------------------------------------------------------------------------


def test_numbers_that_json_does_not_know_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({"a": math.inf, "b": [math.nan, 1.5, (-math.inf, "inf")], "c": {"d": True}})
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told == {"a": None, "b": [None, 1.5, [None, "inf"]], "c": {"d": True}}


# Widths -------------------------------------------------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", ["0", "-5", "00", "x"])
def test_a_terminal_that_tells_no_width_has_the_usual_one(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdout", _Terminal())
    out = terminal.console()
    assert out.width == 80
    out.print("something")
    assert "something" in out.file.getvalue()  # type: ignore[attr-defined]


def _rows() -> Any:
    numbers = ("measured", "error", "workspace")
    rows = terminal.table("", ("backend", *numbers, "reason"), numbers, whole=("backend",))
    rows.add_row("implicit_gemm", "12.34 us", "1.2e-07", "1.5 MiB", "short")
    rows.add_row("direct", "1 us", "0", "", "")
    return rows


@pytest.mark.parametrize(
    ("width", "there", "left_out"),
    [
        (80, ("measured", "error", "workspace", "reason"), ()),
        (50, ("measured", "error", "reason"), ("workspace",)),
        (36, ("measured", "reason"), ("workspace", "error")),
    ],
)
def test_a_table_gives_up_columns_before_it_gives_up(
    width: int, there: tuple[str, ...], left_out: tuple[str, ...]
) -> None:
    out = Console(width=width, file=_Terminal(), soft_wrap=True, color_system=None)
    terminal.print_table(out, _rows(), spare=("workspace", "error"))
    head, *_, last = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(name in head for name in there)
    assert not any(name in head for name in left_out)
    assert (last.strip() == f"for want of room without {', '.join(left_out)}") == bool(left_out)


def test_a_table_for_which_there_is_no_room_at_all_is_told_in_paragraphs() -> None:
    out = Console(width=20, file=_Terminal(), soft_wrap=True, color_system=None)
    terminal.print_table(out, _rows(), spare=("workspace", "error"))
    assert "measured 12.34 us" in " ".join(out.file.getvalue().split())  # type: ignore[attr-defined]


def test_explain_stays_a_table_on_a_usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _Terminal()
    monkeypatch.setattr(terminal, "console", lambda: Console(width=80, file=stream, soft_wrap=True, color_system=None))
    monkeypatch.setattr(
        "convdispatch.cli.console", lambda: Console(width=80, file=stream, soft_wrap=True, color_system=None)
    )
    assert run("explain", "1x56x56x64 * 3x3x64x64 SAME").exit_code == 0
    lines = stream.getvalue().splitlines()
    assert sum(len(line) > 80 for line in lines) <= 2  # the two above it may be broken by the terminal
    assert any(line.split()[:3] == ["backend", "candidate", "measured"] for line in lines)


def test_a_table_that_is_piped_has_no_blanks_at_its_lines_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.print_table(terminal.console(), _rows())
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert all(line == line.rstrip() for line in lines)


def test_more_threads_than_cores_are_not_some_of_them() -> None:
    assert units.threads_text(1, 2) == "1 of 2 cores' threads"
    assert units.threads_text(64, 2) == "64 threads on 2 cores"


# What is typed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("bench", str(PROBLEM), "--timeout", "nan"), "'nan' is no number"),
        (("bench", str(PROBLEM), "--timeout", "inf"), "--timeout"),
        (("bench", str(PROBLEM), "--sample", "inf"), "--sample"),
        (("bench", str(PROBLEM), "--sample", "0"), "--sample"),
        (("bench", str(PROBLEM), "--threads", "99999"), "--threads"),
        (("validate", "--seconds", "nan"), "'nan' is no number"),
        (("tune", str(PROBLEM), "--time-limit", "nan"), "'nan' is no number"),
        (("tune", str(PROBLEM), "--time-limit", "-1"), "--time-limit"),
        (("tune", str(PROBLEM), "--threads", "99999"), "--threads"),
        (("tune", str(PROBLEM), "--backends", ""), "--backends must be names, such as im2col,fft; got ''"),
        (("tune", str(PROBLEM), "--backends", " ,"), "--backends must be names, such as im2col,fft; got ' ,'"),
        (("tune", "--from", "~nobody-of-this-name/r.yaml"), "there is no home folder of ~nobody-of-this-name"),
        (("explain", str(PROBLEM), "--profile", "~nobody-of-this-name/p"), "there is no home folder of"),
    ],
)
def test_what_makes_no_sense_is_wrong_usage_and_names_the_option(words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.stderr.split())


def test_a_home_is_one_also_where_no_shell_has_seen_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = terminal.UserFile().convert("~/p.yaml", None, click.Context(main))
    assert found == tmp_path / "p.yaml"
    assert terminal.UserFile().convert("p.yaml", None, click.Context(main)) == Path("p.yaml")


# Ends ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
@pytest.mark.parametrize("words", [("--help",), ("backends",), ("backends", "--json"), ("profile", "show")])
def test_an_output_that_is_full_is_explained(words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = started(*words, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "convdispatch: the output cannot be written: No space left on device\n"


def test_an_interrupt_ends_it_quietly_while_its_package_is_being_imported(tmp_path: Path) -> None:
    """What the package imports first raises what Ctrl-C would."""
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt\n")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = started("backends", environment={"PYTHONPATH": path}, stdout=subprocess.PIPE)
    assert done.stderr == "convdispatch: interrupted\n"
    assert done.returncode in {-signal.SIGINT, 130}


@pytest.mark.parametrize(
    ("argv", "original", "it_is"),
    [
        (["-m"], ["python", "-P", "-m", "convdispatch", "tune"], True),
        (["-m"], ["python", "-m", "mine", "-m", "convdispatch"], False),
        (["/usr/bin/convdispatch", "tune"], ["python", "/usr/bin/convdispatch", "tune"], True),
        (["mine.py", "convdispatch"], ["python", "mine.py", "convdispatch"], False),
        (["-c"], ["python", "-c", "import convdispatch"], False),
        ([], [], False),
    ],
)
def test_only_the_command_itself_changes_what_an_interrupt_prints(
    argv: list[str], original: list[str], it_is: bool
) -> None:
    assert interruption.is_the_command(argv, original) == it_is
