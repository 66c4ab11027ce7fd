"""``fft``: products of spectra, by scipy.fft, on tiles of the image.

Cross-correlation is a product with the filter's conjugate spectrum (Stockham, High-Speed Convolution and
Correlation, 1966). Channels are summed between the transforms, one complex matrix product a frequency
(Mathieu, Henaff, LeCun: Fast Training of Convolutional Networks through FFTs, 2014), so that C + K planes are
transformed and not C * K.

Large images are cut by overlap-save: tiles overlap on the input side and each output pixel is written once.
With overlap-add tiles overlap in the output, which then has to be summed, and where threads meet. A stride
makes every stride-th row and column a channel of its own with its own part of the filter, so that nothing is
computed to be thrown away. Dilated filters have zeros between their taps.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Backend, Config, Effort, Kernel, Numerics, item_bytes
from convdispatch.backends import _rates
from convdispatch.backends._jobs import split, too_many
from convdispatch.backends._threads import run_numpy
from convdispatch.backends._windows import overlap
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine
from convdispatch.problem import Problem

_TILES = (4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
#: Lines, which have one row or one column, are cut longer.
_LONG_TILES = (*_TILES, 1024, 2048, 4096, 8192, 16384, 32768)
_EFFORTS = {"measure": 4, "patient": 8, "exhaustive": len(_LONG_TILES) + 1}
_MIB = 1 << 20
_MOST_WORKSPACE, _MOST_SPECTRA = 64 * _MIB, 256 * _MIB

# Rates of one core, for estimates; the first two of float32.
_FFT_FLOPS_PER_SECOND = 2e10
_GEMM_FLOPS_PER_VECTOR_BYTE = 1.2e9
_SECONDS_PER_LINE, _SECONDS_PER_POINT = 8e-9, 0.7e-9
_COPY_BYTES_PER_SECOND, _SPECTRA_BYTES_PER_SECOND = 4e9, 1.2e10
_TILES_OF_A_THREAD = 4  # with fewer, several threads take no less time than one
_SECONDS_PER_PRODUCT, _SECONDS_PER_GEMM, _SECONDS_PER_BLOCK, _SECONDS_PER_LAUNCH = 1.2e-9, 6e-8, 6e-5, 1e-4
_NARROW = 32  # vector bytes of a common machine, by which configs are ranked


@dataclass(frozen=True)
class _Cut:
    """How a problem is cut into tiles, and tiles into blocks that are worked on at a time.

    Attributes:
        lengths: points of the transform: rows, columns.
        steps: outputs of one tile.
        tiles: tiles of one image.
        block: images, rows of tiles and columns of tiles in a block.
        phases: the rows and columns of a stride that meet a tap; each pair is a channel of its own.
    """

    lengths: tuple[int, int]
    steps: tuple[int, int]
    tiles: tuple[int, int]
    block: tuple[int, int, int]
    phases: tuple[tuple[int, int], ...]

    @property
    def spectrum(self) -> int:
        """Complex numbers in a tile's half spectrum."""
        return self.lengths[0] * (self.lengths[1] // 2 + 1)

    def corners(self, images: int) -> list[tuple[slice, slice, slice]]:
        """Return the images, rows and columns of tiles of every block."""
        axes = zip((images, *self.tiles), self.block, strict=True)
        ranges = ([slice(i, min(i + step, end)) for i in range(0, end, step)] for end, step in axes)
        return list(itertools.product(*ranges))


@dataclass(frozen=True)
class _Geometry:
    """What is the same however a problem is cut.

    Attributes:
        reach: the filter's lengths in steps of the stride.
        whole: good transform lengths that do an axis in one tile.
        phases: which pixels between two steps the taps meet, rows and columns.
    """

    reach: tuple[int, int]
    whole: tuple[int, int]
    phases: tuple[tuple[int, int], ...]


# SciPy is loaded by who computes with it: that takes a tenth of a second, which every process would pay for estimates.


def _transforms() -> Any:
    import scipy.fft  # noqa: PLC0415

    return scipy.fft


@functools.cache
def _good_lengths() -> tuple[int, ...]:
    longest = 1 << 24
    odd = [3**i * 5**j for i in range(16) for j in range(11) if 3**i * 5**j < longest]
    return tuple(sorted(each << bit for each in odd for bit in range(25) if each << bit <= longest))


def _good_length(least: int) -> int:
    """Return a product of 2, 3 and 5 from ``least`` on: the smallest, or where that is very long, an even one."""
    if least > _good_lengths()[-1]:
        return 2 * _good_length(-(-least // 2))
    return _good_lengths()[bisect.bisect_left(_good_lengths(), least)]


@functools.lru_cache(maxsize=1024)
def _geometry(problem: Problem) -> _Geometry:
    p = problem
    reach = (p.extent[0] - 1) // p.strides[0] + 1, (p.extent[1] - 1) // p.strides[1] + 1
    whole = tuple(_good_length(n + r - 1) for n, r in zip((p.oh, p.ow), reach, strict=True))
    met = [sorted({i * d % s for i in range(k)}) for k, d, s in zip((p.kh, p.kw), p.dilations, p.strides, strict=True)]
    return _Geometry(reach, (whole[0], whole[1]), tuple((row, column) for row in met[0] for column in met[1]))


def _cut(problem: Problem, config: Config) -> _Cut:
    """Cut a problem as a config says, the default's way if it does not say.

    Raises:
        ArgumentError: if the tile is smaller than the filter, or anything is no positive whole number.
    """
    tile = (config if "tile" in config else _best(problem)).integer("tile")
    least = max(_geometry(problem).reach)
    if tile < least:
        raise ArgumentError(f"config tile of fft must be at least {least} with this filter; got {tile}")
    if config.threads < 1:
        raise ArgumentError(f"config threads of fft must be at least 1; got {config.threads}")
    return _cut_to(problem, tile, config.threads)


def _tiling(problem: Problem, tile: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return the lengths, steps and tiles of a cut by transforms of a length."""
    p, fixed = problem, _geometry(problem)
    rows, columns = min(tile, fixed.whole[0]), min(tile, fixed.whole[1])
    high, wide = rows - fixed.reach[0] + 1, columns - fixed.reach[1] + 1
    return (rows, columns), (high, wide), (-(-p.oh // high), -(-p.ow // wide))


@functools.lru_cache(maxsize=1024)
def _cut_to(problem: Problem, tile: int, threads: int) -> _Cut:
    p, phases = problem, _geometry(problem).phases
    lengths, steps, tiles = _tiling(problem, tile)
    cut = _Cut(lengths, steps, tiles, (1, 1, 1), phases)
    # Large spectra of filters are the traffic: then few large blocks, else blocks that stay in cache.
    spectra = _spectra_bytes(p, cut)
    budget = min(_MOST_WORKSPACE, max(16 * _MIB, 2 * spectra)) // threads
    fit = max(1, budget // max(1, _block_bytes(p, cut)))
    share, least = -(-p.n * math.prod(tiles) // threads), 4 if spectra < 8 * _MIB else 16
    fit = min(fit, max(least, share))  # a block for every thread
    wide = min(fit, tiles[1])
    high = _evenly(tiles[0], fit // wide) if wide == tiles[1] else 1
    images = _evenly(p.n, fit // math.prod(tiles)) if high == tiles[0] else 1
    return _Cut(lengths, steps, tiles, (images, high, wide), phases)


def _across(problem: Problem, cut: _Cut, threads: int) -> int:
    """Return how many blocks are worked on at once: all threads have one, or all work on the same."""
    fit = _block_bytes(problem, cut) * threads <= _MOST_WORKSPACE
    return threads if fit and len(cut.corners(problem.n)) >= threads else 1


def _evenly(count: int, most: int) -> int:
    """Return the size of parts that are no larger than ``most`` and nearly equal."""
    return -(-count // -(-count // max(1, most)))


def _spectra_bytes(problem: Problem, cut: _Cut) -> int:
    p = problem
    return cut.spectrum * len(cut.phases) * p.group_c * p.k * 2 * item_bytes(p.dtype)


def _block_bytes(problem: Problem, cut: _Cut) -> int:
    """Return the most bytes of one block that live at once: its pixels, spectra, sums and outputs."""
    p, size, phases = problem, item_bytes(problem.dtype), len(cut.phases)
    images, high, wide = cut.block
    rows, columns = (high - 1) * cut.steps[0] + cut.lengths[0], (wide - 1) * cut.steps[1] + cut.lengths[1]
    pixels = images * rows * columns * phases * p.c * size
    tiles, number = images * high * wide, 2 * size
    spectra = tiles * cut.spectrum * phases * p.c * number
    outputs = tiles * cut.steps[0] * cut.lengths[1] * size
    if p.group_c == 1:
        plane = tiles * cut.spectrum * p.c * number
        return spectra + max(pixels, plane + max(outputs * p.c, plane * (phases > 1)))
    sums = tiles * cut.spectrum * p.k * number
    return max(pixels + spectra, spectra + sums, sums + outputs * p.k)


@dataclass(frozen=True, eq=False)
class FftKernel:
    """Conjugate spectra of the filters, ``[frequencies, groups, phases * C // groups, K // groups]``.

    Of filters that see one channel: ``[phases, K // groups, rows, columns, C]``.
    """

    problem: Problem
    spectra: Array
    cut: _Cut
    threads: int

    def __call__(self, input: Array, out: Array, residual: Array | None) -> None:  # noqa: ARG002
        """Convolve ``input`` into ``out``; see ``convdispatch.backend.Kernel``."""
        if not self.problem.c:
            out[...] = 0
            return
        across = _across(self.problem, self.cut, self.threads)
        workers = self.threads // across
        jobs = [self._block(input, out, corner, workers) for corner in self.cut.corners(self.problem.n)]
        run_numpy(jobs, across)

    def _block(self, input: Array, out: Array, corner: tuple[slice, slice, slice], workers: int) -> Callable[[], None]:
        work = self._products if self.problem.group_c == 1 else self._matrices

        return functools.partial(work, input, out, corner, workers)

    def _matrices(self, input: Array, out: Array, corner: tuple[slice, slice, slice], workers: int) -> None:
        """Sum over channels: one matrix product a frequency and group."""
        p, half = self.problem, self.cut.lengths[1] // 2 + 1
        windows = self._windows(input, corner)
        tiles = windows.shape[:3]
        # Transforming along the first axes of a transposed view leaves the spectra frequency-major.
        windows = windows.reshape(*windows.shape[:6], p.groups, p.group_c).transpose(4, 5, 6, 0, 1, 2, 3, 7)
        x = self._spectra(windows, 0, workers)
        del windows
        x = x.reshape(self.cut.spectrum, p.groups, math.prod(tiles), -1)
        sums = np.empty((*x.shape[:-1], p.group_k), x.dtype)
        parts = [slice(*part) for part in split(len(x), workers)]
        run_numpy(
            [functools.partial(np.matmul, x[part], self.spectra[part], out=sums[part]) for part in parts], workers
        )
        del x
        sums = sums.reshape(self.cut.lengths[0], half, p.groups, *tiles, p.group_k)
        y = self._inverse(sums, 0, workers).transpose(3, 4, 5, 0, 1, 2, 6)
        self._store(y, out, corner)

    def _products(self, input: Array, out: Array, corner: tuple[slice, slice, slice], workers: int) -> None:
        """Multiply each channel's spectrum with each of its filters'; only phases are summed."""
        windows = self._windows(input, corner)
        x = self._spectra(windows, 4, workers)
        del windows
        group_k = self.problem.group_k
        for j in range(group_k):
            sums = x[:, :, :, 0] * self.spectra[0, j]
            for phase in range(1, len(self.cut.phases)):
                sums += x[:, :, :, phase] * self.spectra[phase, j]
            y = self._inverse(sums, 3, workers)
            del sums
            self._store(y[..., None], out[..., j::group_k], corner)
            del y

    def _windows(self, input: Array, corner: tuple[slice, slice, slice]) -> Array:
        """Return a view ``[images, tile rows, tile columns, phases, rows, columns, C]`` of a padded copy."""
        p, cut = self.problem, self.cut
        counts = [part.stop - part.start for part in corner]
        starts = [part.start * step for part, step in zip(corner[1:], cut.steps, strict=True)]
        sides = [(n - 1) * step + size for n, step, size in zip(counts[1:], cut.steps, cut.lengths, strict=True)]
        pixels = np.empty((counts[0], *sides, len(cut.phases), p.c), p.dtype)
        for index, (row, column) in enumerate(cut.phases):
            to_rows, rows = overlap(starts[0], sides[0], row - p.pads[0], p.strides[0], p.h)
            to_columns, columns = overlap(starts[1], sides[1], column - p.pads[2], p.strides[1], p.w)
            part = pixels[..., index, :]
            part[:, : to_rows.start] = part[:, to_rows.stop :] = 0
            part[:, to_rows, : to_columns.start] = part[:, to_rows, to_columns.stop :] = 0
            part[:, to_rows, to_columns] = input[corner[0], rows, columns]
        image, line, pixel, phase, channel = pixels.strides
        return np.lib.stride_tricks.as_strided(
            pixels,
            (*counts, len(cut.phases), *cut.lengths, p.c),
            (image, line * cut.steps[0], pixel * cut.steps[1], phase, line, pixel, channel),
            writeable=False,
        )

    def _spectra(self, windows: Array, axis: int, workers: int) -> Array:
        """Return the spectra of tiles, rows along ``axis``."""
        if self.cut.lengths[0] == 1:
            return np.asarray(_transforms().rfft(windows, axis=axis + 1, workers=workers))
        return np.asarray(_transforms().rfft2(windows, axes=(axis, axis + 1), workers=workers))

    def _inverse(self, sums: Array, axis: int, workers: int) -> Array:
        """Return the outputs of tiles, rows along ``axis``: a pass in place, and one over the rows kept."""
        y = sums
        if self.cut.lengths[0] > 1:
            y = _transforms().ifft(y, axis=axis, overwrite_x=True, workers=workers)
        kept = y[(slice(None),) * axis + (slice(self.cut.steps[0]),)]
        return np.asarray(_transforms().irfft(kept, self.cut.lengths[1], axis=axis + 1, workers=workers))

    def _store(self, y: Array, out: Array, corner: tuple[slice, slice, slice]) -> None:
        """Store ``[images, tile rows, tile columns, rows, columns, groups, K // groups]``, clipped."""
        (high, wide), (oh, ow) = self.cut.steps, out.shape[1:3]
        for rows, height in _parts(corner[1], high, oh):
            for columns, width in _parts(corner[2], wide, ow):
                part = y[:, rows, columns, :height, :width]
                n, a, b, *_ = part.shape
                top, left = (corner[1].start + rows.start) * high, (corner[2].start + columns.start) * wide
                target = out[corner[0], top : top + a * height, left : left + b * width]
                # Splitting axes of an array never copies it.
                target = target.reshape(n, a, height, b, width, *y.shape[5:])
                target[...] = part.transpose(0, 1, 3, 2, 4, 5, 6)


def _parts(tiles: slice, step: int, length: int) -> Iterator[tuple[slice, int]]:
    """Yield the tiles, counted from the first of them, that are inside ``length``, then the one partly so."""
    full = min(tiles.stop, length // step) - tiles.start
    if full:
        yield slice(0, full), step
    if tiles.start + full < tiles.stop:
        yield slice(full, full + 1), length - (tiles.start + full) * step


def _growth(problem: Problem, config: Config) -> float:
    """Return the factor of the normwise bound, to first order in eps = 2u.

    An octave of a transform is an addition (u), a twiddle product (sqrt(5) u) and the twiddle's own rounding
    (at most u): under 2.2 eps in the 2-norm (Gentleman and Sande 1966; Higham, Accuracy and Stability of
    Numerical Algorithms, theorem 24.2). The inverse's error is as much of the mean of |X||W|, which by
    Cauchy-Schwarz and Parseval is at most ||x|| ||w||. Three transforms: 6.6 log2(points). The sum over
    channels in between is two real dot products of twice their number: sqrt(2) eps a channel.
    """
    cut = _cut(problem, config)
    return 6.6 * math.log2(math.prod(cut.lengths)) + 1.5 * len(cut.phases) * problem.group_c + 4


def _sizes(problem: Problem) -> list[int]:
    """Return the lengths of transforms worth trying."""
    fixed = _geometry(problem)
    least, whole = max(fixed.reach), max(fixed.whole)
    is_line = min(fixed.whole) == 1
    fitting = [tile for tile in (_LONG_TILES if is_line else _TILES) if least <= tile < whole]
    far_longer = is_line and whole > 2 * _LONG_TILES[-1]  # than any cache
    return fitting if fitting and far_longer else [*fitting, whole]


def _order(problem: Problem, config: Config) -> tuple[bool, float]:
    """Return what configs are ranked by: those of moderate memory first, then by time."""
    cut = _cut(problem, config)
    large = _block_bytes(problem, cut) > _MOST_WORKSPACE or _spectra_bytes(problem, cut) > _MOST_SPECTRA
    return large, _seconds(problem, cut, 1, _NARROW)


@functools.lru_cache(maxsize=1024)
def _ranked(problem: Problem) -> tuple[Config, ...]:
    """Return every config worth trying."""
    configs = (Config(tile=tile) for tile in _sizes(problem))
    return tuple(sorted(configs, key=lambda config: _order(problem, config)))


@functools.lru_cache(maxsize=1024)
def _best(problem: Problem) -> Config:
    """Return the first of ``_ranked``, without cutting what takes longer even in one block.

    It is what deciding about a problem never seen needs, and the others would be a third of that.
    """
    bounds = []
    for tile in _sizes(problem):
        lengths, _, tiles = _tiling(problem, tile)
        bounds.append((_busy_seconds(problem, lengths, tiles, 1, _NARROW), tile))
    best: tuple[tuple[bool, float], int] | None = None
    for bound, tile in sorted(bounds):
        if best is not None and (False, bound) > best[0]:
            break
        now = _order(problem, Config(tile=tile)), tile
        best = now if best is None else min(best, now)
    assert best is not None  # noqa: S101  # the whole image's transform is always among them
    return Config(tile=best[1])


def _seconds(problem: Problem, cut: _Cut, threads: int, vector_bytes: int) -> float:
    """Return the predicted seconds of one call."""
    p = problem
    blocks = math.prod(-(-n // part) for n, part in zip((p.n, *cut.tiles), cut.block, strict=True))
    calls = blocks * _SECONDS_PER_BLOCK * (p.group_k if p.group_c == 1 else 1)
    busy = _busy_seconds(p, cut.lengths, cut.tiles, blocks, vector_bytes)
    shared = threads > 1 and p.n * math.prod(cut.tiles) >= _TILES_OF_A_THREAD * threads
    return float((busy + calls) / (threads**0.7 if shared else 1)) + (_SECONDS_PER_LAUNCH if threads > 1 else 0)


def _busy_seconds(
    problem: Problem, lengths: tuple[int, int], tiling: tuple[int, int], blocks: int, vector_bytes: int
) -> float:
    """Return the predicted seconds of transforms, products and copies on one thread: least in one block."""
    p, (rows, columns), phases = problem, lengths, len(_geometry(problem).phases)
    tiles, spectrum, depth = p.n * tiling[0] * tiling[1], rows * (columns // 2 + 1), max(1, phases * p.group_c)
    point = 2.5 * math.log2(rows * columns) / _FFT_FLOPS_PER_SECOND
    point += _SECONDS_PER_POINT + _SECONDS_PER_LINE * ((1 / rows if rows > 1 else 0) + 1 / columns)
    transforms = tiles * (phases * p.c + p.k) * rows * columns * point
    copies = (tiles * rows * columns * phases * p.c + p.n * p.oh * p.ow * p.k) * 4 / _COPY_BYTES_PER_SECOND
    if p.group_c == 1:
        products = tiles * spectrum * depth * p.k * _SECONDS_PER_PRODUCT
    else:  # a matrix product reaches its peak as its sides grow; half of it at these lengths
        height = tiles / blocks
        fill = height / (height + 6) * depth / (depth + 8) * p.group_k / (p.group_k + 8)
        gemm = 8 * tiles * spectrum * depth * p.k / (_GEMM_FLOPS_PER_VECTOR_BYTE * vector_bytes * fill)
        load = blocks * spectrum * depth * p.k * 8 / _SPECTRA_BYTES_PER_SECOND
        products = max(gemm, load) + blocks * spectrum * p.groups * _SECONDS_PER_GEMM
    return (transforms + products + copies) * item_bytes(p.dtype) / 4


class Fft(Backend):
    """Products of spectra, on tiles; its time hardly depends on the size of the filters."""

    name = "fft"
    packing_cost = (1e-4, 6e-8)
    numerics = Numerics("transform", growth=_growth)
    parallel = True
    native_dtypes = frozenset(("float32", "float64"))

    def rejects(self, problem: Problem) -> str | None:
        """Return a reason for integers, and for more pixels than can be cut."""
        if problem.is_integer:
            return f"integers must be exact, and the Fourier transform of {problem.dtype} values is not"
        return too_many(problem.n * problem.oh * problem.ow)

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Config]:
        """Return transform lengths, by rows and by columns; each axis is cut to what it needs."""
        return (_best(problem),) if effort == "estimate" else _ranked(problem)[: _EFFORTS[effort]]

    def workspace(self, problem: Problem, config: Config) -> int:
        """Return the bytes of the blocks worked on at once."""
        cut = _cut(problem, config)
        return _block_bytes(problem, cut) * _across(problem, cut, config.threads)

    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float | None:
        """Return the time of transforms, products and copies, at measured rates."""
        threads = min(config.threads, machine.cores)
        return _seconds(problem, _cut(problem, config), threads, machine.vector_bytes) / _rates.pace()

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:  # noqa: ARG002
        """Spread the taps over their phases and places, and transform them."""
        p, cut = problem, _cut(problem, config)
        taps = np.zeros((*cut.lengths, p.groups, len(cut.phases), p.group_c, p.group_k), p.dtype)
        grouped = filters.reshape(p.kh, p.kw, p.group_c, p.groups, p.group_k).transpose(0, 1, 3, 2, 4)
        for i, j in np.ndindex(p.kh, p.kw):
            (row, row_phase), (column, column_phase) = (
                divmod(place * dilation, stride)
                for place, dilation, stride in zip((i, j), p.dilations, p.strides, strict=True)
            )
            taps[row, column, :, cut.phases.index((row_phase, column_phase))] = grouped[i, j]
        if p.group_c == 1:  # [rows, columns, C, phases, 1, K // groups] with its planes innermost
            taps = taps[..., 0, :].transpose(3, 4, 0, 1, 2)
        axes = (2, 3) if p.group_c == 1 else (0, 1)
        spectra = np.conj(_transforms().rfft2(taps, axes=axes, workers=config.threads)) if taps.size else taps
        if p.group_c != 1:
            spectra = spectra.reshape(cut.spectrum, p.groups, -1, p.group_k) if taps.size else spectra
        return FftKernel(p, spectra, cut, config.threads)
