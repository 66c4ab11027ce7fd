"""The benchmark: what it says of scripted engines and scripted machines, and one real run."""

import contextlib
import importlib.util
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from click.testing import CliRunner, Result
from programs import run_well

from convdispatch import cli_bench, reference
from convdispatch.arguments import Array
from convdispatch.cli_bench import data
from convdispatch.problem import Problem
from convdispatch.tuning import child, engine_field, engines, workload
from convdispatch.tuning.bench import LayerResult, Report, Timing, bench
from convdispatch.tuning.busy import Conditions, Ticks, Watch
from convdispatch.tuning.engine_worker import EngineLostError, Worker, sample
from convdispatch.tuning.engines import Build, Case, Deployment
from convdispatch.tuning.workload import Layer, Workload

SMALL = "1x8x8x4 * 3x3x4x8 SAME"
QUIET = Conditions(0.01, 0.0, 0.0, 0.0)
HERE = f"{Path(__file__).stem}:"


# Engines that workers import from this file -------------------------------------------------------------------------


class Right:
    """The reference itself."""

    version = "1.0"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def rejects(self, problem: Problem) -> str | None:
        return "too many filters" if problem.k > 100 else None

    def deployments(self, case: Case) -> Mapping[str, Build]:
        exact = reference.conv2d(case.problem, case.x, case.w, case.bias, case.residual)
        return {"plain": lambda: Deployment(self.work, lambda _: self.spoil(exact))}

    def work(self) -> None:
        pass

    def spoil(self, exact: Array) -> Array:
        return exact


class Wrong(Right):
    def spoil(self, exact: Array) -> Array:
        return exact * np.float32(1.001)


class NotNumbers(Right):
    def spoil(self, exact: Array) -> Array:
        return np.where(exact > 1, np.float32(np.nan), exact)


class Misshapen(Right):
    def spoil(self, exact: Array) -> Array:
        return exact[:, 1:]


class Raising(Right):
    def work(self) -> None:
        raise ArithmeticError("cannot any more")


class Crashing(Right):
    def work(self) -> None:
        print("about to fall", file=__import__("sys").stderr, flush=True)
        os.kill(os.getpid(), signal.SIGABRT)


class Hanging(Right):
    def work(self) -> None:
        time.sleep(60)


class Talking(Right):
    def work(self) -> None:
        os.write(1, b"I print to what I think is stdout\n")


class Missing(Right):
    def __init__(self, threads: int) -> None:
        raise ImportError("No module named 'missing'")


class Choosing(Right):
    def deployments(self, case: Case) -> Mapping[str, Build]:
        def broken() -> Deployment:
            raise ValueError("not here")

        (quick,) = super().deployments(case).values()
        slow = Deployment(lambda: time.sleep(0.002), quick().result)
        return {"slow": lambda: slow, "quick": quick, "broken": broken}


class Forking(Right):
    """Starts a helper that keeps open whatever the worker has open, as some libraries do."""

    def work(self) -> None:
        helper = os.fork()
        if not helper:
            self.help()
            time.sleep(600)
            os._exit(0)
        with Path(os.environ["HELPERS"]).open("a") as file:
            file.write(f"{helper}\n")

    def help(self) -> None:
        pass


class HangingAtItsEnd(Forking):
    """Says no more, but does not end, and neither does its helper."""

    def work(self) -> None:
        super().work()
        os.closerange(3, 256)
        time.sleep(600)

    def help(self) -> None:
        os.closerange(3, 256)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


# Samples ------------------------------------------------------------------------------------------------------------


class Time:
    """A clock that calls move."""

    def __init__(self, *costs: float) -> None:
        self.now, self.calls, self.costs = 0.0, 0, costs

    def __call__(self) -> float:
        return self.now

    def run(self) -> None:
        self.now += self.costs[min(self.calls, len(self.costs) - 1)]
        self.calls += 1


def test_a_sample_is_the_median_after_untimed_calls() -> None:
    moving = Time(0.09, 0.005, 0.004, 0.030, 0.005)
    seconds, calls = sample(moving.run, 0.015, moving)
    assert seconds == pytest.approx(0.005)
    assert (calls, moving.calls) == (3, 5)


