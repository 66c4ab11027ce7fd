"""What a call takes besides its arrays: bounded, and not more than it says."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import convdispatch
from convdispatch import dispatch, heuristic, settings
from convdispatch.problem import Problem

MIB = 1 << 20
LARGE = Problem.parse("1x4096x4096x3 * 3x3x3x64 SAME")

#: Peak memory of a call over what was taken before it, its workspace as told, and the page size's slack.
_PEAK = """
import json, resource, sys
import numpy as np
import convdispatch
height, backend = int(sys.argv[1]), sys.argv[2]
w = np.ones([int(length) for length in sys.argv[3].split("x")], "f4")
small = convdispatch.plan((1, 64, 64, 3), w, padding="SAME", backend=backend)
small(np.ones((1, 64, 64, 3), "f4"))  # threads, compiled code
x, y = np.ones((1, height, 1024, 3), "f4"), np.ones((1, height, 1024, w.shape[3]), "f4")
plan = convdispatch.plan(x, w, padding="SAME", backend=backend)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan(x, out=y)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([(after - before) * 1024, plan.workspace]))
"""


@pytest.mark.parametrize("variant", [LARGE, LARGE.replace(data_format="NCHW"), LARGE.replace(dtype="float16")])
def test_a_large_image_is_chosen_for_within_64_mebibytes(variant: Problem) -> None:
    with settings.options(threads=2):
        chosen = dispatch.decide(variant, "plan").candidate
        assert chosen.workspace(variant) <= 64 * MIB, chosen


def test_with_a_limit_the_estimate_finds_somebody() -> None:
    with settings.options(threads=2, memory_limit="8MiB"):
        assert dispatch.decide(LARGE, "plan").candidate.workspace(LARGE) <= 8 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told in other units, or not at all")
@pytest.mark.parametrize(
    ("backend", "filters"),
    [
        *((backend, "3x3x3x64") for backend in ("implicit_gemm", "winograd", "im2col", "fft", "numba")),
        ("fast_fir", "9x9x3x16"),
        ("image_rows", "9x9x3x16"),
    ],
)
def test_no_call_takes_more_than_it_says(backend: str, filters: str) -> None:
    fit, _ = heuristic.usable(Problem.parse(f"1x512x1024x3 * {filters} SAME"), settings.current())
    assert backend in fit
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, "512", backend, filters], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent.parent, timeout=120,
    )  # fmt: skip
    peak, told = json.loads(done.stdout)
    assert peak <= told + 16 * MIB


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("backend", ["direct", "im2col"])
def test_the_copies_that_a_plan_makes_around_its_kernel_are_counted(backend: str, data_format: str, dtype: str) -> None:
    shape = (1, 64, 128, 64) if data_format == "NCHW" else (1, 128, 64, 64)
    x = np.ones(shape, dtype)
    w = np.ones((1, 1, x.shape[data_format.index("C")], 64), dtype)
    plan = convdispatch.plan(
        x, w, data_format=data_format, residual=True, backend=(backend, {"threads": 1} if backend == "im2col" else {})
    )
    out = np.empty(plan.problem.output_shape, dtype)
    residual = np.ones_like(out)
    plan(x, out=out, residual=residual)
    tracemalloc.start()
    plan(x, out=out, residual=residual)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.workspace - MIB // 4 <= peak <= plan.workspace + MIB // 4
