"""Hypothesis strategies that draw whole problems, arrays for them, and what their results are held against."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from convdispatch import separation
from convdispatch.arguments import Array
from convdispatch.backend import Backend, Candidate, Config, Numerics
from convdispatch.epilogue import ACTIVATIONS, INTEGER_ACTIVATIONS, Epilogue
from convdispatch.problem import (
    DATA_FORMATS,
    DTYPES,
    INTEGERS,
    PADDINGS,
    SEPARABLE_DTYPES,
    Problem,
    dtype_of,
    padding_of,
)
from convdispatch.reference import Oracle, Verdict

HAVE_BFLOAT16 = importlib.util.find_spec("ml_dtypes") is not None
USABLE_DTYPES = tuple(name for name in DTYPES if name != "bfloat16" or HAVE_BFLOAT16)
#: Most problems are float32; simpler draws come first, since failures shrink towards the first.
MIXED_DTYPES = ("float32",) * 20 + ("float64",) * 3 + tuple(name for name in USABLE_DTYPES if name[:5] != "float")
MIXED_DTYPES += ("float16",)
FLOAT_DTYPES = ("float32",) * 4 + ("float64",)


@dataclass(frozen=True)
class Case:
    """A problem with numbers: ``x`` is NHWC and ``w`` is HWIO, whatever the problem's data format."""

    problem: Problem
    x: Array
    w: Array
    bias: Array | None
    residual: Array | None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``conv2d`` that pose this problem, input and filters aside."""
        p = self.problem
        return {
            "strides": p.strides,
            "padding": (p.pads[:2], p.pads[2:]),
            "dilations": p.dilations,
            "groups": p.groups,
            "data_format": p.data_format,
            "bias": self.bias,
            "activation": written(p.epilogue),
        }

    @property
    def input(self) -> Array:
        """The input in the problem's data format, C-contiguous."""
        return to_format(self.problem, self.x)

    @property
    def addend(self) -> Array | None:
        """The residual in the problem's data format, C-contiguous."""
        return None if self.residual is None else to_format(self.problem, self.residual)


def written(epilogue: Epilogue) -> str | tuple[str, float] | None:
    """Return an epilogue's activation as a caller writes it."""
    return ("leaky_relu", epilogue.slope) if epilogue.activation == "leaky_relu" else epilogue.activation


def to_format(problem: Problem, array: Array) -> Array:
    """Return an NHWC array in the problem's data format, C-contiguous."""
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2) if problem.data_format == "NCHW" else array)


def from_format(problem: Problem, array: Array) -> Array:
    """Return an array of the problem's data format as NHWC."""
    return array.transpose(0, 2, 3, 1) if problem.data_format == "NCHW" else array


#: Examples of a property by default, see ``conftest``.
_BY_DEFAULT = 40


@st.composite
def epilogues(draw: st.DrawFn, dtype: str = "float32") -> Epilogue:
    """Draw bias, residual and activation; about every second time there is none."""
    if draw(st.booleans()):
        return Epilogue()
    activation = draw(st.sampled_from([None, *(INTEGER_ACTIVATIONS if dtype in INTEGERS else ACTIVATIONS)]))
    slope = draw(st.sampled_from([0.01, 0.25, -0.5, 2.0])) if activation == "leaky_relu" else 0.0
    return Epilogue(draw(st.booleans()), draw(st.booleans()), activation, slope)


@dataclass(frozen=True)
class _Kinds:
    """What kernels are compiled for: each combination costs seconds, and there are hundreds.

    Attributes:
        heights: rows of a filter.
        along: taps of a row, with the stride along it.
        groups: channels and filters of a group.
        multipliers: filters of a channel, where each is a group.
        with_groups: as ``along``, where there are groups.
        dilation: the largest where there are groups.
        floats: what is computed with.
    """

    heights: tuple[int, ...]
    along: tuple[tuple[int, int], ...]
    groups: tuple[tuple[int, int], ...]
    multipliers: tuple[int, ...]
    with_groups: tuple[tuple[int, int], ...]
    dilation: int
    floats: tuple[str, ...]

    def draws(self, dtype: str) -> bool:
        """Return whether problems of this dtype are drawn; integers of 16 bits are computed with float64."""
        needed = "float64" if dtype in {"float64", "int16", "uint16"} else "float32"
        return needed in self.floats


