"""Watches of a machine that nobody else uses, and of one that others do."""

from typing import ClassVar

from convdispatch.tuning.busy import Ticks, Watch


class QuietWatch(Watch):
    """Sees a machine that nobody else uses, in no time: tests run on busy ones."""

    time: ClassVar[list[float]] = [0.0]  # of all watches

    def loop(self) -> tuple[float, float]:
        return 1.0, 1.0

    def together(self) -> float:
        return 1.0

    def ticks(self) -> Ticks | None:
        return None

    def tasks(self) -> float | None:
        return None

    def pause(self, seconds: float) -> None:
        self.time[0] += seconds

    def now(self) -> float:
        return self.time[0]


class BusyWatch(QuietWatch):
    """Sees a loop that has to wait for a core."""

    def loop(self) -> tuple[float, float]:
        return 1.0, 0.5
