"""``Plan``: a problem with its chosen candidate, its filters packed, ready to be called again and again.

The plan does what its backend leaves to it: it brings arrays into the form the kernel takes, has results that a
transform spoiled with NaN or infinity redone, applies the epilogue, and rounds once.
"""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from convdispatch import epilogue, heuristic, observe, registry, settings
from convdispatch.arguments import Array, as_array
from convdispatch.backend import Candidate, Config, Kernel, seen_by
from convdispatch.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    BackendRejectedError,
    BackendUnavailableError,
)
from convdispatch.memory import room_for
from convdispatch.problem import Problem, dtype_of

#: Usual calls of a plan before it gets a short way into its kernel, unless ``complete`` does: what is called once is
#: done sooner without.
_RUNS_BEFORE = 2
#: Who redoes the images that a transform spoiled, the first that the options allow; the last can do everything.
_LOCAL = ("im2col", "implicit_gemm", "numba", "direct")


@dataclass(frozen=True)
class Evidence:
    """Why a plan's candidate was chosen.

    Attributes:
        source: ``"forced"``, ``"profile"``, ``"replay"`` (of the profile), ``"tuned"``, ``"online"`` or ``"estimate"``.
        detail: one line for people.
    """

    source: str
    detail: str

    def __str__(self) -> str:
        return f"{self.source}: {self.detail}"


