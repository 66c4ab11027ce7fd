"""How XNNPACK runs a convolution."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from convdispatch.arguments import Array
from convdispatch.problem import Problem, same_pads
from convdispatch.tuning.engines import Build, Case, Deployment, load, only


class XnnPack:
    """XNNPACK through LiteRT: a model of one convolution (and a PAD where SAME does not say it), NHWC."""

    def __init__(self, threads: int) -> None:
        self._schema = load("ai_edge_litert.schema_py_generated")
        self._flat, self._interpreter = load("flatbuffers"), load("ai_edge_litert.interpreter").Interpreter
        self._threads = threads
        self.version = load("importlib.metadata").version("ai-edge-litert")

    def rejects(self, problem: Problem) -> str | None:
        """Take float32 with the fused activations of the format."""
        if problem.epilogue.residual or problem.epilogue.activation not in (None, "relu", "relu6"):
            return "not compared with residuals, nor activations other than relu and relu6"
        if problem.separable:
            return "not compared with separable filters, which are two convolutions for it"
        return only(problem, "float32")

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return the one way."""
        return {"NHWC": lambda: self._invoked(case)}

    def _invoked(self, case: Case) -> Deployment:
        net = self._interpreter(model_content=self._model(case), num_threads=self._threads)
        net.allocate_tensors()
        net.set_tensor(net.get_input_details()[0]["index"], case.x)
        out = net.get_output_details()[0]["index"]
        return Deployment(net.invoke, lambda _: net.get_tensor(out))

    def _model(self, case: Case) -> bytes:
        s, p = self._schema, case.problem
        depthwise = p.groups == p.c > 1
        w = case.w.reshape(1, p.kh, p.kw, p.k) if depthwise else case.w.transpose(3, 0, 1, 2)
        bias = np.zeros(p.k, np.float32) if case.bias is None else case.bias
        top, bottom, left, right = p.pads
        arrays: list[tuple[Array | None, tuple[int, ...]]] = [
            (None, case.x.shape), (w, w.shape), (bias, bias.shape), (None, (p.n, p.oh, p.ow, p.k)),
        ]  # fmt: skip
        axes = zip((p.h, p.w), (p.kh, p.kw), p.strides, p.dilations, strict=True)
        same = p.pads == tuple(pad for axis in axes for pad in same_pads(*axis))
        operators, codes, source = [], [s.BuiltinOperator.DEPTHWISE_CONV_2D if depthwise else 3], 0
        if not same and any(p.pads):
            rims = np.array([(0, 0), (top, bottom), (left, right), (0, 0)], np.int32)
            arrays += [(rims, rims.shape), (None, (p.n, p.h + top + bottom, p.w + left + right, p.c))]
            codes, source = [*codes, s.BuiltinOperator.PAD], 5
            operators.append(_made(s.OperatorT, opcodeIndex=1, inputs=[0, 4], outputs=[5]))
        kind = "DepthwiseConv2D" if depthwise else "Conv2D"
        options = _made(
            getattr(s, f"{kind}OptionsT"), padding=0 if same else 1, strideH=p.strides[0], strideW=p.strides[1],
            dilationHFactor=p.dilations[0], dilationWFactor=p.dilations[1],
            fusedActivationFunction={None: 0, "relu": 1, "relu6": 3}[p.epilogue.activation],
        )  # fmt: skip
        if depthwise:
            options.depthMultiplier = p.group_k
        union = getattr(s.BuiltinOptions, f"{kind}Options")
        operators.append(_made(s.OperatorT, opcodeIndex=0, inputs=[source, 1, 2], outputs=[3],
                               builtinOptionsType=union, builtinOptions=options))  # fmt: skip
        packed: bytes = self._packed(arrays, operators, codes)
        return packed

    def _packed(
        self, arrays: list[tuple[Array | None, tuple[int, ...]]], operators: list[Any], codes: list[Any]
    ) -> Any:
        """Return the bytes of a model whose tensor 0 goes in and whose tensor 3 comes out."""
        s, tensors, buffers = self._schema, [], [self._schema.BufferT()]
        for number, (value, shape) in enumerate(arrays):
            integer = value is not None and value.dtype == np.int32
            tensors.append(_made(s.TensorT, shape=list(shape), type=2 if integer else 0, name=f"t{number}".encode()))
            if value is not None:
                tensors[-1].buffer = len(buffers)
                buffers.append(_made(s.BufferT, data=np.frombuffer(value.tobytes(), np.uint8)))
        graph = _made(s.SubGraphT, tensors=tensors, inputs=[0], outputs=[3], operators=operators, name=b"main")
        known = [_made(s.OperatorCodeT, builtinCode=code, deprecatedBuiltinCode=code, version=1) for code in codes]
        model = _made(s.ModelT, version=3, operatorCodes=known, subgraphs=[graph], buffers=buffers)
        builder = self._flat.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def _made(kind: Any, **fields: Any) -> Any:
    """Return an object of a generated class with some of its fields set."""
    made = kind()
    for name, value in fields.items():
        setattr(made, name, value)
    return made
