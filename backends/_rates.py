"""What the backends' estimates have in common: a core's rate of products, what sharing work out costs, and ranking."""

import math
from collections.abc import Callable, Sequence

from convdispatch.backend import Config, Effort, item_bytes
from convdispatch.backends._activation import unclamped
from convdispatch.backends._vector import whole_units
from convdispatch.machine import Machine, current
from convdispatch.problem import Problem

#: FLOP/s of one core for each byte of vector width, in float32.
_PEAK_PER_BYTE = 1.8e9
#: Bytes a second that a thread reads from caches beyond its own, or from memory, if it reads on and on.
_CACHED_BYTES, _MEMORY_BYTES = 1.2e11, 2e10
#: Of an activation's value, in vectors of 64 bytes; and of float64, one by one.
_ACTIVATION_SECONDS, _WIDE_ACTIVATION_SECONDS = 3e-10, 3e-9
#: Of what is read again and again, this part of the last cache is found there; of the rest, others took the place.
FOUND = 0.4
#: What backends' rates were measured on does vectors of 64 bytes by halves. Cores with two units for whole ones, and
#: with ways to their caches to match, do so many times as much.
_WHOLE_UNITS = 2.1
#: Lines of cache so many bytes apart want the same places of L1: it is looked up by what a page keeps.
_L1_PERIOD = 4096


def pace(whole: float = _WHOLE_UNITS) -> float:
    """Return how many times as fast as backends' rates say cores are here: so many with two units for whole vectors."""
    return whole if whole_units() else 1.0


def peak(machine: Machine, itemsize: int) -> float:
    """Return the FLOP/s of one core in vectors of floats of so many bytes."""
    return _PEAK_PER_BYTE * machine.vector_bytes * 4 / itemsize


def filter_seconds(filter_bytes: int, machine: Machine) -> float:
    """Return how long one thread waits for so many bytes of filters, once, from where they stay between calls."""
    found = min(filter_bytes, FOUND * machine.caches[2])
    return found / _CACHED_BYTES + (filter_bytes - found) / _MEMORY_BYTES


def activation_seconds(problem: Problem, machine: Machine) -> float:
    """Return how long one thread takes for activations that are more than a clamp, on stored sums."""
    if not unclamped(problem):
        return 0.0
    each = _ACTIVATION_SECONDS * 64 / machine.vector_bytes if problem.dtype == "float32" else _WIDE_ACTIVATION_SECONDS
    return each * math.prod(problem.output_shape)


def moved_bytes(problem: Problem) -> int:
    """Return the bytes of input, output and residual."""
    p = problem
    outputs = math.prod(p.output_shape) * (2 if p.epilogue.residual else 1)
    return (math.prod(p.input_shape) + outputs) * item_bytes(p.dtype)


def places(apart: int, machine: Machine) -> float:
    """Return how many cache lines, so many bytes apart, L1 has places for; those of more wait for one another."""
    return machine.caches[0] / math.gcd(apart, _L1_PERIOD)


def ranked(
    choices: Sequence[Config], estimate: Callable[[Config, Machine], float], effort: Effort, few: int
) -> Sequence[Config]:
    """Return configs, the one with the smallest estimate here first; only a few where effort is small."""
    here = current()
    best = sorted(choices, key=lambda config: estimate(config, here))
    return best[: few if effort in {"estimate", "measure"} else None]


def shared(
    seconds: float, used: int, *, efficiency: float = 0.97, call: float = 0.8e-6, launch: float = 0.5e-6,
    whole: float = _WHOLE_UNITS,
) -> float:  # fmt: skip
    """Return the seconds of a call.

    Args:
        seconds: of its work on one thread, by rates that ``pace`` brings up to date.
        used: threads that there is work for.
        efficiency: part of their speed that several threads reach together.
        call: seconds that any call takes besides.
        launch: seconds that it takes to have several threads begin.
        whole: what ``pace`` is told.
    """
    work = seconds / pace(whole)
    return work / (efficiency * used) + call + launch if used > 1 else work + call
