"""A convolution as an ONNX model, which three engines read, and how ONNX Runtime runs it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convdispatch.arguments import Array
from convdispatch.problem import Problem
from convdispatch.tuning.engines import Build, Case, Deployment, Pass, load, nchw, nhwc, only

_OPSET, _IR = 20, 9  # the oldest that has Gelu
_NAMES = {
    "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "hardswish": "HardSwish", "gelu": "Gelu",
    "leaky_relu": "LeakyRelu", "relu6": "Clip", "silu": "Sigmoid",
}  # fmt: skip


def onnx_model(case: Case, passes: Sequence[Pass]) -> bytes:
    """Return a model of a Conv with constant weights for each pass, and what the epilogue adds."""
    helper, numpy_helper, p = load("onnx.helper"), load("onnx.numpy_helper"), case.problem
    constants: dict[str, Array] = {} if case.bias is None else {"b": case.bias}
    nodes, last = [], "x"
    for number, each in enumerate(passes):
        q, weights, result = each.problem, f"w{number}", "conv" if each is passes[-1] else f"pass{number}"
        constants[weights] = each.oihw
        given = [last, weights, *(["b"] if q.epilogue.bias else [])]
        nodes.append(
            helper.make_node(
                "Conv", given, [result], kernel_shape=(q.kh, q.kw), pads=(*q.pads[::2], *q.pads[1::2]),
                strides=q.strides, dilations=q.dilations, group=q.groups,
            )
        )  # fmt: skip
        last = result
    shapes, out = {"x": (p.n, p.c, p.h, p.w)}, (p.n, p.k, p.oh, p.ow)
    if case.residual is not None:
        shapes["r"] = out
        nodes.append(helper.make_node("Add", [last, "r"], ["sum"]))
        last = "sum"
    if name := p.epilogue.activation:
        options = {"alpha": p.epilogue.slope} if name == "leaky_relu" else {}
        limits = {"low": np.float32(0), "high": np.float32(6)} if name == "relu6" else {}
        nodes.append(helper.make_node(_NAMES[name], [last, *limits], ["act"], **options))
        constants |= {key: np.asarray(value) for key, value in limits.items()}
        if name == "silu":
            nodes.append(helper.make_node("Mul", [last, "act"], ["mul"]))
        last = "mul" if name == "silu" else "act"
    graph = helper.make_graph(
        nodes, "layer",
        [helper.make_tensor_value_info(key, 1, shape) for key, shape in shapes.items()],
        [helper.make_tensor_value_info(last, 1, out)],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )  # fmt: skip
    opset = helper.make_opsetid("", _OPSET)
    model: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=_IR).SerializeToString()
    return model


def onnx_inputs(case: Case) -> dict[str, Array]:
    """Return what goes into the model, NCHW."""
    given = {"x": nchw(case.x)}
    return given if case.residual is None else given | {"r": nchw(case.residual)}


class OnnxRuntime:
    """ONNX Runtime: a session over a model with constant weights, run plainly or with bound memory."""

    def __init__(self, threads: int) -> None:
        self._ort, self._threads = load("onnxruntime"), threads
        self.version = self._ort.__version__

    def rejects(self, problem: Problem) -> str | None:
        """Take float32."""
        return only(problem, "float32")

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return the two ways to pass arrays."""
        options = self._ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = 3
        given, ways = onnx_inputs(case), {}
        for how, passes in case.ways.items():
            model = onnx_model(case, passes)
            session = self._ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            ways[f"run{how}"] = functools.partial(self._plain, session, given)
            ways[f"bound memory{how}"] = functools.partial(self._bound, session, given, case)
        return ways

    def _plain(self, session: Any, given: Mapping[str, Array]) -> Deployment:
        return Deployment(lambda: session.run(None, given), lambda y: nhwc(y[0]))

    def _bound(self, session: Any, given: Mapping[str, Array], case: Case) -> Deployment:
        p, value = case.problem, self._ort.OrtValue.ortvalue_from_numpy
        binding = session.io_binding()
        held = {name: value(array) for name, array in given.items()}
        for name, bound in held.items():
            binding.bind_ortvalue_input(name, bound)
        out = value(np.empty((p.n, p.k, p.oh, p.ow), np.float32))
        binding.bind_ortvalue_output(session.get_outputs()[0].name, out)
        return Deployment(lambda: session.run_with_iobinding(binding), lambda _: nhwc(out.numpy()), held)