def test_short_calls_are_timed_several_at_once_and_long_ones_once() -> None:
    short, long = Time(1e-6), Time(0.5)
    seconds, calls = sample(short.run, 0.01, short)
    assert seconds == pytest.approx(1e-6)
    assert calls == pytest.approx(10_000, rel=0.05)
    assert sample(long.run, 0.015, long) == (0.5, 1)


# Statistics ---------------------------------------------------------------------------------------------------------


def result_of(times: Mapping[str, tuple[float, ...]], count: int = 1, conditions: Conditions = QUIET) -> LayerResult:
    timings = {name: Timing(name, "plain", 1e-7, seconds) for name, seconds in times.items()}
    return LayerResult(Layer(Problem.parse(SMALL), count, "layer"), timings, conditions)


def report_of(*results: LayerResult) -> Report:
    load = Workload("scripted", tuple(result.layer for result in results))
    return Report(load, 1, 3, results, dict.fromkeys(results[0].timings, "1"), {}, 1.0)


def test_ratios_are_paired_by_round() -> None:
    # The machine is twice as slow in every other round; medians alone would say 2 or 1.
    result = result_of({"own": (1.0, 2.0, 1.0, 2.0), "a": (3.0, 6.0, 3.0, 6.0), "b": (1.5, 3.0, 1.5, 3.0)})
    assert result.ratios == {"a": 3.0, "b": 1.5}
    assert (result.rival, result.ratio) == ("b", 1.5)


def test_median_best_and_spread() -> None:
    timing = Timing("a", seconds=(4.0, 1.0, 2.0, 3.0, 5.0))
    assert (timing.median, timing.best) == (3.0, 1.0)
    assert timing.spread == pytest.approx(2 / 3)
    assert Timing("a", seconds=(4.0,)).spread == 0


def test_geometric_mean_counts_layers_once_and_the_pass_by_their_counts() -> None:
    report = report_of(result_of({"own": (1.0,), "a": (4.0,)}, 3), result_of({"own": (2.0,), "a": (2.0,)}, 1))
    assert report.geometric_mean == pytest.approx(2.0)
    assert report.pass_ratio == pytest.approx((3 * 4 + 2) / (3 * 1 + 2))


def test_layers_without_a_rival_are_left_out() -> None:
    report = report_of(result_of({"own": (1.0,), "a": ()}), result_of({"own": (1.0,), "a": (3.0,)}))
    assert report.layers[0].ratio is None
    assert report.geometric_mean == pytest.approx(3.0)
    assert report_of(report.layers[0]).geometric_mean is None


# The machine --------------------------------------------------------------------------------------------------------


class Scripted(Watch):
    """A machine that behaves as told."""

    loops: ClassVar[tuple[tuple[float, float], ...]] = ((1.0, 1.0),)
    account: ClassVar[tuple[Ticks | None, ...]] = (None, None)

    def __init__(self) -> None:
        super().__init__()
        self._loop, self._tick = 0, 0

    def loop(self) -> tuple[float, float]:
        self._loop += 1
        return self.loops[(self._loop - 1) % len(self.loops)]

    def ticks(self) -> Ticks | None:
        self._tick += 1
        return self.account[self._tick - 1]

    def tasks(self) -> float | None:
        return None


def watched(
    loops: tuple[tuple[float, float], ...], account: tuple[Ticks | None, Ticks | None], workers: float = 0.0
) -> Conditions:
    watch = type("Machine", (Scripted,), {"loops": loops, "account": account})()
    watch.start(0.0)
    for _ in range(8):
        watch.calibrate()
    conditions: Conditions = watch.stop(workers)
    return conditions


START = Ticks(100.0, 1.0, 1000.0)


def test_a_quiet_machine_has_no_complaints() -> None:
    conditions = watched(((1.0, 1.0), (1.02, 1.02)), (START, Ticks(110.0, 1.0, 1020.0)), workers=9.9)
    assert conditions.others == pytest.approx(0.005, abs=0.001)
    assert conditions.complaints() == []


@pytest.mark.parametrize(
    ("loops", "after", "said"),
    [
        (((1.0, 1.0), (1.5, 1.5)), START, "varied"),
        (((1.0, 0.9),), START, "waited"),
        (((1.0, 1.0),), Ticks(120.0, 1.0, 1020.0), "other processes used 50.0%"),
        (((1.0, 1.0),), Ticks(110.0, 3.0, 1020.0), "hypervisor kept 10.0%"),
    ],
)
def test_each_sign_of_a_busy_machine_is_a_complaint(
    loops: tuple[tuple[float, float], ...], after: Ticks, said: str
) -> None:
    (complaint,) = watched(loops, (START, after), workers=10.0).complaints()
    assert said in complaint


