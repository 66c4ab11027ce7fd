"""ONNX models as workloads: a model's own numbers, counts, and every refusal.

That a problem is the right one is not read off its text: it is posed to ``conv2d`` with the model's weights, and the
result is what ONNX's reference evaluator says.
"""

import contextlib
import importlib
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from strategies import written

import convdispatch
from convdispatch import profile, profile_file
from convdispatch.arguments import Array
from convdispatch.cli import main
from convdispatch.epilogue import Epilogue
from convdispatch.errors import ConvDispatchWarning, WorkloadError
from convdispatch.problem import Problem
from convdispatch.tuning.record import ProgramRecording, record
from convdispatch.tuning.workload import Layer, Workload, load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it deprecates in itself is not ours to see to
    onnx = pytest.importorskip("onnx", reason="models are read by the onnx package: pip install onnx")
    helper = importlib.import_module("onnx.helper")
    numpy_helper = importlib.import_module("onnx.numpy_helper")
    reference = importlib.import_module("onnx.reference")
    importlib.import_module("onnx.inliner")

FLOAT, FLOAT16, DOUBLE, BFLOAT16 = 1, 10, 11, 16
SMALL = "1x4x8x8 NCHW * 3x3x4x6 SAME"


@dataclass
class Model:
    """A model being built: nodes, weights, and what goes in and comes out."""

    inputs: dict[str, Any]
    output: str = "y"
    dtype: int = FLOAT
    opset: int = 20
    nodes: list[Any] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def add(self, operator: str, inputs: str, output: str, **attributes: Any) -> "Model":
        words = ["" if word == "-" else word for word in inputs.split()]
        self.nodes.append(helper.make_node(operator, words, output.split(), **attributes))
        return self

    def hold(self, **weights: Any) -> "Model":
        dtype = model_dtype(self)
        self.weights |= {name: np.asarray(value, dtype) for name, value in weights.items()}
        return self

    @property
    def proto(self) -> Any:
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [info(name, self.dtype, sizes) for name, sizes in self.inputs.items()],
            [info(name, self.dtype, None) for name in self.output.split()],
            [numpy_helper.from_array(value, name) for name, value in self.weights.items()],
        )
        domains = [helper.make_opsetid("", self.opset), helper.make_opsetid("custom", 1)]
        return helper.make_model(graph, opset_imports=domains, **self.more)

    def save(self, folder: Path) -> Path:
        path = folder / "net.onnx"
        path.write_bytes(self.proto.SerializeToString())
        return path

    def problem(self, folder: Path) -> Problem:
        (layer,) = load(self.save(folder)).layers
        return layer.problem


def small(*, w: Sequence[int] = (6, 4, 3, 3), **attributes: Any) -> Model:
    """Return a model of one Conv, whose result is called ``c``, and what may come behind it."""
    model = Model({"x": (1, 4, 8, 8)}).hold(w=np.ones(w), b=np.ones(w[0]), full=np.ones((1, w[0], 8, 8)))
    return model.add("Conv", "x w", "c", **({"pads": [1, 1, 1, 1]} | attributes))


def without_numbers(proto: Any) -> Any:
    """Have a model's weights be in a file that is not there."""
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        tensor.external_data.add(key="location", value="nowhere.bin")
    return proto


# What a problem computes --------------------------------------------------------------------------------------------

#: Activations as one node, each with the words for it.
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
    "hardswish": ("HardSwish", {}),
    "gelu": ("Gelu", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.2}),
}


