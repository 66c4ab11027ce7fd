"""The short way into a kernel: it takes the usual arrays and leaves all others, and every error, to the long way."""

import pickle
import sys
import threading
from typing import Any

import numpy as np
import pytest

import convdispatch
from convdispatch.arguments import Array
from convdispatch.backends import _entry, _team
from convdispatch.errors import ConvDispatchError

pytestmark = pytest.mark.skipif(_entry._method() is None, reason="there is no short way on this platform")

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 9, 8, 16), np.float32)
W = RNG.standard_normal((3, 3, 16, 16), np.float32)
SHAPE = (2, 9, 8, 16)


def used(made: convdispatch.Plan, x: Array = X) -> convdispatch.Plan:
    """Call a plan often enough for it to have a short way."""
    for _ in range(2):
        made(x)
    return made


def plan(backend: str = "implicit_gemm", threads: int = 1, **how: Any) -> convdispatch.Plan:
    return used(convdispatch.plan(X, W, backend=(backend, {"threads": threads}), **how))


def entered(made: convdispatch.Plan, *arrays: Any) -> Any:
    assert made._enter is not None
    return made._enter(*arrays)


@pytest.mark.parametrize("backend", ["implicit_gemm", "winograd"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_it_gives_the_bits_of_the_long_way(backend: str, threads: int) -> None:
    made = plan(backend, threads, activation="relu")
    long = made(X.astype(">f4"))  # a byte order that the short way does not take
    out = np.full(SHAPE, np.nan, np.float32)
    _team._team.prepare(threads - 1)
    for _ in range(3):
        out[...] = np.nan
        assert made(X, out=out) is out
        assert (out == long).all()
    assert (made(X) == long).all()


def test_it_is_taken_by_the_usual_call() -> None:
    made = plan()
    out = np.empty(SHAPE, np.float32)
    assert entered(made, X, out) is True
    again = used(pickle.loads(pickle.dumps(made)))
    assert entered(again, X, out) is True
    assert (out == made(X)).all()


def test_nchw_images_that_are_done_by_bands_go_this_way_too() -> None:
    x = RNG.standard_normal((1, 64, 60, 60), np.float32)
    w = RNG.standard_normal((3, 3, 64, 64), np.float32)
    made = used(convdispatch.plan(x, w, data_format="NCHW", backend=("implicit_gemm", {"threads": 1})), x)
    assert entered(made, x, np.empty((1, 64, 60, 60), np.float32)) is True
    same = convdispatch.conv2d(x.transpose(0, 2, 3, 1), w, backend="direct").transpose(0, 3, 1, 2)
    np.testing.assert_allclose(made(x), same, rtol=1e-4, atol=1e-3)


class Picture(np.ndarray):
    """An array of another type."""


def _reversed(array: Array) -> Array:
    return array[:, ::-1]


def _read_only(array: Array) -> Array:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def _misaligned(array: Array) -> Array:
    raw = np.empty(array.nbytes + 1, np.uint8)
    view: Array = raw[1:].view(np.float32).reshape(array.shape)
    view[...] = array
    return view


@pytest.mark.parametrize(
    "change", [_reversed, _misaligned, np.asfortranarray, lambda a: a.view(Picture), lambda a: a.astype(">f4")]
)
def test_odd_inputs_are_left_to_the_long_way(change: Any) -> None:
    made, out = plan(), np.empty(SHAPE, np.float32)
    assert entered(made, change(X), out) is None
    assert (made(change(X)) == made(np.array(change(X), np.float32, order="C"))).all()


def test_a_read_only_input_is_usual_and_a_read_only_out_an_error() -> None:
    made, out = plan(), np.empty(SHAPE, np.float32)
    assert entered(made, _read_only(X), out) is True
    assert entered(made, X, _read_only(out)) is None
    with pytest.raises(ConvDispatchError, match="out must be writable"):
        made(X, out=_read_only(out))


@pytest.mark.parametrize("wrong", [
    None, 7, object(), [1.0], "x", X[0], X[:1], X.astype(np.float64), X.reshape(2, 8, 9, 16), np.float32(1), (),
    X[..., None],
])  # fmt: skip
def test_what_is_wrong_is_an_error_with_words(wrong: Any) -> None:
    made, out = plan(), np.empty(SHAPE, np.float32)
    assert entered(made, wrong, out) is None
    assert entered(made, X, wrong) is None
    with pytest.raises(ConvDispatchError, match="input"):
        made(wrong)
    if wrong is not None:
        with pytest.raises(ConvDispatchError, match="out"):
            made(X, out=wrong)


def test_a_plan_enters_the_short_way_from_the_first_call_on() -> None:
    assert convdispatch.plan(X, W, backend=("implicit_gemm", {"threads": 1}))._enter is not None


def unpickled() -> convdispatch.Plan:
    made: convdispatch.Plan = pickle.loads(
        pickle.dumps(convdispatch.plan(X, W, backend=("implicit_gemm", {"threads": 1})))
    )
    return made


def test_what_is_called_once_does_without() -> None:
    made = unpickled()
    made(X)
    assert made._enter is None
    made(X)
    assert made._enter is not None


def test_calls_that_count_over_each_other_do_not_cost_a_plan_its_short_way() -> None:
    class Overtaken(int):
        def __add__(self, more: int) -> int:
            return 7  # others have counted meanwhile

    made = unpickled()
    made._runs = Overtaken()
    made(X)
    assert made._enter is not None


def test_a_kernel_without_a_short_way_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[convdispatch.Plan] = []

    def none(plan: convdispatch.Plan) -> None:
        asked.append(plan)

    monkeypatch.setattr(convdispatch.Plan, "_short_way", none)
    made = plan()
    for _ in range(3):
        made(X)
    assert asked == [made]
    again = pickle.loads(pickle.dumps(made))
    for _ in range(3):
        again(X)
    assert asked == [made, again]


def test_it_takes_two_arguments_and_nothing_else() -> None:
    made, out = plan(), np.empty(SHAPE, np.float32)
    assert entered(made) is None
    assert entered(made, X) is None
    assert entered(made, X, out, out) is None


@pytest.mark.parametrize("shift", [-1, 0, 1, 7])
def test_arrays_that_overlap_are_left_to_the_long_way(shift: int) -> None:
    made = plan()
    expected = made(X)
    room = np.empty(X.size + 64, np.float32)
    x = room[16 : 16 + X.size].reshape(SHAPE)
    out = room[16 + shift : 16 + shift + X.size].reshape(SHAPE)
    x[...] = X
    assert entered(made, x, out) is None
    assert (made(x, out=out) == expected).all()


def test_neighbours_do_not_overlap() -> None:
    made, room = plan(), np.empty(3 * X.size, np.float32)
    before, x, behind = (part.reshape(SHAPE) for part in np.split(room, 3))
    x[...] = X
    assert entered(made, x, before) is True
    assert entered(made, x, behind) is True
    assert (before == behind).all()
    assert (x == X).all()


def test_sums_that_are_not_finite_are_left_to_the_long_way() -> None:
    made = plan("winograd")
    spoiled, out = X.copy(), np.empty(SHAPE, np.float32)
    spoiled[0, 0, 0, 0] = np.nan
    assert entered(made, spoiled, out) is None
    result = made(spoiled)
    assert np.isnan(result[0, :2, :2]).all()
    assert np.isfinite(result[0, 2:]).all()
    assert np.isfinite(result[1]).all()


def test_nothing_is_held_on_to() -> None:
    made, x, out = plan(), X.copy(), np.empty(SHAPE, np.float32)
    counted = [x, out, True, None, np.dtype(np.float32)]
    for _ in range(100):
        made(x, out=out)
    before = [sys.getrefcount(each) for each in counted]
    for _ in range(1000):
        made(x, out=out)
        entered(made, x, None)
    assert all(abs(sys.getrefcount(each) - count) < 50 for each, count in zip(counted, before, strict=True))


def test_helpers_that_are_missing_are_the_long_ways_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_team, "whereabouts", _team.whereabouts.copy())
    monkeypatch.setattr(_team, "_team", _team._Team())
    x = RNG.standard_normal((1, 64, 64, 16), np.float32)
    made, out = used(convdispatch.plan(x, W, backend=("implicit_gemm", {"threads": 4})), x), np.empty_like(x)
    _team._team._words[_team._HELPERS // 8] = 2
    assert entered(made, x, out) is None
    expected = made(x)
    assert _team._team.helpers.count == 3
    assert (made(x, out=out) == expected).all()


def test_other_threads_run_meanwhile() -> None:
    x = RNG.standard_normal((1, 256, 256, 32), np.float32)
    w = RNG.standard_normal((5, 5, 32, 32), np.float32)
    made = used(convdispatch.plan(x, w, backend=("implicit_gemm", {"threads": 1})), x)
    out = np.empty((1, 256, 256, 32), np.float32)
    counted = [0]
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    try:
        before = counted[0]
        entry = entered(made, x, out)
        during = counted[0] - before
    finally:
        stop.set()
        counter.join()
    assert entry is True
    assert during > 0


@pytest.mark.parametrize("backend", ["implicit_gemm", "winograd"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_residual_goes_this_way_too(backend: str, threads: int) -> None:
    made = convdispatch.plan(X, W, residual=True, activation="relu", backend=(backend, {"threads": threads}))
    residual = RNG.standard_normal(SHAPE, np.float32)
    long = made(X.astype(">f4"), residual=residual)
    out = np.full(SHAPE, np.nan, np.float32)
    _team._team.prepare(threads - 1)
    assert entered(made, X, out, residual) is True
    assert (out == long).all()
    assert (made(X, residual=residual) == long).all()
    assert entered(made, X, out) is None
    kept = residual.copy()
    assert entered(made, X, residual, residual) is None  # what is stored would be read again
    assert (made(X, out=residual, residual=residual) == long).all()
    residual[...] = kept
    for odd in (residual.astype(np.float64), residual[:1], residual[:, ::-1], None):
        assert entered(made, X, out, odd) is None
    with pytest.raises(ConvDispatchError, match="residual is missing"):
        made(X, out=out)


def test_a_residual_of_bands_and_of_a_pickled_plan_goes_this_way_too() -> None:
    x, w = RNG.standard_normal((1, 16, 40, 40), np.float32), RNG.standard_normal((3, 3, 16, 16), np.float32)
    how: dict[str, Any] = {"data_format": "NCHW", "backend": ("implicit_gemm", {"threads": 2})}
    made = pickle.loads(pickle.dumps(convdispatch.plan(x, w, residual=True, **how)))
    residual = RNG.standard_normal((1, 16, 40, 40), np.float32)
    expected = convdispatch.conv2d(x, w, data_format="NCHW", residual=residual, backend="direct")
    for _ in range(3):
        np.testing.assert_allclose(made(x, residual=residual), expected, rtol=1e-4, atol=1e-4)
    assert made._enter is not None
