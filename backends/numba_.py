"""``numba``: compiled loops over rows of output, in parallel, without any copy of the input.

A thread takes one output row and a block of filters, and keeps their sums in a small buffer that stays in its L1
cache. Which loop runs innermost, where the compiler's vectors are, depends on the problem: filters where there are
enough of them, channels for depthwise filters, columns for the rest.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types

from convdispatch.arguments import Array
from convdispatch.backend import Backend, Config, Effort, Kernel, item_bytes
from convdispatch.backends import _rates
from convdispatch.backends._activation import activate
from convdispatch.backends._jit import array, compilable, integers, njit
from convdispatch.backends._jobs import several, split
from convdispatch.backends._threads import run_all
from convdispatch.backends._windows import taps_inside
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine
from convdispatch.problem import Problem, dtype_of

_LOOPS = ("filters", "channels", "columns")
FILTERS, CHANNELS, COLUMNS = range(3)


# In the loops below, rows are cut out before the innermost loop: an index that starts at 0 needs no check for being
# negative, and only then do the compiler's vectors come.


@compilable
def _add_by_filters(sums, row, w, k0, c0, first, step):  # type: ignore[no-untyped-def]
    """Add one tap row: ``sums [OW, kb] += row [W, C] * w [C // groups, K]``, filters innermost."""
    low, high = taps_inside(first, step, sums.shape[0], row.shape[0])
    channels, count = w.shape[0], sums.shape[1]
    whole = channels - channels % 4
    for c in range(0, whole, 4):  # four channels at a time: a sum is loaded and stored once for four products
        w0, w1, w2, w3 = (
            w[c, k0 : k0 + count], w[c + 1, k0 : k0 + count], w[c + 2, k0 : k0 + count], w[c + 3, k0 : k0 + count]
        )  # fmt: skip
        for o in range(low, high):
            x = row[o * step + first]
            x0, x1, x2, x3 = x[c0 + c], x[c0 + c + 1], x[c0 + c + 2], x[c0 + c + 3]
            total = sums[o]
            for k in range(count):
                total[k] += x0 * w0[k] + x1 * w1[k] + x2 * w2[k] + x3 * w3[k]
    for c in range(whole, channels):
        w0 = w[c, k0 : k0 + count]
        for o in range(low, high):
            x0 = row[o * step + first, c0 + c]
            total = sums[o]
            for k in range(count):
                total[k] += x0 * w0[k]


@compilable
def _add_by_channels(sums, row, w, k0, first, step):  # type: ignore[no-untyped-def]
    """Add one tap row of a depthwise filter ``w [1, K]``, channels innermost."""
    low, high = taps_inside(first, step, sums.shape[0], row.shape[0])
    count = sums.shape[1]
    weights = w[0, k0 : k0 + count]
    for o in range(low, high):
        x, total = row[o * step + first, k0 : k0 + count], sums[o]
        for k in range(count):
            total[k] += x[k] * weights[k]


@compilable
def _add_scaled(total, x, step, weight):  # type: ignore[no-untyped-def]
    """Add every step-th element of ``x``, scaled, to ``total``."""
    if step == 1:
        for o in range(total.size):
            total[o] += x[o] * weight
    else:
        for o in range(total.size):
            total[o] += x[o * step] * weight


@compilable
def _add_by_columns(sums, row, w, k0, c0, first, step):  # type: ignore[no-untyped-def]
    """Add one tap row into ``sums [kb, OW]``, columns innermost."""
    low, high = taps_inside(first, step, sums.shape[1], row.shape[0])
    if low >= high:
        return
    start = low * step + first
    for c in range(w.shape[0]):
        for k in range(sums.shape[0]):
            if row.shape[1] == 1:  # neighbours lie side by side, which makes for vectors
                _add_scaled(sums[k, low:high], row.reshape(row.size)[start:], step, w[c, k0 + k])
            else:
                _add_scaled(sums[k, low:high], row[start:, c0 + c], step, w[c, k0 + k])


@compilable
def _make_row(x, w, bias, residual, out, pads, strides, dilations, groups, loop, block, code, slope, task):  # type: ignore[no-untyped-def]
    """Do one task: a block of filters along one row of output."""
    kh, kw, group_c, filters = w.shape
    rows, columns = out.shape[1:3]
    group_k = filters // groups
    span = filters if loop == CHANNELS else group_k  # filters that may share a block
    blocks = (span + block - 1) // block
    row, part = divmod(task, filters // span * blocks)
    n, oh = divmod(row, rows)
    k0 = part // blocks * span + part % blocks * block
    count = min(block, span - part % blocks * block)
    c0 = k0 // group_k * group_c
    outer, inner = (count, columns) if loop == COLUMNS else (columns, count)
    sums = np.zeros((outer, inner), out.dtype)
    for i in range(kh):
        ih = oh * strides[0] - pads[0] + i * dilations[0]
        if ih < 0 or ih >= x.shape[1]:
            continue
        for j in range(kw):
            first = j * dilations[1] - pads[2]
            if loop == FILTERS:
                _add_by_filters(sums, x[n, ih], w[i, j], k0, c0, first, strides[1])
            elif loop == CHANNELS:
                _add_by_channels(sums, x[n, ih], w[i, j], k0, first, strides[1])
            else:
                _add_by_columns(sums, x[n, ih], w[i, j], k0, c0, first, strides[1])
    for o in range(columns):
        for k in range(count):
            total = sums[k, o] if loop == COLUMNS else sums[o, k]
            if bias.size:
                total += bias[k0 + k]
            if residual.size:
                total += residual[n, oh, o, k0 + k]
            out[n, oh, o, k0 + k] = activate(out.dtype.type(total), code, slope)  # sums of int32 are int64 here


def _convolve(x, w, bias, residual, out, pads, strides, dilations, groups, loop, block, code, slope, tasks):  # type: ignore[no-untyped-def]
    """Convolve ``x [N, H, W, C]`` with ``w [KH, KW, C // groups, K]`` into part of ``out [N, OH, OW, K]``."""
    for task in range(tasks[0], tasks[1]):
        _make_row(x, w, bias, residual, out, pads, strides, dilations, groups, loop, block, code, slope, task)


def _tasks(problem: Problem, loop: int, block: int) -> int:
    """Return the rows of output times the blocks of filters."""
    span = problem.k if loop == CHANNELS else problem.group_k
    return problem.n * problem.oh * (problem.k // span) * -(-span // block)


@functools.cache
def _compiled(dtype: str, sum_dtype: str) -> Callable[..., Any]:
    number = types.int64
    signature = types.void(
        array(dtype, 4), array(dtype, 4), array(sum_dtype, 1), array(sum_dtype, 4),
        array(sum_dtype, 4, writable=True), integers(4), integers(2), integers(2), number, number, number, number,
        types.float64, integers(2),
    )  # fmt: skip
    compiled: Callable[..., Any] = njit(signature)(_convolve)
    return compiled


@dataclass(frozen=True)
class NumbaKernel:
    """Filters as they came, ``[KH, KW, C // groups, K]``."""

    problem: Problem
    filters: Array
    bias: Array
    loop: int
    block: int
    threads: int

    def __call__(self, input: Array, out: Array, residual: Array | None) -> None:
        """Convolve ``input`` into ``out``; see ``convdispatch.backend.Kernel``."""
        p = self.problem
        added = np.empty((0, 0, 0, 0), out.dtype) if residual is None else residual
        convolve = functools.partial(
            _compiled(p.dtype, p.sum_dtype), input, self.filters, self.bias, added, out,
            p.pads, p.strides, p.dilations, p.groups, self.loop, self.block, p.epilogue.code, p.epilogue.slope,
        )  # fmt: skip
        run_all(
            [
                functools.partial(convolve, tasks)
                for tasks in split(_tasks(p, self.loop, self.block), several(self.threads))
            ],
            self.threads,
        )


class Numba(Backend):
    """Compiled parallel loops over rows of output."""

    name = "numba"
    packing_cost = (5e-5, 3e-10)  # less, but a process's first call also waits for Numba's own cache
    parallel = True
    fuses_epilogue = True

    def rejects(self, problem: Problem) -> str | None:  # noqa: ARG002
        """Return None: it does everything."""
        return None

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Config]:
        """Return the loop to run innermost and how many filters to sum at a time."""
        loop = _LOOPS[_best_loop(problem)]
        blocks = (128, 32, 64, 256) if effort in {"patient", "exhaustive"} else (128, 32)
        useful = [block for block in blocks if block < problem.group_k or block == 128]
        return [Config(loop=loop, block=block) for block in useful]

    def workspace(self, problem: Problem, config: Config) -> int:
        """Return the bytes of each thread's sums."""
        block = min(config.integer("block", 128), problem.k)
        return config.threads * problem.ow * block * item_bytes(problem.sum_dtype)

    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float | None:
        """Return products at the rate of their loop, plus sums, plus the launch."""
        p, threads = problem, min(config.threads, machine.cores)
        loop = _loop(p, config)
        lanes = machine.vector_bytes / item_bytes(p.sum_dtype)
        run = {FILTERS: min(p.group_k, config.integer("block", 128)), CHANNELS: p.k, COLUMNS: p.ow}[
            loop
        ]  # length of the innermost loop
        beside = loop == COLUMNS and p.c == p.strides[1] == 1
        rate = (_RATE_ONE_CHANNEL if beside else _RATES[loop]) * lanes * run / (run + 2 * lanes)
        if p.is_integer:
            rate *= 0.5
        products = p.n * p.oh * p.ow * p.k * p.taps / rate
        outputs = p.n * p.oh * p.ow * p.k * (2e-9 if not p.epilogue.code else 6e-9)
        used = min(threads, p.n * p.oh)
        coming = _rates.filter_seconds(p.k * p.taps * item_bytes(p.dtype), machine)
        return _rates.shared(
            products + outputs + coming, used, efficiency=0.9, call=10e-6, launch=_LAUNCH_SECONDS, whole=1.0
        )

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:
        """Copy the filters; compile for the dtype if that has not been done."""
        block = config.integer("block", 128)
        if block < 1:
            raise ArgumentError(f"config block of numba must be at least 1; got {block}")
        loop = _loop(problem, config)
        kept = np.empty(0, dtype_of(problem.sum_dtype)) if bias is None else np.array(bias)
        _compiled(problem.dtype, problem.sum_dtype)
        return NumbaKernel(problem, np.array(filters, order="C"), kept, loop, min(block, problem.k), config.threads)


_LAUNCH_SECONDS = 60e-6
#: Products a second of one core for each vector lane, when the innermost loop is long.
_RATES = {FILTERS: 1.5e9, CHANNELS: 0.6e9, COLUMNS: 0.25e9}
_RATE_ONE_CHANNEL = 0.9e9  # of columns whose pixels lie side by side


#: Channels that make an innermost loop worth it.
_LONG_RUN = 8


def _best_loop(problem: Problem) -> int:
    if problem.group_c == 1 and problem.group_k == 1 and problem.groups > 1:
        return CHANNELS if problem.c >= _LONG_RUN else COLUMNS
    return FILTERS if problem.group_k >= 8 else COLUMNS


def _loop(problem: Problem, config: Config) -> int:
    name = config.get("loop", _LOOPS[_best_loop(problem)])
    if name not in _LOOPS:
        raise ArgumentError(f"config loop of numba must be one of {', '.join(_LOOPS)}; got {name!r}")
    if name == "channels" and not (problem.group_c == problem.group_k == 1):
        raise ArgumentError(f"config loop='channels' of numba needs one channel and one filter a group; got {problem}")
    return _LOOPS.index(str(name))
