"""One layer of a workload in one deployment: on what terms it is tuned, and what became of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from convdispatch.backend import Backend, Effort
from convdispatch.errors import BackendError
from convdispatch.profile import Entry, Key
from convdispatch.profile_file import Found
from convdispatch.tuning import problem_race
from convdispatch.tuning.entrants import chosen_backends
from convdispatch.tuning.rematch import suffices
from convdispatch.tuning.workload import Layer

Status = Literal["tuned", "known", "trivial", "left", "failed"]


@dataclass(frozen=True)
class Terms:
    """On what terms a layer is tuned; they may be sent to another machine.

    Attributes:
        effort: how hard to look.
        backends: names of who takes part, all where None.
        retune: whether to measure again what is known.
        again: names of backends that came out of quarantine, which are measured again where they failed.
    """

    effort: Effort
    backends: Sequence[str] | None = None
    retune: bool = False
    again: Sequence[str] = ()

    def chosen(self) -> dict[str, Backend]:
        """Return the backends that take part."""
        return chosen_backends(self.backends)

    def are_met(self, found: Found | None) -> bool:
        """Return whether what is known is for just the key that is asked of, and nothing is to be measured anew."""
        if self.retune or found is None or not found.exact or found.entry.is_busy or self.has_failed(found.entry):
            return False
        return suffices(found.entry, self.effort, self.chosen())

    def has_failed(self, entry: Entry) -> bool:
        """Return whether one of the backends that are to be tried again failed in an entry."""
        return any(failure.backend in self.again for failure in entry.failures)


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer and deployment of a workload.

    Attributes:
        layer: the layer.
        deployment: ``"plan"`` or ``"call"``.
        status: ``"tuned"`` now, ``"known"`` from the profile, ``"trivial"`` where there is nothing to compute,
            ``"left"`` when time ran out, or ``"failed"``.
        entry: the measurements, where there are any.
        left_out: candidates not measured, since they were estimated hopelessly slow.
        reason: why it failed.
        busy: what said that others used the machine meanwhile; the entry is flagged then.
    """

    layer: Layer
    deployment: str
    status: Status
    entry: Entry | None = None
    left_out: tuple[str, ...] = ()
    reason: str = ""
    busy: tuple[str, ...] = ()


def measure(
    layer: Layer,
    key: Key,
    terms: Terms,
    seconds: float | None,
    found: Found | None,
    *,
    ready: Callable[[], None] = lambda: None,
) -> LayerReport:
    """Measure a layer unless what is known of it suffices or no time is left; no entry is written anywhere.

    Args:
        layer, key: what to measure.
        terms: how.
        seconds: most time the race may take, if any.
        found: what is known of it, here or from a machine much like this one.
        ready: called before something is measured; it may refuse by raising.
    """
    known = found.entry if found is not None else None
    if key.problem.is_trivial:
        return LayerReport(layer, key.deployment, "trivial")
    if terms.are_met(found):
        return LayerReport(layer, key.deployment, "known", known)
    if seconds is not None and seconds <= 0:
        return LayerReport(layer, key.deployment, "left", known)
    ready()
    anew = terms.retune or (known is not None and terms.has_failed(known))
    try:
        outcome = problem_race.tune_problem(
            key, effort=terms.effort, seconds=seconds, backends=terms.chosen(), incumbent=known, sparing=not anew
        )
    except BackendError as error:
        return LayerReport(layer, key.deployment, "failed", known, reason=str(error))
    return LayerReport(layer, key.deployment, "tuned", outcome.entry, outcome.left_out, busy=outcome.busy)
