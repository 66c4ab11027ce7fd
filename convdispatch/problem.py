"""``Problem``: everything that decides the work of one convolution, and its canonical text.

The text is one line that people type, profiles are keyed by, and logs print::

    1x56x56x64 * 3x3x64x64 SAME
    1x224x224x3 * 7x7x3x64 pad=3 stride=2 +bias +relu
    8x32x14x14 NCHW * 3x3x1x32 SAME dilation=2x1 float64

that is, input shape in data-format order, filter shape ``KHxKWxC/groupsxK``, padding, and what is not the
default: ``stride``, ``dilation``, ``groups`` (where the shapes do not tell), ``separable``, dtype, epilogue.
"""

import functools
import math
import re
import sys
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from convdispatch.epilogue import INTEGER_ACTIVATIONS, Epilogue, parse_activation
from convdispatch.errors import ArgumentError, ArgumentTypeError
from convdispatch.hashed import HashedOnce

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "int64")
DTYPES = FLOATS + INTEGERS
DATA_FORMATS = ("NHWC", "NCHW")
PADDINGS = ("VALID", "SAME", "SAME_LOWER")
#: float16 and bfloat16 hold values only; sums are made in float32 and rounded once, by at most this part.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
LOW_PRECISION = tuple(ROUNDING)
#: Products of two floats of fewer bits are no such floats any more, and integers are exact.
SEPARABLE_DTYPES = ("float32", "float64")

Pads = tuple[int, int, int, int]
#: So many elements have more bytes than int64 counts, in the widest dtype that they or their sums may have.
_TOO_MANY = sys.maxsize // 8
#: The largest stride, dilation and padding: kernels add and multiply them in int64.
LARGEST = 1 << 40


