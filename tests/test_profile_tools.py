"""Whole profiles: how machines compare, how entries join, what goes out, and what the doctor finds."""

import datetime as dt
import errno
import io
import itertools
import os
import re
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convdispatch import calibration, fingerprint, machine, profile, profile_file, profile_tools, quarantine, registry
from convdispatch.backend import Config
from convdispatch.calibration import Calibration
from convdispatch.errors import ProfileError, ProfileWarning
from convdispatch.fingerprint import compare
from convdispatch.machine import Machine
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Failure, Key, Result
from convdispatch.profile_doctor import Finding, examine
from convdispatch.profile_file import Profile
from convdispatch.profile_tools import Selection, choose, diff, export, join, prune

HERE = machine.current()
PROBLEM = Problem.parse("1x6x6x2 * 3x3x2x3 SAME")
OTHER = Problem.parse("1x5x5x2 * 1x1x2x3 VALID")
BOX = Machine(
    "Acme 9000 (zen4)", ("avx512f", "avx2", "fma"), 8, (32 << 10, 1 << 20, 32 << 20), "Linux x86_64",
    ("numpy 2.4.6", "scipy 1.17.0", "numba 0.63.1"),
)  # fmt: skip
NOW = dt.datetime(2026, 11, 22, tzinfo=dt.UTC)


def row(backend: str = "fft", median: float = 1e-3, **more: Any) -> Result:
    values = {"version": 1, "config": Config(threads=1), "spread": 0.02, "rounds": 7, "error": 1e-7, "workspace": 64}
    return Result(backend, median=median, **{**values, **more})


def entry(*rows: Result, problem: Problem = PROBLEM, where: str = HERE.id, threads: int = 2, **more: Any) -> Entry:
    key = Key(problem, "plan", threads, where)
    return Entry(key, rows or (row(), row("direct", 2e-3)), **{"tuned": "2026-11-01T00:00:00+00:00", **more})


def text_of(*entries: Entry, machines: dict[str, dict[str, Any]] | None = None, more: str = "") -> str:
    known = machines if machines is not None else {HERE.id: HERE.describe()}
    chunks = [profile.dump_machine(name, fields) for name, fields in known.items()]
    return "format: 1\n\n" + "\n".join([*chunks, *map(profile.dump_entry, entries)]) + "\n" + more


def of(*entries: Entry, **more: Any) -> Profile:
    return Profile(text_of(*entries, **more), "some.yaml")


# Machines ---------------------------------------------------------------------------------------------------------


def described(**changes: Any) -> dict[str, object]:
    return {name: value for name, value in {**BOX.describe(), **changes}.items() if value is not None}


def test_a_machine_is_exactly_like_itself() -> None:
    assert compare(described(), BOX).grade == "exact"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"libraries": ["numpy 2.3.1", "scipy 1.17.0", "numba 0.63.1"]}, "numpy 2.3.1 instead of 2.4.6"),
        ({"libraries": ["numpy 2.4.6", "scipy 1.17.0"]}, "numba unsaid instead of 0.63.1"),
        ({"libraries": [*BOX.libraries, "mkl 3"]}, "mkl 3 instead of none"),
        ({"libraries": None}, "library versions unsaid"),
        ({"libraries": "all of them"}, "library versions unsaid"),
        ({"caches": [32 << 10, 1 << 20, 16 << 20]}, "L3 cache of 16384 KiB instead of 32768 KiB"),
        ({"caches": None}, "caches unsaid"),
        ({"cores": 4}, "4 cores instead of 8"),
        ({"cores": None}, "number of cores unsaid"),
        ({"cpu": "(zen4)"}, "cpu model unsaid"),
    ],
)
def test_what_only_shifts_times_is_a_soft_difference(changes: dict[str, Any], said: str) -> None:
    found = compare(described(**changes), BOX, threads=2)
    assert (found.grade, found.soft) == ("soft", (said,))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cpu": "Acme 8000 (zen4)"}, "cpu Acme 8000 instead of Acme 9000"),
        ({"cpu": "Acme 9000 (zen3)"}, "cpu zen3 instead of zen4"),
        ({"cpu": None}, "cpu unsaid instead of zen4"),
        ({"cpu": 3}, "cpu unsaid instead of zen4"),
        ({"isa": ["avx2", "fma"]}, "isa avx2, fma instead of avx512f, avx2, fma"),
        ({"isa": None}, "isa unsaid instead of avx512f, avx2, fma"),
        ({"system": "Windows AMD64"}, "system Windows AMD64 instead of Linux x86_64"),
        ({"system": None}, "system unsaid instead of Linux x86_64"),
        ({"cores": 1}, "1 cores instead of 8"),
    ],
)
def test_what_decides_which_kernels_run_well_is_a_hard_difference(changes: dict[str, Any], said: str) -> None:
    found = compare(described(**changes), BOX, threads=2)
    assert (found.grade, found.hard) == ("hard", (said,))


