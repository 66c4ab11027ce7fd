"""Estimates from the nearest tuned problems: who is near, what they say, and how much it is trusted."""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import FakeClock, Scripted, only
from strategies import problems

from convdispatch import calibration, dispatch, machine, neighbours, profile, profile_file, registry, transfer
from convdispatch.backend import Candidate, Config, Effort
from convdispatch.explain import explain_problem
from convdispatch.machine import Machine
from convdispatch.neighbours import Row, place_of, rows_of
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Failure, Key, Result
from convdispatch.question import parse_forced

HERE = machine.current()
TARGET = Problem.parse("1x28x28x64 * 3x3x64x64 SAME")
NEAR = Problem.parse("1x28x28x64 * 3x3x64x96 SAME")
NEXT = Problem.parse("1x56x56x64 * 3x3x64x64 SAME")
FAR = Problem.parse("64x224x224x64 * 3x3x64x64 SAME")
OTHER_KINDS = [
    Problem.parse(text)
    for text in (
        "1x28x28x64 * 1x1x64x64 SAME",
        "1x28x28x64 * 3x3x64x64 SAME stride=2",
        "1x28x28x64 * 3x3x64x64 SAME dilation=2",
        "1x28x28x64 * 3x3x1x64 SAME",
        "1x28x28x64 * 3x3x64x64 SAME float64",
    )
]


# Places and rows -------------------------------------------------------------------------------------------------


@given(problem=problems())
def test_a_place_is_the_same_from_the_text_as_from_the_problem(problem: Problem) -> None:
    place = place_of(problem.text)
    if problem.is_trivial:
        assert place is None
        return
    assert place is not None
    assert place.sizes == calibration.sizes_of(problem)
    pixels = problem.n * problem.oh * problem.ow
    assert place.counts[:4] == (pixels, problem.group_c, problem.group_k, problem.groups)
    assert place.manner[:2] == (problem.data_format == "NCHW", problem.epilogue.residual)
    assert place.kind[0] == problem.dtype
    assert place.kind[2:4] == (problem.strides == (1, 1), problem.dilations == (1, 1))


@pytest.mark.parametrize(
    "text", ["", "nonsense", "1x2 * 3", "1x4x4x2 * 3x3x2x2 SAME stride=x", "1x4x4x2 * 3x3x0x2 SAME"]
)
def test_what_is_no_problem_has_no_place(text: str) -> None:
    assert place_of(text) is None


_results = st.builds(
    Result,
    st.sampled_from(["fft", "im2col", "my-own.one"]),
    st.integers(1, 9),
    st.dictionaries(
        st.sampled_from(["m", "rows", "loop"]),
        st.integers(0, 99) | st.booleans() | st.sampled_from([0.5, "filters", "a-b", "true", "12", "a: b", "x, y}"]),
    ).map(Config),  # type: ignore[arg-type]  # a mix of plain values
    st.integers(1, 9999).map(lambda n: n / 1e6),
    st.just(0.01),
    st.just(7),
    st.just(1e-7),
    st.just(0),
    st.none() | st.just((1e-6, 2e-6)),
    st.integers(1, 9999).map(lambda n: n / 1e6),
)  # fmt: skip


@given(results=st.lists(_results, min_size=1, max_size=4, unique_by=lambda r: r.name), fails=st.booleans())
def test_rows_read_in_haste_are_those_that_are_read_with_care(results: list[Result], fails: bool) -> None:
    failures = (Failure("fft", 1, Config(), "results: {backend: fft, median_us: 3, estimate_us: 4}"),) if fails else ()
    entry = Entry(Key(TARGET, "plan", 2, HERE.id), tuple(results), failures)
    text = profile.dump_entry(entry)
    careful = profile_file.Profile(f"format: 1\n\n{text}", "text").get(entry.key)
    assert careful is not None
    expected = [Row(r.backend, r.version, r.config, r.estimate or 0.0, r.median) for r in careful.results]
    assert sorted(rows_of(text), key=str) == sorted(expected, key=str)


