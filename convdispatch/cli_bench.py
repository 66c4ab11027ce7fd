"""``convdispatch bench``: convdispatch against the engines that people use, on their own machine."""

import fnmatch
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from convdispatch import exit_codes, machine, report
from convdispatch.errors import ArgumentError
from convdispatch.terminal import (
    Seconds,
    console,
    explained,
    json_option,
    print_json,
    print_table,
    profile_option,
    say,
    scope,
    table,
    tell_of_waiting,
    thread_count,
)
from convdispatch.tuning import workload
from convdispatch.tuning.bench import SAMPLE, LayerResult, Report, Timing
from convdispatch.tuning.bench import bench as run_bench
from convdispatch.tuning.engines import PEERS
from convdispatch.tuning.race import RULES
from convdispatch.tuning.workload import Workload
from convdispatch.units import threads_text, time_text


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("what", metavar="WORKLOAD")
@click.argument("more", nargs=-1, metavar="")
@click.option("--against", multiple=True, metavar="ENGINE...", help="Engines to compare with; all known if unsaid.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Samples of each engine.")
@click.option("--threads", type=thread_count, help="Threads of every engine; all usable cores if unsaid.")
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Images a call, instead of the workload's.")
@click.option(
    "--layers", metavar="PATTERN", help="Only layers whose name matches, or whose name or problem contains, this."
)
@click.option(
    "--effort", type=click.Choice(list(RULES)), default="measure", show_default=True,
    help="How hard convdispatch is tuned first, where the profile does not know.",
)  # fmt: skip
@click.option("--no-tune", is_flag=True, help="Take what the profile knows, and estimates for the rest.")
@click.option(
    "--sample", type=Seconds(some=True), default=SAMPLE, show_default=True, metavar="SECONDS",
    help="Length of one sample.",
)  # fmt: skip
@click.option(
    "--timeout", type=Seconds(some=True), default=120.0, show_default=True, metavar="SECONDS",
    help="An engine that does not answer for so long is given up.",
)  # fmt: skip
@click.option("--allow-busy", is_flag=True, help="Give a verdict, marked, even if the machine was busy.")
@profile_option
@click.option("--verbose", "-v", is_flag=True, help="Every engine of every layer: how it ran, or why not.")
@json_option
@explained
def bench(
    what: str,
    more: Sequence[str],
    against: Sequence[str],
    rounds: int,
    threads: int | None,
    batch: int | None,
    layers: str | None,
    effort: str,
    no_tune: bool,
    sample: float,
    timeout: float,
    allow_busy: bool,
    file: Path | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Compare convdispatch with other engines on every layer of WORKLOAD, as --against torch onnxruntime openvino.

    WORKLOAD is written as in tune: a packaged one, a YAML file, an ONNX model, or a problem.

    Engines: torch, onnxruntime, openvino, xnnpack (LiteRT), opencv, scipy; module:class for your own; ENGINE@PYTHON
    for one that is installed for another interpreter. Each runs in its own process with the same threads, in its
    fastest deployment, is checked against the float64 reference, and takes turns with the others in every round.
    Ratios are the best other engine's time over convdispatch's. There is no verdict if the machine was busy.
    """
    with scope(threads, file):
        load = _chosen(what, batch, layers)
        found = run_bench(
            load,
            _engines(against, more),
            rounds=rounds,
            threads=threads,
            effort=None if no_tune else effort,
            timeout=timeout,
            sample=sample,
            attempts=1 if allow_busy else 2,
            on_progress=_said(len(load.layers)),
            on_tuned=lambda layer: say(f"tuning {report.said_of(layer)}", err=True),
            on_wait=tell_of_waiting,
        )
    if as_json:
        print_json(data(found, allow_busy=allow_busy))
    else:
        _print(found, allow_busy=allow_busy, verbose=verbose)
    sys.exit(_exit_code(found, allow_busy=allow_busy))


def _chosen(what: str, batch: int | None, layers: str | None) -> Workload:
    load = workload.load(what)
    if batch is not None:
        load = load.with_batch(batch)
    load = load.distinct()
    if layers is None:
        return load
    few = tuple(x for x in load.layers if fnmatch.fnmatchcase(x.name, layers) or layers in f"{x.name} {x.problem}")
    if not few:
        names = ", ".join(layer.name or layer.problem.text for layer in load.layers)
        raise ArgumentError(f"no layer of {load.name} matches {layers!r}; layers are {names}")
    return replace(load, layers=few)


def _engines(against: Sequence[str], more: Sequence[str]) -> list[str]:
    """Return the engines' names: after ``--against`` several may follow, with blanks or commas between them."""
    if more and not against:
        raise ArgumentError(f"what is {more[0]!r}? engines come after --against, and there is one WORKLOAD before it")
    names = [name.strip() for words in (*against, *more) for name in words.split(",") if name.strip()]
    for name in names:
        if ":" not in name.partition("@")[0] and name.partition("@")[0] not in PEERS:
            raise ArgumentError(f"no engine is called {name!r}; known are {', '.join(PEERS)}, or give module:class")
    return names or list(PEERS)


def _said(total: int) -> Any:
    done = 0

    def line(result: LayerResult) -> None:
        nonlocal done
        done += 1
        marks = [f"{_label(t.engine)} {time_text(t.median) if t.seconds else '-'}" for t in result.timings.values()]
        say(f"[{done}/{total}] {result.layer.problem}: {', '.join(marks)}", err=True)

    return line


# What it says -------------------------------------------------------------------------------------------------------


def _failed(found: Report) -> list[str]:
    """Return on which layers convdispatch failed, and why."""
    return [f"{x.layer.name or x.layer.problem}: {x.own.reason}" for x in found.layers if x.own.reason]


def _exit_code(found: Report, *, allow_busy: bool) -> int:
    if _failed(found) or not found.compared:
        return exit_codes.FAILED
    return exit_codes.BUSY if found.busy and not allow_busy else exit_codes.DONE


def _label(engine: str) -> str:
    """Return an engine's name without the interpreter that runs it."""
    return engine.partition("@")[0]


def _rate(layer: LayerResult, timing: Timing) -> str:
    if not timing.seconds:
        return "wrong" if timing.wrong else "-"
    return f"{report.rate_text(layer.layer.problem, timing.best)} ±{timing.spread / 2:.0%}"


def _ratio_text(result: LayerResult, *, allow_busy: bool) -> str:
    ratio = result.ratio
    if ratio is None:
        return "-"
    if not result.conditions.complaints():
        return f"{ratio:.2f}x"
    return f"{ratio:.2f}x busy" if allow_busy else "busy"


def _print(found: Report, *, allow_busy: bool, verbose: bool) -> None:
    out = console()
    here = machine.current()
    out.print(found.workload.title or found.workload.name, style="bold")
    out.print(f"{here.cpu}, {threads_text(found.threads, here.cores)}, {found.rounds} rounds")
    versions = [f"{_label(name)} {version}" for name, version in found.versions.items()]
    out.print(", ".join(versions))
    if found.layers:
        _print_layers(out, found, allow_busy=allow_busy, verbose=verbose)
    for line in _lines(found, allow_busy=allow_busy, verbose=verbose):
        out.print(line)


def _print_layers(out: Console, found: Report, *, allow_busy: bool, verbose: bool) -> None:
    engines = [name for name in found.layers[0].timings if name in found.versions]
    rows = table(
        "GFLOP/s of each engine's best round ± half the spread of its rounds",
        ("layer", "count", "problem", "time", *map(_label, engines), "best other", "ratio"),
        right=("count", "time", *map(_label, engines), "ratio"),
    )
    for result in found.layers:
        own = time_text(result.own.median) if result.own.seconds else "-"
        rates = [_rate(result, result.timings[name]) for name in engines]
        head = result.layer.name, str(result.layer.count), str(result.layer.problem), own
        rows.add_row(*head, *rates, _label(result.rival or "-"), _ratio_text(result, allow_busy=allow_busy))
    print_table(out, rows)
    if verbose:
        print_table(out, _details(found))


def _details(found: Report) -> Table:
    rows = table(
        "each engine: median of the rounds, the best round, and how it ran or why not",
        ("problem", "engine", "median", "best", "spread", "GFLOP/s", "error", "how"),
        right=("median", "best", "spread", "GFLOP/s", "error"),
    )
    for result in found.layers:
        for timing in result.timings.values():
            error = "-" if timing.error is None else f"{timing.error:.1e}"
            if timing.seconds:
                rate = report.rate_text(result.layer.problem, timing.median)
                times = time_text(timing.median), time_text(timing.best), f"{timing.spread:.1%}", rate
            else:
                times = ("-",) * 4
            how = timing.reason or timing.deployment
            rows.add_row(str(result.layer.problem), _label(timing.engine), *times, error, how)
    return rows


def _lines(found: Report, *, allow_busy: bool, verbose: bool) -> list[str]:
    """Return what follows the table: who is missing or wrong, and the verdict or why there is none."""
    lines = [f"not here: {name}: {reason}" for name, reason in found.missing.items()]
    for result in found.layers:
        lines += [
            f"{_label(timing.engine)} on {result.layer.problem}: {timing.reason}"
            for timing in result.timings.values()
            if timing.wrong or (timing.reason and timing is result.own)
        ]
    absent = sum(
        not t.seconds for result in found.layers for t in result.timings.values() if t.engine in found.versions
    )
    if absent and not verbose:
        lines.append("'-' is an engine that did not do a layer; --verbose says why")
    if not found.compared:
        return [*lines, "no verdict: there is nothing to compare with"]
    if found.busy and not allow_busy:
        said = [f"  {line}" for line in found.busy]
        return [*lines, "busy: no verdict. Measure on an idle machine, or see the numbers with --allow-busy:", *said]
    mark = " (busy: not to be relied on)" if found.busy else ""
    if found.direct:
        (lowest, part), (_, best) = (pick(found.direct, key=lambda pair: pair[1]) for pick in (min, max))
        worst = lowest.layer.name or lowest.layer.problem
        lines.append(
            f"a loop of products alone does {(found.peak or 0) / 1e9:.0f} GFLOP/s here; without a transform, and from "
            f"50 MFLOP on, convdispatch reached {part:.0%} ({worst}) to {best:.0%} of it{mark}"
        )
    count = len(found.compared)
    whole = "" if count == len(found.layers) else f" of the {count} compared"
    ratios = [ratio for _, ratio in found.compared]
    lines.append(
        f"convdispatch over the best other engine of each layer: geometric mean{whole} {found.geometric_mean:.2f}x, "
        f"least {min(ratios):.2f}x, most {max(ratios):.2f}x{mark}"
    )
    lines.append(f"one pass, every layer as often as it runs: {found.pass_ratio:.2f}x{mark}")
    return [*lines, *(f"busy at {line}" for line in found.busy)]


def data(found: Report, *, allow_busy: bool) -> dict[str, Any]:
    """Return a run as plain data for JSON; where the machine was busy, ratios are there only if that is allowed."""
    stands = allow_busy or not found.busy
    return {
        "workload": found.workload.name,
        "machine": machine.current().describe(),
        "threads": found.threads,
        "rounds": found.rounds,
        "seconds": found.seconds,
        "versions": dict(found.versions),
        "missing": dict(found.missing),
        "busy": found.busy,
        "verdict": stands and bool(found.compared),
        "peak": found.peak,
        "of_peak": {result.layer.problem.text: part for result, part in found.direct},
        "geometric_mean": found.geometric_mean if stands else None,
        "pass_ratio": found.pass_ratio if stands else None,
        "layers": [_layer_data(result, allow_busy=allow_busy) for result in found.layers],
    }


def _layer_data(result: LayerResult, *, allow_busy: bool) -> dict[str, Any]:
    stands = allow_busy or not result.conditions.complaints()
    return {
        "name": result.layer.name,
        "count": result.layer.count,
        "problem": result.layer.problem.text,
        "conditions": asdict(result.conditions),
        "busy": result.conditions.complaints(),
        "rival": result.rival,
        "ratio": result.ratio if stands else None,
        "ratios": result.ratios if stands else None,
        "engines": {name: _timing_data(result, timing) for name, timing in result.timings.items()},
    }


def _timing_data(result: LayerResult, timing: Timing) -> dict[str, Any]:
    row: dict[str, Any] = {
        "deployment": timing.deployment,
        "tried": dict(timing.tried),
        "passed_over": dict(timing.passed_over),
        "error": timing.error if timing.error is None or math.isfinite(timing.error) else None,
        "wrong": timing.wrong,
        "reason": timing.reason,
        "rounds": list(timing.seconds),
    }
    if timing.seconds:
        row |= {"median": timing.median, "best": timing.best, "spread": timing.spread}
        row["gflops"] = result.layer.problem.flops / timing.best / 1e9
    return row
