"""The child process in which candidates of third parties are tried; ``isolation`` is its parent.

A request names a problem and a candidate. The answers are "ready", as soon as the arrays are there, and then what the
candidate did: a file with its result for the parent to judge, or the fault that was found.
"""

import base64
import faulthandler
import functools
import math
import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convdispatch import registry
from convdispatch.arguments import Array
from convdispatch.backend import Backend, Candidate, Config
from convdispatch.errors import LONGEST_REASON, in_a_line
from convdispatch.plan import Plan
from convdispatch.problem import Problem
from convdispatch.tuning.child import Reply, requests
from convdispatch.tuning.gate import Trial, trial
from convdispatch.tuning.watched import MARKS, FaultError, Watch, difference, leak, resident

#: Calls longer than this are not repeated to look for leaks, nor traced to measure memory.
_SLOW = 1.0


class _Setting(NamedTuple):
    """What runs: a candidate of a watched backend, and the arrays it runs on."""

    watch: Watch
    arrays: Trial
    candidate: Candidate


@functools.lru_cache(maxsize=2)
def _sent(payload: str) -> Backend:
    backend: Backend = pickle.loads(base64.b64decode(payload))  # noqa: S301  # the parent's own
    return backend


def _answer(request: Mapping[str, Any], reply: Reply) -> None:
    try:
        backend = registry.get(request["name"]) if "name" in request else _sent(request["pickle"])
        arrays = trial(Problem.parse(request["problem"]))
    except Exception as error:  # noqa: BLE001  # whatever it was, this process cannot try it
        reply({"lost": _short(error)})
        return
    reply({"ready": resident()})
    outputs = Path(request["outputs"])
    # Should the parent end while a kernel hangs, this ends too: a thread that needs no lock of Python's sees to it.
    faulthandler.dump_traceback_later(request["seconds"], exit=True)
    try:
        reply(_tried(arrays, backend, Config(request["config"]), outputs))
    except FaultError as error:
        reply({"fault": str(error)})
    except Exception as error:  # noqa: BLE001  # a failure like any other
        reply({"raised": _short(error)})
    except BaseException as error:  # noqa: BLE001  # nothing between the tuner and the user would stop it
        reply({"fault": f"raises {type(error).__name__}, which would end the process"})
    finally:
        faulthandler.cancel_dump_traceback_later()


def _tried(arrays: Trial, backend: Backend, config: Config, outputs: Path) -> dict[str, Any]:
    """Run a candidate again and again, each time after something has changed that must make no difference."""
    watch = Watch(backend)
    candidate = Candidate(watch.backend, config)
    plan = arrays.plan(candidate)
    files: list[tuple[str, str]] = []

    def call(when: str) -> Array:
        result = plan(arrays.input, out=arrays.spoiled_output(), residual=arrays.residual)
        if not files or not backend.numerics.deterministic:  # else the results are the same, to the bit
            np.ascontiguousarray(result).reshape(-1).view(np.uint8).tofile(outputs / str(len(files)))
            files.append((when, str(len(files))))
        return watch.stored

    first = call("in its first run")
    started = time.perf_counter()
    for change, when, fault in _CHANGES:
        change(_Setting(watch, arrays, candidate))
        stored = call(when)
        watch.measure = not watch.workspace and time.perf_counter() - started < _SLOW
        if backend.numerics.deterministic and not np.array_equal(first, stored):
            where = difference(first, stored, stored.size // math.prod(arrays.problem.output_shape))
            return {"files": files, "fault": where if where.startswith("leaves") else f"{fault}: {where} {when}"}
    watch.measure = False
    quick = time.perf_counter() - started < _SLOW * len(_CHANGES)
    lost = leak(lambda: plan(arrays.input, residual=arrays.residual)) if quick else 0
    if lost:
        return {"files": files, "fault": f"leaks memory: each call leaves {lost >> 10} KiB behind"}
    return {"files": files, "workspace": watch.workspace}


def _change_nothing(_: _Setting) -> None:
    pass


def _change_marks(setting: _Setting) -> None:
    setting.watch.mark = MARKS[1]


def _change_filters(setting: _Setting) -> None:
    """Overwrite the filters that the backend was given, which it must have copied or packed."""
    setting.watch.mark = MARKS[0]
    for filters in setting.watch.filters:
        filters.fill(0)


def _call_others(setting: _Setting) -> None:
    """Call another plan of the same backend, with other filters and another input."""
    arrays = setting.arrays
    other = Plan(arrays.problem, setting.candidate, np.flip(arrays.filters), arrays.bias)
    other(np.flip(arrays.input), residual=arrays.residual)


#: What is changed before a run, how that run is called, and what a backend does whose result is not the same.
_CHANGES: tuple[tuple[Callable[[_Setting], None], str, str], ...] = (
    (_change_nothing, "in a second run", "says that it is deterministic, and is not"),
    (_change_marks, "with other memory around its arrays", "reads outside of its input"),
    (_change_filters, "when they change", "keeps the filters that it was given instead of a copy"),
    (_call_others, "after them", "is not independent of other calls"),
)


def _short(error: BaseException) -> str:
    return in_a_line(f"{type(error).__name__}: {error}", LONGEST_REASON)


def main() -> None:
    """Answer requests until there are no more."""
    asked, reply = requests()
    faulthandler.enable()
    for request in asked:
        _answer(request, reply)


if __name__ == "__main__":
    main()