_FEW = _Kinds(
    (1, 3), ((3, 1), (2, 1), (3, 2), (4, 3)), ((4, 4), (2, 3)), (1, 3),
    with_groups=((3, 1), (3, 2)), dilation=1, floats=("float32",),
)  # fmt: skip
_ALONG = (*_FEW.along, (1, 1), (5, 1))
_MANY = _Kinds(
    (1, 2, 3, 5), _ALONG, (*_FEW.groups, (3, 2), (8, 8)), (1, 2, 3),
    with_groups=_ALONG, dilation=3, floats=("float32", "float64"),
)  # fmt: skip


def _kinds() -> _Kinds:
    """Return a few kinds, which every backend's own tests add to; or many, for a run that may take its time."""
    return _MANY if settings.get_current_profile_name() == "thorough" else _FEW


@st.composite
def problems(
    draw: st.DrawFn, *, dtypes: Sequence[str] = MIXED_DTYPES, empty: bool = True, plain: bool = False, side: int = 20
) -> Problem:
    """Draw a problem.

    Args:
        draw: Hypothesis's.
        dtypes: to draw from, as far as there are few kinds; repeat those that should come often.
        empty: whether sizes may be 0.
        plain: whether there is never an epilogue.
        side: most rows and columns before padding.
    """
    least = 0 if empty and draw(st.integers(0, 5)) == 5 else 1
    groups, group_c, group_k = draw(_parts(least))
    along, most = (_kinds().with_groups, _kinds().dilation) if groups > 1 else (_kinds().along, 3)
    # Every third problem has the filters that Winograd is about, some have those of a fast FIR.
    if which := draw(st.sampled_from((3, 0, 0, 3, 0, 9))):
        kernel, strides, dilations = (which, which), (1, 1), (1, 1)
        if which == 9 and draw(st.booleans()):  # an image filter, which may be separable
            groups, group_c, group_k = draw(st.sampled_from(((1, 1, 1), (1, 1, 3), (4, 1, 1))))
    else:
        (kw, stride), kh = draw(st.sampled_from(along)), draw(st.sampled_from(_kinds().heights))
        kernel, strides = (kh, kw), (draw(st.integers(1, 3)), stride)
        dilations = draw(st.one_of(st.just((1, 1)), _pairs(1, most)))
    image = draw(_pairs(least, side))
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    padding = draw(st.sampled_from([*PADDINGS, "explicit"]))
    if padding == "explicit":
        pads = draw(st.tuples(*[st.integers(0, 4)] * 4))
        room = (pads[0] + pads[1], pads[2] + pads[3])
    else:
        room = (0, 0) if padding == "VALID" else (100, 100)
    # An image that no window fits into is an error, an empty one is not.
    h, w = (length and max(length, e - p) for length, e, p in zip(image, extent, room, strict=True))
    if padding != "explicit":
        pads = padding_of(padding, (h, w), kernel, strides, dilations)
    dtype = draw(st.sampled_from([name for name in dtypes if _kinds().draws(name)]))
    c, k = groups * group_c, groups * group_k
    may_be = which == 9 and dtype in SEPARABLE_DTYPES and (c == 1 or c == k == groups)
    return Problem(
        n=draw(st.integers(least, 3)),
        h=h,
        w=w,
        c=c,
        k=k,
        kh=kernel[0],
        kw=kernel[1],
        pads=pads,
        strides=strides,
        dilations=dilations,
        groups=groups,
        dtype=dtype,
        data_format=draw(st.sampled_from(DATA_FORMATS)),
        epilogue=Epilogue() if plain else draw(epilogues(dtype)),
        separable=may_be and draw(st.booleans()),
    )


#: Between them, every backend does one: whole or depthwise, floats or integers, small filters or large.
_USUAL = (
    "1x9x9x32 * 3x3x32x8 SAME", "1x9x9x32 * 3x3x1x32 SAME", "1x9x9x32 * 3x3x32x8 SAME int8", "1x9x9x2 * 9x9x2x1 SAME",
    "1x9x9x1 * 9x9x1x1 SAME separable",
)  # fmt: skip


