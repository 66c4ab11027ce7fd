"""2-D convolution on CPUs that knows, by measurement, which of many right algorithms is fastest here.

>>> import numpy as np, convdispatch
>>> x = np.ones((1, 8, 8, 3), np.float32)
>>> w = np.ones((3, 3, 3, 4), np.float32)
>>> convdispatch.conv2d(x, w, padding="SAME").shape
(1, 8, 8, 4)
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from convdispatch import interruption as _interruption  # noqa: F401  # first of all: see there
from convdispatch.api import conv2d, plan
from convdispatch.arguments import Array
from convdispatch.backend import Backend, Candidate, Config, Effort, Kernel, Numerics
from convdispatch.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    BackendRejectedError,
    BackendUnavailableError,
    BusyMachineError,
    ClusterError,
    ConvDispatchError,
    ConvDispatchWarning,
    ProfileError,
    ProfileMissError,
    ProfileWarning,
    RegistrationError,
    UnknownBackendError,
    WorkloadError,
)
from convdispatch.explain import Explanation, explain
from convdispatch.machine import Machine
from convdispatch.plan import Plan
from convdispatch.problem import Problem
from convdispatch.registry import register, unregister
from convdispatch.settings import options

if TYPE_CHECKING:
    from convdispatch.tuning.record import record
    from convdispatch.tuning.tuner import tune

    def backends() -> tuple[str, ...]:
        """Return the names of all backends: built in, installed and registered."""


__version__ = "0.1.0"
__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "Array",
    "Backend",
    "BackendError",
    "BackendRejectedError",
    "BackendUnavailableError",
    "BusyMachineError",
    "Candidate",
    "ClusterError",
    "Config",
    "ConvDispatchError",
    "ConvDispatchWarning",
    "Effort",
    "Explanation",
    "Kernel",
    "Machine",
    "Numerics",
    "Plan",
    "Problem",
    "ProfileError",
    "ProfileMissError",
    "ProfileWarning",
    "RegistrationError",
    "UnknownBackendError",
    "WorkloadError",
    "backends",
    "conv2d",
    "explain",
    "options",
    "plan",
    "record",
    "register",
    "tune",
    "unregister",
]


def __getattr__(name: str) -> Any:
    # The package of backends is also the function that lists them; the tuner is loaded by who tunes.
    if name == "backends":
        return importlib.import_module("convdispatch.backends")
    if name == "tune":
        return importlib.import_module("convdispatch.tuning.tuner").tune
    if name == "record":
        return importlib.import_module("convdispatch.tuning.record").record
    raise AttributeError(f"module 'convdispatch' has no attribute {name!r}")


if os.environ.get("CONVDISPATCH_RECORD"):  # a program records from its first call on
    importlib.import_module("convdispatch.tuning.record").record_program()
