"""The one contract, shown for every backend there is: right, contained, honest about memory, picklable."""

import itertools
import math
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import (
    FLOAT_DTYPES,
    USABLE_DTYPES,
    Case,
    cases,
    examples,
    familiar_cases,
    fits,
    from_format,
    judge,
    numbers,
    problems,
    runs_here,
    to_format,
    written,
)

import convdispatch
from convdispatch import reference, registry
from convdispatch.arguments import Array
from convdispatch.backend import Backend, Candidate, Config, seen_by
from convdispatch.epilogue import ACTIVATIONS, Epilogue
from convdispatch.errors import ArgumentError, BackendRejectedError, BackendUnavailableError
from convdispatch.machine import Machine, current
from convdispatch.problem import Problem, dtype_of

pytestmark = pytest.mark.usefixtures("few_kernels")

BACKENDS = convdispatch.backends()
SMALL_MACHINE = Machine("test (test)", ("sse2",), 1, (16 << 10, 256 << 10, 1 << 20), "Linux x86_64", ())


@pytest.fixture(name="backend", params=BACKENDS)
def _backend(request: pytest.FixtureRequest) -> Backend:
    try:
        backend = registry.get(request.param)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    if not runs_here(backend):
        pytest.skip("the processor lacks the instructions that it is for")
    return backend


@pytest.fixture(name="floats")
def _floats(backend: Backend) -> None:
    """Skip backends that are for integers only."""
    some = "32 * 3x3x1x32 SAME", "32 * 3x3x32x8 SAME", "2 * 9x9x2x1 SAME", "1 * 9x9x1x1 SAME separable"
    if not any(fits(backend, Problem.parse(f"1x9x9x{text}")) for text in some):
        pytest.skip("it does no floats")


def forced_plan(backend: Backend, case: Case, config: Config | None = None) -> convdispatch.Plan:
    p = case.problem
    how = case.arguments
    wanted = backend.name if config is None else (backend.name, config)
    return convdispatch.plan(
        p.input_shape, case.w, dtype=p.dtype, residual=p.epilogue.residual, backend=wanted, **how
    )  # fmt: skip


def configs_of(backend: Backend, seen: Problem) -> Iterator[Config]:
    for config in backend.configs(seen, "exhaustive"):
        for threads in (1, 2) if backend.parallel else (1,):
            yield Config(config, threads=threads)


def with_activation(case: Case, activation: str) -> Problem:
    slope = 0.2 if activation == "leaky_relu" else 0.0
    return case.problem.replace(epilogue=Epilogue(bias=True, residual=True, activation=activation, slope=slope))


# Right ----------------------------------------------------------------------------------------------------------


@given(case=cases())
@examples(18)
def test_a_plan_is_within_the_bound_of_the_reference_or_says_why_not(backend: Backend, case: Case) -> None:
    p = case.problem
    if reason := Candidate(backend, Config()).rejects(p):
        with pytest.raises(BackendRejectedError) as caught:
            forced_plan(backend, case)
        assert backend.name in str(caught.value)
        assert reason in str(caught.value)
        return
    plan = forced_plan(backend, case)
    x, w = case.input, case.w.copy()
    kept = x.copy()
    y = plan(x, residual=case.addend)
    assert y.shape == p.output_shape
    assert y.dtype == dtype_of(p.result_dtype)
    assert y.flags.c_contiguous
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(case.w, w)
    verdict = judge(
        p, backend.numerics, plan.candidate.config, case.x, case.w, from_format(p, y), case.bias, case.residual
    )
    assert verdict.reason is None, plan.candidate


