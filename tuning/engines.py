"""The engines that convdispatch is compared with: how each is built from a problem in its best form, and called.

An engine offers one or several deployments of a problem: ways to run it, each with constant weights packed, and
with the input in the layout it likes best, both prepared outside the clock. The worker times them all and keeps the
fastest, so that no engine is judged by a way in which nobody would run it. Padding that an engine cannot express is
a call of its own, inside the clock.

Modules are loaded by name, since any of them may be missing; the error is the reason that the report gives.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from convdispatch.arguments import Array
from convdispatch.problem import Problem, same_pads
from convdispatch.tuning.gate import Trial

OWN = "convdispatch"


@dataclass(frozen=True)
class Case:
    """A problem with its numbers, the same for every engine.

    Attributes:
        problem: what to compute.
        x: ``[N, H, W, C]``.
        w: ``[KH, KW, C // groups, K]``.
        bias: ``[K]`` or None.
        residual: ``[N, OH, OW, K]`` or None.
    """

    problem: Problem
    x: Array
    w: Array
    bias: Array | None
    residual: Array | None

    @classmethod
    def of(cls, problem: Problem) -> "Case":
        """Draw a problem's numbers."""
        trial = Trial.random(problem.replace(data_format="NHWC"))
        return cls(problem, trial.input, trial.filters, trial.bias, trial.residual)

    @property
    def oihw(self) -> Array:
        """The filters as ``[K, C // groups, KH, KW]``."""
        return np.ascontiguousarray(self.w.transpose(3, 2, 0, 1))


@dataclass(frozen=True)
class Deployment:
    """One way to run a problem.

    Attributes:
        run: what is timed.
        result: makes ``[N, OH, OW, K]`` of what ``run`` returned.
        holds: what the engine reads without owning it.
    """

    run: Callable[[], Any]
    result: Callable[[Any], Array]
    holds: object = None


Build = Callable[[], Deployment]


class Engine(Protocol):
    """An engine, made in its own process with its thread count."""

    version: str

    def rejects(self, problem: Problem) -> str | None:
        """Return why it cannot do a problem, or None."""

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return the ways to run a case; a build that raises is passed over."""


def _load(name: str) -> Any:
    """Import a module that may not be there, as something without known types."""
    return importlib.import_module(name)


def _nchw(array: Array) -> Array:
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2))


def _nhwc(array: Array) -> Array:
    return np.asarray(array).transpose(0, 2, 3, 1)


def _only(problem: Problem, *dtypes: str) -> str | None:
    return None if problem.dtype in dtypes else f"compared in {' and '.join(dtypes)} only, not {problem.dtype}"


class ConvDispatch:
    """A plan, as its user makes it: NHWC (or what the problem says), filters packed, ``out`` given."""

    def __init__(self, threads: int) -> None:
        del threads  # the environment of the worker has it, and the profile
        self._module: Any = _load("convdispatch")
        self.version = self._module.__version__

    def rejects(self, problem: Problem) -> str | None:
        """Take everything."""
        del problem
        return None

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return the plan that the profile or the estimate chooses."""
        p = case.problem
        nchw = p.data_format == "NCHW"
        x, residual = (None if a is None else (_nchw(a) if nchw else a) for a in (case.x, case.residual))
        activation = ("leaky_relu", p.epilogue.slope) if p.epilogue.slope else p.epilogue.activation
        plan = self._module.plan(
            x, case.w, p.strides, ((p.pads[0], p.pads[1]), (p.pads[2], p.pads[3])), p.data_format, p.dilations,
            groups=p.groups, bias=case.bias, activation=activation, residual=residual is not None,
        )  # fmt: skip
        out = np.full_like(plan(x, residual=residual), 7)  # nothing of the first call is to pass for the next one's
        run = functools.partial(plan, x, out=out, **({} if residual is None else {"residual": residual}))
        return {f"{plan.candidate.name}, {plan.evidence}": lambda: Deployment(run, _nhwc if nchw else np.asarray)}


class Torch:
    """PyTorch: channels-last tensors in inference mode, scripted and frozen, or oneDNN's packed tensors."""

    def __init__(self, threads: int) -> None:
        self._torch = _load("torch")
        self._torch.set_num_threads(threads)
        self._torch.inference_mode().__enter__()  # for as long as the process lives
        self.version = self._torch.__version__

    def rejects(self, problem: Problem) -> str | None:
        """Take floats that NumPy and torch both have."""
        return _only(problem, "float32", "float64")

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return eager calls, the frozen graph, and packed weights with oneDNN's own tensors."""
        last = self._torch.channels_last
        ways: dict[str, Build] = {
            "channels_last": lambda: self._eager(case, last),
            "channels_last, frozen graph": lambda: self._frozen(case),
        }
        if case.problem.dtype == "float32" and not case.problem.epilogue and _even(case.problem):
            ways["oneDNN tensors, packed weights"] = lambda: self._packed(case)
        return ways

    def _tensors(self, case: Case, layout: Any) -> tuple[Any, Any, Any, Any]:
        x, w, residual = (
            None if a is None else self._torch.from_numpy(np.ascontiguousarray(a)).contiguous(memory_format=layout)
            for a in (_nchw(case.x), case.oihw, None if case.residual is None else _nchw(case.residual))
        )
        return x, w, None if case.bias is None else self._torch.from_numpy(case.bias), residual

    def _function(self, case: Case, w: Any, bias: Any) -> Callable[..., Any]:
        """Return the convolution with what follows it, as a function of input and residual."""
        p, functional = case.problem, self._torch.nn.functional
        top, bottom, left, right = p.pads
        finish = self._activation(p)

        def call(x: Any, residual: Any = None) -> Any:
            pads = top, left
            if not _even(p):  # torch pads both ends alike; what else there is costs a copy
                x, pads = functional.pad(x, (left, right, top, bottom)), (0, 0)
            y = functional.conv2d(x, w, bias, p.strides, pads, p.dilations, p.groups)
            if residual is not None:
                y = y.add_(residual)
            return finish(y) if finish else y

        return call

    def _activation(self, problem: Problem) -> Callable[[Any], Any] | None:
        name, f = problem.epilogue.activation, self._torch.nn.functional
        if name in {"relu", "relu6", "silu", "hardswish"}:
            return functools.partial(getattr(f, name), inplace=True)
        if name == "leaky_relu":
            return functools.partial(f.leaky_relu, negative_slope=problem.epilogue.slope, inplace=True)
        return {"gelu": f.gelu, "sigmoid": self._torch.sigmoid_, "tanh": self._torch.tanh_}.get(name or "")

    def _eager(self, case: Case, layout: Any) -> Deployment:
        x, w, bias, residual = self._tensors(case, layout)
        call = self._function(case, w, bias)
        return Deployment(functools.partial(call, *((x,) if residual is None else (x, residual))), _nhwc)

    def _frozen(self, case: Case) -> Deployment:
        torch = self._torch
        x, w, bias, residual = self._tensors(case, torch.channels_last)
        given = (x,) if residual is None else (x, residual)
        function = self._function(case, w, bias)  # tensors that it holds become the graph's constants
        holder = type("Layer", (torch.nn.Module,), {"forward": lambda _, *args: function(*args)})().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still what is fastest for some layers
            graph = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(holder, given)))
        return Deployment(functools.partial(graph, *given), _nhwc)

    def _packed(self, case: Case) -> Deployment:
        torch, p = self._torch, case.problem
        x, w, bias, _ = self._tensors(case, torch.contiguous_format)
        pads = p.pads[0], p.pads[2]
        packed = torch._C._nn.mkldnn_reorder_conv2d_weight(  # noqa: SLF001  # torch.utils.mkldnn packs by this
            w.to_mkldnn(), pads, p.strides, p.dilations, p.groups, tuple(x.shape)
        )
        given = (x.to_mkldnn(), packed, bias, p.strides, pads, p.dilations, p.groups)
        return Deployment(functools.partial(torch.nn.functional.conv2d, *given), lambda y: _nhwc(y.to_dense()))


