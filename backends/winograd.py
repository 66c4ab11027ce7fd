"""``winograd``: small filters, and those of one row or column, by minimal filtering, F(m x m, r x r) or F(m, r).

The output is cut into tiles of m x m pixels. A tile needs n x n input pixels, n = m + r - 1; these and the filters are
transformed so that convolving becomes n * n independent products of matrices ``[tiles, C] @ [C, K]``, whose results are
transformed back: n * n multiplications for m * m outputs where the definition takes r * r * m * m. For 3x3 filters
that is 2.25 times fewer with m = 2, 4 times with m = 4, 5.06 times with m = 6, and 4.59 times with m = 5, whose tiles
fit some images. A dilated problem is d * d interleaved problems that are not. With stride 2 the even and the odd rows
and columns of the input are filtered by the even and the odd taps, each without a stride: with 3x3 filters and m = 4,
1.8 times fewer multiplications. Filters of one row or column have tiles of m outputs in a line: n multiplications for
r * m, 2 to 3.5 times fewer. Tiles are worked on by the block, so that scratch memory does not grow with the image, and
bias, residual and activation are applied before a result is stored.

Source: A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015 (arXiv:1509.09308); the
matrices and their errors are in ``_toomcook``, the kernel is in ``_winograd``.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import Config, Effort, Numerics, item_bytes
from convdispatch.backends import _rates
from convdispatch.backends._caches import should_stream
from convdispatch.backends._jobs import grid, too_many
from convdispatch.backends._kernel import PackedKernel
from convdispatch.backends._packed import PackedBackend
from convdispatch.backends._packing import by_blocks, by_phases
from convdispatch.backends._toomcook import amplification, roundings, strided
from convdispatch.backends._vector import registers, vector_bytes
from convdispatch.backends._winograd import Algorithm, Passes, compiled, is_staged, scratch_of, stage_shape
from convdispatch.backends._winograd_filters import transformed
from convdispatch.errors import ArgumentError
from convdispatch.machine import Machine, current
from convdispatch.problem import Problem

#: Sides of output tiles by the taps along an axis and the stride. F(5) suits images of 10, 14, 15 or 20 pixels a side.
SIZES = {
    (2, 1): (2, 4), (3, 1): (2, 4, 5, 6), (4, 1): (2, 3, 4), (5, 1): (2, 4), (6, 1): (2, 3), (7, 1): (2,),
    (3, 2): (2, 4), (4, 2): (2, 4), (5, 2): (2, 4), (6, 2): (2, 4), (7, 2): (2, 4),
}  # fmt: skip
#: Lengths of tiles, likewise, for filters of one row or column.
LENGTHS = {
    (2, 1): (2, 4), (3, 1): (2, 4, 6), (4, 1): (2, 4, 6), (5, 1): (2, 4, 6), (6, 1): (2, 4, 6), (7, 1): (2, 4, 6),
    (8, 1): (2, 4), (9, 1): (2, 4), (10, 1): (2,), (11, 1): (2,),
    (3, 2): (4, 6), (4, 2): (4, 6), (5, 2): (4, 6), (7, 2): (4,),
}  # fmt: skip
#: Transforms that enlarge errors more than this are for no more channels than these: errors grow with both, and 512
#: channels brought F(6, 7) near the bound of `standard`.
_ROUGH, _CHANNELS_OF_ROUGH = 300, 256
#: Folded: the side of tiles, least and most taps that are left, and most channels of what is then a pixel.
_FOLDED_SIZE, _FOLDED_TAPS, _FOLDED_CHANNELS = 4, (2, 4), 64
#: Scratch for the tiles of one job: about what a second-level cache holds. But never fewer than LEAST_TILES, or the
#: filters, read again for every job, would be most of the traffic.
BLOCK_BYTES = 768 << 10
LEAST_TILES = 24
#: The same of groups, since the pixels of these tiles, all their channels, are to stay there from group to group.
_GROUPS_BYTES = 192 << 10
#: Of a folded image, with few products a point, transforms are most of the work, and go faster nearer to L1.
_FOLDED_BYTES, _FOLDED_TILES = 192 << 10, 12

#: Rows of register tiles, by their vectors and by the number of vector registers: a kernel has all heights of a width.
#: Tiles of the image are shared out evenly among passes, each by the lowest that holds them. Of widths that waste no
#: more products than so many times the least, the first is used.
_HEIGHTS = {
    32: {
        4: (6, 5, 4, 3, 2), 3: (8, 7, 6, 5, 4), 2: (14, 12, 10, 8, 6, 4), 5: (5, 4, 3, 2), 1: (14, 12, 10, 9, 8, 6, 4),
    },
    16: {2: (6, 5, 4, 3, 2), 3: (4, 3, 2), 1: (12, 11, 10, 8, 6, 4)},
}  # fmt: skip
_WASTE = 1.05

#: An output is written past the caches if it has more than this part of the last one. A layer after it that reads it
#: then waits for memory: of equal layers in turn, those at the edge gain with one thread what they lose with two.
_CACHED_OUTPUT = 0.35

#: Filters are prefetched if they take more of the last cache than is found there again. Both is tried from this
#: part of it on.
_DOUBTFUL = 0.25

#: A dilation may make so many pictures, be there pixels for all of them or not.
_PICTURES = 1 << 10

_WRONG_SIZE = "filters are {}x{}; it does sides of 2 to 7 taps, and a single row or column of 2 to 11"

# Rates of one core with 64-byte vectors; narrower ones are slower in proportion.
_FLOPS = 1.1e11  # of the products, float32
_TRANSFORM_VALUES = 2.4e10  # values of one-dimensional transforms a second
_OUTPUT_VALUES = 1.7  # what takes as long of the tiles as one of their outputs, with bias and what is not finite
_PIXEL_SECONDS = 2.3e-9  # finding one pixel of a tile, however wide vectors are
# Of the time of all products, what it takes to read the filters, for each tile, and to transform all tiles, for each
# filter: measured on images of 7x7 to 20x20 pixels with 16 to 512 channels.
_READ, _TRANSFORMED = 5, 40


@dataclass(frozen=True)
class _Form(Algorithm):
    """Which algorithm is used, and on what.

    Attributes:
        fold: so many rows and columns of the image are one pixel of the algorithm; 1 where pixels are pixels.
        run: values of such a pixel that are neighbours in memory: the channels of ``fold`` columns, or of a group.
        groups: the problem's, or as many as there are when ``share`` of them are taken for one.
        filters: of a group.
        share: so many of the problem's groups are one, and fill a vector with channels and one with filters.
    """

    fold: int
    run: int
    groups: int
    filters: int
    share: int = 1

    @functools.cached_property
    def points(self) -> int:
        """A tile's products of transformed values."""
        return math.prod(self.n)

    @property
    def axes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Outputs, taps and stride of the transforms, down and across."""
        return (self.m[0], self.r[0], self.stride), (self.m[1], self.r[1], self.stride)

    @property
    def depth(self) -> int:
        """Values over which products are summed."""
        return self.fold * self.run // self.share

    def padded(self, lanes: int) -> int:
        """Return the values of a pixel in scratch memory: each run fills up vectors."""
        return self.fold * -(-self.run // lanes) * lanes


def _folds(problem: Problem) -> bool:
    """Return whether the image may be folded: pixels become channels, and the stride 1."""
    p, stride = problem, problem.strides[0]
    return (
        p.groups == 1 and stride > 1 and p.strides == (stride, stride) and p.dilations == (1, 1) and p.kh == p.kw
        and _FOLDED_TAPS[0] <= p.kh / stride <= _FOLDED_TAPS[1] and stride * stride * p.c <= _FOLDED_CHANNELS
    )  # fmt: skip


def _axes(problem: Problem) -> list[tuple[int, int]]:
    """Return the taps and the stride of the axes along which there is more than one tap."""
    p = problem
    return [(taps, stride) for taps, stride in zip((p.kh, p.kw), p.strides, strict=True) if taps > 1]


@functools.lru_cache(maxsize=1024)
def _known_sizes(problem: Problem) -> tuple[int, ...]:
    """Return the sides of output tiles, or their lengths, that there are for a filter and stride."""
    axes = _axes(problem)
    if len(axes) == 1:
        ((taps, stride),) = axes
        rough = problem.group_c > _CHANNELS_OF_ROUGH
        lengths = LENGTHS.get((taps, stride), ())
        return tuple(m for m in lengths if not (rough and amplification(m, taps, stride) > _ROUGH))
    if not axes or axes[0][1] != axes[1][1]:
        return ()
    down, across = (SIZES.get(axis, ()) for axis in axes)
    return tuple(m for m in down if m in across)


def _form(problem: Problem, config: Config) -> _Form:
    p = problem
    sizes = _known_sizes(p)
    known = [(size, False) for size in sizes] + [(_FOLDED_SIZE, True)] * _folds(p)
    m, folded = config.get("m", 4 if 4 in sizes or not sizes else sizes[0]), config.get("folded", not sizes)
    if not isinstance(m, int) or not isinstance(folded, bool) or (m, folded) not in known:
        wanted = " or ".join(f"m={size}" + ", folded=True" * fold for size, fold in known)
        given = f"m={m!r}, folded={folded!r}" if "folded" in config else f"m={m!r}"
        raise ArgumentError(f"winograd's config needs {wanted}, the side of an output tile; got {given}")
    return _form_of(p, m, folded)


@functools.lru_cache(maxsize=1024)
def _form_of(problem: Problem, m: int, folded: bool) -> _Form:
    p, stride = problem, problem.strides[0]
    if folded:
        taps = -(-p.kh // stride)
        return _Form((m, m), (taps, taps), 1, stride, stride * p.c, 1, p.k)
    share = _sharing(p)
    outputs = m if p.kh > 1 else 1, m if p.kw > 1 else 1
    return _Form(
        outputs, (p.kh, p.kw), _axes(p)[0][1], 1, share * p.group_c, p.groups // share, share * p.group_k, share
    )


def _sharing(problem: Problem) -> int:
    """Return how many groups fill a vector, with channels and with filters, if they may share it."""
    p, lanes = problem, vector_bytes() // item_bytes(problem.dtype)
    fills = is_staged(p.groups, p.dilations) and p.group_c == p.group_k and lanes % p.group_c == 0
    share = lanes // p.group_c if fills else 1
    return share if p.groups % share == 0 else 1


def _tiles(problem: Problem, m: tuple[int, int]) -> int:
    """Return the tiles of all images: those of each of the pictures that a dilation makes."""
    p = problem
    rows, columns = -(-p.oh // p.dilations[0]), -(-p.ow // p.dilations[1])
    return p.n * math.prod(p.dilations) * -(-rows // m[0]) * -(-columns // m[1])


@dataclass(frozen=True)
class _Jobs:
    """How the work is cut.

    Attributes:
        vectors: of a register tile.
        filters: of all groups.
        block: filters that are multiplied with together.
        blocks: of all groups.
        tiles: of outputs, of all images.
        down: ranges of tiles.
        across: ranges of blocks.
    """

    vectors: int
    filters: int
    block: int
    blocks: int
    tiles: int
    down: int
    across: int

    @property
    def count(self) -> int:
        """Tiles of outputs of the largest job."""
        return -(-self.tiles // self.down)

    @functools.cached_property
    def waste(self) -> float:
        """How many times the products that are needed are made."""
        heights = _HEIGHTS[registers()][self.vectors]
        passes = -(-self.count // heights[0])
        rows, longer = divmod(self.count, passes)
        lower, higher = (
            min(height for height in heights if height >= now) for now in (rows, min(rows + 1, heights[0]))
        )
        made = (passes - longer) * lower + longer * higher
        return made * self.blocks * self.block / (self.count * self.filters)


def _sizes(problem: Problem) -> tuple[int, ...]:
    """Return the sides of output tiles to be tried: the odd one where it takes the fewest products."""
    sizes = _known_sizes(problem)
    forms = {m: _form(problem, Config(m=m)) for m in sizes}
    products = {m: _tiles(problem, form.m) * form.points for m, form in forms.items()}
    return tuple(m for m in sizes if m % 2 == 0 or products[m] < min(products[other] for other in sizes if other != m))


@functools.lru_cache(maxsize=4096)
def _jobs(problem: Problem, form: _Form, threads: int) -> _Jobs:
    """Return how the work is cut, by the first register tiles that waste little, or little more than others."""
    lanes = vector_bytes() // item_bytes(problem.dtype)
    wide = -(-form.filters // lanes)
    ways: list[_Jobs] = []
    for vectors in _HEIGHTS[registers()]:
        if vectors <= wide:
            ways.append(_cut(problem, form, vectors, threads))
            if ways[-1].waste <= _WASTE:
                return ways[-1]
    least = min(jobs.waste for jobs in ways)
    return next(jobs for jobs in ways if jobs.waste <= _WASTE * least)


def _cut(problem: Problem, form: _Form, vectors: int, threads: int) -> _Jobs:
    size, rows = item_bytes(problem.dtype), _HEIGHTS[registers()][vectors][0]
    block, tiles = vectors * vector_bytes() // size, _tiles(problem, form.m)
    blocks = form.groups * -(-form.filters // block)
    each = form.points * (form.fold * form.run + block) * size
    room, least = BLOCK_BYTES if form.groups == 1 else _GROUPS_BYTES, LEAST_TILES
    if form.fold > 1:
        room, least = _FOLDED_BYTES, _FOLDED_TILES
    most = max(least, room // each)
    most = max(rows, most - most % rows)
    down = -(-tiles // most)
    if tiles >= threads * least // 2 or (form.groups == 1 and _by_tiles(tiles, blocks, problem.k, threads)):
        down = min(tiles, -(-down // threads) * threads)
    return _Jobs(vectors, problem.k, block, blocks, tiles, down, min(blocks, -(-threads // down)))


def _by_tiles(tiles: int, blocks: int, filters: int, threads: int) -> bool:
    """Return whether few tiles are better shared out among threads than blocks of filters are.

    Then each thread reads all transformed filters, rather than those of its blocks, and transforms its own tiles,
    rather than all; and blocks that cannot be shared out evenly do not matter. In parts of the time of all products.
    """
    share = -(-blocks // threads) / blocks
    read, transformed = _READ / tiles * (1 - share), _TRANSFORMED / filters * (1 - 1 / threads)
    return read < share - 1 / threads + transformed


def _scratch(problem: Problem, form: _Form, jobs: _Jobs) -> int:
    """Return how many values a job keeps: the transformed tiles, the products and what is copied."""
    p, size = problem, item_bytes(problem.dtype)
    lanes = vector_bytes() // size
    padded, least = form.padded(lanes), _HEIGHTS[registers()][jobs.vectors][-1]
    *_, values = scratch_of(
        jobs.count, padded, jobs.block, padded // form.fold, form.points, form.m[1], least, lanes, size
    )  # fmt: skip
    stage: tuple[int, int] = stage_shape(
        jobs.count, (p.oh, p.ow), is_staged(p.groups, p.dilations), form.m, p.strides, form.n
    )
    return int(values) + math.prod(stage) * form.run


def _transformed_lengths(n: tuple[int, int], m: tuple[int, int] | None = None) -> int:
    """Return how many values a tile's transforms take, down and then across, from n to n, or to m."""
    kept = n if m is None else m
    return (n[0] * n[1] if n[0] > 1 else 0) + (kept[0] * n[1] if n[1] > 1 else 0)