def test_a_system_that_says_nothing_is_judged_by_the_loop_alone() -> None:
    conditions = watched(((1.0, 1.0),), (None, None))
    assert (conditions.others, conditions.steal) == (None, None)
    assert conditions.complaints() == []


def test_this_machine_can_be_watched() -> None:
    watch = Watch()
    watch.start(0.0)
    watch.calibrate()
    watch.calibrate()
    conditions = watch.stop(0.0)
    assert conditions.spread >= 0
    assert 0 <= conditions.waiting <= 1


# Whole runs, with workers in this process ---------------------------------------------------------------------------


class Puppet:
    """Stands in for a worker: right results, scripted samples."""

    times: ClassVar[dict[str, list[float]]] = {}
    asked: ClassVar[list[str]] = []

    def __init__(self, name: str, *_: object) -> None:
        self.name, self.version = name, "1"
        self._times: Iterator[float] = iter(())

    def ask(self, **request: Any) -> dict[str, Any]:
        if request["do"] == "build":
            case = Case.of(Problem.parse(request["problem"]))
            np.save(request["output"], reference.conv2d(case.problem, case.x, case.w))
            self._times = iter(self.times[self.name])
            return {"deployment": "plain", "tried": {}, "passed_over": {}}
        self.asked.append(self.name)
        return {"seconds": next(self._times), "calls": 1}

    def cpu_seconds(self) -> float:
        return 0.0

    def close(self) -> None:
        pass


@pytest.fixture
def puppets(monkeypatch: pytest.MonkeyPatch) -> type[Puppet]:
    monkeypatch.setattr(engine_field, "Worker", Puppet)
    monkeypatch.setattr(Puppet, "times", {"own": [1.0, 2.0, 1.0], "a": [2.0, 4.0, 3.0]})
    monkeypatch.setattr(Puppet, "asked", [])
    return Puppet


def test_every_engine_gives_one_sample_a_round_in_shuffled_order(puppets: type[Puppet]) -> None:
    report = bench(workload.load(SMALL), ["a"], rounds=3, effort=None, own="own", watch=Scripted)
    assert report.layers[0].timings["own"].seconds == (1.0, 2.0, 1.0)
    assert report.layers[0].ratio == 2.0
    rounds = [puppets.asked[i : i + 2] for i in (0, 2, 4)]
    assert all(sorted(names) == ["a", "own"] for names in rounds)


def test_a_layer_measured_while_busy_is_measured_again(puppets: type[Puppet]) -> None:
    made: list[Watch] = []

    def first_busy() -> Watch:
        loops = ((1.0, 1.0),) if made else ((1.0, 0.5),)
        made.append(type("Machine", (Scripted,), {"loops": loops})())
        return made[-1]

    report = bench(workload.load(SMALL), ["a"], rounds=3, effort=None, own="own", watch=first_busy)
    assert (len(made), report.busy) == (2, [])


def test_a_layer_that_no_memory_holds_fails_and_the_others_go_on(puppets: type[Puppet]) -> None:
    large = "1x9999999x9999999x100 * 1x1x100x1 VALID"
    load = Workload("two", tuple(Layer(Problem.parse(text)) for text in (large, SMALL)))
    failed, done = bench(load, ["a"], rounds=3, effort=None, own="own", watch=Scripted).layers
    assert "no memory for the arrays" in failed.own.reason
    assert all(timing.reason and not timing.seconds for timing in failed.timings.values())
    assert done.ratio == 2.0


# Whole runs, with processes -----------------------------------------------------------------------------------------


def run(*against: str, own: str = "Right", problem: str = SMALL, timeout: float = 30.0) -> Report:
    names = [HERE + name for name in against]
    load = workload.load(problem)
    return bench(load, names, rounds=2, threads=1, effort=None, timeout=timeout, sample=0.001, own=HERE + own,
                 attempts=1, watch=Scripted)  # fmt: skip