def test_rows_without_an_estimate_and_of_doubtful_entries_are_passed_over() -> None:
    entry = know(NEAR, quick=2.0)
    bare = dataclasses.replace(entry, results=(dataclasses.replace(entry.winner, estimate=None),))
    assert rows_of(profile.dump_entry(entry))
    assert rows_of(profile.dump_entry(bare)) == ()
    assert rows_of(profile.dump_entry(dataclasses.replace(entry, flags=("busy",)))) == ()


_LAST = "estimate_us: "


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: re.sub(r"  winner: .*\n", "", text),
        lambda text: re.sub(r"winner: .*", "winner:", text),
        lambda text: text[: text.rindex(_LAST)],
        lambda text: text[: text.rindex(_LAST) + len(_LAST)],
        lambda text: text.rstrip()[:-1],
        lambda text: text.replace("  effort", "\teffort"),
        lambda text: text.replace("spread", "spr\0ead"),
        lambda text: text.replace("effort: ", "effort: \x7f"),
        lambda text: text + "\n" + text.replace("rounds: 7", "rounds: 8"),
    ],
)
def test_an_entry_that_is_cut_or_broken_is_no_neighbour(spoil: Callable[[str], str]) -> None:
    """What reading an entry refuses says nothing to other problems either, if its lines show it."""
    entry = dataclasses.replace(entry_of(NEAR, quick=2.0, steady=3.0), key=Key(NEAR, "plan", 2, HERE.id))
    text = profile.dump_entry(entry)
    assert len(rows_of(text)) == 2
    assert rows_of(spoil(text)) == ()


def test_an_entry_that_somebody_wrote_otherwise_is_a_neighbour_like_any() -> None:
    entry = entry_of(NEAR, quick=2.0, steady=3.0)
    text = profile.dump_entry(entry)
    by_hand = text.replace("- {backend: steady", "# looked at\n  -   {backend:  steady").replace(
        "winner: quick", "winner: steady"
    )
    assert by_hand.count("steady") == 2
    assert sorted(rows_of(by_hand), key=str) == sorted(rows_of(text), key=str)


@pytest.mark.parametrize(
    "config", [Config(folded=True, m=4), Config(folded=False), Config(part=0.5, loop="rows"), Config(name="a, b")]
)
def test_a_neighbour_of_any_config_is_heard(config: Config) -> None:
    row = Result("quick", 1, config, 1.0, 0.0, 7, 1e-16, 0, estimate=1.0)
    assert rows_of(profile.dump_entry(Entry(Key(NEAR, "plan", 2, HERE.id), (row,)))) == (
        Row("quick", 1, config, 1.0, 1.0),
    )


# Choices ---------------------------------------------------------------------------------------------------------


def entry_of(problem: Problem, *, estimate: float = 1.0, version: int = 1, **seconds: float) -> Entry:
    rows = [
        Result(name, version, Config(), time, 0.0, 7, 1e-16, 0, estimate=estimate * (1.0 if name == "quick" else 2.0))
        for name, time in seconds.items()
    ]
    key = Key(problem, "plan", machine.usable_cores(), HERE.id)
    return Entry(key, tuple(sorted(rows, key=lambda row: row.median)))


def know(problem: Problem, **about: Any) -> Entry:
    """Write into the user's profile what two backends took, of which "quick" was estimated twice as fast."""
    entry = entry_of(problem, **about)
    profile_file.write(profile.user_path(), [entry], HERE)
    profile.forget()
    return entry


@pytest.fixture
def two() -> dict[str, Scripted]:
    """Two backends: by estimate "quick" takes 1 s, "steady" 2 s."""
    backends = {name: Scripted(name, FakeClock(), 1.0, expected=expected) for name, expected in
                (("quick", 1.0), ("steady", 2.0))}  # fmt: skip
    only(*backends.values())
    return backends