@functools.cache
def _matrix(m: int, r: int, stride: int) -> Array:
    """Return the matrix that transforms the rows, or the columns, of a filter."""
    return np.array(strided(m, r, stride).g, np.float64)


def _filter_bytes(problem: Problem, form: _Form) -> int:
    """Return the bytes of the transformed filters."""
    return form.points * form.depth * problem.k * item_bytes(problem.dtype)


def _prefetches(filter_bytes: int, config: Config, machine: Machine) -> bool:
    """Return whether filters are prefetched a point ahead: as the config says, or if they crowd the last cache.

    Where they come from memory, that saves up to a third of the time. Where they come from the last cache, one after
    another as they are read, a core of Zen 5 foresees them well enough by itself, and loses a tenth.
    """
    asked = config.get("prefetch", filter_bytes > _rates.FOUND * machine.caches[2])
    if not isinstance(asked, bool):
        raise ArgumentError(f"config prefetch of winograd must be true or false; got {asked!r}")
    return asked


def _growth(problem: Problem, config: Config) -> float:
    """Return the bound's factor: roundings along the way (in eps / 2), times what the transforms make of them."""
    form = _form(problem, config)
    along_the_way = sum(roundings(*axis) for axis in form.axes) + 1  # and one as transformed filters are stored
    return (form.depth + along_the_way) / 2 * math.prod(amplification(*axis) for axis in form.axes)