def _even(problem: Problem) -> bool:
    """Return whether both ends of each axis are padded alike."""
    top, bottom, left, right = problem.pads
    return top == bottom and left == right


# ONNX: one model for three engines --------------------------------------------------------------------------------

_ONNX_OPSET, _ONNX_IR = 20, 9  # the oldest that has Gelu
_ONNX_NAMES = {
    "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "hardswish": "HardSwish", "gelu": "Gelu",
    "leaky_relu": "LeakyRelu", "relu6": "Clip", "silu": "Sigmoid",
}  # fmt: skip


def _onnx_model(case: Case) -> bytes:
    """Return a model of one Conv with constant weights, and what its epilogue adds."""
    helper, numpy_helper, p = _load("onnx.helper"), _load("onnx.numpy_helper"), case.problem
    top, bottom, left, right = p.pads
    constants = {"w": case.oihw} | ({"b": case.bias} if case.bias is not None else {})
    nodes = [
        helper.make_node(
            "Conv", ["x", *constants], ["conv"], kernel_shape=(p.kh, p.kw), pads=(top, left, bottom, right),
            strides=p.strides, dilations=p.dilations, group=p.groups,
        )
    ]  # fmt: skip
    shapes = {"x": (p.n, p.c, p.h, p.w)}
    last, out = "conv", (p.n, p.k, p.oh, p.ow)
    if case.residual is not None:
        shapes["r"] = out
        nodes.append(helper.make_node("Add", [last, "r"], ["sum"]))
        last = "sum"
    if name := p.epilogue.activation:
        options = {"alpha": p.epilogue.slope} if name == "leaky_relu" else {}
        limits = {"low": np.float32(0), "high": np.float32(6)} if name == "relu6" else {}
        nodes.append(helper.make_node(_ONNX_NAMES[name], [last, *limits], ["act"], **options))
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
    opset = helper.make_opsetid("", _ONNX_OPSET)
    model: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=_ONNX_IR).SerializeToString()
    return model


