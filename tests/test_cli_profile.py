"""``convdispatch profile``: what each command prints, what it writes, and how it ends."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from click.testing import Result as Done
from test_profile_tools import HERE, MIXED, OTHER, PROBLEM, entry, row, text_of, with_width

from convdispatch import profile, profile_file
from convdispatch.cli import main
from convdispatch.profile_file import Profile
from convdispatch.profile_tools import width


def run(*words: str | Path) -> Done:
    profile.forget()  # each command is a process of its own
    return CliRunner().invoke(main, ["profile", *map(str, words)])


def data(*words: str | Path) -> Any:
    done = run(*words, "--json")
    return json.loads(done.stdout)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "profile.yaml"


@pytest.fixture
def mixed(file: Path) -> Path:
    file.write_text(MIXED)
    return file


def shown(file: Path, *words: str) -> list[str]:
    return [found["problem"].split()[0] for found in data("show", "--profile", file, *words)]


def test_a_profile_is_not_exported_onto_itself(mixed: Path) -> None:
    before = mixed.read_bytes()
    (mixed.parent / "link.yaml").symlink_to(mixed)
    for target in (mixed, mixed.parent / "link.yaml"):
        done = run("export", target, "--force", "--profile", mixed)
        assert done.exit_code == 1
        assert "is the profile itself" in done.output
    assert mixed.read_bytes() == before


def test_show_filters_and_sorts(file: Path) -> None:
    file.write_text(
        text_of(
            entry(row("fft", 2e-3)),
            entry(row("direct", 1e-3), problem=OTHER, flags=("busy",), tuned="2026-11-03"),
            entry(row("numba", 3e-3), problem=PROBLEM.replace(n=2), where="far"),
        )
    )
    assert shown(file) == ["1x6x6x2", "1x5x5x2", "2x6x6x2"]
    assert shown(file, "--sort", "time") == ["1x5x5x2", "1x6x6x2", "2x6x6x2"]
    assert shown(file, "--sort", "problem") == ["1x5x5x2", "1x6x6x2", "2x6x6x2"]
    assert shown(file, "--sort", "gflops") == ["2x6x6x2", "1x6x6x2", "1x5x5x2"]
    assert shown(file, "--sort", "winner") == ["1x5x5x2", "1x6x6x2", "2x6x6x2"]
    assert shown(file, "--sort", "tuned") == ["1x5x5x2", "1x6x6x2", "2x6x6x2"]
    assert shown(file, "--machine", "far") == ["2x6x6x2"]
    assert shown(file, "--machine", "here") == ["1x6x6x2", "1x5x5x2"]
    assert shown(file, "--backend", "numba") == ["2x6x6x2"]
    assert shown(file, "--flagged") == ["1x5x5x2"]
    assert shown(file, "3x3x2x3") == ["1x6x6x2", "2x6x6x2"]
    assert run("show", "--profile", file, "--sort", "colour").exit_code == 2


def test_show_says_what_counts_here_and_what_cannot_be_read(mixed: Path) -> None:
    like = {**HERE.describe(), "libraries": ["numpy 1.0"]}
    mixed.write_text(MIXED + profile.dump_machine("like", like) + profile.dump_entry(entry(where="like")))
    done = run("show", "--profile", mixed)
    assert done.exit_code == 0
    table = done.stdout
    assert [word for line in table.splitlines() for word in ("exact", "soft", " no ") if word in line] == [
        "exact", "exact", "exact", " no ", "soft",
    ]  # fmt: skip
    assert "busy" in table
    assert "quarantined: bad version 1 on far: it crashed (2026-01-01)" in table
    assert done.stderr.count("is ignored") == 1
    assert "Traceback" not in done.output


def test_diff_prints_winners_ratios_and_counts(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(text_of(entry(row("fft", 1e-3), row("direct", 1.1e-3)), entry(problem=OTHER)))
    two.write_text(text_of(entry(row("direct", 2e-3)), entry(problem=PROBLEM.replace(n=2))))
    done = run("diff", one, two)
    assert done.exit_code == 0
    assert "2.00x  1.10x" in done.stdout
    assert "0 with the same winner, 1 with another, 1 only in" in done.stdout
    assert f"only in {two}: 2x6x6x2" in done.stdout
    found = data("diff", one, two)
    assert [(one["first"], one["second"], one["ratio"]) for one in found["changed"]] == [
        ("fft(threads=1)", "direct(threads=1)", pytest.approx(2)),
    ]
    assert run("diff", one, tmp_path / "none.yaml").exit_code == 2


def test_merge_takes_the_tighter_interval_and_keeps_what_is_there(tmp_path: Path) -> None:
    one, two, into = (tmp_path / name for name in ("one.yaml", "two.yaml", "into.yaml"))
    one.write_text(text_of(with_width(0.02), with_width(0.02, problem=OTHER)))
    two.write_text(text_of(with_width(0.01)))
    into.write_text("# ours\nformat: 1\n\n" + profile.dump_entry(with_width(0.004, problem=OTHER)))
    done = run("merge", one, two, "--into", into)
    assert "1 new, 0 better than what was there, 1 kept as they were, 0 refused" in done.stdout
    assert "3 of those read count fully" in done.stdout
    found = {one.key.problem: width(one) for one in profile_file.read(into).entries()}
    assert found == {PROBLEM: pytest.approx(0.01), OTHER: pytest.approx(0.004)}
    assert into.read_text().startswith("# ours\n")
    assert f"machine {HERE.id}" in into.read_text()
    assert run("merge", one).exit_code == 2


def test_import_counts_and_refuses_with_reasons(file: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.yaml"
    given.write_text(MIXED)
    done = run("import", given, "--profile", file)
    assert done.exit_code == 0
    assert "4 new, 0 better than what was there, 0 kept as they were, 1 refused" in done.stdout
    assert "refused: " in done.stdout
    assert "effort must be one of" in done.stdout
    assert "3 of those read count fully, 0 softly (used until the problem is tuned here), 1 not at all" in done.stdout
    again = data("import", given, "--profile", file)
    assert (again["new"], again["kept"], again["here"]) == (0, 4, {"exact": 3, "soft": 0, "hard": 1})
    notes = tmp_path / "notes.yaml"
    notes.write_text("milk: 2\n")
    before = file.read_text()
    failed = run("import", notes, "--profile", file)
    assert failed.exit_code == 1
    assert "notes.yaml is not a profile" in failed.stderr
    assert file.read_text() == before


def test_export_portable_and_import_on_the_same_kind_of_machine(mixed: Path, tmp_path: Path) -> None:
    given, mine = tmp_path / "given.yaml", tmp_path / "mine.yaml"
    done = run("export", given, "--portable", "--profile", mixed)
    assert done.exit_code == 0, done.output
    assert "for all machines of their kind" in done.stdout
    assert "left out: " in done.stdout
    assert data("import", given, "--profile", mine)["here"]["soft"] == 2
    assert "No such" not in run("export", given, "--profile", mixed).output
    refused = run("export", given, "--profile", mixed)
    assert refused.exit_code == 1
    assert "--force replaces it" in refused.stderr
    assert run("export", given, "--force", "--profile", mixed).exit_code == 0
    assert len(profile_file.read(given).entries()) == 4


def test_prune_says_what_goes_and_keeps_broken_text_aside(mixed: Path) -> None:
    dry = run("prune", "--broken", "--stale", "--dry-run", "--profile", mixed)
    assert "2 would go" in dry.stdout
    assert mixed.read_text() == MIXED
    done = data("prune", "--broken", "--stale", "--profile", mixed)
    assert {key.split()[0] for key in done["pruned"]} == {"2x6x6x2", "9x6x6x2"}
    assert "2x6x6x2" not in mixed.read_text()
    assert "effort: very measure" in mixed.with_name("profile.yaml.broken").read_text()
    assert run("prune", "--profile", mixed).exit_code == 2
    assert "0 taken out" in run("prune", "--flagged", "--profile", mixed.with_name("none.yaml")).stdout
    assert not mixed.with_name("none.yaml").exists()


@pytest.mark.parametrize("days", ["1e7", "1e300", "inf", "nan"])
def test_prune_wants_days_that_a_calendar_has(mixed: Path, days: str) -> None:
    done = run("prune", "--older-than", days, "--profile", mixed)
    assert done.exit_code == 1
    assert "older_than must be a number of days from 0 to" in done.stderr
    assert f"got {float(days)}" in done.stderr
    assert mixed.read_text() == MIXED


def test_prune_broken_leaves_the_last_of_two(file: Path) -> None:
    file.write_text(text_of(entry(), more=profile.dump_entry(entry(row("direct")))))
    assert "1 taken out" in run("prune", "--broken", "--profile", file).stdout
    assert [one.winner.backend for one in profile_file.read(file).entries()] == ["direct"]
    assert "winner: fft" in file.with_name("profile.yaml.broken").read_text()
    assert run("doctor", "--profile", file).exit_code == 0


def test_doctor_ends_with_one_until_its_commands_were_followed(mixed: Path) -> None:
    done = run("doctor", "--profile", mixed)
    assert done.exit_code == 1
    assert f"3 to mend in {mixed}" in done.stdout
    assert "note: quarantined (project): bad version 1 on far: it crashed" in done.stdout
    assert "Traceback" not in done.output
    kinds = {finding["kind"]: finding["wrong"] for finding in data("doctor", "--profile", mixed)}
    assert kinds["stale"]
    run("prune", "--broken", "--stale", "--flagged", "--profile", mixed)
    mended = run("doctor", "--profile", mixed)
    assert mended.exit_code == 0
    assert "nothing to mend" in mended.stdout


def test_doctor_does_not_fill_the_screen(file: Path) -> None:
    file.write_text(text_of(*(entry(row(version=0), problem=PROBLEM.replace(n=n)) for n in range(1, 15))))
    done = run("doctor", "--profile", file)
    assert done.stdout.count("fft was version 0") == 10
    assert "and 4 more like these; --all shows them" in done.stdout
    assert run("doctor", "--all", "--profile", file).stdout.count("fft was version 0") == 14


@pytest.mark.parametrize("name", ["path", "show", "diff", "merge", "import", "export", "prune", "doctor"])
def test_every_command_explains_itself(name: str) -> None:
    done = run(name, "--help")
    assert done.exit_code == 0
    assert "--json" in done.stdout


def test_a_profile_is_the_same_after_export_and_import(file: Path, tmp_path: Path) -> None:
    file.write_text(text_of(entry(), entry(problem=OTHER), entry(where="far")))
    out, back = tmp_path / "out.yaml", tmp_path / "back.yaml"
    run("export", out, "--profile", file)
    run("import", out, "--profile", back)
    assert Profile(back.read_text(), "x").entries() == profile_file.read(file).entries()


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_nothing_is_exported_from_a_profile_that_is_not_there(file: Path, tmp_path: Path, force: tuple[str]) -> None:
    good = tmp_path / "good.yaml"
    if force:
        good.write_text(MIXED)
    done = run("export", good, *force, "--profile", file)
    assert done.exit_code == 1
    assert f"nothing would be in {good}: {file} does not exist" in done.stderr
    file.write_text("format: 1\n")
    assert f"nothing would be in {good}: {file} has no entries" in run("export", good, *force, "--profile", file).stderr
    assert (good.read_text() == MIXED) if force else not good.exists()


@pytest.mark.parametrize("words", [("show",), ("show", "--json"), ("prune", "--stale"), ("doctor",)])
def test_a_profile_that_is_named_and_is_not_there_is_told_of(file: Path, words: tuple[str, ...]) -> None:
    done = run(*words, "--profile", file)
    assert done.exit_code == 0
    assert f"{file} does not exist" in done.stderr
    assert "does not exist" not in run(*words).stderr
    file.write_text("format: 1\n")
    assert "does not exist" not in run(*words, "--profile", file).stderr


def test_import_says_how_many_keep_a_winner_chosen_by_hand(file: Path, tmp_path: Path) -> None:
    better = tmp_path / "better.yaml"
    measured = entry(row("fft", 1e-3), row("direct", 2e-3))
    file.write_text(text_of(measured).replace("winner: fft", "winner: direct"))
    better.write_text(text_of(replace(measured, tuned="2026-11-20")))
    done = run("import", better, "--profile", file)
    assert "1 better" in done.stdout
    assert "1 keeps the winner chosen by hand" in done.stdout
    (shown_now,) = data("show", "--profile", file)
    assert (shown_now["winner"], shown_now["by_hand"]) == ("direct(threads=1)", True)
    assert data("import", better, "--profile", file)["better"] == 0


def test_diff_prints_json_where_a_winner_was_too_fast_for_the_clock(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    file.write_text(text_of(entry(row("fft", 0.0))))
    other.write_text(text_of(entry(row("direct", 1e-3))))
    (change,) = json.loads(run("diff", file, other, "--json").stdout, parse_constant=pytest.fail)["changed"]
    assert change["ratio"] is None
