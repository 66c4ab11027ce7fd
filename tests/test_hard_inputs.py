"""Errors on hard inputs: every backend keeps its bound there, and who does not is found out."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from quiet import QuietWatch
from scripted import RULES, FakeClock, Scripted, only
from strategies import problems

from convdispatch import dispatch, heuristic, machine, profile, reference, registry, settings
from convdispatch.arguments import Array
from convdispatch.backend import Candidate, Config, Numerics
from convdispatch.errors import ConvDispatchError
from convdispatch.problem import Problem, dtype_of
from convdispatch.profile import Entry, Key
from convdispatch.reference import Oracle
from convdispatch.tuning import busy, hard_inputs
from convdispatch.tuning.problem_race import tune_problem

pytestmark = pytest.mark.usefixtures("few_kernels")

PROBLEM = Problem.parse("1x9x8x6 * 3x3x6x8 SAME")
TINY = float(np.finfo(np.float32).tiny)
VARIED = [
    "2x13x17x5 * 3x3x5x6 SAME",
    "1x12x11x7 * 3x3x7x9 SAME stride=2 +bias +residual +relu",
    "1x3x24x24 NCHW * 7x7x3x8 SAME stride=2 +bias +gelu",
    "2x10x19x9 * 3x3x1x9 SAME",
    "1x8x9x7 * 1x1x7x10 VALID",
    "1x9x20x8 * 3x3x8x17 SAME float16 +bias",
]
FLOAT64 = "1x9x9x6 * 5x5x6x5 SAME dilation=2 float64"
SEPARABLE = ["1x40x40x1 * 9x9x1x5 SAME separable +bias +relu", "1x40x40x3 * 9x9x1x3 SAME separable"]


def verdict(problem: Problem, backend: Scripted, config: Config | None = None) -> reference.Verdict:
    only(backend)
    found = hard_inputs.measure(problem, Candidate(backend, config or Config()))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *itertools.product(registry.names(), VARIED),
        *(("separable", text) for text in SEPARABLE),
        *(pytest.param(name, FLOAT64, marks=pytest.mark.slow) for name in registry.names()),
    ],
)
def test_every_backend_keeps_its_bound_and_its_class(name: str, text: str) -> None:
    problem = Problem.parse(text)
    backend = registry.get(name)
    with settings.options(accuracy="fast") as options:
        if name not in heuristic.usable(problem, options)[0]:
            pytest.skip("rejects it")
    local = backend.numerics.kind == "local"
    with settings.options(accuracy="strict" if local else "standard") as options:
        candidates = heuristic.candidates_of(backend, problem, 1, "measure")
        # Tiles change no sum: one candidate of each bound will do.
        bounds = {backend.numerics.growth(problem, each.config): each for each in reversed(candidates)}
        for candidate in bounds.values():
            found = hard_inputs.measure(problem, candidate)
            assert found is not None
            assert found.reason is None, candidate.name
            assert found.excess <= 1
            assert heuristic.accurate_by_measure(backend, problem, found.error, options), (candidate.name, found)


def test_a_sum_may_begin_with_its_bias() -> None:
    """Where products are tiny beside bias and residual, which cancel, it is rounded with every product."""
    problem = Problem.parse("1x56x56x144 * 1x1x144x24 VALID +bias +residual")
    for name in ("implicit_gemm", "direct"):
        candidate = heuristic.candidates_of(registry.get(name), problem, 1, "measure")[0]
        found = hard_inputs.measure(problem, candidate)
        assert found is not None
        assert found.reason is None, name


def test_who_is_only_normwise_right_is_no_local_backend() -> None:
    class Normwise(Scripted):
        """Off by a little of its filter's largest output, everywhere: as transforms are."""

        def store(self, problem: Problem, input: Array, filters: Array, out: Array) -> None:
            sums = reference.convolve(problem, input, filters)
            out[...] = sums + 2.0**-23 * np.abs(sums).max(axis=(1, 2), keepdims=True)

    found = verdict(PROBLEM, Normwise("mine", FakeClock()))
    assert found.reason is not None
    assert found.reason.startswith("on wide range input, error")
    assert "must declare numerics of the kind 'transform'" in found.reason
    honest = verdict(PROBLEM, Normwise("mine", FakeClock(), numerics=Numerics("transform")))
    assert honest.reason is None
    assert honest.error == pytest.approx(2.0**-23, rel=1.0)


