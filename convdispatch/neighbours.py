"""The tuned problems nearest to a new one, with what was measured of them.

Neighbours are picked by the text of the profile's keys alone, and of the nearest few only the lines with results are
read, so that a profile of thousands of entries costs nothing that is felt.
"""

import functools
import math
import re
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from convdispatch import machine, profile
from convdispatch.backend import item_bytes
from convdispatch.calibration import Sizes
from convdispatch.problem import Problem, output_length
from convdispatch.profile import Entry, Profile

#: How many neighbours are asked, and how near (in the distance of ``Place``) they must be.
_MOST_NEIGHBOURS, _FARTHEST = 4, 1.7


# Where a problem lies --------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A problem among others.

    Attributes:
        kind: what must be the same for a measurement to say anything: dtype, class of filter size, whether there are
            strides and dilations, dense or grouped or depthwise.
        at: coordinates, in which the distance is Euclidean. A unit is a neighbourhood's width: about four times the
            pixels, or three times the channels.
        sizes: bytes of filters and images.
    """

    kind: tuple[object, ...]
    at: tuple[float, ...]
    sizes: Sizes


_SHAPES = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)( NCHW)? \* (\d+)x(\d+)x(\d+)x(\d+) (.+)")
_PADS = re.compile(r"pad=(\d+)(?:,(\d+))?(?:,(\d+),(\d+))?")


@functools.lru_cache(maxsize=64)
def _rest(words: str) -> tuple[str, tuple[int, int], tuple[int, int], str, str]:
    """Return padding, strides, dilations, dtype and epilogue from what stands behind the filter shape."""
    padding, dtype, epilogue = "VALID", "float32", []
    pairs = {"stride": (1, 1), "dilation": (1, 1)}
    for word in words.split():
        name, is_set, value = word.partition("=")
        if word.startswith("+"):
            epilogue.append(word)
        elif name in pairs:
            first, _, second = value.partition("x")
            pairs[name] = int(first), int(second or first)
        elif is_set or word.isupper():
            padding = word if name != "groups" else padding
        else:
            dtype = word
    return padding, pairs["stride"], pairs["dilation"], dtype, " ".join(epilogue)


def _outputs(padding: str, h: int, w: int, kernel: tuple[int, int], strides: tuple[int, int], dilations: tuple[int, int]
) -> tuple[int, int]:  # fmt: skip
    if padding.startswith("SAME"):
        return -(-h // strides[0]), -(-w // strides[1])
    top = bottom = left = right = 0
    if match := _PADS.fullmatch(padding):
        first, second, third, fourth = match.groups()
        if third:
            top, bottom, left, right = int(first), int(second), int(third), int(fourth)
        else:
            top = bottom = int(first)
            left = right = int(second or first)
    oh = output_length(h, kernel[0], strides[0], dilations[0], top, bottom)
    return oh, output_length(w, kernel[1], strides[1], dilations[1], left, right)


def _kernel_class(kh: int, kw: int) -> str:
    if kh == kw and kh in {1, 3, 5}:
        return f"{kh}x{kw}"
    if 1 in {kh, kw}:
        return "line"
    return "large" if kh * kw > 49 else "other"


def place_of(text: str) -> Place | None:
    """Return where a problem lies, from its canonical text; None for other texts and for problems without work."""
    match = _SHAPES.fullmatch(text)
    if match is None:
        return None
    n, h, w, c, kh, kw, group_c, k = map(int, match.group(1, 2, 3, 4, 6, 7, 8, 9))
    if match[5]:
        h, w, c = w, c, h
    try:
        padding, strides, dilations, dtype, epilogue = _rest(match[10])
        oh, ow = _outputs(padding, h, w, (kh, kw), strides, dilations)
        size = item_bytes(dtype)
    except (KeyError, ValueError, ZeroDivisionError):
        return None  # a hand-written key, which has no say here
    if min(n, oh, ow, group_c, k) < 1 or c % group_c:
        return None
    groups = c // group_c
    grouping = "dense" if groups == 1 else "depthwise" if group_c == 1 else "grouped"
    kind = (dtype, _kernel_class(kh, kw), strides == (1, 1), dilations == (1, 1), grouping)
    at = (
        0.5 * math.log2(n * oh * ow),
        0.6 * math.log2(group_c),
        0.6 * math.log2(max(1.0, k / groups)),
        0.4 * math.log2(groups),
        0.6 * math.log2(kh * kw),
        0.6 * math.log2(strides[0] * strides[1]),
        0.5 if match[5] else 0.0,
        0.3 if "+residual" in epilogue else 0.0,
        0.4 if any(word in epilogue for word in ("gelu", "silu", "sigmoid", "tanh", "swish")) else 0.0,
    )
    return Place(kind, at, Sizes(kh * kw * group_c * k * size, n * (h * w * c + oh * ow * k) * size))


# The measurements around it --------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One candidate's measurement: what it was estimated to take, and took, in seconds."""

    backend: str
    version: int
    config: str
    estimate: float
    seconds: float


