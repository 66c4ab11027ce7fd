"""What ``dispatch`` is asked, and what it answers."""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

from convdispatch import heuristic, machine, settings
from convdispatch.backend import Candidate, Config
from convdispatch.errors import ArgumentError, ArgumentTypeError, shown
from convdispatch.plan import Evidence
from convdispatch.problem import Problem
from convdispatch.profile import Key
from convdispatch.profile_file import Found
from convdispatch.settings import Options

#: Whom a caller insists on: a backend's name, with a config or None.
Forced = tuple[str, Config | None] | None


@dataclass(frozen=True)
class Question:
    """Who is to compute a problem.

    Attributes:
        problem: what is to be computed.
        deployment: ``"plan"`` or ``"call"``.
        options: what the choice may be.
    """

    problem: Problem
    deployment: str
    options: Options

    @functools.cached_property
    def key(self) -> Key:
        """The profile's key for it on this machine."""
        return Key(self.problem, self.deployment, self.threads, machine.current().id)

    @property
    def threads(self) -> int:
        """The most threads that a call may use."""
        return heuristic.thread_budget(self.options)

    def under(self, **changes: Any) -> "Question":
        """Return the same question under other options."""
        return replace(self, options=replace(self.options, **changes))

    def for_any_filters(self) -> "Question":
        """Return the same question of filters that need not be separable."""
        return replace(self, problem=self.problem.replace(separable=False))


@dataclass(frozen=True)
class Decision:
    """What was chosen for a problem, and why.

    Attributes:
        candidate: what was chosen.
        evidence: why.
        found: which of the profiles' answers says so, if one does.
        seconds: how long a call took there, or takes by the estimate; NaN where neither says.
    """

    candidate: Candidate
    evidence: Evidence
    found: Found | None = None
    seconds: float = math.nan


def parse_forced(backend: Any) -> Forced:
    """Return what ``backend=`` asks for: a name, or a name with a config.

    Raises:
        ArgumentTypeError: if it is neither.
    """
    if backend is None:
        return None
    if isinstance(backend, str):
        return backend, None
    if isinstance(backend, tuple | list) and len(backend) == 2 and isinstance(backend[0], str):
        try:
            config = Config(backend[1])
        except ArgumentError:
            raise  # it says which value would not do
        except (TypeError, ValueError):
            pass
        else:
            settings.parse_threads(config.get("threads"))
            return backend[0], config
    raise ArgumentTypeError(f"backend must be a name, or (name, {{config}}); got {shown(backend)}")