@given(case=cases(empty=False, side=24))
@examples(3)
@example(case=numbers(Problem.parse("2x33x37x3 * 3x3x3x5 SAME")))
@example(case=numbers(Problem.parse("1x41x9x6 * 3x3x3x4 pad=2,0,1,3")))
@example(case=numbers(Problem.parse("1x40x35x1 * 7x11x1x2 SAME_LOWER stride=2")))
@example(case=numbers(Problem.parse("3x8x7x16 * 1x1x16x24 VALID")))
@example(case=numbers(Problem.parse("1x2x3x2 * 2x3x2x3 pad=7,8,9,6")))
@example(case=numbers(Problem.parse("2x19x23x1 * 9x4x1x3 SAME separable +bias +residual +relu")))
def test_every_config_is_within_the_bound_of_the_reference(backend: Backend, case: Case) -> None:
    p = seen_by(backend, case.problem)
    if backend.rejects(p):
        return
    x, w = (array.astype(dtype_of(p.dtype)) for array in (case.x, case.w))
    values = p.epilogue and case.bias is not None
    bias = case.bias.astype(dtype_of(p.sum_dtype)) if values and case.bias is not None else None
    added = case.residual.astype(dtype_of(p.result_dtype)) if p.epilogue and case.residual is not None else None
    given_x, given_added = to_format(p, x), None if added is None else to_format(p, added)
    given_x.flags.writeable = False
    for config in configs_of(backend, p):
        kernel = backend.prepare(p, w, bias, config)
        out = np.full(p.output_shape, 77, dtype_of(p.result_dtype))
        kernel(given_x, out, given_added)
        verdict = judge(p, backend.numerics, config, x, w, from_format(p, out), bias, added)
        assert verdict.reason is None, config


@pytest.mark.parametrize("dtype", USABLE_DTYPES)
@pytest.mark.parametrize("text", ["2x9x8x3 * 3x3x3x5 SAME", "2x6x9x8 NCHW * 2x3x1x12 VALID stride=2"])
def test_every_dtype_is_right_or_refused(backend: Backend, text: str, dtype: str) -> None:
    case = numbers(Problem.parse(f"{text} {dtype} +bias +residual +relu"))
    if not fits(backend, case.problem):
        pytest.skip(str(Candidate(backend, Config()).rejects(case.problem)))
    plan = forced_plan(backend, case)
    y = from_format(case.problem, plan(case.input, residual=case.addend))
    verdict = judge(case.problem, backend.numerics, plan.candidate.config, case.x, case.w, y, case.bias, case.residual)
    assert verdict.reason is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_every_activation_is_applied_after_bias_and_residual(backend: Backend, activation: str, dtype: str) -> None:
    problem = Problem.parse(f"2x7x6x3 * 3x3x3x4 SAME {dtype}")
    case = numbers(with_activation(numbers(problem), activation), seed=3)
    plan = forced_plan(backend, case)
    y = plan(case.input, residual=case.addend)
    verdict = judge(case.problem, backend.numerics, plan.candidate.config, case.x, case.w, y, case.bias, case.residual)
    assert verdict.reason is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_nan_and_saturate_far_out_without_overflow(backend: Backend, activation: str) -> None:
    problem = Problem.parse("1x1x7x1 * 1x1x1x1 VALID").replace(
        epilogue=Epilogue(activation=activation, slope=0.5 if activation == "leaky_relu" else 0.0)
    )
    if not fits(backend, problem):
        pytest.skip("it does no 1x1 filters")
    far = np.array([np.nan, -1e30, -200.0, 0.0, 200.0, 1e30, np.inf], np.float32).reshape(1, 1, 7, 1)
    w = np.ones((1, 1, 1, 1), np.float32)
    y = convdispatch.conv2d(far, w, activation=written(problem.epilogue), backend=backend.name).ravel()
    assert np.isnan(y[0])
    high = {"relu6": 6.0, "sigmoid": 1.0, "tanh": 1.0}.get(activation)
    np.testing.assert_allclose(y[4:6], [200, 1e30] if high is None else [high] * 2, rtol=1e-6)
    assert y[6] == (np.inf if high is None else high)
    low = {"tanh": [-1.0, -1.0], "leaky_relu": [-5e29, -100.0]}.get(activation, [0.0, 0.0])
    np.testing.assert_allclose(y[1:3], low, rtol=1e-6)
    assert y[3] == (0.5 if activation == "sigmoid" else 0)


