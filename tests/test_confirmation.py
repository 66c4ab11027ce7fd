"""A winner is asked again: it stays unless somebody beats it twice, and nothing else of the entry changes."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from scripted import PROBLEM, RULES, FakeClock, Scripted, only, race_by

from convdispatch import machine, profile, registry
from convdispatch.backend import Candidate
from convdispatch.profile import Entry, Key, Result
from convdispatch.tuning.confirmation import confirmed, contested
from convdispatch.tuning.problem_race import tune_problem
from convdispatch.tuning.rematch import still_there
from convdispatch.tuning.tuner import tune


def entry_of(clock: FakeClock, **seconds: float) -> Entry:
    only(*(Scripted(name, clock, taken) for name, taken in seconds.items()))
    return tune_problem(Key(PROBLEM, "plan", 1, machine.current().id), clock=clock, rules=RULES).entry


def rows(entry: Entry, *names: str) -> list[Result]:
    return [next(row for row in entry.results if row.backend == name) for name in names]


def names(candidates: Sequence[Candidate]) -> list[str]:
    return [candidate.backend.name for candidate in candidates]


def test_who_came_close_is_asked_and_few_of_them() -> None:
    entry = entry_of(FakeClock(), a=1.0, b=1.02, c=1.09, d=1.15)
    assert names(contested(entry)) == ["a", "b", "c"]
    many = entry_of(FakeClock(), a=1.0, **{f"b{number}": 1.02 + number / 100 for number in range(7)})
    assert names(contested(many)) == ["a", "b0", "b1", "b2"]


def test_who_would_be_used_without_tuning_is_asked_wherever_it_came() -> None:
    entry = entry_of(FakeClock(), a=1.0, b=1.05, c=3.0, d=3.0)
    there = {candidate.backend.name: candidate for candidate in still_there(entry)}
    assert names(contested(entry, [there["c"]])) == ["a", "b", "c"]
    assert names(contested(entry, [there["a"], there["b"]])) == ["a", "b"]
    assert names(contested(entry, [there["c"]], {"a", "b"})) == ["a", "b"]
    assert names(contested(entry, [there["c"]], {"a", "c", "d"})) == ["a", "c"]
    assert contested(entry, [there["c"]], {"b", "c"}) == []
    registry.unregister("c")
    assert names(contested(entry, [there["c"]])) == ["a", "b"]


def test_nobody_is_asked_where_the_winner_is_alone_or_gone_or_others_are_as_fast() -> None:
    assert contested(entry_of(FakeClock(), a=1.0, b=1.2)) == []
    assert contested(entry_of(FakeClock(), a=1.0, b=1.005)) == []
    entry = entry_of(FakeClock(), a=1.0, b=1.05, c=1.05)
    registry.unregister("a")
    assert contested(entry) == []


@pytest.mark.parametrize("answers", [["a"], ["b", "a"], ["b", ""], [""]])
def test_a_winner_stays_unless_the_same_one_beats_it_twice(answers: list[str]) -> None:
    entry, left = entry_of(FakeClock(), a=1.0, b=1.05, c=1.05), iter(answers)

    def again(_: Sequence[Candidate]) -> list[Result]:
        first = next(left)
        return rows(entry, first, *sorted({"a", "b"} - {first})) if first else []

    assert confirmed(entry, contested(entry), again) is entry
    assert next(left, None) is None


def test_who_beats_it_twice_takes_over_with_new_times_and_the_others_keep_theirs() -> None:
    entry, asked = entry_of(FakeClock(), a=1.0, b=1.05, c=1.08, d=2.0), []

    def again(candidates: Sequence[Candidate]) -> list[Result]:
        asked.append(names(candidates))
        times = {"b": 0.5, "a": 0.75, "c": 3.0}
        from_entry = {row.backend: row for row in entry.results}
        found = [from_entry[name] for name in names(candidates)]
        return sorted((changed(row, times[row.backend]) for row in found), key=lambda row: row.median)

    found = confirmed(entry, contested(entry), again)
    assert asked == [["a", "b", "c"], ["a", "b"]]
    assert {row.backend: row.median for row in found.results} == pytest.approx(
        {"b": 0.5, "a": 0.75, "c": 1.08, "d": 2.0}
    )
    assert found.winner.backend == "b"
    assert [row.backend for row in found.results[1:]] == ["a", "c", "d"]
    assert found.key == entry.key


def changed(row: Result, seconds: float) -> Result:
    return replace(row, median=seconds)


def test_a_moment_that_favoured_somebody_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first problem races, the better one is slowed down; when the winner is asked again it is not."""
    clock = FakeClock()
    better = Scripted("better", clock, lambda _: 1.05 if clock.now < 100 else 0.9)
    only(Scripted("worse", clock, 1.0, expected=1.0), better)
    better.expected = 1.1
    race_by(monkeypatch, clock)
    waits: list[str] = []

    def wait(said: str) -> None:
        waits.append(said)
        clock.now = max(clock.now, 100.0)

    report = tune([PROBLEM], deployments=["plan"], threads=1, on_wait=wait)
    assert clock.now > 100
    assert waits == ["racing 1 winner once more against who came close"]
    entry = report.layers[0].entry
    assert entry is not None
    assert entry.winner.backend == "better"
    assert entry.winner.median == pytest.approx(0.9)
    profile.forget()
    stored = next(iter(profile.find_in(report.profile, entry.key)))
    assert stored.entry.winner.backend == "better"


def test_a_backend_that_fails_when_it_is_asked_again_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    better = Scripted("better", clock, 0.9, expected=1.1)
    only(Scripted("worse", clock, 1.0, expected=1.0), better)
    race_by(monkeypatch, clock)
    again: list[str] = []
    better.fails_in = lambda where, _: where == "prepare" and bool(again)
    report = tune([PROBLEM], deployments=["plan"], threads=1, on_wait=again.append)
    assert again
    entry = report.layers[0].entry
    assert entry is not None
    assert entry.winner.backend == "better"