@pytest.mark.usefixtures("importable")
def test_wrong_results_are_named_and_not_timed() -> None:
    timings = run("Wrong", "NotNumbers", "Misshapen", "Talking").layers[0].timings
    assert timings[HERE + "Right"].error == pytest.approx(0, abs=1e-6)
    for name in ("Wrong", "NotNumbers", "Misshapen"):
        assert timings[HERE + name].wrong
        assert not timings[HERE + name].seconds
    assert "error 0.001 " in timings[HERE + "Wrong"].reason
    assert "shape (1, 7, 8, 8) instead of (1, 8, 8, 8)" in timings[HERE + "Misshapen"].reason
    assert len(timings[HERE + "Talking"].seconds) == 2


@pytest.mark.usefixtures("importable")
def test_nothing_is_tuned_or_measured_where_no_other_engine_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convdispatch.tuning.tuner.tune", None)
    found = bench(workload.load(SMALL), [HERE + "Missing"], rounds=2, own=HERE + "Right", watch=Scripted)
    assert (list(found.missing), found.layers, found.peak) == ([HERE + "Missing"], (), None)


@pytest.mark.usefixtures("importable")
def test_engines_that_are_missing_crash_or_raise_leave_the_rest_alone() -> None:
    report = run("Missing", "Crashing", "Raising", "Choosing")
    timings = report.layers[0].timings
    assert report.missing == {HERE + "Missing": "ImportError: No module named 'missing'"}
    assert "SIGABRT" in timings[HERE + "Crashing"].reason
    assert "ArithmeticError: cannot any more" in timings[HERE + "Raising"].reason
    chosen = timings[HERE + "Choosing"]
    assert (chosen.deployment, chosen.passed_over) == ("quick", {"broken": "ValueError: not here"})
    assert set(chosen.tried) == {"slow", "quick"}
    assert report.layers[0].rival == HERE + "Choosing"


@pytest.mark.usefixtures("importable")
def test_an_engine_that_hangs_is_given_up() -> None:
    report = run("Hanging", timeout=5.0)
    assert report.layers[0].timings[HERE + "Hanging"].reason == "gave no answer within 5 s"
    assert report.layers[0].own.seconds


@pytest.mark.usefixtures("importable")
def test_what_an_engine_rejects_has_a_reason() -> None:
    report = run("Right", own="Talking", problem="1x4x4x2 * 1x1x2x101 VALID")
    assert report.layers[0].own.reason == "too many filters"


@pytest.mark.usefixtures("importable")
def test_an_empty_batch_is_a_layer_like_any() -> None:
    for timing in run("Right", own="Talking", problem="0x8x8x4 * 3x3x4x8 SAME").layers[0].timings.values():
        assert (timing.reason, timing.error) == ("", 0.0)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="idle workers are not stopped here")
@pytest.mark.usefixtures("importable")
def test_an_idle_worker_is_stopped_and_can_be_ended() -> None:
    worker = Worker(HERE + "Right", 1, 30.0, {})
    state = Path(f"/proc/{worker._child.pid}/stat")
    patience = time.monotonic() + 5
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < patience, "still running"
    assert worker.version == "1.0"
    worker.close()
    with pytest.raises((EngineLostError, ValueError)):
        worker.ask(do="sample", seconds=0.001)


def gone(process: int) -> bool:
    """Return whether a process ends soon; one that nobody has asked about its end is a zombie."""
    state = Path(f"/proc/{process}/stat")
    for _ in range(500):
        try:
            if state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def helpers(importable: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], list[int]]]:
    """What tells the processes that engines forked; none of them outlives the test."""
    file = tmp_path / "helpers"
    monkeypatch.setenv("HELPERS", str(file))

    def forked() -> list[int]:
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    yield forked
    for process in forked():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_what_an_engine_forked_ends_with_it(helpers: Callable[[], list[int]], tmp_path: Path) -> None:
    worker = Worker(HERE + "Forking", 1, 30.0, {})
    answer = worker.ask(do="build", problem=SMALL, output=str(tmp_path / "result.npy"))
    assert "reason" not in answer
    assert helpers()
    worker.close()
    assert all(gone(helper) for helper in helpers())
    assert not worker._child._reader.is_alive()  # nobody holds the pipe any more
    assert worker._child._process.stdout is not None
    assert worker._child._process.stdout.closed


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_an_engine_that_hangs_at_its_end_is_ended_with_what_it_forked(
    helpers: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(child, "_LAST_WORDS", 0.1)
    worker = Worker(HERE + "HangingAtItsEnd", 1, 30.0, {})
    with pytest.raises(EngineLostError, match=r"crashed \(SIGKILL\)"):
        worker.ask(do="build", problem=SMALL, output=str(tmp_path / "result.npy"))
    assert len(helpers()) == 1
    assert gone(worker._child._process.pid)
    assert gone(helpers()[0])
    assert not worker._child._reader.is_alive()


def test_an_interpreter_that_does_not_exist_is_a_reason() -> None:
    with pytest.raises(EngineLostError, match="No such file"):
        Worker("scipy@/nowhere/python", 1, 30.0, {})


# The command --------------------------------------------------------------------------------------------------------


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(cli_bench.bench, [str(word) for word in words])


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Report], None]:
    def use(report: Report) -> None:
        monkeypatch.setattr(cli_bench, "run_bench", lambda *_, **__: report)

    return use


