"""``pointwise``: 1x1 filters on one to four channels, as in a change of colours: memory is nearly all there is to it.

A vector's pixels are taken apart in registers, so that each of their channels is a vector; each filter's sum is one,
too, and these are woven into pixels again. NCHW images are apart already. Every value is read once and written once.
"""

import functools
from collections.abc import Sequence

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort, item_bytes
from convdispatch.backends import _rates
from convdispatch.backends._activation import RELU6, activate
from convdispatch.backends._arguments import FLOAT, INTEGER, Arguments, CompiledKernel, array_of
from convdispatch.backends._caches import in_last_caches, should_stream
from convdispatch.backends._jit import outlined
from convdispatch.backends._jobs import several, split
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._packed import PackedBackend
from convdispatch.backends._packing import for_columns
from convdispatch.backends._put import put_tile
from convdispatch.backends._tile import add_to_each
from convdispatch.backends._tuples import load_apart
from convdispatch.backends._vector import prefetch, vector_bytes
from convdispatch.backends._vector_activation import activate_all
from convdispatch.backends._weave import mixed, unwoven, woven
from convdispatch.machine import Machine
from convdispatch.memory import CACHE_LINE, aligned
from convdispatch.problem import Problem

#: Channels, and filters, that are taken apart and woven in registers.
_MOST = 4
#: Pixels of a part at least: less is not worth another thread.
_PART = 1 << 12
#: Bytes that woven pixels are prefetched ahead, where input and output have more than this part of the last cache.
_AHEAD, _CACHED_TRAFFIC = 16384, 0.8

#: ``filters`` is ``[K, C]``, ``bias`` ``[K, lanes]`` or empty. A job is a run of pixels of an image: its number, the
#: first one, and the one behind the last.
_ARGUMENTS = Arguments(
    input=array_of(4), filters=array_of(2), bias=array_of(2), residual=array_of(4), out=array_of(4), pixels=INTEGER,
    streamed=INTEGER, prefetched=INTEGER, code=INTEGER, slope=FLOAT, jobs=array_of(2, "int64"),
)  # fmt: skip
unpack = _ARGUMENTS.unpack


@outlined
def _one_by_one(x, w, bias, residual, out, at, to, count, steps, code, slope):  # type: ignore[no-untyped-def]
    """Compute fewer pixels than a vector has lanes, from value ``at`` of the input and ``to`` of the output on.

    ``steps`` are from pixel to pixel, in the input and in the output, and from channel to channel, or filter to filter.
    """
    filters, channels = w.shape
    for p in range(count):
        for k in range(filters):
            put = to + p * steps[1] + k * steps[2]
            out[put] = 0
            for c in range(channels):
                out[put] += w[k, c] * x[at + p * steps[0] + c * steps[2]]
            if bias.size:
                out[put] += bias[k, 0]
            if residual.size:
                out[put] += residual[put]
            out[put] = activate(out[put], code, slope)


@functools.cache
def _compiled(channels: int, filters: int, planar: int, lanes: int, itemsize: int) -> CompiledKernel:
    """Return the kernel for so many channels and filters, in planes or woven."""

    def convolve(arguments, job):  # type: ignore[no-untyped-def]
        """Compute a run of an image's pixels."""
        x, w, bias, residual, out, pixels, streamed, prefetched, code, slope, jobs = unpack(arguments, itemsize)
        image, first, last = jobs[job]
        entered, left = image * pixels * channels, image * pixels * filters
        here, there = np.int64(x.ctypes.data) + entered * itemsize, np.int64(out.ctypes.data) + left * itemsize
        more = np.int64(residual.ctypes.data) - np.int64(out.ctypes.data)
        between, flat = pixels * itemsize, out.reshape(out.size)
        steps = (1, 1, pixels) if planar else (channels, filters, 1)
        if last - first < lanes:
            _one_by_one(
                x.reshape(x.size), w, bias, residual.reshape(residual.size), flat, entered + first * steps[0],
                left + first * steps[1], last - first, steps, code, slope,
            )  # fmt: skip
            return 1
        for p in range(first, last, lanes):
            at = min(p, last - lanes)
            source, to = here + at * steps[0] * itemsize, there + at * steps[1] * itemsize
            if prefetched:
                for line in range(0, channels * lanes * itemsize, CACHE_LINE):
                    prefetch(source + _AHEAD + line)
            if planar:
                tile = load_apart(source, between, channels, lanes, itemsize)
            else:
                tile = unwoven(source, channels, lanes, itemsize)
            sums = mixed(tile, w.ctypes.data, filters)
            if bias.size:
                sums = add_to_each(sums, filters, (np.int64(bias.ctypes.data), lanes * itemsize), 0)
            streams = streamed and to % CACHE_LINE == 0
            if planar:
                put_tile(sums, filters, (to, between), 0, residual.size, more, code, streams)
            else:
                put_tile(woven(sums, 1), 1, (to, between), 0, residual.size, more, code, streams)
            if code > RELU6:
                for run in range(filters if planar else 1):
                    activate_all(to + run * between, lanes if planar else lanes * filters, code, slope, itemsize)
        return 1

    return CompiledKernel(convolve, _ARGUMENTS)


