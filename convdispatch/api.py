"""``conv2d`` and ``plan``: the two ways to convolve."""

import functools
from typing import Any

import numpy as np

from convdispatch import arguments, dispatch, heuristic, observe, separation
from convdispatch.arguments import Array, as_array, dtype_name, name_of
from convdispatch.errors import ArgumentTypeError
from convdispatch.plan import Plan
from convdispatch.problem import Problem
from convdispatch.question import parse_forced


def conv2d(
    input: Any,
    filters: Any,
    strides: Any = 1,
    padding: Any = "SAME",
    data_format: str = "NHWC",
    dilations: Any = 1,
    *,
    groups: int | None = None,
    filter_format: str = "HWIO",
    bias: Any = None,
    activation: Any = None,
    residual: Any = None,
    out: Array | None = None,
    backend: Any = None,
) -> Array:
    """Convolve a batch of images with filters; means what ``tf.nn.conv2d`` means.

    Args:
        input: ``[N, H, W, C]`` (``data_format="NHWC"``) or ``[N, C, H, W]`` (``"NCHW"``), of any strides; never
            modified. float16, bfloat16, float32, float64, or integers of 8 to 64 bits.
        filters: ``[KH, KW, C // groups, K]`` (``filter_format="HWIO"``) or ``[K, C // groups, KH, KW]``
            (``"OIHW"``), of the input's dtype. They are not flipped. If all are a column times a row each, on one
            channel, or one and the same for each of several, that is noticed, and taken as a chance to be faster.
        strides: an int, ``(h, w)``, or four ints in data-format order with 1 for N and C.
        padding: ``"VALID"``, ``"SAME"``, ``"SAME_LOWER"``, an int, ``(ph, pw)``, ``((top, bottom), (left, right))``,
            or four such pairs in data-format order.
        data_format: order of the input's and the output's axes.
        dilations: as ``strides``.
        groups: parts that channels and filters fall into; ``C // filters.shape[2]`` where None.
        filter_format: order of the filters' axes.
        bias: ``[K]`` of the result's dtype, added to the sums.
        activation: ``"relu"``, ``"relu6"``, ``"silu"``, ``"gelu"``, ``"sigmoid"``, ``"tanh"``, ``"hardswish"`` or
            ``("leaky_relu", slope)``, applied last.
        residual: an array of the output's shape and dtype, added before the activation.
        out: where to store the result.
        backend: None to choose the fastest that is known, a backend's name, or ``(name, {config})``.

    Returns:
        ``out``, or a fresh C-contiguous array ``[N, OH, OW, K]`` or ``[N, K, OH, OW]`` of the input's dtype; int32
        for integers of up to 32 bits.

    Raises:
        ArgumentError: a wrong value (a ``ValueError``).
        ArgumentTypeError: a wrong kind of thing (a ``TypeError``).
        BackendRejectedError: the backend asked for cannot do this; the message says why.

    Examples:
        >>> x = np.ones((1, 5, 5, 3), np.float32)
        >>> w = np.ones((3, 3, 3, 8), np.float32)
        >>> conv2d(x, w, strides=2, padding="SAME").shape
        (1, 3, 3, 8)
    """
    x = as_array("input", input)
    problem, weights, values = _checked(
        x.shape, name_of(x.dtype), filters, bias, residual=residual is not None, filter_format=filter_format,
        strides=strides, padding=padding, data_format=data_format, dilations=dilations, groups=groups,
        activation=activation,
    )  # fmt: skip
    forced = parse_forced(backend)
    run = functools.partial(dispatch.call, problem, weights, values, forced, x, out=out, residual=residual)
    if not observe.is_watched():
        return run()
    return observe.timed(problem, "call", heuristic.budget_of(), run)


def plan(
    input: Any,
    filters: Any,
    strides: Any = 1,
    padding: Any = "SAME",
    data_format: str = "NHWC",
    dilations: Any = 1,
    *,
    groups: int | None = None,
    filter_format: str = "HWIO",
    bias: Any = None,
    activation: Any = None,
    residual: bool = False,
    dtype: Any = None,
    backend: Any = None,
) -> Plan:
    """Choose a backend for filters and an input's shape, and pack the filters once.

    Args:
        input: the input's shape in ``data_format`` order, or an example array, of which only shape and dtype matter.
        filters, strides, padding, data_format, dilations, groups, filter_format, bias, activation: as in ``conv2d``.
        residual: whether calls will pass ``residual=``.
        dtype: the input's dtype; must be the filters', and the example's if there is one. The filters' where None.
        backend: as in ``conv2d``.

    Returns:
        A plan: ``plan(x)``, ``plan(x, out=y)``. Safe to call from many threads, and picklable.

    Raises:
        ArgumentError, ArgumentTypeError, BackendRejectedError: as ``conv2d``.

    Examples:
        >>> layer = plan((1, 5, 5, 3), np.ones((3, 3, 3, 8), np.float32))
        >>> layer(np.ones((1, 5, 5, 3), np.float32)).shape
        (1, 5, 5, 8)
    """
    weights = as_array("filters", filters)
    if isinstance(input, np.ndarray) and input.ndim != 1:  # of one dimension, it is a shape
        shape, given = input.shape, as_array("input", input).dtype
        if dtype is not None and dtype_name(dtype) != dtype_name(given):
            raise ArgumentTypeError(
                f"dtype must be the input's or None; got {dtype_name(dtype)}, input is {given.name}"
            )
    else:
        shape, given = input, weights.dtype if dtype is None else dtype
        if dtype_name(given) != dtype_name(weights.dtype):
            raise ArgumentTypeError(
                f"dtype must be the filters' or None; got {dtype_name(given)}, filters are {weights.dtype.name}"
            )
    problem, packed, values = _checked(
        shape, dtype_name(given), weights, bias, residual=_is_to_come(residual), filter_format=filter_format,
        strides=strides, padding=padding, data_format=data_format, dilations=dilations, groups=groups,
        activation=activation,
    )  # fmt: skip
    return dispatch.make_plan(problem, packed, values, "plan", parse_forced(backend))


def _is_to_come(residual: Any) -> bool:
    """Return whether a plan's calls will pass a residual; one that is given already would say yes and be dropped."""
    if not isinstance(residual, bool | np.bool_):
        got = type(residual).__name__
        raise ArgumentTypeError(f"residual must be True or False here; got {got}: pass it to the plan's calls")
    return bool(residual)


def _checked(
    input_shape: Any,
    dtype: str,
    filters: Any,
    bias: Any,
    *,
    residual: bool,
    filter_format: str,
    **how: Any,
) -> tuple[Problem, Array, Array | None]:
    """Check a call's arguments; return its problem, its filters as HWIO, and its bias.

    Args:
        input_shape: shape of the input in its data format.
        dtype: name of the input's dtype.
        filters, bias: as the caller gave them.
        residual: whether there is one.
        filter_format: ``"HWIO"`` or ``"OIHW"``.
        **how: strides, padding, data_format, dilations, groups, activation.
    """
    weights = as_array("filters", filters)
    arguments.check_same_dtype(dtype, weights.dtype)
    problem = arguments.make_problem(
        input_shape, weights.shape, dtype, filter_format=filter_format, bias=bias is not None, residual=residual, **how
    )
    values = None if bias is None else arguments.check_bias(problem, bias)
    packed = arguments.check_filters(problem, weights, filter_format)
    return separation.noticed(problem, packed), packed, values
