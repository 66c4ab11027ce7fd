"""A machine that nobody else uses."""

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
