"""What a large profile costs: prints the milliseconds of the first look-up, of later ones, and of storing an entry.

    python benchmarks/profile_load.py [ENTRIES] [RESULTS]

makes a profile of so many entries (5000) with so many results each (12) in a temporary folder. Each figure is the least
of several runs, each in a process of its own where it is about the first call. A disk that is slow to sync shows.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from convdispatch import machine, profile, profile_file, settings
from convdispatch.backend import Config
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Key, Result

RUNS = 7

FIRST = """
import sys, time
from pathlib import Path
from convdispatch import machine, profile, settings
from convdispatch.profile import parse_key
key, _ = parse_key(sys.argv[2]), machine.current()  # needed without a profile too
with settings.options(profile=Path(sys.argv[1])):
    began = time.perf_counter()
    found = profile.find(key)
    print(time.perf_counter() - began, len(found))
"""


def entry(number: int, results: int) -> Entry:
    """Return one of many entries that are all different."""
    problem = Problem.parse(f"1x{8 + number % 100}x{8 + number // 100}x64 * 3x3x64x64 SAME")
    rows = tuple(
        Result("winograd", 1, Config(m=m, threads=2), 1e-3 + m * 1e-5, 0.02, 15, 1e-6, 1 << 16, (9e-4, 1.1e-3))
        for m in range(2, 2 + results)
    )
    return Entry(Key(problem, "plan", 2, machine.current().id), rows)


def least(run: Callable[[], object]) -> float:
    """Return the milliseconds of the fastest of some runs."""
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times) * 1e3


def first_call(path: Path, key: Key) -> float:
    """Return the milliseconds that a look-up takes in a new process."""
    words = [sys.executable, "-c", FIRST, str(path), str(key)]
    outputs = [subprocess.run(words, capture_output=True, text=True, check=True).stdout for _ in range(RUNS)]
    return min(float(output.split()[0]) for output in outputs) * 1e3


def main() -> None:
    """Print the figures."""
    count, results = (int(word) for word in (*sys.argv[1:], *("5000", "12")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as folder:
        path, small = Path(folder) / "profile.yaml", Path(folder) / "small.yaml"
        profile_file.write(path, [entry(number, results) for number in range(count)], machine.current())
        profile_file.write(small, [entry(0, results)], machine.current())
        known, unknown = entry(count // 2, results).key, Key(Problem.parse("1x3x3x3 * 1x1x3x3"), "plan", 2, "nowhere")
        print(f"{count} entries of {results} results, {path.stat().st_size / 1e6:.1f} MB")
        print(f"first look-up          {first_call(path, known):8.2f} ms")
        print(f"  of a profile of one  {first_call(small, known):8.2f} ms")
        print(f"  of an unknown key    {first_call(path, unknown):8.2f} ms")
        with settings.options(profile=path):
            profile.find(known)
            print(f"the same again         {least(lambda: profile.find(known)):8.2f} ms")
        storing = least(lambda: profile_file.write(path, [entry(1, results)], machine.current()))
        print(f"storing one entry      {storing:8.2f} ms")


if __name__ == "__main__":
    main()
