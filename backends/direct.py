"""``direct``: plain loops, the definition of a convolution that can be read, compiled.

It does every problem there is, reads and writes any layout in place, uses one thread and no scratch, and sums in
one order. It is here to be right; it is fast only where a problem is too small for anything else.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types

from convdispatch.arguments import Array
from convdispatch.backend import Backend, Config, Kernel
from convdispatch.backends._activation import activate
from convdispatch.backends._jit import array, integers, njit
from convdispatch.machine import Machine
from convdispatch.problem import Problem, dtype_of


def _convolve(x, w, bias, residual, out, pads, strides, dilations, code, slope):  # type: ignore[no-untyped-def]
    """Convolve ``x [N, H, W, C]`` with ``w [K, KH, KW, C // groups]`` into ``out [N, OH, OW, K]``."""
    height, width = x.shape[1:3]
    kh, kw, group_c = w.shape[1:]
    group_k = max(1, w.shape[0] // max(1, x.shape[3] // max(1, group_c)))
    for n in range(out.shape[0]):
        for oh in range(out.shape[1]):
            for ow in range(out.shape[2]):
                for k in range(out.shape[3]):
                    c0 = k // group_k * group_c
                    total = out.dtype.type(0)
                    for i in range(kh):
                        ih = oh * strides[0] - pads[0] + i * dilations[0]
                        if ih < 0 or ih >= height:
                            continue
                        for j in range(kw):
                            iw = ow * strides[1] - pads[2] + j * dilations[1]
                            if iw < 0 or iw >= width:
                                continue
                            for c in range(group_c):
                                total += x[n, ih, iw, c0 + c] * w[k, i, j, c]
                    if bias.size:
                        total += bias[k]
                    if residual.size:
                        total += residual[n, oh, ow, k]
                    out[n, oh, ow, k] = activate(out.dtype.type(total), code, slope)  # sums of int32 are int64 here


@functools.cache
def _compiled(dtype: str, sum_dtype: str) -> Callable[..., Any]:
    signature = types.void(
        array(dtype, 4, strided=True), array(dtype, 4), array(sum_dtype, 1), array(sum_dtype, 4, strided=True),
        array(sum_dtype, 4, strided=True, writable=True), integers(4), integers(2), integers(2),
        types.int64, types.float64,
    )  # fmt: skip
    compiled: Callable[..., Any] = njit(signature)(_convolve)
    return compiled


@dataclass(frozen=True)
class DirectKernel:
    """Filters as ``[K, KH, KW, C // groups]``, so that one output's sum walks through memory in order."""

    problem: Problem
    filters: Array
    bias: Array

    def __call__(self, input: Array, out: Array, residual: Array | None) -> None:
        """Convolve ``input`` into ``out``; see ``convdispatch.backend.Kernel``."""
        p = self.problem
        added = np.empty((0, 0, 0, 0), out.dtype) if residual is None else residual
        _compiled(p.dtype, p.sum_dtype)(
            input, self.filters, self.bias, added, out,
            p.pads, p.strides, p.dilations, p.epilogue.code, p.epilogue.slope,
        )  # fmt: skip


class Direct(Backend):
    """The readable definition, in plain compiled loops."""

    name = "direct"
    packing_cost = (5e-5, 3e-10)  # less, but a process's first call also waits for Numba's own cache
    strided = True
    fuses_epilogue = True

    def rejects(self, problem: Problem) -> str | None:  # noqa: ARG002
        """Return None: it does everything."""
        return None

    def workspace(self, problem: Problem, config: Config) -> int:  # noqa: ARG002
        """Return 0: it needs no scratch."""
        return 0

    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float | None:  # noqa: ARG002
        """Return the time of a chain of dependent additions, four cycles each, and a little per output."""
        outputs = problem.n * problem.oh * problem.ow * problem.k
        return 3e-6 + outputs * (problem.taps * 1.1e-9 + problem.kh * problem.kw * 1e-9 + 2e-9)

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:  # noqa: ARG002
        """Reorder the filters; compile for the dtype if that has not been done."""
        packed = np.array(filters.transpose(3, 0, 1, 2), order="C")
        kept = np.empty(0, dtype_of(problem.sum_dtype)) if bias is None else np.array(bias)
        _compiled(problem.dtype, problem.sum_dtype)
        return DirectKernel(problem, packed, kept)
