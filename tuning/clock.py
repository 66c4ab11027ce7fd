"""Time, as something that can be replaced: tests race scripted candidates against a clock that they move."""

import time
from typing import Protocol


class Clock(Protocol):
    """Tells seconds from some fixed moment, never backwards."""

    def __call__(self) -> float:
        """Return the time now in seconds."""
        ...


system_clock: Clock = time.perf_counter