@pytest.mark.usefixtures("floats")
@given(case=familiar_cases())
@examples(20)
def test_the_same_plan_gives_the_same_bits(backend: Backend, case: Case) -> None:
    assume(fits(backend, case.problem))
    plan, again = forced_plan(backend, case), forced_plan(backend, case)
    first = plan(case.input, residual=case.addend).tobytes()
    assert plan(case.input, residual=case.addend).tobytes() == first
    assert again(case.input, residual=case.addend).tobytes() == first


# Contained ------------------------------------------------------------------------------------------------------


def kinds(array: Array) -> Array:
    """Return of each element whether it is finite (0), NaN (1), infinity (2) or minus infinity (3)."""
    return np.asarray(np.isnan(array) * 1 + np.isposinf(array) * 2 + np.isneginf(array) * 3)


def undecided(problem: Problem, w: Array) -> Array:
    """Return which outputs have an infinite or NaN filter element over the padding.

    Zero times infinity is NaN, but an element outside the image need not be multiplied at all: either will do.
    """
    p = problem.replace(dtype="float64", epilogue=Epilogue())
    bad = ~np.isfinite(w) * 1.0
    inside = reference.convolve(p, np.ones((p.n, p.h, p.w, p.c)), bad)
    return np.asarray(inside < bad.sum(axis=(0, 1, 2)))


def check_contained(backend: Backend, case: Case) -> None:
    """Compare where a result is not finite with the reference, and its finite values too."""
    p = case.problem
    plan = forced_plan(backend, case)
    got = from_format(p, plan(case.input, residual=case.addend)).astype(np.float64)
    with np.errstate(all="ignore"):
        exact = reference.conv2d(p.replace(dtype="float64"), case.x, case.w, case.bias, case.residual)
    judged = ~undecided(p, case.w)
    np.testing.assert_array_equal(kinds(got)[judged], kinds(exact)[judged])
    # What is finite cannot come from what is not, but for activations that squash infinity.
    x, w = (np.where(np.isfinite(array), array, 0).astype(array.dtype) for array in (case.x, case.w))
    allowed = reference.Oracle(p, x, w, case.bias, case.residual)._allowed(backend.numerics, plan.candidate.config)
    finite = judged & np.isfinite(exact)
    assert (np.abs(got[finite] - exact[finite]) <= allowed[finite]).all()


@pytest.mark.usefixtures("floats")
@given(case=familiar_cases(dtypes=FLOAT_DTYPES), data=st.data())
@examples(40)
def test_nan_and_infinity_stay_inside_their_receptive_field(backend: Backend, case: Case, data: st.DataObject) -> None:
    assume(fits(backend, case.problem))
    bad = st.sampled_from((np.nan, np.inf, -np.inf))
    # With a value that is not finite, filters are no product of a column and a row.
    where = data.draw(st.sampled_from(("input",) if case.problem.separable else ("input", "filters", "both")))
    for name, array in (("input", case.x), ("filters", case.w)):
        if where in {name, "both"}:
            for _ in range(data.draw(st.integers(1, 3))):
                array.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(bad)
    check_contained(backend, case)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_one_bad_pixel_spoils_only_the_windows_over_it(backend: Backend, value: float, dtype: str) -> None:
    case = numbers(Problem.parse(f"3x12x13x4 * 3x3x4x5 SAME {dtype}"))
    case.x[1, 5, 6, 2] = value
    y = forced_plan(backend, case)(case.input)
    spoiled = ~np.isfinite(y).any(axis=-1)
    expected = np.zeros((3, 12, 13), bool)
    expected[1, 4:7, 5:8] = True
    np.testing.assert_array_equal(~np.isfinite(y).all(axis=-1), expected)
    np.testing.assert_array_equal(spoiled, expected)