class Plan:
    """A convolution ready to run. Thread-safe and picklable; what it says of itself does not change once it is made.

    Call it as ``plan(x)``, ``plan(x, out=y)`` or ``plan(x, residual=r)``.

    Attributes:
        problem: what it computes.
        candidate: the backend and config that compute it.
        evidence: why this candidate.
        budget: the most threads that it was chosen for; None where it was asked for by name.
    """

    def __init__(
        self,
        problem: Problem,
        candidate: Candidate,
        filters: Array,
        bias: Array | None = None,
        evidence: Evidence | None = None,
        budget: int | None = None,
    ) -> None:
        """Pack the filters.

        Args:
            problem: what to compute.
            candidate: what is to compute it.
            filters: ``[KH, KW, C // groups, K]`` of the problem's dtype, any strides; not kept.
            bias: ``[K]`` of the problem's result dtype, present if the epilogue says so; not kept.
            evidence: why this candidate.
            budget: the most threads that it was chosen for, if it was chosen.

        Raises:
            BackendRejectedError: if the backend cannot do the problem.
        """
        if reason := candidate.rejects(problem):
            raise BackendRejectedError(f"backend {candidate.backend.name!r} cannot do {problem}: {reason}")
        self.problem = problem
        self.candidate = candidate
        self.evidence = evidence or Evidence("forced", "asked for")
        self.budget = budget
        self._seen = seen_by(candidate.backend, problem)
        self._set_dtypes()
        self._bias = None if bias is None else np.array(bias, self._sums)
        own = self._bias if self._seen.epilogue else None
        weights = filters.astype(dtype_of(self._seen.dtype), copy=False)
        self._kernel: Kernel | None = None
        if not problem.is_trivial:
            with np.errstate(all="ignore"):  # filters that are not finite are the caller's
                kernel: Any = candidate.backend.prepare(self._seen, weights, own, candidate.config)
            if not callable(kernel):
                got = f"got {type(kernel).__name__} from backend {candidate.backend.name!r}"
                raise BackendError(f"prepare must return a kernel, which is called as (input, out, residual); {got}")
            self._kernel = kernel
        # A transform's packed filters cannot be turned back, and spoiled images need the originals.
        mixes = candidate.backend.numerics.kind == "transform"
        self._filters = np.array(weights, order="C") if mixes and not problem.is_trivial else None
        self._redo: Plan | None = None
        self._lock = threading.Lock()
        self._direct_store = self._can_store_directly()
        self._input_shape, self._output_shape = problem.input_shape, problem.output_shape
        self._enters = self._needs_nothing_done()
        self._plain = self._enters and not problem.epilogue.residual
        self._enter: Callable[..., bool | None] | None = None
        self._runs, self._tried = 0, False
        self._output_bytes = math.prod(problem.output_shape) * self._result.itemsize

    def _set_dtypes(self) -> None:
        self._dtype = dtype_of(self.problem.dtype)
        self._result = dtype_of(self.problem.result_dtype)
        self._sums = dtype_of(self.problem.sum_dtype)

    def __repr__(self) -> str:
        return f"<plan {self.problem} by {self.candidate}, {self.evidence}>"

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["candidate"] = (self.candidate.backend.name, self.candidate.config)
        del state["_lock"]
        return state | {"_enter": None, "_runs": 0, "_tried": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        name, config = state.pop("candidate")
        self.__dict__.update(state)
        self.candidate = Candidate(registry.get(name), config)
        self._set_dtypes()  # `is` tells dtypes apart, and a pickle makes new ones
        self._lock = threading.Lock()

    def complete(self) -> None:
        """Compile what its calls need besides its kernel, and enter that from the first call on, not after some."""
        if self._enters:
            self._tried, self._enter = True, self._short_way()

    @property
    def workspace(self) -> int:
        """Scratch bytes of one call besides input, packed filters and output."""
        return self.candidate.workspace(self.problem)

    def __call__(self, input: Any, *, out: Array | None = None, residual: Any = None) -> Array:
        """Convolve.

        Args:
            input: an array of the plan's input shape and dtype, any strides; never modified.
            out: where to store the result, of the output's shape and dtype, any strides; may overlap inputs.
            residual: an array of the output's shape and dtype, exactly if the plan was made with one.

        Returns:
            ``out``, or a fresh C-contiguous array in native byte order.

        Raises:
            ArgumentError, ArgumentTypeError: naming the argument, what was given and what would be right.
        """
        if observe.observer is not None and observe.is_watched():
            again = functools.partial(self, input, out=out, residual=residual)
            return observe.timed(self.problem, "plan", self.budget, again)
        if self._enter is not None:
            target = self._fresh() if out is None else out
            if self._enter(input, target) if residual is None else self._enter(input, target, residual):
                return target
        if self._plain and residual is None and self._is_plain(input):
            if out is None:
                return self._run_plain(input, self._fresh())
            if (
                type(out) is np.ndarray
                and out.dtype is self._result
                and out.shape == self._output_shape
                and out.flags.carray
                and not np.may_share_memory(input, out)
            ):
                return self._run_plain(input, out)
        x = self._input(input)
        added = self._residual(residual)
        if self._enters:
            self._count_run()
        if out is None:
            target = self._fresh()
            self._run(x, added, target)
            return target
        self._check_out(out)
        # An overlap by bounds may be none by elements; a copy is cheaper than the exact question.
        if self._fits(out) and not any(a is not None and np.may_share_memory(a, out) for a in (input, residual)):
            self._run(x, added, out)
        else:
            target = np.empty(self.problem.output_shape, self._result)
            self._run(x, added, target)
            out[...] = target
        return out

    # The short way: usual arrays, and a kernel that leaves nothing to do ---------------------------------------

    def _needs_nothing_done(self) -> bool:
        """Return whether a kernel's output on usual arrays is the result."""
        p, seen = self.problem, self._seen
        checked = self._filters is None or bool(seen.epilogue) or self.candidate.backend.fuses_epilogue
        return self._kernel is not None and p == seen and checked and self._direct_store

    def _short_way(self) -> Callable[..., bool | None] | None:
        """Return what runs the kernel on usual arrays, and answers True if it did; None where there is no such."""
        make = getattr(self._kernel, "entry", None)
        if make is None:
            return None
        way: Callable[..., bool | None] | None = make(
            (self._input_shape, self._dtype), (self._output_shape, self._result)
        )
        return way

    def _count_run(self) -> None:
        """Try the short way after some runs: a plan that is called once does without."""
        if not self._tried:
            self._runs += 1
            if self._runs >= _RUNS_BEFORE:  # threads may count over each other, and miss any one number
                self._tried = True
                self._enter = self._short_way()

    def _fresh(self) -> Array:
        return room_for(self._output_shape, self._result, self._output_bytes)

    def _is_plain(self, input: Any) -> bool:
        return (
            type(input) is np.ndarray
            and input.dtype is self._dtype
            and input.shape == self._input_shape
            and input.flags.carray
        )

    def _run_plain(self, x: Array, out: Array) -> Array:
        assert self._kernel is not None  # noqa: S101  # or the plan is not plain
        if self._kernel(x, out, None) and self._filters is not None:
            self._redo_images(list(range(self.problem.n)), self._filters, x, out, None)
        self._count_run()
        return out

    # Arrays in -------------------------------------------------------------------------------------------------

    def _input(self, value: Any) -> Array:
        """Return the input as a native, aligned NHWC view, checked."""
        if type(value) is not np.ndarray or value.dtype is not self._dtype:
            value = as_array("input", value)
        if value.shape != self.problem.input_shape:
            raise ArgumentError(f"input must have shape {self.problem.input_shape}; got {value.shape}")
        return self.problem.channels_last(self._native("input", value, self._dtype))

    def _residual(self, value: Any) -> Array | None:
        if not self.problem.epilogue.residual:
            if value is not None:
                raise ArgumentError("residual was given to a plan made without one; make it with residual=True")
            return None
        if value is None:
            raise ArgumentError(f"residual is missing: this plan adds one of shape {self.problem.output_shape}")
        array = value
        if type(value) is not np.ndarray or value.dtype is not self._result:
            array = as_array("residual", value)
        if array.shape != self.problem.output_shape:
            raise ArgumentError(f"residual must have shape {self.problem.output_shape}; got {array.shape}")
        return self.problem.channels_last(self._native("residual", array, self._result))

    @staticmethod
    def _native(name: str, array: Array, dtype: np.dtype[Any]) -> Array:
        if array.dtype is dtype and array.flags.aligned:
            return array
        if array.dtype.name != dtype.name:
            raise ArgumentTypeError(f"{name} must be {dtype.name}, as the plan is; got {array.dtype.name}")
        if not array.dtype.isnative or not array.flags.aligned:
            return array.astype(dtype)
        return array

    def _check_out(self, out: Any) -> None:
        if not isinstance(out, np.ndarray):
            raise ArgumentTypeError(f"out must be an array; got {type(out).__name__}")
        if type(out) is not np.ndarray and isinstance(out, np.ma.MaskedArray):  # np.ma takes 40 ms to load
            raise ArgumentTypeError("out must not be a masked array, whose mask would hide results; pass its data")
        if out.shape != self.problem.output_shape:
            raise ArgumentError(f"out must have shape {self.problem.output_shape}; got {out.shape}")
        if out.dtype is not self._result and out.dtype.name != self._result.name:
            raise ArgumentTypeError(f"out must be {self._result.name}; got {out.dtype.name}")
        if not out.flags.writeable:
            raise ArgumentError("out must be writable; got a read-only array")
        if not out.flags.forc and _overlaps_itself(out):
            raise ArgumentError(f"out must have a place for each of its values; got overlapping strides {out.strides}")

    def _fits(self, out: Array) -> bool:
        """Return whether ``_run`` may store into this array as it is."""
        return out.dtype.isnative and out.flags.aligned and (out.flags.c_contiguous or self.candidate.backend.strided)

    # The work --------------------------------------------------------------------------------------------------

    def _can_store_directly(self) -> bool:
        """Return whether the kernel's output is the result, or needs another layout or dtype."""
        relayout = self.problem.data_format != self._seen.data_format and not self.candidate.backend.strided
        return not relayout and self._seen.result_dtype == self.problem.result_dtype

    def _run(self, x: Array, residual: Array | None, target: Array) -> None:
        """Compute into ``target``, which is in the data format, native, aligned and not any input."""
        result = self.problem.channels_last(target)
        p = self.problem
        if p.is_empty:
            return
        sums = result if self._direct_store else np.empty((p.n, p.oh, p.ow, p.k), self._sums)
        if residual is not None and self._seen.result_dtype != p.result_dtype:
            residual = residual.astype(self._sums)
        if self._kernel is None:
            sums[...] = 0
            fused = False
        else:
            self._run_kernel(self._kernel, x, residual, sums)
            fused = bool(self._seen.epilogue)
        if p.epilogue and not fused:
            epilogue.finish(sums, p.epilogue, self._bias, residual)
        if sums is not result:
            with np.errstate(all="ignore"):  # too large for float16 is infinity, too small is zero, as in any rounding
                result[...] = sums

    def _run_kernel(self, kernel: Kernel, x: Array, residual: Array | None, sums: Array) -> None:
        backend = self.candidate.backend
        seen = dtype_of(self._seen.dtype)
        if x.dtype != seen:
            x = x.astype(seen, order="C")
        added = residual if self._seen.epilogue else None
        if self._seen.data_format == "NCHW":
            x, sums = x.transpose(0, 3, 1, 2), sums.transpose(0, 3, 1, 2)
            added = None if added is None else added.transpose(0, 3, 1, 2)
        if not backend.strided:
            x = np.ascontiguousarray(x)
            added = None if added is None else np.ascontiguousarray(added)
        told = kernel(x, sums, added)
        if self._filters is None:
            return
        if told is None:  # one pass over the sums tells whether any is NaN or infinite
            with np.errstate(all="ignore"):
                suspicious = not np.isfinite(np.sum(sums))
            images = [n for n in range(self.problem.n) if not np.isfinite(sums[n]).all()] if suspicious else []
        else:
            images = list(range(self.problem.n)) if told else []
        if images:
            self._redo_images(images, self._filters, x, sums, added)

    def _redo_images(self, images: list[int], filters: Array, x: Array, sums: Array, residual: Array | None) -> None:
        """Have images that a transform spoiled redone by a backend that does not mix pixels."""
        with self._lock:
            if self._redo is None:
                self._redo = _local_plan(self._seen.replace(n=1), filters, self._bias if self._seen.epilogue else None)
        with np.errstate(all="ignore"):  # the infinities are the caller's
            for n in images:
                one = slice(n, n + 1)
                self._redo(x[one], out=sums[one], residual=None if residual is None else residual[one])


def _local_plan(problem: Problem, filters: Array, bias: Array | None) -> Plan:
    chosen = next(_allowed(problem), None) or Candidate(registry.built_in(_LOCAL[-1]), Config())
    return Plan(problem, chosen, filters, bias)


def _allowed(problem: Problem) -> Iterator[Candidate]:
    """Yield built-in candidates that do not mix pixels, and that the options in force allow."""
    options = settings.current()
    for name in _LOCAL:
        with contextlib.suppress(BackendUnavailableError):
            backend = registry.built_in(name)
            if name in options.forbid or backend.rejects(seen_by(backend, problem)):
                continue
            for candidate in heuristic.candidates_of(backend, problem, 1, "exhaustive"):
                if heuristic.fits_memory(candidate.workspace(problem), options):
                    yield candidate


def _overlaps_itself(array: Array) -> bool:
    """Return whether some elements may lie in one place, as in broadcast arrays and sliding windows."""
    reach = array.itemsize
    for step, count in sorted((abs(step), count) for step, count in zip(array.strides, array.shape, strict=True)):
        if count > 1:
            if step < reach:
                return True
            reach += step * (count - 1)
    return False
