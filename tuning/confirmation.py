"""A winner is asked again after a while, since it may have been the moment that favoured it.

A race takes a fraction of a second. What lasts longer (a neighbour on the same processor takes cache or memory, say)
may favour one candidate throughout, and be gone in the next race. So who won and who came close race once more, after
the other problems have had their turn. The winner stays unless somebody is faster for certain, and is so twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from convdispatch.backend import Candidate
from convdispatch.profile import Entry, Result
from convdispatch.tuning.preference import TIE_MARGIN
from convdispatch.tuning.rematch import still_there

#: Who took no more than this many times as long as the winner came close; so many of them race again at most.
_CLOSE, _MOST = 1.1, 3


def contested(entry: Entry) -> list[Candidate]:
    """Return the winner and who came close, the best first; nobody where nobody did.

    Who was as fast as the winner is not asked: it would make no difference.
    """
    best = entry.winner.median
    equal, close = TIE_MARGIN * best, (_CLOSE - 1) * best
    asked = {row.name for row in entry.results if row.median - best <= close and abs(row.median - best) > equal}
    there = still_there(entry)
    rivals = [candidate for candidate in there if candidate.name in asked][:_MOST]
    return [there[0], *rivals] if rivals and there[0].name == entry.winner.name else []


def confirmed(entry: Entry, again: Callable[[Sequence[Candidate]], Sequence[Result]]) -> Entry:
    """Return an entry whose winner was asked again: the same, or with another one and its times.

    Args:
        entry: what the first race came to.
        again: races candidates, of whom the first is preferred in a tie, and returns what came of it with the winner
            first; nothing where others disturbed it.
    """
    candidates = contested(entry)
    if not candidates:
        return entry
    for _ in range(2):
        results = again(candidates)
        if not results or results[0].name == entry.winner.name:
            return entry
        challenger, *others = results
        others += [row for row in entry.results if row.name not in {result.name for result in results}]
        candidates = [candidate for candidate in candidates if candidate.name in (entry.winner.name, challenger.name)]
    return replace(entry, results=(challenger, *sorted(others, key=lambda row: row.median)))
