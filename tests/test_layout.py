"""The shape of the code: floors, packaging, what an import loads, and the static checks."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import convdispatch

ROOT = Path(__file__).parent.parent
#: Floor of each module, from the ground up; a module imports only from its own floor or below.
FLOORS = {
    "errors": 0, "locks": 0, "machine": 0, "settings": 0, "safe_yaml": 0, "safe_file": 0, "fingerprint": 0,
    "observe": 0, "units": 0, "times": 0, "interruption": 0, "said": 0, "hashed": 0,
    "epilogue": 1, "problem": 1, "arguments": 1, "memory": 1,
    "backend": 2, "reference": 2, "separation": 2,
    "registry": 3, "profile_text": 3, "profile_file": 3, "profile": 3, "quarantine": 3,
    "backends": 4,
    "calibration": 4, "neighbours": 4, "profile_tools": 4, "profile_doctor": 4,
    "plan": 5, "heuristic": 5, "transfer": 5, "question": 5, "stored": 5,
    "tuning": 6, "configs": 6,
    "on_miss": 7, "dispatch": 7, "explain": 7,
    "api": 8, "cli": 8, "cli_bench": 8, "cli_profile": 8, "cli_validate": 8, "exit_codes": 8, "terminal": 8,
    "report": 8, "__init__": 8, "__main__": 8,
}  # fmt: skip


def _room(path: Path) -> str:
    return path.stem if path.parent.name == "convdispatch" else path.parent.name


def _modules() -> list[Path]:
    folders = ("convdispatch", "backends", "tuning", "configs")
    return sorted(path for folder in folders for path in (ROOT / folder).glob("*.py"))


def _imports(path: Path) -> set[str]:
    """Return the rooms of convdispatch that a file imports, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "convdispatch":
                names = [f"convdispatch.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("convdispatch.")}
    return rooms


@pytest.mark.parametrize("path", _modules(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_module_imports_only_from_its_floor_or_below(path: Path) -> None:
    floor = FLOORS[_room(path)]
    if path == ROOT / "backends" / "__init__.py":
        return  # being a function that lists the backends, it asks the registry when called
    above = {room for room in _imports(path) if FLOORS.get(room, 0) > floor}
    assert not above


def test_backends_know_nothing_of_registry_and_profile() -> None:
    for path in (ROOT / "backends").glob("*.py"):
        if path.name != "__init__.py":
            assert not _imports(path) & {"registry", "profile"}, path


def _module(path: Path) -> str:
    package = "convdispatch" if path.parent.name == "convdispatch" else f"convdispatch.{path.parent.name}"
    return package if path.stem == "__init__" else f"{package}.{path.stem}"


def _loaded(node: ast.AST) -> Iterator[str]:
    """Yield the modules that some code imports, anywhere in it, but for types alone."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _loaded(child)


def test_modules_do_not_import_each_other_in_circles() -> None:
    names = {_module(path): path for path in _modules()}
    packages = {name for name, path in names.items() if path.stem == "__init__"}  # each module's imports name its own
    graph = {name: set(_loaded(ast.parse(path.read_text()))) & names.keys() - packages for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_package_folder_is_packaged() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = ("convdispatch", "backends", "tuning", "configs")
    found = {path.parent.relative_to(ROOT).parts for folder in folders for path in (ROOT / folder).rglob("__init__.py")}
    names = {".".join(parts if parts[0] == "convdispatch" else ("convdispatch", *parts)) for parts in found}
    assert set(listed) == names


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == convdispatch.__version__
    assert f"## {convdispatch.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_all_is_sorted_and_true() -> None:
    assert convdispatch.__all__ == sorted(convdispatch.__all__)
    for name in convdispatch.__all__:
        assert getattr(convdispatch, name) is not None


def test_import_loads_neither_numba_nor_scipy() -> None:
    code = "import sys, convdispatch; print([m for m in ('numba', 'scipy', 'yaml', 'llvmlite') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_dependency_is_explained_in_the_readme() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme = (ROOT / "README.md").read_text()
    for requirement in project["dependencies"]:
        name = re.split(r"[<>=\[ ]", requirement)[0]
        assert f"| {name} |" in readme, name


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache", "."],
        ["ruff", "format", "--no-cache", "--check", "."],
        ["mypy"],
    ],
    ids=["ruff-check", "ruff-format", "mypy-strict"],
)
def test_static_checks_are_clean(command: list[str]) -> None:
    if command[0] == "mypy":
        command = [*command, "--cache-dir", os.devnull]
    pytest.importorskip(command[0])
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