@dataclass
class Case:
    """A model of one Conv and what comes behind it, and the epilogue that it should have."""

    model: Model
    epilogue: Epilogue
    folded: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a Conv of one or two axes with every attribute, then maybe normalization, a sum and an activation."""
    axes = draw(st.sampled_from([2, 2, 2, 1]))
    several = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    kernel, strides, dilations = draw(several), draw(several), draw(several)
    extent = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    image = [size + draw(st.integers(0, 5)) for size in extent]
    groups, group_c, group_k = (draw(st.integers(1, 3)) for _ in range(3))
    n, c, k = draw(st.integers(1, 2)), groups * group_c, groups * group_k
    how: dict[str, Any] = {"strides": strides, "dilations": dilations, "group": groups}
    word = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID", None]))
    if word is not None:
        how["auto_pad"] = word
    if word == "NOTSET":
        how["pads"] = draw(st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes))
    if draw(st.booleans()):
        how["kernel_shape"] = kernel
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    model = Model({"x": (n, c, *image)}, dtype=draw(st.sampled_from([FLOAT, FLOAT, DOUBLE])))
    model.hold(w=rng.normal(size=(k, group_c, *kernel)))
    bias = draw(st.booleans())
    if bias:
        model.hold(b=rng.normal(size=k))
    model.add("Conv", "x w b" if bias else "x w", "c", **how)
    last, folded = "c", draw(st.booleans())
    if folded:
        model.hold(scale=rng.normal(size=k), shift=rng.normal(size=k), mean=rng.normal(size=k))
        model.hold(variance=rng.uniform(0.5, 2, size=k)).add(
            "BatchNormalization", "c scale shift mean variance", "n", epsilon=1e-3
        )
        last = "n"
    residual = draw(st.booleans())
    if residual:
        # Another input, of the output's shape, which the reference tells.
        model.output = last
        (y,) = reference.ReferenceEvaluator(model.proto).run(None, {"x": np.zeros((n, c, *image), model_dtype(model))})
        model.inputs["r"] = y.shape
        model.add("Add", f"{last} r" if draw(st.booleans()) else f"r {last}", "s")
        last = "s"
    name = draw(st.sampled_from([None, *ACTIVATIONS, "relu6", "silu"]))
    if name in ACTIVATIONS:
        operator, options = ACTIVATIONS[name]
        model.add(operator, last, "a", **options)
    elif name == "relu6":
        model.hold(low=0, high=6).add("Clip", f"{last} low high", "a")
    elif name == "silu":
        model.add("Sigmoid", last, "gate").add("Mul", f"gate {last}" if draw(st.booleans()) else f"{last} gate", "a")
    model.output = last if name is None else "a"
    slope = 0.2 if name == "leaky_relu" else 0.0
    return Case(model, Epilogue(bias or folded, residual, name, slope), folded)


def model_dtype(model: Model) -> np.dtype[Any]:
    dtype: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(model.dtype)
    return dtype


def posed(problem: Problem, model: Model, given: dict[str, Array], *, folded: bool) -> Array:
    """Return what ``conv2d`` makes of a problem with a model's weights: NCHW, one row where there is one axis."""
    held = model.weights
    w, b = held["w"], held.get("b", np.zeros(problem.k, held["w"].dtype))
    if folded:
        factor = held["scale"] / np.sqrt(held["variance"] + w.dtype.type(1e-3))
        w = w * factor.reshape(-1, *(1,) * (w.ndim - 1))
        b = (b - held["mean"]) * factor + held["shift"]
    if w.ndim == 3:
        w, given = w[:, :, None], {name: array[:, :, None] for name, array in given.items()}
    assert problem.dtype == w.dtype
    assert problem.input_shape == given["x"].shape
    assert problem.filter_shape == w.transpose(2, 3, 1, 0).shape
    finish = problem.epilogue
    return convdispatch.conv2d(
        given["x"], w, problem.strides, (problem.pads[:2], problem.pads[2:]), problem.data_format, problem.dilations,
        groups=problem.groups, filter_format="OIHW", bias=b if finish.bias else None, activation=written(finish),
        residual=given["r"] if finish.residual else None, backend="im2col",
    )  # fmt: skip


