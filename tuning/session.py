"""A stretch of measuring: what is kept from one candidate to the next goes with its end.

Child processes take memory, and so do a large problem's arrays; the program that goes on has no use for them.
"""

import contextlib
from collections.abc import Iterator

from convdispatch.tuning import compile_ahead, gate, hard_inputs, isolation


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Keep child processes and shared arrays within this block or function."""
    try:
        yield
    finally:
        end()


def end() -> None:
    """End all child processes, and let go of the arrays that candidates share; who needs them again has new ones."""
    isolation.close()
    compile_ahead.close()
    gate.trial.cache_clear()
    hard_inputs.forget()
