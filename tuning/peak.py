"""The limit that kernels are measured against: how many products a second a loop of nothing but products does."""

import functools
import statistics
import time
from typing import Any

import numpy as np

from convdispatch.backends._arguments import INTEGER, Arguments, CompiledKernel, array_of
from convdispatch.backends._team import run_jobs
from convdispatch.backends._tile import zeros
from convdispatch.backends._tuples import save_apart
from convdispatch.backends._vector import Codegen, fused_multiply_add, intrinsic, load_at, parts_of, vector_bytes

#: Sums under way at once: enough to hide the latency of a product, few enough for 16 registers.
_SUMS = 12
#: Turns of a sample: some milliseconds, in which the beginning of threads does not count.
_TURNS = 400_000
_SAMPLES = 5

_ARGUMENTS = Arguments(turns=INTEGER, factors=array_of(1), sums=array_of(3))
unpack = _ARGUMENTS.unpack


@intrinsic
def _products(typing: Any, tile: Any, factors: Any) -> tuple[Any, Codegen]:  # noqa: ARG001
    """Return every vector of the tile times one vector at ``factors`` plus the next."""
    vector = tile.dtype

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        x, y = (load_at(b, vector.ir, arguments[1], i * vector.lanes * vector.itemsize) for i in range(2))
        sums = [fused_multiply_add(b, total, x, y, vector) for total in parts_of(b, arguments[0], len(tile))]
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, factors), codegen


@functools.cache
def _compiled(lanes: int) -> CompiledKernel:
    def run(arguments, number):  # type: ignore[no-untyped-def]
        turns, factors, sums = unpack(arguments, 4)
        tile, at = zeros(_SUMS, 1, lanes, 4), factors.ctypes.data
        for _ in range(turns):
            tile = _products(tile, at)
        save_apart(sums[number].ctypes.data, lanes * 4, tile)
        factors[0] += 0  # alive, and not known to be constant
        return 1

    return CompiledKernel(run, _ARGUMENTS)


def flops(threads: int) -> float:
    """Return the float32 operations a second of fused products on this many threads: the median of some samples."""
    lanes = vector_bytes() // 4
    kernel = _compiled(lanes)
    factors = np.full(2 * lanes, 0.5, np.float32)
    sums = np.zeros((threads, _SUMS, lanes), np.float32)
    block = _ARGUMENTS.pack(turns=_TURNS, factors=factors, sums=sums)

    def sample() -> float:
        before = time.perf_counter()
        run_jobs(kernel.address, block.ctypes.data, threads, threads)
        return threads * _TURNS * _SUMS * lanes * 2 / (time.perf_counter() - before)

    sample()
    return statistics.median(sample() for _ in range(_SAMPLES))