@given(case=cases())
def test_a_problem_computes_what_the_model_does(case: Case, tmp_path: Path) -> None:
    model = case.model
    problem = model.problem(tmp_path)
    assert problem.epilogue == case.epilogue
    rng = np.random.default_rng(0)
    numbers = {name: rng.normal(size=sizes).astype(model_dtype(model)) for name, sizes in model.inputs.items()}
    (expected,) = reference.ReferenceEvaluator(model.proto).run(None, numbers)
    y = posed(problem, model, numbers, folded=case.folded)
    np.testing.assert_allclose(y.reshape(expected.shape), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("dtype", "name"), [(FLOAT16, "float16"), (FLOAT, "float32"), (DOUBLE, "float64"), (BFLOAT16, "bfloat16")]
)
def test_dtypes(dtype: int, name: str, tmp_path: Path) -> None:
    model = Model({"x": (1, 4, 8, 8)}, dtype=dtype, opset=22).hold(w=np.ones((6, 4, 3, 3)), b=np.ones(6))
    model.hold(low=0, high=6).add("Conv", "x w b", "c").add("Clip", "c low high", "y")
    text = SMALL.replace("SAME", "VALID") + f" {name} +bias +relu6"
    assert model.problem(tmp_path) == Problem.parse(text)


# What belongs to the epilogue, and what does not --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "epilogue"),
    [
        (lambda m: m.add("Relu", "c", "y"), "+relu"),
        (lambda m: m.add("LeakyRelu", "c", "y"), "+leaky_relu(0.01)"),
        (lambda m: m.hold(low=0).add("Clip", "c low", "y"), "+relu"),
        (lambda m: m.add("Constant", "", "low", value_float=0.0).add("Clip", "c low", "y"), "+relu"),
        (lambda m: m.hold(high=6).add("Clip", "c - high", "y"), ""),
        (lambda m: m.hold(low=0, high=5).add("Clip", "c low high", "y"), ""),
        (lambda m: m.hold(low=0, high=6).add("Neg", "high", "top").add("Clip", "c low top", "y"), ""),
        (lambda m: m.add("HardSigmoid", "c", "h", alpha=1 / 6).add("Mul", "c h", "y"), "+hardswish"),
        (lambda m: m.add("HardSigmoid", "c", "h").add("Mul", "c h", "y"), ""),
        (lambda m: m.add("HardSigmoid", "c", "h", alpha=1 / 6, beta=0.4).add("Mul", "c h", "y"), ""),
        (lambda m: m.add("Tanh", "c", "h").add("Mul", "c h", "y"), ""),
        (lambda m: m.add("Sigmoid", "c", "h").add("Mul", "c h", "a").add("Add", "a h", "y"), ""),
        (lambda m: m.add("Gelu", "c", "y", approximate="tanh"), ""),
        (lambda m: m.add("Elu", "c", "y"), ""),
        (lambda m: m.add("Relu", "c", "y", domain="custom"), ""),
        # Who else reads what is between must be given it.
        (lambda m: m.add("Relu", "c", "a").add("Mul", "a c", "y"), ""),
        (lambda m: m.add("Mul", "c c", "y"), ""),
        (lambda m: replace(m.add("Relu", "c", "y"), output="y c"), ""),
        (lambda m: replace(m.add("Sigmoid", "c", "h").add("Mul", "c h", "y"), output="y h"), ""),
        # Sums.
        (lambda m: m.add("Add", "c full", "s").add("Relu", "s", "y"), "+residual +relu"),
        (lambda m: m.add("Relu", "c", "a").add("Add", "a full", "y"), "+relu"),
        (lambda m: m.add("Add", "c c", "y"), ""),
        (lambda m: m.hold(one=np.ones((6, 1, 1))).add("Add", "c one", "s").add("Relu", "s", "y"), ""),
        (lambda m: m.hold(two=np.ones((2, 6, 8, 8))).add("Add", "c two", "y"), ""),
        (lambda m: m.add("Add", "c full", "s").add("Add", "s full", "y"), "+residual"),
        (lambda m: replace(m.add("Add", "c full", "s").add("Relu", "s", "y"), output="s y"), "+residual"),
        # Normalization, with numbers that are there, and that may come through other nodes.
        (lambda m: m.add("BatchNormalization", "c b b b b", "n").add("Relu", "n", "y"), "+bias +relu"),
        (lambda m: m.add("Identity", "b", "i").add("BatchNormalization", "c b i b i", "y"), "+bias"),
        (lambda m: m.add("Relu", "c", "a").add("BatchNormalization", "a b b b b", "y"), "+relu"),
        (lambda m: m.add("BatchNormalization", "c b b b b", "y p q", training_mode=1), ""),
        (lambda m: m.add("BatchNormalization", "c b b b b", "y", training_mode=1), ""),
        (lambda m: replace(m.add("BatchNormalization", "c b b b b", "y p q r s"), opset=8), ""),
        (lambda m: m.add("BatchNormalization", "full c b b b", "y"), ""),
        (lambda m: replace(m, inputs=m.inputs | {"v": [6]}).add("BatchNormalization", "c b b b v", "y"), ""),
    ],
)  # fmt: skip
def test_what_belongs_to_the_epilogue(build: Callable[[Model], Model], epilogue: str, tmp_path: Path) -> None:
    assert build(small()).problem(tmp_path) == Problem.parse(f"{SMALL} {epilogue}")