def examples(count: int) -> settings:
    """Return settings for so many examples by default; more where a profile is thorough.

    For tests of which most examples compile a kernel or two of their own: these take most of the whole run's time.
    """
    return settings(max_examples=count * (settings.default or settings()).max_examples // _BY_DEFAULT)


def fits(backend: Backend, problem: Problem) -> bool:
    """Return whether a backend takes a problem."""
    return Candidate(backend, Config()).rejects(problem) is None


def runs_here(backend: Backend) -> bool:
    """Return whether a backend does anything on this machine, which may lack the instructions it is for."""
    return any(fits(backend, Problem.parse(text)) for text in _USUAL)


def _pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def _parts(draw: st.DrawFn, least: int) -> tuple[int, int, int]:
    """Draw groups, channels of a group and filters of a group: whole, grouped or depthwise with a multiplier."""
    kind = draw(st.sampled_from(("whole", "whole", "grouped", "depthwise")))
    if kind == "whole":
        return 1, draw(st.integers(least, 9)), draw(st.integers(least, 10))
    if kind == "grouped":
        group_c, group_k = draw(st.sampled_from(_kinds().groups))
        return draw(st.sampled_from((2, 4))), group_c, draw(st.sampled_from((group_k, group_k, least * group_k)))
    return draw(st.sampled_from((8, 9, 11))), 1, draw(st.sampled_from((*_kinds().multipliers, least)))


def numbers(problem: Problem, seed: int = 0) -> Case:
    """Return a problem's arrays, drawn with a seed: normal numbers, or integers from the dtype's whole range."""
    rng = np.random.default_rng(seed)
    p = problem

    def make(shape: tuple[int, ...], name: str) -> Array:
        dtype = dtype_of(name)
        if name in INTEGERS:
            about = np.iinfo(dtype)
            return rng.integers(about.min, about.max, shape, dtype, endpoint=True)
        return rng.standard_normal(shape).astype(dtype)

    return Case(
        p,
        make((p.n, p.h, p.w, p.c), p.dtype),
        separation.drawn(p, lambda shape: make(shape, p.dtype)),
        make((p.k,), p.result_dtype) if p.epilogue.bias else None,
        make((p.n, p.oh, p.ow, p.k), p.result_dtype) if p.epilogue.residual else None,
    )


def cases(
    *, dtypes: Sequence[str] = MIXED_DTYPES, empty: bool = True, plain: bool = False, side: int = 20
) -> st.SearchStrategy[Case]:
    """Draw problems with arrays; see ``problems``."""
    drawn = problems(dtypes=dtypes, empty=empty, plain=plain, side=side)
    return st.builds(numbers, drawn, st.integers(0, 2**16))


#: Problems between which kernels differ: 1x1, 3x3, others, stride, dilation, groups, depthwise, images.
_FAMILIAR = (
    "2x13x17x5 * 3x3x5x6 SAME", "1x9x20x8 * 3x3x8x17 pad=2,0,1,3", "1x12x11x7 * 3x3x7x9 SAME stride=2",
    "1x13x12x4 * 1x3x4x7 SAME dilation=2", "2x7x18x3 * 3x4x3x9 SAME stride=3", "1x8x9x7 * 1x1x7x10 VALID",
    "2x11x14x8 * 3x3x4x8 SAME", "1x10x9x8 * 3x3x2x12 VALID", "2x10x19x9 * 3x3x1x9 SAME",
    "1x14x15x8 * 3x2x1x24 SAME_LOWER stride=2", "1x24x23x1 * 9x9x1x1 SAME separable", "1x17x16x2 * 9x9x2x3 pad=4,0,3,4",
    "2x12x25x4 * 9x9x1x4 SAME",
)  # fmt: skip


@st.composite
def familiar_cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",), plain: bool = False) -> Case:
    """Draw a case of a few problems, whose kernels are compiled once for all tests; of any if a profile is thorough."""
    if _kinds() is _MANY:
        return draw(cases(dtypes=dtypes, empty=False, plain=plain))
    problem = Problem.parse(draw(st.sampled_from(_FAMILIAR)))
    problem = problem.replace(
        n=draw(st.integers(1, 3)), data_format=draw(st.sampled_from(DATA_FORMATS)),
        epilogue=Epilogue() if plain else draw(epilogues()),
    )  # fmt: skip
    return numbers(problem, draw(st.integers(0, 2**16)))


def judge(
    problem: Problem,
    numerics: Numerics,
    config: Config,
    input: Array,
    filters: Array,
    output: Array,
    bias: Array | None = None,
    residual: Array | None = None,
) -> Verdict:
    """Compare one output with the oracle's; see ``Oracle`` for the arrays."""
    return Oracle(problem, input, filters, bias, residual).judge(numerics, config, output)
