"""ONNX models as workloads: each Conv of the main graph is a problem, with what the model does to its output next.

Only the graph is read: shapes are inferred from it, and weights, which may be in other files, do not matter. A batch
that is free counts as 1; every other size must be known. A Conv over signals is a problem of one row. Functions of the
model are written out where they are called; what stands in a subgraph (If, Loop) is left out, since nobody knows how
often it runs, and so is what is no plain convolution: a warning says so.
"""

import importlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convdispatch.epilogue import Epilogue
from convdispatch.errors import LONGEST_REASON, ArgumentError, ConvDispatchWarning, WorkloadError, in_a_line, warn
from convdispatch.problem import Problem, padding_of
from convdispatch.tuning.onnx_epilogue import epilogues
from convdispatch.tuning.onnx_graph import Graph, Sizes, attributes, inner, kind

_DTYPES = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}  # TensorProto.DataType
_PADDINGS = {"SAME_UPPER": "SAME", "SAME_LOWER": "SAME_LOWER", "VALID": "VALID"}
_CONVOLUTION = re.compile(r"Conv(?!ert)")
_NOT_PLAIN = {
    "ConvTranspose": "transposed", "DeformConv": "deformable", "ConvInteger": "quantized", "QLinearConv": "quantized",
}  # fmt: skip
#: Initializers of so many elements are weights; shorter ones may be shapes, which inference reads.
_MOST_ELEMENTS = 1024


def convolutions(path: Path) -> list[tuple[str, Problem]]:
    """Return the name and the problem of each convolution of a model, in the order in which they run.

    Raises:
        WorkloadError: if the ``onnx`` package or the model is not what it must be, or a size is not known.
        OSError: if the file cannot be read.
    """
    try:
        onnx = importlib.import_module("onnx")
        inliner, shapes = (importlib.import_module(f"onnx.{name}") for name in ("inliner", "shape_inference"))
    except ImportError as error:
        raise WorkloadError(f"{path}: reading a model needs pip install 'convdispatch[onnx]': {error}") from error
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
        _forget_weights(model.graph)
        if model.functions:
            model = inliner.inline_local_functions(model)
        _take_one_image(model.graph)
        return _found(str(path), Graph(shapes.infer_shapes(model, data_prop=True).graph))
    except (OSError, WorkloadError, ConvDispatchWarning):
        raise
    except Exception as error:  # a broken model is broken anywhere
        said = in_a_line(error, LONGEST_REASON) or type(error).__name__
        raise WorkloadError(f"{path}: this is no ONNX model: {said}") from error


def _found(where: str, graph: Graph) -> list[tuple[str, Problem]]:
    plain, left_out = [], Counter[str]()
    for node in graph.nodes:
        if _CONVOLUTION.search(node.op_type):
            if (reason := _why_not(graph, node)) is None:
                plain.append(node)
            else:
                left_out[f"{kind(node)} ({reason})"] += 1
        left_out.update(f"{kind(x)} (in {kind(node)})" for x in inner(node) if _CONVOLUTION.search(x.op_type))
    told = ", ".join(f"{count} {what}" for what, count in left_out.items())
    if not plain:
        raise WorkloadError(f"{where}: this model has no convolutions that can be tuned{told and f', only {told}'}")
    found = []
    for number, (node, finish) in enumerate(zip(plain, epilogues(graph, plain), strict=True), 1):
        name = str(node.name or f"{node.op_type}_{number}")
        try:
            found.append((name, _problem(graph, node, finish)))
        except (ValueError, TypeError) as error:
            raise WorkloadError(f"{where}, node {name}: {error}") from None
    if told:
        warn(f"{where}: convolutions that are left out: {told}")
    return found


def _forget_weights(graph: Any) -> None:
    """Leave of each large initializer what it is: inference copies a model several times."""
    for tensor in graph.initializer:
        if math.prod(tensor.dims) > _MOST_ELEMENTS:
            for field in ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data"):
                tensor.ClearField(field)


def _take_one_image(graph: Any) -> None:
    """Have inputs of images and signals hold one of them, where that is all that is free: more shapes follow then."""
    for value in graph.input:
        sizes = value.type.tensor_type.shape.dim
        free = [size for size in sizes if size.dim_value <= 0]
        if len(sizes) > 2 and len(free) == 1 and sizes[0].dim_value <= 0:
            sizes[0].dim_value = 1


def _why_not(graph: Graph, node: Any) -> str | None:
    """Return why a convolution is no problem, or None."""
    if (operator := kind(node)) != "Conv":
        return _NOT_PLAIN.get(operator, "not known")
    ranks = [len(sizes) for name in node.input[:2] if (sizes := graph.tensor(name).sizes) is not None]
    return f"of {ranks[0] - 2} dimensions" if ranks and ranks[0] not in {3, 4} else None


def _problem(graph: Graph, node: Any, finish: Epilogue) -> Problem:
    options, (x, w) = attributes(node), node.input[:2]
    k, group_c, *kernel = _known(graph, w)
    image, groups, axes = _known(graph, x, 2), options.get("group", 1), len(kernel)
    n, c = (graph.tensor(x).sizes or ())[:2]
    # Channels that nobody knows follow from the filters.
    if len(image) != axes or (isinstance(c, int) and c != group_c * groups):
        told = " and ".join(f"{name!r} {_shown(graph.tensor(name).sizes)}" for name in (x, w))
        raise ArgumentError(f"its inputs {told} do not fit together, groups={groups}")

    def pair(given: Sequence[int] | None, usual: int = 1) -> tuple[int, int]:
        if given is not None and len(given) != axes:
            raise ArgumentError(f"its attributes must have a number for each of {axes} axes; got {list(given)}")
        rows, columns = (usual,) * (2 - axes) + ((usual,) * axes if given is None else tuple(given))
        return rows, columns

    size, window, strides, dilations = map(pair, (image, kernel, options.get("strides"), options.get("dilations")))
    if min(strides + dilations) < 1:
        raise ArgumentError(f"strides and dilations must be at least 1; got {strides} and {dilations}")
    word = options.get("auto_pad", b"NOTSET").decode()
    if word in _PADDINGS:
        pads = padding_of(_PADDINGS[word], size, window, strides, dilations)
    else:
        ends = options.get("pads", (0,) * 2 * axes)
        (top, left), (bottom, right) = pair(ends[:axes], 0), pair(ends[axes:], 0)
        pads = top, bottom, left, right
    return Problem(
        n if isinstance(n, int) else 1, *size, group_c * groups, k, *window, pads, strides, dilations, groups,
        _DTYPES.get(graph.tensor(x).dtype, "unknown"), "NCHW", finish,
    )  # fmt: skip


def _known(graph: Graph, name: str, first: int = 0) -> tuple[int, ...]:
    """Return the sizes of a tensor from the first on that matters."""
    sizes = graph.tensor(name).sizes
    known = tuple(size for size in (sizes or ())[first:] if isinstance(size, int))
    if sizes is None or len(known) != len(sizes) - first:
        others = "".join(
            f"; its input {each!r} is {_shown(free)}" for each, free in graph.free_inputs() if each != name
        )
        raise ArgumentError(
            f"the sizes of its input {name!r} must be known, but are {_shown(sizes)}; "
            f"export the model with fixed sizes (the batch may be free){others}"
        )
    return known


def _shown(sizes: Sizes | None) -> str:
    return "not there" if sizes is None else f"({', '.join(map(str, sizes))})"
