"""From what a caller writes (TensorFlow's forms of strides, padding, dilations) to a ``Problem``."""

import difflib
import functools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from convdispatch import epilogue
from convdispatch.epilogue import Epilogue, parse_activation
from convdispatch.errors import ArgumentError, ArgumentTypeError, shown
from convdispatch.problem import DATA_FORMATS, DTYPES, FLOATS, LARGEST, PADDINGS, Pads, Problem, dtype_of, padding_of
from convdispatch.said import whole_number

Array = epilogue.Array
FILTER_FORMATS = ("HWIO", "OIHW")
#: What people do with a problem: filters are packed once, or in every call.
DEPLOYMENTS = ("plan", "call")


@functools.cache
def name_of(dtype: np.dtype[Any]) -> str:
    """Return a dtype's name; NumPy's own property works it out each time."""
    return str(dtype.name)


def as_array(name: str, value: Any) -> Array:
    """Return ``value`` as an array of one of the dtypes that can be convolved.

    Raises:
        ArgumentTypeError: naming the argument, if it is no array or has another dtype.
    """
    if type(value) is not np.ndarray and isinstance(value, np.ma.MaskedArray):  # np.ma takes 40 ms to load
        raise ArgumentTypeError(f"{name} must not be a masked array, since masks have no meaning here; fill it first")
    try:
        array: Array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"{name} must be an array; got {type(value).__name__}: {error}") from None
    if name_of(array.dtype) not in DTYPES:
        got = f"{type(value).__name__} of dtype {array.dtype}"
        raise ArgumentTypeError(f"{name} must be an array of {', '.join(DTYPES)}; got {got}")
    return array


def dtype_name(value: Any) -> str:
    """Return the name of a dtype given as a name, a type or a ``numpy.dtype``.

    Raises:
        ArgumentTypeError: if it is none that can be convolved.
    """
    name = value
    if not isinstance(value, str) or value not in DTYPES:
        try:
            name = np.dtype(value).name
        except TypeError:
            name = repr(value)
    if name not in DTYPES:
        raise ArgumentTypeError(f"dtype must be one of {', '.join(DTYPES)}; got {shown(value)}")
    return str(name)


def check_deployment(value: Any) -> None:
    """Raise an ``ArgumentError`` unless this is a deployment."""
    if value not in DEPLOYMENTS:
        raise ArgumentError(f"deployment must be {' or '.join(DEPLOYMENTS)}; got {shown(value)}")


def check_deployments(deployments: Sequence[str]) -> None:
    """Raise an ``ArgumentError`` unless all of these are deployments."""
    for deployment in [deployments] if isinstance(deployments, str) else deployments:
        if deployment not in DEPLOYMENTS or isinstance(deployments, str):
            raise ArgumentError(f"deployments must be a list of {' or '.join(DEPLOYMENTS)}; got {deployment!r}")


def check_same_dtype(input: str, filters: np.dtype[Any]) -> None:
    """Raise an ``ArgumentTypeError`` unless filters are of the input's dtype, of which this is the name."""
    if name_of(filters) != input:
        floats = [name for name in (input, filters.name) if name in FLOATS]
        if len(floats) == 1:
            remedy = f"convert the {'filters' if floats[0] == input else 'input'} with astype({floats[0]!r})"
        elif floats:
            remedy = "convert one with astype"
        else:
            remedy = "convert both to a dtype that holds all their values, such as int16 or float32"
        raise ArgumentTypeError(f"input and filters must have one dtype; got {input} and {filters.name}: {remedy}")


def check_filters(problem: Problem, filters: Array, filter_format: str) -> Array:
    """Return filters as a native, aligned view ``[KH, KW, C // groups, K]`` of the problem's dtype."""
    view = filters.transpose(2, 3, 1, 0) if filter_format == "OIHW" else filters
    dtype = dtype_of(problem.dtype)
    if view.dtype is dtype or (view.dtype == dtype and view.flags.aligned):
        return view
    return view.astype(dtype)


def check_bias(problem: Problem, bias: Any) -> Array:
    """Return a bias as a native array ``[K]``.

    Raises:
        ArgumentError: for a wrong shape.
        ArgumentTypeError: for a dtype other than the result's.
    """
    array = as_array("bias", bias)
    if array.shape != (problem.k,):
        raise ArgumentError(f"bias must have shape ({problem.k},), one value a filter; got {array.shape}")
    if array.dtype.name != problem.result_dtype:
        got, right = array.dtype.name, problem.result_dtype
        raise ArgumentTypeError(f"bias must be {right}, as the result is; got {got}: np.asarray(bias, {right!r})")
    return array.astype(dtype_of(problem.result_dtype), copy=False)


