"""Into which jobs work is cut: how many, and what each of them does."""

import functools
import itertools
import math

import numpy as np

from convdispatch.arguments import Array

#: Pixels of output up to which jobs of some tiles each can be listed. With 64 filters they take a tebibyte.
_MOST_PIXELS = 1 << 32


def too_many(pixels: int) -> str | None:
    """Return why so many pixels of output cannot be cut into jobs of bounded size, or None."""
    return f"{pixels} pixels of output would be more jobs than can be listed" if pixels > _MOST_PIXELS else None


#: Seconds of a thread's work from which on it is cut into two jobs, and into four: whoever is done takes those that
#: others have not begun.
_TWO, _FOUR = 3e-5, 1e-4


def pieces(seconds: float, threads: int) -> int:
    """Return into how many jobs work is cut that takes one thread about so long.

    To begin a job takes a sixth of a microsecond, and what is taken from another thread's share was in that one's
    caches: on cores that are far apart, short calls that were cut in two took up to half as long again.
    """
    if threads == 1:
        return 1
    each = seconds / threads
    return threads * (1 if each < _TWO else 2 if each < _FOUR else 4)


def several(threads: int) -> int:
    """Return into how many jobs work is cut if nobody knows well how long it takes.

    A thread that comes late, or is held up, leaves its jobs to the others.
    """
    return 4 * threads if threads > 1 else 1


def grid(*axes: tuple[int, int]) -> Array:
    """Return jobs: each range of the first axis with each range of the second and so on, as rows of starts and ends.

    Args:
        *axes: how long each is, and into how many pieces it is cut; see ``split``.

    Returns:
        An array that cannot be written, since others may have it, too.
    """
    few = math.prod(parts for _, parts in axes) <= _FEW
    return _few(*axes) if few else _grid(*axes)


def _grid(*axes: tuple[int, int]) -> Array:
    flat = itertools.chain.from_iterable
    ends = flat(flat(itertools.product(*(split(*axis) for axis in axes))))
    jobs = np.fromiter(ends, np.int64).reshape(-1, 2 * len(axes))
    jobs.flags.writeable = False
    return jobs


#: Jobs that are remembered for the next call of ``conv2d``: to list them takes as long as some small layers.
_FEW = 256
_few = functools.lru_cache(maxsize=256)(_grid)


@functools.lru_cache(maxsize=256)
def even_grid(outer: int, inner: int, threads: int, pieces: int) -> Array:
    """Return jobs like ``grid`` of two axes, as much work for each thread, though neither axis may divide by them.

    What is cut is the list of all pairs, the outer axis' first: so a thread may begin within the last one of the outer
    axis of the thread before it.

    Args:
        outer, inner: how long the axes are.
        threads: each has as many jobs, which follow each other; some may be empty.
        pieces: jobs of each thread; where it begins or ends within, there may be two more.
    """
    shares = []
    for begin, end in split(outer * inner, threads):
        (first, skipped), (last, some) = divmod(begin, inner), divmod(end, inner)
        jobs = []
        if skipped:
            jobs.append((first, first + 1, skipped, inner if last > first else some))
            first += 1
        whole = max(1, pieces - len(jobs) - (some > 0))
        jobs += [(first + start, first + stop, 0, inner) for start, stop in split(max(0, last - first), whole)]
        if some and last >= first:
            jobs.append((last, last + 1, 0, some))
        shares.append(jobs)
    most = max(map(len, shares))
    jobs_of_all = [job for jobs in shares for job in jobs + [(0, 0, 0, 0)] * (most - len(jobs))]
    even = np.array(jobs_of_all, np.int64)
    even.flags.writeable = False
    return even


def split(count: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``range(count)`` into up to ``parts`` pieces of about equal size, none empty."""
    ends = [part * count // parts for part in range(parts + 1)]
    return [(start, end) for start, end in itertools.pairwise(ends) if start < end]