@pytest.mark.usefixtures("floats")
@given(case=familiar_cases(plain=True), data=st.data())
@examples(40)
def test_large_values_that_overflow_a_transform_do_not_spoil_finite_results(
    backend: Backend, case: Case, data: st.DataObject
) -> None:
    assume(fits(backend, case.problem))
    p = case.problem
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, case.x.size - 1))
        case.x.flat[place] = data.draw(st.sampled_from((3e38, -3e38, 2e38, 1e37)))
    if data.draw(st.booleans()):
        case.w[...] = case.w / 16
    plan = forced_plan(backend, case)
    got = from_format(p, plan(case.input)).astype(np.float64)
    wide = p.replace(dtype="float64")
    sums = reference.convolve(wide, case.x, case.w)
    magnitude = reference.convolve(wide, np.abs(case.x), np.abs(case.w))
    safe = magnitude < 0.9 * float(np.finfo(np.float32).max)  # nothing on the way to these can overflow
    assert np.isfinite(got[safe]).all()
    allowed = reference.Oracle(p, case.x, case.w).bound(backend.numerics, plan.candidate.config)
    assert (np.abs(got[safe] - sums[safe]) <= allowed[safe]).all()
    hopeless = np.abs(sums) > 1.1 * float(np.finfo(np.float32).max)
    assert not np.isfinite(got[hopeless]).any()


# Honest ---------------------------------------------------------------------------------------------------------


@given(problem=problems(empty=False), threads=st.sampled_from((1, 2, 7)))
def test_workspace_and_estimate_are_sane(backend: Backend, problem: Problem, threads: int) -> None:
    assume(fits(backend, problem))
    for config in backend.configs(seen_by(backend, problem), "exhaustive"):
        candidate = Candidate(backend, Config(config, threads=threads))
        workspace = candidate.workspace(problem)
        assert isinstance(workspace, int)
        assert workspace >= 0
        for machine in (SMALL_MACHINE, current()):
            seconds = candidate.estimate(problem, machine)
            assert seconds is None or (0 < seconds < 60 and math.isfinite(seconds))


@given(problem=problems(empty=False))
def test_configs_are_few_at_first_distinct_and_only_grow_with_effort(backend: Backend, problem: Problem) -> None:
    seen = seen_by(backend, problem)
    assume(backend.rejects(seen) is None)
    efforts = ("estimate", "measure", "patient", "exhaustive")
    found = [list(backend.configs(seen, effort)) for effort in efforts]  # type: ignore[arg-type]
    for configs in found:
        assert configs
        assert len(set(configs)) == len(configs)
        assert configs[0] == found[0][0]
        assert all("threads" not in config for config in configs)
    for fewer, more in itertools.pairwise(found):
        assert set(fewer) <= set(more)


@given(problem=problems())
def test_a_reason_to_reject_is_words_and_does_not_change(backend: Backend, problem: Problem) -> None:
    seen = seen_by(backend, problem)
    reason = backend.rejects(seen)
    assert reason is None or (reason.strip() == reason and len(reason) > 3)
    assert backend.rejects(seen) == reason


@pytest.mark.parametrize("text", ["2x9x8x3 * 3x3x3x5 SAME +bias +relu", "1x9x8x4 * 3x3x2x4 VALID"])
def test_kernels_and_plans_pickle(backend: Backend, text: str) -> None:
    case = numbers(Problem.parse(text))
    if not fits(backend, case.problem):
        pytest.skip("it cannot do this problem")
    seen = seen_by(backend, case.problem)
    bias = case.bias if seen.epilogue else None
    for config in configs_of(backend, seen):
        kernel = backend.prepare(seen, case.w, bias, config)
        outputs = []
        for one in (kernel, pickle.loads(pickle.dumps(kernel))):
            out = np.empty((seen.n, seen.oh, seen.ow, seen.k), seen.result_dtype)
            one(case.x, out, None)
            outputs.append(out.tobytes())
        assert outputs[0] == outputs[1]
    plan = forced_plan(backend, case)
    again = pickle.loads(pickle.dumps(plan))
    assert again.problem == plan.problem
    assert again.candidate == plan.candidate
    assert again(case.input).tobytes() == plan(case.input).tobytes()


