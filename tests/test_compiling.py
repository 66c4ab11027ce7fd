"""While a kernel is compiled, forks, garbage collection and Ctrl-C wait."""

import gc
import os
import signal
import threading

import pytest
from programs import run_well

from convdispatch.backends._compiling import compiling

_FORKS = """
import gc, os, sys, threading, time, warnings
from convdispatch.backends._compiling import compiling

warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads, which is the point
begun, seen = threading.Event(), []

def compile():
    with compiling():
        begun.set()
        time.sleep(0.2)
        seen.append("compiled")

other = threading.Thread(target=compile)
other.start()
begun.wait()
child = os.fork()
assert seen == ["compiled"] and gc.isenabled()
again = threading.Thread(target=compile)
again.start()
again.join(20)
assert not again.is_alive() and len(seen) == 2
if child == 0:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_forked_while_another_thread_compiles_can_compile_too() -> None:
    run_well(_FORKS, 60)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_is_raised_after_all_compiling() -> None:
    steps: list[str] = []
    with pytest.raises(KeyboardInterrupt), compiling():  # noqa: PT012
        with compiling():
            signal.raise_signal(signal.SIGINT)
            steps.append("a part")
        steps.append("the whole")
    assert steps == ["a part", "the whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_is_raised_though_compiling_failed() -> None:
    with pytest.raises(KeyboardInterrupt), compiling():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        raise ValueError("no kernel")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_program_that_handles_interrupts_itself_goes_on_doing_so() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        with compiling():
            signal.raise_signal(signal.SIGINT)
            assert came == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_other_threads_leave_signals_alone() -> None:
    handlers = []

    def compile_in_thread() -> None:
        with compiling():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=compile_in_thread)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_looked_for_after_compiling_as_before(collects: bool) -> None:
    def compile_and_fail() -> None:
        with compiling():
            assert not gc.isenabled()
            raise ValueError("no kernel")

    was_on = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(ValueError, match="no kernel"):
            compile_and_fail()
        assert gc.isenabled() == collects
    finally:
        (gc.enable if was_on else gc.disable)()
