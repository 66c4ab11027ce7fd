"""The command line: ``convdispatch tune | calibrate | validate | warmup | explain | backends | bench | profile``.

What they end with is in ``exit_codes``.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

import convdispatch
from convdispatch import exit_codes, heuristic, machine, quarantine, registry, report
from convdispatch.arguments import DEPLOYMENTS
from convdispatch.cli_bench import bench
from convdispatch.cli_profile import profile_group
from convdispatch.cli_validate import calibrate, validate
from convdispatch.errors import printable
from convdispatch.explain import cells, explain_problem
from convdispatch.machine import Machine
from convdispatch.problem import Problem
from convdispatch.terminal import (
    Seconds,
    UserFile,
    console,
    explained,
    json_option,
    print_json,
    print_table,
    print_what_can_be_printed,
    profile_option,
    read_option,
    resumable,
    say,
    scope,
    table,
    tell_of_waiting,
    threads_option,
)
from convdispatch.tuning import cluster, stakes, tuner, workload
from convdispatch.tuning.cluster import Cluster
from convdispatch.tuning.layers import LayerReport
from convdispatch.tuning.race import RULES
from convdispatch.tuning.tuner import TuneReport
from convdispatch.tuning.warmup import warm_up
from convdispatch.tuning.workload import Workload
from convdispatch.units import threads_text


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(convdispatch.__version__, prog_name="convdispatch")
def main() -> None:
    """2-D convolution on CPUs that knows, by measurement, which algorithm is fastest here."""
    print_what_can_be_printed()


main.add_command(bench)
main.add_command(profile_group)
main.add_command(calibrate)
main.add_command(validate)

# tune -----------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("what", required=False)
@click.option(
    "--from",
    "recording",
    type=UserFile(),
    metavar="FILE",
    help="Tune what a program called, where most time went first: a file of CONVDISPATCH_RECORD or record().",
)
@click.option(
    "--effort", type=click.Choice(list(RULES)), default="measure", show_default=True, help="How hard to look."
)
@click.option(
    "--time-limit", type=Seconds(), metavar="SECONDS",
    help="Nothing new begins after so long; what was begun is still compiled, checked and raced for three rounds.",
)  # fmt: skip
@threads_option
@click.option("--backends", metavar="NAME,...", help="Only these backends race; a faster winner that is known stays.")
@click.option(
    "--deployment",
    type=click.Choice([*DEPLOYMENTS, "both"]),
    default="both",
    show_default=True,
    help="Filters packed before (plan), in every call (call: what conv2d does), or each measured.",
)
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Images a call, instead of the workload's.")
@click.option("--retune", is_flag=True, help="Measure again what the profile knows.")
@click.option("--retry-quarantined", is_flag=True, help="Try backends again that the profile has in quarantine.")
@click.option("--allow-busy", is_flag=True, help="Measure though others use the machine; the results are marked.")
@click.option(
    "--dask",
    "scheduler",
    metavar="SCHEDULER",
    help="On every kind of machine of this Dask cluster: tcp://host:8786, or a scheduler file.",
)
@profile_option
@json_option
@resumable
def tune(
    what: str | None,
    recording: Path | None,
    effort: str,
    time_limit: float | None,
    threads: int | None,
    backends: str | None,
    deployment: str,
    batch: int | None,
    retune: bool,
    retry_quarantined: bool,
    allow_busy: bool,
    scheduler: str | None,
    file: Path | None,
    as_json: bool,
) -> None:
    """Measure which backend is fastest for each problem of WHAT or FILE, and keep the winners in the profile.

    WHAT is a packaged workload (resnet50, vgg16, mobilenetv2, efficientnet_b0, unet, first_layers, last_layers,
    filters1080p, smoothing1080p, downsampling1080p, signals, mixed), a YAML file, an ONNX model, or a problem such as
    "1x56x56x64 * 3x3x64x64 SAME". An interrupted run keeps what it has measured; the next one goes on from there. While
    others use the machine nothing is measured: after ten seconds of that it ends with exit code 5.

    With --dask, every kind of machine of the cluster is tuned, the layers spread over its hosts with one race at a time
    on each, and the profile here gets a section for each kind. Busy hosts are not waited for; their results are marked.
    """
    if (what is None) == (recording is None):
        raise click.UsageError("say what to tune: either WHAT or --from FILE")
    load = workload.load(recording if what is None else what)  # type: ignore[arg-type]  # one of them is there
    if batch is not None:
        load = load.with_batch(batch)
    load = load.distinct()
    deployments = DEPLOYMENTS if deployment == "both" else (deployment,)
    names = None if backends is None else [name.strip() for name in backends.split(",") if name.strip()]
    if names == []:
        raise click.UsageError(f"--backends must be names, such as im2col,fft; got {backends!r}")
    total = len(stakes.tasks(load, deployments, "", heuristic.budget_of(threads), threads=threads))
    how: dict[str, Any] = {
        "effort": effort, "time_limit": time_limit, "deployments": deployments, "retune": retune,
        "retry_quarantined": retry_quarantined,
    }  # fmt: skip
    if scheduler is not None:
        with scope(threads, file), cluster.connect(scheduler, threads=threads, backends=names) as found:
            _tune_across(found, load, how, as_json=as_json)
        return
    with scope(threads, file), _progress(total, load.name) as show:
        result = tuner.tune(
            load,
            threads=threads,
            backends=names,
            allow_busy=allow_busy,
            on_progress=show,
            on_wait=tell_of_waiting,
            **how,
        )
    if as_json:
        print_json(report.tune_data(result))
    else:
        _print_tune(result)
        with scope(threads, file):
            for line in report.not_taken(result.layers):
                say(line)
    _exit_of([result])


def _exit_of(results: Sequence[TuneReport]) -> None:
    """End with the code that says what is missing, if anything is."""
    if any(layer.status == "failed" for result in results for layer in result.layers):
        sys.exit(exit_codes.FAILED)
    if not all(result.complete for result in results):
        sys.exit(exit_codes.LEFT)


def _tune_across(found: Cluster, load: Workload, how: dict[str, Any], *, as_json: bool) -> None:
    """Tune on a Dask cluster, and print what was done on each kind of machine."""
    left_out = found.roster.left_out
    for left in left_out:
        say(f"left out: {left.address}: {left.reason}", err=True)
    told = len(left_out)
    with _bar(len(found.jobs(load, how["deployments"])), "tuning", load.name) as advance:
        result = found.tune(
            load, on_progress=lambda host, layer: advance(f"{host or '-'}: {report.said_of(layer)}"), **how
        )
    if as_json:
        print_json(report.cluster_data(result))
    else:
        for kind in result.kinds:
            _print_tune(kind.report, kind.machine, kind.hosts)
    for left in result.left_out[told:]:
        say(f"left out: {left.address}: {left.reason}", err=True)
    _exit_of([kind.report for kind in result.kinds])


@contextlib.contextmanager
def _progress(total: int, name: str) -> Iterator[Callable[[LayerReport], None]]:
    """Yield what to call with each layer: a bar on a terminal, a line elsewhere; on stderr both."""
    with _bar(total, "tuning", name) as advance:
        yield lambda layer: advance(report.said_of(layer))


@contextlib.contextmanager
def _bar(total: int, doing: str, name: str) -> Iterator[Callable[[str], None]]:
    """Yield what to call with a line about each step that is done."""
    out = console(stderr=True)
    if not out.is_terminal:
        numbers = itertools.count(1)
        yield lambda said: say(f"[{next(numbers)}/{total}] {said}", err=True)
        return
    head, last = (TextColumn(text, markup=False) for text in ("{task.fields[head]}", "{task.description}"))
    columns = (head, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), last)
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("...", total=total, head=f"{doing} {name}")
        yield lambda said: bar.update(task, advance=1, description=printable(said))


def _print_tune(result: TuneReport, here: Machine | None = None, hosts: Sequence[str] = ()) -> None:
    out = console()
    here = here or machine.current()
    out.print(result.workload.title or result.workload.name, style="bold")
    at = f" ({', '.join(hosts)})" if hosts else ""
    out.print(f"{here.cpu}, {threads_text(result.threads, here.cores)}, machine {result.machine}{at}")
    for deployment in dict.fromkeys(layer.deployment for layer in result.layers):
        layers = [layer for layer in result.layers if layer.deployment == deployment]
        packed = "packed before" if deployment == "plan" else "packed in every call"
        rows = table(
            f"{deployment}: filters {packed}",
            ("layer", "count", "problem", "winner", "time", "GFLOP/s", "vs worst", "vs direct"),
            right=("count", "time", "GFLOP/s", "vs worst", "vs direct"),
        )
        for layer in layers:
            rows.add_row(*report.tune_cells(layer))
        print_table(out, rows)
        out.print(report.total_line(layers))
    if (line := report.recorded_line(result.layers)) is not None:
        out.print(line)
    said = {
        "tuned": "measured now",
        "known": "known from the profile",
        "trivial": "without anything to compute",
        "left": "left when the time limit came",
        "failed": "that no backend could do",
    }
    counts = {status: sum(layer.status == status for layer in result.layers) for status in said}
    out.print(", ".join(f"{count} {said[status]}" for status, count in counts.items() if count), end="")
    out.print(f", in {result.seconds:.0f} s. Profile: {result.profile}")
    if result.flagged:
        out.print(f"{result.flagged} flagged busy: run again when the machine is quiet, and they are measured anew")
    for layer in result.layers:
        if layer.status == "failed":
            out.print(f"failed: {layer.layer.problem} ({layer.deployment}): {layer.reason}")
        for failure in layer.entry.failures if layer.entry else ():
            out.print(f"passed over: {failure.name} for {layer.layer.problem}: {failure.reason}")


@main.command()
@click.argument("what")
@threads_option
@resumable
def warmup(what: str, threads: int | None) -> None:
    """Compile every kernel that WHAT may need, so that no call waits for a compiler.

    WHAT is written as in tune. Compiled kernels are kept on disk and serve every shape.
    """
    load = workload.load(what).distinct()
    with scope(threads, None), _bar(len(load.layers), "compiling", load.name) as advance:
        count = warm_up(load, on_progress=lambda layer, _: advance(str(layer.problem)), on_wait=tell_of_waiting)
    problems = "1 problem" if len(load.layers) == 1 else f"{len(load.layers)} problems"
    say(f"{count} candidates for {problems} of {load.name} are ready")


# explain, backends ----------------------------------------------------------------------------------------------


@main.command()
@click.argument("problem")
@click.option("--deployment", type=click.Choice(DEPLOYMENTS), default="plan", show_default=True, help="As in tune.")
@threads_option
@read_option
@json_option
@explained
def explain(problem: str, deployment: str, threads: int | None, file: Path | None, as_json: bool) -> None:
    """Show which backend PROBLEM would get and why, and how every other backend stands.

    PROBLEM is written like "1x56x56x64 * 3x3x64x64 SAME stride=2": input, filters, padding, what is not the default.
    """
    with scope(threads, file):
        found = explain_problem(Problem.parse(problem), deployment)
    if as_json:
        print_json(report.explanation_data(found))
        return
    out = console()
    out.print(f"{found.problem}  ({found.deployment}, {found.threads} threads, {found.machine})")
    why = found.evidence if found.chosen else found.evidence.detail
    out.print(Text.assemble("chosen: ", (printable(found.chosen or "none"), "bold"), printable(f", {why}")))
    numbers = ("measured", "spread", "estimate", "error", "workspace")
    rows = table("", ("backend", "candidate", *numbers, "reason"), right=numbers, whole=("backend",))
    for row in found.rows:
        rows.add_row(*cells(row))
    print_table(out, rows, spare=("workspace", "error", "spread"))


@main.command()
@json_option
@explained
def backends(as_json: bool) -> None:
    """List the backends: built in and installed, with why any is unavailable or quarantined."""
    found = registry.available()
    missing = registry.unavailable()
    among = quarantine.held()
    held = {name: kept.reason for name, b in found.items() if (kept := quarantine.of(b, among)) is not None}
    if as_json:
        data = [
            {"name": name, "version": b.version, "numerics": b.numerics.kind, "summary": report.summary(b)}
            | ({"quarantined": held[name]} if name in held else {})
            for name, b in found.items()
        ]
        print_json({"available": data, "unavailable": missing})
        return
    rows = table("", ("backend", "version", "numerics", "what it is"), whole=("backend", "version", "numerics"))
    for name, backend in found.items():
        said = f"quarantined: {held[name]}" if name in held else report.summary(backend)
        rows.add_row(name, str(backend.version), backend.numerics.kind, said)
    for name, reason in missing.items():
        rows.add_row(name, "-", "-", f"unavailable: {reason}")
    print_table(console(), rows)
