"""Calibration: the fit against scripted truths, its text, and what it does to choices. No real time is measured."""

import dataclasses
import math
import random
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import PROBLEM, RULES, FakeClock, Scripted, only

from convdispatch import calibration, dispatch, machine, profile, profile_file, settings
from convdispatch.backend import Config
from convdispatch.calibration import TERMS, Calibration, Correction, Sizes, corrector, features, sizes_of
from convdispatch.errors import BackendError, ProfileError, ProfileWarning
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Key, Result
from convdispatch.tuning import calibrate, tuner
from convdispatch.tuning.fit import FEWEST_TIMINGS, Timing, fit, timings_of

HERE = machine.current()
SMALL = [
    Problem.parse(f"1x{side}x{side}x2 * {kernel}x{kernel}x2x3 SAME") for side in (4, 5, 6, 7, 8, 9) for kernel in (1, 3)
]


def timings(truth: Calibration, *, noise: float = 0.0, wild: float = 0.0, seed: int = 0) -> list[Timing]:
    """Draw measurements that come out as a calibration has it, but for noise and a share of wild ones."""
    draw = random.Random(seed)
    found = []
    for name, own in truth.backends.items():
        for config in own.configs or ("",):
            for _ in range(60):
                sizes = Sizes(int(10 ** draw.uniform(2, 8)), int(10 ** draw.uniform(3, 8)))
                estimate, threads = 10 ** draw.uniform(-5.5, -1), draw.choice((1, 2))
                seconds = corrector(truth, sizes, HERE, None)(name, own.version, config, threads, estimate)
                seconds *= math.exp(draw.gauss(0, noise)) * (draw.choice((5.0, 20.0)) if draw.random() < wild else 1.0)
                found.append(Timing(name, own.version, config, threads, sizes, estimate, seconds))
    return found


TRUTH = Calibration(
    HERE.id, "calibrate", 1, (0.7, 0.1, 0.0, 0.0, 0.0),
    {
        "near": Correction(1, (0.0, 0.0, 0.0, 0.0, 0.0)),
        "slow": Correction(2, (0.6, 0.3, 0.1, 0.0, 0.15)),
        "quick": Correction(1, (-0.8, -0.1, 0.3, 0.2, 0.0), {"m=2": 0.2, "m=4": -0.2}),
    },
)  # fmt: skip


# The fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "wild", "off"), [(0.0, 0.0, 0.06), (0.1, 0.0, 0.12), (0.1, 0.1, 0.17)])
def test_the_fit_finds_what_is_wrong_through_noise_and_wild_measurements(noise: float, wild: float, off: float) -> None:
    found = fit(timings(TRUTH, noise=noise, wild=wild), HERE, "calibrate")
    for timing in timings(TRUTH, seed=1):
        correct = corrector(found, timing.sizes, HERE, None)
        about = timing.backend, timing.version, timing.config, timing.threads, timing.estimate
        assert timing.seconds
        assert abs(math.log(correct(*about) / timing.seconds)) < 2 * off, about
    assert found.measurements == 240
    for own in found.backends.values():
        assert own.after < math.exp(noise + 0.05)
    assert found.backends["slow"].before > 2.0


def test_where_nothing_is_wrong_nothing_is_corrected() -> None:
    right = [dataclasses.replace(timing, seconds=timing.estimate) for timing in timings(TRUTH)]
    found = fit(right, HERE, "calibrate")
    for own in found.backends.values():
        assert own.terms == pytest.approx((0.0,) * len(TERMS), abs=1e-6)
        assert own.before == own.after == pytest.approx(1.0)


def test_a_backend_that_was_not_measured_is_as_much_slower_as_all_the_others() -> None:
    twice = [dataclasses.replace(timing, seconds=2 * timing.estimate) for timing in timings(TRUTH)]
    correct = corrector(fit(twice, HERE, "tune"), Sizes(100, 1000), HERE, None)
    assert correct("unheard", 1, "", 1, 1e-2) == pytest.approx(2e-2, rel=0.05)


def test_few_measurements_move_an_estimate_less_than_many() -> None:
    few = [Timing("one", 1, "", 1, Sizes(100, 1000), 1e-3, 4e-3)]
    parts = [fit(few * count, HERE, "tune") for count in (1, 20)]
    once, often = (corrector(part, Sizes(100, 1000), HERE, None)("one", 1, "", 1, 1e-3) for part in parts)
    assert 1e-3 < once < often <= 4e-3


def test_packing_is_a_line_through_what_was_measured_and_only_calls_pay_for_it() -> None:
    sizes = [Sizes(size, 1000) for size in (100, 10_000, 1_000_000, 30_000_000)]
    rows = [Timing("packs", 1, "m=4", 1, s, 1e-3, 1e-3, packing=5e-6 + 2e-9 * s.filters) for s in sizes]
    found = fit(rows, HERE, "calibrate")
    assert found.backends["packs"].packing == {
        "": pytest.approx((5e-6, 2e-9), rel=1e-6),
        "m=4": pytest.approx((5e-6, 2e-9), rel=1e-6),
    }
    plan, call = (
        corrector(found, sizes[2], HERE, packing)("packs", 1, "m=6", 1, 1e-3) for packing in (None, {"packs": (9, 9)})
    )
    assert call - plan == pytest.approx(5e-6 + 2e-3)