def test_the_order_of_instruction_sets_means_nothing_and_unknown_fields_neither() -> None:
    assert compare(described(isa=["fma", "avx2", "avx512f"], colour="red"), BOX).grade == "exact"


@pytest.mark.parametrize(("there", "here", "threads", "grade"), [
    (8, 4, 4, "soft"), (4, 8, 4, "soft"), (8, 4, 5, "hard"), (4, 8, 5, "hard"), (None, 4, 4, "soft"),
    (None, 4, 5, "hard"), (4, 4, 8, "exact"),
])  # fmt: skip
def test_cores_matter_as_far_as_an_entry_uses_them(there: int | None, here: int, threads: int, grade: str) -> None:
    assert compare(described(cores=there), replace(BOX, cores=here), threads).grade == grade


junk = st.none() | st.integers() | st.text(max_size=9) | st.lists(st.text(max_size=5) | st.integers(), max_size=4)


@given(st.dictionaries(st.sampled_from([*BOX.describe(), "else"]), junk))
def test_no_description_makes_comparing_raise_and_only_the_same_is_exact(fields: dict[str, Any]) -> None:
    assert compare(fields, BOX).grade == "hard"  # nobody makes up a processor by chance
    assert compare({**BOX.describe(), **fields}, BOX).grade in {"exact", "soft", "hard"}


def test_a_portable_description_is_soft_on_its_own_kind_and_hard_elsewhere() -> None:
    kind = fingerprint.portable(BOX.describe())
    assert kind == {"cpu": "(zen4)", "isa": list(BOX.isa), "system": "Linux x86_64"}
    assert compare(kind, BOX, 8).grade == "soft"
    assert compare(kind, replace(BOX, cpu="Else (zen4)", cores=2, caches=(1, 2, 3), libraries=()), 2).grade == "soft"
    assert compare(kind, replace(BOX, cpu="Else (zen5)"), 2).grade == "hard"


# Choosing and joining ----------------------------------------------------------------------------------------------


def with_width(width: float | None, median: float = 1e-3, **more: Any) -> Entry:
    ends = None if width is None else (median * (1 - width / 2), median * (1 + width / 2))
    return entry(row(median=median, interval=ends), **more)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (with_width(0.01), with_width(0.02)),
        (with_width(0.01, median=5e-3), with_width(0.02, median=1e-3)),
        (with_width(0.5), with_width(None)),
        (with_width(0.5), with_width(0.01, flags=("busy",))),
        (entry(row(version=2)), with_width(0.01)),
        (entry(row(), failures=(Failure("new", 3, Config(), "no"),)), entry(row(), row("new", version=2))),
        (with_width(0.01, effort="patient"), with_width(0.01)),
        (with_width(0.01, tuned="2026-11-02"), with_width(0.01)),
        (with_width(0.01), with_width(0.01, tuned="some day")),
    ],
    ids=[
        "tighter", "relative to the median", "an interval over none", "no flags", "newer version",
        "newer version of a loser", "effort", "date", "a date over none",
    ],
)  # fmt: skip
def test_the_better_of_two_entries(good: Entry, bad: Entry) -> None:
    assert choose([good, bad]) is good
    assert choose([bad, good]) is good


some = st.builds(
    lambda width, flags, effort, version: (
        with_width(width, flags=flags, effort=effort, tuned="2026-11-01")
        if version == 1
        else entry(row(version=version), flags=flags, effort=effort)
    ),
    st.sampled_from([None, 0.01, 0.02]),
    st.sampled_from([(), ("busy",)]),
    st.sampled_from(["measure", "patient"]),
    st.integers(1, 2),
)


