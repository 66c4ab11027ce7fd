"""What the backends compiled by ``_arguments`` have in common: other layouts and dtypes are converted on the way."""

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from convdispatch.arguments import Array
from convdispatch.backend import Backend, Config, Effort, Kernel
from convdispatch.backends import _bands
from convdispatch.backends._exact import obstacle
from convdispatch.backends._kernel import PackedKernel
from convdispatch.machine import Machine
from convdispatch.problem import Problem

_CONVERTED_BYTES_PER_SECOND = 1.2e10  # of one core, in cache


@functools.lru_cache(maxsize=1024)
def flat(problem: Problem) -> Problem:
    """Return the same problem with all pixels in one line, where that is the same: with 1x1 filters of stride 1."""
    p = problem
    if not p.is_pointwise or p.strides != (1, 1) or any(p.pads):
        return p
    return p.replace(n=1, h=1, w=p.n * p.h * p.w)


class PackedBackend(Backend):
    """A backend whose kernels are ``PackedKernel``; its methods see plain problems: NHWC of float32 or float64.

    One that ``takes_planes`` sees NCHW of these, too.
    """

    parallel = True
    fuses_epilogue = True
    packing_cost = (4e-5, 4e-10)
    formats = frozenset(("NHWC", "NCHW"))
    native_dtypes: ClassVar[frozenset[str]] = Backend.native_dtypes | _bands.convertible()
    #: Whether NCHW floats are plain to it, too.
    takes_planes: ClassVar[bool] = False

    def rejects(self, problem: Problem) -> str | None:
        """Return None, or why the problem cannot be done."""
        if problem.is_integer:
            if self.numerics.kind != "local":
                return "the transforms have fractions, and integer results are exact"
            if reason := obstacle(problem):
                return reason
        return self.rejects_plain(self._plain(problem))

    def _takes(self, problem: Problem) -> bool:
        """Return whether the problem is plain to this backend in either layout."""
        return self.takes_planes and problem.dtype == _bands.computed_dtype(problem)

    def _is_plain(self, problem: Problem) -> bool:
        return self._takes(problem) or _bands.is_plain(problem)

    def _plain(self, problem: Problem) -> Problem:
        return problem if self._takes(problem) else _bands.plain(problem)

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Config]:
        """Return the configs worth trying, the one with the smallest estimate first."""
        return self.configs_plain(self._plain(problem), effort)

    def workspace(self, problem: Problem, config: Config) -> int:
        """Return the bytes of scratch memory of a call, conversions included."""
        if self._is_plain(problem):
            return self.workspace_plain(self._plain(problem), config)
        rows = _bands.band_rows(problem, self.step(problem, config), config.threads)
        copies = _bands.scratch_bytes(problem, rows)
        if rows is None:
            return copies + self.workspace_plain(_bands.plain(problem), config)
        alone = Config(config, threads=1)
        return config.threads * (copies + self.workspace_plain(_bands.band(problem, rows), alone))

    def estimate(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Return the predicted seconds of a call, conversions included."""
        seconds = self.estimate_plain(self._plain(problem), config, machine)
        if self._is_plain(problem):
            return seconds
        moved = _bands.scratch_bytes(problem, None) / _CONVERTED_BYTES_PER_SECOND
        return seconds + moved / min(config.threads, machine.cores)

    def prepare(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> Kernel:
        """Pack the filters and return a kernel."""
        dtype = _bands.computed_dtype(problem)
        weights = filters.astype(dtype, copy=False)
        added = None if bias is None else bias.astype(dtype, copy=False)

        def inside(part: Problem, choice: Config) -> PackedKernel:
            return self.prepare_plain(part, weights, added, choice)

        if self._is_plain(problem):
            return inside(self._plain(problem), config)
        return _bands.prepare(problem, self.step(problem, config), config, inside)

    def step(self, problem: Problem, config: Config) -> int:  # noqa: ARG002
        """Return of how many rows of output a band should be a multiple."""
        return 1

    def rejects_plain(self, problem: Problem) -> str | None:  # noqa: ARG002  # the others look at it
        """Do as ``rejects`` for a plain problem."""
        return None

    @abstractmethod
    def configs_plain(self, problem: Problem, effort: Effort) -> Sequence[Config]:
        """Do as ``configs`` for a plain problem."""

    @abstractmethod
    def workspace_plain(self, problem: Problem, config: Config) -> int:
        """Do as ``workspace`` for a plain problem."""

    @abstractmethod
    def estimate_plain(self, problem: Problem, config: Config, machine: Machine) -> float:
        """Do as ``estimate`` for a plain problem."""

    @abstractmethod
    def prepare_plain(self, problem: Problem, filters: Array, bias: Array | None, config: Config) -> PackedKernel:
        """Do as ``prepare`` for a plain problem."""