def chosen(problem: Problem = TARGET, deployment: str = "plan", forced: Any = None) -> tuple[str, str]:
    decision = dispatch.decide(problem, deployment, parse_forced(forced))
    return decision.candidate.backend.name, decision.evidence.detail


def test_a_near_problem_corrects_the_estimates_and_the_evidence_names_it(two: dict[str, Scripted]) -> None:
    assert chosen() == ("quick", "1 s predicted")
    know(NEAR, quick=6.0, steady=2.0)
    name, detail = chosen()
    assert name == "steady"
    assert f"s predicted (from 1 tuned neighbour, nearest {NEAR}, confidence 0." in detail
    assert sum(backend.calls + backend.prepared for backend in two.values()) == 0


def know_elsewhere(problem: Problem, there: Machine, **seconds: Any) -> None:
    """Write into the user's profile what two backends took on another machine."""
    entry = entry_of(problem, **seconds)
    elsewhere = dataclasses.replace(entry, key=dataclasses.replace(entry.key, machine=there.id))
    profile_file.write(profile.user_path(), [elsewhere], there)
    profile.forget()


def test_a_machine_much_like_this_one_has_a_say_too_but_a_smaller_one(two: dict[str, Scripted]) -> None:
    know_elsewhere(NEAR, dataclasses.replace(HERE, libraries=("numpy 1.99",)), quick=6.0, steady=2.0)
    name, detail = chosen()
    assert name == "steady"
    strange = float(detail.rpartition("confidence ")[2].rstrip(")"))
    know(NEAR, quick=6.0, steady=2.0)
    assert f"nearest {NEAR}" in chosen()[1]
    assert float(chosen()[1].rpartition("confidence ")[2].rstrip(")")) > strange


def test_what_was_measured_here_counts_where_both_were(two: dict[str, Scripted]) -> None:
    know(NEAR, quick=1.0, steady=2.0)
    know_elsewhere(NEAR, dataclasses.replace(HERE, libraries=("numpy 1.99",)), quick=6.0, steady=2.0)
    assert chosen()[0] == "quick"


def test_another_kind_of_machine_has_no_say(two: dict[str, Scripted]) -> None:
    know_elsewhere(NEAR, dataclasses.replace(HERE, cpu="Another (riscv)"), quick=6.0, steady=2.0)
    assert chosen() == ("quick", "1 s predicted")


@pytest.mark.parametrize("problem", [FAR, *OTHER_KINDS], ids=str)
def test_what_is_far_or_of_another_kind_has_no_say(two: dict[str, Scripted], problem: Problem) -> None:
    know(problem, quick=6.0, steady=2.0)
    assert chosen() == ("quick", "1 s predicted")
    assert chosen(problem)[0] == "steady"


@pytest.mark.parametrize(
    "about",
    [{"version": 2}, {"estimate": 0.5}],
    ids=["another version", "other estimates"],
)
def test_what_was_measured_of_other_code_has_no_say(two: dict[str, Scripted], about: dict[str, Any]) -> None:
    know(NEAR, quick=6.0, steady=2.0, **about)
    assert chosen() == ("quick", "1 s predicted")


def test_other_deployments_threads_and_machines_have_no_say(two: dict[str, Scripted]) -> None:
    entry = know(OTHER_KINDS[0], quick=6.0, steady=2.0)
    changes = ({"deployment": "call"}, {"threads": machine.usable_cores() + 1}, {"machine": "other-2c-00000000"})
    for change in changes:
        moved = dataclasses.replace(entry, key=dataclasses.replace(entry.key, problem=NEAR, **change))
        profile_file.write(profile.user_path(), [moved], HERE)
    profile.forget()
    assert chosen() == ("quick", "1 s predicted")
    assert chosen(deployment="call")[0] == "steady"


def test_what_this_process_remembers_counts_above_the_file(two: dict[str, Scripted]) -> None:
    know(NEAR, quick=1.0, steady=2.0)
    profile.remember(entry_of(NEAR, quick=6.0, steady=2.0))
    assert chosen()[0] == "steady"