@pytest.mark.parametrize(("limits", "epilogue"), [({"min": 0.0, "max": 6.0}, "+relu6"), ({"max": 6.0}, "")])
def test_limits_that_are_attributes(limits: dict[str, float], epilogue: str, tmp_path: Path) -> None:
    model = replace(small().add("Clip", "c", "y", **limits), opset=10)
    assert model.problem(tmp_path) == Problem.parse(f"{SMALL} {epilogue}")


def test_limits_in_another_file_are_not_known(tmp_path: Path) -> None:
    proto = without_numbers(small().hold(low=0).add("Clip", "c low", "y").proto)
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    assert [str(layer.problem) for layer in load(tmp_path / "net.onnx").layers] == [SMALL]


def test_a_sum_of_two_convolutions_is_taken_once(tmp_path: Path) -> None:
    model = small().hold(v=np.ones((6, 4, 1, 1))).add("Conv", "x v b", "d").add("Add", "d c", "s").add("Relu", "s", "y")
    first, second = load(model.save(tmp_path)).layers
    assert str(first.problem) == SMALL
    assert str(second.problem) == "1x4x8x8 NCHW * 1x1x4x6 VALID +bias +residual +relu"


def test_a_subgraph_reads_too(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Neg", ["c"], ["t"])], "branch", [], [helper.make_tensor_value_info("t", FLOAT, None)]
    )
    model = small().hold(yes=1).add("Cast", "yes", "on", to=9).add("Relu", "c", "a")
    model.add("If", "on", "z", then_branch=branch, else_branch=branch).add("Add", "a z", "y")
    assert str(model.problem(tmp_path)) == SMALL


# Names and counts ---------------------------------------------------------------------------------------------------


def test_equal_convolutions_count_and_the_first_ones_name_stays(tmp_path: Path) -> None:
    model = Model({"x": (1, 4, 8, 8)}).hold(w=np.ones((4, 4, 3, 3)), v=np.ones((4, 4, 1, 1)))
    for number, (weights, name) in enumerate([("w", "stem"), ("v", ""), ("w", "body"), ("w", ""), ("v", "last")]):
        how = {"pads": [1, 1, 1, 1]} if weights == "w" else {}
        model.add("Conv", f"{f'h{number}' if number else 'x'} {weights}", f"h{number + 1}", name=name, **how)
    workload = load(str(replace(model, output="h5").save(tmp_path)))
    square, point = (Problem.parse(f"1x4x8x8 NCHW * {rest}") for rest in ("3x3x4x4 SAME", "1x1x4x4 VALID"))
    assert workload.layers == (Layer(square, 3, "stem"), Layer(point, 2, "Conv_2"))
    assert workload.name == "net"


def test_functions_are_written_out_where_they_are_called(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["u", "f"], ["t"]), helper.make_node("Relu", ["t"], ["v"])]
    function = helper.make_function("custom", "Block", ["u", "f"], ["v"], nodes, [helper.make_opsetid("", 20)])
    model = Model({"x": (1, 4, 8, 8)}, more={"functions": [function]}).hold(w=np.ones((4, 4, 1, 1)))
    model.add("Block", "x w", "a", domain="custom").add("Block", "a w", "y", domain="custom")
    (layer,) = load(model.save(tmp_path)).layers
    assert (layer.count, str(layer.problem)) == (2, "1x4x8x8 NCHW * 1x1x4x4 VALID +relu")


# Sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["N", None, 0, -1, 1])
def test_a_batch_that_is_free_is_one(batch: Any, tmp_path: Path) -> None:
    model = replace(small(), inputs={"x": (batch, 4, 8, 8)})
    # What is made of it is known too: here the second Conv's image.
    model.hold(v=np.ones((1, 2, 3, 3))).add("Shape", "c", "all", start=0, end=1)
    model.nodes.append(helper.make_node("Constant", [], ["rest"], value_ints=[2, 24, -1]))
    model.add("Concat", "all rest", "to", axis=0).add("Reshape", "c to", "d").add("Conv", "d v", "y")
    first, second = load(model.save(tmp_path)).with_batch(3).layers
    assert str(first.problem) == SMALL.replace("1x4", "3x4")
    assert str(second.problem) == "3x2x24x8 NCHW * 3x3x2x1 VALID"


def test_a_batch_that_nothing_tells_is_one(tmp_path: Path) -> None:
    model = Model({"x": ("N", "D")}).hold(w=np.ones((6, 4, 3, 3)))
    model.nodes.append(helper.make_node("Constant", [], ["to"], value_ints=[-1, 4, 8, 8]))
    assert str(model.add("Reshape", "x to", "i").add("Conv", "i w", "y").problem(tmp_path)) == SMALL.replace(
        "SAME", "VALID"
    )


def test_channels_follow_from_the_filters(tmp_path: Path) -> None:
    model = replace(small(w=(6, 2, 3, 3), group=2), inputs={"x": (1, "C", 8, 8)})
    assert str(model.problem(tmp_path)) == SMALL.replace("3x3x4", "3x3x2")


def test_weights_are_not_needed(tmp_path: Path) -> None:
    model = replace(small(w=(64, 4, 3, 3)), output="c")
    proto = without_numbers(model.proto)
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    (layer,) = load(tmp_path / "net.onnx").layers
    assert str(layer.problem) == "1x4x8x8 NCHW * 3x3x4x64 SAME"


def test_weights_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sizes = replace(small(w=(64, 4, 3, 3)), output="c").save(tmp_path), []
    infer = onnx.shape_inference.infer_shapes

    def spy(model: Any, **how: Any) -> Any:
        sizes.append(model.ByteSize())
        return infer(model, **how)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", spy)
    load(path)
    assert sizes[0] < path.stat().st_size / 10


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            (1, 4, "height", 8),
            r"'x' must be known, but are \(1, 4, height, 8\); export the model with fixed sizes \(the",
        ),
        ((1, 4, -1, 8), r"'x' must be known, but are \(1, 4, \?, 8\); export"),
        (("N", 4, None, None), r"'x' must be known, but are \(N, 4, \?, \?\); export"),
        (None, "'x' must be known, but are not there; export"),
    ],
)
def test_sizes_that_are_not_known_are_told_with_file_and_node(sizes: Any, said: str, tmp_path: Path) -> None:
    path = replace(small(name="stem"), inputs={"x": sizes}).save(tmp_path)
    with pytest.raises(WorkloadError, match=rf"net\.onnx, node stem: the sizes of its input {said}"):
        load(path)


def test_the_models_own_input_is_told_where_another_ones_size_is_not_known(tmp_path: Path) -> None:
    model = Model({"x": (1, 4, "H", 8)}).hold(w=np.ones((6, 4, 3, 3)))
    with pytest.raises(WorkloadError, match=r"input 'i' must be .* be free\); its input 'x' is \(1, 4, H, 8\)$"):
        load(model.add("Relu", "x", "i").add("Conv", "i w", "y").save(tmp_path))


