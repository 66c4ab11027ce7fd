"""A winner is asked again after a while, since it may have been the moment that favoured it.

A race takes a fraction of a second. What lasts longer (a neighbour on the same processor takes cache or memory, say)
may favour one candidate throughout, and be gone in the next race. So who won and who came close race once more, after
the other problems have had their turn; and those who would be used without tuning, close or not, since a winner is to
have beaten them for good reason. The winner stays unless somebody is faster for certain, and is so twice.
"""

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace

from convdispatch.backend import Candidate
from convdispatch.profile import Entry, Result
from convdispatch.tuning.preference import TIE_MARGIN
from convdispatch.tuning.rematch import still_there

#: Who took no more than this many times as long as the winner came close; so many of them race again at most.
_CLOSE, _MOST = 1.1, 3


def contested(entry: Entry, picks: Iterable[Candidate] = (), among: Container[str] | None = None) -> list[Candidate]:
    """Return the winner and who is to race with it once more, the best first; nobody where there is no such rival.

    Who was as fast as the winner is not asked: it would make no difference.

    Args:
        entry: what the first race came to.
        picks: who would be used without tuning.
        among: backends that took part, if not all of the entry's did.
    """
    best, picked = entry.winner.median, {candidate.name for candidate in picks}
    equal, close = TIE_MARGIN * best, (_CLOSE - 1) * best
    apart = {row.name: row.median - best for row in entry.results if abs(row.median - best) > equal}
    there = [candidate for candidate in still_there(entry) if among is None or candidate.backend.name in among]
    if not there or there[0].name != entry.winner.name:
        return []
    winner, *others = there
    near = [rival for rival in others if rival.name in apart and apart[rival.name] <= close][:_MOST]
    rivals = near + [rival for rival in others if rival.name in apart.keys() & picked and rival not in near]
    return [winner, *rivals] if rivals else []


def confirmed(
    entry: Entry, candidates: Sequence[Candidate], again: Callable[[Sequence[Candidate]], Sequence[Result]]
) -> Entry:
    """Return an entry whose winner was asked again: the same, or with another one and its times.

    Args:
        entry: what the first race came to.
        candidates: the winner and who races with it.
        again: races candidates, of whom the first is preferred in a tie, and returns what came of it with the winner
            first; nothing where others disturbed it.
    """
    for _ in range(2):
        results = again(candidates)
        if not results or results[0].name == entry.winner.name:
            return entry
        challenger, *others = results
        others += [row for row in entry.results if row.name not in {result.name for result in results}]
        candidates = [candidate for candidate in candidates if candidate.name in (entry.winner.name, challenger.name)]
    return replace(entry, results=(challenger, *sorted(others, key=lambda row: row.median)))