@dataclass(frozen=True)
class Neighbour:
    """A tuned problem near a new one: its text, its place, its distance, and what was measured."""

    text: str
    place: Place
    distance: float
    rows: tuple[Row, ...]

    @property
    def weight(self) -> float:
        """How much it has to say: 1 where nothing is between, little at a distance of 1.5."""
        return math.exp(-(self.distance**2))


class _Index:
    """A profile's keys of one machine, deployment and thread budget, by kind of problem."""

    def __init__(self, keys: Iterable[str], tail: str) -> None:
        by_kind: dict[tuple[object, ...], list[tuple[str, Place]]] = {}
        for key in keys:
            if key.endswith(tail) and (place := place_of(key.removesuffix(tail))) is not None:
                by_kind.setdefault(place.kind, []).append((key, place))
        self._members = by_kind
        self._points = {kind: np.array([place.at for _, place in members]) for kind, members in by_kind.items()}

    def nearest(self, place: Place) -> Iterator[tuple[float, str, Place]]:
        """Yield distance, key and place, the nearest first; twice as many as are asked, since some may say nothing."""
        if place.kind not in self._points:
            return
        distances = np.sqrt(((self._points[place.kind] - np.array(place.at)) ** 2).sum(axis=1))
        for number in np.argsort(distances, kind="stable")[: 2 * _MOST_NEIGHBOURS]:
            if distances[number] > _FARTHEST:
                return
            key, its_place = self._members[place.kind][number]
            yield float(distances[number]), key, its_place


_ROW = re.compile(
    r"^  - \{backend: ([^,{}]+), version: (\d+), config: \{([^{}]*)\}, .*?median_us: ([^,{}]+), "
    r"(?:.*?estimate_us: ([^,{}]+))?",
    re.MULTILINE,
)


def rows_of(text: str) -> tuple[Row, ...]:
    """Return an entry's results from its text as ``profile`` writes it; lines that look otherwise are passed over.

    Reading the YAML takes a hundred times as long, which matters to the first call of a shape.
    """
    if "\n  flags:" in text:
        return ()  # what is doubtful serves its own problem for want of better, but nobody else's
    found = []
    for backend, version, config, median, estimate in _ROW.findall(text.partition("\n  failures:")[0]):
        try:
            row = Row(backend, int(version), config.replace(": ", "="), float(estimate) / 1e6, float(median) / 1e6)
        except ValueError:
            continue  # without an estimate, or made by hand
        if row.estimate > 0 and row.seconds > 0:
            found.append(row)
    return tuple(found)


def _rows_in_memory(entry: Entry) -> tuple[Row, ...]:
    return tuple(
        Row(r.backend, r.version, str(r.config), r.estimate, r.median)
        for r in (() if entry.flags else entry.results)
        if r.estimate and r.median
    )


class _File:
    """What of one profile has been looked at."""

    def __init__(self, file: Profile) -> None:
        self.chunks = file.chunks()
        self.indices: dict[str, _Index] = {}
        self.rows: dict[str, tuple[Row, ...]] = {}

    def index(self, tail: str) -> _Index:
        if tail not in self.indices:
            self.indices[tail] = _Index(self.chunks, tail)
        return self.indices[tail]

    def rows_of(self, key: str) -> tuple[Row, ...]:
        if key not in self.rows:
            self.rows[key] = rows_of(self.chunks[key])
        return self.rows[key]


_looked_at: weakref.WeakKeyDictionary[Profile, _File] = weakref.WeakKeyDictionary()


def neighbours(problem: Problem, deployment: str, threads: int, files: list[Profile]) -> list[Neighbour]:
    """Return the tuned problems nearest to this one, the nearest first; of one in several layers, the first counts."""
    place = place_of(problem.text)
    if place is None:
        return []
    tail = f" | {deployment} | {threads} threads | {machine.current().id}"
    memory = {str(entry.key): entry for entry in profile.remembered()}
    found: dict[str, Neighbour] = {}

    def add(distance: float, key: str, its_place: Place, rows: tuple[Row, ...]) -> None:
        if key not in found and rows:
            found[key] = Neighbour(key.removesuffix(tail), its_place, distance, rows)

    for distance, key, its_place in _Index(memory, tail).nearest(place):
        add(distance, key, its_place, _rows_in_memory(memory[key]))
    for file in files:
        looked = _looked_at.get(file) or _looked_at.setdefault(file, _File(file))
        for distance, key, its_place in looked.index(tail).nearest(place):
            if key not in memory:
                add(distance, key, its_place, looked.rows_of(key))
    return sorted(found.values(), key=lambda each: (each.distance, each.text))[:_MOST_NEIGHBOURS]