def test_filters_of_unknown_size_are_told(tmp_path: Path) -> None:
    model = Model({"x": (1, 4, 8, 8), "w": (6, 4, "K", "K")}).add("Conv", "x w", "y")
    with pytest.raises(WorkloadError, match=r"node Conv_1: the sizes of its input 'w' must be known"):
        load(model.save(tmp_path))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (small(w=(6, 3, 3, 3)), r"'x' \(1, 4, 8, 8\) and 'w' \(6, 3, 3, 3\) do not fit together, groups=1"),
        (small(w=(6, 4, 3), pads=[1, 1]), r"'w' \(6, 4, 3\) do not fit together"),
        (small(w=(6, 4, 11, 3)), "filters span 11 rows"),
        (small(strides=[1]), r"must have a number for each of 2 axes; got \[1\]"),
        (small(strides=[0, 1]), r"strides and dilations must be at least 1; got \(0, 1\)"),
        (small(pads=[1, 1]), r"must have a number for each of 2 axes; got \[\]"),
        (small(pads=[-1, 1, 1, 1]), "pads must be at least 0"),
    ],
)
def test_a_wrong_convolution_is_told(model: Model, said: str, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=rf"net\.onnx.*{said}"):
        load(replace(model, output="c").save(tmp_path))


# What is left out, and what is no model -----------------------------------------------------------------------------


def with_left_out(what: str) -> Model:
    """Return a model with a Conv and another convolution beside it."""
    model = Model({"x": (1, 4, 8, 8), "v": (1, 4, 5, 8, 8)}).hold(w=np.ones((6, 4, 3, 3)), w3=np.ones((6, 4, 1, 3, 3)))
    model.hold(t=np.ones((4, 6, 2, 2))).add("Conv", "x w", "y")
    if what == "Conv (of 3 dimensions)":
        return model.add("Conv", "v w3", "z").add("Conv", "v w3", "q")
    if what == "ConvTranspose (transposed)":
        return model.add("ConvTranspose", "x t", "z").add("ConvTranspose", "x t", "q")
    if what == "ConvInteger (quantized)":
        model.add("Cast", "x", "xi", to=3).add("Cast", "w", "wi", to=3)
        return model.add("ConvInteger", "xi wi", "z").add("ConvInteger", "xi wi", "q")
    if what == "custom.NhwcConv (not known)":
        return model.add("NhwcConv", "x w", "z", domain="custom").add("NhwcConv", "x w", "q", domain="custom")
    branch = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["t"])], "branch", [], [helper.make_tensor_value_info("t", FLOAT, None)]
    )
    return model.hold(yes=1).add("Cast", "yes", "on", to=9).add(
        "If", "on", "z", then_branch=branch, else_branch=branch
    )  # fmt: skip


LEFT_OUT = (
    "Conv (of 3 dimensions)", "ConvTranspose (transposed)", "ConvInteger (quantized)", "custom.NhwcConv (not known)",
    "Conv (in If)",
)  # fmt: skip


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_is_left_out_is_told_once(what: str, tmp_path: Path) -> None:
    path = with_left_out(what).save(tmp_path)
    with pytest.warns(ConvDispatchWarning) as told:
        (layer,) = load(path).layers
    assert str(layer.problem) == SMALL.replace("SAME", "VALID")
    assert [str(one.message) for one in told] == [f"{path}: convolutions that are left out: 2 {what}"]


def test_what_is_left_out_can_be_made_an_error(tmp_path: Path) -> None:
    path = with_left_out(LEFT_OUT[0]).save(tmp_path)
    with pytest.raises(ConvDispatchWarning, match="convolutions that are left out"):  # as tests have all warnings
        load(path)


def test_a_cast_is_no_convolution(tmp_path: Path) -> None:
    assert str(small().add("Convert", "c", "y", domain="custom").problem(tmp_path)) == SMALL


def test_a_model_without_convolutions_says_what_it_has(tmp_path: Path) -> None:
    model = with_left_out("ConvTranspose (transposed)")
    model.nodes.pop(0)
    with pytest.raises(WorkloadError, match=r"net\.onnx: this model has no conv.* tuned, only 2 ConvTranspose \(tr"):
        load(model.save(tmp_path))
    with pytest.raises(WorkloadError, match=r"net\.onnx: this model has no convolutions that can be tuned$"):
        load(Model({"x": (1, 2)}).add("Relu", "x", "y").save(tmp_path))


