"""The example distribution: built, installed in a folder, found by its entry point, right, and in the race."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import convdispatch

SOURCE = Path(__file__).parents[1] / "examples" / "plugin"

# Runs where the plugin is installed, and prints what it saw.
SEEN = """
import json, pickle, sys
import numpy as np
import convdispatch
from convdispatch import reference
from convdispatch.problem import Problem
from convdispatch.tuning.gate import Trial

seen = {"names": convdispatch.backends(), "imported early": "convdispatch_shift" in sys.modules}

def verdict(text, config):
    problem = Problem.parse(text)
    trial = Trial.random(problem)
    plan = convdispatch.plan(
        problem.input_shape, trial.filters, problem.strides, (problem.pads[:2], problem.pads[2:]),
        problem.data_format, problem.dilations, groups=problem.groups, bias=trial.bias,
        activation=problem.epilogue.activation, residual=problem.epilogue.residual, backend=("shift", config),
    )
    plan = pickle.loads(pickle.dumps(plan))
    assert plan.problem == problem
    assert plan.candidate.backend.name == "shift"
    assert plan.workspace > 0
    return trial.judge(plan.candidate, plan(trial.input, residual=trial.residual)).reason

seen["verdicts"] = {
    f"{text} {config}": verdict(text, config) for text in json.loads(sys.argv[1]) for config in ({}, {"strip_kib": 1})
}

x = np.ones((1, 12, 12, 1), np.float32)
x[0, 3, 4] = np.inf
w = np.zeros((3, 3, 1, 1), np.float32)
y = convdispatch.conv2d(x, w, backend="shift")
seen["spoiled"] = np.argwhere(~np.isfinite(y[0, :, :, 0])).tolist()

for case, call in {
    "too many": lambda: convdispatch.plan((1, 8, 8, 64), np.ones((3, 3, 64, 64), np.float32), backend="shift"),
    "bad config": lambda: convdispatch.conv2d(x, w, backend=("shift", {"strip_kib": 0})),
}.items():
    try:
        call()
    except convdispatch.ConvDispatchError as error:
        seen[case] = f"{type(error).__name__}: {error}"

problem = Problem.parse("1x48x48x1 * 5x5x1x1 SAME")
rivals = ("shift", "im2col", "fft")
how = {"effort": "patient", "threads": 1, "allow_busy": True}
report = convdispatch.tune(problem, deployments=("plan",), backends=rivals, **how)
entry = report.layers[0].entry
seen["raced"] = [[result.name, result.rounds, result.median, result.error] for result in entry.results]
seen["failures"] = [failure.reason for failure in entry.failures]
seen["profile"] = report.profile.read_text("utf-8")
with convdispatch.options(threads=1):
    explanation = convdispatch.explain(problem.input_shape, problem.filter_shape)
seen["row"] = [[row.candidate, row.median] for row in explanation.rows if row.backend == "shift"]
seen["chosen"] = [explanation.chosen, entry.winner.name, explanation.evidence.source]
refused = convdispatch.explain((1, 8, 8, 64), (3, 3, 64, 64))
seen["refused"] = [[row.candidate, row.reason] for row in refused.rows if row.backend == "shift"]
print(json.dumps(seen))
"""

PROBLEMS = [
    "1x8x9x1 * 3x3x1x1 SAME",
    "2x9x7x4 * 3x2x2x6 SAME stride=2 dilation=1x2",
    "1x6x7x7 NCHW * 3x3x1x6 pad=2,0,1,3 +bias +residual +relu",
    "1x9x9x2 * 3x3x2x3 VALID int8",
    "1x9x9x2 * 3x3x2x3 VALID int64",
    "1x2x9x9 NCHW * 3x3x2x3 SAME_LOWER float16",
    "1x9x9x2 * 5x5x2x3 SAME float64 stride=3x1",
    "1x300x400x3 * 7x7x1x3 SAME",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the distribution is installed in: built from a copy, so that the tree stays clean."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(folder / "source")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    zipfile.ZipFile(wheel).extractall(target)  # what installing a wheel of pure Python is
    return target


@pytest.fixture(scope="module")
def seen(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    package = Path(convdispatch.__file__).parents[1]
    known = {key: value for key, value in os.environ.items() if not key.startswith("CONVDISPATCH_")}
    environment = known | {
        "PYTHONPATH": os.pathsep.join([str(installed), str(package)]),
        "XDG_CACHE_HOME": str(home),
        "CONVDISPATCH_PROFILE": str(home / "profile.yaml"),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SEEN, json.dumps(PROBLEMS)],
        cwd=home, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_wheel_holds_one_module_and_its_entry_point(installed: Path) -> None:
    assert [path.name for path in installed.glob("*.py")] == ["convdispatch_shift.py"]
    (points,) = installed.glob("*.dist-info/entry_points.txt")
    assert points.read_text("utf-8").split() == ["[convdispatch.backends]", "shift", "=", "convdispatch_shift:Shift"]


def test_is_found_by_name_before_it_is_imported(seen: dict[str, Any]) -> None:
    assert "shift" in seen["names"]
    assert {"direct", "im2col", "fft", "winograd", "numba"} < set(seen["names"])
    assert not seen["imported early"]


def test_is_right_when_asked_for_by_name(seen: dict[str, Any]) -> None:
    assert len(seen["verdicts"]) == 2 * len(PROBLEMS)
    assert {text: reason for text, reason in seen["verdicts"].items() if reason is not None} == {}


def test_keeps_infinity_inside_its_field(seen: dict[str, Any]) -> None:
    assert seen["spoiled"] == [[row, column] for row in (2, 3, 4) for column in (3, 4, 5)]


def test_says_why_not(seen: dict[str, Any]) -> None:
    assert seen["too many"].startswith("BackendRejectedError: backend 'shift' cannot do 1x8x8x64 * 3x3x64x64 SAME: ")
    assert "64 channels x 64 filters" in seen["too many"]
    assert seen["bad config"] == "ArgumentError: config strip_kib of shift must be at least 1; got 0"
    ((candidate, reason),) = seen["refused"]
    assert candidate is None
    assert "64 channels x 64 filters" in reason


def test_competes_in_tuning(seen: dict[str, Any]) -> None:
    assert seen["failures"] == []
    raced = {name: numbers for name, *numbers in seen["raced"]}
    assert {name.partition("(")[0] for name in raced} == {"shift", "im2col", "fft"}
    own = [numbers for name, numbers in raced.items() if name.startswith("shift(")]
    assert all(rounds >= 1 and median > 0 and error < 1e-6 for rounds, median, error in own)
    assert "shift" in seen["profile"]


def test_is_explained_by_its_measurement(seen: dict[str, Any]) -> None:
    ((candidate, median),) = seen["row"]
    assert candidate.startswith("shift(strip_kib=")
    medians = {name: numbers[1] for name, *numbers in seen["raced"]}
    assert median == pytest.approx(medians[candidate], rel=1e-3)  # a profile keeps a few digits
    chosen, winner, source = seen["chosen"]
    assert chosen == winner
    assert source == "profile"
