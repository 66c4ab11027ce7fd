"""Who wins: the fastest, unless somebody who is as fast is to be preferred.

Tuning is to make nothing slower, and to decide the same way twice. So the rule, for a margin of 1 %:

1. The leader is the fastest of those who ran to the end, by the median of the ratios round by round.
2. As fast as the leader are those who are no more than the margin slower for certain, by their interval; where the
   rounds did not suffice to be certain, those whose median is within half the margin. So two tunes of an idle machine
   that differ, differ by little more than the margin.
3. Some give way only to who beats them by the margin: the incumbent, who won the last time, and the picks, which
   would be used without tuning: by the backends' own estimates, which are the same in every run, and by estimates that
   go by what was tuned before. Such a one stays unless it is for certain slower than the leader by the margin; once it
   gives way, nobody wins who is not faster than it by the margin.
4. Of those who are left the first in this order wins: the incumbent, the picks in their order, the smaller error, the
   smaller workspace, the name. Nothing in it depends on the clock.
"""

from collections.abc import Mapping, Sequence

from convdispatch.profile import Result
from convdispatch.tuning.race import Standing

#: Candidates this close in time are equal; the preference order decides between them.
TIE_MARGIN = 0.01


def order_by_preference(
    results: Sequence[Result],
    incumbent: str | None = None,
    *,
    picks: Sequence[str] = (),
    standings: Mapping[str, Standing] | None = None,
    margin: float = TIE_MARGIN,
) -> list[Result]:
    """Return results with the winner first, then the others by time.

    Args:
        results: at least one; ``median`` as if all had run at the same moments. Who ran in fewer rounds than others
            left the race early and cannot win.
        incumbent: name of the last winner, if it ran.
        picks: names of who would be used without tuning, the one that is preferred first.
        standings: everybody's time over the leader's; taken from the medians, as if certain, where None.
        margin: how close in time candidates are equal.
    """
    by_time = sorted(results, key=lambda result: (result.median, result.name))
    rounds = max(result.rounds for result in results)
    finishers = [result for result in by_time if result.rounds == rounds]
    winner = _winner(finishers, incumbent, picks, standings or _certain(finishers), margin)
    return [winner, *(result for result in by_time if result is not winner)]


def _certain(finishers: Sequence[Result]) -> dict[str, Standing]:
    best = finishers[0].median
    ratios = {result.name: result.median / best if best else 1.0 for result in finishers}
    return {name: Standing(ratio, ratio, ratio) for name, ratio in ratios.items()}


def _winner(
    finishers: Sequence[Result],
    incumbent: str | None,
    picks: Sequence[str],
    standings: Mapping[str, Standing],
    margin: float,
) -> Result:
    def preferred(result: Result) -> tuple[bool, int, float, int, str]:
        turn = picks.index(result.name) if result.name in picks else len(picks)
        return result.name != incumbent, turn, result.error, result.workspace, result.name

    def as_fast(result: Result) -> bool:
        standing = standings[result.name]
        return standing.equal(margin) or (not standing.slower(margin) and standing.median <= 1 + margin / 2)

    protected = [result for result in finishers if result.name in (incumbent, *picks)]
    staying = [result for result in protected if not standings[result.name].slower(margin)]
    if staying:
        return min(staying, key=preferred)
    beaten = min((result.median for result in protected), default=float("inf"))
    faster = [result for result in finishers if as_fast(result) and result.median * (1 + margin) <= beaten]
    return min(faster or finishers[:1], key=preferred)
