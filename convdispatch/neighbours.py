"""The tuned problems nearest to a new one, with what was measured of them.

Neighbours are picked by the text of the profile's keys alone, and of the nearest few only the lines with results are
read, so that a profile of thousands of entries costs nothing that is felt.
"""

import contextlib
import functools
import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from convdispatch import fingerprint, machine, profile, safe_yaml
from convdispatch.backend import Config, item_bytes
from convdispatch.calibration import Sizes
from convdispatch.problem import Problem
from convdispatch.profile import Entry
from convdispatch.profile_file import Profile
from convdispatch.profile_text import parse_config, parse_entry, parse_key

#: How many neighbours are asked, and how near (in the distance of ``Place``) they must be.
_MOST_NEIGHBOURS, _FARTHEST = 3, 1.7
#: What a machine much like this one is away from it: its measurements have half as much to say at a distance of 0.5.
_STRANGE = 0.5


# Where a problem lies --------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A problem among others.

    Attributes:
        kind: what must be the same for a measurement to say anything: dtype, class of filter size, whether there are
            strides and dilations, dense or grouped or depthwise.
        counts: output pixels, channels and filters of a group, groups, taps, stride.
        manner: what else costs time: 1 where the data format is NCHW, a residual is added, a costly activation done.
        sizes: bytes of filters and images.
    """

    kind: tuple[object, ...]
    counts: tuple[float, ...]
    manner: tuple[int, ...]
    sizes: Sizes


#: A unit of distance is a neighbourhood's width: about four times the pixels, or three times the channels.
_BY_DOUBLING = np.array((0.5, 0.6, 0.6, 0.4, 0.6, 0.6))
_BY_MANNER = np.array((0.5, 0.3, 0.4))
_COSTLY = ("gelu", "silu", "sigmoid", "tanh")

Points = np.ndarray[tuple[int, int], np.dtype[np.float64]]


def coordinates(places: Iterable[Place]) -> Points:
    """Return a row of coordinates for each place, in which distance is Euclidean."""
    both = [(place.counts, place.manner) for place in places]
    counts, manner = np.array([pair[0] for pair in both], float), np.array([pair[1] for pair in both], float)
    points: Points = np.hstack([np.log2(counts) * _BY_DOUBLING, manner * _BY_MANNER])
    return points


_SHAPES = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)( NCHW)? \* (\d+)x(\d+)x(\d+)x(\d+) (.+)")
_PADS = re.compile(r"pad=(\d+)(?:,(\d+))?(?:,(\d+),(\d+))?")


class _Rest(NamedTuple):
    """What stands behind the filter shape; ``pads`` are rows and columns in all, None for SAME."""

    pads: tuple[int, int] | None
    strides: tuple[int, int]
    dilations: tuple[int, int]
    dtype: str
    item_bytes: int
    manner: tuple[int, int]


@functools.lru_cache(maxsize=256)
def _rest(words: str) -> _Rest:
    """Read padding, strides, dilations, dtype and epilogue; KeyError or ValueError where something is else."""
    pads: tuple[int, int] | None = (0, 0)
    dtype, epilogue = "float32", ""
    pairs = {"stride": (1, 1), "dilation": (1, 1)}
    for word in words.split():
        name, is_set, value = word.partition("=")
        if word.startswith("+"):
            epilogue += word
        elif name in pairs:
            first, _, second = value.partition("x")
            pairs[name] = int(first), int(second or first)
        elif word in {"SAME", "SAME_LOWER"}:
            pads = None
        elif word == "separable":
            continue  # whoever takes the filters whole is as fast without
        elif match := _PADS.fullmatch(word):
            one, two, three, four = match.groups()
            pads = (int(one) + int(two), int(three) + int(four)) if three else (2 * int(one), 2 * int(two or one))
        elif word != "VALID" and not is_set:
            dtype = word
    manner = int("+residual" in epilogue), int(any(name in epilogue for name in _COSTLY))
    return _Rest(pads, pairs["stride"], pairs["dilation"], dtype, item_bytes(dtype), manner)


#: Filter sizes that are a class of their own, and how keys of such problems show it at a glance.
_SQUARES = {f"{side}x{side}": f" * {side}x{side}x" for side in (1, 3, 5)}


@functools.lru_cache(maxsize=256)
def _kernel_class(kh: int, kw: int) -> str:
    if (square := f"{kh}x{kw}") in _SQUARES:
        return square
    if 1 in {kh, kw}:
        return "line"
    return "large" if kh * kw > 49 else "other"


def place_of(text: str) -> Place | None:
    """Return where a problem lies, from its canonical text; None for other texts and for problems without work."""
    match = _SHAPES.fullmatch(text)
    if match is None:
        return None
    numbers = match.groups()
    n, h, w, c = int(numbers[0]), int(numbers[1]), int(numbers[2]), int(numbers[3])
    if numbers[4]:
        h, w, c = w, c, h
    kh, kw, group_c, k = int(numbers[5]), int(numbers[6]), int(numbers[7]), int(numbers[8])
    try:
        pads, (down, across), dilations, dtype, size, manner = _rest(numbers[9])
        if pads is None:
            oh, ow = -(-h // down), -(-w // across)
        else:
            oh = (h + pads[0] - (kh - 1) * dilations[0] - 1) // down + 1
            ow = (w + pads[1] - (kw - 1) * dilations[1] - 1) // across + 1
    except (KeyError, ValueError, ZeroDivisionError):
        return None  # a hand-written key, which has no say here
    if min(n, oh, ow, group_c, k) < 1 or c % group_c:
        return None
    groups = c // group_c
    grouping = "dense" if groups == 1 else "depthwise" if group_c == 1 else "grouped"
    kind = (dtype, _kernel_class(kh, kw), down == across == 1, dilations == (1, 1), grouping)
    counts = (n * oh * ow, group_c, max(1.0, k / groups), groups, kh * kw, down * across)
    sizes = Sizes(kh * kw * group_c * k * size, n * (h * w * c + oh * ow * k) * size)
    return Place(kind, counts, (int(bool(numbers[4])), *manner), sizes)


# The measurements around it --------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One candidate's measurement: what it was estimated to take, and took, in seconds."""

    backend: str
    version: int
    config: Config
    estimate: float
    seconds: float


