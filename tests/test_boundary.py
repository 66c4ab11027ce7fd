"""Whatever somebody's backend says, tuning goes on, and reads again what it stores."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scripted import PROBLEM, FakeClock, Scripted, only, race_by

import convdispatch
from convdispatch import heuristic, machine, profile, profile_file, quarantine, registry, settings
from convdispatch.backend import Candidate, Config
from convdispatch.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    BackendUnavailableError,
    ConvDispatchWarning,
    RegistrationError,
)
from convdispatch.explain import explain_problem
from convdispatch.profile import Entry
from convdispatch.said import LARGEST
from convdispatch.tuning.tuner import TuneReport, tune

HERE = machine.current()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    race_by(monkeypatch, fake)
    return fake


def tuned(clock: FakeClock, path: Path, **says: Any) -> TuneReport:
    """Tune for a fast backend that says this, and an honest one, into a new file."""
    path.unlink(missing_ok=True)
    profile.forget()
    registry.restore()
    only(Scripted("honest", clock, 2.0), Scripted("odd", clock, 1.0, **says))
    with settings.options(profile=path):
        return tune(PROBLEM, threads=2, deployments=("plan",))


def stored(path: Path) -> list[Entry]:
    """Return what a file's entries say, none of which may be broken."""
    contents = profile_file.read(path)
    assert contents.broken() == {}
    assert quarantine.written(contents)[1] == {}
    return contents.entries()


# Configs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(8), 8), (np.uint8(8), 8), (np.float32(0.5), 0.5), (np.float64(0.5), 0.5), (np.True_, True),
        (np.str_("row"), "row"), (True, True), (8, 8), (0.5, 0.5), ("row", "row"),
    ],
)  # fmt: skip
def test_a_config_holds_plain_values(value: Any, plain: Any) -> None:
    config = Config(tile=value)
    assert config == Config(tile=plain)
    assert type(config["tile"]) is type(plain)


@pytest.mark.parametrize(
    "value", [None, [8], {}, 1j, math.nan, np.float32("nan"), LARGEST + 1, -(10**400), "\ud800", b"x"]
)
def test_a_config_refuses_what_no_profile_can_hold(value: Any) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match="tile"):
        Config(tile=value)


@pytest.mark.parametrize("key", [8, None, "\ud800"])
def test_a_configs_keys_are_texts(key: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="config must map names to plain values"):
        Config({key: 1})


def test_plain_mappings_among_configs_become_configs(clock: FakeClock, tmp_path: Path) -> None:
    tuned(clock, tmp_path / "p.yaml", tried=({"tile": np.int64(8)},))
    (entry,) = stored(tmp_path / "p.yaml")
    assert entry.winner.name == "odd(tile=8)"


@pytest.mark.parametrize("tried", [(Config(threads=8),), ({"tile": []},), (8,), None])
def test_a_backend_whose_configs_are_none_is_passed_over(tried: Any, clock: FakeClock, tmp_path: Path) -> None:
    with pytest.warns(ConvDispatchWarning, match="backend 'odd' is passed over"):
        report = tuned(clock, tmp_path / "p.yaml", tried=tried)
    assert report.complete
    (entry,) = stored(tmp_path / "p.yaml")
    assert entry.winner.backend == "honest"


def test_a_backend_may_name_configs_with_threads_that_are_there(clock: FakeClock, tmp_path: Path) -> None:
    tuned(clock, tmp_path / "p.yaml", tried=(Config(threads=2), {"threads": np.int64(1)}))
    (entry,) = stored(tmp_path / "p.yaml")
    assert {row.name for row in entry.results} == {"honest", "odd(threads=1)", "odd(threads=2)"}


# Workspaces and estimates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "plain"), [(np.int64(64), 64), (np.float32(64), 64), (63.5, 64), (0, 0)])
def test_a_workspace_is_a_plain_number_of_bytes(value: Any, plain: int, clock: FakeClock, tmp_path: Path) -> None:
    tuned(clock, tmp_path / "p.yaml", space=value)
    (entry,) = stored(tmp_path / "p.yaml")
    assert (entry.winner.backend, entry.winner.workspace) == ("odd", plain)
    assert type(Candidate(registry.get("odd"), Config()).workspace(PROBLEM)) is int


@pytest.mark.parametrize("value", [-5, math.nan, math.inf, None, "64", True, LARGEST + 1, 10**400])
def test_what_is_no_workspace_fails_its_candidate_alone(value: Any, clock: FakeClock, tmp_path: Path) -> None:
    tuned(clock, tmp_path / "p.yaml", space=value)
    (entry,) = stored(tmp_path / "p.yaml")
    assert entry.winner.backend == "honest"
    assert "backend 'odd' says that its workspace is" in entry.failures[0].reason


def test_calls_that_tune_go_on_without_it_too(clock: FakeClock) -> None:
    only(Scripted("honest", clock, 2.0), Scripted("odd", clock, 1.0, space=math.nan, version=np.int64(3)))
    x, w = np.ones(PROBLEM.input_shape, "f4"), np.ones(PROBLEM.filter_shape, "f4")
    with settings.options(tuning="on-miss"):
        assert convdispatch.conv2d(x, w).shape == PROBLEM.output_shape


