"""What is wrong with a call is said by name: the argument, what came, what would do. One row a case."""

from typing import Any

import numpy as np
import pytest

import convdispatch
from convdispatch import settings
from convdispatch.arguments import Array
from convdispatch.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendRejectedError,
    ConvDispatchError,
    UnknownBackendError,
    in_a_line,
)

X = np.ones((2, 5, 6, 4), np.float32)
W = np.ones((3, 3, 4, 8), np.float32)
Y = (2, 5, 6, 8)


def ones(*shape: int, dtype: Any = np.float32) -> Array:
    return np.ones(shape, dtype)


def read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array


#: What is changed about a good call, the kind of error, and words that its message must contain.
ROWS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    # Arrays
    "input of rank 3": (
        {"input": ones(5, 6, 4)}, ArgumentError, ("input", "4 dimensions", "NHWC", "(5, 6, 4)", "input[None]")
    ),
    "input of rank 2": ({"input": ones(5, 6)}, ArgumentError, ("input", "input[None, :, :, None]")),
    "input of rank 5": ({"input": ones(1, 2, 5, 6, 4)}, ArgumentError, ("input", "4 dimensions", "(1, 2, 5, 6, 4)")),
    "scalar input": ({"input": np.float32(3)}, ArgumentError, ("input", "4 dimensions", "got 0")),
    "filters of rank 2": (
        {"filters": ones(3, 3)}, ArgumentError, ("filters", "4 dimensions", "HWIO", "(3, 3)", "[:, :, None, None]")
    ),
    "one filter for all channels": ({"filters": ones(3, 3, 1, 1)}, ArgumentError, ("4 channels", "repeat it")),
    "a border mode": ({"padding": "reflect"}, ArgumentError, ("padding", "'reflect'", "np.pad", "'VALID'")),
    "an array as strides": ({"strides": X}, ArgumentTypeError, ("strides",)),
    "an integer image under a float filter": (
        {"input": X.astype(np.uint8)}, ArgumentTypeError, ("uint8", "convert the input with astype('float32')")
    ),
    "input is None": ({"input": None}, ArgumentTypeError, ("input", "NoneType")),
    "filters are text": ({"filters": "sobel"}, ArgumentTypeError, ("filters", "str")),
    "ragged lists": ({"input": [[1.0], [1.0, 2.0]]}, ArgumentTypeError, ("input", "list")),
    "a masked array": ({"input": np.ma.masked_array(X, X > 2)}, ArgumentTypeError, ("input", "masked")),
    # Dtypes
    "bool input": ({"input": X > 0}, ArgumentTypeError, ("input", "bool")),
    "complex input": (
        {"input": X + 1j}, ArgumentTypeError, ("input", "complex64")
    ),
    "object filters": ({"filters": W.astype(object)}, ArgumentTypeError, ("filters", "object")),
    "unsigned 64-bit input": (
        {"input": X.astype(np.uint64)}, ArgumentTypeError, ("input", "uint64")
    ),
    "dates": ({"input": X.astype("M8[s]")}, ArgumentTypeError, ("input", "datetime64")),
    "mixed floats": (
        {"filters": W.astype(np.float64)}, ArgumentTypeError, ("input", "filters", "float32", "float64", "astype")
    ),
    "float and integer": ({"input": X.astype(np.int32)}, ArgumentTypeError, ("int32", "float32")),
    "signed and unsigned": (
        {"input": X.astype(np.uint8), "filters": W.astype(np.int8)}, ArgumentTypeError, ("uint8", "int8")
    ),
    # Channels and groups
    "channels that do not divide": ({"filters": ones(3, 3, 3, 8)}, ArgumentError, ("filters", "4 channels", "3")),
    "filters with more channels": ({"filters": ones(3, 3, 8, 8)}, ArgumentError, ("filters", "4 channels", "8")),
    "filters without channels": ({"filters": ones(3, 3, 0, 8)}, ArgumentError, ("filters", "4 channels", "0")),
    "input without channels": ({"input": ones(2, 5, 6, 0)}, ArgumentError, ("filters", "4 channels", "none")),
    "filters that groups do not divide": ({"filters": ones(3, 3, 1, 6)}, ArgumentError, ("groups=4", "6 filters")),
    "groups that contradict": ({"groups": 2}, ArgumentError, ("filters", "4 / 2", "groups is 2")),
    "groups of 0": ({"groups": 0}, ArgumentError, ("groups", "at least 1", "0")),
    "negative groups": ({"groups": -2}, ArgumentError, ("groups", "at least 1", "-2")),
    "groups as a float": ({"groups": 2.0}, ArgumentTypeError, ("groups", "2.0")),
    "groups as a bool": ({"groups": True}, ArgumentTypeError, ("groups", "True")),
    "a filter without rows": ({"filters": ones(0, 3, 4, 8)}, ArgumentError, ("filters", "1x1", "0x3")),
    # Strides and dilations
    "stride 0": ({"strides": 0}, ArgumentError, ("strides", "at least 1", "0")),
    "negative stride": ({"strides": (1, -2)}, ArgumentError, ("strides", "at least 1", "(1, -2)")),
    "stride as a bool": ({"strides": True}, ArgumentTypeError, ("strides", "True")),
    "stride as a float": ({"strides": 2.0}, ArgumentTypeError, ("strides", "2.0")),
    "stride as text": ({"strides": "2"}, ArgumentTypeError, ("strides", "'2'")),
    "stride of None": ({"strides": None}, ArgumentTypeError, ("strides", "None")),
    "a float among strides": ({"strides": (1, 1.5)}, ArgumentTypeError, ("strides", "1.5")),
    "three strides": ({"strides": [1, 2, 2]}, ArgumentError, ("strides", "[1, 2, 2]", "four ints")),
    "five strides": ({"strides": [1, 1, 1, 1, 1]}, ArgumentError, ("strides", "four ints")),
    "no strides": ({"strides": []}, ArgumentError, ("strides", "[]")),
    "a stride over the batch": ({"strides": [2, 1, 1, 1]}, ArgumentError, ("strides", "N and C", "[2, 1, 1, 1]")),
    "a stride over channels": ({"strides": [1, 1, 1, 2]}, ArgumentError, ("strides", "N and C", "NHWC")),
    "NHWC strides for NCHW": (
        {"strides": [1, 2, 2, 1], "data_format": "NCHW", "input": ones(2, 4, 5, 6)},
        ArgumentError,
        ("strides", "N and C", "NCHW"),
    ),
    "stride as an array of a float": ({"strides": np.array(2.0)}, ArgumentTypeError, ("strides", "array(2.)")),
    "stride as an array of a bool": ({"strides": np.array(True)}, ArgumentTypeError, ("strides", "array(True)")),
    "dilation 0": ({"dilations": 0}, ArgumentError, ("dilations", "at least 1", "0")),
    "a dilation over channels": ({"dilations": [1, 1, 1, 3]}, ArgumentError, ("dilations", "N and C")),
    "dilation as a float": ({"dilations": (1.0, 1.0)}, ArgumentTypeError, ("dilations", "1.0")),
    # Padding
    "an unknown padding": ({"padding": "FULL"}, ArgumentError, ("padding", "'FULL'", "'SAME'", "'VALID'")),
    "padding in small letters": ({"padding": "same"}, ArgumentError, ("padding", "'same'", "did you mean 'SAME'")),
    "negative padding": ({"padding": -1}, ArgumentError, ("padding", "negative", "-1")),
    "negative padding of a side": (
        {"padding": ((0, 0), (0, -3))}, ArgumentError, ("padding", "negative", "((0, 0), (0, -3))")
    ),
    "padding as a float": ({"padding": 1.0}, ArgumentTypeError, ("padding", "1.0")),
    "padding as a bool": ({"padding": True}, ArgumentTypeError, ("padding", "True")),
    "padding of None": ({"padding": None}, ArgumentTypeError, ("padding", "None")),
    "padding as bytes": ({"padding": b"SAME"}, ArgumentTypeError, ("padding", "b'SAME'")),
    "padding as an array of text": ({"padding": np.array("SAME")}, ArgumentTypeError, ("padding", "array('SAME'")),
    "arrays of a float as pads": (
        {"padding": (np.array(1.0), np.array(1))}, ArgumentTypeError, ("padding", "array(1.)")
    ),
    "three pads": ({"padding": (1, 1, 1)}, ArgumentError, ("padding", "(1, 1, 1)")),
    "four flat pads": ({"padding": (0, 1, 1, 0)}, ArgumentError, ("padding", "(0, 1, 1, 0)", "four pairs")),
    "a pair and a number": ({"padding": ((1, 1), 1)}, ArgumentError, ("padding", "((1, 1), 1)")),
    "a triple as a pair": ({"padding": ((1, 1, 1), (1, 1))}, ArgumentError, ("padding", "(1, 1, 1)")),
    "padding of the batch": (
        {"padding": ((1, 0), (1, 1), (1, 1), (0, 0))}, ArgumentError, ("padding", "N and C", "((1, 0)")
    ),
    "padding of channels": (
        {"padding": ((0, 0), (1, 1), (1, 1), (0, 2))}, ArgumentError, ("padding", "N and C", "NHWC")
    ),
    "NHWC padding for NCHW": (
        {"padding": ((0, 0), (1, 1), (1, 1), (0, 0)), "data_format": "NCHW", "input": ones(2, 4, 5, 6)},
        ArgumentError,
        ("padding", "N and C", "NCHW"),
    ),
    # Size
    "a filter with too many rows": (
        {"filters": ones(6, 1, 4, 8), "padding": "VALID"}, ArgumentError, ("filters", "6 rows", "5")
    ),
    "a filter with too many columns": (
        {"filters": ones(1, 7, 4, 8), "padding": "VALID"}, ArgumentError, ("filters", "7 columns", "6")
    ),
    "a filter too long by dilation": (
        {"dilations": (3, 1), "padding": "VALID"}, ArgumentError, ("filters", "7 rows", "dilation", "5")
    ),
    "a filter longer than image and padding": (
        {"filters": ones(9, 3, 4, 8), "padding": 1}, ArgumentError, ("filters", "9 rows", "5", "2 of padding")
    ),
    # What int64 does not hold
    "a stride beyond int64": ({"strides": 10**20}, ArgumentError, ("strides", "at most", str(10**20))),
    "a stride that overflows": ({"strides": 2**63 - 1}, ArgumentError, ("strides", "at most", str(2**63 - 1))),
    "a dilation beyond int64": ({"dilations": (1, 2**63)}, ArgumentError, ("dilations", "at most", str(2**63))),
    "padding beyond int64": ({"padding": 10**20}, ArgumentError, ("padding", "at most", str(10**20))),
    "padding beyond any array": ({"padding": 10**12}, ArgumentError, ("padding", "2000000000005", "smaller")),
    "padding beyond any array, with strides as large": (
        {"padding": 10**17, "strides": 10**17}, ArgumentError, ("padding", "at most")
    ),
    "a dilation that pads beyond any array": ({"dilations": 2**62}, ArgumentError, ("dilations", "at most")),
    # Formats
    "an unknown data format": ({"data_format": "NCWH"}, ArgumentError, ("data_format", "'NCWH'", "NHWC, NCHW")),
    "a data format of None": ({"data_format": None}, ArgumentTypeError, ("data_format", "None")),
    "an unknown filter format": ({"filter_format": "IOHW"}, ArgumentError, ("filter_format", "'IOHW'", "HWIO, OIHW")),
    "a filter format of 3": ({"filter_format": 3}, ArgumentTypeError, ("filter_format", "3")),
    # Activation
    "an unknown activation": ({"activation": "swish"}, ArgumentError, ("activation", "'swish'", "silu")),
    "an activation function": ({"activation": np.tanh}, ArgumentTypeError, ("activation", "ufunc")),
    "a missing slope": ({"activation": "leaky_relu"}, ArgumentError, ("leaky_relu", "slope")),
    "a slope that is no number": ({"activation": ("leaky_relu", "x")}, ArgumentError, ("leaky_relu", "slope", "'x'")),
    "an infinite slope": ({"activation": ("leaky_relu", np.inf)}, ArgumentError, ("leaky_relu", "slope", "inf")),
    "a slope that no float holds": ({"activation": ("leaky_relu", 10**400)}, ArgumentError, ("leaky_relu", "slope")),
    "a slope too many": ({"activation": ("relu", 0.1)}, ArgumentError, ("relu", "no slope", "0.1")),
    "two slopes": ({"activation": ("leaky_relu(0.1)", 0.5)}, ArgumentError, ("leaky_relu(0.1)", "0.5", "twice")),
    "three parts of an activation": ({"activation": ("leaky_relu", 1, 2)}, ArgumentTypeError, ("activation",)),
    "an activation without integers": (
        {"input": X.astype(np.int8), "filters": W.astype(np.int8), "activation": "gelu"},
        ArgumentError,
        ("activation", "gelu", "int8"),
    ),
    # Bias and residual
    "too short a bias": ({"bias": ones(7)}, ArgumentError, ("bias", "(8,)", "(7,)")),
    "a bias of rank 2": ({"bias": ones(1, 8)}, ArgumentError, ("bias", "(8,)", "(1, 8)")),
    "a scalar bias": ({"bias": np.float32(1)}, ArgumentError, ("bias", "(8,)", "()")),
    "a bias of another dtype": (
        {"bias": ones(8, dtype=np.float64)}, ArgumentTypeError, ("bias", "float32", "float64")
    ),
    "a bias of the input's small dtype": (
        {"input": X.astype(np.int8), "filters": W.astype(np.int8), "bias": ones(8, dtype=np.int8)},
        ArgumentTypeError,
        ("bias", "int32", "int8"),
    ),
    "a bias of text": ({"bias": "none"}, ArgumentTypeError, ("bias",)),
    "a residual of another shape": (
        {"residual": ones(2, 5, 6, 4)}, ArgumentError, ("residual", str(Y), "(2, 5, 6, 4)")
    ),
    "a residual of another dtype": (
        {"residual": ones(*Y, dtype=np.float16)}, ArgumentTypeError, ("residual", "float32", "float16")
    ),
    # Out
    "out of another shape": ({"out": ones(2, 5, 6, 4)}, ArgumentError, ("out", str(Y), "(2, 5, 6, 4)")),
    "out of another dtype": (
        {"out": ones(*Y, dtype=np.float64)}, ArgumentTypeError, ("out", "float32", "float64")
    ),
    "read-only out": ({"out": read_only(ones(*Y))}, ArgumentError, ("out", "read-only", "writable")),
    "a masked out": ({"out": np.ma.masked_array(ones(*Y), ones(*Y) > 0)}, ArgumentTypeError, ("out", "masked")),
    "out as a list": ({"out": [1.0]}, ArgumentTypeError, ("out", "list")),
    # Backend
    "an unknown backend": ({"backend": "winogard"}, UnknownBackendError, ("'winogard'", "did you mean 'winograd'")),
    "a backend like no other": ({"backend": "zzz"}, UnknownBackendError, ("'zzz'", "direct", "fft")),
    "a backend of 3": ({"backend": 3}, ArgumentTypeError, ("backend", "3")),
    "a config that is none": ({"backend": ("fft", 3)}, ArgumentTypeError, ("backend", "('fft', 3)")),
    "an unhashable config": ({"backend": ("fft", {"tile": [8]})}, ArgumentTypeError, ("backend", "[8]")),
    "three parts of a backend": ({"backend": ("fft", {}, 1)}, ArgumentTypeError, ("backend", "('fft', {}, 1)")),
    "winograd with a stride of 3": (
        {"backend": "winograd", "strides": 3}, BackendRejectedError, ("'winograd'", "strides", "stride=3")
    ),
    "winograd with 8x8 filters": (
        {"backend": "winograd", "filters": ones(8, 8, 4, 8), "padding": 4}, BackendRejectedError,
        ("'winograd'", "8x8", "2 to 7"),
    ),
    "fft with integers": (
        {"backend": "fft", "input": X.astype(np.int16), "filters": W.astype(np.int16)},
        BackendRejectedError,
        ("'fft'", "integers"),
    ),
    "winograd with m=3": ({"backend": ("winograd", {"m": 3})}, ArgumentError, ("winograd", "m=3")),
    "fft with too small a tile": ({"backend": ("fft", {"tile": 2})}, ArgumentError, ("fft", "tile", "3", "2")),
    "fft with a tile of text": ({"backend": ("fft", {"tile": "8"})}, ArgumentError, ("tile", "'8'")),
    "im2col with empty blocks": (
        {"backend": ("im2col", {"block_kib": 0})}, ArgumentError, ("im2col", "block_kib", "0")
    ),
    "numba with an unknown loop": (
        {"backend": ("numba", {"loop": "rows"})}, ArgumentError, ("numba", "loop", "'rows'")
    ),
    "numba with a depthwise loop": (
        {"backend": ("numba", {"loop": "channels"})}, ArgumentError, ("numba", "channels", "one")
    ),
    "numba with empty blocks": ({"backend": ("numba", {"block": -1})}, ArgumentError, ("numba", "block", "-1")),
}  # fmt: skip
for _name in ("im2col", "fft", "winograd", "numba"):
    ROWS[f"{_name} with 0 threads"] = ({"backend": (_name, {"threads": 0})}, ArgumentError, ("threads", "0"))
    ROWS[f"{_name} with half a thread"] = (
        {"backend": (_name, {"threads": 0.5})},
        ArgumentTypeError,
        ("threads", "0.5"),
    )