def _runs(problem: Problem) -> tuple[int, int]:
    """Return how many images there are, and the pixels of one: woven, all images are one."""
    p = problem
    return (p.n, p.h * p.w) if p.data_format == "NCHW" else (1, p.n * p.h * p.w)


def _jobs(images: int, pixels: int, threads: int, lanes: int) -> Array:
    """Return jobs: runs that begin where vectors do."""
    each = max(1, min(-(-several(threads) // max(1, images)), pixels // _PART)) if threads > 1 else 1
    runs = [(first * lanes, min(last * lanes, pixels)) for first, last in split(-(-pixels // lanes), each)]
    return np.array([(image, *run) for image in range(images) for run in runs], np.int64).reshape(-1, 3)


class Pointwise(PackedBackend):
    """1x1 filters on one to four channels, taken apart and woven in registers."""

    name = "pointwise"
    version = 2
    packing_cost = (3e-5, 0.0)
    takes_planes = True

    def rejects_plain(self, problem: Problem) -> str | None:
        """Return None, or what about the filters, the channels or the padding stands against it."""
        p = problem
        if not p.is_pointwise or p.strides != (1, 1):
            return "it is for 1x1 filters of stride 1, without padding"
        if p.groups > 1:
            return "it mixes all channels of a pixel, and groups do not"
        if not 1 <= p.c <= _MOST or not 1 <= p.k <= _MOST:
            return f"it is for one to {_MOST} channels and filters; here are {p.c} and {p.k}"
        return None

    def configs_plain(self, problem: Problem, effort: Effort) -> Sequence[Config]:  # noqa: ARG002
        """Return the only one."""
        return [Config()]

    def workspace_plain(self, problem: Problem, config: Config) -> int:  # noqa: ARG002
        """Return 0: it needs no scratch."""
        return 0

    def estimate_plain(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return the time of taking apart, mixing and weaving, or of memory, whichever is longer."""
        p, size = problem, item_bytes(problem.dtype)
        pixels, lanes = p.n * p.h * p.w, machine.vector_bytes // size
        moved = _rates.moved_bytes(p)
        planar = p.data_format == "NCHW"
        steps = p.c * p.k + 2 * (p.c + p.k) + (0 if planar else 2 * (p.c * (p.c - 1) + p.k * (p.k - 1)))
        compute = pixels / lanes * steps * _STEP_SECONDS + _rates.activation_seconds(p, machine)
        rate = _CACHED_BYTES_PER_SECOND if 2 * moved <= machine.caches[2] else _BYTES_PER_SECOND
        used = min(config.threads, machine.cores, max(1, pixels // _PART))
        return _rates.shared(max(compute, moved / rate), used)

    def prepare_plain(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Keep the matrix; compile for its size if that has not been done."""
        p, size = problem, item_bytes(problem.dtype)
        lanes, planar = vector_bytes() // size, p.data_format == "NCHW"
        matrix = aligned((p.k, p.c), p.dtype)
        matrix[...] = filters[0, 0].T
        images, pixels = _runs(p)
        jobs = _jobs(images, pixels, config.threads, lanes)
        values = {
            "filters": matrix, "bias": for_columns(bias, p.dtype, lanes), "pixels": pixels,
            "streamed": should_stream(p, lanes, pixels if planar else lanes * p.k),
            "prefetched": not planar and in_last_caches(p) > _CACHED_TRAFFIC, "code": p.epilogue.code,
            "slope": p.epilogue.slope, "jobs": jobs,
        }  # fmt: skip
        make = functools.partial(_compiled, p.c, p.k, int(planar), lanes, size)
        return PackedKernel(make, p, values, len(jobs), config.threads)


_STEP_SECONDS = 2e-10
_BYTES_PER_SECOND, _CACHED_BYTES_PER_SECOND = 2e10, 5e10
