"""ONNX's own tests of its Conv and ConvInteger operators, run through a thin adapter.

The ``onnx`` package ships them as data (a model, inputs, outputs) and, for single nodes, as the code that writes
such data; which of the two depends on its version. Both are read here, whatever is there.
"""

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convdispatch
from convdispatch.arguments import Array

pytestmark = pytest.mark.usefixtures("few_kernels")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it deprecates in itself is not ours to see to
    onnx = pytest.importorskip("onnx", reason="ONNX's tests come with the onnx package: pip install onnx")
    numpy_helper = importlib.import_module("onnx.numpy_helper")


@dataclass(frozen=True)
class Node:
    """One operator with the arrays that go in and the one that must come out."""

    name: str
    operator: str
    attributes: dict[str, Any]
    inputs: tuple[Array, ...]
    output: Array


def spatial(node: Node) -> bool:
    """Return whether a node convolves in two dimensions."""
    return node.operator in {"Conv", "ConvInteger"} and node.inputs[0].ndim == 4


def read_tensor(path: Path) -> Array:
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return np.asarray(numpy_helper.to_array(tensor))


def from_graph(name: str, graph: Any, given: list[Array], wanted: Array) -> Node | None:
    """Return a one-node graph with its arrays, or None if it has more nodes."""
    if len(graph.node) != 1:
        return None
    node = graph.node[0]
    values = {tensor.name: np.asarray(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    free = [value.name for value in graph.input if value.name not in values]
    values.update(zip(free, given, strict=False))
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return Node(name, node.op_type, attributes, tuple(values[one] for one in node.input if one), wanted)


def shipped() -> Iterator[Node]:
    """Yield the tests that are there as data."""
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for model_path in sorted(data.glob("*/test_*[cC]onv*/model.onnx")):
        model = onnx.load(model_path)
        for folder in sorted(model_path.parent.glob("test_data_set_*")):
            given = [read_tensor(path) for path in sorted(folder.glob("input_*.pb"))]
            wanted = read_tensor(folder / "output_0.pb")
            node = from_graph(f"{model_path.parent.name}-{folder.name[-1]}", model.graph, given, wanted)
            if node is not None and spatial(node):
                yield node


def written() -> Iterator[Node]:
    """Yield the node tests that are there as code, which runs when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = importlib.import_module("onnx.backend.test.case.node")
        for module in ("conv", "convinteger"):
            importlib.import_module(f"onnx.backend.test.case.node.{module}")
        for case in cases._NodeTestCases:
            for given, wanted in case.data_sets or ():
                node = from_graph(case.name, case.model.graph, list(given), np.asarray(wanted[0]))
                if node is not None and spatial(node):
                    yield node


NODES = {node.name: node for node in [*shipped(), *written()]}


def run(node: Node, backend: str | None) -> Array:
    """Run a Conv or ConvInteger node: ONNX's attributes in conv2d's words."""
    x, w, *rest = node.inputs
    attributes = node.attributes
    padding: Any = {"NOTSET": None, "SAME_UPPER": "SAME"}.get(
        word := attributes.get("auto_pad", b"NOTSET").decode(), word
    )
    if padding is None:
        top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
        padding = ((top, bottom), (left, right))
    how: dict[str, Any] = {
        "strides": attributes.get("strides", [1, 1]),
        "dilations": attributes.get("dilations", [1, 1]),
        "groups": attributes.get("group", 1),
        "padding": padding,
        "data_format": "NCHW",
        "filter_format": "OIHW",
        "backend": backend,
    }
    if node.operator == "ConvInteger":
        # What is padded stands for zero, so that shifting by the zero points first changes nothing else.
        x_zero, w_zero = (np.asarray(rest[i], np.int32) if i < len(rest) else np.int32(0) for i in (0, 1))
        shifted = w.astype(np.int32) - np.reshape(w_zero, (-1, 1, 1, 1))
        return convdispatch.conv2d(x.astype(np.int32) - x_zero, shifted, **how)
    return convdispatch.conv2d(x, w, bias=rest[0] if rest else None, **how)


def test_there_are_node_tests_with_and_without_padding_strides_groups_and_integers() -> None:
    attributes = [node.attributes for node in NODES.values()]
    assert len(NODES) >= 10
    assert any(any(one.get("pads", ())) for one in attributes)
    assert any(set(one.get("strides", ())) == {2} for one in attributes)
    assert {node.operator for node in NODES.values()} == {"Conv", "ConvInteger"}


@pytest.mark.parametrize("backend", [None, *convdispatch.backends()])
@pytest.mark.parametrize("name", NODES)
def test_onnx_node(name: str, backend: str | None) -> None:
    node = NODES[name]
    try:
        y = run(node, backend)
    except convdispatch.BackendRejectedError as error:
        pytest.skip(str(error))
    assert y.shape == node.output.shape
    assert y.dtype == node.output.dtype
    if node.operator == "ConvInteger":
        np.testing.assert_array_equal(y, node.output)
    else:
        np.testing.assert_allclose(y, node.output, rtol=1e-3, atol=1e-5)
