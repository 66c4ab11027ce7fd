"""The command line: ``convdispatch tune | warmup | explain | backends | profile``.

Exit codes: 0 done, 1 an error that is explained, 2 wrong usage, 3 the time limit left problems untuned, 4 no backend
could do some problem, 130 interrupted.
"""

import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import convdispatch
from convdispatch import machine, profile, registry, report, settings
from convdispatch.cli_bench import bench
from convdispatch.cli_validate import calibrate, validate
from convdispatch.errors import ConvDispatchError
from convdispatch.explain import bytes_text, cells, explain_problem, time_text
from convdispatch.problem import Problem
from convdispatch.profile import DEPLOYMENTS, Entry
from convdispatch.tuning import tuner, workload
from convdispatch.tuning.race import RULES
from convdispatch.tuning.tuner import LayerReport, TuneReport
from convdispatch.tuning.warmup import warm_up

LEFT, FAILED, INTERRUPTED = 3, 4, 130
_WIDE = 10_000

Command = Callable[..., None]


def _console(*, stderr: bool = False) -> Console:
    """Return a console that cuts nothing off where output is not a terminal."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDE)


def _explained(command: Command) -> Command:
    """Turn errors into a line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ConvDispatchError as error:
            click.echo(f"convdispatch: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("convdispatch: interrupted; what was measured is kept, and the same command goes on", err=True)
            sys.exit(INTERRUPTED)

    return run


def _scope(threads: int | None, file: Path | None) -> contextlib.AbstractContextManager[object]:
    given: dict[str, Any] = {}
    if threads is not None:
        given["threads"] = threads
    if file is not None:
        given["profile"] = file
    return settings.options(**given)


_threads = click.option("--threads", type=click.IntRange(min=1), help="Most threads a candidate may use.")
_profile = click.option("--profile", "file", type=click.Path(path_type=Path), help="Profile file to read and write.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(convdispatch.__version__, prog_name="convdispatch")
def main() -> None:
    """2-D convolution on CPUs that knows, by measurement, which algorithm is fastest here."""


main.add_command(bench)
main.add_command(calibrate)
main.add_command(validate)

# tune -----------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("what")
@click.option(
    "--effort", type=click.Choice(list(RULES)), default="measure", show_default=True, help="How hard to look."
)
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS", help="Most time for the whole run.")
@_threads
@click.option("--backends", metavar="NAME,...", help="Only these backends take part.")
@click.option(
    "--deployment",
    type=click.Choice([*DEPLOYMENTS, "both"]),
    default="both",
    show_default=True,
    help="Filters packed before (plan), in every call (call: what conv2d does), or each measured.",
)
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Images a call, instead of the workload's.")
@click.option("--retune", is_flag=True, help="Measure again what the profile knows.")
@_profile
@_json
@_explained
def tune(
    what: str,
    effort: str,
    time_limit: float | None,
    threads: int | None,
    backends: str | None,
    deployment: str,
    batch: int | None,
    retune: bool,
    file: Path | None,
    as_json: bool,
) -> None:
    """Measure which backend is fastest for each problem of WHAT, and keep the winners in the profile.

    WHAT is a packaged workload (resnet50, vgg16, mobilenetv2, unet, filters1080p), a YAML file, or a problem such as
    "1x56x56x64 * 3x3x64x64 SAME". An interrupted run keeps what it has measured; the next one goes on from there.
    """
    load = workload.load(what)
    if batch is not None:
        load = load.with_batch(batch)
    load = load.distinct()
    deployments = DEPLOYMENTS if deployment == "both" else (deployment,)
    with _scope(threads, file), _progress(len(load.layers) * len(deployments), load.name) as show:
        result = tuner.tune(
            load,
            effort=effort,
            time_limit=time_limit,
            threads=threads,
            backends=None if backends is None else [name.strip() for name in backends.split(",") if name.strip()],
            deployments=deployments,
            retune=retune,
            on_progress=show,
        )
    if as_json:
        click.echo(json.dumps(report.tune_data(result), indent=2))
    else:
        _print_tune(result)
    if any(layer.status == "failed" for layer in result.layers):
        sys.exit(FAILED)
    if not result.complete:
        sys.exit(LEFT)


@contextlib.contextmanager
def _progress(total: int, name: str) -> Iterator[Callable[[LayerReport], None]]:
    """Yield what to call with each layer: a bar on a terminal, a line elsewhere; on stderr both."""
    with _bar(total, "tuning", name) as advance:
        yield lambda layer: advance(_said(layer))


@contextlib.contextmanager
def _bar(total: int, doing: str, name: str) -> Iterator[Callable[[str], None]]:
    """Yield what to call with a line about each step that is done."""
    console = _console(stderr=True)
    if not console.is_terminal:
        numbers = itertools.count(1)
        yield lambda said: click.echo(f"[{next(numbers)}/{total}] {said}", err=True)
        return
    columns = (TextColumn(f"{doing} {name}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("...", total=total)
        yield lambda said: bar.update(task, advance=1, description=said)


def _said(layer: LayerReport) -> str:
    what = f"{layer.layer.problem} ({layer.deployment})"
    if layer.entry is None:
        return f"{what}: {layer.status}{f', {layer.reason}' if layer.reason else ''}"
    winner = layer.entry.winner
    return f"{what}: {layer.status}, {winner.name} {time_text(winner.median)}"


def _print_tune(result: TuneReport) -> None:
    console = _console()
    here = machine.current()
    console.print(f"[bold]{result.workload.title or result.workload.name}[/bold]")
    console.print(f"{here.cpu}, {result.threads} of {here.cores} cores' threads, machine {result.machine}")
    for deployment in dict.fromkeys(layer.deployment for layer in result.layers):
        layers = [layer for layer in result.layers if layer.deployment == deployment]
        packed = "packed before" if deployment == "plan" else "packed in every call"
        table = _table(
            f"{deployment}: filters {packed}",
            ("layer", "count", "problem", "winner", "time", "GFLOP/s", "vs worst", "vs direct"),
            right=("count", "time", "GFLOP/s", "vs worst", "vs direct"),
        )
        for layer in layers:
            table.add_row(*report.tune_cells(layer))
        console.print(table)
        console.print(report.total_line(layers))
    said = {
        "tuned": "measured now",
        "known": "known from the profile",
        "left": "left when the time limit came",
        "failed": "that no backend could do",
    }
    counts = {status: sum(layer.status == status for layer in result.layers) for status in said}
    console.print(", ".join(f"{count} {said[status]}" for status, count in counts.items() if count), end="")
    console.print(f", in {result.seconds:.0f} s. Profile: {result.profile}")
    for layer in result.layers:
        if layer.status == "failed":
            console.print(f"failed: {layer.layer.problem} ({layer.deployment}): {layer.reason}", markup=False)
        for failure in layer.entry.failures if layer.entry else ():
            console.print(f"passed over: {failure.name} for {layer.layer.problem}: {failure.reason}", markup=False)


def _table(title: str, columns: Sequence[str], right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=True, overflow="fold")
    return table


@main.command()
@click.argument("what")
@_threads
@_explained
def warmup(what: str, threads: int | None) -> None:
    """Compile every kernel that WHAT may need, so that no call waits for a compiler.

    WHAT is written as in tune. Compiled kernels are kept on disk and serve every shape.
    """
    load = workload.load(what).distinct()
    with _scope(threads, None), _bar(len(load.layers), "compiling", load.name) as advance:
        count = warm_up(load, on_progress=lambda layer, _: advance(str(layer.problem)))
    click.echo(f"{count} candidates for the {len(load.layers)} problems of {load.name} are ready")


# explain, backends ----------------------------------------------------------------------------------------------


@main.command()
@click.argument("problem")
@click.option("--deployment", type=click.Choice(DEPLOYMENTS), default="plan", show_default=True, help="As in tune.")
@_threads
@_profile
@_json
@_explained
def explain(problem: str, deployment: str, threads: int | None, file: Path | None, as_json: bool) -> None:
    """Show which backend PROBLEM would get and why, and how every other backend stands.

    PROBLEM is written like "1x56x56x64 * 3x3x64x64 SAME stride=2": input, filters, padding, what is not the default.
    """
    with _scope(threads, file):
        found = explain_problem(Problem.parse(problem), deployment)
    if as_json:
        click.echo(json.dumps(report.explanation_data(found), indent=2))
        return
    console = _console()
    console.print(f"{found.problem}  ({found.deployment}, {found.threads} threads, {found.machine})", markup=False)
    console.print(f"chosen: [bold]{found.chosen or 'none'}[/bold], {found.evidence}")
    table = _table("", ("backend", "candidate", "measured", "spread", "estimate", "error", "workspace", "reason"))
    for row in found.rows:
        table.add_row(*cells(row))
    console.print(table)


@main.command()
@_json
@_explained
def backends(as_json: bool) -> None:
    """List the backends: built in and installed, with why any is unavailable."""
    found = registry.available()
    missing = registry.unavailable()
    if as_json:
        data = [
            {"name": name, "version": b.version, "numerics": b.numerics.kind, "summary": report.summary(b)}
            for name, b in found.items()
        ]
        click.echo(json.dumps({"available": data, "unavailable": missing}, indent=2))
        return
    table = _table("", ("backend", "version", "numerics", "what it is"))
    for name, backend in found.items():
        table.add_row(name, str(backend.version), backend.numerics.kind, report.summary(backend))
    for name, reason in missing.items():
        table.add_row(name, "-", "-", f"unavailable: {reason}")
    _console().print(table)


# profile --------------------------------------------------------------------------------------------------------


@main.group("profile")
def profile_group() -> None:
    """Look at what tuning learnt."""


@profile_group.command("path")
@click.option("--all", "every", is_flag=True, help="Every layer's file, those that win first.")
@_profile
@_json
@_explained
def path(every: bool, file: Path | None, as_json: bool) -> None:
    """Print the file that tuning writes."""
    with _scope(None, file):
        rows = [
            {"layer": layer, "path": str(place), "exists": place.exists(), "written": place == profile.writable_path()}
            for layer, place in profile.layers()
        ]
        if as_json:
            click.echo(json.dumps(rows, indent=2))
        elif every:
            for row in rows:
                notes = ["exists" if row["exists"] else "not there"] + ["written by tune"] * bool(row["written"])
                click.echo(f"{row['layer']:9} {row['path']} ({', '.join(notes)})")
        else:
            click.echo(profile.writable_path())


@profile_group.command("show")
@click.argument("containing", default="")
@_profile
@_json
@_explained
def show(containing: str, file: Path | None, as_json: bool) -> None:
    """Show the profile's entries whose key contains CONTAINING: what won, and by how much."""
    with _scope(None, file):
        place = profile.writable_path()
    entries = [entry for entry in profile.read(place).entries() if containing in str(entry.key)]
    if as_json:
        click.echo(json.dumps([_entry_data(entry) for entry in entries], indent=2))
        return
    if not entries:
        matching = f" whose key contains {containing!r}" if containing else ""
        click.echo(f"{place} has no entries{matching}; convdispatch tune WORKLOAD makes some")
        return
    right = ("threads", "time", "spread", "GFLOP/s", "next best")
    columns = ("problem", "for", "threads", "winner", "time", "spread", "GFLOP/s", "error", "workspace", "next best")
    table = _table(str(place), (*columns, "machine"), right)
    for entry in entries:
        table.add_row(*_entry_cells(entry))
    _console().print(table)


def _entry_cells(entry: Entry) -> tuple[str, ...]:
    key, winner = entry.key, entry.winner
    other = next((result for result in entry.results if result.backend != winner.backend), None)
    rival = "-" if other is None else f"{other.backend} {other.median / winner.median:.2f}x"
    return (
        str(key.problem), key.deployment, str(key.threads), winner.name, time_text(winner.median),
        f"{winner.spread:.1%}", report.rate_text(key.problem, winner.median), f"{winner.error:.1e}",
        bytes_text(winner.workspace), rival, key.machine,
    )  # fmt: skip


def _entry_data(entry: Entry) -> Mapping[str, Any]:
    key = {"problem": str(entry.key.problem), "deployment": entry.key.deployment}
    key |= {"threads": entry.key.threads, "machine": entry.key.machine}  # type: ignore[dict-item]
    rows = [{**asdict(result), "config": dict(result.config)} for result in entry.results]
    failures = [{**asdict(failure), "config": dict(failure.config)} for failure in entry.failures]
    return {**key, "effort": entry.effort, "tuned": entry.tuned, "results": rows, "failures": failures}