def test_filters_are_packed_so_that_changing_them_later_changes_nothing(backend: Backend) -> None:
    case = numbers(Problem.parse("1x9x8x4 * 3x3x4x4 SAME +bias"))
    plan = forced_plan(backend, case)
    before = plan(case.input).tobytes()
    assert case.bias is not None
    case.w[...] = 0
    case.bias[...] = 0
    assert plan(case.input).tobytes() == before
    case.x[0, 0, 0, 0] = np.nan  # a transform has its filters only packed, and needs the real ones now
    after = plan(case.input)
    assert np.isfinite(after).any()
    assert after[0, 5:].tobytes() == np.frombuffer(before, np.float32).reshape(after.shape)[0, 5:].tobytes() or (
        np.allclose(after[0, 5:], np.frombuffer(before, np.float32).reshape(after.shape)[0, 5:], rtol=1e-3, atol=1e-4)
    )


@pytest.mark.usefixtures("floats")
@given(case=familiar_cases(dtypes=FLOAT_DTYPES), data=st.data())
@examples(30)
def test_views_of_any_strides_are_read_and_written(backend: Backend, case: Case, data: st.DataObject) -> None:
    assume(fits(backend, case.problem))
    p = case.problem
    plan = forced_plan(backend, case)
    expected = plan(case.input, residual=case.addend)
    x = case.input
    order = data.draw(st.permutations(range(4)))
    steps = tuple(slice(None, None, data.draw(st.sampled_from((1, -1)))) for _ in range(4))
    shuffled = np.ascontiguousarray(x[steps].transpose(order)).transpose(np.argsort(order))[steps]
    out = np.full([2 * size for size in p.output_shape], 7, expected.dtype)[::2, ::2, ::2, 1::2]
    assert plan(shuffled, out=out, residual=case.addend) is out
    # Other strides may reach another loop of BLAS; the same problem, still within the bound.
    verdict = judge(
        p, backend.numerics, plan.candidate.config, case.x, case.w, from_format(p, out), case.bias, case.residual
    )
    assert verdict.reason is None
    base = out.base
    assert isinstance(base, np.ndarray)
    assert (base[1::2] == 7).all()
    assert (base[:, :, :, ::2] == 7).all()


def test_a_block_larger_than_any_number_of_filters_is_all_filters() -> None:
    x, w = np.ones((1, 4, 4, 2), np.float32), np.ones((3, 3, 2, 5), np.float32)
    expected = convdispatch.conv2d(x, w, backend="direct")
    assert (convdispatch.conv2d(x, w, backend=("numba", {"block": 2**63 - 1})) == expected).all()
    with pytest.raises(ArgumentError, match="config block is a larger number than any kernel takes"):
        convdispatch.conv2d(x, w, backend=("numba", {"block": 10**30}))


def test_configs_of_other_types_are_others() -> None:
    """What a backend refuses as a float must not be refused as a whole number because it was so before."""
    assert len({Config(m=1), Config(m=1.0), Config(m=True)}) == 3
    x, w = np.ones((1, 6, 6, 4), np.float32), np.ones((3, 3, 4, 5), np.float32)
    with pytest.raises(ArgumentError, match=r"got m=4\.0"):
        convdispatch.conv2d(x, w, backend=("winograd", {"m": 4.0}))
    assert convdispatch.conv2d(x, w, backend=("winograd", {"m": 4})).shape == (1, 6, 6, 5)
