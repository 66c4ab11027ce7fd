"""What the README claims besides ratios to other engines, measured: ``python benchmarks/claims.py``.

Every comparison takes turns within one process, and is a median of ratios. Names of some may be given; all is the
default. Run it on a machine that does nothing else.
"""

import functools
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import convdispatch
from convdispatch import machine, registry
from convdispatch.problem import Problem, dtype_of

ROUNDS = 25
LAYERS = (
    "1x56x56x64 * 3x3x64x64 SAME",
    "1x28x28x128 * 3x3x128x128 SAME",
    "1x56x56x256 * 1x1x256x64 VALID",
    "1x28x28x256 * 3x3x256x256 SAME stride=2",
    "1x224x224x64 * 3x3x64x64 SAME",
    "1x224x224x3 * 7x7x3x64 pad=3 stride=2",
)
IMAGES = (
    "1x480x640x1 * 5x5x1x1 SAME",
    "1x480x640x3 * 5x5x1x3 SAME",
    "1x480x640x3 * 5x5x3x2 SAME",
    "1x1080x1920x1 * 3x3x1x2 SAME",
    "1x1080x1920x1 * 3x3x1x1 SAME",
    "1x1080x1920x1 * 15x15x1x1 SAME",
    "1x1080x1920x3 * 9x9x1x3 SAME",
    "1x1080x1920x1 * 5x5x1x1 SAME stride=2",
)
Run = Callable[[], object]


def ratio(first: Run, second: Run) -> float:
    """Return the time of the first over that of the second: the median over rounds in which both took their turn."""
    ratios = []
    for turn in range(ROUNDS):
        seconds = {}
        for which in ((first, second), (second, first))[turn % 2]:
            which()
            before = time.perf_counter()
            which()
            seconds[which] = time.perf_counter() - before
        ratios.append(seconds[first] / seconds[second])
    return statistics.median(ratios)


def runner(problem: Problem, **forced: Any) -> Run:
    """Return a call of a plan with arrays of its own."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(problem.input_shape).astype(dtype_of(problem.dtype))
    w = rng.standard_normal(problem.filter_shape).astype(dtype_of(problem.dtype))
    p = problem
    plan = convdispatch.plan(
        x, w, p.strides, ((p.pads[0], p.pads[1]), (p.pads[2], p.pads[3])), p.data_format, p.dilations, groups=p.groups,
        bias=np.ones(p.k, x.dtype) if p.epilogue.bias else None, activation=p.epilogue.activation, **forced,
    )  # fmt: skip
    out = plan(x)
    return lambda: plan(x, out=out)


def chosen(problem: Problem) -> tuple[str, Any]:
    """Return the backend and config that a problem gets, to be forced on its variants."""
    found = convdispatch.plan(problem.input_shape, np.ones(problem.filter_shape, "f4"), **how(problem)).candidate
    return found.backend.name, found.config


def how(problem: Problem) -> dict[str, Any]:
    """Return a problem's parameters as ``plan`` takes them."""
    p = problem
    pads = ((p.pads[0], p.pads[1]), (p.pads[2], p.pads[3]))
    return {"strides": p.strides, "padding": pads, "dilations": p.dilations, "groups": p.groups}


def epilogue() -> None:
    """Bias and relu: what they add to a convolution."""
    for text in LAYERS:
        plain, full = Problem.parse(text), Problem.parse(f"{text} +bias +relu")
        forced = chosen(plain)
        found = ratio(runner(full, backend=forced), runner(plain, backend=forced))
        print(f"  {text}: {found - 1:+.1%}")


def layouts() -> None:
    """NCHW and float16 against NHWC float32, by the same candidate."""
    for text in LAYERS:
        plain = Problem.parse(text)
        forced = chosen(plain)
        base = runner(plain, backend=forced)
        said = []
        for name, variant in (
            ("NCHW", plain.replace(data_format="NCHW")),
            ("float16", plain.replace(dtype="float16")),
        ):
            said.append(f"{name} {ratio(runner(variant, backend=forced), base):.2f}x")
        print(f"  {text}: {', '.join(said)}")


def images() -> None:
    """Images as NCHW, and of bytes and 16-bit integers, against NHWC float32, each by its own choice."""
    for text in IMAGES:
        plain = Problem.parse(text)
        base = runner(plain)
        variants = {name: plain.replace(dtype=name) for name in ("uint8", "int16")}
        if plain.c > 1 or plain.k > 1:
            variants["NCHW"] = plain.replace(data_format="NCHW")
        said = [f"{name} {ratio(runner(variant), base):.2f}x" for name, variant in variants.items()]
        print(f"  {text}: {', '.join(said)}")


