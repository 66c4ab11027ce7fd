"""Backends come and go by name: functions, classes, instances, built-ins, and what other packages offer."""

from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import pytest
from scripted import PROBLEM, FakeClock, Scripted, only, race_by

import convdispatch
from convdispatch import dispatch, reference, registry, settings
from convdispatch.arguments import Array
from convdispatch.backend import Backend, Config, Kernel, Numerics
from convdispatch.errors import (
    ArgumentTypeError,
    BackendError,
    BackendRejectedError,
    BackendUnavailableError,
    RegistrationError,
    UnknownBackendError,
)
from convdispatch.machine import Machine
from convdispatch.problem import Problem
from convdispatch.registry import FunctionBackend, register, restore, unregister
from convdispatch.tuning import tuner

BUILT_IN = (
    "depthwise", "direct", "fast_fir", "fft", "im2col", "image_rows", "implicit_gemm", "inner_product",
    "int8_dot", "numba", "pointwise", "separable", "winograd", "winograd_rows",
)  # fmt: skip
INPUT = np.ones(PROBLEM.input_shape, "f4")
FILTERS = np.ones(PROBLEM.filter_shape, "f4")


def right(x: Array, w: Array, problem: Problem) -> Array:
    return reference.convolve(problem, x, w)


class Nameless(Backend):
    """Everything that the contract asks for but a name."""

    def rejects(self, problem: Problem) -> str | None:
        return None

    def workspace(self, problem: Problem, config: Config) -> int:
        return 0

    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float | None:
        return None

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:
        kept = np.array(filters)

        def kernel(input: Array, out: Array, residual: Array | None) -> None:
            out[...] = reference.convolve(problem, input, kept)

        return kernel


class Whole(Nameless):
    """Everything that the contract asks for, and no more."""

    name = "whole"


class Partial(Backend):
    """A subclass that forgot most of it."""

    name = "partial"

    def rejects(self, problem: Problem) -> str | None:
        return None


def test_the_built_in_backends_are_there_in_alphabetical_order() -> None:
    assert registry.names() == BUILT_IN
    assert convdispatch.backends() == BUILT_IN
    assert [backend.name for backend in registry.available().values()] == list(BUILT_IN)
    assert registry.unavailable() == {}


# Registering -------------------------------------------------------------------------------------------------------


def test_a_function_by_decorator_is_returned_unchanged_and_can_be_asked_for() -> None:
    @register("mine")
    def mine(x: Array, w: Array, problem: Problem) -> Array:
        return right(x, w, problem)

    assert mine.__name__ == "mine"
    assert registry.names() == (*BUILT_IN, "mine")
    assert isinstance(registry.get("mine"), FunctionBackend)
    y = convdispatch.conv2d(INPUT, FILTERS, backend="mine")
    np.testing.assert_allclose(y, reference.convolve(PROBLEM, INPUT, FILTERS))
    assert y.dtype == np.float32


@pytest.mark.parametrize(
    "how",
    [
        lambda: register(Whole), lambda: register(Whole()), lambda: register("whole")(Whole),
        lambda: register("whole")(Whole()), lambda: register(Whole, replace=True),
    ],
    ids=["class", "instance", "named class", "named instance", "replacing nothing"],
)  # fmt: skip
def test_a_class_or_instance_is_registered_under_its_name(how: Callable[[], Any]) -> None:
    returned = how()
    assert returned is Whole or isinstance(returned, Whole)
    assert isinstance(registry.get("whole"), Whole)
    np.testing.assert_allclose(convdispatch.conv2d(INPUT, FILTERS, backend="whole")[0, 3, 3], 18)


def test_an_instance_may_have_a_name_of_its_own() -> None:
    backend = Scripted("own", FakeClock())
    assert register(backend) is backend
    assert registry.get("own") is backend


def test_a_nameless_class_takes_the_name_it_is_given() -> None:
    register("given")(Nameless)
    assert registry.get("given").name == "given"
    with pytest.raises(RegistrationError, match="register needs a name"):
        register(Nameless)


def test_a_name_is_given_once_unless_replaced() -> None:
    register("mine")(right)
    for name in ("mine", "fft"):
        with pytest.raises(RegistrationError, match=f"there is a backend '{name}' already; pass replace=True"):
            register(name)(right)
    first = registry.get("mine")
    register("mine", replace=True, version=2)(right)
    assert registry.get("mine") is not first
    assert registry.get("mine").version == 2