def test_a_config_of_its_own_counts_more_than_its_backend(two: dict[str, Scripted]) -> None:
    class Tiled(Scripted):
        def estimate(self, problem: Problem, config: Config, machine: Any) -> float:
            return float(config.integer("tile"))

        def configs(self, problem: Problem, effort: Effort) -> tuple[Config, ...]:
            return tuple(Config(tile=tile) for tile in (4, 5, 6))

    only(Tiled("tiled", FakeClock()))
    rows = [
        Result("tiled", 1, Config(tile=tile), seconds, 0.0, 7, 1e-7, 0, estimate=float(tile))
        for tile, seconds in ((5, 3.0), (4, 14.0))
    ]
    entry = Entry(Key(NEAR, "plan", machine.usable_cores(), HERE.id), tuple(rows))
    profile_file.write(profile.user_path(), [entry], HERE)
    ranked = transfer.rank(TARGET, registry.available().values(), machine.usable_cores(), "plan").estimates
    assert [estimate.candidate.config["tile"] for estimate in ranked] == [5, 6, 4]


@given(seconds=st.floats(0.1, 10), count=st.integers(1, 4))
def test_confidence_is_a_share_and_the_nearer_the_larger(seconds: float, count: int) -> None:
    backend = Scripted("quick", FakeClock())

    def confidence(*distances: float, scatter: float = 0.0) -> float:
        place = place_of(TARGET.text)
        assert place is not None
        around = []
        for number, distance in enumerate(distances):
            row = Row("quick", 1, Config(), 1.0, seconds * math.exp(scatter * (-1) ** number))
            around.append(neighbours.Neighbour(TARGET.text, place, distance, (row,)))
        return transfer.Local(around, {"quick": backend}, transfer._Correctors(None, {}, "plan")).confidence

    assert 0 < confidence(*[1.0] * count) < confidence(*[0.5] * count) < confidence(*[0.0] * count) < 1
    assert confidence(*[0.5] * count) < confidence(*[0.5] * (count + 1))
    assert confidence(0.3, 0.3, scatter=0.5) < confidence(0.3, 0.3)


def test_a_call_that_packs_is_estimated_with_what_packing_costs_a_plan_is_not(two: dict[str, Scripted]) -> None:
    filters = calibration.sizes_of(TARGET).filters
    two["quick"].packing_cost, two["steady"].packing_cost = (5e-5, 1.0), (1e-5, 0.0)  # type: ignore[misc]

    def ranked(deployment: str) -> dict[str, float | None]:
        found = transfer.rank(TARGET, two.values(), 1, deployment).estimates
        return {each.candidate.backend.name: each.seconds for each in found}

    plans, calls = ranked("plan"), ranked("call")
    assert calls == {"quick": plans["quick"] + 5e-5 + filters, "steady": plans["steady"] + 1e-5}  # type: ignore[operator]
    assert next(iter(plans)) == "quick"
    assert next(iter(calls)) == "steady"


def test_neighbours_who_disagree_wildly_are_not_heard(two: dict[str, Scripted]) -> None:
    know(NEAR, quick=50.0, steady=0.01)
    know(NEXT, quick=0.01, steady=50.0)
    assert chosen() == ("quick", "1 s predicted")


def test_the_nearest_are_the_nearest(two: dict[str, Scripted]) -> None:
    for side in range(20, 60, 4):
        know(Problem.parse(f"1x{side}x{side}x64 * 3x3x64x64 SAME"), quick=6.0, steady=2.0)
    found = neighbours.neighbours(TARGET, "plan", machine.usable_cores(), profile.files())
    distances = [each.distance for each in found]
    assert len(found) == 3
    assert distances == sorted(distances)
    assert found[0].text == TARGET.text  # which was tuned too, and is nearest to itself
    by_pixels = sorted(range(20, 60, 4), key=lambda side: abs(math.log(side / 28)))[:3]
    assert {each.text.split("x")[1] for each in found} == {str(side) for side in by_pixels}


