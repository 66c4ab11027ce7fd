"""The command line: what it prints, what it writes, and how it ends."""

import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from convdispatch import cli, machine, profile, profile_file, quarantine, registry, settings, terminal
from convdispatch.backend import Candidate, Config
from convdispatch.backends import _machine_code as machine_code
from convdispatch.cli import main
from convdispatch.problem import Problem

SMALL = "1x9x9x4 * 3x3x4x8 SAME"
FEW = ("--backends", "direct,im2col")


def run(*words: str | Path) -> Result:
    profile.forget()  # each command is a process of its own
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "profile.yaml"


def test_tune_prints_the_winner_and_the_ratios_and_writes_the_profile(file: Path) -> None:
    done = run("tune", SMALL, *FEW, "--profile", file)
    assert done.exit_code == 0, done.output
    table = done.stdout
    assert SMALL in table
    assert "vs worst" in table
    assert "vs direct" in table
    assert str(file) in table
    assert {entry.key.deployment for entry in profile_file.read(file).entries()} == {"plan", "call"}
    assert "[2/2]" in done.stderr


def test_tune_again_knows_and_retune_measures(file: Path) -> None:
    run("tune", SMALL, *FEW, "--profile", file)
    assert "2 known from the profile" in run("tune", SMALL, *FEW, "--profile", file).stdout
    assert "2 measured now" in run("tune", SMALL, *FEW, "--profile", file, "--retune").stdout


@pytest.mark.parametrize(("accuracy", "instead"), [("strict", "calls use im2col("), ("1e-15", "nothing may be used")])
def test_tune_says_what_calls_use_if_not_the_winner(
    file: Path, monkeypatch: pytest.MonkeyPatch, accuracy: str, instead: str
) -> None:
    monkeypatch.setenv("CONVDISPATCH_FORBID", ",".join(set(registry.names()) - {"winograd", "im2col"}))
    problem = "1x28x28x64 * 3x3x64x64 SAME"
    how = "--backends", "winograd,im2col", "--profile", file, "--deployment", "plan"
    assert "the options in force" not in run("tune", problem, *how).stdout
    monkeypatch.setenv("CONVDISPATCH_ACCURACY", accuracy)
    settings.from_environment.cache_clear()
    assert f"{problem} (plan): {instead}" in run("tune", problem, *how).stdout


def test_tune_json_is_json_alone_on_stdout(file: Path) -> None:
    done = run("tune", SMALL, *FEW, "--profile", file, "--deployment", "plan", "--json")
    data = json.loads(done.stdout)
    assert data["complete"] is True
    (layer,) = data["layers"]
    assert layer["problem"] == SMALL
    assert set(layer["backends"]) == {"direct", "im2col"}
    assert min(layer["backends"].values()) == pytest.approx(1, rel=0.05)
    assert layer["vs_direct"] == layer["backends"]["direct"]


def test_tune_time_limit_leaves_the_rest_with_its_own_exit_code(file: Path) -> None:
    done = run("tune", "vgg16", "--profile", file, "--time-limit", "0")
    assert done.exit_code == 3
    assert "18 left when the time limit came" in done.stdout
    assert profile_file.read(file).entries() == []


def test_tune_batch_replaces_the_workloads(file: Path) -> None:
    done = run("tune", SMALL, *FEW, "--profile", file, "--batch", "3", "--deployment", "plan")
    assert "3x9x9x4" in done.stdout