def test_a_replaced_built_in_comes_back() -> None:
    built_in = registry.get("fft")
    register("fft", replace=True)(right)
    assert isinstance(registry.get("fft"), FunctionBackend)
    assert registry.names() == BUILT_IN
    unregister("fft")
    assert registry.get("fft") is built_in
    unregister("fft")
    assert "fft" not in registry.names()


@pytest.mark.parametrize("name", ["", "Mine", "1st", "my own", "a|b", "a(b)", "a:b", "ü", "a\n", "-a", "_a"])
def test_a_name_that_would_not_read_well_is_refused(name: str) -> None:
    with pytest.raises(RegistrationError, match="a backend's name must match"):
        register(name)(right)
    assert registry.names() == BUILT_IN


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "must be a Backend, a subclass of it, or a function"),
        (None, "must be a Backend"),
        (dict, "must be a Backend"),
        (Partial, "must define estimate, prepare, workspace"),
        (Whole, "calls itself 'whole'; the two names must agree"),
        (Whole(), "calls itself 'whole'"),
    ],
)
def test_what_is_no_backend_is_refused(value: Any, message: str) -> None:
    with pytest.raises(RegistrationError, match=message):
        register("mine")(value)
    assert registry.names() == BUILT_IN


@pytest.mark.parametrize("value", [3, None, right, Backend, dict])
def test_a_thing_without_a_name_needs_one(value: Any) -> None:
    with pytest.raises(RegistrationError, match=r"register needs a name: register\('mine'\)"):
        register(value)


def test_an_unfinished_class_is_refused_under_its_own_name_too() -> None:
    with pytest.raises(RegistrationError, match="backend 'partial' must define estimate, prepare, workspace"):
        register(Partial)