@given(st.lists(some, min_size=2, max_size=4), st.randoms())
def test_neither_order_nor_grouping_decides_who_is_chosen_of_one_version(group: list[Entry], shuffled: Any) -> None:
    best = choose(group)
    mixed = list(group)
    shuffled.shuffle(mixed)
    assert choose(mixed) == best
    first_two = choose(group[:2])
    assert choose([first_two, *group[2:], best]) == best


def test_joining_counts_what_is_new_better_kept_and_refused() -> None:
    target = of(with_width(0.02), with_width(0.02, problem=OTHER))
    third = PROBLEM.replace(n=2)
    broken = profile.dump_entry(entry(problem=PROBLEM.replace(n=3))).replace("winner: fft", "winner: ftt")
    source = of(with_width(0.01), with_width(0.03, problem=OTHER), entry(problem=third), more=broken)
    done = join(target, [source], HERE)
    assert [key.problem for key in done.new] == [third]
    assert [key.problem for key in done.better] == [PROBLEM]
    assert [key.problem for key in done.kept] == [OTHER]
    ((where, reason),) = done.refused.items()
    assert where.startswith("some.yaml: 3x6x6x2")
    assert "winner 'ftt(threads=1)' is none of the results" in reason
    assert done.grades == {"exact": 3}
    again = Profile(target.changed(done.changes), "again.yaml")
    assert {one.key.problem: profile_tools.width(one) for one in again.entries()} == {
        PROBLEM: pytest.approx(0.01), OTHER: pytest.approx(0.02), third: float("inf"),
    }  # fmt: skip
    assert join(again, [source, target], HERE).changes == {}


def test_joining_takes_machines_and_quarantines_along_and_grades_by_them() -> None:
    like = {**HERE.describe(), "libraries": ["numpy 1.0"]}
    far = {**HERE.describe(), "system": "Plan9 mips"}
    more = "quarantine bad version 1 | like:\n  reason: it crashed\n  when: 2026-11-22\n"
    source = of(
        entry(where="like"), entry(where="far"), entry(where="unheard of"), entry(),
        machines={"like": like, "far": far, "idle": far, HERE.id: HERE.describe()}, more=more,
    )  # fmt: skip
    done = join(Profile("", "new.yaml"), [source], HERE)
    assert done.grades == {"exact": 1, "soft": 1, "hard": 2}
    again = Profile(Profile("", "").changed(done.changes), "again.yaml")
    assert set(again.machines()) == {"like", "far", HERE.id}
    (held,), _ = quarantine.written(again)
    assert (held.backend, held.version, held.machine, held.reason) == ("bad", 1, "like", "it crashed")
    assert len(again.entries()) == 4


def test_joining_mends_a_broken_entry_and_replaces_one_in_other_words() -> None:
    text = text_of(with_width(0.02), with_width(0.02, problem=OTHER))
    text = text.replace(str(OTHER), "1x5x5x2*1x1x2x3  pad=0").replace("effort: measure", "effort: much", 1)
    target = Profile(text, "target.yaml")
    done = join(target, [of(with_width(0.01), with_width(0.01, problem=OTHER))], HERE)
    assert ([k.problem for k in done.new], [k.problem for k in done.better]) == ([PROBLEM], [OTHER])
    again = Profile(target.changed(done.changes), "again.yaml")
    assert again.broken() == {}
    assert [one.key.problem for one in again.entries()] == [PROBLEM, OTHER]


# Comparing ----------------------------------------------------------------------------------------------------------


def test_diff_tells_what_is_where_and_by_how_much_winners_differ() -> None:
    a = of(entry(row("fft", 1e-3), row("direct", 1.1e-3)), entry(problem=OTHER), entry(problem=PROBLEM.replace(n=2)))
    b = of(entry(row("direct", 2e-3)), entry(problem=OTHER), entry(problem=PROBLEM.replace(n=3)))
    found = diff(a, b)
    assert [one.key.problem.n for one in (*found.only_first, *found.only_second)] == [2, 3]
    assert [key.problem for key in found.same] == [OTHER]
    (change,) = found.changed
    assert change.ratio == pytest.approx(2.0)
    assert change.cost == pytest.approx(1.1)
    assert diff(b, a).changed[0].cost is None
    same = diff(a, a)
    assert (same.changed, same.only_first, same.only_second, len(same.same)) == ((), (), (), 3)


