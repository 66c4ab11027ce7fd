"""Who must race when a problem was measured before: nobody, or the old winner against those who are new.

An old entry settles most of the question. Where it was measured on this very machine, only backends that it does
not know in their present version are open. Where it was measured on a machine much like this one (other library
versions, say), who lost by measurement there is taken to lose here; its winner must show that it still wins, against
the estimate's own pick too, so that a tuned choice is never worse than an untuned one.
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace

from convdispatch import quarantine, registry
from convdispatch.backend import Backend, Candidate, Effort
from convdispatch.profile import Entry, Failure, Key, Result
from convdispatch.settings import EFFORTS
from convdispatch.tuning.entrants import entrants_of


def known_versions(entry: Entry) -> dict[str, int]:
    """Return the backends that an entry says something of, each with the version it was when measured.

    Of who failed by going into quarantine it says nothing any more when that has been lifted.
    """
    rows: tuple[Result | Failure, ...] = (*entry.results, *(row for row in entry.failures if not _is_lifted(row)))
    return dict(entry.lost_before) | {row.backend: row.version for row in rows}


def _is_lifted(failure: Failure) -> bool:
    if not failure.reason.startswith(quarantine.FAILED):
        return False
    backend = registry.available().get(failure.backend)
    return backend is not None and quarantine.of(backend) is None


def still_there(entry: Entry | None) -> list[Candidate]:
    """Return an old entry's candidates whose backends are as they were when measured, the best first."""
    now = registry.available()
    return [
        Candidate(now[row.backend], row.config)
        for row in (entry.results if entry else ())
        if row.backend in now and now[row.backend].version == row.version and not quarantine.of(now[row.backend])
    ]


def suffices(entry: Entry, effort: Effort, backends: dict[str, Backend]) -> bool:
    """Return whether an old entry answers the question: same effort or higher, every backend as it is now."""
    if EFFORTS.index(entry.effort) < EFFORTS.index(effort):
        return False
    winner = registry.available().get(entry.winner.backend)
    if winner is None or winner.version != entry.winner.version:
        return False
    versions = known_versions(entry)
    return all(
        versions.get(name, backend.version) == backend.version
        and (name in versions or not _would_race(backend, entry.key, effort))
        for name, backend in backends.items()
    ) and any(row.backend in backends for row in entry.results)


def _would_race(backend: Backend, key: Key, effort: Effort) -> bool:
    """Return whether a backend that an entry does not know would be measured for its problem."""
    raced = entrants_of(key, effort, registry.available())[0]
    return any(candidate.backend is backend for candidate in raced)


@dataclass(frozen=True)
class Rematch:
    """A race in which only some take part.

    Attributes:
        entrants: those who race.
        champion: the one of them by whom all who stay out were beaten; unless it finishes, everybody must race.
    """

    entrants: tuple[Candidate, ...]
    champion: str

    def holds(self, results: Iterable[Result]) -> bool:
        """Return whether the champion finished, so that those who stayed out need not race."""
        return any(result.name == self.champion for result in results)


def rematch(
    key: Key, effort: Effort, everyone: Sequence[Candidate], incumbent: Entry | None, pick: Sequence[Candidate] = ()
) -> Rematch | None:
    """Return who must race again, or None if the old entry settles nothing and everybody must.

    Args:
        key: what is to be measured.
        effort: how hard.
        everyone: the candidates of a full race, the one that is estimated fastest first.
        incumbent: what was measured before, here or on a machine much like this one.
        pick: who would be used without tuning; empty where nobody can tell.
    """
    if incumbent is None or incumbent.flags or EFFORTS.index(incumbent.effort) < EFFORTS.index(effort):
        return None
    there = still_there(incumbent)
    if not there:
        return None
    champion, exact = there[0], incumbent.key == key
    settled = known_versions(incumbent)
    if not exact:  # what failed elsewhere may be right here
        settled = {name: v for name, v in settled.items() if name not in {row.backend for row in incumbent.failures}}
    raced = [candidate for candidate in everyone if settled.get(candidate.backend.name) != candidate.backend.version]
    if exact and not raced:
        return None
    if not exact:
        raced += pick or everyone[:1]
    named = {candidate.name: candidate for candidate in (champion, *raced)}
    return Rematch(tuple(named.values()), champion.name)


def carry_on(entry: Entry, incumbent: Entry, renewed: Container[str] = ()) -> Entry:
    """Return an entry with what an old one still tells of those who stayed out of the race.

    Args:
        entry: what was measured now.
        incumbent: the old entry. Only one for the same key gives its rows; one of a machine much like this one tells
            who lost before.
        renewed: backends all of whose candidates could race now: whatever is old of them tells nothing any more.
    """
    now = registry.available()
    rows: tuple[Result | Failure, ...] = (*entry.results, *entry.failures)
    raced, known = {row.name for row in rows}, {row.backend for row in rows}
    current = {
        name: version
        for name, version in known_versions(incumbent).items()
        if name not in renewed and name in now and now[name].version == version
    }
    kept: list[Result] = []
    failed: list[Failure] = []
    if incumbent.key == entry.key:
        there = {old.name for old in still_there(incumbent) if old.backend.name in current}
        kept = [row for row in incumbent.results if row.name in there - raced]
        failed = [
            row for row in incumbent.failures if current.get(row.backend) == row.version and row.name not in raced
        ]
        known |= {row.backend for row in kept} | {row.backend for row in failed}
    else:
        known |= {row.backend for row in incumbent.failures}
    winner, *others = entry.results
    if kept and kept[0] is incumbent.winner and kept[0].median < winner.median:
        winner, others, kept = kept[0], list(entry.results), kept[1:]  # a race without the champion dethrones nobody
    return replace(
        entry,
        results=(winner, *sorted((*others, *kept), key=lambda row: row.median)),
        failures=(*entry.failures, *failed),
        flags=entry.flags or (incumbent.flags if kept else ()),
        lost_before=tuple((name, version) for name, version in current.items() if name not in known),
    )
