"""``im2col``: patches laid out as the rows of a matrix, times the filters as another, by BLAS.

The classic lowering (Chellapilla, Puri, Simard: High Performance Convolutional Neural Networks for Document
Processing, 2006), a block of output pixels at a time, so that the patch matrix never outgrows its workspace.
A 1x1 filter needs no patches: the input already is the matrix.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Backend, Config, Effort, Kernel, item_bytes
from convdispatch.backends import _rates
from convdispatch.backends._exact import exact_floats
from convdispatch.backends._threads import run_numpy
from convdispatch.backends._windows import overlap
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine
from convdispatch.problem import INTEGERS, Problem

_BLOCKS_KIB = (2048, 512, 128, 8192)

# Rates of one core, for estimates.
_PEAK_PER_BYTE = 1.5e9  # FLOP/s of a float32 GEMM for each byte of vector width
_INTEGER_RATE = 0.8e9
_BLOCK_SECONDS = 12e-6
_GROUP_SECONDS = 6e-7  # of a group's product, besides its FLOP
_LONE_SECONDS, _VALUE_SECONDS, _RUN_SECONDS = 7e-10, 1.5e-10, 5e-9  # of values that are copied, and of a run of them
_COPY_SECONDS = 2.5e-6  # of a block's copy of one tap; these hold the interpreter, and threads do not help
_LAUNCH_SECONDS = 100e-6
_WHOLE = 1.5  # times as fast with two units for whole vectors


def _matmul_dtype(problem: Problem) -> str:
    """Return the dtype to multiply in: one that BLAS has and that is exact for integers, where there is one."""
    return (exact_floats(problem) or "int64") if problem.is_integer else problem.dtype


@dataclass(frozen=True)
class Im2colKernel:
    """Filters as ``[groups, KH * KW * C // groups, K // groups]``."""

    problem: Problem
    filters: Array
    rows: int
    columns: int
    threads: int

    def __call__(self, input: Array, out: Array, residual: Array | None) -> None:  # noqa: ARG002
        """Convolve ``input`` into ``out``; see ``convdispatch.backend.Kernel``."""
        jobs = [self._block(input, out, *corner) for corner in self._corners()]
        run_numpy(jobs, self.threads)

    def _corners(self) -> Iterator[tuple[int, int, int]]:
        p = self.problem
        return itertools.product(range(p.n), range(0, p.oh, self.rows), range(0, p.ow, self.columns))

    def _block(self, input: Array, out: Array, n: int, top: int, left: int) -> Callable[[], None]:
        def job() -> None:
            p = self.problem
            part = out[n, top : top + self.rows, left : left + self.columns]
            rows, columns = part.shape[:2]
            pixels = part.reshape(rows * columns, p.groups, p.group_k)
            if _in_place(p, self.filters.dtype.name):
                patches = input[n, top : top + rows, left : left + columns].reshape(1, rows * columns, p.c)
            else:
                patches = self._patches(input[n], top, rows, left, columns)
            _multiply(patches, self.filters, pixels)

        return job

    def _patches(self, image: Array, top: int, rows: int, left: int, columns: int) -> Array:
        """Return ``[groups, rows * columns, KH * KW * C // groups]``: the windows of a block of outputs."""
        p = self.problem
        shape = (p.groups, rows, columns, p.kh, p.kw, p.group_c)
        patches: Array = (np.zeros if any(p.pads) else np.empty)(shape, self.filters.dtype)
        for i in range(p.kh):
            to_rows, from_rows = overlap(top, rows, i * p.dilations[0] - p.pads[0], p.strides[0], p.h)
            for j in range(p.kw):
                to_columns, from_columns = overlap(left, columns, j * p.dilations[1] - p.pads[2], p.strides[1], p.w)
                seen = image[from_rows, from_columns]
                if seen.size:
                    seen = seen.reshape(*seen.shape[:2], p.groups, p.group_c)
                    patches[:, to_rows, to_columns, i, j] = seen.transpose(2, 0, 1, 3)
        return patches.reshape(p.groups, rows * columns, p.taps)


def _in_place(problem: Problem, matmul_dtype: str) -> bool:
    """Return whether the input already is the matrix."""
    p = problem
    return p.is_pointwise and p.strides == (1, 1) and p.groups == 1 and matmul_dtype == p.dtype


def _multiply(patches: Array, filters: Array, out: Array) -> None:
    """Store ``[groups, pixels, taps] @ [groups, taps, group_k]`` into ``out [pixels, groups, group_k]``."""
    if len(filters) == 1 and filters.dtype == out.dtype:
        np.matmul(patches[0], filters[0], out=out[:, 0])
        return
    product = np.matmul(patches, filters)
    if product.dtype != out.dtype and out.dtype.kind == "i":
        product = product.astype(np.int64)  # exact here; the store below wraps it
    out[...] = product.transpose(1, 0, 2)


class Im2col(Backend):
    """Patches as a matrix, times the filters, by BLAS."""

    name = "im2col"
    parallel = True
    native_dtypes = frozenset(("float32", "float64", *INTEGERS))  # small integers multiply exactly as floats

    def rejects(self, problem: Problem) -> str | None:  # noqa: ARG002
        """Return None: with integers that BLAS lacks it is slow, but right."""
        return None

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Config]:  # noqa: ARG002
        """Return block sizes in KiB: of patches, or of rows of the input where it is the matrix."""
        sizes = _BLOCKS_KIB if effort in {"patient", "exhaustive"} else _BLOCKS_KIB[:2]
        return [Config(block_kib=size) for size in sizes]

    def workspace(self, problem: Problem, config: Config) -> int:
        """Return the bytes of the patch matrices and products that live at once."""
        p, dtype = problem, _matmul_dtype(problem)
        size = item_bytes(dtype)
        rows, columns = _block_shape(p, config)
        pixel = 0 if _in_place(p, dtype) else p.taps * p.groups * size
        if p.groups > 1 or dtype != p.result_dtype:
            pixel += p.k * (size + 8 * (dtype != p.result_dtype))
        return pixel * rows * columns * min(config.threads, _blocks(p, config))

    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float | None:
        """Return GEMM time by the matrices' sizes, plus the copies, plus the calls."""
        p, threads = problem, min(config.threads, machine.cores)
        dtype = _matmul_dtype(p)
        in_place = _in_place(p, dtype)
        blocks = _blocks(p, config)
        pixels = p.n * p.oh * p.ow / blocks
        # A GEMM reaches peak as its sides grow; half of it at these lengths.
        peak = _INTEGER_RATE if dtype == "int64" else _PEAK_PER_BYTE * machine.vector_bytes * 4 / item_bytes(dtype)
        fill = p.group_k / (p.group_k + 8) * p.taps / (p.taps + 24) * pixels / (pixels + 16)
        work = p.flops / (peak * fill) + blocks * _rates.filter_seconds(p.taps * p.k * item_bytes(dtype), machine)
        calls = blocks * (_BLOCK_SECONDS + _GROUP_SECONDS * p.groups)
        if not in_place:
            # One channel's pixels lie side by side; more make a run of their own for each pixel.
            element = _LONE_SECONDS if p.c == 1 else _VALUE_SECONDS + _RUN_SECONDS / p.group_c
            work += p.n * p.oh * p.ow * p.taps * p.groups * element
            calls += blocks * p.kh * p.kw * _COPY_SECONDS
        used = min(threads, blocks)
        return _rates.shared(work, used, efficiency=0.9, call=calls, launch=_LAUNCH_SECONDS, whole=_WHOLE)

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:  # noqa: ARG002
        """Reorder the filters by group."""
        p = problem
        grouped = filters.reshape(p.taps, p.groups, p.group_k).transpose(1, 0, 2)
        packed = np.array(grouped, _matmul_dtype(p), order="C")
        return Im2colKernel(p, packed, *_block_shape(p, config), config.threads)


def _block_shape(problem: Problem, config: Config) -> tuple[int, int]:
    """Return the output rows and columns of a block: whole rows, or a part of one if even that is too much."""
    p, kib = problem, config.integer("block_kib", 2048)
    if kib < 1:
        raise ArgumentError(f"config block_kib of im2col must be at least 1; got {kib}")
    fit = max(1, (kib << 10) // max(1, p.taps * p.groups * item_bytes(_matmul_dtype(p))))
    share = -(-p.n * p.oh // config.threads)  # every thread gets a block
    return max(1, min(fit // p.ow, share, p.oh)), min(fit, p.ow)


def _blocks(problem: Problem, config: Config) -> int:
    rows, columns = _block_shape(problem, config)
    return problem.n * -(-problem.oh // rows) * -(-problem.ow // columns)
