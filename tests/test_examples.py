"""The examples run as a reader would run them, and show what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import convdispatch

EXAMPLES = Path(__file__).parents[1] / "examples"
LINE = re.compile(r"(?P<bank>.{16}) [ *](?P<backend>\w+) +(?P<deviation>[0-9.]+e[+-]\d+) +(?P<ratio>[0-9.]+)x")


def run(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an example in a process of its own, whose profile and caches are in ``folder``."""
    package = str(Path(convdispatch.__file__).parents[1])
    known = {key: value for key, value in os.environ.items() if not key.startswith("CONVDISPATCH_")}
    environment = known | {"PYTHONPATH": package, "XDG_CACHE_HOME": str(folder), "MPLCONFIGDIR": str(folder)}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_quickstart(tmp_path: Path) -> None:
    done = run("quickstart.py", tmp_path)
    assert done.returncode == 0, done.stderr
    shape, deviation, *explanation = done.stdout.splitlines()
    assert shape.startswith("(1, 56, 56, 128) <plan 1x56x56x64 * 1x1x64x128 VALID +relu by ")
    assert float(deviation) < 1e-4
    assert any(line.split()[0] == "mine" for line in explanation)
    assert sum(line.startswith("* ") for line in explanation) == 1


@pytest.mark.slow
def test_photograph(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    image = pytest.importorskip("matplotlib.image")
    figure = tmp_path / "figure.png"
    done = run("photograph.py", tmp_path, "--size", "96", "--output", str(figure))
    assert done.returncode == 0, done.stderr
    rows = [match.groupdict() for match in map(LINE.match, done.stdout.splitlines()) if match]
    banks = {bank: [row for row in rows if row["bank"] == bank] for bank in dict.fromkeys(row["bank"] for row in rows)}
    assert [bank.split()[0] for bank in banks] == ["Sobel", "Gaussian", "motion", "Gabor"]
    for bank, table in banks.items():
        names = {row["backend"] for row in table}
        assert names >= {"direct", "im2col", "fft", "numba"}
        assert ("winograd" in names) == (bank.strip() == "Sobel 3x3")
        assert max(float(row["deviation"]) for row in table) < 1e-5
        ratios = [float(row["ratio"]) for row in table]
        assert ratios[0] == 1
        assert ratios == sorted(ratios)
    assert "winograd     cannot: filters are 31x31; it does sides" in done.stdout
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = np.asarray(image.imread(figure))[..., :3]
    height, width = pixels.shape[:2]
    assert min(height, width) > 500
    for row in (slice(0, height // 2), slice(height // 2, height)):
        for column in range(4):  # every panel shows something
            panel = pixels[row, column * width // 4 : (column + 1) * width // 4]
            assert panel.std() > 0.02


def test_photograph_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    done = run("photograph.py", tmp_path, "--photograph", "selfie")
    assert done.returncode == 2
    assert "chelsea" in done.stderr
    assert not list(tmp_path.glob("*.png"))