def _onnx_inputs(case: Case) -> dict[str, Array]:
    given = {"x": _nchw(case.x)}
    return given if case.residual is None else given | {"r": _nchw(case.residual)}


class OnnxRuntime:
    """ONNX Runtime: a session over a model with constant weights, run plainly or with bound memory."""

    def __init__(self, threads: int) -> None:
        self._ort, self._threads = _load("onnxruntime"), threads
        self.version = self._ort.__version__

    def rejects(self, problem: Problem) -> str | None:
        """Take float32."""
        return _only(problem, "float32")

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return the two ways to pass arrays."""
        options = self._ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = 3
        session = self._ort.InferenceSession(_onnx_model(case), options, providers=["CPUExecutionProvider"])
        given = _onnx_inputs(case)
        plain = Deployment(lambda: session.run(None, given), lambda y: _nhwc(y[0]))
        return {"run": lambda: plain, "bound memory": lambda: self._bound(session, case, given)}

    def _bound(self, session: Any, case: Case, given: Mapping[str, Array]) -> Deployment:
        p, value = case.problem, self._ort.OrtValue.ortvalue_from_numpy
        binding = session.io_binding()
        held = {name: value(array) for name, array in given.items()}
        for name, bound in held.items():
            binding.bind_ortvalue_input(name, bound)
        out = value(np.empty((p.n, p.k, p.oh, p.ow), np.float32))
        binding.bind_ortvalue_output(session.get_outputs()[0].name, out)
        return Deployment(lambda: session.run_with_iobinding(binding), lambda _: _nhwc(out.numpy()), held)


class OpenVino:
    """OpenVINO: a compiled model with constant weights, held to float32, its input NCHW or NHWC."""

    def __init__(self, threads: int) -> None:
        self._ov, self._threads = _load("openvino"), threads
        self.version = self._ov.__version__

    def rejects(self, problem: Problem) -> str | None:
        """Take float32."""
        return _only(problem, "float32")

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return both layouts."""
        return {layout: functools.partial(self._compiled, case, layout) for layout in ("NCHW", "NHWC")}

    def _compiled(self, case: Case, layout: str) -> Deployment:
        ov, io = self._ov, _load("io")
        model = ov.Core().read_model(io.BytesIO(_onnx_model(case)))
        if layout == "NHWC":
            steps = _load("openvino.preprocess").PrePostProcessor(model)
            for port in [steps.input(i) for i in range(len(model.inputs))] + [steps.output()]:
                port.tensor().set_layout(ov.Layout("NHWC"))
                port.model().set_layout(ov.Layout("NCHW"))
            model = steps.build()
        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": self._threads}
        hints |= {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        request = ov.compile_model(model, "CPU", hints).create_infer_request()
        given = [case.x, case.residual] if layout == "NHWC" else list(_onnx_inputs(case).values())
        held = [np.ascontiguousarray(array) for array in given if array is not None]
        for number, array in enumerate(held):
            request.set_input_tensor(number, ov.Tensor(array, shared_memory=True))
        back = np.asarray if layout == "NHWC" else _nhwc
        return Deployment(request.infer, lambda _: back(request.get_output_tensor(0).data), held)


class OpenCV:
    """OpenCV: ``filter2D`` where each output comes from one channel, and its network module."""

    def __init__(self, threads: int) -> None:
        self._cv2 = _load("cv2")
        self._cv2.setNumThreads(threads)
        self.version = self._cv2.__version__

    def rejects(self, problem: Problem) -> str | None:
        """Take float32 without what its importer has no single way to say."""
        if problem.epilogue.residual:
            return "not compared with residuals"
        return _only(problem, "float32")

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return the filter, where it applies, and the network."""
        p, ways = case.problem, {"dnn": lambda: self._net(case)}
        plain = p.strides == (1, 1) and p.dilations == (1, 1) and not p.epilogue
        within = p.pads[0] < p.kh and p.pads[2] < p.kw and p.oh <= p.h and p.ow <= p.w
        if plain and within and p.group_c == 1 and p.k <= 16:
            ways["filter2D"] = lambda: self._filters(case)
        return ways

    def _net(self, case: Case) -> Deployment:
        net = self._cv2.dnn.readNetFromONNX(np.frombuffer(_onnx_model(case), np.uint8))
        x = _nchw(case.x)

        def run() -> Any:
            net.setInput(x)  # each time: without new input there is nothing new to compute
            return net.forward()

        return Deployment(run, _nhwc)

    def _filters(self, case: Case) -> Deployment:
        cv2, p = self._cv2, case.problem
        planes, out = _nchw(case.x), np.empty((p.n, p.k, p.h, p.w), np.float32)
        anchor = p.pads[2], p.pads[0]
        jobs = [
            (planes[n, k // p.group_k], out[n, k], np.ascontiguousarray(case.w[:, :, 0, k]))
            for n in range(p.n)
            for k in range(p.k)
        ]

        def run() -> None:
            for plane, target, kernel in jobs:
                cv2.filter2D(plane, -1, kernel, target, anchor, 0, cv2.BORDER_CONSTANT)

        return Deployment(run, lambda _: _nhwc(out[:, :, : p.oh, : p.ow]))


class SciPy:
    """scipy.signal: overlap-add convolution over the planes of few channels."""

    def __init__(self, threads: int) -> None:
        self._signal = _load("scipy.signal")
        _load("scipy.fft").set_workers(threads).__enter__()  # for as long as the process lives
        self.version = _load("scipy").__version__

    def rejects(self, problem: Problem) -> str | None:
        """Take few channels: every pair of them is a convolution of its own."""
        if problem.epilogue:
            return "has no epilogue"
        if problem.group_c * problem.k > 64:
            return f"{problem.group_c * problem.k} pairs of channels; compared up to 64"
        return _only(problem, "float32", "float64")

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return transforms by block and of the whole image."""
        return {name: functools.partial(self._planes, case, name) for name in ("oaconvolve", "fftconvolve")}

    def _planes(self, case: Case, name: str) -> Deployment:
        p, function = case.problem, getattr(self._signal, name)
        top, bottom, left, right = p.pads
        x = np.pad(_nchw(case.x), ((0, 0), (0, 0), (top, bottom), (left, right)))
        x = x.reshape(p.n, p.groups, 1, p.group_c, *x.shape[2:])
        w = np.zeros((p.k, p.group_c, *p.extent), case.w.dtype)
        w[..., :: p.dilations[0], :: p.dilations[1]] = case.oihw
        w = np.ascontiguousarray(w[..., ::-1, ::-1]).reshape(1, p.groups, p.group_k, p.group_c, *p.extent)

        def run() -> Array:
            whole: Array = function(x, w, mode="valid", axes=(4, 5))
            sums: Array = whole.sum(axis=3)
            return sums[..., :: p.strides[0], :: p.strides[1]]

        return Deployment(run, lambda y: _nhwc(y.reshape(p.n, p.k, p.oh, p.ow)))


class XnnPack:
    """XNNPACK through LiteRT: a model of one convolution (and a PAD where SAME does not say it), NHWC."""

    def __init__(self, threads: int) -> None:
        self._schema = _load("ai_edge_litert.schema_py_generated")
        self._flat, self._interpreter = _load("flatbuffers"), _load("ai_edge_litert.interpreter").Interpreter
        self._threads = threads
        self.version = _load("importlib.metadata").version("ai-edge-litert")

    def rejects(self, problem: Problem) -> str | None:
        """Take float32 with the fused activations of the format."""
        if problem.epilogue.residual or problem.epilogue.activation not in (None, "relu", "relu6"):
            return "not compared with residuals, nor activations other than relu and relu6"
        return _only(problem, "float32")

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


#: The peers, in the order in which tables have them.
PEERS: Mapping[str, Callable[[int], Engine]] = {
    "torch": Torch, "onnxruntime": OnnxRuntime, "openvino": OpenVino, "xnnpack": XnnPack, "opencv": OpenCV,
    "scipy": SciPy,
}  # fmt: skip


def make(name: str, threads: int) -> Engine:
    """Return an engine by its name, or by ``module:class`` for one's own.

    Raises:
        ImportError: if what it needs is not installed.
    """
    module, colon, attribute = name.partition(":")
    if colon:
        own: Engine = getattr(_load(module), attribute)(threads)
        return own
    return ConvDispatch(threads) if name == OWN else PEERS[name](threads)