def test_a_forced_backend_gets_its_config_from_neighbours_too_and_explain_says_the_same(
    two: dict[str, Scripted],
) -> None:
    know(NEAR, quick=6.0, steady=2.0)
    assert chosen(forced="quick")[0] == "quick"
    found = explain_problem(TARGET)
    assert found.chosen == "steady"
    rows = {row.backend: row for row in found.rows}
    assert rows["quick"].estimate is not None
    assert rows["steady"].estimate is not None
    assert rows["steady"].estimate < rows["quick"].estimate
    assert f"nearest {NEAR}" in str(found.evidence)


def test_hand_written_and_broken_entries_are_no_neighbours_and_no_crash(two: dict[str, Scripted]) -> None:
    entry = know(NEAR, quick=6.0, steady=2.0)
    path = profile.user_path()
    path.write_text(path.read_text().replace("median_us: ", "median_us: about "))
    profile.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == ("quick", "1 s predicted")
    path.write_text(path.read_text().replace(str(entry.key), "what | is | this |" + entry.key.machine))
    profile.forget()
    assert chosen() == ("quick", "1 s predicted")


def test_calibration_and_neighbours_do_not_correct_the_same_error_twice(two: dict[str, Scripted]) -> None:
    own = calibration.Correction(1, (math.log(3.0), 0.0, 0.0, 0.0, 0.0))
    made = calibration.Calibration(HERE.id, "calibrate", 50, backends={"quick": own})
    profile_file.write(profile.user_path(), [entry_of(NEAR, quick=3.0, steady=2.0)], HERE, calibration.dump(made))
    ranked = transfer.rank(TARGET, two.values(), machine.usable_cores(), "plan")
    assert ranked.calibrated
    assert ranked.local is not None
    assert {e.candidate.backend.name: e.seconds for e in ranked.estimates} == {
        "steady": pytest.approx(2.0, rel=1e-3),
        "quick": pytest.approx(3.0, rel=1e-3),
    }


@pytest.mark.parametrize(
    "broken", ["threads: two", "threads: -1", "threads: 2.5", "threads: \u00b2", "a: [1]", "1: 2", "m"]
)
def test_a_config_broken_by_hand_says_nothing(broken: str) -> None:
    text = profile.dump_entry(know(NEAR, quick=2.0))
    assert "config: {}" in text
    by_hand = text.replace("config: {}", "config: {m: 4, threads: 2}").replace(
        "winner: quick", "winner: quick(m=4, threads=2)"
    )
    assert rows_of(by_hand)[0].config == Config(m=4, threads=2)
    assert rows_of(text.replace("config: {}", f"config: {{{broken}}}")) == ()


def test_a_folded_neighbour_is_heard_and_silences_nobody() -> None:
    """Its config holds a yes, which is neither the text "true" nor "True"."""
    folded, plain = Config(folded=True, m=4, threads=1), Config(m=4, threads=1)
    winograd = registry.get("winograd")
    stem = Problem.parse("1x64x64x3 * 7x7x3x64 SAME stride=2")
    for problem, config in ((stem, folded), (NEAR, plain)):
        estimate = Candidate(winograd, config).estimate(problem, HERE)
        assert estimate is not None
        row = Result("winograd", winograd.version, config, 2 * estimate, 0.0, 9, 1e-7, 0, estimate=estimate)
        text = profile.dump_entry(Entry(Key(problem, "plan", 2, HERE.id), (row,)))
        place = place_of(problem.text)
        assert place is not None
        around = neighbours.Neighbour(problem.text, place, 0.0, rows_of(text))
        offs = transfer._offs(around, {"winograd": winograd}, transfer._Correctors(None, {}, "plan"))
        ((heard, off),) = offs["winograd"]
        assert heard == config
        assert off == pytest.approx(math.log(2), rel=1e-2)
