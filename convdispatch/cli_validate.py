"""``convdispatch calibrate`` and ``convdispatch validate``: estimates put right, and choices put to the test."""

import itertools
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from convdispatch import dispatch, exit_codes, heuristic, machine
from convdispatch.arguments import DEPLOYMENTS
from convdispatch.calibration import TERMS
from convdispatch.errors import ArgumentError
from convdispatch.problem import Problem
from convdispatch.terminal import (
    Seconds,
    console,
    explained,
    json_option,
    print_json,
    print_table,
    profile_option,
    read_option,
    say,
    scope,
    table,
    tell_of_waiting,
    threads_option,
)
from convdispatch.tuning import busy
from convdispatch.tuning import calibrate as calibrating
from convdispatch.tuning import validate as validating
from convdispatch.tuning import workload as workloads
from convdispatch.tuning.calibrate import CalibrationReport
from convdispatch.tuning.held_out import draw_problems
from convdispatch.tuning.race import RULES
from convdispatch.tuning.regret import Summary
from convdispatch.tuning.validation import APART, FLIPS, NOISY, TARGETS, WAYS, Cost, Validation, Way
from convdispatch.units import threads_text

_WORDS: Mapping[Way, str] = {
    "bare": "estimate, as the backends make it",
    "calibrated": "estimate, calibrated",
    "neighbours": "estimate, with the other problems tuned",
    "tuned": "tuned",
    "tuned again": "tuned again from nothing",
}


# calibrate -------------------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--allow-busy", is_flag=True, help="Measure though others use the machine.")
@threads_option
@profile_option
@json_option
@explained
def calibrate(allow_busy: bool, threads: int | None, file: Path | None, as_json: bool) -> None:
    """Measure a few problems, and correct every backend's estimates by what came out on this machine.

    It takes some seconds, once, and what kernels it must compile. The result stands in the profile, and serves every
    choice that is made without measuring. While others use the machine nothing is measured: after ten seconds of that
    it ends with exit code 5.
    """
    total, numbers = len(calibrating.PROBLEMS), itertools.count(1)
    with scope(threads, file):
        if not allow_busy:
            busy.refuse_if_busy(heuristic.budget_of(threads), busy.PATIENCE, tell_of_waiting)
        found = calibrating.calibrate(
            threads=threads,
            on_progress=lambda problem: say(f"[{next(numbers)}/{total}] {problem}", err=True),
        )
    if as_json:
        made = asdict(found.calibration)
        made["common"] = dict(zip(TERMS, made["common"], strict=True))
        for own in made["backends"].values():
            own["terms"] = dict(zip(TERMS, own["terms"], strict=True))
        data = {"calibration": made, "profile": str(found.profile), "seconds": found.seconds}
        print_json({**data, "failures": found.failures})
        return
    _print_calibration(found)


def _print_calibration(found: CalibrationReport) -> None:
    out = console()
    out.print(f"{machine.current().cpu}, machine {found.calibration.machine}")
    right = ("off before", "off after", "constant factor")
    rows = table("how many times estimates are off, typically", ("backend", *right), right)
    for name, own in found.calibration.backends.items():
        factor = math.exp(found.calibration.common[0] + own.terms[0])
        rows.add_row(name, f"{own.before:.2f}x", f"{own.after:.2f}x", f"{factor:.2f}x")
    print_table(out, rows)
    for failure in found.failures:
        out.print(f"passed over: {failure}")
    out.print(
        f"{found.calibration.measurements} measurements of {found.problems} problems, in {found.seconds:.0f} s. "
        f"Profile: {found.profile}",
    )


# validate --------------------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("what", metavar="[WORKLOAD]", required=False)
@click.option(
    "--problems", "count", type=click.IntRange(min=0), default=20, show_default=True, metavar="N",
    help="Random problems, beside the workload's.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Which random problems.")
@click.option(
    "--seconds", type=Seconds(some=True), default=5.0, show_default=True,
    help="Most time of each problem's oracle, and of its final duel.",
)  # fmt: skip
@click.option(
    "--effort", type=click.Choice(list(RULES)), default="measure", show_default=True, help="Of the tunes, as in tune."
)
@click.option("--deployment", type=click.Choice(DEPLOYMENTS), default="plan", show_default=True, help="As in tune.")
@click.option(
    "--check",
    is_flag=True,
    help="Exit with code 4 unless every target is reached, with 5 if the machine was busy for most problems.",
)
@threads_option
@read_option
@json_option
@explained
def validate(
    what: str | None,
    count: int,
    seed: int,
    seconds: float,
    effort: str,
    deployment: str,
    check: bool,
    threads: int | None,
    file: Path | None,
    as_json: bool,
) -> None:
    """Put choices to the test: regret, flips between two tunes, replay, and what tuning costs.

    The problems are WORKLOAD's (written as in tune), and random ones. Each is tuned twice from nothing, and all its
    candidates race against each other; regret is the time of a choice over that of the best, in a final duel. The
    profile is only read, for its calibration; without one (convdispatch calibrate keeps it) that is measured first.
    Measure on an idle machine.
    """
    load = workloads.load(what).distinct() if what else None
    problems: list[Problem] = [layer.problem for layer in load.layers] if load else []
    problems += [problem for problem in draw_problems(count, seed) if problem not in problems]
    if not problems:
        raise ArgumentError("there is nothing to validate: name a workload, or ask for --problems")
    total, numbers = len(problems) + 3, itertools.count(1)
    with scope(threads, file):
        found = validating.validate(
            problems,
            dispatch.decide,
            workload=load.name if load else None,
            seed=seed,
            effort=effort,  # type: ignore[arg-type]  # one of RULES
            deployment=deployment,
            threads=threads,
            seconds=seconds,
            conditions=busy.since(lambda: busy.make_watch(heuristic.budget_of(threads))),
            on_progress=lambda said: say(f"[{next(numbers)}/{total}] {said}", err=True),
        )
    if as_json:
        print_json(validation_data(found))
    else:
        print_validation(found)
    if check and not found.reached:
        sys.exit(exit_codes.FAILED)
    if check and 2 * len(found.doubtful) > len(found.cases):
        sys.exit(exit_codes.BUSY)


