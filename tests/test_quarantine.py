"""Quarantine: what is written is read again, holds for one version of one code on one machine, and can be lifted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scripted import PROBLEM, FakeClock, Scripted, only

import convdispatch
from convdispatch import dispatch, heuristic, machine, profile, profile_file, quarantine, registry, safe_yaml, settings
from convdispatch.backend import Candidate, Config
from convdispatch.cli import main
from convdispatch.errors import BackendRejectedError, ProfileWarning
from convdispatch.profile import Entry, Result
from convdispatch.quarantine import Quarantine
from convdispatch.question import Question

HERE = machine.current()
FILTERS = np.ones(PROBLEM.filter_shape, "f4")


@pytest.fixture
def bad() -> Scripted:
    """A backend that is estimated the fastest of two, to be quarantined or not."""
    clock = FakeClock()
    backend = Scripted("bad", clock, expected=0.5)
    only(backend, Scripted("good", clock, expected=1.0))
    return backend


def chosen() -> str:
    return dispatch.decide(PROBLEM, "plan").candidate.backend.name


def stored(*backends: str) -> Entry:
    rows = tuple(Result(name, 1, Config(), 1e-3 * (n + 1), 0.0, 7, 0.0, 0) for n, name in enumerate(backends))
    return Entry(Question(PROBLEM, "plan", settings.current()).key, rows)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
configs = st.builds(Config, st.dictionaries(texts, st.integers(-9, 9) | texts | st.booleans(), max_size=3))
quarantines = st.builds(
    Quarantine, st.from_regex(r"[a-z][a-z0-9_.-]{0,12}", fullmatch=True), st.integers(0, 99), st.just(HERE.id),
    texts, texts, st.just(str(PROBLEM)), configs,
)  # fmt: skip


@given(quarantines)
def test_what_is_written_is_read_again(one: Quarantine) -> None:
    text = quarantine._dumped(one)
    assert list(safe_yaml.load(text)) == [one.key]
    ((key, chunk),) = profile_file.Profile(f"format: 1\n{text}", "some.yaml").notes(quarantine.KIND).items()
    assert quarantine._parsed(key, chunk) == one


def test_a_quarantine_stands_in_the_profile_as_people_read_it(bad: Scripted) -> None:
    quarantine.add(Candidate(bad, Config(tile=8)), PROBLEM, "crashed\n(SIGSEGV)")
    text = profile.user_path().read_text()
    assert (
        f"\nquarantine bad version 1 | {HERE.id}:\n  reason: crashed (SIGSEGV)\n  origin: scripted:Scripted\n" in text
    )
    assert f"  problem: {PROBLEM}\n  config: {{tile: 8}}\n  when: " in text


def test_who_is_quarantined_is_not_chosen_by_estimate(bad: Scripted) -> None:
    assert chosen() == "bad"
    quarantine.add(Candidate(bad, Config()), PROBLEM, "crashed")
    assert chosen() == "good"
    assert heuristic.usable(PROBLEM, settings.current())[1] == {"bad": "quarantined: crashed"}
    rows = {row.backend: row.reason for row in convdispatch.explain(PROBLEM.input_shape, FILTERS).rows}
    assert rows == {"good": "", "bad": "quarantined: crashed"}


def test_who_is_quarantined_is_not_chosen_from_the_profile(bad: Scripted) -> None:
    profile.remember(stored("bad", "good"))
    assert dispatch.decide(PROBLEM, "plan").candidate.backend is bad
    quarantine.add(Candidate(bad, Config()), PROBLEM, "crashed")
    decision = dispatch.decide(PROBLEM, "plan")
    assert decision.candidate.backend.name == "good"
    assert decision.evidence.detail.startswith("best allowed of 2")


def test_when_everybody_is_quarantined_the_error_says_why(bad: Scripted) -> None:
    only(bad)
    quarantine.add(Candidate(bad, Config()), PROBLEM, "crashed")
    with pytest.raises(BackendRejectedError, match="bad: quarantined: crashed"):
        dispatch.decide(PROBLEM, "plan")


@pytest.mark.parametrize("config", [None, Config()])
def test_who_insists_gets_it_with_a_warning_that_says_why(bad: Scripted, config: Config | None) -> None:
    quarantine.add(Candidate(bad, Config()), PROBLEM, "crashed")
    with pytest.warns(ProfileWarning, match="used as asked, but bad version 1 is quarantined: crashed"):
        decision = dispatch.decide(PROBLEM, "plan", ("bad", config))
    assert decision.candidate.backend is bad


def test_it_is_found_by_the_next_process(bad: Scripted) -> None:
    quarantine.add(Candidate(bad, Config()), PROBLEM, "crashed")
    profile.forget()
    held = quarantine.of(bad)
    assert held is not None
    assert (held.reason, held.problem, held.config) == ("crashed", str(PROBLEM), Config())


def test_it_is_for_one_version_of_one_code_on_one_machine(bad: Scripted) -> None:
    quarantine.add(Candidate(bad, Config()), PROBLEM, "crashed")
    bad.version = 2  # type: ignore[misc]
    assert quarantine.of(bad) is None
    bad.version = 1  # type: ignore[misc]
    assert quarantine.of(bad) is not None
    registry.register("bad", replace=True)(lambda x, w, problem: x)
    assert quarantine.of(registry.get("bad")) is None
    elsewhere = profile.user_path().read_text().replace(HERE.id, "other-2c-00000000")
    profile.forget()
    profile.user_path().write_text(elsewhere.replace(HERE.cpu, "another processor (with other registers)"))
    assert quarantine.of(bad) is None


def test_it_is_for_machines_too_whose_measurements_are_used_here(bad: Scripted) -> None:
    quarantine.add(Candidate(bad, Config()), PROBLEM, "crashed")
    there = profile.user_path().read_text().replace(HERE.id, "other-2c-00000000")
    profile.forget()
    profile.user_path().write_text(there.replace("numpy ", "numpy 0."))
    held = quarantine.of(bad)
    assert held is not None
    assert held.machine == "other-2c-00000000"
    assert quarantine.lift([bad]) == ("bad",)
    assert quarantine.of(bad) is None


def test_one_that_a_person_wrote_needs_a_reason_only(bad: Scripted) -> None:
    profile.user_path().parent.mkdir()
    text = f"format: 1\nquarantine bad version 1 | {HERE.id}:\n  reason: I do not trust it\n"
    profile.user_path().write_text(text)
    assert str(quarantine.of(bad)) == "bad version 1 is quarantined: I do not trust it"


@pytest.mark.parametrize(
    "text",
    ["quarantine bad | {}:\n  reason: x\n", "quarantine bad version 1 | {}:\n  because: x\n",
     "quarantine bad version 1 | {}:\n", "quarantine bad version 1 | {}:\n  reason: [\n",
     "quarantine bad version 1 | {}:\n  reason: x\n  config: [3]\n", "quarantine bad version 1 | {}: *a\n"],
)  # fmt: skip
def test_one_that_cannot_be_read_is_a_warning_and_a_miss(bad: Scripted, text: str) -> None:
    profile.user_path().parent.mkdir()
    profile.user_path().write_text("format: 1\n" + text.format(HERE.id))
    quarantine._parsed.cache_clear()
    with pytest.warns(ProfileWarning, match=r"'quarantine bad.* is ignored"):
        assert quarantine.of(bad) is None
    assert quarantine.of(bad) is None  # said once


def test_it_is_no_entry_and_survives_that_entries_are_written(bad: Scripted) -> None:
    path = profile.user_path()
    profile_file.write(path, [stored("good")], HERE)
    quarantine.add(Candidate(bad, Config()), PROBLEM, "crashed")
    profile_file.write(path, [stored("bad")], HERE)
    assert [entry.winner.backend for entry in profile_file.read(path).entries()] == ["bad"]
    profile.forget()
    assert quarantine.of(bad) is not None


def test_it_can_be_lifted(bad: Scripted) -> None:
    quarantine.add(Candidate(bad, Config()), PROBLEM, "crashed")
    assert quarantine.lift([bad, registry.get("good")]) == ("bad",)
    assert chosen() == "bad"
    assert "quarantine" not in profile.user_path().read_text()
    assert quarantine.lift([bad]) == ()
    profile.forget()
    assert quarantine.of(bad) is None
    quarantine.add(Candidate(bad, Config()), PROBLEM, "crashed again")
    assert quarantine.of(bad) is not None


def test_a_profile_that_cannot_be_written_keeps_it_for_this_process(bad: Scripted, tmp_path: Path) -> None:
    (tmp_path / "user").write_text("a file where a folder should be")
    with pytest.warns(ProfileWarning, match="the quarantine is kept for this process only"):
        quarantine.add(Candidate(bad, Config()), PROBLEM, "crashed")
    assert quarantine.of(bad) is not None


def test_a_large_profile_is_not_parsed_for_it(bad: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [Entry(Question(PROBLEM.replace(h=6 + n), "plan", settings.current()).key, stored("good").results)
               for n in range(300)]  # fmt: skip
    profile_file.write(profile.user_path(), entries, HERE)
    quarantine.add(Candidate(bad, Config()), PROBLEM, "crashed")
    profile.forget()
    quarantine._parsed.cache_clear()
    parsed = []
    load = safe_yaml.load

    def counted(text: str | bytes) -> Any:
        parsed.append(text)
        return load(text)

    monkeypatch.setattr(safe_yaml, "load", counted)
    assert quarantine.of(bad) is not None
    assert quarantine.of(bad) is not None
    assert len(parsed) == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_line_lists_it(bad: Scripted, as_json: bool) -> None:
    quarantine.add(Candidate(bad, Config()), PROBLEM, "crashed")
    done = CliRunner().invoke(main, ["backends", *["--json"] * as_json])
    assert done.exit_code == 0
    if as_json:
        rows = {row["name"]: row.get("quarantined") for row in json.loads(done.output)["available"]}
        assert rows == {"bad": "crashed", "good": None}
    else:
        assert "quarantined: crashed" in done.output
