"""How threads share out the jobs of a kernel's work: each has a share of its own, and then takes what others left.

A share is some jobs that follow each other, the same in every call: what a thread read and wrote last time is still in
its core's caches. How many of them are taken is one word, on a line of cache of its own, which as a rule nobody but its
thread changes; who is done with a share takes jobs of the others'. The word also has the number of the call, so none
need be reset before a call, and who comes too late for one takes nothing of the next.

A kernel's block of arguments is the same in every call but for two addresses. So threads copy it from where it lies for
good, and put these in, rather than wait for lines of cache that the caller has just written.
"""

from convdispatch.backends._atomics import call_kernel, exchange_if, fence, read, write
from convdispatch.backends._jit import compilable
from convdispatch.backends._vector import copy

#: Bytes of a share's line of cache, which begins with the word that says what is taken: the call's number, times two to
#: the power of ``BITS``, and how many jobs.
SHARE_BYTES, BITS = 64, 24
_COUNT = (1 << BITS) - 1
#: Behind it, what the thread of this share has to report: jobs done by it, wherever they were from (with the call's
#: number, likewise), how many of these came to their end, and whether a sum was not finite.
DONE, ENDED, SPOILED = 8, 16, 24

#: Room for a copy of a block.
MOST_WORDS = 128
_BYTE = 255


def layout(words: int, places: tuple[int, int], spoiled_at: int | None) -> int:
    """Return in one number how long a block is, where in it two addresses go, and where it tells of spoiled sums."""
    numbers = (words, *places, 0 if spoiled_at is None else spoiled_at + 1)
    assert max(numbers) <= MOST_WORDS, numbers  # noqa: S101  # who packs blocks has seen to it
    return sum(number << 8 * at for at, number in enumerate(numbers))


@compilable
def own_block(block, layout, source, target, room):  # type: ignore[no-untyped-def]
    """Return the address of a block with two addresses put in: of a copy, or itself where there is no ``layout``."""
    if layout == 0:
        return block
    copy(room, block, 8 * (layout & _BYTE))
    write(room + 8 * (layout >> 8 & _BYTE), source)
    write(room + 8 * (layout >> 16 & _BYTE), target)
    return room


@compilable
def spoiled_word(block, layout):  # type: ignore[no-untyped-def]
    """Return the address of the word by which a block tells of spoiled sums, 0 if it has none."""
    behind = layout >> 24
    return block + 8 * (behind - 1) if behind else 0


@compilable
def _claim(share, call, length):  # type: ignore[no-untyped-def]
    """Take the next job of a share of so many; return its number among these, or -1 if none is left."""
    while True:
        word = read(share)
        last, taken = word >> BITS, word & _COUNT
        if last < call:
            taken = 0
        if last > call or taken >= length:
            return -1
        if exchange_if(share, word, (call << BITS) + taken + 1):
            return taken


@compilable
def reported(share, call):  # type: ignore[no-untyped-def]
    """Return how many jobs of a call the thread of a share has reported as done so far."""
    word = read(share + DONE)
    return word & _COUNT if word >> BITS == call else 0


@compilable
def take_jobs(shares, call, number, count, jobs, task, room, report):  # type: ignore[no-untyped-def]
    """Do the jobs of the share of this number, then those left of others'; return how many, and how many ended well.

    Args:
        shares: the address of the shares.
        call: the call's number, larger than that of any before.
        number, count: which thread this is, of how many.
        jobs: the first of those that are shared out, and the one behind the last.
        task: function, block, layout, source and target: what to call, and of what to make its block. They are not
            looked at before a job is taken, since until then nobody waits and they may be gone.
        room: where this thread's copy of the block goes.
        report: whether to report on this number's share, whenever all of a share has been done.
    """
    function, block, form, source, target = task
    first, size = jobs[0], jobs[1] - jobs[0]
    done, ended, mine = 0, 0, room
    for turn in range(number, number + count):
        owner, before = turn % count, done
        begin = first + owner * size // count
        length = first + (owner + 1) * size // count - begin
        taken = _claim(shares + owner * SHARE_BYTES, call, length)
        while taken >= 0:
            if done == 0:
                mine = own_block(block, form, source, target, room)
            ended += call_kernel(function, mine, begin + taken)
            done += 1
            taken = _claim(shares + owner * SHARE_BYTES, call, length)
        if report and done > before:
            own, word = shares + number * SHARE_BYTES, spoiled_word(mine, form)
            fence()
            write(own + ENDED, ended)
            write(own + SPOILED, read(word) if word else 0)
            write(own + DONE, (call << BITS) + done)
    return done, ended
