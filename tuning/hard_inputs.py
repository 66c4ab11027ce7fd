"""Inputs on which convolutions lose precision, and the error that a candidate has on them.

Normal random numbers are kind: sums grow with the root of their length, and nothing is much larger than the rest.
Here are four images, each convolved with four kinds of filters (taking turns among the output channels):

- wide range: pixels and channels scaled by powers of two from 2^-20 to 2^20, with filters as uneven;
- one-sided: all values between 1/2 and 1, so that sums grow with their length;
- cancelling: an image that is almost constant, under filters that sum to nothing;
- denormal: values around the smallest normal number, whose products mostly vanish.

A problem's rows, columns and output channels are cut down, since errors depend on what is summed and not on how many
outputs there are. What is summed, strides, dtype and epilogue stay, so the code that runs is that of the whole problem.
"""

import functools
from dataclasses import dataclass, replace

import numpy as np

from convdispatch import separation
from convdispatch.arguments import Array
from convdispatch.backend import Candidate, Config
from convdispatch.errors import ArgumentError, BackendRejectedError
from convdispatch.plan import Plan
from convdispatch.problem import Problem, dtype_of
from convdispatch.reference import Oracle, Verdict

IMAGES = ("wide range", "one-sided", "cancelling", "denormal")
_KINDS = 4
#: Most output rows and columns, fewest, and the multiplications of an image that decide between.
_MOST, _FEWEST, _WORK = 32, 8, 2e7
#: Output channels are cut to this many, and what is over in the last block of as many.
_CHANNELS = 128
#: Largest sum of terms in a float16 problem, half of what it can hold.
_LARGEST_FLOAT16 = 2.0**15
#: Exponent of the smallest normal number.
_LEAST_EXPONENT = {"float32": -126, "float64": -1022}
#: Channels of a group that hold denormal values: processors may be very slow with those.
_DENORMAL_CHANNELS = 4


def reduced(problem: Problem) -> Problem:
    """Return the problem with one image, and no more rows, columns and output channels than hard inputs need."""
    k = problem.k
    if problem.groups == 1 and k >= 2 * _CHANNELS:
        k = _CHANNELS + k % _CHANNELS
    most = _MOST
    while most > _FEWEST and most**2 * k * problem.taps > _WORK:
        most -= 4
    h = problem.h - max(0, problem.oh - most) * problem.strides[0]
    w = problem.w - max(0, problem.ow - most) * problem.strides[1]
    return problem.replace(n=1, h=h, w=w, k=k)


def measure(problem: Problem, candidate: Candidate) -> Verdict | None:
    """Return a candidate's worst result on a problem's hard inputs; None where there are none: integers are exact.

    Thread counts of one config share their result. ``error`` is as ``Oracle.error_of_terms`` has it.

    Raises:
        Exception: whatever the backend raises.
    """
    if problem.is_integer or problem.is_trivial:
        return None
    config = Config({**candidate.config, "threads": 1}) if "threads" in candidate.config else candidate.config
    alone = replace(candidate, config=config)
    try:
        return _measured(reduced(problem), alone)
    except (ArgumentError, BackendRejectedError):  # the smaller one is not for this backend or config
        return _measured(problem.replace(n=1), alone)


def worse(verdict: Verdict, candidate: Candidate, problem: Problem) -> Verdict:
    """Return what is worse: a verdict on random input, or the one on hard input, which costs more to come by."""
    hard = measure(problem, candidate) if verdict.reason is None else None
    return verdict if hard is None else verdict.joined(hard)


def flops(problem: Problem) -> int:
    """Return the operations of measuring a candidate; the reference needs as many, once a problem."""
    if problem.is_integer or problem.is_trivial:
        return 0
    try:
        tried = reduced(problem)
    except ArgumentError:
        tried = problem.replace(n=1)
    return len(_turns(problem)) * len(IMAGES) * tried.flops


def forget() -> None:
    """Let go of the images and filters that candidates share."""
    _trials.cache_clear()


def _turns(problem: Problem) -> range:
    """Return which kind of filters comes first in each trial: it takes several where there are few filters."""
    return range(0, _KINDS, min(separation.different(problem), _KINDS))


@functools.lru_cache(maxsize=1024)
def _measured(problem: Problem, candidate: Candidate) -> Verdict:
    worst = Verdict(0.0, 0.0, None)
    for trial in _trials(problem):
        plan = Plan(problem, candidate, trial.filters, trial.bias)
        outputs = [plan(image, residual=trial.residual) for image in trial.images]
        worst = worst.joined(trial.judge(candidate, np.concatenate(outputs)))
    return worst


