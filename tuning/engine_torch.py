"""How PyTorch runs a convolution."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from convdispatch.arguments import Array
from convdispatch.problem import Problem
from convdispatch.tuning.engines import Build, Case, Deployment, Pass, load, nchw, nhwc, only


class Torch:
    """PyTorch: channels-last tensors in inference mode, scripted and frozen, or oneDNN's packed tensors."""

    def __init__(self, threads: int) -> None:
        self._torch = load("torch")
        self._torch.set_num_threads(threads)
        self._torch.inference_mode().__enter__()  # for as long as the process lives
        self.version = self._torch.__version__

    def rejects(self, problem: Problem) -> str | None:
        """Take floats that NumPy and torch both have."""
        return only(problem, "float32", "float64")

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return eager calls, the frozen graph, and packed weights with oneDNN's own tensors."""
        ways: dict[str, Build] = {}
        for how, passes in case.ways.items():
            ways[f"channels_last{how}"] = functools.partial(self._eager, case, passes)
            ways[f"channels_last, frozen graph{how}"] = functools.partial(self._frozen, case, passes)
        if case.problem.dtype == "float32" and not case.problem.epilogue and _even(case.problem):
            ways["oneDNN tensors, packed weights"] = lambda: self._packed(case)
        return ways

    def _tensor(self, array: Array, layout: Any) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(array)).contiguous(memory_format=layout)

    def _given(self, case: Case) -> tuple[Any, ...]:
        """Return the input, and the residual if there is one."""
        arrays = (case.x,) if case.residual is None else (case.x, case.residual)
        return tuple(self._tensor(nchw(array), self._torch.channels_last) for array in arrays)

    def _bias(self, case: Case) -> Any:
        return None if case.bias is None else self._torch.from_numpy(case.bias)

    def _function(self, case: Case, passes: Sequence[Pass]) -> Callable[..., Any]:
        """Return the convolution with what follows it, as a function of input and residual."""
        functional = self._torch.nn.functional
        finish, bias = self._activation(case.problem), self._bias(case)
        steps = [(each.problem, self._tensor(each.oihw, self._torch.channels_last)) for each in passes]

        def convolve(x: Any, p: Problem, w: Any) -> Any:
            top, bottom, left, right = p.pads
            pads = top, left
            if not _even(p):  # torch pads both ends alike; what else there is costs a copy
                x, pads = functional.pad(x, (left, right, top, bottom)), (0, 0)
            added = bias if p.epilogue.bias else None
            return functional.conv2d(x, w, added, p.strides, pads, p.dilations, p.groups)

        def call(x: Any, residual: Any = None) -> Any:
            y = x
            for p, w in steps:
                y = convolve(y, p, w)
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

    def _eager(self, case: Case, passes: Sequence[Pass]) -> Deployment:
        return Deployment(functools.partial(self._function(case, passes), *self._given(case)), nhwc)

    def _frozen(self, case: Case, passes: Sequence[Pass]) -> Deployment:
        torch, given = self._torch, self._given(case)
        function = self._function(case, passes)  # tensors that it holds become the graph's constants
        holder = type("Layer", (torch.nn.Module,), {"forward": lambda _, *args: function(*args)})().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still what is fastest for some layers
            graph = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(holder, given)))
        return Deployment(functools.partial(graph, *given), nhwc)

    def _packed(self, case: Case) -> Deployment:
        torch, p = self._torch, case.problem
        x, w = (self._tensor(array, torch.contiguous_format) for array in (nchw(case.x), case.whole.oihw))
        pads = p.pads[0], p.pads[2]
        packed = torch._C._nn.mkldnn_reorder_conv2d_weight(  # noqa: SLF001  # torch.utils.mkldnn packs by this
            w.to_mkldnn(), pads, p.strides, p.dilations, p.groups, tuple(x.shape)
        )
        given = (x.to_mkldnn(), packed, self._bias(case), p.strides, pads, p.dilations, p.groups)
        return Deployment(functools.partial(torch.nn.functional.conv2d, *given), lambda y: nhwc(y.to_dense()))


def _even(problem: Problem) -> bool:
    """Return whether both ends of each axis are padded alike."""
    top, bottom, left, right = problem.pads
    return top == bottom and left == right