def test_diff_across_machines_compares_problem_by_problem() -> None:
    a, b = (
        of(entry()),
        of(entry(row("direct")), machines={}),
    )
    elsewhere = of(entry(row("direct"), where="elsewhere"), machines={})
    assert len(diff(a, b).changed) == len(diff(a, elsewhere, across=True).changed) == 1
    assert diff(a, elsewhere).changed == ()
    assert diff(a, a).changed == ()


# Shipping -----------------------------------------------------------------------------------------------------------


def test_an_export_is_a_clean_copy() -> None:
    more = "my notes: here\n" + profile.dump_entry(entry(problem=OTHER)).replace("effort:", "effort", 1)
    done = export(of(entry(), entry(where="far"), more=more), portable=False)
    again = Profile(done.text, "given.yaml")
    assert again.broken() == {}
    assert again.entries() == [entry(), entry(where="far")]
    assert set(again.machines()) == {HERE.id}
    assert done.entries == 2
    assert len(done.left_out) == 2


def test_a_portable_export_is_soft_on_every_machine_of_its_kind() -> None:
    twin = {**BOX.describe(), "cpu": "Acme 7000 (zen4)", "cores": 2, "libraries": ["numpy 2.0"]}
    source = of(
        with_width(0.02, where="box"), with_width(0.01, where="twin"), entry(where="box", problem=OTHER),
        entry(where="box", problem=PROBLEM.replace(n=2), flags=("busy",)), entry(where="lost"),
        machines={"box": BOX.describe(), "twin": twin},
    )  # fmt: skip
    done = export(source, portable=True)
    again = Profile(done.text, "given.yaml")
    ((machine_id, fields),) = again.machines().items()
    assert machine_id.startswith("zen4-portable-")
    assert "Acme" not in done.text
    assert "numpy" not in done.text
    assert compare(fields, BOX, 2).grade == "soft"
    assert [(one.key.problem, one.key.machine) for one in again.entries()] == [
        (PROBLEM, machine_id), (OTHER, machine_id),
    ]  # fmt: skip
    assert profile_tools.width(again.entries()[0]) == pytest.approx(0.01)
    assert sorted(done.left_out.values()) == ["flagged busy", "its machine is not described"]
    key = replace(again.entries()[0].key, machine=BOX.id)
    ((found, differences),) = again.alike(key, BOX)
    assert found.winner.backend == "fft"
    assert "cpu model unsaid" in differences


def test_exporting_what_was_exported_changes_nothing() -> None:
    once = export(of(entry(), entry(problem=OTHER)), portable=True).text
    assert export(Profile(once, "x"), portable=True).text == once
    assert export(Profile(once, "x"), portable=False).text == once


# Tidying ------------------------------------------------------------------------------------------------------------

QUARANTINED = "quarantine bad version 1 | far:\n  reason: it crashed\n  when: 2026-01-01\n"
OLD = entry(row("fft", version=0), problem=PROBLEM.replace(n=2))
MIXED = text_of(
    entry(),
    OLD,
    entry(problem=OTHER, flags=("busy",)),
    entry(where="far", tuned="2026-01-01T00:00:00+00:00"),
    more=QUARANTINED + profile.dump_entry(entry(problem=PROBLEM.replace(n=9))).replace("effort: ", "effort: very ", 1),
    machines={HERE.id: HERE.describe(), "far": {"cpu": "x"}},
)


@pytest.mark.parametrize(
    ("what", "gone"),
    [
        (Selection(stale=True), {"2x6x6x2"}),
        (Selection(flagged=True), {"1x5x5x2"}),
        (Selection(stale=True, flagged=True), {"2x6x6x2", "1x5x5x2"}),
        (Selection(broken=True), {"9x6x6x2"}),
        (Selection(quarantined=True), {"quarantine"}),
        (Selection(machine="far"), {"1x6x6x2", "quarantine", "machine"}),
        (Selection(machine="far", flagged=True), set()),
        (Selection(machine=HERE.id, flagged=True), {"1x5x5x2"}),
        (Selection(older_than=30), {"1x6x6x2", "quarantine"}),
        (Selection(older_than=1), {"1x6x6x2", "quarantine", "2x6x6x2", "1x5x5x2"}),
        (Selection(older_than=30, stale=True), set()),
        (Selection(machine="nowhere"), set()),
    ],
)
def test_pruning_takes_out_what_is_selected_and_nothing_else(what: Selection, gone: set[str]) -> None:
    source = Profile(MIXED, "some.yaml")
    done = prune(source, what, NOW)
    assert {key.split()[0] for key in done.changes} == gone
    before = source.chunks()
    after = Profile(source.changed(done.changes), "after.yaml").chunks()
    assert set(after) == set(before) - set(done.changes)
    assert {key: text.rstrip() for key, text in after.items()} == {
        key: text.rstrip() for key, text in before.items() if key in after
    }


