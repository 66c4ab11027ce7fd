"""What an ONNX graph does to a convolution's output that its epilogue can do: bias, residual, activation.

What counts is what a runtime that fuses would hand over. A BatchNormalization right behind a Conv is folded into its
filters and bias. An Add of a tensor of the same shape is a residual, and what comes next an activation, as long as
nobody else reads what is between: sums plus bias, plus residual, then the activation, the epilogue's own order. Where
an Add has a Conv on both sides, the later one takes it, and with it the activation; the other one has neither.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from convdispatch.epilogue import Epilogue, parse_activation
from convdispatch.tuning.onnx_graph import Graph, attributes, kind

_NAMES = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "HardSwish": "hardswish"}
_LIMITS: dict[tuple[float | None, float | None], str] = {(0.0, 6.0): "relu6", (0.0, math.inf): "relu"}


def epilogues(graph: Graph, convolutions: Sequence[Any]) -> list[Epilogue]:
    """Return the epilogue of each Conv of a graph.

    Raises:
        ArgumentError: for an activation's slope that is no number.
    """
    taken: set[str] = set()
    return [_epilogue(graph, conv, taken) for conv in reversed(convolutions)][::-1]


def _epilogue(graph: Graph, conv: Any, taken: set[str]) -> Epilogue:
    """Return a Conv's epilogue; ``taken`` are the sums that belong to others, and get this one's."""
    bias, residual, last = len(conv.input) > 2 and conv.input[2] != "", False, conv.output[0]
    if (node := graph.only_user(last)) is not None and _is_folded(graph, conv, node):
        bias, last = True, node.output[0]
    if (node := graph.only_user(last)) is not None and _is_residual(graph, node, taken):
        residual, last = True, node.output[0]
        taken.add(last)
    return Epilogue(bias, residual, *parse_activation(_activation(graph, last)))


def _is_folded(graph: Graph, conv: Any, node: Any) -> bool:
    """Return whether a node is a BatchNormalization of a Conv's output whose numbers, as the filters, are constants."""
    return (
        kind(node) == "BatchNormalization"
        and all(graph.is_constant(name) for name in (conv.input[1], *node.input[1:]))
        and not attributes(node).get("training_mode", 0)
        and not any(node.output[1:])
    )


def _is_residual(graph: Graph, node: Any, taken: set[str]) -> bool:
    """Return whether a node adds two tensors of exactly one shape, and nobody has taken it."""
    if kind(node) != "Add" or node.output[0] in taken:
        return False
    one, other = (graph.tensor(name).sizes for name in node.input)
    return one is not None and one == other


def _activation(graph: Graph, last: str) -> str | tuple[str, float] | None:
    """Return the activation that a tensor goes through, if nothing else is done with it, as ``conv2d`` takes it."""
    users = graph.users(last)
    if len(users) == 2:
        return _gated(graph, users)
    return _named(graph, users[0]) if len(users) == 1 else None


def _named(graph: Graph, node: Any) -> str | tuple[str, float] | None:
    """Return the activation that a node is."""
    options = attributes(node)
    match kind(node):
        case "LeakyRelu":
            return "leaky_relu", _slope(options.get("alpha", 0.01))
        case "Clip":
            return _LIMITS.get(_limits(graph, node, options))
        case "Gelu":
            return "gelu" if options.get("approximate", b"none") == b"none" else None
        case "Swish":
            return "silu" if options.get("alpha", 1.0) == 1 else None
        case operator:
            return _NAMES.get(operator)


def _gated(graph: Graph, users: Sequence[Any]) -> str | None:
    """Return the activation that is a tensor times its own sigmoid, hard or not, for which models have two nodes."""
    gate, product = sorted(users, key=lambda node: kind(node) == "Mul")
    if kind(product) != "Mul" or graph.only_user(gate.output[0]) is not product:
        return None
    options = attributes(gate)
    if kind(gate) == "HardSigmoid":
        slope, middle = options.get("alpha", 0.2), options.get("beta", 0.5)
        return "hardswish" if math.isclose(slope, 1 / 6, rel_tol=1e-6) and middle == 0.5 else None
    return "silu" if kind(gate) == "Sigmoid" else None


def _limits(graph: Graph, node: Any, options: dict[str, Any]) -> tuple[float | None, float | None]:
    """Return what a Clip clips to: attributes in old models, inputs in later ones."""
    inputs = dict(enumerate(node.input))
    low, high = inputs.get(1), inputs.get(2)
    return (
        graph.number(low) if low else options.get("min", -math.inf),
        graph.number(high) if high else options.get("max", math.inf),
    )


def _slope(alpha: float) -> float:
    """Return the shortest number that is this one in float32, as a model has it: 0.1, not 0.10000000149."""
    return float(str(np.float32(alpha)))