@dataclass(frozen=True)
class Neighbour:
    """A tuned problem near a new one.

    Attributes:
        text: the problem.
        place: where it lies.
        distance: how far away.
        rows: what was measured of it.
        here: whether it was measured on this very machine, and not on one much like it.
    """

    text: str
    place: Place
    distance: float
    rows: tuple[Row, ...]
    here: bool = True

    @property
    def weight(self) -> float:
        """How much it has to say: 1 where nothing is between, little at a distance of 1.5."""
        return math.exp(-(self.distance**2))


def _of_class(keys: Iterable[str], kernel: object) -> Iterable[str]:
    """Return the keys of a class of filter sizes, and maybe more, without reading them."""
    if mark := _SQUARES.get(str(kernel)):
        return (key for key in keys if mark in key)
    return (key for key in keys if not any(square in key for square in _SQUARES.values()))


class _Index:
    """A profile's keys of one machine, deployment and thread budget, by kind of problem."""

    def __init__(self, keys: Iterable[str], tail: str) -> None:
        # Texts and numbers only: thousands of objects would be a burden on every later garbage collection.
        self._keys: dict[tuple[object, ...], list[str]] = {}
        places: dict[tuple[object, ...], list[Place]] = {}
        for key in keys:
            if key.endswith(tail) and (place := place_of(key.removesuffix(tail))) is not None:
                self._keys.setdefault(place.kind, []).append(key)
                places.setdefault(place.kind, []).append(place)
        self._points = {kind: coordinates(members) for kind, members in places.items()}

    def nearest(self, place: Place) -> Iterator[tuple[float, str]]:
        """Yield distances and keys, the nearest first; twice as many as are asked, since some may say nothing."""
        if place.kind not in self._points:
            return
        away = self._points[place.kind] - coordinates([place])
        squares = np.einsum("ij,ij->i", away, away)
        some = range(len(squares))
        if len(squares) > 2 * _MOST_NEIGHBOURS:  # sorting thousands to have six would take longer than all the rest
            some = np.argpartition(squares, 2 * _MOST_NEIGHBOURS)[: 2 * _MOST_NEIGHBOURS].tolist()
        for square, key in sorted((float(squares[number]), self._keys[place.kind][number]) for number in some):
            if square > _FARTHEST**2:
                return
            yield math.sqrt(square), key


_ROW, _MEDIAN, _ESTIMATE = "  - {backend: ", "median_us: ", ", estimate_us: "


def rows_of(text: str) -> tuple[Row, ...]:
    """Return an entry's results from its text; none where what it says is doubtful, or where it is cut or broken.

    Reading all of the YAML takes a hundred times as long, which matters to the first call of a shape. So that is for
    the few whose lines are not as ``profile`` writes them.
    """
    if "\n  flags:" in text:
        return ()  # what is doubtful serves its own problem for want of better, but nobody else's
    head, _, rest = text.partition("\n  results:\n")
    lines = rest.partition("\n  failures:")[0].rstrip("\n").split("\n")
    if "\n  winner: " in head and text.replace("\n", "").isprintable():
        with contextlib.suppress(ValueError):
            return tuple(row for line in lines if (row := _row(line)) is not None)
    return _rows_read(text)


