"""The child process that compiles kernels for ``compile_ahead``, its parent; they are on disk when it has answered."""

import contextlib
from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from convdispatch import registry
from convdispatch.backend import Candidate, Config
from convdispatch.backends._jit import NotCompiledError, compiling_only
from convdispatch.errors import LONGEST_REASON, in_a_line
from convdispatch.plan import Plan
from convdispatch.problem import Problem, dtype_of
from convdispatch.tuning.child import requests


def need(problem: Problem, candidate: Candidate, kernels: Container[str]) -> None:
    """Make a plan, of whatever filters, while nothing may be compiled but these kernels.

    Raises:
        NotCompiledError: for the first other kernel that the plan lacks.
        Exception: whatever the backend raises.
    """
    filters = np.zeros(problem.filter_shape, dtype_of(problem.dtype))
    bias = np.zeros(problem.k, dtype_of(problem.result_dtype)) if problem.epilogue.bias else None
    with compiling_only(kernels):
        Plan(problem, candidate, filters, bias).complete()


def _compile(request: Mapping[str, Any]) -> None:
    """Compile what is asked for; of what else is lacking there, nothing: that is another request."""
    candidate = Candidate(registry.get(request["backend"]), Config(request["config"]))
    with contextlib.suppress(NotCompiledError):
        need(Problem.parse(request["problem"]), candidate, {request["kernel"]})


def main() -> None:
    """Say that it is ready, and answer requests until there are no more."""
    asked, reply = requests()
    reply({"ready": True})
    for request in asked:
        try:
            _compile(request)
        except Exception as error:  # noqa: BLE001  # whatever it was, the parent will meet it, too
            reply({"raised": in_a_line(f"{type(error).__name__}: {error}", LONGEST_REASON)})
        else:
            reply({"done": True})


if __name__ == "__main__":
    main()
