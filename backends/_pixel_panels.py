"""1x1 filters on an NCHW image: the pixels of a plane take the place of filters, and filters that of pixels.

``out [K, H * W] = filters [K, C] @ image [C, H * W]``: the same product as that of an NHWC image, turned round. So the
kernel of ``_in_line`` does it, with vectors of neighbouring pixels, and nothing changes places. What it reads by
vectors must lie block by block: a part of the work copies a panel of pixels, a few vectors wide, into scratch memory
that stays in L2, and multiplies it with all filters. A bias is one more channel, all ones.
"""

import functools
from dataclasses import replace

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import item_bytes
from convdispatch.backends import _in_line
from convdispatch.backends._activation import unclamped
from convdispatch.backends._arguments import INTEGER, Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._atomics import call_kernel
from convdispatch.backends._caches import should_stream
from convdispatch.backends._jobs import grid, pieces, split
from convdispatch.backends._kernel import PackedKernel, WrappedKernel
from convdispatch.backends._scratch import borrow, give_back
from convdispatch.backends._vector import clear, copy, load, save, vector_bytes
from convdispatch.memory import CACHE_LINE, aligned
from convdispatch.problem import Problem

#: Bytes of a panel, and of the filters that are read again for each of its blocks: both stay in L2.
_PANEL, _FILTERS = 192 << 10, 256 << 10
_MOST_IMAGES = 1 << 12
#: FLOP a second of a core, about, by which work is cut.
_FLOPS = 1.5e11

_ARGUMENTS = Arguments(
    input=array_of(4), residual=array_of(4), out=array_of(4), ones=array_of(1), template=array_of(1, "int64"),
    places=integers_of(3), kernel=INTEGER, panels=array_of(2, "int64"), channels=INTEGER,
    depth=INTEGER, pixels=INTEGER, ranges=INTEGER, per_image=INTEGER,
)  # fmt: skip
unpack = _ARGUMENTS.unpack


