"""The wheel: built, installed in an empty virtual environment, and used from there."""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("build")
pytest.importorskip("setuptools")


def _run(*command: str | Path, **more: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and the wheel made from it; the tree itself stays clean."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    tracked = ("pyproject.toml", "README.md", "LICENSE", "convdispatch", "backends", "tuning", "configs")
    source.mkdir()
    for name in tracked:
        _run("cp", "-a", ROOT / name, source / name)
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    return folder


def test_sdist_holds_the_folders_and_wheel_holds_the_packages(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"backends/direct.py", "tuning/race.py", "configs/resnet50.yaml", "LICENSE"} <= files
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {"convdispatch/backends/direct.py", "convdispatch/configs/resnet50.yaml", "convdispatch/py.typed"} <= names
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"convdispatch"}


@pytest.mark.slow
def test_wheel_tunes_from_an_empty_environment(built: Path, tmp_path: Path) -> None:
    wheel = next(built.glob("*.whl"))
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    _run(scripts / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "CONVDISPATCH_"))}
    profile = tmp_path / "profile.yaml"
    work = tmp_path / "elsewhere"
    work.mkdir()
    environment["CONVDISPATCH_FORBID"] = "numba,image_rows,implicit_gemm"  # each takes seconds to compile
    problem = "1x16x16x8 * 3x3x8x8 SAME"
    printed = _run(
        scripts / "convdispatch", "tune", problem, "--profile", profile, "--deployment", "plan", "--json",
        "--allow-busy", cwd=work, env=environment,
    )  # fmt: skip
    report = json.loads(printed)
    assert report["complete"]
    assert set(report["layers"][0]["backends"]) >= {"direct", "winograd"}
    assert problem in profile.read_text()
    again = _run(scripts / "convdispatch", "explain", problem, "--profile", profile, cwd=work, env=environment)
    assert "project profile" in again
    words = [str(scripts / "python"), "-c", "import backends"]
    leak = subprocess.run(words, capture_output=True, check=False, cwd=work, env=environment)
    assert leak.returncode != 0