def make_problem(
    input_shape: Any,
    filter_shape: Any,
    dtype: str,
    strides: Any = 1,
    padding: Any = "SAME",
    data_format: Any = "NHWC",
    dilations: Any = 1,
    groups: Any = None,
    filter_format: Any = "HWIO",
    activation: Any = None,
    *,
    bias: bool = False,
    residual: bool = False,
) -> Problem:
    """Check the arguments of ``conv2d`` and return the problem they pose.

    Args:
        input_shape: four sizes in ``data_format`` order.
        filter_shape: four sizes in ``filter_format`` order.
        dtype: name of the common dtype.
        strides, padding, data_format, dilations, groups, filter_format, activation: as in ``conv2d``.
        bias, residual: whether there is one.

    Raises:
        ArgumentError, ArgumentTypeError: naming the argument, what was given and what would be right.
    """
    given = (
        input_shape,
        filter_shape,
        dtype,
        strides,
        padding,
        data_format,
        dilations,
        groups,
        filter_format,
        activation,
    )
    # Remembered only where equal arguments mean the same: True and 1.0 are equal to 1 and are errors.
    shapes = type(input_shape) is type(filter_shape) is tuple
    if shapes and all(type(value) in _PLAIN for value in given[2:]) and _all_ints(input_shape + filter_shape):
        return _remembered(*given, bias, residual)
    return _make_problem(*given, bias, residual)


_PLAIN = (int, str, type(None))


def _all_ints(sizes: tuple[Any, ...]) -> bool:
    return all(type(size) is int for size in sizes)


def _make_problem(
    input_shape: Any,
    filter_shape: Any,
    dtype: str,
    strides: Any,
    padding: Any,
    data_format: Any,
    dilations: Any,
    groups: Any,
    filter_format: Any,
    activation: Any,
    bias: bool,
    residual: bool,
) -> Problem:
    _one_of("data_format", data_format, DATA_FORMATS)
    _one_of("filter_format", filter_format, FILTER_FORMATS)
    n, h, w, c = _shape("input", input_shape, data_format)
    if data_format == "NCHW":
        h, w, c = w, c, h
    kh, kw, group_c, k = _shape("filters", filter_shape, filter_format)
    if filter_format == "OIHW":
        kh, kw, group_c, k = group_c, k, kw, kh
    if kh < 1 or kw < 1:
        raise ArgumentError(f"filters must be at least 1x1; got {kh}x{kw} in shape {tuple(filter_shape)}")
    step = pair("strides", strides, data_format)
    spread = pair("dilations", 1 if dilations is None else dilations, data_format)
    name, slope = parse_activation(activation)
    return Problem(
        n=n, h=h, w=w, c=c, k=k, kh=kh, kw=kw,
        pads=_pads(padding, data_format, (h, w), (kh, kw), step, spread),
        strides=step,
        dilations=spread,
        groups=_groups(groups, c, group_c, k),
        dtype=dtype,
        data_format=data_format,
        epilogue=Epilogue(bias, residual, name, slope),
    )  # fmt: skip


_remembered = functools.lru_cache(maxsize=4096)(_make_problem)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{name} must be one of {', '.join(allowed)}; got {shown(value)}")
    if value not in allowed:
        raise ArgumentError(f"{name} must be one of {', '.join(allowed)}; got {shown(value)}")


#: How what people have becomes an array of four dimensions.
_REMEDIES = {
    ("input", 2): ": take input[None, :, :, None] of an image",
    ("input", 3): ": take input[None] of one image with channels",
    ("filters", 2): ": take filters[:, :, None, None] of one filter",
}


def _shape(name: str, shape: Any, layout: str) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise ArgumentTypeError(
            f"{name} must be an array, or a shape of four whole numbers; got {shown(shape)}"
        ) from None
    if len(sizes) != 4:
        given = f"{len(sizes)}, shape {sizes}{_REMEDIES.get((name, len(sizes)), '')}"
        raise ArgumentError(f"{name} must have 4 dimensions, {layout}; got {given}")
    if min(sizes) < 0:
        raise ArgumentError(f"{name} must have a shape of four whole numbers; got {sizes}")
    return sizes


def _whole(name: str, value: Any, what: str) -> int:
    if (whole := whole_number(value)) is None:
        raise ArgumentTypeError(f"{name} must be {what}; got {shown(value)}")
    return whole


def _is_list(value: Any) -> bool:
    """Return whether a value stands for several; an array of no dimension is a number like NumPy's own."""
    return isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim > 0)


