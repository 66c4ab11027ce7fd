"""NCHW images, 16-bit floats and integers for kernels that compute NHWC floats: converted on the way, by bands of rows.

A band of output rows and the input rows it needs are small enough for a core's own cache: a thread copies the input's
rows into the kernel's layout and dtype, runs the kernel on them as on a small image, and copies the result out. Rows
outside the image become rows of zeros. The last band is moved back until it fits. An image too small to be cut is
converted whole, by all threads, before and after the kernel. An image of one row is cut as if it had one column, which
is the same in memory.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from convdispatch.backend import Config, Kernel, item_bytes
from convdispatch.backends import _sequence
from convdispatch.backends._arguments import INTEGER, Arguments, CompiledKernel, array_of, integers_of
from convdispatch.backends._atomics import call_kernel, write
from convdispatch.backends._exact import NARROW, exact_floats
from convdispatch.backends._jobs import split
from convdispatch.backends._kernel import PackedKernel, WrappedKernel
from convdispatch.backends._layout import SAME, STORAGES, stage, stored_bytes, unstage
from convdispatch.backends._lines import whole_lines
from convdispatch.backends._scratch import borrow, give_back
from convdispatch.backends._vector import vector_bytes
from convdispatch.errors import ArgumentError
from convdispatch.memory import CACHE_LINE
from convdispatch.problem import Problem

#: Bytes of a band: most of a second-level cache, whose rest is for what the kernel needs; if that makes for too few
#: rows, so many of a cache that cores share.
_BAND_BYTES, _LARGEST_BAND = 768 << 10, 4 << 20
#: Rows that are computed twice or in vain by bands cost time; with more than this part, the image is converted whole,
#: unless its copies would take more than so many bytes.
_WASTE, _WHOLE_BYTES = 0.08, 32 << 20
#: What converting a value takes, of all that is done with it.
_CONVERTED = 0.03
#: Most numbers of bands that are thought of: with many rows, a few more bands or less make no difference.
_MOST_COUNTS = 256
#: Jobs of a whole image's conversion for each thread, so that one that comes late leaves its own to the others.
_JOBS = 2
#: Pixels that are copied and multiplied together, about.
_PIXELS = 16

_ARGUMENTS = Arguments(
    input=array_of(4), residual=array_of(4), out=array_of(4), template=array_of(1, "int64"), places=integers_of(3),
    kernel=INTEGER, jobs=INTEGER, spoiled_at=INTEGER, inner=integers_of(3), outer=integers_of(3),
    rows=integers_of(4), planar=INTEGER, spoiled=INTEGER,
)  # fmt: skip
unpack = _ARGUMENTS.unpack
_SPOILED_AT = 8 * _ARGUMENTS.at["spoiled"]


@functools.cache
def _by_bands(lanes: int, itemsize: int, storage: int, made_storage: int) -> CompiledKernel:
    """Return the kernel that runs another kernel on one band, from one storage into another."""

    def convolve(arguments, job):  # type: ignore[no-untyped-def]
        (
            x, residual, out, template, places, kernel, jobs, spoiled_at, inner, outer, rows, planar, _,
        ) = unpack(arguments, itemsize)  # fmt: skip
        taken, made, step, top = rows
        bands = (outer[0] + made - 1) // made
        image, band = divmod(job, bands)
        first = min(band * made, outer[0] - made)
        stored, made_stored = stored_bytes(storage, itemsize), stored_bytes(made_storage, itemsize)
        wide, deep = inner[1] * inner[2], outer[1] * outer[2]
        taken_bytes, made_bytes = (taken * wide + lanes) * itemsize, (made * deep + lanes) * itemsize
        source = borrow(taken_bytes + (2 if residual.size else 1) * made_bytes + 2 * CACHE_LINE)
        if source == 0:
            return 0
        result = whole_lines(source + taken_bytes)
        added = whole_lines(result + made_bytes)
        at_input = x.ctypes.data + image * inner[0] * wide * stored
        at_out = out.ctypes.data + image * outer[0] * deep * made_stored
        stage(at_input, source, first * step - top, taken, inner, planar, lanes, itemsize, storage)
        block = template.copy()
        block[places[0]], block[places[1]] = source, result
        if residual.size:
            at_residual = residual.ctypes.data + image * outer[0] * deep * made_stored
            stage(at_residual, added, first, made, outer, planar, lanes, itemsize, made_storage)
            block[places[2]] = added
        done = 0
        for inner_job in range(jobs):
            done += call_kernel(kernel, block.ctypes.data, inner_job)
        if spoiled_at >= 0 and block[spoiled_at]:
            write(arguments + _SPOILED_AT, 1)
        # What the band before has made is left to it: tiles of a transform fall differently here, and round so.
        again = band * made - first
        own = result + again * deep * itemsize
        unstage(own, at_out, band * made, made - again, outer, planar, lanes, itemsize, made_storage)
        give_back(source)
        return 1 if done == jobs else 0

    return CompiledKernel(convolve, _ARGUMENTS)


_COPY = Arguments(
    source=INTEGER, target=INTEGER, shape=integers_of(3), planar=INTEGER, back=INTEGER, jobs=array_of(2, "int64")
)
unpack_copy = _COPY.unpack


@functools.cache
def _by_rows(lanes: int, itemsize: int, storage: int) -> CompiledKernel:
    """Return the kernel that converts some rows of an image, or turns them back; a job is the image, and which rows."""

    def convert(arguments, job):  # type: ignore[no-untyped-def]
        source, target, shape, planar, back, jobs = unpack_copy(arguments, itemsize)
        image, first, last = jobs[job]
        size, line = shape[0] * shape[1] * shape[2], shape[1] * shape[2]
        stored, computed = image * size * stored_bytes(storage, itemsize), (image * size + first * line) * itemsize
        if back:
            unstage(source + computed, target + stored, first, last - first, shape, planar, lanes, itemsize, storage)
        else:
            stage(source + stored, target + computed, first, last - first, shape, planar, lanes, itemsize, storage)
        return 1

    return CompiledKernel(convert, _COPY)


@dataclass(frozen=True)
class _Storage:
    """How a problem's arrays lie in memory, and what the kernels that convert them are compiled for."""

    planar: bool
    lanes: int
    itemsize: int
    taken: int
    made: int

    @classmethod
    def of(cls, problem: Problem) -> "_Storage":
        size = item_bytes(computed_dtype(problem))
        taken, made = (STORAGES.get(name, SAME) for name in (problem.dtype, problem.result_dtype))
        return cls(problem.data_format == "NCHW", vector_bytes() // size, size, taken, made)


def convertible() -> frozenset[str]:
    """Return the dtypes that compiled code can convert here: float16 needs instructions of its own."""
    told: Any = numba.config
    known = not told.CPU_FEATURES or "+f16c" in told.CPU_FEATURES
    return NARROW | {"bfloat16"} | ({"float16"} if vector_bytes() >= 32 and known else set())


def computed_dtype(problem: Problem) -> str:
    """Return the dtype that kernels compute in: of integers, floats that hold their sums exactly.

    Raises:
        ArgumentError: if no floats do; ``obstacle`` tells beforehand.
    """
    if not problem.is_integer:
        return problem.sum_dtype
    if (dtype := exact_floats(problem)) is None:
        raise ArgumentError(f"no floats hold the sums of {problem} exactly")
    return dtype


def is_plain(problem: Problem) -> bool:
    """Return whether arrays lie in memory as kernels want them; with one channel, formats are the same."""
    same = problem.data_format == "NHWC" or problem.c == problem.k == 1
    return same and problem.dtype not in STORAGES


def plain(problem: Problem) -> Problem:
    """Return the problem with its arrays as kernels want them: NHWC, in the floats that they compute in."""
    dtype = computed_dtype(problem)
    as_computed = problem.data_format == "NHWC" and problem.dtype == dtype
    return problem if as_computed else problem.replace(data_format="NHWC", dtype=dtype)


def _is_line(problem: Problem) -> bool:
    """Return whether there is one row, and nothing above or below it."""
    p = problem
    return p.h == p.kh == p.oh == 1 < p.ow and not any(p.pads[:2])


@functools.lru_cache(maxsize=1024)
def _upright(problem: Problem) -> Problem:
    """Return the problem, of one row as of one column."""
    p = problem
    if not _is_line(p):
        return p
    return p.replace(
        h=p.w, w=1, kh=p.kw, kw=1, pads=(*p.pads[2:], *p.pads[:2]), strides=p.strides[::-1], dilations=p.dilations[::-1]
    )


@functools.lru_cache(maxsize=1024)
def band_rows(problem: Problem, step: int, threads: int) -> int | None:
    """Return how many output rows a band has, a multiple of ``step`` where it can; None to convert the image whole."""
    p = _upright(problem)
    for most in (_BAND_BYTES, _LARGEST_BAND):
        if (rows := _least_wasteful(p, step, threads, most, 1 + _WASTE)) is not None:
            return rows
    whole = scratch_bytes(p, None) <= _WHOLE_BYTES
    return None if whole else _least_wasteful(p, step, threads, _LARGEST_BAND, math.inf)


def _least_wasteful(problem: Problem, step: int, threads: int, most: int, least: float) -> int | None:
    """Return the rows of the bands that make least work more than once, and less than ``least`` of the work."""
    p, best = problem, None
    beyond = scratch_bytes(p, 1)
    fitting = 1 + max(0, most - beyond) // max(1, scratch_bytes(p, 2) - beyond)
    fewest = max(-(-p.oh // fitting), -(-(2 * threads - (threads == 1)) // max(1, p.n)), 1)
    for count in range(fewest, min(p.oh, fewest + _MOST_COUNTS) + 1):
        rows = -(-p.oh // count)
        bands = -(-p.oh // rows)
        if p.n * bands < 2 * threads - (threads == 1):
            continue
        again = bands * _taken(p, rows) * p.w * p.c / max(1, p.h * p.w * p.c) - 1
        waste = bands * -(-rows // step) * step / (-(-p.oh // step) * step)
        waste *= -(-p.n * bands // threads) * threads / (p.n * bands)  # some threads have one band more
        waste *= -(-rows * p.ow // _PIXELS) * _PIXELS / (rows * p.ow)
        waste += _CONVERTED * max(0.0, again)
        if waste < least:
            best, least = rows, waste
    return best


def _taken(problem: Problem, rows: int) -> int:
    """Return how many rows of input some rows of output are made of."""
    return (rows - 1) * problem.strides[0] + (problem.kh - 1) * problem.dilations[0] + 1


def band(problem: Problem, rows: int) -> Problem:
    """Return the problem of one band."""
    taken = _taken(_upright(problem), rows)
    if _is_line(problem):
        return plain(problem).replace(n=1, w=taken, pads=(0, 0, 0, 0))
    return plain(problem).replace(n=1, h=taken, pads=(0, 0, *problem.pads[2:]))


def scratch_bytes(problem: Problem, rows: int | None) -> int:
    """Return the bytes of the copies: of one thread's band, or of the whole images."""
    p, size = _upright(problem), item_bytes(computed_dtype(problem))
    made = p.ow * p.k * (2 if p.epilogue.residual else 1)
    if rows is None:
        return p.n * (p.h * p.w * p.c + p.oh * made) * size
    return (_taken(p, rows) * p.w * p.c + rows * made) * size


class BandedKernel(WrappedKernel):
    """A kernel that runs another on every band."""

    def __init__(self, inner: PackedKernel, problem: Problem, rows: int, threads: int) -> None:
        """Tell the kernel of the bands about the one inside, whose problem is ``band(problem, rows)``."""
        p, form = _upright(problem), _Storage.of(problem)
        values = {
            "template": inner.block, "places": inner.places, "kernel": inner.kernel.address,
            "jobs": inner.count, "spoiled_at": -1 if inner.spoiled_at is None else inner.spoiled_at,
            "inner": (p.h, p.w, p.c), "outer": (p.oh, p.ow, p.k), "planar": form.planar,
            "rows": (_taken(p, rows), rows, p.strides[0], p.pads[0]),
        }  # fmt: skip
        compiled = functools.partial(_by_bands, form.lanes, form.itemsize, form.taken, form.made)
        bands = PackedKernel(compiled, p, values, p.n * -(-p.oh // rows), threads)
        super().__init__(bands, (inner, problem, rows, threads), reports=inner.spoiled_at is not None)


class ConvertedKernel(WrappedKernel):
    """A kernel whose arrays are converted whole, before and after."""

    def __init__(self, inner: PackedKernel, problem: Problem, threads: int) -> None:
        """Wrap the kernel of ``plain(problem)``."""
        p, form = _upright(problem), _Storage.of(problem)
        size, surplus = form.itemsize, 2 * CACHE_LINE * form.itemsize  # vectors may reach behind the images
        taken, made = (
            whole_lines(p.n * math.prod(shape) * size + surplus) for shape in ((p.h, p.w, p.c), (p.oh, p.ow, p.k))
        )
        converted = {_sequence.INPUT: 0, _sequence.OUT: taken, _sequence.RESIDUAL: taken + made}
        inside = zip(inner.places, (_sequence.INPUT, _sequence.OUT, _sequence.RESIDUAL), strict=True)
        addresses = {place: (_sequence.SCRATCH, converted[of]) for place, of in inside}
        conversion = functools.partial(_conversion, form, p.n, threads=threads)
        stages = [conversion(form.taken, (p.h, p.w, p.c), (_sequence.INPUT, 0), (_sequence.SCRATCH, 0))]
        if p.epilogue.residual:
            added = _sequence.SCRATCH, converted[_sequence.RESIDUAL]
            stages.append(conversion(form.made, (p.oh, p.ow, p.k), (_sequence.RESIDUAL, 0), added))
        else:
            del addresses[inner.places[2]]
        told = None if inner.spoiled_at is None else (len(stages), inner.spoiled_at)
        stages.append(_sequence.Stage(inner.kernel, inner.block, inner.count, addresses))
        result = _sequence.SCRATCH, converted[_sequence.OUT]
        stages.append(conversion(form.made, (p.oh, p.ow, p.k), result, (_sequence.OUT, 0), back=True))
        scratch = taken + (2 if p.epilogue.residual else 1) * made
        values, jobs = _sequence.values(stages, scratch, threads, told)
        self._alive = inner, stages
        around = PackedKernel(_sequence.in_order, p, values, jobs, threads)
        super().__init__(around, (inner, problem, threads), reports=inner.spoiled_at is not None)


def _conversion(
    form: _Storage,
    images: int,
    storage: int,
    shape: tuple[int, int, int],
    source: tuple[int, int],
    target: tuple[int, int],
    *,
    threads: int,
    back: bool = False,
) -> _sequence.Stage:
    """Return the stage that converts images whole, of which what lies where; or turns them ``back``."""
    cut = threads * _JOBS
    jobs = np.array([(n, *rows) for n in range(images) for rows in split(shape[0], cut)], np.int64).reshape(-1, 3)
    block = _COPY.pack(shape=shape, planar=form.planar, back=back, jobs=jobs)
    addresses = {_COPY.at["source"]: source, _COPY.at["target"]: target}
    return _sequence.Stage(_by_rows(form.lanes, form.itemsize, storage), block, len(jobs), addresses, jobs)


def prepare(problem: Problem, step: int, config: Config, inside: Callable[[Problem, Config], PackedKernel]) -> Kernel:
    """Return a kernel for arrays that are not plain.

    Args:
        problem: what is computed.
        step: the bands' rows should be a multiple of this.
        config: the backend's choice.
        inside: makes the kernel of a plain problem.
    """
    rows = band_rows(problem, step, config.threads)
    if rows is None:
        return ConvertedKernel(inside(plain(problem), config), problem, config.threads)
    return BandedKernel(inside(band(problem, rows), Config(config, threads=1)), problem, rows, config.threads)
