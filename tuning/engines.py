"""What an engine is that convdispatch is compared with, and which there are; each has a file of its own.

An engine offers one or several deployments of a problem: ways to run it, each with constant weights packed, and
with the input in the layout it likes best, from a cache line on as engines' own memory is, both prepared outside the
clock. The worker times them all and keeps the fastest, so that no engine is judged by a way in which nobody would run
it. Padding that an engine cannot express is a call of its own, inside the clock.

Modules are loaded by name, since any of them may be missing; the error is the reason that the report gives.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from convdispatch.arguments import Array
from convdispatch.epilogue import Epilogue
from convdispatch.memory import aligned
from convdispatch.problem import Problem
from convdispatch.separation import factors
from convdispatch.tuning.gate import Trial

OWN = "convdispatch"


@dataclass(frozen=True)
class Pass:
    """One of the convolutions that make up a case.

    Attributes:
        problem: what to compute; only the last pass has an epilogue.
        w: ``[KH, KW, C // groups, K]``.
    """

    problem: Problem
    w: Array

    @property
    def oihw(self) -> Array:
        """The filters as ``[K, C // groups, KH, KW]``."""
        return np.ascontiguousarray(self.w.transpose(3, 2, 0, 1))


@dataclass(frozen=True)
class Case:
    """A problem with its numbers, the same for every engine.

    Attributes:
        problem: what to compute.
        x: ``[N, H, W, C]``.
        w: ``[KH, KW, C // groups, K]``.
        bias: ``[K]`` or None.
        residual: ``[N, OH, OW, K]`` or None.
    """

    problem: Problem
    x: Array
    w: Array
    bias: Array | None
    residual: Array | None

    @classmethod
    def of(cls, problem: Problem) -> "Case":
        """Draw a problem's numbers."""
        trial = Trial.random(problem.replace(data_format="NHWC"))
        residual = None if trial.residual is None else _at_a_line(trial.residual)
        return cls(problem, _at_a_line(trial.input), trial.filters, trial.bias, residual)

    @property
    def whole(self) -> Pass:
        """The convolution as it is."""
        return Pass(self.problem, self.w)

    @functools.cached_property
    def two(self) -> tuple[Pass, Pass] | None:
        """The pass down the filters' columns and the one along their rows, where filters are known to be separable."""
        p = self.problem
        pair = factors(p, self.w) if p.separable else None
        if pair is None:
            return None
        (top, bottom, left, right), (sh, sw), (dh, dw) = p.pads, p.strides, p.dilations
        down, along = (np.repeat(values.T, p.k // len(values), axis=1) for values in pair)
        first = p.replace(kw=1, pads=(top, bottom, 0, 0), strides=(sh, 1), dilations=(dh, 1), epilogue=Epilogue())
        second = first.replace(
            h=first.oh, c=p.k, groups=p.k, kh=1, kw=p.kw, pads=(0, 0, left, right), strides=(1, sw),
            dilations=(1, dw), epilogue=p.epilogue,
        )  # fmt: skip
        return Pass(first, down[:, None, None]), Pass(second, along[None, :, None])

    @property
    def ways(self) -> Mapping[str, tuple[Pass, ...]]:
        """In how many passes it can be done, by what is added to a deployment's name."""
        whole: dict[str, tuple[Pass, ...]] = {"": (self.whole,)}
        return whole | ({", two passes": self.two} if self.two else {})


@dataclass(frozen=True)
class Deployment:
    """One way to run a problem.

    Attributes:
        run: what is timed.
        result: makes ``[N, OH, OW, K]`` of what ``run`` returned.
        holds: what the engine reads without owning it.
    """

    run: Callable[[], Any]
    result: Callable[[Any], Array]
    holds: object = None


Build = Callable[[], Deployment]


class Engine(Protocol):
    """An engine, made in its own process with its thread count."""

    version: str

    def rejects(self, problem: Problem) -> str | None:
        """Return why it cannot do a problem, or None."""

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return the ways to run a case; a build that raises is passed over."""


def load(name: str) -> Any:
    """Import a module that may not be there, as something without known types."""
    return importlib.import_module(name)


def _at_a_line(array: Array) -> Array:
    """Return a contiguous copy that begins at a cache line, as what another call has made does."""
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def nchw(array: Array) -> Array:
    """Return an NHWC array as a contiguous NCHW one."""
    return _at_a_line(array.transpose(0, 3, 1, 2))


def nhwc(array: Array) -> Array:
    """Return an NCHW array as an NHWC view."""
    return np.asarray(array).transpose(0, 2, 3, 1)


def only(problem: Problem, *dtypes: str) -> str | None:
    """Return why a problem of another dtype is not compared, or None."""
    return None if problem.dtype in dtypes else f"compared in {' and '.join(dtypes)} only, not {problem.dtype}"


class ConvDispatch:
    """A plan, as its user makes it: NHWC (or what the problem says), filters packed, ``out`` given."""

    def __init__(self, threads: int) -> None:
        del threads  # the environment of the worker has it, and the profile
        self._module: Any = load("convdispatch")
        self.version = self._module.__version__

    def rejects(self, problem: Problem) -> str | None:
        """Take everything."""
        del problem
        return None

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return the plan that the profile or the estimate chooses."""
        p = case.problem
        planes = p.data_format == "NCHW"
        x, residual = (None if a is None else (nchw(a) if planes else a) for a in (case.x, case.residual))
        activation = ("leaky_relu", p.epilogue.slope) if p.epilogue.slope else p.epilogue.activation
        plan = self._module.plan(
            x, case.w, p.strides, ((p.pads[0], p.pads[1]), (p.pads[2], p.pads[3])), p.data_format, p.dilations,
            groups=p.groups, bias=case.bias, activation=activation, residual=residual is not None,
        )  # fmt: skip
        out = plan(x, residual=residual)
        out.fill(7)  # nothing of the first call is to pass for the next one's
        run = functools.partial(plan, x, out=out, **({} if residual is None else {"residual": residual}))
        return {f"{plan.candidate.name}, {plan.evidence}": lambda: Deployment(run, nhwc if planes else np.asarray)}


_HERE = "convdispatch.tuning.engine_"
#: The peers and where they are, in the order in which tables have them.
PEERS: Mapping[str, str] = {
    "torch": f"{_HERE}torch:Torch",
    "onnxruntime": f"{_HERE}onnx:OnnxRuntime",
    "openvino": f"{_HERE}openvino:OpenVino",
    "xnnpack": f"{_HERE}xnnpack:XnnPack",
    "opencv": f"{_HERE}opencv:OpenCV",
    "scipy": f"{_HERE}scipy:SciPy",
}


def make(name: str, threads: int) -> Engine:
    """Return an engine by its name, or by ``module:class`` for one's own.

    Raises:
        ImportError: if what it needs is not installed.
    """
    if name == OWN:
        return ConvDispatch(threads)
    module, _, attribute = (name if ":" in name else PEERS[name]).partition(":")
    engine: Engine = getattr(load(module), attribute)(threads)
    return engine