@functools.cache
def _by_panels(vectors: int, lanes: int, itemsize: int) -> CompiledKernel:
    """Return the kernel that copies a panel and multiplies it."""
    block = vectors * lanes
    step = block * itemsize

    def convolve(arguments, job):  # type: ignore[no-untyped-def]
        (
            x, residual, out, ones, template, places, kernel, panels, channels, depth, pixels, ranges, per_image,
        ) = unpack(arguments, itemsize)  # fmt: skip
        image, first, last = panels[job]
        panel = borrow((last - first) * depth * step)
        if panel == 0:
            return 0
        for c in range(depth):
            line = np.int64(x.ctypes.data) + (image * channels + c) * pixels * itemsize
            for b in range(first, last):
                to = panel + ((b - first) * depth + c) * step
                origin = line + b * step if c < channels else np.int64(ones.ctypes.data)
                if (b + 1) * block <= pixels or c == channels:
                    for v in range(vectors):
                        save(to + v * lanes * itemsize, load(origin + v * lanes * itemsize, lanes, itemsize))
                else:
                    clear(to, step)
                    copy(to, origin, (pixels - b * block) * itemsize)
        words = template.copy()
        words[places[0]] = panel - first * depth * step  # where the first of all panels would begin
        before = image * (out.size // out.shape[0]) * itemsize
        words[places[1]] = np.int64(out.ctypes.data) + before
        if residual.size:
            words[places[2]] = np.int64(residual.ctypes.data) + before
        done = 0
        for part in range(ranges):
            done += call_kernel(kernel, words.ctypes.data, part * per_image + job % per_image)
        give_back(panel)
        return 1 if done == ranges else 0

    return CompiledKernel(convolve, _ARGUMENTS)


def suits(problem: Problem, rows: int = 1) -> bool:
    """Return whether a problem is done in this way, by tiles of so many rows.

    Filters must be few beside pixels; and panels be few enough to be listed.
    """
    p = problem
    return (
        p.data_format == "NCHW" and p.groups == 1 and p.is_pointwise and p.strides == (1, 1) and not any(p.pads)
        and p.dtype == p.sum_dtype and rows <= p.k <= p.h * p.w and p.n <= _MOST_IMAGES
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def turned(problem: Problem) -> Problem:
    """Return what an image is to the kernel: filters in a line, multiplied with pixels."""
    p = problem
    without_bias = replace(p.epilogue, bias=False)
    return p.replace(data_format="NHWC", n=1, h=1, w=p.k, c=_depth(p), k=p.h * p.w, epilogue=without_bias)


def copied_bytes(problem: Problem) -> int:
    """Return the bytes of all panels."""
    return problem.n * _depth(problem) * problem.h * problem.w * item_bytes(problem.dtype)


def _cut(problem: Problem, tile: tuple[int, int], threads: int) -> tuple[int, int, int]:
    """Return an image's blocks of pixels, into how many panels they are cut, and into how many ranges the filters."""
    p, size = problem, item_bytes(problem.dtype)
    depth, step = _depth(p), tile[1] * vector_bytes()
    blocks = -(-p.h * p.w * size // step)
    panels = max(-(-blocks * depth * step // _PANEL), -(-pieces(p.flops / _FLOPS, threads) // p.n))
    if p.n == 1:
        panels = -(-panels // threads) * threads  # as many for each thread
    panels = min(blocks, panels)
    return blocks, panels, min(-(-p.k // tile[0]), -(-p.k * depth * size // _FILTERS))


def _depth(problem: Problem) -> int:
    return problem.c + problem.epilogue.bias


def workspace(problem: Problem, tile: tuple[int, int], threads: int) -> int:
    """Return the bytes of the panels that are worked on at once."""
    blocks, panels, _ = _cut(problem, tile, threads)
    scratch = -(-blocks // panels) * _depth(problem) * tile[1] * vector_bytes() + CACHE_LINE
    return min(threads, problem.n * panels) * (scratch + tile[0] * tile[1] * vector_bytes())


class PanelKernel(WrappedKernel):
    """A kernel for 1x1 filters on an NCHW image."""

    def __init__(
        self, problem: Problem, filters: Array, bias: Array | None, tile: tuple[int, int], threads: int
    ) -> None:
        """Pack the filters.

        Args:
            problem: one that ``suits``.
            filters: ``[C, K]``.
            bias: ``[K]`` where the epilogue has one.
            tile: rows, which are filters here, and vectors.
            threads: most threads to use.
        """
        p, size = problem, item_bytes(problem.dtype)
        lanes, pixels = vector_bytes() // size, p.h * p.w
        block, depth = tile[1] * lanes, _depth(p)
        weights = aligned((p.k, depth), p.dtype)
        weights[:, : p.c] = filters.T
        if bias is not None:
            weights[:, p.c] = bias
        blocks, panels, ranges = _cut(p, tile, threads)
        jobs = grid((-(-p.k // tile[0]), ranges), (blocks, panels))
        inner = _in_line.compiled(*tile, lanes, size, 1, unclamped(p))
        arguments = _in_line.ARGUMENTS
        template = arguments.pack(
            input=weights.reshape(1, 1, p.k, depth), pads=(0, 0), strides=(1, 1), dilations=(1, 1), jobs=jobs,
            streamed=should_stream(p, block, pixels), code=p.epilogue.code, slope=p.epilogue.slope,
        )  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {"filters": (1, blocks, 1, 1, depth, block), "out": (1, 1, p.k, pixels)}
        if p.epilogue.residual:
            shapes["residual"] = shapes["out"]
        for name, shape in shapes.items():
            template[arguments.at[name] + 1 : arguments.at[name] + 1 + len(shape)] = shape
        self._alive = weights, jobs
        values = {
            "ones": np.ones(block, p.dtype), "template": template,
            "places": [arguments.at[name] for name in ("filters", "out", "residual")], "kernel": inner.address,
            "channels": p.c, "depth": depth, "pixels": pixels, "ranges": ranges,
            "panels": np.array([(image, *part) for image in range(p.n) for part in split(blocks, panels)], np.int64),
            "per_image": panels,
        }  # fmt: skip
        compiled = functools.partial(_by_panels, tile[1], lanes, size)
        around = PackedKernel(compiled, p, values, p.n * panels, threads)
        again = weights[:, : p.c].T, weights[:, p.c] if p.epilogue.bias else None  # views: they keep nothing twice
        super().__init__(around, (problem, *again, tile, threads), reports=False)