@given(
    sizes=st.tuples(st.integers(0, 10**10), st.integers(0, 10**10)).map(lambda pair: Sizes(*pair)),
    threads=st.integers(1, 64),
    estimate=st.floats(1e-8, 100),
)
def test_a_correction_is_its_terms_times_the_features_within_ten_times(
    sizes: Sizes, threads: int, estimate: float
) -> None:
    own = TRUTH.backends["quick"]
    sums = [a + b for a, b in zip(TRUTH.common, own.terms, strict=True)]
    logarithm = sum(a * b for a, b in zip(sums, features(sizes, threads, estimate, HERE), strict=True))
    logarithm = max(-math.log(10), min(math.log(10), logarithm + own.configs["m=2"]))
    found = corrector(TRUTH, sizes, HERE, None)("quick", 1, "m=2", threads, estimate)
    assert found == pytest.approx(estimate * math.exp(logarithm))


def test_the_correction_of_another_version_is_not_used() -> None:
    correct = corrector(TRUTH, Sizes(100, 1000), HERE, None)
    assert correct("slow", 1, "", 1, 1.0) == correct("unheard", 1, "", 1, 1.0) != correct("slow", 2, "", 1, 1.0)


# The text --------------------------------------------------------------------------------------------------------

_numbers = st.floats(-5, 5).map(lambda x: float(f"{x:.4g}"))
_terms = st.tuples(*[_numbers] * len(TERMS))
_configs = st.sampled_from(["", "m=4", "tile=6x2", "a=1, b=x", "on=True"])
_corrections = st.builds(
    Correction,
    st.integers(1, 9),
    _terms,
    st.dictionaries(_configs, _numbers, max_size=3),
    st.dictionaries(_configs, st.tuples(_numbers.map(abs), _numbers.map(abs)), max_size=3),
    _numbers.map(abs),
    _numbers.map(abs),
)


@given(common=_terms, backends=st.dictionaries(st.sampled_from(["fft", "a.b-c", "true", "x_1"]), _corrections))
def test_its_text_reads_back_the_same(common: tuple[float, ...], backends: dict[str, Correction]) -> None:
    whole = Calibration(HERE.id, "tune", 7, common, backends)
    ((key, text),) = calibration.dump(whole).items()
    assert key == f"calibration {HERE.id}"
    assert calibration.parse(HERE.id, text) == whole


def keep(text: Calibration | str, path: Path | None = None) -> None:
    more = {f"calibration {HERE.id}": text} if isinstance(text, str) else calibration.dump(text)
    profile_file.write(path or profile.user_path(), (), HERE, more)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("source: calibrate", "source: hearsay"),
        lambda text: text.replace("threads: 0.1", "threads: .nan"),
        lambda text: text.replace("common:", "uncommon:"),
        lambda text: text.replace("backends:", "backends: 3"),
        lambda text: text[: len(text) // 2],
    ],
)
def test_a_broken_one_is_a_warning_and_not_there(spoil: object) -> None:
    ((_, text),) = calibration.dump(TRUTH).items()
    assert callable(spoil)
    keep(spoil(text))
    with pytest.warns(ProfileWarning, match=f"calibration {HERE.id} is ignored"):
        assert calibration.current() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibration.current() is None  # said once


