"""The oracle: convolution in float64 (or exact integers), written to be obviously right, and the error bounds."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from convdispatch.arguments import Array
from convdispatch.backend import EPILOGUE_GROWTH, Config, Numerics, epsilon
from convdispatch.epilogue import activate
from convdispatch.problem import ROUNDING, Problem, dtype_of


def convolve(problem: Problem, input: Array, filters: Array) -> Array:
    """Return the sums of a convolution, without epilogue.

    Args:
        problem: the problem; its dtype decides between float64 and wrapping int64 arithmetic.
        input: ``[N, H, W, C]``.
        filters: ``[KH, KW, C // groups, K]``.

    Returns:
        ``[N, OH, OW, K]`` float64, or int64 for integers (wrap it to int32 with ``astype``).
    """
    wide: type[Any] = np.int64 if problem.is_integer else np.float64
    top, bottom, left, right = problem.pads
    padded = np.pad(input.astype(wide), ((0, 0), (top, bottom), (left, right), (0, 0)))
    weights = filters.astype(wide)
    (sh, sw), (dh, dw) = problem.strides, problem.dilations
    groups, cg, kg = problem.groups, problem.group_c, problem.group_k
    sums: Array = np.zeros((problem.n, problem.oh, problem.ow, problem.k), wide)
    with np.errstate(all="ignore"):
        for i in range(problem.kh):
            for j in range(problem.kw):
                rows = slice(i * dh, i * dh + (problem.oh - 1) * sh + 1, sh)
                columns = slice(j * dw, j * dw + (problem.ow - 1) * sw + 1, sw)
                if problem.is_empty:
                    continue
                window = padded[:, rows, columns]
                for g in range(groups):
                    own = slice(g * kg, (g + 1) * kg)
                    sums[..., own] += _product(window[..., g * cg : (g + 1) * cg], weights[i, j, :, own])
    return sums


#: Channels from which on copying pixels into one matrix takes less time than a product for each row of pixels.
_DEEP = 64


def _product(pixels: Array, weights: Array) -> Array:
    """Return pixels ``[N, OH, OW, C]`` times weights ``[C, K]``."""
    deep = len(weights) >= _DEEP and weights.dtype == np.float64
    product: Array = np.tensordot(pixels, weights, 1) if deep else pixels @ weights
    return product


def apply_epilogue(problem: Problem, sums: Array, bias: Array | None, residual: Array | None) -> Array:
    """Return the output ``[N, OH, OW, K]`` in the result's dtype, rounded once."""
    y = sums
    if problem.is_integer:
        y = y.astype(problem.result_dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    if residual is not None:
        y = y + residual.astype(y.dtype)
    y = activate(y, problem.epilogue.activation, problem.epilogue.slope)
    with np.errstate(all="ignore"):
        return y.astype(dtype_of(problem.result_dtype))


def conv2d(
    problem: Problem, input: Array, filters: Array, bias: Array | None = None, residual: Array | None = None
) -> Array:
    """Return what the problem asks for: ``[N, OH, OW, K]`` in the result's dtype.

    Args:
        problem: the problem; arrays are NHWC and HWIO whatever its data format.
        input: ``[N, H, W, C]``.
        filters: ``[KH, KW, C // groups, K]``.
        bias: ``[K]`` or None.
        residual: ``[N, OH, OW, K]`` or None.
    """
    return apply_epilogue(problem, convolve(problem, input, filters), bias, residual)


@dataclass(frozen=True)
class Verdict:
    """How a result compares with the oracle.

    Attributes:
        error: largest deviation over the largest exact output; 0 for exact results.
        excess: largest deviation over what the bound allows there; at most 1 if the result is right.
        reason: None if right, else what is wrong, in words.
    """

    error: float
    excess: float
    reason: str | None

    def joined(self, other: "Verdict") -> "Verdict":
        """Return the verdict on both results: the larger numbers, and the first reason."""
        return Verdict(max(self.error, other.error), max(self.excess, other.excess), self.reason or other.reason)


class Oracle:
    """What is exactly right for some arrays, worked out once for every candidate that is compared with it."""

    def __init__(
        self,
        problem: Problem,
        input: Array,
        filters: Array,
        bias: Array | None = None,
        residual: Array | None = None,
    ) -> None:
        """Take the arrays.

        Args:
            problem: what is asked.
            input: ``[N, H, W, C]`` of finite values.
            filters: ``[KH, KW, C // groups, K]`` of finite values.
            bias: ``[K]`` where the epilogue has one.
            residual: ``[N, OH, OW, K]`` where the epilogue has one.
        """
        self.problem = problem
        self._arrays = input, filters
        self._added = bias, residual
        self._last_bounds: dict[str, tuple[float, Array]] = {}

    @functools.cached_property
    def sums(self) -> Array:
        """The sums before the epilogue, ``[N, OH, OW, K]`` float64 or int64."""
        return convolve(self.problem, *self._arrays)

    @functools.cached_property
    def exact(self) -> Array:
        """The finished output, not rounded: float64, or exact integers in the result's dtype."""
        wide = self.problem if self.problem.is_integer else self.problem.replace(dtype="float64")
        return apply_epilogue(wide, self.sums, *self._added)

    @functools.cached_property
    def _magnitude(self) -> Array:
        """``conv(|x|, |w|)``, what local error bounds are made of."""
        x, w = (np.abs(array.astype(np.float64)) for array in self._arrays)
        return convolve(self.problem.replace(dtype="float64"), x, w)

    @functools.cached_property
    def _largest(self) -> float:
        """The largest exact output's magnitude."""
        return max(float(np.abs(self.exact).max()), float(np.finfo(np.float64).tiny))

    @functools.cached_property
    def _magnitude_added(self) -> Array:
        """The magnitudes of bias and residual, which are terms of the sums like any other, and may come first."""
        bias, residual = (0.0 if added is None else np.abs(added.astype(np.float64)) for added in self._added)
        return np.broadcast_to(np.asarray(bias + residual), self.sums.shape)

    @functools.cached_property
    def _largest_terms(self) -> Array:
        """The largest sum of terms, bias and residual included, of each image and filter, ``[N, K]``."""
        largest: Array = (self._magnitude + self._magnitude_added).max(axis=(1, 2))
        return largest

    @functools.cached_property
    def _norms(self) -> Array:
        """The 2-norm of each image times that of each filter, what transforms' error bounds are made of."""
        x, w = (array.astype(np.float64) for array in self._arrays)
        images, each = np.sqrt(np.sum(x**2, axis=(1, 2, 3))), np.sqrt(np.sum(w**2, axis=(0, 1, 2)))
        return np.broadcast_to(images[:, None, None, None] * each, self.sums.shape)

    @functools.cached_property
    def _floor(self) -> Array:
        """What may be lost to numbers below the smallest normal one, ``[K]``: they have no relative precision.

        Processors may be told to take such inputs, products and sums for zero, and libraries do tell them.
        """
        weights = np.abs(self._arrays[1].astype(np.float64)).sum(axis=(0, 1, 2))
        lost: Array = (self.problem.taps + weights) * float(np.finfo(self.problem.sum_dtype).tiny)
        return lost

    def bound(self, numerics: Numerics, config: Config) -> Array:
        """Return the largest error that a backend's sums may have, ``[N, OH, OW, K]``.

        Local backends: ``growth * eps * conv(|x|, |w|)``. Transform backends: ``growth * eps * ||x|| * ||w||``,
        with the 2-norm of each image and of each filter. Integers are exact: 0.
        """
        problem = self.problem
        if problem.is_integer:
            return np.zeros(self.sums.shape)
        eps = epsilon(problem.sum_dtype)
        # The oracle of a float64 problem is itself a float64 sum, off by as much as a local backend may be.
        own = eps * (problem.taps / 2 + 1) if problem.sum_dtype == "float64" else 0.0
        growth = numerics.growth(problem, config)
        allowed = growth * eps * (self._magnitude if numerics.kind == "local" else self._norms)
        return allowed + own * self._magnitude + self._floor

    def _allowed(self, numerics: Numerics, config: Config) -> Array:
        """Return the largest error that finished outputs may have: that of the sums, and of what follows them."""
        growth = numerics.growth(self.problem, config)
        last = self._last_bounds.get(numerics.kind)
        if last is None or last[0] != growth:
            last = self._last_bounds[numerics.kind] = growth, self._allowed_anew(numerics, config)
        return last[1]

    def _allowed_anew(self, numerics: Numerics, config: Config) -> Array:
        problem, allowed = self.problem, self.bound(numerics, config)
        if problem.epilogue:
            # No activation is steeper than 1.2, leaky_relu aside.
            steepest = max(1.2, abs(problem.epilogue.slope))
            eps, added = epsilon(problem.sum_dtype), self._magnitude_added
            if numerics.kind == "local":  # who begins with the bias rounds it with every product
                allowed = allowed + numerics.growth(problem, config) * eps * added
            scale = np.abs(self.sums) + added + np.abs(self.exact) + 1
            allowed = steepest * (allowed + EPILOGUE_GROWTH * eps * scale)
        if problem.dtype != problem.sum_dtype:  # storing a low-precision result rounds it once more
            allowed = allowed + np.abs(self.exact) * ROUNDING[problem.dtype] + float(np.finfo(np.float16).tiny)
        return np.maximum(allowed, np.finfo(np.float64).tiny)

    def judge(self, numerics: Numerics, config: Config, output: Array) -> Verdict:
        """Compare a backend's finished output ``[N, OH, OW, K]`` with what is right."""
        if output.shape != self.exact.shape:
            return Verdict(np.inf, np.inf, f"shape {output.shape} instead of {self.exact.shape}")
        if not output.size:
            return Verdict(0.0, 0.0, None)
        if self.problem.is_integer:
            wrong = int(np.count_nonzero(output != self.exact))
            reason = f"{wrong} of {output.size} integer results differ from the exact ones" if wrong else None
            return Verdict(float(wrong > 0), np.inf if wrong else 0.0, reason)
        got = output.astype(np.float64)
        if not np.isfinite(got).all():
            return Verdict(np.inf, np.inf, "results that are not finite from finite input")
        deviation = np.abs(got - self.exact)
        error = float(deviation.max() / self._largest)
        excess = float((deviation / self._allowed(numerics, config)).max())
        if excess <= 1:
            return Verdict(error, excess, None)
        return Verdict(error, excess, f"error {error:.2g} of the largest output, {excess:.2g} times what is allowed")

    def error_of_terms(self, output: Array) -> float:
        """Return the largest deviation over the largest sum of terms of its image and filter.

        Like ``Verdict.error``, but over ``conv(|x|, |w|)``, bias and residual included, at its largest for an image and
        a filter: where terms cancel, the largest output says nothing of what can be asked for. What lies below the
        smallest normal number is no deviation.
        """
        got = output.astype(np.float64)
        if not np.isfinite(got).all():
            return np.inf
        floor = self._floor + (float(np.finfo(np.float16).tiny) if self.problem.dtype == "float16" else 0.0)
        deviation = np.maximum(0.0, np.abs(got - self.exact) - floor).max(axis=(1, 2))
        return float(np.max(deviation / np.maximum(self._largest_terms, floor), initial=0.0))

    def worst_image(self, numerics: Numerics, config: Config, output: Array) -> int:
        """Return the number of the image whose output is furthest from what is allowed."""
        excess = np.abs(output.astype(np.float64) - self.exact) / self._allowed(numerics, config)
        return int(np.argmax(np.nan_to_num(excess, nan=np.inf, posinf=np.inf).max(axis=(1, 2, 3))))