class Half(Scripted):
    """Sums in float16, where random numbers fit and uneven ones do not."""

    def store(self, problem: Problem, input: Array, filters: Array, out: Array) -> None:
        with np.errstate(all="ignore"):
            out[...] = reference.convolve(problem, input.astype(np.float16).astype(np.float64), filters)


def test_a_narrower_range_of_numbers_is_found_out() -> None:
    assert verdict(PROBLEM, Half("half", FakeClock())).reason == (
        "on wide range input, results that are not finite from finite input"
    )


def test_who_flushes_denormal_numbers_is_right_and_who_stumbles_over_them_is_not() -> None:
    class Flushes(Scripted):
        def store(self, problem: Problem, input: Array, filters: Array, out: Array) -> None:
            x = np.where(np.abs(input) < TINY, 0, input)
            sums = reference.convolve(problem, x, filters)
            out[...] = np.where(np.abs(sums) < TINY, 0, sums)

    class Stumbles(Scripted):
        def store(self, problem: Problem, input: Array, filters: Array, out: Array) -> None:
            denormal = (np.abs(input) < TINY) & (input != 0)
            out[...] = reference.convolve(problem, np.where(denormal, 1e-20, input), filters)

    flushes = verdict(PROBLEM, Flushes("flushes", FakeClock()))
    assert flushes.reason is None
    assert flushes.error < 1e-6
    assert str(verdict(PROBLEM, Stumbles("stumbles", FakeClock())).reason).startswith("on denormal input")


@pytest.mark.parametrize("text", ["1x6x6x2 * 3x3x2x3 SAME int8", "0x6x6x2 * 3x3x2x3 SAME", "1x6x6x0 * 3x3x0x3 SAME"])
def test_integers_and_empty_sums_have_no_hard_inputs(text: str) -> None:
    assert hard_inputs.measure(Problem.parse(text), Candidate(Scripted("a", FakeClock()), Config())) is None


def test_thread_counts_of_a_config_share_their_result_and_configs_do_not() -> None:
    only(backend := Scripted("a", FakeClock(), parallel=True))
    for threads in (1, 2, 4):
        hard_inputs.measure(PROBLEM, Candidate(backend, Config(tile=1, threads=threads)))
    assert backend.prepared == 1
    hard_inputs.measure(PROBLEM, Candidate(backend, Config(tile=2, threads=1)))
    assert backend.prepared == 2
    assert backend.calls == 2 * len(hard_inputs.IMAGES)


def test_a_backend_that_rejects_the_smaller_problem_is_tried_on_the_whole() -> None:
    whole = Problem.parse("2x90x90x3 * 3x3x3x4 SAME")

    class Choosy(Scripted):
        def rejects(self, problem: Problem) -> str | None:
            return None if problem.h == 90 else "only 90 rows"

    assert verdict(whole, Choosy("choosy", FakeClock())).reason is None


@given(problems())
def test_what_is_cut_down_still_sums_the_same(problem: Problem) -> None:
    small = hard_inputs.reduced(problem)
    kept = ("c", "kh", "kw", "pads", "strides", "dilations", "groups", "dtype", "data_format", "epilogue")
    assert all(getattr(small, name) == getattr(problem, name) for name in kept)
    assert small.n == 1
    assert (small.h, small.w, small.k) <= (problem.h, problem.w, problem.k)
    assert (small.oh, small.ow) == (min(small.oh, 32), min(small.ow, 32))
    assert hard_inputs.reduced(small) == small or small.k < problem.k


@pytest.mark.parametrize("text", ["1x900x900x64 * 3x3x64x512 SAME", "1x7x7x2048 * 1x1x2048x512 VALID",
                                  "1x56x56x512 * 3x3x1x512 SAME groups=512"])  # fmt: skip
def test_hard_inputs_of_large_problems_are_small(text: str) -> None:
    small = hard_inputs.reduced(Problem.parse(text))
    assert small.oh * small.ow * small.k * small.taps < 4e7


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
def test_every_image_meets_every_kind_of_filters(dtype: str, k: int) -> None:
    problem = Problem.parse(f"1x8x8x6 * 3x3x6x{k} SAME {'' if dtype == 'float32' else dtype}".strip())
    trials = hard_inputs._trials(problem)
    filters = np.concatenate([trial.filters for trial in trials], axis=3).astype(np.float64)
    assert filters.shape[3] >= 4
    sums = np.abs(filters.sum(axis=(0, 1, 2))) / np.abs(filters).sum(axis=(0, 1, 2))
    assert sums.min() < 1e-3  # cancelling
    assert np.isclose(sums.max(), 1)  # one-sided
    assert (np.abs(filters).max(axis=(0, 1, 2)) / np.median(np.abs(filters), axis=(0, 1, 2))).max() > 50  # uneven
    for trial in trials:
        wide, one_sided, cancelling, denormal = (image.astype(np.float64) for image in trial.images)
        assert np.abs(wide).max() / np.median(np.abs(wide)) > 1e2
        assert one_sided.max() / one_sided.min() <= 2
        assert np.ptp(cancelling) < 0.05 * cancelling.max()
        if dtype != "float16":
            assert 0 < np.abs(denormal).max() < 8 * np.finfo(dtype).tiny
        assert all(image.dtype == dtype_of(dtype) for image in trial.images)