def print_validation(found: Validation) -> None:
    """Print a validation as a table, with the targets beside the figures."""
    out = console()
    here = machine.current()
    out.print(f"{here.cpu}, {threads_text(found.threads, here.cores)}, machine {found.machine}")
    right = ("mean", "p95", "worst")
    title = f"regret over {len(found.cases)} problems: time of what was chosen over the best"
    rows = table(title, ("choice by", *right, "target"), right)
    for way in WAYS:
        target = TARGETS.get(way)
        rows.add_row(_WORDS[way], *_figures(found.regret(way)), _verdict(found.regret(way), target))
    rows.add_row("the best against itself", *_figures(found.noise), "")
    print_table(out, rows)
    for line in _lines(found):
        out.print(line)


def _figures(summary: Summary | None) -> tuple[str, str, str]:
    if summary is None:
        return "-", "-", "-"
    return f"{summary.mean:.3f}", f"{summary.p95:.3f}", f"{summary.worst:.3f}"


def _verdict(summary: Summary | None, target: tuple[float, float] | None) -> str:
    if summary is None or target is None:
        return ""
    return f"{target[0]:.2f}, {target[1]:.2f}: {'reached' if summary.within(*target) else 'missed'}"


def _lines(found: Validation) -> list[str]:
    """Return what is said below the table."""
    count, flipped = len(found.cases), found.flipped
    reached = "reached" if found.agrees else "missed"
    said = f"two tunes: another winner for {flipped} of {count} problems, by {found.apart - 1:.1%} of its time at most"
    lines = [f"{said} (target {FLIPS:.0%}, {APART - 1:.0%}: {reached})"]
    drift = found.drift
    apart = f"; times are {found.median_drift:.3f} of those stored, 95 % within {drift.p95:.3f}x" if drift else ""
    lines.append(f"replay: {found.replayed} of {count} problems got the stored winner{apart}")
    first, second = found.tunes
    lines.append(f"cost of tuning {count + len(found.failed)} problems: {_cost(first)}; again: {_cost(second)}")
    if found.calibrating is not None:
        lines.append(f"cost of calibrating: {_cost(found.calibrating)}")
    if found.doubtful:
        lines.append(
            f"the machine was busy for {len(found.doubtful)} of {count} problems (the best differed from itself by "
            f"more than {NOISY - 1:.0%}, or others ran); their figures say little"
        )
        lines += _without_doubt(found.in_quiet)
        lines += [f"  {case.problem}: {case.conditions}" for case in found.doubtful if case.conditions]
    for way, (_, most) in TARGETS.items():
        worst = sorted((case for case in found.cases if case.regret(way) > most), key=lambda case: -case.regret(way))
        lines += [
            f"{_WORDS[way]}: {case.problem} took {case.chosen[way]}, {case.regret(way):.2f}x of {case.duel.champion}"
            for case in worst[:5]
        ]
    lines += [f"failed: {problem}: {reason}" for problem, reason in found.failed.items()]
    return [*lines, f"in {found.seconds:.0f} s"]


def _without_doubt(rest: Validation) -> list[str]:
    """Return what the problems that were measured in quiet say by themselves."""
    if not rest.cases:
        return []
    by_way = (f"{_WORDS[way]} {mean}, {p95}" for way in TARGETS for mean, p95, _ in [_figures(rest.regret(way))])
    apart = f", by {rest.apart - 1:.1%} of its time at most" if rest.flipped else ""
    return [f"  in quiet, {len(rest.cases)}: {'; '.join(by_way)}; another winner for {rest.flipped}{apart}"]


def _cost(cost: Cost) -> str:
    compiling = f"{cost.compiling:.1f} s of them compiling" if cost.compiling else "nothing had to be compiled"
    return f"{cost.seconds:.1f} s, {compiling}"


def validation_data(found: Validation) -> dict[str, Any]:
    """Return a validation as plain data."""
    cases = [
        {
            "problem": case.problem.text,
            "champion": case.duel.champion,
            "seconds": case.duel.seconds[case.duel.champion],
            "noise": case.duel.noise,
            "chosen": dict(case.chosen),
            "regret": {way: case.regret(way) for way in WAYS},
            "apart": case.apart,
            "replayed": case.replayed,
            "drift": case.drift,
            "conditions": case.conditions,
        }
        for case in found.cases
    ]
    regrets = {way: found.regret(way) for way in WAYS}
    return {
        "regret": {way: asdict(summary) if summary else None for way, summary in regrets.items()},
        "noise": asdict(found.noise) if found.noise else None,
        "targets": {way: {"mean": mean, "p95": p95} for way, (mean, p95) in TARGETS.items()},
        "flips": found.flips,
        "apart": found.apart,
        "replayed": found.replayed / len(found.cases) if found.cases else None,
        "drift": asdict(found.drift) if found.drift else None,
        "tunes": [asdict(cost) for cost in found.tunes],
        "calibrating": asdict(found.calibrating) if found.calibrating else None,
        "doubtful": len(found.doubtful),
        "failed": dict(found.failed),
        "workload": found.workload,
        "seed": found.seed,
        "effort": found.effort,
        "deployment": found.deployment,
        "threads": found.threads,
        "machine": machine.current().describe(),
        "seconds": found.seconds,
        "cases": cases,
    }