def pair(name: str, value: Any, data_format: str = "NHWC") -> tuple[int, int]:
    """Return (rows, columns) from an int, a pair, or TensorFlow's list of four in data-format order."""
    what = f"an int, (h, w), or four ints in {data_format} order with 1 for N and C"
    if isinstance(value, str | bytes):
        raise ArgumentTypeError(f"{name} must be {what}; got {shown(value)}")
    numbers = [_whole(name, item, what) for item in (value if _is_list(value) else [value])]
    if len(numbers) == 4:
        rest = [numbers[axis] for axis in ((0, 3) if data_format == "NHWC" else (0, 1))]
        if rest != [1, 1]:
            raise ArgumentError(f"{name} must be 1 along N and C ({data_format}); got {shown(value)}")
        numbers = numbers[1:3] if data_format == "NHWC" else numbers[2:]
    if len(numbers) not in {1, 2}:
        raise ArgumentError(f"{name} must be {what}; got {shown(value)}")
    if min(numbers) < 1:
        raise ArgumentError(f"{name} must be at least 1; got {shown(value)}")
    return numbers[0], numbers[-1]


def _groups(groups: Any, c: int, group_c: int, k: int) -> int:
    if groups is None:
        if c and (not group_c or c % group_c):
            raise ArgumentError(
                f"filters must take a divisor of the input's {c} channels; they take {group_c} channels each "
                "(channels are where data_format and filter_format say)"
            )
        groups = c // group_c if c else 1
        if not c and group_c:
            raise ArgumentError(f"filters take {group_c} channels each, but the input has none")
    else:
        groups = _whole("groups", groups, "a whole number of at least 1, or None")
        if groups < 1:
            raise ArgumentError(f"groups must be at least 1, or None; got {groups}")
    if groups * group_c != c:
        raise ArgumentError(
            f"filters must take C / groups = {c} / {groups} channels each; they take {group_c}"
            f" (the input has {c} channels, groups is {groups})"
        )
    if k % groups:
        repeated = "; for the same filter on every channel, repeat it" if k == 1 and group_c == 1 else ""
        raise ArgumentError(
            f"filters must number a multiple of groups; got {k} filters, groups={groups} (the input's {c} channels by "
            f"{group_c} a filter){repeated}"
        )
    return int(groups)


def _pads(
    padding: Any,
    data_format: str,
    image: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
) -> Pads:
    what = (
        f"{', '.join(map(repr, PADDINGS))}, an int, (ph, pw), ((top, bottom), (left, right)), "
        f"or four pairs in {data_format} order with (0, 0) for N and C"
    )
    if isinstance(padding, str):
        if padding not in PADDINGS:
            near = difflib.get_close_matches(padding.upper(), PADDINGS, n=1)
            hint = f": did you mean {near[0]!r}?" if near else "; for other borders, np.pad the input and take 'VALID'"
            raise ArgumentError(f"padding must be {what}; got {shown(padding)}{hint}")
        return padding_of(padding, image, kernel, strides, dilations)
    pads = _explicit_pads(padding, data_format, what)
    if min(pads) < 0:
        raise ArgumentError(f"padding must not be negative; got {shown(padding)}")
    if max(pads) > LARGEST:
        raise ArgumentError(f"padding must be at most {LARGEST}; got {shown(padding)}")
    return pads


def _explicit_pads(padding: Any, data_format: str, what: str) -> Pads:
    if not _is_list(padding) or isinstance(padding, bytes):
        size = _whole("padding", padding, what)
        return size, size, size, size
    items = list(padding)
    if len(items) == 2 and not any(map(_is_list, items)):
        rows, columns = (_whole("padding", item, what) for item in items)
        return rows, rows, columns, columns
    if len(items) not in {2, 4}:
        raise ArgumentError(f"padding must be {what}; got {shown(padding)}")
    pairs = []
    for item in items:
        if not _is_list(item) or isinstance(item, str | bytes) or len(item) != 2:
            raise ArgumentError(f"padding must be {what}; got {shown(padding)}")
        pairs.append((_whole("padding", item[0], what), _whole("padding", item[1], what)))
    if len(pairs) == 4:
        rest = [pairs[axis] for axis in ((0, 3) if data_format == "NHWC" else (0, 1))]
        if rest != [(0, 0), (0, 0)]:
            raise ArgumentError(f"padding must be (0, 0) along N and C ({data_format}); got {shown(padding)}")
        pairs = pairs[1:3] if data_format == "NHWC" else pairs[2:]
    return *pairs[0], *pairs[1]