@pytest.mark.parametrize("row", ROWS)
def test_conv2d_refuses(row: str) -> None:
    changes, kind, words = ROWS[row]
    call = {"input": X, "filters": W, **changes}
    with pytest.raises(kind) as caught:
        convdispatch.conv2d(**call)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert isinstance(caught.value, TypeError if kind is ArgumentTypeError else ValueError)
    assert isinstance(caught.value, ConvDispatchError)
    assert caught.value.__cause__ is None  # it is our words that a person reads, not two stacked errors


#: Arguments that a plan takes only when it is called, or not at all.
AT_THE_CALL = {"out", "residual"}


@pytest.mark.parametrize("row", [row for row, (changes, _, _) in ROWS.items() if not AT_THE_CALL & changes.keys()])
def test_plan_refuses_the_same(row: str) -> None:
    changes, kind, words = ROWS[row]
    call = {"input": X, "filters": W, **changes}
    if call["input"] is None or isinstance(call["input"], list | np.float32):
        pytest.skip("a plan takes a shape where conv2d takes an array")
    with pytest.raises(kind) as caught:
        convdispatch.plan(**call)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        ({"input": ones(2, 5, 6, 3)}, ArgumentError, ("input", "(2, 5, 6, 4)", "(2, 5, 6, 3)")),
        ({"input": X[0]}, ArgumentError, ("input", "(2, 5, 6, 4)", "(5, 6, 4)")),
        ({"input": X.astype(np.float64)}, ArgumentTypeError, ("input", "float32", "float64")),
        ({"input": "x"}, ArgumentTypeError, ("input",)),
        ({"input": X, "residual": ones(*Y)}, ArgumentError, ("residual", "without")),
        ({"input": X, "out": ones(2, 5, 6, 7)}, ArgumentError, ("out", str(Y), "(2, 5, 6, 7)")),
        ({"input": X, "out": "y"}, ArgumentTypeError, ("out", "str")),
        ({"input": X, "out": np.ma.masked_array(ones(*Y))}, ArgumentTypeError, ("out", "masked")),
    ],
)
def test_a_plan_refuses_when_called(call: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    plan = convdispatch.plan(X, W)
    with pytest.raises(kind) as caught:
        plan(**call)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_messages_are_short_whatever_came() -> None:
    much = np.ones((1, 32, 32, 4), np.float32)
    for wrong in ({"strides": much}, {"padding": much.tolist()}, {"groups": much}, {"activation": much.tolist()}):
        with pytest.raises(ConvDispatchError) as told:
            convdispatch.conv2d(X, W, **wrong)
        assert len(str(told.value)) < 400, wrong.keys()
    with pytest.raises(ArgumentTypeError, match="input must be an array, or a shape") as told:
        convdispatch.plan(much.tolist(), W)
    assert len(str(told.value)) < 400


@pytest.mark.parametrize("residual", [ones(*Y), "no", 1, None])
def test_plan_refuses_a_residual_that_is_no_bool(residual: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"residual must be True or False.*pass it to the plan's calls"):
        convdispatch.plan(X, W, residual=residual)


def test_a_plan_made_for_a_residual_wants_one() -> None:
    plan = convdispatch.plan(X, W, residual=True)
    with pytest.raises(ArgumentError, match=r"residual is missing.*\(2, 5, 6, 8\)"):
        plan(X)


@pytest.mark.parametrize(
    ("shape", "kind", "words"),
    [
        ((5, 6, 4), ArgumentError, ("input", "4 dimensions", "(5, 6, 4)")),
        ((2, 5, -6, 4), ArgumentError, ("input", "(2, 5, -6, 4)")),
        ((2, 5, 6.0, 4), ArgumentTypeError, ("input", "6.0")),
        (None, ArgumentTypeError, ("input", "None")),
        (5, ArgumentTypeError, ("input", "5")),
        ((1, 10**20, 6, 4), ArgumentError, ("input", str(10**20), "elements")),
        ((1, 2**30, 2**30, 4), ArgumentError, ("input", "1073741824", "elements")),
        ((0, 2**30, 2**30, 4), ArgumentError, ("input", "1073741824", "elements")),
    ],
)
def test_plan_refuses_a_shape_that_is_none(shape: Any, kind: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(kind) as caught:
        convdispatch.plan(shape, W)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize("dtype", ["complex64", "float8", bool, object(), "f4,f4"])
def test_plan_refuses_a_dtype_that_cannot_be_convolved(dtype: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="dtype"):
        convdispatch.plan((2, 5, 6, 4), W, dtype=dtype)


def test_plan_refuses_a_dtype_other_than_the_filters() -> None:
    with pytest.raises(ArgumentTypeError, match="dtype must be the filters' or None; got float64, filters are float32"):
        convdispatch.plan((2, 5, 6, 4), W, dtype="float64")


def test_plan_refuses_a_dtype_other_than_its_example() -> None:
    with pytest.raises(ArgumentTypeError, match=r"dtype.*float64.*input.*float32"):
        convdispatch.plan(X, W, dtype="float64")
    assert convdispatch.plan(X, W, dtype=np.float32).problem == convdispatch.plan(X, W).problem


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"acuracy": "strict"}, ArgumentTypeError, ("acuracy", "did you mean 'accuracy'")),
        ({"accuracy": "perfect"}, ArgumentError, ("accuracy", "'perfect'", "strict")),
        ({"accuracy": 2.0}, ArgumentError, ("accuracy", "2.0")),
        ({"threads": 0}, ArgumentError, ("threads", "0")),
        ({"threads": 1.5}, ArgumentTypeError, ("threads", "1.5")),
        ({"threads": True}, ArgumentTypeError, ("threads", "True")),
        ({"memory_limit": "much"}, ArgumentError, ("memory_limit", "'much'", "256MiB")),
        ({"memory_limit": -1}, ArgumentError, ("memory_limit", "-1")),
        ({"tuning": "always"}, ArgumentError, ("tuning", "'always'", "on-miss")),
        ({"effort": "maximal"}, ArgumentError, ("effort", "'maximal'", "exhaustive")),
        ({"time_limit": "soon"}, ArgumentError, ("time_limit", "'soon'")),
        ({"time_limit": -1}, ArgumentError, ("time_limit", "-1")),
        ({"forbid": (1,)}, ArgumentTypeError, ("forbid", "(1,)")),
        ({"forbid": 3}, ArgumentTypeError, ("forbid", "3")),
    ],
)
def test_options_refuse(changes: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(kind) as caught, convdispatch.options(**changes):
        pass
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_options_that_leave_no_backend_say_so() -> None:
    with convdispatch.options(forbid=convdispatch.backends()), pytest.raises(BackendRejectedError) as caught:
        convdispatch.conv2d(X, W)
    assert "direct: forbidden by options" in str(caught.value)


def test_nothing_is_half_written_when_a_call_is_refused() -> None:
    out = np.full(Y, 7, np.float32)
    for changes in ({"bias": ones(3)}, {"residual": ones(1)}, {"strides": 0}, {"backend": "fttf"}):
        with pytest.raises(ConvDispatchError):
            convdispatch.conv2d(X, W, out=out, **changes)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("said", "limit", "line"),
    [
        (ValueError("two\n  lines"), None, "two lines"),
        ("a b  c", 5, "a b c"),
        ("a b c d", 6, "a b..."),
        ("RuntimeError: " + "x" * 400, 30, "RuntimeError: " + "x" * 13 + "..."),
        (ValueError(), 10, ""),
    ],
)
def test_what_was_said_fits_in_a_line(said: object, limit: int | None, line: str) -> None:
    assert in_a_line(said, limit) == line


def test_a_memory_limit_may_be_any_whole_number() -> None:
    with convdispatch.options(memory_limit=np.int64(1 << 20)) as chosen:
        assert (chosen.memory_limit, type(chosen.memory_limit)) == (1 << 20, int)


@pytest.mark.parametrize("value", [-1, np.int64(-1), 1.5, True, np.float32(3), "much", [1]])
def test_a_memory_limit_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match="memory_limit must be bytes or a text such as '256MiB'; got "):
        settings.parse_bytes(value)