class Winograd(PackedBackend):
    """Minimal filtering: small filters and lines of taps, of stride 1 and any dilation, or of stride 2."""

    name = "winograd"
    version = 19
    packing_cost = (5e-5, 1e-9)
    numerics = Numerics("transform", growth=_growth)

    def rejects_plain(self, problem: Problem) -> str | None:
        """Return the first thing about the problem that the algorithm has no answer to."""
        kh, kw, strides, known = problem.kh, problem.kw, problem.strides, _folds(problem) or bool(_known_sizes(problem))
        checks = (
            (not (known or _known_sizes(problem.replace(strides=(1, 1)))), _WRONG_SIZE.format(kh, kw)),
            (not known, "strides leave out the neighbours whose work is shared; 1 is done, and 2 for some filters"),
            (strides != (1, 1) and problem.dilations != (1, 1), "its tiles have a stride or a dilation, not both"),
            (
                math.prod(problem.dilations) > max(_PICTURES, problem.oh * problem.ow),
                "dilated so far, it would be pictures without pixels, most of them",
            ),
            (problem.c == 0, "there are no input channels"),
            (problem.groups > 1 and problem.group_c == 1, "one channel a group leaves no matrices to multiply"),
        )
        pixels = problem.n * problem.oh * problem.ow
        return next((reason for bad, reason in checks if bad), None) or too_many(pixels)

    def configs_plain(self, problem: Problem, effort: Effort) -> Sequence[Config]:  # noqa: ARG002
        """Return the tile sizes, first the one with the smallest estimate here."""
        here = current()
        choices = [Config(m=m) for m in _sizes(problem)]
        for config in tuple(choices):
            filter_bytes = _filter_bytes(problem, _form(problem, config))
            if filter_bytes > _DOUBTFUL * here.caches[2]:
                choices.append(Config(config, prefetch=not _prefetches(filter_bytes, config, here)))
        choices += [Config(m=_FOLDED_SIZE, folded=True)] * _folds(problem)
        return sorted(choices, key=lambda config: self.estimate_plain(problem, config, here))

    def step(self, problem: Problem, config: Config) -> int:
        """Return the rows of a tile, or the columns where there is one row of output."""
        down, across = _form(problem, config).m
        return across if problem.oh == 1 else down

    def workspace_plain(self, problem: Problem, config: Config) -> int:
        """Return the bytes of the transformed tiles and products of the jobs under way."""
        form = _form(problem, config)
        jobs = _jobs(problem, form, config.threads)
        under_way = min(config.threads, jobs.down * jobs.across)
        return under_way * _scratch(problem, form, jobs) * item_bytes(problem.dtype)

    def estimate_plain(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return the seconds of the products, the transforms, and the filters' traffic."""
        return _seconds(problem, _form(problem, config), config.threads, machine)

    def prepare_plain(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Transform the filters in float64 and round them once."""
        p, form, size = problem, _form(problem, config), item_bytes(problem.dtype)
        jobs, added, lanes = _jobs(p, form, config.threads), np.empty(0, p.dtype), vector_bytes() // size
        if form.fold > 1:
            by_pixels = by_phases(filters, form.fold).transpose(0, 2, 1, 3, 4, 5)
            filters = by_pixels.reshape(*form.r, form.depth, p.k).astype(p.dtype)
        filters = _in_turn(filters, form)
        down, across = (_matrix(*axis) for axis in form.axes)
        packed = transformed(filters, (down, across), form.groups, jobs.block, config.threads)
        if bias is not None:
            added = by_blocks(_in_turn(bias, form).reshape(form.groups, form.filters), jobs.block)
        listed = grid((jobs.tiles, jobs.down), (jobs.blocks, jobs.across))
        values = {
            "filters": packed, "bias": added.reshape(-1), "pads": p.pads[::2], "strides": p.strides,
            "dilations": p.dilations, "groups": form.groups, "code": p.epilogue.code, "slope": p.epilogue.slope,
            "jobs": listed, "streamed": should_stream(p, lanes, form.filters, _CACHED_OUTPUT),
        }  # fmt: skip
        heights, prefetches = (
            _HEIGHTS[registers()][jobs.vectors],
            _prefetches(_filter_bytes(p, form), config, current()),
        )
        passes, staged = (
            Passes(heights, jobs.vectors, form.share, prefetches, lanes, size),
            is_staged(p.groups, p.dilations),
        )
        make = functools.partial(compiled, Algorithm(form.m, form.r, form.stride), form.fold, int(staged), passes)
        return PackedKernel(make, p, values, len(listed), config.threads)


@functools.lru_cache(maxsize=1024)
def _seconds(problem: Problem, form: _Form, threads: int, machine: Machine) -> float:
    """Return what is estimated; asked for again for each config that says more than the form."""
    p, size = problem, item_bytes(problem.dtype)
    jobs = _jobs(p, form, threads)
    n, m, width, filters = form.n, form.m, machine.vector_bytes / 64 * 4 / size, jobs.blocks * jobs.block
    products = 2 * form.points * form.depth * jobs.tiles * jobs.filters * jobs.waste / (_FLOPS * width)
    entered = form.groups * form.padded(machine.vector_bytes // size)
    lengths = _transformed_lengths(n), _transformed_lengths(n, m)
    values = jobs.tiles * (lengths[0] * entered * jobs.across + lengths[1] * filters * _OUTPUT_VALUES)
    pixels = jobs.tiles * form.groups * form.points * form.fold * _PIXEL_SECONDS * _rates.pace()
    coming = jobs.down * _rates.filter_seconds(_filter_bytes(p, form), machine)
    transforms = values * (max(n) / form.stride + 1) / 2 / (_TRANSFORM_VALUES * width * 4)
    used = min(threads, machine.cores, jobs.down * jobs.across)
    return _rates.shared(products + transforms + pixels + coming + _rates.activation_seconds(p, machine), used)


def _in_turn(values: Array, form: _Form) -> Array:
    """Return values of K filters, those of groups that share a vector in turn."""
    if form.share == 1:
        return values
    shape = (*values.shape[:-1], form.groups, form.share, form.filters // form.share)
    return values.reshape(shape).swapaxes(-1, -2).reshape(values.shape)
