"""The accuracy gate: a candidate's result is compared with the float64 reference before it may win."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convdispatch import separation
from convdispatch.arguments import Array
from convdispatch.backend import Candidate
from convdispatch.errors import BackendError
from convdispatch.memory import CACHE_LINE, LARGE, on_huge_pages, room_for
from convdispatch.plan import Plan
from convdispatch.problem import Problem, dtype_of
from convdispatch.reference import Oracle, Verdict
from convdispatch.tuning.race import Run


def compared_images(n: int) -> list[int]:
    """Return which images of a batch are compared with the reference: the first and the last, of none none."""
    return sorted({0, n - 1}) if n else []


def _twins(n: int) -> list[int]:
    """Return for each image of a batch which of those that are compared it is like, in no regular order."""
    between = np.random.default_rng(n).integers(0, 2, max(0, n - 2))
    return [0, *map(int, between), 1] if n > 1 else [0] * n


#: Bytes between where two arrays begin, modulo a page: were it none, loads would wait for stores of the same offset.
_APART = 1024 + CACHE_LINE


def _room(shape: tuple[int, ...], dtype: np.dtype[Any], number: int = 0) -> Array:
    """Return memory such as a plan's output has, if it is large on huge pages: who wins should be no matter of luck.

    ``number`` tells arrays apart that are used together.
    """
    size, start = math.prod(shape) * dtype.itemsize, number * _APART
    if size < LARGE:
        return room_for(shape, dtype, size)
    return on_huge_pages(start + size)[start:].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Trial:
    """Arrays of a problem: what candidates are tried and timed on.

    ``input``, ``residual`` are in the problem's data format; ``filters`` is ``[KH, KW, C // groups, K]``. The first and
    the last image of a batch are drawn, and compared with the reference. Each in between is a twin of one of them, so
    that it can be judged without working out what is right for it. All of these lie in memory as a plan's output does,
    which is what the next plan is given.
    """

    problem: Problem
    input: Array
    filters: Array
    bias: Array | None
    residual: Array | None

    @classmethod
    def random(cls, problem: Problem, seed: int = 0) -> "Trial":
        """Draw normal floats, or integers from the whole range of their dtype.

        Raises:
            BackendError: if there is no memory for them, so that no backend can be tried.
        """
        rng = np.random.default_rng(seed)

        def draw(shape: tuple[int, ...], dtype: str) -> Array:
            kind = dtype_of(dtype)
            if problem.is_integer:
                limits = np.iinfo(kind)
                return rng.integers(limits.min, limits.max, shape, dtype=kind, endpoint=True)
            return rng.standard_normal(shape).astype(kind)

        def batch(shape: tuple[int, ...], dtype: str, number: int) -> Array:
            images = draw((len(compared_images(problem.n)), *shape[1:]), dtype)
            whole = _room(shape, images.dtype, number)
            for image, twin in enumerate(_twins(problem.n)):
                whole[image] = images[twin]
            return whole

        result = problem.result_dtype
        try:
            return cls(
                problem,
                batch(problem.input_shape, problem.dtype, 1),
                separation.drawn(problem, lambda shape: draw(shape, problem.dtype)),
                draw((problem.k,), result) if problem.epilogue.bias else None,
                batch(problem.output_shape, result, 2) if problem.epilogue.residual else None,
            )
        except MemoryError as error:
            raise BackendError(f"there is no memory for the arrays of {problem}: {error}") from error

    def spoiled_output(self) -> Array:
        """Return an output full of what no kernel stores: fresh memory may hold another candidate's right result."""
        array = _room(self.problem.output_shape, dtype_of(self.problem.result_dtype))
        array.fill(-0x5A5A if self.problem.is_integer else np.nan)
        return array

    def plan(self, candidate: Candidate) -> Plan:
        """Make the candidate's plan for these filters."""
        return Plan(self.problem, candidate, self.filters, self.bias)

    def runner(self, plan: Plan, deployment: str = "plan") -> Run:
        """Return what is timed: a plan's call, or the making of such a plan and its call."""
        if deployment == "call":
            candidate = plan.candidate
            return lambda: self.plan(candidate)(self.input, residual=self.residual)
        out = self._output
        return lambda: plan(self.input, out=out, residual=self.residual)

    @functools.cached_property
    def _output(self) -> Array:
        """Where all who are timed store: one after another, as in one program."""
        return self.spoiled_output()

    @functools.cached_property
    def _images(self) -> list[int]:
        return compared_images(self.problem.n)

    def _some(self, array: Array, images: Sequence[int] | None = None) -> Array:
        """Return some images as NHWC, those that are compared with the reference where not said otherwise."""
        view = self.problem.channels_last(array)
        return view[self._images if images is None else images]

    @functools.cached_property
    def _oracle(self) -> Oracle:
        few = self.problem.replace(n=len(self._images))
        residual = None if self.residual is None else self._some(self.residual)
        return Oracle(few, self._some(self.input), self.filters, self.bias, residual)

    def judge(self, candidate: Candidate, output: Array) -> Verdict:
        """Compare a plan's output with the reference."""
        numerics, config = candidate.backend.numerics, candidate.config
        verdict = self._oracle.judge(numerics, config, self._some(output))
        for images in self._unlike_twins(output):
            verdict = verdict.joined(self._oracle.judge(numerics, config, self._some(output, images)))
        return verdict

    def _unlike_twins(self, output: Array) -> Iterator[list[int]]:
        """Yield images in the place of those that are compared, one of which differs from its twin among these.

        Only by rounding, if at all: a pixel's sum may be taken in another order near the edge of a tile.
        """
        last = self.problem.n - 1
        for image, twin in list(enumerate(_twins(self.problem.n)))[1:-1]:
            if not np.array_equal(output[image], output[last if twin else 0]):
                yield [0, image] if twin else [image, last]


@functools.lru_cache(maxsize=2)
def trial(problem: Problem) -> Trial:
    """Return the arrays that a problem's candidates share."""
    return Trial.random(problem)
