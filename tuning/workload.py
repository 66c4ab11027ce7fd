"""Workloads: named lists of problems with how often each runs, and the YAML or the ONNX model that holds them.

A workload file is::

    name: resnet50                      # optional; the file's name without it
    title: ResNet-50, 224x224, batch 1  # optional
    source: where the layers are from   # optional
    layers:                             # at least one
    - {name: conv1, count: 1, problem: "1x224x224x3 * 7x7x3x64 pad=3 stride=2"}
    - {count: 3, problem: "1x56x56x64 * 3x3x64x64 SAME"}
    - 1x56x56x256 * 1x1x256x64 VALID

A layer is a mapping of ``problem`` (any text that ``Problem.parse`` reads) and, where it helps, ``count`` (a
whole number, 1 where unsaid) and ``name``; or just the problem's text. A recording of a program also says the
``seconds`` that all those calls took together, and the ``deployment`` and ``threads`` that they were made with. A
layer's first call in a process, which may have waited for a compiler or a race, counts there with the average of its
later ones; with its own time only where there was no other yet when it was written. Anything else is an error, since
a misspelt ``count`` would silently weigh a layer wrongly. So are aliases: nobody needs them here, and a small file of
them can stand for an enormous one.

A file whose name ends in ``.onnx`` is a model, each of its different convolutions a layer; see ``onnx_model``.
"""

import difflib
import functools
import importlib.resources
import os
import reprlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from convdispatch import safe_file, safe_yaml, settings
from convdispatch.arguments import check_deployment
from convdispatch.errors import ArgumentError, ArgumentTypeError, WorkloadError, shown
from convdispatch.problem import Problem
from convdispatch.said import LARGEST
from convdispatch.tuning import onnx_model

_EXAMPLE = "1x56x56x64 * 3x3x64x64 SAME"
#: A larger file is some other file; a recording of a hundred thousand problems fits.
_MOST_BYTES = 16 << 20
_KEYS = ("name", "count", "problem", "seconds", "deployment", "threads")


@dataclass(frozen=True)
class Layer:
    """One problem of a workload.

    Attributes:
        problem: the convolution.
        count: how often it runs in one pass of the workload, at least 1.
        name: what its network calls it; several names joined by ``+`` where several layers pose one problem.
        seconds: what all its calls took together, where they were recorded.
        deployment: ``"plan"`` or ``"call"``, where it is known how it is called.
        threads: the most threads that its calls may use, where that is known.

    """

    problem: Problem
    count: int = 1
    name: str = ""
    seconds: float | None = None
    deployment: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.problem, Problem):
            raise ArgumentTypeError(f"problem must be a Problem; got {reprlib.repr(self.problem)}")
        _check_count("count", self.count)
        if not isinstance(self.name, str):
            raise ArgumentTypeError(f"name must be text; got {reprlib.repr(self.name)}")
        if self.seconds is not None:
            _check_seconds(self.seconds)
        if self.deployment is not None:
            check_deployment(self.deployment)
        if self.threads is not None:
            _check_count("threads", self.threads)
            settings.parse_threads(self.threads)

    @property
    def posed(self) -> tuple[Problem, str | None, int | None]:
        """What is to be decided for it: problem, deployment and threads."""
        return self.problem, self.deployment, self.threads

    def plus(self, other: "Layer") -> "Layer":
        """Return this layer with another's calls and seconds added."""
        known = [seconds for seconds in (self.seconds, other.seconds) if seconds is not None]
        return replace(self, count=self.count + other.count, seconds=sum(known) if known else None)