def dtype_of(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype object for one of ``DTYPES``; bfloat16 needs the ml_dtypes package."""
    if name == "bfloat16":
        try:
            import ml_dtypes  # noqa: PLC0415  # optional, and the only source of this dtype
        except ImportError:
            raise ArgumentError(
                "dtype bfloat16 needs the ml_dtypes package: pip install 'convdispatch[bfloat16]'"
            ) from None
        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype
    return np.dtype(name)


def output_length(length: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> int:
    """Return how many windows fit along one axis, 0 or fewer if none does."""
    extent = (kernel - 1) * dilation + 1
    return (length + before + after - extent) // stride + 1


def same_pads(length: int, kernel: int, stride: int, dilation: int, *, lower: bool = False) -> tuple[int, int]:
    """Return TensorFlow's SAME padding (before, after) of one axis; ``lower`` puts the odd element before."""
    extent = (kernel - 1) * dilation + 1
    total = max((-(-length // stride) - 1) * stride + extent - length, 0) if length else 0
    small, large = total // 2, total - total // 2
    return (large, small) if lower else (small, large)


@dataclass(frozen=True)
class Problem(HashedOnce):
    """One convolution, without its numbers. Immutable, hashable, and equal to what its text parses to.

    Attributes:
        n, h, w, c: the input's images, rows, columns, channels.
        k, kh, kw: filters, and their rows and columns.
        pads: zero rows and columns around the input: top, bottom, left, right.
        strides, dilations: (rows, columns).
        groups: how many independent parts the channels and the filters fall into.
        dtype: name of the input's and the filters' dtype.
        data_format: order of the input's and the output's axes, ``"NHWC"`` or ``"NCHW"``.
        epilogue: what is done to the sums before they are stored.
        separable: whether every filter is known to be a column times a row, and the same for all channels if there
            are several, as ``separation`` finds out.
    """

    n: int
    h: int
    w: int
    c: int
    k: int
    kh: int
    kw: int
    pads: Pads = (0, 0, 0, 0)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: str = "float32"
    data_format: str = "NHWC"
    epilogue: Epilogue = field(default=Epilogue())
    separable: bool = False

    __hash__ = HashedOnce.__hash__

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_words()
        for axis, length, out in (("rows", self.h, self.oh), ("columns", self.w, self.ow)):
            if out < 1 and length > 0:
                height = axis == "rows"
                padding = sum(self.pads[:2] if height else self.pads[2:])
                raise ArgumentError(
                    f"filters span {self.extent[0 if height else 1]} {axis} (dilation included), but the input has "
                    f"{length}{f' and {padding} of padding' if padding else ''}; "
                    "use a smaller filter, padding='SAME' or explicit padding"
                )
        self._check_arrays()

    def _check_sizes(self) -> None:
        for name, low in (("n", 0), ("h", 0), ("w", 0), ("c", 0), ("k", 0), ("kh", 1), ("kw", 1), ("groups", 1)):
            if type(getattr(self, name)) is not int:
                raise ArgumentTypeError(f"{name} must be an int; got {getattr(self, name)!r}")
            if getattr(self, name) < low:
                raise ArgumentError(f"{name} must be at least {low}; got {getattr(self, name)}")
        for name, count, low in (("strides", 2, 1), ("dilations", 2, 1), ("pads", 4, 0)):
            sizes = getattr(self, name)
            if type(sizes) is not tuple or len(sizes) != count or any(type(size) is not int for size in sizes):
                raise ArgumentTypeError(f"{name} must be a tuple of {count} ints; got {sizes!r}")
            if min(sizes) < low:
                raise ArgumentError(f"{name} must be at least {low}; got {sizes}")
            if max(sizes) > LARGEST:
                raise ArgumentError(f"{name} must be at most {LARGEST}; got {sizes}")
        for name, count in (("input channels", self.c), ("filters", self.k)):
            if count % self.groups:
                raise ArgumentError(f"groups must divide the {name}: {count} {name}, groups={self.groups}")

    def _check_arrays(self) -> None:
        padded = self._ordered(self.h + sum(self.pads[:2]), self.w + sum(self.pads[2:]), self.c)
        for name, shape, remedy in (
            ("input", self.input_shape, ""),
            ("filters", self.filter_shape, ""),
            ("input with its padding", padded, "; use smaller padding, or smaller dilations if that is SAME"),
            ("output", self.output_shape, "; use fewer images or filters, or smaller padding"),
        ):
            if math.prod(size or 1 for size in shape) >= _TOO_MANY:  # NumPy, too, takes a size of 0 for 1 here
                raise ArgumentError(f"{name} must have fewer than {_TOO_MANY} elements; got shape {shape}{remedy}")

    def _check_words(self) -> None:
        if self.dtype not in DTYPES:
            raise ArgumentTypeError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype}")
        if self.data_format not in DATA_FORMATS:
            raise ArgumentError(f"data_format must be one of {', '.join(DATA_FORMATS)}; got {self.data_format!r}")
        if not isinstance(self.epilogue, Epilogue):
            raise ArgumentTypeError(f"epilogue must be an Epilogue; got {self.epilogue!r}")
        activation = self.epilogue.activation
        if activation not in (None, *INTEGER_ACTIVATIONS) and self.dtype in INTEGERS:
            raise ArgumentError(
                f"activation {activation!r} has no exact integer result for {self.dtype} input; "
                f"use one of {', '.join(INTEGER_ACTIVATIONS)}, or convert the input to float32"
            )
        if type(self.separable) is not bool:
            raise ArgumentTypeError(f"separable must be True or False; got {self.separable!r}")
        if self.separable and self.dtype not in SEPARABLE_DTYPES:
            raise ArgumentError(f"separable filters must be of {' or '.join(SEPARABLE_DTYPES)}; got {self.dtype}")
        if self.separable and not (self.c == 1 or self.c == self.groups == self.k):
            raise ArgumentError(
                "separable filters must be those of one channel, or one and the same for each channel, such as "
                f"9x9x1x3 for three; got {self.k} filters for {self.c} channels, groups={self.groups}"
            )

    # Shapes -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def extent(self) -> tuple[int, int]:
        """Rows and columns that a filter spans, dilation included."""
        return (self.kh - 1) * self.dilations[0] + 1, (self.kw - 1) * self.dilations[1] + 1

    @functools.cached_property
    def oh(self) -> int:
        """Output rows."""
        return max(0, output_length(self.h, self.kh, self.strides[0], self.dilations[0], *self.pads[:2]))

    @functools.cached_property
    def ow(self) -> int:
        """Output columns."""
        return max(0, output_length(self.w, self.kw, self.strides[1], self.dilations[1], *self.pads[2:]))

    def channels_last(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return an array of four dimensions that is in the data format as an NHWC view."""
        return array.transpose(0, 2, 3, 1) if self.data_format == "NCHW" else array

    def _ordered(self, rows: int, columns: int, channels: int) -> tuple[int, int, int, int]:
        if self.data_format == "NCHW":
            return self.n, channels, rows, columns
        return self.n, rows, columns, channels

    @functools.cached_property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape of the input in its data format."""
        return self._ordered(self.h, self.w, self.c)

    @functools.cached_property
    def output_shape(self) -> tuple[int, int, int, int]:
        """Shape of the output in the input's data format."""
        return self._ordered(self.oh, self.ow, self.k)

    @property
    def filter_shape(self) -> tuple[int, int, int, int]:
        """Shape of the filters as HWIO: ``(KH, KW, C // groups, K)``."""
        return self.kh, self.kw, self.group_c, self.k

    @functools.cached_property
    def group_c(self) -> int:
        """Input channels that one filter sees."""
        return self.c // self.groups

    @functools.cached_property
    def group_k(self) -> int:
        """Filters of one group."""
        return self.k // self.groups

    @functools.cached_property
    def is_empty(self) -> bool:
        """Whether the output has no elements."""
        return 0 in self.output_shape

    @functools.cached_property
    def is_trivial(self) -> bool:
        """Whether there is nothing to multiply: no output, or no input channels and so sums of 0."""
        return self.is_empty or not self.taps

    # Work ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def taps(self) -> int:
        """Elements of the dot product behind one output value."""
        return self.kh * self.kw * self.group_c

    @property
    def flops(self) -> int:
        """Multiplications and additions of the direct algorithm, the unit of every GFLOP/s printed."""
        return 2 * self.n * self.oh * self.ow * self.k * self.taps

    @property
    def is_pointwise(self) -> bool:
        """Whether each output pixel depends on one input pixel: a 1x1 filter without padding."""
        return self.kh == self.kw == 1 and not any(self.pads)

    # Dtypes -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def is_integer(self) -> bool:
        """Whether sums are exact and wrap."""
        return self.dtype in INTEGERS

    @functools.cached_property
    def result_dtype(self) -> str:
        """Name of the output's dtype: the input's, or int32 for integers of up to 32 bits."""
        return "int32" if self.is_integer and self.dtype != "int64" else self.dtype

    @functools.cached_property
    def sum_dtype(self) -> str:
        """Name of the dtype in which sums are made."""
        return "float32" if self.dtype in LOW_PRECISION else self.result_dtype

    # Text ---------------------------------------------------------------------------------------------------

    @property
    def padding(self) -> str:
        """The padding in words: ``VALID``, ``SAME`` or ``SAME_LOWER`` where it is that, else the four pads."""
        for word in PADDINGS:
            if self.pads == padding_of(word, (self.h, self.w), (self.kh, self.kw), self.strides, self.dilations):
                return word
        top, bottom, left, right = self.pads
        shown = self.pads if (top, left) != (bottom, right) else (top, left) if top != left else (top,)
        return f"pad={','.join(map(str, shown))}"

    @functools.cached_property
    def text(self) -> str:
        """The canonical text; ``Problem.parse`` of it is equal to this problem."""
        words = ["x".join(map(str, self.input_shape))]
        if self.data_format != "NHWC":
            words.append(self.data_format)
        words += ["*", "x".join(map(str, self.filter_shape)), self.padding]
        for word, pair in (("stride", self.strides), ("dilation", self.dilations)):
            if pair != (1, 1):
                words.append(f"{word}={pair[0]}" if pair[0] == pair[1] else f"{word}={pair[0]}x{pair[1]}")
        if not self.group_c and self.groups != 1:
            words.append(f"groups={self.groups}")
        if self.separable:
            words.append("separable")
        if self.dtype != "float32":
            words.append(self.dtype)
        if self.epilogue:
            words.append(str(self.epilogue))
        return " ".join(words)

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a problem from its text; words after the shapes may stand in any order.

        Raises:
            ArgumentError: naming the word that was not understood.
            ArgumentTypeError: if ``text`` is not a string.
        """
        if not isinstance(text, str):
            raise ArgumentTypeError(f"problem must be text such as '1x56x56x64 * 3x3x64x64 SAME'; got {text!r}")
        return cls(**_parse(text))

    def replace(self, **changes: Any) -> Self:
        """Return this problem with some attributes changed; of other filters it is not known if they are separable."""
        if self.separable and "separable" not in changes:
            changes["separable"] = all(changes.get(name, old) == old for name, old in self._of_filters.items())
        return replace(self, **changes)

    @functools.cached_property
    def _of_filters(self) -> dict[str, Any]:
        """What decides the filters."""
        return {name: getattr(self, name) for name in ("c", "k", "kh", "kw", "groups", "dtype")}


def padding_of(
    word: str, image: tuple[int, int], kernel: tuple[int, int], strides: tuple[int, int], dilations: tuple[int, int]
) -> Pads:
    """Return the four pads that ``VALID``, ``SAME`` or ``SAME_LOWER`` stand for."""
    if word == "VALID":
        return 0, 0, 0, 0
    lower = word == "SAME_LOWER"
    rows, columns = (same_pads(*axis, lower=lower) for axis in zip(image, kernel, strides, dilations, strict=True))
    return *rows, *columns


_SHAPE = re.compile(r"[0-9]{1,18}(?:x[0-9]{1,18}){3}")
_PAIR = re.compile(r"([0-9]{1,18})(?:x([0-9]{1,18}))?")
_PADS = re.compile(r"[0-9]{1,18}(?:,[0-9]{1,18}){0,3}")
_DIGITS = re.compile(r"[0-9]{1,18}")


def _parse(text: str) -> dict[str, Any]:
    def fail(why: str) -> ArgumentError:
        return ArgumentError(f"problem {text!r}: {why}; write it like '1x56x56x64 * 3x3x64x64 SAME stride=2'")

    left, star, right = text.partition("*")
    head, words = left.split(), right.split()
    if not star or not head or not words:
        raise fail("it needs an input shape, '*' and a filter shape")
    for name, shape in (("input", head[0]), ("filter", words[0])):
        if not _SHAPE.fullmatch(shape):
            raise fail(f"the {name} shape must be four numbers with x between them, got {shape!r}")
    values: dict[str, Any] = {}
    epilogue: dict[str, Any] = {}
    for word in head[1:] + words[1:]:
        name, value = _parse_word(word, fail)
        target = epilogue if name in {"bias", "residual", "activation"} else values
        if name in target:
            raise fail(f"{word!r} says something a second time")
        target[name] = value
    n, h, w, c = map(int, head[0].split("x"))
    data_format = values.get("data_format", "NHWC")
    if data_format == "NCHW":
        h, w, c = w, c, h
    kh, kw, group_c, k = map(int, words[0].split("x"))
    strides, dilations = values.get("stride", (1, 1)), values.get("dilation", (1, 1))
    if group_c and c % group_c:
        raise fail(f"{c} input channels are no multiple of the filters' {group_c}")
    groups = values.get("groups", c // group_c if group_c and c else 1)
    if groups * group_c != c:
        raise fail(f"groups={groups} with {group_c} channels a filter does not make {c} input channels")
    pads = values.get("padding", "SAME")
    if isinstance(pads, str):
        if min(kh, kw, *strides, *dilations) < 1:
            raise fail("filters, strides and dilations must be at least 1")
        pads = padding_of(pads, (h, w), (kh, kw), strides, dilations)
    activation, slope = epilogue.get("activation", (None, 0.0))
    finish = Epilogue(bool(epilogue.get("bias")), bool(epilogue.get("residual")), activation, slope)
    return {
        "n": n, "h": h, "w": w, "c": c, "k": k, "kh": kh, "kw": kw, "pads": pads, "strides": strides,
        "dilations": dilations, "groups": groups, "dtype": values.get("dtype", "float32"),
        "data_format": data_format, "epilogue": finish, "separable": "separable" in values,
    }  # fmt: skip


def _parse_word(word: str, fail: Any) -> tuple[str, Any]:  # noqa: PLR0911  # a table of word forms
    if word in DATA_FORMATS:
        return "data_format", word
    if word in PADDINGS:
        return "padding", word
    if word in DTYPES:
        return "dtype", word
    if word in {"+bias", "+residual", "separable"}:
        return word.removeprefix("+"), True
    if word.startswith("+"):
        return "activation", parse_activation(word[1:])
    name, _, value = word.partition("=")
    if name in {"stride", "dilation"} and (match := _PAIR.fullmatch(value)):
        return name, (int(match[1]), int(match[2] or match[1]))
    if name == "groups" and _DIGITS.fullmatch(value):
        return name, int(value)
    if name == "pad" and _PADS.fullmatch(value) and value.count(",") != 2:
        numbers = [int(size) for size in value.split(",")]
        if len(numbers) == 2:
            numbers = [numbers[0], numbers[0], numbers[1], numbers[1]]
        return "padding", tuple(numbers * 4 if len(numbers) == 1 else numbers)
    raise fail(f"{word!r} is not understood")