BUSY = Conditions(0.3, 0.0, 0.4, 0.0)
TIMES: Mapping[str, tuple[float, ...]] = {"convdispatch": (1e-3, 1e-3), "torch": (3e-3, 3e-3)}


def test_a_quiet_run_ends_with_a_verdict(scripted: Callable[[Report], None]) -> None:
    scripted(report_of(result_of(TIMES)))
    done = command(SMALL, "--against", "torch", "onnxruntime,scipy")
    assert done.exit_code == 0, done.output
    assert "geometric mean 3.00x" in done.stdout
    assert "one pass, every layer as often as it runs: 3.00x" in done.stdout


def test_a_busy_run_has_no_verdict_and_says_why(scripted: Callable[[Report], None]) -> None:
    scripted(report_of(result_of(TIMES, conditions=BUSY), result_of(TIMES)))
    done = command(SMALL, "--against", "torch")
    assert done.exit_code == 5
    assert "busy: no verdict" in done.stdout
    assert "varied by 30.0%, other processes used 40.0% of the cores" in done.stdout
    assert "geometric" not in done.stdout


def test_a_busy_verdict_that_is_asked_for_is_marked(scripted: Callable[[Report], None]) -> None:
    scripted(report_of(result_of(TIMES, conditions=BUSY)))
    done = command(SMALL, "--against", "torch", "--allow-busy")
    assert done.exit_code == 0
    assert "geometric mean 3.00x" in done.stdout
    assert "(busy: not to be relied on)" in done.stdout
    assert "3.00x busy" in done.stdout


def test_own_failure_and_nothing_to_compare_have_their_exit_code(scripted: Callable[[Report], None]) -> None:
    broken = {"convdispatch": Timing("convdispatch", error=math.inf, reason="wrong result", wrong=True)}
    scripted(report_of(LayerResult(result_of(TIMES).layer, broken, QUIET)))
    done = command(SMALL, "--against", "torch")
    assert done.exit_code == 4
    assert "convdispatch on 1x8x8x4 * 3x3x4x8 SAME: wrong result" in done.stdout


def test_what_others_wrote_is_printed_as_it_is(scripted: Callable[[Report], None]) -> None:
    awkward = "no [/usr/lib/x.so] [bold]"
    result = result_of(TIMES)
    timings = {**result.timings, "scipy": Timing("scipy", reason=awkward)}
    report = report_of(replace(result, layer=replace(result.layer, name="block[conv]"), timings=timings))
    scripted(replace(report, workload=replace(report.workload, title=awkward)))
    done = command(SMALL, "--against", "torch", "--verbose")
    assert done.exit_code == 0, done.output
    assert done.stdout.count(awkward) == 2
    assert "block[conv]" in done.stdout


def test_json_has_every_round_and_no_ratio_of_a_busy_layer() -> None:
    report = report_of(result_of(TIMES, conditions=BUSY), result_of(TIMES))
    found = json.loads(json.dumps(data(report, allow_busy=False)))
    assert (found["verdict"], found["geometric_mean"], found["pass_ratio"]) == (False, None, None)
    assert [layer["ratio"] for layer in found["layers"]] == [None, pytest.approx(3.0)]
    assert found["layers"][0]["conditions"]["others"] == 0.4
    torch = found["layers"][1]["engines"]["torch"]
    assert torch["rounds"] == [3e-3, 3e-3]
    assert torch["gflops"] == pytest.approx(Problem.parse(SMALL).flops / 3e-3 / 1e9)
    assert data(report, allow_busy=True)["geometric_mean"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((SMALL, "--against", "torhc"), "no engine is called 'torhc'; known are torch,"),
        ((SMALL, "torch"), "engines come after --against"),
        (("resnet50", "--layers", "nothing*"), "no layer of resnet50 matches 'nothing*'"),
        (("resnet51",), "did you mean resnet50"),
    ],
)
def test_mistakes_are_explained(words: tuple[str, ...], said: str) -> None:
    done = command(*words)
    assert done.exit_code == 1
    assert said in done.stderr