@pytest.mark.parametrize("value", [-1.0, 0.0, -0.0, math.nan, math.inf, -math.inf, 1e300, 10**400, 5e-324])
def test_an_estimate_that_is_no_time_says_nothing(value: Any, clock: FakeClock, tmp_path: Path) -> None:
    assert Candidate(Scripted("odd", clock, expected=value), Config()).estimate(PROBLEM, HERE) is None
    tuned(clock, tmp_path / "p.yaml", expected=value)
    (entry,) = stored(tmp_path / "p.yaml")
    assert entry.winner.backend == "odd"
    assert entry.winner.estimate is None


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.array(0.5), 0.5])
def test_an_estimate_is_a_plain_number(value: Any, clock: FakeClock) -> None:
    found = Candidate(Scripted("odd", clock, expected=value), Config()).estimate(PROBLEM, HERE)
    assert type(found) is float
    assert found == pytest.approx(0.5)


@pytest.mark.parametrize("value", ["soon", [1.0], True, b"1"])
def test_an_estimate_that_is_no_number_is_an_error_of_the_backend(value: Any, clock: FakeClock, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="backend 'odd' estimates"):
        Candidate(Scripted("odd", clock, expected=value), Config()).estimate(PROBLEM, HERE)
    with pytest.warns(ConvDispatchWarning, match="has no estimate"):
        tuned(clock, tmp_path / "p.yaml", expected=value)
    assert len(stored(tmp_path / "p.yaml")) == 1


# Names, versions, reasons -------------------------------------------------------------------------------------------


def test_a_version_becomes_a_plain_number(clock: FakeClock, tmp_path: Path) -> None:
    tuned(clock, tmp_path / "p.yaml", version=np.int64(3))
    assert type(registry.get("odd").version) is int
    (entry,) = stored(tmp_path / "p.yaml")
    assert entry.winner.version == 3


@pytest.mark.parametrize("version", ["1.2", None, 1.5, math.nan, True, 10**400])
def test_what_is_no_version_is_refused_when_registered(version: Any, clock: FakeClock) -> None:
    with pytest.raises(RegistrationError, match="backend 'odd' must have a whole number as version; got"):
        registry.register(Scripted("odd", clock, version=version))
    assert "odd" not in registry.names()


def test_an_installed_backend_without_a_version_is_unavailable(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = Scripted("odd", clock, version="1.2")
    monkeypatch.setitem(registry._registry.found, "odd", lambda: offered)
    with pytest.raises(BackendUnavailableError, match="must have a whole number as version"):
        registry.get("odd")
    registry._registry.failed.pop("odd", None)


@pytest.mark.parametrize("reason", [True, 1, np.True_, ("too", "large")])
def test_a_reason_in_no_words_is_one(reason: Any, clock: FakeClock) -> None:
    only(Scripted("honest", clock), Scripted("odd", clock, reason=reason))
    (row,) = [row for row in explain_problem(PROBLEM).rows if row.backend == "odd"]
    assert row.reason.startswith("it gives no reason but ")


@pytest.mark.parametrize("reason", [False, "", 0, None])
def test_what_is_no_reason_rejects_nothing(reason: Any, clock: FakeClock) -> None:
    backend = Scripted("odd", clock, reason=reason)
    assert heuristic.refusal(backend, PROBLEM) is None


# All of it ----------------------------------------------------------------------------------------------------------

_numbers = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from((np.int64(7), np.float32(0.25), np.float64("nan"), 10**400, "64", [1])),
)
_values = st.one_of(_numbers, st.text(max_size=8))
_configs = st.lists(
    st.dictionaries(st.one_of(st.text(max_size=6), st.just("threads")), _values, max_size=3), max_size=3
)


@given(expected=_numbers, space=_numbers, tried=_configs, said=st.text(max_size=20), raises=st.booleans())
@example(expected=-1.0, space=-5, tried=[{"threads": 8}], said="", raises=False)
@example(expected=1.0, space=0, tried=[{"a": "b, c: {d}"}, {"a": "true"}], said="\x1b\0\ud800\nx", raises=True)
@example(expected=np.float64(1), space=np.int64(1), tried=[{"é #": "- '"}], said="", raises=False)
@pytest.mark.filterwarnings("ignore::convdispatch.errors.ConvDispatchWarning")
def test_whatever_a_backend_says_what_tune_stores_is_read_back(
    clock: FakeClock, tmp_path: Path, expected: Any, space: Any, tried: Any, said: str, raises: bool
) -> None:
    path = tmp_path / "p.yaml"
    fails = {"fails_in": lambda where, call: where == "call", "error": lambda: ValueError(said)} if raises else {}
    report = tuned(clock, path, expected=expected, space=space, tried=tried, **fails)
    assert report.complete
    (entry,) = stored(path)
    assert report.layers[0].entry is not None
    assert entry.winner == pytest.approx(report.layers[0].entry.winner) or (
        entry.winner.name == report.layers[0].entry.winner.name
    )
    assert [failure.reason for failure in entry.failures] == [f.reason for f in report.layers[0].entry.failures]
