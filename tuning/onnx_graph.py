"""An ONNX graph, so that it can be asked about: what is known of a tensor, and who uses it."""

import importlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

#: Sizes of a tensor; of one that is not known there is the name that the model has for it, or a question mark.
Sizes = tuple[int | str, ...]
_EXTERNAL = 1  # TensorProto.EXTERNAL: the numbers are in another file


@dataclass(frozen=True)
class Tensor:
    """What is known of a tensor.

    Attributes:
        dtype: its ``TensorProto.DataType``; 0 if that is not known.
        sizes: None if not even their number is known.
    """

    dtype: int = 0
    sizes: Sizes | None = None


class Graph:
    """The main graph of a model whose shapes have been inferred."""

    def __init__(self, graph: Any) -> None:
        """Look through the graph once."""
        self.nodes = list(graph.node)
        self._inputs = [value.name for value in graph.input]
        self._tensors = {
            value.name: _tensor(value.type.tensor_type) for value in (*graph.input, *graph.value_info, *graph.output)
        }
        self._tensors |= {one.name: Tensor(one.data_type, tuple(one.dims)) for one in graph.initializer}
        self._results = {value.name for value in graph.output}
        self._users: dict[str, list[Any]] = defaultdict(list)
        self._numbers = {one.name: one for one in graph.initializer}
        self._constants = set(self._numbers)
        for node in self.nodes:
            for name in (*node.input, *_captured(node)):
                self._users[name].append(node)
            if node.op_type == "Constant":
                self._numbers[node.output[0]] = next(iter(attributes(node).values()), None)
            if node.op_type == "Constant" or (node.input and self._constants.issuperset(node.input)):
                self._constants.update(node.output)

    def tensor(self, name: str) -> Tensor:
        """Return what is known of a tensor."""
        return self._tensors.get(name, Tensor())

    def free_inputs(self) -> Iterator[tuple[str, Sizes]]:
        """Yield the names and sizes of the model's inputs of which a size, or more, is not known."""
        for name in self._inputs:
            sizes = self.tensor(name).sizes
            if sizes is not None and any(isinstance(size, str) for size in sizes):
                yield name, sizes

    def users(self, name: str) -> list[Any]:
        """Return the nodes that read a tensor, once for each time; none if it is also a result of the model."""
        return [] if name in self._results else self._users.get(name, [])

    def only_user(self, name: str) -> Any:
        """Return the one node that reads a tensor; None if nobody does, or several, or it is a result."""
        users = self.users(name)
        return users[0] if len(users) == 1 else None

    def is_constant(self, name: str) -> bool:
        """Return whether a tensor is the same in every run: weights, or what is made of nothing else."""
        return name in self._constants

    def number(self, name: str) -> float | None:
        """Return a constant's value; None if it is not there to be read, or not one number."""
        value = self._numbers.get(name)
        if isinstance(value, int | float) or value is None:
            return value
        if getattr(value, "data_location", _EXTERNAL) == _EXTERNAL:
            return None
        array = importlib.import_module("onnx.numpy_helper").to_array(value)
        return float(array.item()) if array.size == 1 else None


def kind(node: Any) -> str:
    """Return a node's operator, the domain before it if that is not ONNX's own."""
    return str(node.op_type) if node.domain in {"", "ai.onnx"} else f"{node.domain}.{node.op_type}"


def attributes(node: Any) -> dict[str, Any]:
    """Return a node's attributes by name."""
    value_of = importlib.import_module("onnx.helper").get_attribute_value
    return {attribute.name: value_of(attribute) for attribute in node.attribute}


def inner(node: Any) -> Iterator[Any]:
    """Yield the nodes of a node's subgraphs, however deep."""
    for graph in _subgraphs(node):
        yield from graph.node


def _subgraphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            yield graph
            for below in graph.node:
                yield from _subgraphs(below)


def _captured(node: Any) -> Iterator[str]:
    """Yield the names that a node's subgraphs use; those of their own tensors, too, which does no harm."""
    for graph in _subgraphs(node):
        for below in graph.node:
            yield from below.input
        for value in graph.output:
            yield value.name


def _tensor(found: Any) -> Tensor:
    if not found.HasField("shape"):
        return Tensor(found.elem_type)
    # Some exporters write 0 or -1 for a size that is free.
    sizes = (size.dim_value if size.dim_value > 0 else size.dim_param or "?" for size in found.shape.dim)
    return Tensor(found.elem_type, tuple(sizes))
