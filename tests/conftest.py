"""What every test may rely on: no profile but its own, no environment variables of ours, the built-in backends."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from quiet import QuietWatch

from convdispatch import on_miss, profile, registry, settings
from convdispatch.backends import _scratch, depthwise, inner_product, winograd_rows
from convdispatch.errors import BackendRejectedError
from convdispatch.tuning import busy, compile_ahead

# Derandomized, so that a run is the same run again; no deadline, since the first use of a dtype compiles.
hypothesis.settings.register_profile(
    "convdispatch",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.filter_too_much,
    ],
)
hypothesis.settings.register_profile(
    "thorough", parent=hypothesis.settings.get_profile("convdispatch"), derandomize=False, max_examples=200
)
hypothesis.settings.load_profile("convdispatch")  # unless --hypothesis-profile says otherwise


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Keep this machine's profiles and settings out of a test, and the test's out of the next one."""
    gc.freeze()  # what the compiler leaves behind is no garbage, and looking through it takes up to a second
    for variable in list(os.environ):
        if variable.startswith(settings.PREFIX):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("CONVDISPATCH_ISOLATION", "off")  # a child process takes a second; tests of isolation ask for it
    monkeypatch.setattr(profile, "user_path", lambda: tmp_path / "user" / "profile.yaml")
    monkeypatch.setattr(profile, "system_path", lambda: tmp_path / "system" / "profile.yaml")
    monkeypatch.setattr(compile_ahead, "_MOST_CHILDREN", 0)  # the tests themselves already take all cores
    monkeypatch.setattr(busy, "make_watch", QuietWatch)
    monkeypatch.setattr(on_miss, "_measured", set())
    settings.from_environment.cache_clear()
    profile.forget()
    yield
    profile.forget()
    registry.restore()
    settings.from_environment.cache_clear()


@pytest.fixture
def few_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have backends use few lengths of tiles: each is a kernel to compile, and tests of their own have the others."""
    monkeypatch.setattr(depthwise, "_LENGTHS", (7, 4, 1))
    monkeypatch.setattr(inner_product, "_SUMS", dict.fromkeys((16, 32), (8,)))
    monkeypatch.setattr(winograd_rows, "_TOGETHER", (3, 1))
    monkeypatch.setattr(winograd_rows, "_TOGETHER_IN_TURN", dict.fromkeys((16, 32), (4,)))

    def forget() -> None:
        for cached in (depthwise._tiling, winograd_rows._choices, winograd_rows._cut):
            cached.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def rooms_taken() -> Iterator[None]:
    """Have kernels find every room for scratch taken: what they work in is then allocated, and can be counted."""
    _scratch._taken[:, 0] = 1
    yield
    _scratch._taken[:, 0] = 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip a test of every backend, with the reason, where the backend rejects the problem that the test poses."""
    try:
        yield
    except BackendRejectedError as error:
        if "backend" not in getattr(item, "fixturenames", ()):
            raise
        pytest.skip(str(error))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Have Ctrl-C raise, as it does but in what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