def test_a_class_says_its_version_itself() -> None:
    with pytest.raises(RegistrationError, match="backend 'whole' is a class: it says version itself"):
        register("whole", version=2)(Whole)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"foo": 1}, ("foo", "version, numerics, rejects")),
        ({"rejcts": None}, ("rejcts", "did you mean 'rejects'")),
        ({"rejects": "no"}, ("rejects", "function", "'no'")),
        ({"version": "2"}, ("version", "int", "'2'")),
        ({"version": True}, ("version", "int", "True")),
        ({"numerics": "transform"}, ("numerics", "Numerics", "'transform'")),
        ({"numerics": Numerics}, ("numerics", "Numerics")),
    ],
)
def test_what_is_said_about_a_function_is_checked_before_it_is_there(
    about: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        register("mine", **about)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert registry.names() == BUILT_IN


def test_unregistering_hides_and_restore_brings_back() -> None:
    register("mine")(right)
    unregister("fft")
    assert "fft" not in registry.names()
    assert "fft" not in registry.available()
    with pytest.raises(UnknownBackendError, match="no backend is called 'fft'"):
        registry.get("fft")
    with pytest.raises(UnknownBackendError, match="no backend is called 'fft'"):
        unregister("fft")
    with pytest.raises(UnknownBackendError):
        convdispatch.conv2d(INPUT, FILTERS, backend="fft")
    register("fft")(right)  # the place is free
    assert isinstance(registry.get("fft"), FunctionBackend)
    restore()
    assert registry.names() == BUILT_IN
    assert registry.get("fft").numerics.kind == "transform"


def test_every_change_is_a_new_generation() -> None:
    seen = {registry.generation()}
    for change in (lambda: register("mine")(right), lambda: unregister("mine"), lambda: unregister("fft"), restore):
        change()
        assert registry.generation() not in seen
        seen.add(registry.generation())


@pytest.mark.parametrize(
    ("name", "hint"),
    [("winogard", "did you mean 'winograd'?"), ("zzz", "there are depthwise, direct, fast_fir, fft, im2col")],
)
def test_an_unknown_name_gets_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(UnknownBackendError, match=r"no backend is called '\w+'; ") as told:
        registry.get(name)
    assert hint in str(told.value)


# Functions ---------------------------------------------------------------------------------------------------------


def call(function: Callable[[Array, Array, Problem], Any], x: Array = INPUT, **about: Any) -> Array:
    register("mine", replace=True, **about)(function)
    filters = np.ones((*PROBLEM.filter_shape,), x.dtype)
    return convdispatch.conv2d(x, filters, backend="mine")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x, w, p: right(x, w, p)[:, 1:],
            r"backend 'mine' returned shape \(1, 5, 6, 3\) instead of \(1, 6, 6, 3\)",
        ),
        (lambda x, w, p: right(x, w, p)[0], r"returned shape \(6, 6, 3\)"),
        (lambda x, w, p: 1.0, r"returned shape \(\) instead"),
        (lambda x, w, p: None, r"returned shape \(\) instead"),
        (lambda x, w, p: right(x, w, p).astype(complex), "returned complex128 instead of float32"),
        (lambda x, w, p: right(x, w, p).astype(str), "instead of float32"),
    ],
    ids=["rows missing", "batch missing", "a number", "nothing", "complex", "text"],
)
def test_a_function_that_returns_something_else_is_an_error_that_says_what(
    function: Callable[[Array, Array, Problem], Any], message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        call(function)


def test_a_float_result_for_integers_is_refused() -> None:
    with pytest.raises(BackendError, match="returned float64 instead of int32"):
        call(lambda x, w, p: right(x, w, p) * 1.0, INPUT.astype("i4"))


def test_a_function_may_return_what_becomes_the_result_by_a_usual_cast() -> None:
    assert call(right).dtype == np.float32  # from float64
    assert call(right, INPUT.astype("i2")).dtype == np.int32  # from int64
    assert call(lambda x, w, p: right(x, w, p).tolist()).dtype == np.float32


@pytest.mark.parametrize("which", [0, 1])
def test_a_function_gets_arrays_that_it_cannot_change(which: int) -> None:
    def scribbles(x: Array, w: Array, problem: Problem) -> Array:
        (x, w)[which][...] = 0
        return right(x, w, problem)

    x = np.ones_like(INPUT)
    with pytest.raises(ValueError, match="read-only"):
        call(scribbles, x)
    assert x.all()
    assert x.flags.writeable


def test_a_function_that_keeps_its_filters_keeps_them_as_they_were() -> None:
    register("mine")(right)
    filters = FILTERS.copy()
    plan = convdispatch.plan(PROBLEM.input_shape, filters, backend="mine")
    filters[...] = 0
    assert plan(INPUT).max() == 18


def test_a_function_may_return_its_own_input() -> None:
    one = np.ones((1, 1, 3, 3), "f4")
    register("mine")(lambda x, w, p: x)
    x = np.arange(27, dtype="f4").reshape(1, 3, 3, 3)
    y = convdispatch.conv2d(x, one, backend="mine")
    y[...] = 0
    assert x.max() == 26


@pytest.mark.parametrize(
    ("words", "x"),
    [
        ({"data_format": "NCHW"}, np.ones((1, 2, 6, 6), "f4")),
        ({"bias": np.ones(3, "f4"), "activation": "relu"}, INPUT),
        ({}, INPUT.astype("f2")),
        ({}, INPUT[:, ::-1]),
    ],
    ids=["NCHW", "epilogue", "float16", "negative strides"],
)
def test_a_function_sees_plain_arrays_whatever_the_caller_has(words: dict[str, Any], x: Array) -> None:
    seen: list[tuple[Problem, Array, Array]] = []

    def looks(x: Array, w: Array, problem: Problem) -> Array:
        seen.append((problem, x, w))
        return right(x, w, problem)

    register("mine")(looks)
    y = convdispatch.conv2d(x, FILTERS.astype(x.dtype), backend="mine", **words)
    expected = convdispatch.conv2d(x, FILTERS.astype(x.dtype), backend="direct", **words)
    np.testing.assert_allclose(y, expected)
    problem, given, filters = seen[0]
    assert problem == PROBLEM
    assert given.flags.c_contiguous
    assert given.dtype == filters.dtype == np.float32
    assert (given.shape, filters.shape) == (PROBLEM.input_shape, PROBLEM.filter_shape)


def test_a_function_may_reject_problems_with_a_reason() -> None:
    register("mine", rejects=lambda problem: None if problem.strides == (1, 1) else "only unit strides")(right)
    convdispatch.conv2d(INPUT, FILTERS, backend="mine")
    with pytest.raises(BackendRejectedError, match=r"backend 'mine' cannot do .*: only unit strides"):
        convdispatch.conv2d(INPUT, FILTERS, 2, backend="mine")
    rows = {row.backend: row for row in convdispatch.explain(INPUT, FILTERS, 2).rows}
    assert rows["mine"].reason == "only unit strides"


def test_a_function_says_its_version_and_numerics() -> None:
    numerics = Numerics("transform", lambda problem, config: 100.0)
    register("mine", version=3, numerics=numerics)(right)
    assert registry.get("mine").version == 3
    assert registry.get("mine").numerics is numerics
    register("other")(right)
    assert registry.get("other").version == 1
    assert registry.get("other").numerics.kind == "local"


def test_a_function_is_never_chosen_before_it_has_been_measured() -> None:
    only()
    register("mine")(right)
    with pytest.raises(BackendRejectedError, match="no backend may do"):
        convdispatch.conv2d(INPUT, FILTERS)


# Functions compete -------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    race_by(monkeypatch, fake)
    return fake


@pytest.mark.parametrize(("seconds", "winner"), [(0.5, "mine"), (1.5, "other")])
def test_a_function_wins_when_it_is_fastest_and_only_then(clock: FakeClock, seconds: float, winner: str) -> None:
    only(Scripted("other", clock, 1.0))

    @register("mine")
    def mine(x: Array, w: Array, problem: Problem) -> Array:
        clock.spend(seconds)
        return right(x, w, problem)

    tuner.tune(PROBLEM)
    for deployment in ("plan", "call"):
        assert dispatch.decide(PROBLEM, deployment).candidate.backend.name == winner


@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: y + 0.5, lambda y: y * (1 + 1e-3), np.zeros_like, lambda y: y[:, 1:], lambda y: y * np.nan,
        lambda y: y[..., ::-1], lambda y: y.astype(complex), lambda y: y[:, :, ::-1],
    ],
    ids=["shifted", "scaled", "zero", "wrong shape", "nan", "channels reversed", "complex", "mirrored"],
)  # fmt: skip
def test_a_wrong_function_never_wins_however_fast(clock: FakeClock, spoil: Callable[[Array], Array]) -> None:
    only(Scripted("other", clock, 1.0))
    register("mine")(lambda x, w, problem: spoil(right(x, w, problem)))
    report = tuner.tune(PROBLEM)
    for layer in report.layers:
        assert layer.entry is not None
        assert layer.entry.winner.backend == "other"
        assert [failure.backend for failure in layer.entry.failures] == ["mine"]
    assert dispatch.decide(PROBLEM, "plan").candidate.backend.name == "other"


