"""How SciPy runs a convolution."""

import functools
from collections.abc import Mapping

import numpy as np

from convdispatch.arguments import Array
from convdispatch.problem import Problem
from convdispatch.tuning.engines import Build, Case, Deployment, Pass, load, nchw, nhwc, only


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
        """Return transforms by block and of the whole image; for separable filters, sums down and along, too."""
        names = ("oaconvolve", "fftconvolve")
        ways: dict[str, Build] = {name: functools.partial(self._planes, case, name) for name in names}
        p = case.problem
        if (two := case.two) and p.strides == p.dilations == (1, 1) and p.padding == "SAME":
            ways["correlate1d"] = functools.partial(self._lines, case, *two)
        return ways

    def _lines(self, case: Case, down: Pass, along: Pass) -> Deployment:
        p, correlate = case.problem, load("scipy.ndimage").correlate1d
        planes, out = nchw(case.x), np.empty((p.n, p.k, p.h, p.w), case.x.dtype)
        between = np.empty((p.h, p.w), case.x.dtype)
        # Windows of an even length begin one to the left of where SAME has them.
        shift = [-1 if length % 2 == 0 else 0 for length in (p.kh, p.kw)]

        def run() -> None:
            for n in range(p.n):
                for k in range(p.k):
                    source = planes[n, k // p.group_k]
                    correlate(source, down.w[:, 0, 0, k], 0, between, "constant", 0.0, shift[0])
                    correlate(between, along.w[0, :, 0, k], 1, out[n, k], "constant", 0.0, shift[1])

        return Deployment(run, lambda _: nhwc(out))

    def _planes(self, case: Case, name: str) -> Deployment:
        p, function = case.problem, getattr(self._signal, name)
        top, bottom, left, right = p.pads
        x = np.pad(nchw(case.x), ((0, 0), (0, 0), (top, bottom), (left, right)))
        x = x.reshape(p.n, p.groups, 1, p.group_c, *x.shape[2:])
        w = np.zeros((p.k, p.group_c, *p.extent), case.w.dtype)
        w[..., :: p.dilations[0], :: p.dilations[1]] = case.w.transpose(3, 2, 0, 1)
        w = np.ascontiguousarray(w[..., ::-1, ::-1]).reshape(1, p.groups, p.group_k, p.group_c, *p.extent)

        def run() -> Array:
            whole: Array = function(x, w, mode="valid", axes=(4, 5))
            sums: Array = whole.sum(axis=3)
            return sums[..., :: p.strides[0], :: p.strides[1]]

        return Deployment(run, lambda y: nhwc(y.reshape(p.n, p.k, p.oh, p.ow)))