def test_pruning_nothing_leaves_the_text_as_it_is() -> None:
    assert Profile(MIXED, "x").changed({}) == MIXED


# The doctor ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profile.yaml"


def examined(path: Path, text: str) -> dict[str, Finding]:
    path.write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = examine([("project", path)], path, HERE)
    return {finding.kind: finding for finding in found}


def test_a_healthy_profile_and_none_at_all_have_no_findings(path: Path) -> None:
    assert examine([("project", path)], path, HERE) == []
    assert examined(path, text_of(entry())) == {}


def test_the_doctor_finds_each_thing_and_names_the_command_that_mends_it(path: Path) -> None:
    found = examined(path, MIXED + profile.dump_entry(entry(row("gone"), problem=PROBLEM.replace(h=7))))
    assert {kind: finding.wrong for kind, finding in found.items()} == {
        "unreadable": True, "stale": True, "flagged": True, "unknown backend": True, "other machine": False,
        "quarantined": False,
    }  # fmt: skip
    where = f"--profile {path}"
    assert found["unreadable"].command == f"convdispatch profile prune --broken {where}"
    tune = f"convdispatch tune '2x6x6x2 * 3x3x2x3 SAME' --deployment plan --threads 2 {where}"
    assert found["stale"].command == tune
    assert found["stale"].reason == f"fft was version 0, is {registry.get('fft').version}"
    assert found["flagged"].command == f"convdispatch tune '{OTHER}' --deployment plan --threads 2 {where}"
    assert "there is no such backend here" in found["unknown backend"].reason
    assert found["other machine"].command == f"convdispatch profile prune --machine far {where}"
    assert found["quarantined"].reason == "it crashed (2026-01-01)"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"m": 40, "threads": 1},
            "winograd(m=40, threads=1): winograd's config needs m=2 or m=4 or m=5 or m=6, .*; got m=40",
        ),
        ({"m": 2, "tile": 3}, "winograd(m=2, tile=3): backend 'winograd' has no config 'tile'; known are m, threads"),
    ],
)
def test_a_config_that_its_backend_does_not_know_is_found(path: Path, config: dict[str, Any], reason: str) -> None:
    measured = row("winograd", 2e-3, config=Config(config), version=registry.get("winograd").version)
    finding = examined(path, text_of(entry(row(), measured)))["unusable config"]
    assert re.fullmatch(re.escape(reason).replace(r"\.\*", ".*"), finding.reason)
    assert finding.command.endswith(f"--retune --profile {path}")


@pytest.mark.parametrize("fields", [" [1]", " nonsense", "\n  cores: [", ""])
def test_a_machine_that_cannot_be_read_is_found_and_pruned_as_broken(path: Path, fields: str) -> None:
    good = text_of(entry())
    start = good.index(f"machine {HERE.id}:")
    end = good.index("\n\n", start)
    finding = examined(path, f"{good[:start]}machine {HERE.id}:{fields}{good[end:]}")["unreadable"]
    assert finding.about == f"machine {HERE.id}"
    assert "line " in finding.reason
    assert finding.command == f"convdispatch profile prune --broken --profile {path}"
    done = prune(profile_file.read(path), Selection(broken=True))
    path.write_text(profile_file.read(path).changed(done.changes))
    profile_file.write(path, (), HERE)
    assert examined(path, path.read_text()) == {}


def test_a_quarantine_of_the_version_in_use_here_is_wrong(path: Path) -> None:
    version = registry.get("fft").version
    text = text_of(entry(), more=f"quarantine fft version {version} | {HERE.id}:\n  reason: it hung\n")
    finding = examined(path, text)["quarantined"]
    assert finding.wrong
    assert finding.command == f"convdispatch profile prune --quarantined --profile {path}"
    assert not examined(path, text.replace(f"version {version} |", f"version {version + 1} |"))["quarantined"].wrong
    assert not examined(path, f"{text}  origin: another.package:Fft\n")["quarantined"].wrong