def test_it_is_no_entry_and_writing_entries_keeps_it() -> None:
    keep(TRUTH)
    result = Result("quick", 1, Config(), 1.0, 0.0, 7, 1e-7, 0)
    profile_file.write(profile.user_path(), [Entry(Key(PROBLEM, "plan", 1, HERE.id), (result,))], HERE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(profile_file.read(profile.user_path()).entries()) == 1
        assert calibration.current() == TRUTH


def test_the_first_layer_that_has_one_is_in_force(tmp_path: Path) -> None:
    assert calibration.current() is None
    keep(TRUTH)
    assert calibration.current() == TRUTH
    own = dataclasses.replace(TRUTH, measurements=9)
    with settings.options(profile=tmp_path / "project.yaml"):
        assert calibration.current() == TRUTH
        keep(own, tmp_path / "project.yaml")
        assert calibration.current() == own
    elsewhere = dataclasses.replace(TRUTH, machine="other-8c-00000000")
    profile_file.write(tmp_path / "foreign.yaml", (), HERE, calibration.dump(elsewhere))
    assert calibration.current([profile_file.read(tmp_path / "foreign.yaml")]) is None


# Measured --------------------------------------------------------------------------------------------------------


def chosen(deployment: str = "plan") -> tuple[str, str]:
    decision = dispatch.decide(PROBLEM, deployment)
    return decision.candidate.backend.name, decision.evidence.detail


def calibrated(
    *backends: Scripted, clock: FakeClock, problems: Sequence[Problem] = SMALL
) -> calibrate.CalibrationReport:
    only(*backends)
    return calibrate.calibrate(problems=problems, clock=clock, rules=RULES)


def test_calibrating_puts_the_estimates_right_and_the_choice_with_them() -> None:
    clock = FakeClock()
    boasts, modest = Scripted("boasts", clock, 3.0, expected=1.0), Scripted("modest", clock, 1.5, expected=2.0)
    only(boasts, modest)
    assert chosen() == ("boasts", "1 s predicted")
    done = calibrated(boasts, modest, clock=clock)
    assert done.problems == len(SMALL)
    assert done.failures == ()
    assert done.calibration.backends["boasts"].before == pytest.approx(3.0)
    assert done.calibration.backends["boasts"].after == pytest.approx(1.0, abs=0.04)
    assert calibration.current() is not None
    name, detail = chosen()
    assert name == "modest"
    predicted, _, basis = detail.partition(" s predicted ")
    assert float(predicted) == pytest.approx(1.5, rel=0.05)
    assert basis == "(calibrated)"


def test_a_call_is_chosen_with_its_packing_and_a_plan_without() -> None:
    clock = FakeClock()
    packs, simple = Scripted("packs", clock, 1.0, packing=3.0), Scripted("simple", clock, 2.0, expected=2.0)
    calibrated(packs, simple, clock=clock)
    assert chosen("plan")[0] == "packs"
    assert chosen("call")[0] == "simple"


def test_a_backend_that_raises_is_reported_and_the_others_go_on() -> None:
    clock = FakeClock()
    fails = Scripted("fails", clock, fails_in=lambda where, call: where == "call")
    broken = Scripted("broken", clock, fails_in=lambda where, call: where == "prepare")
    done = calibrated(fails, broken, Scripted("works", clock), clock=clock)
    assert set(done.calibration.backends) == {"works"}
    assert {text.split(":")[0] for text in done.failures} == {"fails", "broken"}
    with pytest.raises(BackendError, match="nothing could be measured"):
        calibrated(broken, clock=clock)


def test_nothing_is_measured_where_the_result_could_not_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    works = Scripted("works", FakeClock())
    with settings.options(profile=tmp_path / "file" / "profile.yaml"), pytest.raises(ProfileError):
        calibrated(works, clock=works.clock)
    assert works.calls == 0


# From tuning -----------------------------------------------------------------------------------------------------


def entries(
    seconds: float = 2.0, count: int = FEWEST_TIMINGS, deployment: str = "plan", **about: object
) -> list[Entry]:
    found = []
    for number in range(count):
        problem = Problem.parse(f"1x{number + 4}x5x2 * 3x3x2x3 SAME")
        row = Result("known", 1, Config(), seconds, 0.0, 7, 1e-7, 0, estimate=1.0)
        found.append(Entry(Key(problem, deployment, 1, HERE.id), (row,), **about))  # type: ignore[arg-type]
    return found


def test_tuning_calibrates_for_nothing() -> None:
    clock = FakeClock()
    only(Scripted("known", clock, 2.0, tried=tuple(Config(tile=n) for n in range(4))), Scripted("other", clock, 3.0))
    tuner.tune(SMALL, deployments=("plan",), threads=1)
    found = calibration.current()
    assert found is not None
    assert found.source == "tune"
    assert found.measurements == 5 * len(SMALL)


def test_what_tuning_learns_replaces_only_what_was_learnt_from_less() -> None:
    only(Scripted("known", FakeClock()))
    path = profile.user_path()
    assert calibrate.learn(entries(count=FEWEST_TIMINGS - 1), path) is None
    first = calibrate.learn(entries(), path)
    assert first is not None
    assert first.backends["known"].before == pytest.approx(2.0)
    assert calibrate.learn(entries(), path) is None
    more = calibrate.learn(entries(count=FEWEST_TIMINGS + 5), path)
    assert more is not None
    assert (now := calibration.current()) is not None
    assert now.measurements == more.measurements == FEWEST_TIMINGS + 5
    keep(dataclasses.replace(TRUTH, measurements=1))
    assert calibrate.learn(entries(count=FEWEST_TIMINGS + 9), path) is None
    assert calibration.current() == dataclasses.replace(TRUTH, measurements=1)


def test_doubtful_and_outdated_measurements_and_those_without_estimate_teach_nothing() -> None:
    assert timings_of(entries(count=2), {"known": 1})
    assert timings_of(entries(count=2), {"known": 2}) == []
    assert timings_of(entries(count=2, flags=("busy",)), {"known": 1}) == []
    (entry,) = entries(count=1)
    bare = dataclasses.replace(entry, results=(dataclasses.replace(entry.winner, estimate=None),))
    assert timings_of([bare], {"known": 1}) == []


def test_what_a_call_takes_longer_than_a_plan_is_its_packing() -> None:
    both = entries(2.0, 1) + entries(2.5, 1, "call")
    (timing,) = timings_of(both, {"known": 1})
    assert timing.seconds == 2.0
    assert timing.packing == pytest.approx(0.5)
    assert timing.sizes == sizes_of(both[0].key.problem)