@dataclass(frozen=True)
class Workload:
    """A named list of problems with weights.

    Attributes:
        name: what the workload is called in commands, profiles and tables.
        layers: its problems in the order in which they run; never empty.
        title: one line for people.
        source: where the layers come from.

    """

    name: str
    layers: tuple[Layer, ...]
    title: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for attribute in ("name", "title", "source"):
            if not isinstance(value := getattr(self, attribute), str):
                raise ArgumentTypeError(f"{attribute} must be text; got {reprlib.repr(value)}")
        if not isinstance(self.layers, tuple) or not all(isinstance(layer, Layer) for layer in self.layers):
            raise ArgumentTypeError(f"layers must be a tuple of Layer; got {reprlib.repr(self.layers)}")
        if not self.layers:
            raise WorkloadError(f"workload {self.name!r} has no layers; it needs at least one problem")

    def with_batch(self, n: int) -> Self:
        """Return this workload with ``n`` images in every problem.

        Raises:
            ArgumentTypeError, ArgumentError: if ``n`` is not a whole number of at least 1.

        """
        _check_count("batch", n)
        layers = tuple(replace(layer, problem=layer.problem.replace(n=n)) for layer in self.layers)
        return replace(self, layers=layers)

    def distinct(self) -> Self:
        """Return this workload with equal problems merged: counts and seconds added, first place and name kept.

        A recorded problem stays apart for each deployment and thread count that it was called with.
        """
        merged: dict[Any, Layer] = {}
        for layer in self.layers:
            first = merged.get(layer.posed)
            merged[layer.posed] = first.plus(layer) if first else layer
        return replace(self, layers=tuple(merged.values()))

    def to_yaml(self) -> str:
        """Return the text of a workload file; ``load`` of the file is equal to this workload."""
        head = {"name": self.name, "title": self.title, "source": self.source}
        rows = [{key: getattr(layer, key) for key in _KEYS} | {"problem": layer.problem.text} for layer in self.layers]

        def dump(mapping: dict[str, Any], *, flow: bool) -> str:
            filled = {key: value for key, value in mapping.items() if value not in ("", None)}
            return safe_yaml.dump(filled, flow=flow, unicode=True)

        return dump(head, flow=False) + "layers:\n" + "".join("- " + dump(row, flow=True) for row in rows)

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Write a workload file, whole or not at all, in place of what is there.

        Raises:
            WorkloadError: if the file cannot be written, or its name is an ONNX model's.

        """
        try:
            place = place_of(settings.user_file("path", path))
            with safe_file.exclusive(place):
                safe_file.replace(place, self.to_yaml().encode())
        except WorkloadError:
            raise
        except (OSError, ValueError) as error:
            raise WorkloadError(f"{path}: the workload cannot be written: {error}") from None


@functools.cache
def packaged() -> tuple[str, ...]:
    """Return the names of the workloads that come with convdispatch, in alphabetical order."""
    files = importlib.resources.files("convdispatch.configs").iterdir()
    # A packaged profile may lie beside them; what has layers is a workload.
    return tuple(
        sorted(
            file.name.removesuffix(".yaml")
            for file in files
            if file.name.endswith(".yaml") and b"\nlayers:" in file.read_bytes()
        )
    )


def load(what: "str | os.PathLike[str] | Problem | Workload | Iterable[Problem | str | Layer]") -> Workload:
    """Return the workload that ``what`` stands for.

    Args:
        what: a packaged workload's name; the path of a workload file or of an ONNX model (as text it needs a suffix or
            a separator, such as ``my.yaml``, ``./mine`` or ``model.onnx``); a problem or its text; an iterable of
            problems, their texts and layers; or a workload, which is returned as it is.

    Raises:
        WorkloadError: naming the file, the layer, what is wrong with it and what would do.
        ArgumentTypeError: if ``what`` is none of these.

    Examples:
        >>> sum(layer.count for layer in load("resnet50").layers)
        53

    """
    if isinstance(what, Workload):
        return what
    if isinstance(what, str):
        return _named(what)
    if isinstance(what, os.PathLike):
        return _file(Path(what))
    if isinstance(what, Problem):
        return Workload(what.text, (Layer(what),))
    if not isinstance(what, Iterable) or isinstance(what, bytes | bytearray | Mapping):
        raise ArgumentTypeError(
            "workload must be a packaged name, a path, a problem or its text, or an iterable of problems; "
            f"got {reprlib.repr(what)}"
        )
    return Workload("custom", tuple(_layer(f"workload, layer {i}", item) for i, item in enumerate(what, 1)))


def _named(text: str) -> Workload:
    if text in packaged():
        file = importlib.resources.files("convdispatch.configs").joinpath(f"{text}.yaml")
        return _parse(text, text, file.read_bytes())
    path = Path(text)
    if "*" in text and path.suffix not in {".yaml", ".yml"} and not _is_model(path):
        return load(_layer("workload", text).problem)
    if path.suffix or len(path.parts) > 1 or text.startswith(("/", ".")):
        return _file(path)
    near = difflib.get_close_matches(text.lower(), packaged(), n=1)
    raise WorkloadError(
        f"no packaged workload is called {text!r}; {f'did you mean {near[0]}? ' if near else ''}"
        f"packaged are {', '.join(packaged())}; or give a file such as ./{text or 'mine'}.yaml, "
        f"or a problem such as '{_EXAMPLE}'"
    )


def _file(path: Path) -> Workload:
    try:
        if _is_model(path):
            return _model(path)
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except WorkloadError:
        raise
    except FileNotFoundError:
        known = ", ".join(packaged())
        if str(path) in packaged():
            raise WorkloadError(f"{path} is no file but a packaged workload; name it without --from") from None
        raise WorkloadError(f"{path}: this file does not exist; packaged workloads are {known}") from None
    except (OSError, ValueError) as error:
        raise WorkloadError(f"{path}: this file cannot be read: {error}") from None
    if len(data) > _MOST_BYTES:
        raise WorkloadError(f"{path}: a workload file has at most {_MOST_BYTES} bytes; this one has more")
    return _parse(str(path), path.stem, data)


def place_of(path: Path) -> Path:
    """Return the file behind a path and its links, where a workload may be written.

    Raises:
        WorkloadError: for a model's name: the model there would be lost, and none would be read from what is written.
    """
    place = safe_file.real(path)
    if _is_model(place):
        raise WorkloadError(f"{path}: a workload is not written to {place.name}, an ONNX model's name; call it .yaml")
    return place


def _is_model(path: Path) -> bool:
    return path.suffix.lower() == ".onnx"


def _model(path: Path) -> Workload:
    layers = tuple(Layer(problem, 1, name) for name, problem in onnx_model.convolutions(path))
    return Workload(path.stem, layers, source=str(path)).distinct()


def _parse(where: str, name: str, data: bytes) -> Workload:
    content = _read_yaml(where, data)
    if not isinstance(content, dict) or not isinstance(rows := content.get("layers"), list) or not rows:
        raise WorkloadError(f"{where}: a workload file needs 'layers:', a list of at least one problem")
    _check_keys(where, content, ("name", "title", "source", "layers"))
    layers = tuple(_layer(f"{where}, layer {i}", row) for i, row in enumerate(rows, 1))
    texts = {key: value for key, value in content.items() if key != "layers"}
    try:
        return Workload(**{"name": name, **texts}, layers=layers)
    except ArgumentTypeError as error:
        raise WorkloadError(f"{where}: {error}") from None


def _read_yaml(where: str, data: bytes) -> Any:
    try:
        return safe_yaml.load(data)
    except safe_yaml.YamlError as error:
        place = where if error.line is None else f"{where}, line {error.line}"
        raise WorkloadError(f"{place}: {error}") from None


def _layer(where: str, item: Any) -> Layer:
    if isinstance(item, Layer):
        return item
    row = item if isinstance(item, dict) else {"problem": item}
    if isinstance(name := row.get("name"), str) and name:
        where = f"{where} ({name})"
    _check_keys(where, row, _KEYS)
    if "problem" not in row:
        raise WorkloadError(f'{where}: there is no problem; add one such as problem: "{_EXAMPLE}"')
    problem = row["problem"]
    try:
        return Layer(**{**row, "problem": problem if isinstance(problem, Problem) else Problem.parse(problem)})
    except (ValueError, TypeError) as error:
        raise WorkloadError(f"{where}: {error}") from None


def _check_keys(where: str, given: dict[Any, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise WorkloadError(f"{where}: {reprlib.repr(key)} is not a known key; {hint}")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} must be a whole number of at least 1; got {reprlib.repr(value)}")
    if not 1 <= value <= LARGEST:
        most = "" if value < 1 else f", and at most {LARGEST}"
        raise ArgumentError(f"{name} must be a whole number of at least 1{most}; got {shown(value)}")


def _check_seconds(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"seconds must be a number of at least 0; got {reprlib.repr(value)}")
    if not 0 <= value <= sys.float_info.max:
        raise ArgumentError(f"seconds must be a number of at least 0; got {shown(value)}")
