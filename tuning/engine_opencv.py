"""How OpenCV runs a convolution."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convdispatch.arguments import Array
from convdispatch.memory import aligned
from convdispatch.problem import Problem
from convdispatch.tuning.engine_onnx import onnx_model
from convdispatch.tuning.engines import Build, Case, Deployment, Pass, load, nchw, nhwc, only

#: Most channels that ``transform`` takes.
_TRANSFORMED = 4


class OpenCV:
    """OpenCV: its functions for images, where one does what is asked for, and its network module."""

    def __init__(self, threads: int) -> None:
        self._cv2 = load("cv2")
        self._cv2.setNumThreads(threads)
        self.version = self._cv2.__version__

    def rejects(self, problem: Problem) -> str | None:
        """Take float32 without what its importer has no single way to say."""
        if problem.epilogue.residual:
            return "not compared with residuals"
        return only(problem, "float32")

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return the function that applies, if there is one, and the network."""
        p = case.problem
        ways: dict[str, Build] = {"dnn": lambda: self._net(case)}  # which has two passes wrong for some shapes
        (top, _, left, _), (sh, sw) = p.pads, p.strides
        plain = p.dilations == (1, 1) and not p.epilogue
        within = top < p.kh and left < p.kw and (p.oh - 1) * sh < p.h and (p.ow - 1) * sw < p.w
        if plain and within and p.group_c == 1 and p.k <= 16:
            ways["filter2D"] = lambda: self._filters(case)
            if (two := case.two) is not None:
                ways["sepFilter2D"] = lambda: self._separable(case, *two)
        if plain and p.is_pointwise and p.strides == (1, 1) and p.groups == 1 and max(p.c, p.k) <= _TRANSFORMED:
            ways["transform"] = lambda: self._transform(case)
        return ways

    def _net(self, case: Case) -> Deployment:
        net = self._cv2.dnn.readNetFromONNX(np.frombuffer(onnx_model(case, [case.whole]), np.uint8))
        x = nchw(case.x)

        def run() -> Any:
            net.setInput(x)  # each time: without new input there is nothing new to compute
            return net.forward()

        return Deployment(run, nhwc)

    def _transform(self, case: Case) -> Deployment:
        p = case.problem
        x, out = case.x, aligned((p.n, p.oh, p.ow, p.k), np.dtype(np.float32))
        matrix = np.ascontiguousarray(case.w[0, 0].T)

        def run() -> None:
            for n in range(p.n):
                self._cv2.transform(x[n], matrix, out[n])

        return Deployment(run, lambda _: out)

    def _filters(self, case: Case) -> Deployment:
        kernels = [(np.ascontiguousarray(case.w[:, :, 0, k]),) for k in range(case.problem.k)]
        return self._planes(case, self._cv2.filter2D, kernels)

    def _separable(self, case: Case, down: Pass, along: Pass) -> Deployment:
        kernels = [(along.w[0, :, 0, k].copy(), down.w[:, 0, 0, k].copy()) for k in range(case.problem.k)]
        return self._planes(case, self._cv2.sepFilter2D, kernels)

    def _planes(self, case: Case, function: Any, kernels: Sequence[tuple[Array, ...]]) -> Deployment:
        """Return a filter's run over every plane; filters have one array, or two for rows and columns."""
        p, border = case.problem, self._cv2.BORDER_CONSTANT
        planes, out = nchw(case.x), aligned((p.n, p.k, p.h, p.w), np.dtype(np.float32))
        anchor = p.pads[2], p.pads[0]
        jobs = [(planes[n, k // p.group_k], out[n, k], kernels[k]) for n in range(p.n) for k in range(p.k)]

        def run() -> None:
            for plane, target, kernel in jobs:
                function(plane, -1, *kernel, target, anchor, 0, border)

        # It knows no strides: whoever wants every other pixel takes those of all.
        return Deployment(run, lambda _: nhwc(out[:, :, :: p.strides[0], :: p.strides[1]][:, :, : p.oh, : p.ow]))