def test_calibrations_are_kept_by_every_tool_and_go_with_their_machine(path: Path) -> None:
    made = {where: Calibration(where, "calibrate", 9) for where in (HERE.id, "far")}
    more = "".join(text for one in made.values() for text in calibration.dump(one).values())
    source = of(entry(), entry(where="far"), machines={HERE.id: HERE.describe()}, more=more)
    joined = Profile(Profile("", "").changed(join(Profile("", "new"), [source], HERE).changes), "again")
    for kept in (source, joined, Profile(export(source, portable=False).text, "out")):
        assert {key: calibration.parse(key.split()[1], text) for key, text in kept.notes("calibration ").items()} == {
            f"calibration {where}": one for where, one in made.items()
        }
    everything = Selection(stale=True, flagged=True, broken=True, quarantined=True)
    assert not [key for key in prune(source, everything).changes if key.startswith("calibration")]
    assert "calibration far" in prune(source, Selection(machine="far")).changes
    assert f"calibration {HERE.id}" not in prune(source, Selection(machine="far")).changes
    key = f"calibration {HERE.id}"
    broken = text_of(entry(), more=f"{key}:\n  made: long ago\n")
    assert examined(path, broken)["unreadable"].about == key
    assert set(prune(Profile(broken, "x.yaml"), Selection(broken=True)).changes) == {key}


@pytest.mark.parametrize("turn", [1, -1])
def test_of_two_calibrations_the_one_that_knows_more_is_kept(turn: int) -> None:
    ranked = [
        Calibration(HERE.id, "tune", 50, made="2026-02-01T00:00:00+00:00"),
        Calibration(HERE.id, "tune", 90, made="2026-01-01T00:00:00+00:00"),
        Calibration(HERE.id, "calibrate", 40, made="2026-01-01T00:00:00+00:00"),
        Calibration(HERE.id, "calibrate", 40, made="2026-02-01T00:00:00+00:00"),
    ]
    for less, more in itertools.pairwise(ranked):
        texts = [next(iter(calibration.dump(one).values())) for one in (less, more)][::turn]
        first, second = (of(entry(), more=text) for text in texts)
        joined = Profile(first.changed(join(first, [second], HERE).changes), "joined")
        assert calibration.parse(HERE.id, joined.text(f"calibration {HERE.id}")) == more


def test_a_quarantine_that_cannot_be_read_is_found_and_pruned_as_broken(path: Path) -> None:
    key = f"quarantine fft version 1 | {HERE.id}"
    text = text_of(entry(), more=f"{key}:\n  when: 2026-01-01\n")
    finding = examined(path, text)["unreadable"]
    assert (finding.about, finding.reason, finding.wrong) == (key, "it gives no reason", True)
    assert set(prune(Profile(text, "x.yaml"), Selection(broken=True)).changes) == {key}


def test_a_like_machine_is_a_note_with_what_differs(path: Path) -> None:
    like = {**HERE.describe(), "libraries": ["numpy 1.0"]}
    finding = examined(path, text_of(entry(where="like", threads=1), machines={"like": like}))["like machine"]
    assert not finding.wrong
    assert "1 entry used where this machine has none of its own: numpy 1.0 instead of" in finding.reason


def test_keys_that_stand_twice_and_files_that_are_none_are_found(path: Path) -> None:
    found = examined(path, text_of(entry(), more=profile.dump_entry(entry(row("direct")))))
    assert "and differs; the last counts" in found["doubled"].reason
    assert found["doubled"].command == f"convdispatch profile prune --broken --profile {path}"
    file = examined(path, "milk: 2\n")["unreadable file"]
    assert file.command == f"mv {path} {path}.aside"
    assert file.wrong


def test_an_entry_that_is_hidden_by_a_better_layer_is_nobodys_trouble(path: Path, tmp_path: Path) -> None:
    above = tmp_path / "above.yaml"
    above.write_text(text_of(entry()))
    path.write_text(text_of(entry(row(version=0))))
    assert examine([("project", above), ("user", path)], above, HERE) == []
    assert [finding.kind for finding in examine([("user", path), ("project", above)], path, HERE)] == ["stale"]