def test_a_function_that_raises_never_wins(clock: FakeClock) -> None:
    only(Scripted("other", clock, 1.0))

    @register("mine")
    def mine(x: Array, w: Array, problem: Problem) -> Array:
        raise ZeroDivisionError("what now")

    entry = tuner.tune(PROBLEM).layers[0].entry
    assert entry is not None
    assert [(failure.backend, failure.reason) for failure in entry.failures] == [
        ("mine", "ZeroDivisionError: what now")
    ]


def test_a_changed_function_is_not_trusted_until_measured_again(clock: FakeClock) -> None:
    only(Scripted("other", clock, 1.0))
    register("mine")(right)
    tuner.tune(PROBLEM)
    assert dispatch.decide(PROBLEM, "plan").candidate.backend.name == "mine"
    register("mine", replace=True, version=2)(lambda x, w, problem: right(x, w, problem) + 1)
    assert dispatch.decide(PROBLEM, "plan").candidate.backend.name == "other"
    tuner.tune(PROBLEM)
    assert dispatch.decide(PROBLEM, "plan").candidate.backend.name == "other"


# Other packages ----------------------------------------------------------------------------------------------------


class Point:
    """What ``importlib.metadata`` says of an installed backend."""

    def __init__(self, name: str, what: Any) -> None:
        self.name = name
        self.value = f"package_of_{name}:backend"
        self.what = what
        self.loads = 0

    def load(self) -> Any:
        self.loads += 1
        if isinstance(self.what, BaseException):
            raise self.what
        return self.what


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Sequence[Point]]]:
    """Return a function that makes a fresh registry find these entry points."""

    def install(*points: Point) -> Sequence[Point]:
        def entry_points(*, group: str) -> tuple[Point, ...]:
            assert group == "convdispatch.backends"
            return points

        monkeypatch.setattr(metadata, "entry_points", entry_points)
        monkeypatch.setattr(registry, "_registry", registry._Registry())
        dispatch._decide.cache_clear()  # generations begin anew
        return points

    yield install
    dispatch._decide.cache_clear()


