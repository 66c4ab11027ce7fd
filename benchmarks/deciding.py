"""How long it takes to decide about a problem never seen before: without a profile, and with one of 5,000 entries.

Run it from a checkout: ``python benchmarks/deciding.py [ENTRIES]``. Nothing is convolved; times are of this machine.
"""

import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from convdispatch import calibration, dispatch, heuristic, machine, profile, profile_file, registry, settings
from convdispatch.calibration import Calibration, Correction
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Key, Result

NEW = 200


def problems(count: int, seed: int) -> list[Problem]:
    """Draw layers of networks, no two alike."""
    draw = random.Random(seed)  # noqa: S311  # shapes, not secrets
    found: dict[Problem, None] = {}
    while len(found) < count:
        side, c, k = draw.randint(7, 112), 8 * draw.randint(1, 64), 8 * draw.randint(1, 64)
        kernel, stride = draw.choice(("3x3", "3x3", "1x1", "5x5")), draw.choice(("", "", " stride=2"))
        depthwise = draw.random() < 0.2
        filters = f"{kernel}x1x{c}" if depthwise else f"{kernel}x{c}x{k}"
        found[Problem.parse(f"1x{side}x{side}x{c} * {filters} SAME{stride}")] = None
    return list(found)


def write_profile(path: Path, count: int) -> None:
    """Write entries of the candidates that tuning would race, with their estimates, and a calibration."""
    here, threads = machine.current(), heuristic.thread_budget(settings.current())
    draw = random.Random(0)  # noqa: S311
    entries = []
    backends = registry.available()
    for problem in problems(count, seed=1):
        fit = [backend for backend in backends.values() if heuristic.refusal(backend, problem) is None]
        ranked = heuristic.rank(problem, fit, threads, "measure")
        raced = set(heuristic.worth_measuring(ranked, "measure")[0])
        rows = [
            Result(
                e.candidate.backend.name, e.candidate.backend.version, e.candidate.config,
                (e.seconds or 1.0) * draw.lognormvariate(0, 0.2), 0.02, 11, 1e-7, 0, estimate=e.seconds,
            )
            for e in ranked
            if e.candidate in raced and e.seconds is not None
        ]  # fmt: skip
        rows.sort(key=lambda row: row.median)
        entries.append(Entry(Key(problem, "plan", threads, here.id), tuple(rows)))
    made = Calibration(here.id, "calibrate", 200, backends={n: Correction(b.version) for n, b in backends.items()})
    profile_file.write(path, entries, here, calibration.dump(made))


def decide(batch: Sequence[Problem]) -> list[float]:
    """Return the milliseconds of each decision."""
    taken = []
    for problem in batch:
        before = time.perf_counter()
        dispatch.decide(problem, "plan")
        taken.append((time.perf_counter() - before) * 1e3)
    return taken


def said(name: str, taken: Sequence[float]) -> None:
    """Print the first time, and the median and 95th percentile of the others."""
    rest = sorted(taken[1:])
    median, high = statistics.median(rest), rest[len(rest) * 95 // 100]
    print(f"{name:34} first {taken[0]:7.2f}   then {median:6.3f}   p95 {high:6.3f}")


def main() -> None:
    """Print the table."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    batches = [problems(NEW, seed) for seed in (2, 3, 4)]
    decide(problems(20, seed=5))  # imports, and the compilers' own first steps
    print(f"deciding about {NEW} new problems, milliseconds")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.yaml"
        with profile.only(path):
            said("no profile", decide(batches[0]))
        write_profile(path, count)
        gc.collect()  # what making it has left behind is not to be collected in a decision
        with profile.only(path):
            said(f"a profile of {count} entries", decide(batches[1]))
            said("the same, loaded", decide(batches[2]))


if __name__ == "__main__":
    main()
