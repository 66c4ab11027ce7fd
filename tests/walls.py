"""Runs a kernel between walls: whoever reads outside the input finds NaN, or 85, whoever writes outside is found."""

import pickle

import numpy as np
from strategies import Case, from_format, judge, numbers, to_format

from convdispatch.arguments import Array
from convdispatch.backend import Backend, Config
from convdispatch.problem import Problem, dtype_of


def run(backend: Backend, case: Case, config: Config, *, pickled: bool = False) -> Array:
    """Convolve a case, by a kernel that was pickled if so asked for, and look at the walls; return it as laid out."""
    p = case.problem
    walled = np.full(case.x.size + 256, 85 if p.is_integer else np.nan, case.x.dtype)
    x = walled[128:-128].reshape(p.input_shape)
    x[...] = to_format(p, case.x)
    around = np.full(int(np.prod(p.output_shape)) + 256, 77, dtype_of(p.result_dtype))
    out = around[128:-128].reshape(p.output_shape)
    kernel = backend.prepare(p, case.w, case.bias, config)
    residual = None if case.residual is None else to_format(p, case.residual)
    spoiled = (pickle.loads(pickle.dumps(kernel)) if pickled else kernel)(x, out, residual)
    assert not spoiled  # who mixes windows says so where sums are not finite
    assert (around[:128] == 77).all()
    assert (around[-128:] == 77).all()
    return out


def check(backend: Backend, problem: Problem, config: Config, seed: int = 0) -> Array:
    """Run a problem with random numbers, and hold the result against the reference."""
    case = numbers(problem, seed)
    out = run(backend, case, config)
    y = from_format(problem, out)
    verdict = judge(problem, backend.numerics, config, case.x, case.w, y, case.bias, case.residual)
    assert verdict.reason is None, f"{problem} {config}: {verdict.reason}"
    return out


def check_bits(backend: Backend, problem: Problem, config: Config, expected: bytes) -> None:
    """See that a config gives these bits, on one thread and on more, and so does a kernel that was pickled."""
    for threads in (1, 2, 5):
        assert check(backend, problem, Config(config, threads=threads)).tobytes() == expected
    assert run(backend, numbers(problem), config, pickled=True).tobytes() == expected