def test_a_file_that_cannot_be_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    inside = tmp_path / "file" / "deep" / "profile.yaml"
    (finding,) = examine([], inside, HERE)
    assert (finding.kind, finding.command) == ("unwritable file", f"mv {tmp_path / 'file'} {tmp_path / 'file'}.aside")
    monkeypatch.setattr(os, "access", lambda *_: False)
    (finding,) = examine([], tmp_path / "new" / "profile.yaml", HERE)
    assert finding.command == f"chmod u+wx {tmp_path}"


def test_a_folder_that_was_named_as_the_profile_stays_where_it_is(tmp_path: Path) -> None:
    (finding,) = examine([("project", tmp_path)], tmp_path, HERE)
    assert finding.kind == "unreadable file"
    assert finding.command == f"export CONVDISPATCH_PROFILE={tmp_path / 'profile.yaml'}"
    (finding,) = examine([("user", tmp_path)], tmp_path / "p.yaml", HERE)  # the name is convdispatch's own
    assert finding.command == f"mv {tmp_path} {tmp_path}.aside"


def test_what_cannot_be_there_is_not_to_be_moved(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    inside = tmp_path / "file" / "profile.yaml"
    (finding,) = examine([("project", inside)], inside, HERE)
    assert (finding.kind, finding.command) == ("unwritable file", f"mv {tmp_path / 'file'} {tmp_path / 'file'}.aside")


def test_a_file_that_may_not_be_read_is_given_the_right(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> Profile:
        raise ProfileError(f"{path} cannot be read") from PermissionError(13, "Permission denied")

    path.write_text(text_of(entry()))
    monkeypatch.setattr(profile_file, "read", denied)
    (finding,) = examine([("project", path)], path, HERE)
    assert finding.command == f"chmod u+rw {path}"
    monkeypatch.setattr(os, "access", lambda place, mode: mode != os.X_OK or place != path.parent)
    (finding,) = examine([("project", path)], path, HERE)
    assert finding.command == f"chmod u+x {path.parent}"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="every folder can be made here")
def test_a_folder_that_cannot_be_made_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: True)
    nowhere = Path("/proc/convdispatch/profile.yaml")
    (finding,) = examine([("project", nowhere)], nowhere, HERE)
    assert (finding.kind, finding.wrong) == ("unwritable file", True)
    assert "no file can be made in /proc" in finding.reason
    assert finding.command == f"export CONVDISPATCH_PROFILE={profile.user_path()}"
    monkeypatch.setattr(profile, "user_path", lambda: nowhere)
    (finding,) = examine([], nowhere, HERE)
    assert finding.command == 'export CONVDISPATCH_PROFILE="$HOME/convdispatch-profile.yaml"'


@given(st.text("{}[]&*!|>'\"%@`#:-? \n\tab1", max_size=200))
def test_no_text_makes_a_tool_raise(junk: str) -> None:
    for text in (f"{MIXED}{junk}", MIXED.replace("fft", junk, 2), f"{MIXED}quarantine {junk}\n  {junk}"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ProfileWarning)
            try:
                source = Profile(text, "some.yaml")
            except ProfileError:
                continue
            join(source, [source], HERE)
            diff(source, Profile(MIXED, "x"))
            export(source, portable=True)
            for stale, broken in itertools.product((False, True), repeat=2):
                prune(source, Selection(stale, not stale, broken, quarantined=not broken))


def test_a_machine_that_comes_with_a_better_first_entry_doubles_nothing() -> None:
    head = "format: 1\n\n"
    file = Profile(head + profile.dump_entry(entry(row(median=2e-3))) + "\n", "some.yaml")
    better = entry(row(median=1e-3))
    machine_text = profile.dump_machine(HERE.id, HERE.describe())
    changes = {str(better.key): profile.dump_entry(better), f"machine {HERE.id}": machine_text}
    for order in (changes, dict(reversed(changes.items()))):
        now = file.changed(order)
        assert now.count(f"{better.key}:") == 1
        assert now.count(f"machine {HERE.id}:") == 1
        assert [found.winner.median for found in Profile(now, "now.yaml").entries()] == [1e-3]


# Choices by hand ----------------------------------------------------------------------------------------------------


def by_hand(found: Entry, winner: str) -> Entry:
    """Return what is read of an entry in whose text somebody has written another winner."""
    text = re.sub("winner: .*", f"winner: {winner}", profile.dump_entry(found))
    read = Profile(f"format: 1\n{text}", "some.yaml").get(found.key)
    assert read is not None
    return read