@dataclass(frozen=True)
class _Trial:
    """Filters ``[KH, KW, C // groups, K]`` with the images that they are tried on, and what is right for these.

    Images and the residual, the same for all, are in the problem's data format, one at a time.
    """

    problem: Problem
    filters: Array
    bias: Array | None
    residual: Array | None
    images: list[Array]
    oracle: Oracle

    def judge(self, candidate: Candidate, outputs: Array) -> Verdict:
        """Compare the outputs of all images, one behind the other, with what is right."""
        got = self.problem.channels_last(outputs)
        numerics = candidate.backend.numerics
        verdict = self.oracle.judge(numerics, candidate.config, got)
        error = self.oracle.error_of_terms(got)
        if verdict.reason is None:
            return Verdict(error, verdict.excess, None)
        worst = IMAGES[self.oracle.worst_image(numerics, candidate.config, got)]
        hint = ""
        if numerics.kind == "local" and np.isfinite(verdict.excess):
            hint = "; a backend that mixes windows must declare numerics of the kind 'transform'"
        return Verdict(error, verdict.excess, f"on {worst} input, {verdict.reason}{hint}")


@functools.lru_cache(maxsize=2)
def _trials(problem: Problem) -> tuple[_Trial, ...]:
    """Return every kind of image under every kind of filters: in one trial, or more where there are few filters."""
    rng = np.random.default_rng(0)
    result = dtype_of(problem.result_dtype)
    drawn = np.concatenate([_image(problem, name, rng) for name in IMAGES])
    found = []
    for first in _turns(problem):
        filters = _filters(problem, first, rng)
        images = _within_range(problem, drawn, filters).astype(dtype_of(problem.dtype))
        bias = rng.standard_normal(problem.k).astype(result) if problem.epilogue.bias else None
        residual = None
        if problem.epilogue.residual:
            residual = rng.standard_normal((1, problem.oh, problem.ow, problem.k)).astype(result)
        oracle = Oracle(
            problem.replace(n=len(IMAGES)), images, filters, bias,
            None if residual is None else np.repeat(residual, len(IMAGES), axis=0),
        )  # fmt: skip
        laid_out = [_laid_out(problem, image[np.newaxis]) for image in images]
        added = None if residual is None else _laid_out(problem, residual)
        found.append(_Trial(problem, filters, bias, added, laid_out, oracle))
    return tuple(found)


def _image(problem: Problem, name: str, rng: np.random.Generator) -> Array:
    """Draw an image ``[1, H, W, C]`` in float64."""
    shape = 1, problem.h, problem.w, problem.c
    if name == "wide range":
        pixels = rng.integers(-15, 16, (*shape[:3], 1))
        channels = rng.integers(-5, 6, problem.c)
        return rng.standard_normal(shape) * 2.0 ** (pixels + channels)
    if name == "one-sided":
        return rng.uniform(0.5, 1.0, shape)
    if name == "cancelling":
        return 1 + 2.0**-10 * rng.standard_normal(shape)
    # The last channels of each group: sums stay normal until they come.
    last = np.arange(problem.c) % problem.group_c >= problem.group_c - _DENORMAL_CHANNELS
    return rng.standard_normal(shape) * last * 2.0 ** (_LEAST_EXPONENT[problem.sum_dtype] - rng.integers(0, 12, shape))


def _filters(problem: Problem, first: int, rng: np.random.Generator) -> Array:
    """Draw filters of every kind in turn, beginning with a certain one."""
    values = separation.drawn(problem, lambda shape: _values(shape, first, rng))
    return values.astype(dtype_of(problem.dtype))


def _values(shape: tuple[int, ...], first: int, rng: np.random.Generator) -> Array:
    """Draw values of every kind in turn along the last axis, of which there may be any number."""
    normal, uneven = rng.standard_normal(shape), rng.integers(-10, 11, shape)
    kinds = (
        normal,
        normal - normal.mean(axis=(0, 1, 2)),
        rng.uniform(0.5, 1.0, shape),
        normal * 2.0**uneven,
    )
    turn = (np.arange(shape[-1]) + first) % _KINDS
    chosen: Array = np.choose(turn, kinds)
    return chosen


def _within_range(problem: Problem, images: Array, filters: Array) -> Array:
    """Scale images down so far that no float16 result can overflow; other dtypes have room."""
    if problem.dtype != "float16":
        return images
    largest = np.abs(images).max(axis=(1, 2, 3), keepdims=True) * np.abs(filters.astype(np.float64)).max()
    scaled: Array = images * np.minimum(1.0, 2.0 ** np.floor(np.log2(_LARGEST_FLOAT16 / (problem.taps * largest))))
    return scaled


def _laid_out(problem: Problem, array: Array) -> Array:
    """Return an NHWC array in the problem's data format."""
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2)) if problem.data_format == "NCHW" else array