def test_tune_takes_a_yaml_workload(file: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"layers:\n- {{name: first, count: 3, problem: '{SMALL}'}}\n")
    done = run("tune", mine, *FEW, "--profile", file, "--deployment", "plan")
    assert done.exit_code == 0, done.output
    assert "first" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tune", "resnet5"), "resnet50"),
        (("tune", "nowhere.yaml"), "nowhere.yaml"),
        (("tune", "1x9x9x4 * 3x3"), "four numbers"),
        (("tune", SMALL, "--backends", "imcol"), "im2col"),
        (("explain", "1x9x9x4"), "filter shape"),
        (("explain", "1x9x9x4 * 3x3x4x8 SOME"), "SOME"),
    ],
)
def test_wrong_words_end_with_one_line_that_helps(words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert done.exit_code == 1
    assert said in done.stderr
    assert "Traceback" not in done.output


def test_wrong_usage_ends_with_two() -> None:
    assert run("tune", SMALL, "--effort", "huge").exit_code == 2
    assert run("tune").exit_code == 2


def test_tune_refuses_to_overwrite_what_is_no_profile(file: Path) -> None:
    file.write_text("shopping: [milk]\n")
    done = run("tune", SMALL, *FEW, "--profile", file)
    assert done.exit_code == 1
    assert str(file) in done.stderr
    assert file.read_text() == "shopping: [milk]\n"


def test_explain_shows_every_backend_with_its_reason_or_its_time(file: Path) -> None:
    wide = SMALL.replace("3x3", "8x8")  # which winograd rejects
    run("tune", wide, *FEW, "--profile", file, "--deployment", "plan")
    done = run("explain", wide, "--profile", file)
    for name in ("direct", "im2col", "fft", "numba", "winograd"):
        assert name in done.stdout
    assert "project profile" in done.stdout
    data = json.loads(run("explain", wide, "--profile", file, "--json").stdout)
    assert data["source"] == "profile"
    rows = {row["backend"]: row for row in data["rows"]}
    assert rows["im2col"]["median"] > 0
    assert rows["winograd"]["reason"]


#: What a console would take for markup: a tag, the end of one that was never begun, and an emoji.
AWKWARD = "crashed in [/usr/lib/x.so] [bold] :gear:"


def test_a_workloads_words_are_printed_as_they_are(file: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    row = f"{{name: 'block[conv]', problem: '{SMALL}'}}"
    mine.write_text(f"title: '{AWKWARD}'\nlayers:\n- {row}\n")
    done = run("tune", mine, *FEW, "--profile", file, "--deployment", "plan")
    assert done.exit_code == 0, done.output
    assert AWKWARD in done.stdout
    assert "block[conv]" in done.stdout


def test_a_reason_is_printed_as_it_is(file: Path) -> None:
    im2col = registry.get("im2col")
    with settings.options(profile=file):
        quarantine.add(Candidate(im2col, Config()), Problem.parse(SMALL), AWKWARD)
    assert f"quarantined: {AWKWARD}" in run("explain", SMALL, "--profile", file).stdout
    with settings.options(profile=file):
        assert f"quarantined: {AWKWARD}" in run("backends").stdout


def test_the_bar_shows_words_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(
        "convdispatch.terminal._Console", functools.partial(terminal._Console, file=shown, force_terminal=True)
    )
    with cli._bar(2, "tuning", "net {v} [/v2]") as advance:
        advance("1x1 [/v2] :gear:")
    assert "tuning net {v} [/v2]" in shown.getvalue()
    assert "1x1 [/v2] :gear:" in shown.getvalue()


def test_warmup_compiles_and_says_how_much() -> None:
    done = run("warmup", SMALL)
    assert done.exit_code == 0, done.output
    assert f"[1/1] {SMALL}" in done.stderr
    assert "candidates for 1 problem of" in done.stdout
    assert run("warmup", "resnet5").exit_code == 1


def test_warmup_says_when_nothing_could_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "_unkept", set())
    assert "this process only" not in run("warmup", SMALL).stderr
    monkeypatch.setattr(machine_code, "_unkept", {"tile"})
    monkeypatch.setattr(machine_code, "_folders", lambda: iter([Path("first"), Path("second")]))
    done = run("warmup", SMALL)
    assert done.exit_code == 0, done.output
    assert "what was compiled serves this process only: none of its folders could be written: first, second; " in (
        done.stderr
    )


def test_a_variable_that_means_nothing_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVDISPATCH_THREDS", "2")
    settings.from_environment.cache_clear()
    told = run("explain", SMALL).stderr
    assert "convdispatch: environment variable CONVDISPATCH_THREDS means nothing" in told
    assert "settings.py" not in told


def test_backends_lists_all(file: Path) -> None:
    names = {row["name"] for row in json.loads(run("backends", "--json").stdout)["available"]}
    assert {"direct", "fft", "im2col", "numba", "winograd"} <= names
    assert "winograd" in run("backends").stdout


def test_profile_path_and_show(file: Path) -> None:
    assert run("profile", "path", "--profile", file).stdout.strip() == str(file)
    assert "has no entries" in run("profile", "show", "--profile", file).stdout
    run("tune", SMALL, *FEW, "--profile", file)
    shown = run("profile", "show", "--profile", file)
    assert SMALL in shown.stdout
    none = run("profile", "show", "7x7", "--profile", file).stdout
    assert "has no entries whose key contains '7x7'; there are 2, won by " in none
    assert machine.current().id in none
    rows = json.loads(run("profile", "show", "--profile", file, "--json").stdout)
    assert {row["deployment"] for row in rows} == {"plan", "call"}
    layers = run("profile", "path", "--all", "--profile", file).stdout
    assert [line.split()[0] for line in layers.splitlines()] == ["project", "user", "system", "packaged"]


@pytest.mark.parametrize("width", [30, 60, 80, 100, 120, 150])
def test_a_narrow_terminal_cuts_no_number_and_no_short_word(width: int) -> None:
    numbers = {"measured": "12.34 us", "error": "1.2e-07", "workspace": "1.5 MiB"}
    rows = terminal.table("", ("backend", "candidate", *numbers, "reason"), tuple(numbers), whole=("backend",))
    reason = "its error was measured above what accuracy='strict' allows, by the hard inputs"
    rows.add_row("implicit_gemm", "implicit_gemm(rows=6, threads=2, vectors=2)", *numbers.values(), reason)
    out = Console(width=width, file=io.StringIO(), soft_wrap=True)
    terminal.print_table(out, rows)
    assert isinstance(out.file, io.StringIO)
    lines = out.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    words = [word.strip(",") for word in " ".join(lines).split()]
    told = ["implicit_gemm", "implicit_gemm(rows=6, threads=2, vectors=2)", *numbers, *numbers.values(), reason]
    assert {word.strip(",") for word in " ".join(told).split()} <= set(words)
    if width >= 100:  # a table, in which each number stands whole in a line
        assert all(any(value in line for line in lines) for value in numbers.values())
        joined = " ".join(line[lines[0].index("reason") :].strip() for line in lines[1:])
        assert joined.split() == reason.split()


def test_what_an_encoding_lacks_is_printed_as_a_question_mark(tmp_path: Path) -> None:
    load = tmp_path / "load.yaml"
    load.write_text(f"name: grün\nlayers:\n- {{name: größe, problem: {SMALL}}}\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "CONVDISPATCH_PROFILE": str(tmp_path / "p.yaml")}
    program = "from convdispatch.cli import main; main()"
    words = [sys.executable, "-c", program, "tune", str(load), *FEW, "--allow-busy", "--deployment", "plan"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "gr?n" in done.stdout
    assert "gr??e" in done.stdout


def test_an_interrupt_ends_it_quietly_while_it_is_being_imported() -> None:
    """The import of the commands raises what Ctrl-C would."""
    program = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'convdispatch.cli':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from convdispatch.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "convdispatch: interrupted\n")


def test_it_runs_as_a_module_too() -> None:
    done = subprocess.run([sys.executable, "-m", "convdispatch", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "tune" in done.stdout