def _row(line: str) -> Row | None:
    """Return what a line says of a candidate, if it has an estimate; ValueError for one that looks otherwise."""
    if not line.startswith(_ROW) or not line.endswith("}"):
        raise ValueError(f"no result: {line}")
    if (last := line.rfind(_ESTIMATE)) < 0:
        return None
    backend, _, rest = line[len(_ROW) : last].partition(", version: ")
    version, _, rest = rest.partition(", config: {")
    config, _, rest = rest.partition("}, ")
    median = rest.partition(_MEDIAN)[2].partition(",")[0]
    taken, expected = float(median), float(line[last + len(_ESTIMATE) : -1])
    if not (expected > 0 and taken > 0):
        return None
    return Row(backend, int(version), _config(config), expected / 1e6, taken / 1e6)


def _rows_read(text: str) -> tuple[Row, ...]:
    """Return an entry's results by reading its YAML."""
    try:
        ((key, data),) = safe_yaml.load(text).items()
        return _rows_in_memory(parse_entry(parse_key(key), data))
    except Exception:  # noqa: BLE001  # who asks for it is told what is wrong with it
        return ()


@functools.lru_cache(maxsize=4096)
def _config(text: str) -> Config:
    """Read what stands between a config's braces; of thousands of entries there are some dozens.

    Raises:
        ValueError: for what somebody broke by hand.
    """
    config = parse_config(safe_yaml.load(f"{{{text}}}"))
    if config.threads < 1:
        raise ValueError(f"no number of threads: {config.threads}")
    return config


def _rows_in_memory(entry: Entry) -> tuple[Row, ...]:
    return tuple(
        Row(r.backend, r.version, r.config, r.estimate, r.median)
        for r in (() if entry.flags else entry.results)
        if r.estimate and r.median
    )


class _File:
    """What of one profile has been looked at."""

    def __init__(self, file: Profile) -> None:
        self._file = weakref.proxy(file)
        self.indices: dict[tuple[str, object], _Index] = {}
        self.rows: dict[str, tuple[Row, ...]] = {}
        self._alike: dict[int, list[str]] = {}

    def alike(self, threads: int) -> list[str]:
        """Return the ids of the file's machines that are much like this one, for a thread budget."""
        if threads not in self._alike:
            here = machine.current()
            self._alike[threads] = [
                name
                for name, fields in self._file.machines().items()
                if name != here.id and fingerprint.compare(fields, here, threads).grade != "hard"
            ]
        return self._alike[threads]

    def index(self, tail: str, kernel: object) -> _Index:
        """Return the index for a class of filter sizes: reading thousands of keys takes as long as a large call."""
        if (tail, kernel) not in self.indices:
            self.indices[tail, kernel] = _Index(_of_class(self._file.keys(), kernel), tail)
        return self.indices[tail, kernel]

    def rows_of(self, key: str) -> tuple[Row, ...]:
        if key not in self.rows:
            self.rows[key] = rows_of(self._file.text(key))
        return self.rows[key]


_looked_at: weakref.WeakKeyDictionary[Profile, _File] = weakref.WeakKeyDictionary()


def neighbours(problem: Problem, deployment: str, threads: int, files: list[Profile]) -> list[Neighbour]:
    """Return the tuned problems nearest to this one, the nearest first; of one in several layers, the first counts."""
    place = place_of(problem.text)
    if place is None:
        return []
    memory = {str(entry.key): entry for entry in profile.remembered()}
    found: dict[str, Neighbour] = {}

    def tail_of(name: str) -> str:
        return f" | {deployment} | {threads} threads | {name}"

    def gather(index: _Index, tail: str, rows: Callable[[str], tuple[Row, ...]], strange: float = 0.0) -> None:
        """Take the nearest that are new and say something."""
        taken = 0
        for distance, key in index.nearest(place):
            text = key.removesuffix(tail)
            if text not in found and (said := rows(key)) and (its_place := place_of(text)) is not None:
                found[text] = Neighbour(text, its_place, distance + strange, said, not strange)
                taken += 1
                if taken == _MOST_NEIGHBOURS:
                    return

    mine, kernel = tail_of(machine.current().id), place.kind[1]
    if memory:
        gather(_Index(memory, mine), mine, lambda key: _rows_in_memory(memory[key]))
    looked_at = [_looked_at.get(file) or _looked_at.setdefault(file, _File(file)) for file in files]
    for looked in looked_at:
        gather(looked.index(mine, kernel), mine, looked.rows_of)
    for looked in looked_at:
        for name in looked.alike(threads):
            gather(looked.index(tail_of(name), kernel), tail_of(name), looked.rows_of, _STRANGE)
    return sorted(found.values(), key=lambda each: (each.distance, each.text))[:_MOST_NEIGHBOURS]