def test_an_entry_point_may_be_a_class_an_instance_or_a_function(installed: Callable[..., Sequence[Point]]) -> None:
    installed(Point("whole", Whole), Point("own", Scripted("own", FakeClock())), Point("plain", right))
    assert registry.names() == (*BUILT_IN, "whole", "own", "plain")
    for name in ("whole", "own", "plain"):
        np.testing.assert_allclose(convdispatch.conv2d(INPUT, FILTERS, backend=name)[0, 3, 3], 18)
    assert registry.unavailable() == {}


def test_an_entry_point_is_imported_when_first_asked_for_and_once(installed: Callable[..., Sequence[Point]]) -> None:
    (point,) = installed(Point("whole", Whole))
    assert "whole" in registry.names()
    registry.get("fft")
    assert point.loads == 0
    assert registry.get("whole") is registry.get("whole")
    assert point.loads == 1


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (ImportError("no libfast.so"), "ImportError: no libfast.so"),
        (RuntimeError("needs AVX-512"), "RuntimeError: needs AVX-512"),
        (SystemExit(3), "SystemExit: 3"),
        (Partial, "backend 'bad' must define estimate, prepare, workspace"),
        (Whole, "backend 'bad' calls itself 'whole'"),
        (42, "backend 'bad' must be a Backend"),
    ],
    ids=["import", "other error", "exit", "unfinished", "misnamed", "no backend"],
)
def test_an_entry_point_that_cannot_be_loaded_is_unavailable_with_its_reason(
    installed: Callable[..., Sequence[Point]], what: Any, reason: str
) -> None:
    (point,) = installed(Point("bad", what))
    assert "bad" in registry.names()
    assert list(registry.available()) == list(BUILT_IN)
    assert registry.unavailable()["bad"].startswith(reason)
    with pytest.raises(BackendUnavailableError, match="backend 'bad' is unavailable: ") as told:
        convdispatch.conv2d(INPUT, FILTERS, backend="bad")
    assert reason in str(told.value)
    assert isinstance(told.value, ImportError)
    assert point.loads == 1  # not tried again and again
    rows = {row.backend: row for row in convdispatch.explain(INPUT, FILTERS).rows}
    assert rows["bad"].reason.startswith(reason)
    convdispatch.conv2d(INPUT, FILTERS)  # the others go on


def test_an_unavailable_backend_may_be_replaced_or_taken_out(installed: Callable[..., Sequence[Point]]) -> None:
    installed(Point("bad", ImportError("no")), Point("worse", ImportError("no")))
    assert set(registry.unavailable()) == {"bad", "worse"}
    register("bad", replace=True)(right)
    unregister("worse")
    assert registry.unavailable() == {}
    assert "bad" in registry.available()


def test_an_entry_point_cannot_take_a_built_in_name(installed: Callable[..., Sequence[Point]]) -> None:
    (point,) = installed(Point("fft", Whole))
    assert registry.names() == BUILT_IN
    assert registry.get("fft").numerics.kind == "transform"
    assert registry.unavailable() == {"fft (package_of_fft:backend)": "the name 'fft' is taken"}
    assert point.loads == 0


def test_an_interruption_while_importing_is_not_a_reason(installed: Callable[..., Sequence[Point]]) -> None:
    (point,) = installed(Point("whole", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        registry.get("whole")
    point.what = Whole
    assert isinstance(registry.get("whole"), Whole)


# Forbidden names ------------------------------------------------------------------------------------------------------


@pytest.fixture
def doubts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not warned of any name yet."""
    monkeypatch.setattr(registry._registry, "doubted", set())


@pytest.mark.usefixtures("doubts")
@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_forbidden_name_that_nobody_has_is_warned_of_once(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    changes = {}
    if way == "option":
        changes["forbid"] = ("fft", "winogard")
    else:
        monkeypatch.setenv("CONVDISPATCH_FORBID", "fft,winogard")
    with settings.options(**changes):
        with pytest.warns(UserWarning, match="forbid names 'winogard'.*did you mean 'winograd'") as told:
            convdispatch.plan(INPUT, FILTERS)
        assert len(told) == 1
        convdispatch.plan(INPUT, FILTERS, strides=2)  # said once


@pytest.mark.usefixtures("doubts")
def test_a_forbidden_backend_may_come_later_or_be_taken_out() -> None:
    with settings.options(forbid=("late", "fft")):
        register("late")(right)
        unregister("fft")
        assert "late" in registry.available()
