"""How PyTorch runs a convolution."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convdispatch.problem import Problem
from convdispatch.tuning.engines import Build, Case, Deployment, load, nchw, nhwc, only


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
            for a in (nchw(case.x), case.oihw, None if case.residual is None else nchw(case.residual))
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
        return Deployment(functools.partial(call, *((x,) if residual is None else (x, residual))), nhwc)

    def _frozen(self, case: Case) -> Deployment:
        torch = self._torch
        x, w, bias, residual = self._tensors(case, torch.channels_last)
        given = (x,) if residual is None else (x, residual)
        function = self._function(case, w, bias)  # tensors that it holds become the graph's constants
        holder = type("Layer", (torch.nn.Module,), {"forward": lambda _, *args: function(*args)})().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still what is fastest for some layers
            graph = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(holder, given)))
        return Deployment(functools.partial(graph, *given), nhwc)

    def _packed(self, case: Case) -> Deployment:
        torch, p = self._torch, case.problem
        x, w, bias, _ = self._tensors(case, torch.contiguous_format)
        pads = p.pads[0], p.pads[2]
        packed = torch._C._nn.mkldnn_reorder_conv2d_weight(  # noqa: SLF001  # torch.utils.mkldnn packs by this
            w.to_mkldnn(), pads, p.strides, p.dilations, p.groups, tuple(x.shape)
        )
        given = (x.to_mkldnn(), packed, bias, p.strides, pads, p.dilations, p.groups)
        return Deployment(functools.partial(torch.nn.functional.conv2d, *given), lambda y: nhwc(y.to_dense()))


def _even(problem: Problem) -> bool:
    """Return whether both ends of each axis are padded alike."""
    top, bottom, left, right = problem.pads
    return top == bottom and left == right