@pytest.mark.parametrize("data", [bytes(range(256)), b"layers:\n- 1x8x8x4 * 3x3x4x8 SAME\n", b"\x0a"])
def test_a_file_that_is_no_model(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(data)
    with pytest.raises(WorkloadError, match=r"net\.onnx: this is no ONNX model: "):
        load(str(path))


@given(data=st.data())
def test_a_damaged_model_is_a_workload_or_told(data: st.DataObject, tmp_path: Path) -> None:
    whole = bytearray(small(name="stem").add("BatchNormalization", "c b b b b", "y").proto.SerializeToString())
    place = data.draw(st.integers(0, 150))
    whole[place] = data.draw(st.integers(0, 255))
    (tmp_path / "net.onnx").write_bytes(whole)
    with contextlib.suppress(WorkloadError, ConvDispatchWarning):
        load(tmp_path / "net.onnx")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(WorkloadError, match=r"folder\.onnx: this file cannot be read: "):
        load(tmp_path / "folder.onnx")
    for name in ("none.onnx", "a*b.ONNX"):
        with pytest.raises(WorkloadError, match="this file does not exist"):
            load(str(tmp_path / name))


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small().save(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(WorkloadError, match=r"net\.onnx: reading a model needs pip install 'convdispatch\[onnx\]'"):
        load(path)


def test_nothing_is_written_to_a_model(tmp_path: Path) -> None:
    path, link = replace(small(), output="c").save(tmp_path), tmp_path / "calls.yaml"
    link.symlink_to(path)
    whole, workload = path.read_bytes(), load(SMALL)
    for place in (path, link):
        with pytest.raises(WorkloadError, match=r"a workload is not written to net\.onnx, an ONNX model's name"):
            workload.dump(place)
        with pytest.raises(WorkloadError, match="not written to"), record(place):
            pytest.fail("it is told at once")
    program = ProgramRecording(path)
    program.add(workload.layers[0].problem, "call", None, 1.0)
    with pytest.warns(ConvDispatchWarning, match=r"recorded calls are written to .*net-\d+\.yaml: .*an ONNX model's"):
        program.write(last=True)
    assert path.read_bytes() == whole


# As a user ----------------------------------------------------------------------------------------------------------


def test_a_model_is_tuned_from_the_command_line_and_then_known(tmp_path: Path) -> None:
    model = small(name="stem").add("Relu", "c", "a").hold(t=np.ones((6, 4, 2, 2))).add("ConvTranspose", "a t", "y")
    path, file = model.save(tmp_path), tmp_path / "profile.yaml"
    how = ["--backends", "direct,im2col", "--profile", str(file), "--deployment", "plan", "--allow-busy"]
    profile.forget()
    done = CliRunner().invoke(main, ["tune", str(path), *how])
    assert done.exit_code == 0, done.output
    assert f"{SMALL} +relu" in done.stdout
    assert "stem" in done.stdout
    assert f"convdispatch: {path}: convolutions that are left out: 1 ConvTranspose (transposed)" in done.stderr
    (entry,) = profile_file.read(file).entries()
    assert entry.key.problem == Problem.parse(f"{SMALL} +relu")
    with pytest.warns(ConvDispatchWarning, match="left out"), convdispatch.options(profile=file):
        again = convdispatch.tune(path, backends=["direct", "im2col"], deployments=["plan"])
    assert [layer.status for layer in again.layers] == ["known"]


def test_a_model_is_a_workload_like_another(tmp_path: Path) -> None:
    workload = load(replace(small(name="größe: [1]"), output="c").save(tmp_path))
    workload.dump(tmp_path / "w.yaml")
    assert load(tmp_path / "w.yaml") == workload
    assert isinstance(workload, Workload)
    assert math.prod(workload.layers[0].problem.output_shape) == 6 * 64
