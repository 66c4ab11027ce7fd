"""How SciPy runs a convolution."""

import functools
from collections.abc import Mapping

import numpy as np

from convdispatch.arguments import Array
from convdispatch.problem import Problem
from convdispatch.tuning.engines import Build, Case, Deployment, load, nchw, nhwc, only


class SciPy:
    """scipy.signal: overlap-add convolution over the planes of few channels."""

    def __init__(self, threads: int) -> None:
        self._signal = load("scipy.signal")
        load("scipy.fft").set_workers(threads).__enter__()  # for as long as the process lives
        self.version = load("scipy").__version__

    def rejects(self, problem: Problem) -> str | None:
        """Take few channels: every pair of them is a convolution of its own."""
        if problem.epilogue:
            return "has no epilogue"
        if problem.group_c * problem.k > 64:
            return f"{problem.group_c * problem.k} pairs of channels; compared up to 64"
        return only(problem, "float32", "float64")

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return transforms by block and of the whole image."""
        return {name: functools.partial(self._planes, case, name) for name in ("oaconvolve", "fftconvolve")}

    def _planes(self, case: Case, name: str) -> Deployment:
        p, function = case.problem, getattr(self._signal, name)
        top, bottom, left, right = p.pads
        x = np.pad(nchw(case.x), ((0, 0), (0, 0), (top, bottom), (left, right)))
        x = x.reshape(p.n, p.groups, 1, p.group_c, *x.shape[2:])
        w = np.zeros((p.k, p.group_c, *p.extent), case.w.dtype)
        w[..., :: p.dilations[0], :: p.dilations[1]] = case.oihw
        w = np.ascontiguousarray(w[..., ::-1, ::-1]).reshape(1, p.groups, p.group_k, p.group_c, *p.extent)

        def run() -> Array:
            whole: Array = function(x, w, mode="valid", axes=(4, 5))
            sums: Array = whole.sum(axis=3)
            return sums[..., :: p.strides[0], :: p.strides[1]]

        return Deployment(run, lambda y: nhwc(y.reshape(p.n, p.k, p.oh, p.ow)))