def calls() -> None:
    """Python's part of a call, in microseconds, on a problem that is nearly no work."""
    x, w = np.ones((1, 8, 8, 16), np.float32), np.ones((3, 3, 16, 16), np.float32)
    plan = convdispatch.plan(x, w, padding="SAME")
    out = plan(x)
    plan(x)  # what is called again gets its short way
    kernel: Any = plan._enter or plan._kernel  # noqa: SLF001  # where compiled code begins: what a call is compared with
    arrays = (x, out) if plan._enter else (x, out, None)  # noqa: SLF001

    def micros(run: Run) -> float:
        times = []
        for _ in range(ROUNDS):
            before = time.perf_counter()
            for _ in range(1000):
                run()
            times.append((time.perf_counter() - before) * 1e3)
        return min(times)

    inside, packed = micros(lambda: kernel(*arrays)), micros(lambda: convdispatch.plan(x, w, padding="SAME"))
    call, whole = micros(lambda: plan(x, out=out)), micros(lambda: convdispatch.conv2d(x, w, padding="SAME"))
    print(f"  plan(x, out=y): {call:.1f} us, {call - inside:.1f} us above its way into compiled code")
    print(f"  conv2d(x, w): {whole:.1f} us; making a plan {packed:.1f} us; {whole - packed - call:.1f} us above both")


def untuned() -> None:
    """What ``conv2d`` chooses without a profile, over the best of all that can be forced; both pack in every call."""
    for text in (*LAYERS, "1x14x14x256 * 3x3x256x256 SAME", "1x7x7x512 * 3x3x512x512 SAME"):
        problem = Problem.parse(text)
        x, w = np.ones(problem.input_shape, "f4"), np.ones(problem.filter_shape, "f4")
        able = [n for n, b in registry.available().items() if n != "direct" and b.rejects(problem) is None]
        calls = {name: functools.partial(convdispatch.conv2d, x, w, backend=name, **how(problem)) for name in able}
        medians = {name: ratio(call, calls["im2col"]) for name, call in calls.items()}
        best = min(medians, key=medians.__getitem__)
        found = convdispatch.explain(x, w, deployment="call", **how(problem)).chosen
        said = ratio(functools.partial(convdispatch.conv2d, x, w, **how(problem)), calls[best])
        print(f"  {text}: {found}, {said:.2f} of {best}")


def cold() -> None:
    """The first call of a new process whose kernels are compiled already, imports included, and what it is made of."""
    code = (
        "import time; a = time.perf_counter()\n"
        "import numpy as np; b = time.perf_counter()\n"
        "import convdispatch; c = time.perf_counter()\n"
        "import numba; d = time.perf_counter()\n"
        "x, w = np.ones((1, 56, 56, 64), 'f4'), np.ones((3, 3, 64, 64), 'f4')\n"
        "convdispatch.conv2d(x, w, padding='SAME'); e = time.perf_counter()\n"
        "print(e - a, b - a, c - b, d - c, e - d)\n"
    )
    rows = []
    for _ in range(6):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        rows.append([float(part) for part in done.stdout.split()])
    whole, numpy, own, numba, first = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    print(f"  {whole:.2f} s: NumPy {numpy:.2f}, convdispatch {own:.2f}, Numba {numba:.2f}, the first call {first:.2f}")


def callers() -> None:
    """What 32 threads that call one plan get done, over what one gets done."""
    problem = Problem.parse(LAYERS[1])
    x, w = np.ones(problem.input_shape, np.float32), np.ones(problem.filter_shape, np.float32)
    plan = convdispatch.plan(x, w, **how(problem))

    def rate(threads: int) -> float:
        done = [0] * threads
        end = time.perf_counter() + 1.0

        def work(number: int) -> None:
            out = plan(x)
            while time.perf_counter() < end:
                plan(x, out=out)
                done[number] += 1

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(done)

    ratios = [rate(32) / rate(1) for _ in range(3)]
    print(f"  32 callers over one: {statistics.median(ratios):.2f}x")


def memory() -> None:
    """The most memory that a large image takes besides its input and output."""
    code = (
        "import resource, numpy as np, convdispatch\n"
        "small = np.ones((1, 64, 64, 3), 'f4'); w = np.ones((3, 3, 3, 64), 'f4')\n"
        "convdispatch.conv2d(small, w, padding='SAME')\n"
        "x = np.ones((1, 4096, 4096, 3), 'f4'); y = np.ones((1, 4096, 4096, 64), 'f4')\n"
        "plan = convdispatch.plan(x, w, padding='SAME')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "plan(x, out=y)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print((after - before) / 1024, plan.workspace / 2**20, plan.candidate)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, told, candidate = done.stdout.split(maxsplit=2)
    print(f"  4096x4096x3 to 64: {float(peak):.1f} MiB measured, {float(told):.1f} MiB told, by {candidate.strip()}")


CLAIMS = {each.__name__: each for each in (epilogue, layouts, images, calls, untuned, cold, callers, memory)}


def main() -> None:
    """Measure what is asked for."""
    wanted = sys.argv[1:] or list(CLAIMS)
    if unknown := [name for name in wanted if name not in CLAIMS]:
        sys.exit(f"claims.py knows {', '.join(CLAIMS)}; got {', '.join(unknown)}")
    print(f"{machine.current().cpu}, {machine.usable_cores()} cores")
    for name in wanted:
        print(f"{name}: {(CLAIMS[name].__doc__ or '').strip()}")
        CLAIMS[name]()


if __name__ == "__main__":
    main()