def test_an_error_over_terms_does_not_blow_up_where_they_cancel() -> None:
    x = np.ones((1, 6, 6, 4))
    w = np.tile(np.array([1.0, -1.0]), 18).reshape(3, 3, 4, 1)
    problem = Problem.parse("1x6x6x4 * 3x3x4x1 VALID")
    oracle = Oracle(problem, x.astype("f4"), w.astype("f4"))
    off = np.full((1, 4, 4, 1), 36e-6)
    assert oracle.error_of_terms(off) == pytest.approx(1e-6)
    assert oracle.judge(Numerics("transform"), Config(), off).error > 1
    assert oracle.error_of_terms(np.full((1, 4, 4, 1), np.nan)) == np.inf


# Through the tuner, to dispatch -------------------------------------------------------------------------------------


class OneSidedTrouble(Scripted):
    """Exact, but for images without a sign: there it is off by a part of the largest sum."""

    def store(self, problem: Problem, input: Array, filters: Array, out: Array) -> None:
        sums = reference.convolve(problem, input, filters)
        terms = reference.convolve(problem, np.abs(input), np.abs(filters)).max(axis=(1, 2), keepdims=True)
        out[...] = sums + (5e-4 * terms if (input > 0.4).all() else 0.0)


def entry_of(clock: FakeClock) -> Entry:
    key = Key(PROBLEM, "plan", 1, machine.current().id)
    return tune_problem(key, clock=clock, rules=RULES).entry


@pytest.mark.parametrize(
    ("accuracy", "chosen"),
    [("fast", "quick"), (1e-3, "quick"), ("standard", "sure"), ("strict", "sure"), (1e-5, "sure")],
)
def test_dispatch_filters_on_the_error_on_hard_inputs(accuracy: Any, chosen: str) -> None:
    clock = FakeClock()
    loose = Numerics("transform", growth=lambda problem, config: 1e5)
    only(OneSidedTrouble("quick", clock, 0.5, numerics=loose), Scripted("sure", clock))
    entry = entry_of(clock)
    errors = {result.backend: result.error for result in entry.results}
    assert errors["quick"] == pytest.approx(5e-4, rel=0.01)
    assert errors["sure"] < 1e-6
    profile.remember(entry)
    with settings.options(accuracy=accuracy, threads=1):
        assert dispatch.decide(PROBLEM, "plan").candidate.backend.name == chosen


def test_strict_is_the_bound_of_a_plain_sum_whatever_a_local_backend_declares() -> None:
    clock = FakeClock()
    loose = Numerics("local", growth=lambda problem, config: 1e5)
    only(OneSidedTrouble("quick", clock, 0.5, numerics=loose), Scripted("sure", clock))
    profile.remember(entry_of(clock))
    with settings.options(accuracy="strict", threads=1):
        assert dispatch.decide(PROBLEM, "plan").candidate.backend.name == "sure"


def test_who_is_wrong_on_hard_inputs_only_may_not_win() -> None:
    clock = FakeClock()
    only(Half("half", clock, 0.1, numerics=Numerics("local", growth=lambda *_: 1e5)), Scripted("sure", clock))
    entry = entry_of(clock)
    assert [result.backend for result in entry.results] == ["sure"]
    assert entry.failures[0].reason.startswith("wrong result: on wide range input")


def test_who_raises_on_hard_inputs_only_is_a_failure() -> None:
    clock = FakeClock()
    bad = Scripted("bad", clock, fails_in=lambda where, call: where == "call" and call == 3, error=ConvDispatchError)
    only(bad, Scripted("sure", clock))
    assert [failure.backend for failure in entry_of(clock).failures] == ["bad"]
    assert busy.make_watch is QuietWatch