def test_layers_are_chosen_by_name_or_by_problem() -> None:
    assert [layer.name for layer in cli_bench._chosen("resnet50", 4, "conv1").layers] == ["conv1"]
    few = cli_bench._chosen("resnet50", 4, "* 7x7x")
    assert [layer.problem.n for layer in few.layers] == [4]


PEERS = [
    pytest.param(name, marks=pytest.mark.skipif(any(importlib.util.find_spec(m) is None for m in needs), reason=name))
    for name, needs in {
        "scipy": (), "torch": ("torch",), "onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "onnx"),
        "opencv": ("cv2", "onnx"), "xnnpack": ("ai_edge_litert", "flatbuffers"),
    }.items()
]  # fmt: skip


@pytest.mark.parametrize("peer", PEERS)
def test_a_real_run(peer: str, tmp_path: Path) -> None:
    words = (SMALL, "--against", peer, "--rounds", "2", "--sample", "0.001", "--threads", "1", "--no-tune")
    done = command(*words, "--json", "--allow-busy", "--profile", tmp_path / "profile.yaml")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (layer,) = found["layers"]
    assert list(layer["engines"]) == ["convdispatch", peer]
    assert all(len(row["rounds"]) == 2 and row["error"] < 1e-5 for row in layer["engines"].values())
    assert layer["ratio"] > 0
    assert found["geometric_mean"] == pytest.approx(layer["ratio"])


def test_the_names_of_engines_are_known() -> None:
    with pytest.raises(KeyError):
        engines.make("nobody", 1)
    assert isinstance(engines.make(f"{__name__}:Right", 3), Right)


@pytest.mark.parametrize(
    "text",
    ["1x20x33x1 * 9x4x1x2 SAME", "2x20x21x3 * 5x7x1x3 pad=1,2,3,4 dilation=2x1", "1x20x30x1 * 5x5x1x1 SAME stride=2x3"],
)
def test_two_passes_make_the_same_as_the_whole_filter(text: str) -> None:
    case = engines.Case.of(Problem.parse(f"{text} separable"))
    assert case.two is not None
    x = case.x.astype(np.float64)
    for each in case.two:
        assert each.problem.input_shape == x.shape
        x = reference.convolve(each.problem, x, each.w)
    np.testing.assert_allclose(x, reference.convolve(case.problem, case.x, case.w), rtol=1e-5, atol=1e-5)


def test_filters_that_are_not_separable_have_no_two_passes() -> None:
    assert set(engines.Case.of(Problem.parse("1x20x33x1 * 9x4x1x2 SAME")).ways) == {""}


_DEPLOYMENTS = """
import sys
import numpy as np
from convdispatch import reference
from convdispatch.problem import Problem
from convdispatch.tuning import engines

for text in (
    "1x40x50x1 * 9x4x1x2 SAME separable", "1x40x50x3 * 5x5x1x3 SAME separable",
    "1x41x50x3 * 5x4x1x3 SAME stride=2x3 separable",
):
    case = engines.Case.of(Problem.parse(text))
    expected = reference.convolve(case.problem, case.x, case.w)
    for how, build in engines.make({name!r}, 1).deployments(case).items():
        deployment = build()
        got = deployment.result(deployment.run())
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4, err_msg=how)
"""


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("torch", "torch"),
        ("onnxruntime", "onnxruntime"),
        ("openvino", "openvino"),
        ("opencv", "cv2"),
        ("scipy", "scipy"),
    ],
)
def test_every_deployment_of_separable_filters_is_right(name: str, module: str) -> None:
    if not all(importlib.util.find_spec(each) for each in (module, "onnx")):
        pytest.skip("the engine, or onnx, is not installed")
    run_well(_DEPLOYMENTS.format(name=name), 120)