SLOW = "direct(threads=1)"


def test_a_winner_that_was_not_measured_as_one_was_chosen_by_hand() -> None:
    measured = entry()
    assert not measured.by_hand
    assert by_hand(measured, measured.winner.name) == measured
    chosen = by_hand(measured, SLOW)
    assert (chosen.by_hand, chosen.winner.name) == (True, SLOW)
    assert by_hand(chosen, SLOW) == chosen  # however often it is written again
    assert by_hand(chosen, measured.winner.name) == measured


@pytest.mark.parametrize("flags", [(), ("busy",), ("online",)])
def test_a_better_entry_keeps_the_winner_that_was_chosen_by_hand(flags: tuple[str, ...]) -> None:
    mine = replace(by_hand(entry(), SLOW), flags=flags)
    better = entry(row("fft", 0.9e-3), row("direct", 1.8e-3), tuned="2026-11-20T00:00:00+00:00", effort="patient")
    done = join(of(mine), [of(better)], HERE)
    assert (done.better, done.by_hand) == ((mine.key,), (mine.key,))
    now = Profile(of(mine).changed(done.changes), "some.yaml")
    assert now.get(mine.key) == better.with_winner(SLOW)
    again = join(now, [of(better)], HERE)
    assert (again.kept, again.changes) == ((mine.key,), {})


def test_an_entry_with_a_choice_by_hand_stays_where_the_better_one_did_not_measure_it() -> None:
    mine = by_hand(entry(), SLOW)
    better = entry(row("fft", 0.9e-3), tuned="2026-11-20T00:00:00+00:00", effort="patient")
    done = join(of(mine), [of(better)], HERE)
    assert (done.kept, done.by_hand, done.changes) == ((mine.key,), (mine.key,), {})


def test_somebody_elses_choice_by_hand_is_taken_for_what_is_new_alone() -> None:
    mine, theirs = entry(tuned="2026-11-20T00:00:00+00:00"), by_hand(entry(), SLOW)
    assert join(of(mine), [of(theirs)], HERE).by_hand == ()
    for sources in itertools.permutations([of(mine), of(theirs)]):
        done = join(of(), sources, HERE)
        assert (done.new, done.by_hand) == ((mine.key,), (mine.key,))
        assert Profile(of().changed(done.changes), "some.yaml").get(mine.key) == mine.with_winner(SLOW)


def test_an_export_keeps_a_choice_by_hand() -> None:
    mine = by_hand(entry(), SLOW)
    for portable in (False, True):
        (found,) = Profile(export(of(mine), portable=portable).text, "some.yaml").entries()
        assert (found.by_hand, found.winner.name) == (True, SLOW)


# Online ---------------------------------------------------------------------------------------------------------------


def test_what_was_found_on_live_traffic_is_not_doubtful() -> None:
    found = of(entry(flags=("online",)))
    here = entry().key
    assert export(found, portable=True).entries == 1
    assert prune(found, Selection(flagged=True)).changes == {}
    assert (found.get(here) or entry()).doubts == ()
    both = of(entry(flags=("online", "busy")))
    assert export(both, portable=True).entries == 0
    assert set(prune(both, Selection(flagged=True)).reasons.values()) == {"flagged busy"}
    assert choose([entry(flags=("busy",), effort="exhaustive"), entry(flags=("online",))]).flags == ("online",)


def test_the_doctor_has_nothing_to_mend_in_what_was_found_on_live_traffic(tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text(text_of(entry(row("direct", version=registry.get("direct").version), flags=("online",))))
    assert not [finding for finding in examine([("project", file)], file, HERE) if finding.kind == "flagged"]


# Disks ----------------------------------------------------------------------------------------------------------------


class _Full(io.BytesIO):
    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def _read_only(**_: Any) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize(
    ("make", "access", "said"),
    [(lambda **_: _Full(), True, "No space left on device"), (_read_only, False, "Read-only file system")],
)
def test_a_disk_that_takes_nothing_is_not_mended_by_permissions(
    make: Any, access: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: access)
    monkeypatch.setattr(tempfile, "TemporaryFile", make)
    (finding,) = examine([], tmp_path / "profile.yaml", HERE)
    assert (finding.kind, finding.wrong) == ("unwritable file", True)
    assert said in finding.reason
    assert finding.command.startswith("export CONVDISPATCH_PROFILE=")
