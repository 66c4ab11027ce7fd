"""``explain``: every backend's standing on a problem, and why the choice is what it is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convdispatch import arguments, dispatch, heuristic, machine, profile, separation, settings, transfer
from convdispatch.backend import Backend, Candidate
from convdispatch.errors import BackendRejectedError, ProfileMissError, printable
from convdispatch.plan import Evidence
from convdispatch.problem import Problem
from convdispatch.profile import Entry, Failure, Key, Result
from convdispatch.question import Decision, Question, parse_forced
from convdispatch.units import bytes_text, time_text


@dataclass(frozen=True)
class Row:
    """One backend's standing.

    Attributes:
        backend: its name.
        chosen: whether it is the one that a call would use.
        candidate: its best candidate with config, or None if it may not be used.
        reason: why it may not be used, else empty.
        estimate: predicted seconds, None where unknown.
        median, spread, rounds, error: what was measured, None where nothing was.
        workspace: scratch bytes.
    """

    backend: str
    chosen: bool = False
    candidate: str | None = None
    reason: str = ""
    estimate: float | None = None
    median: float | None = None
    spread: float | None = None
    rounds: int | None = None
    error: float | None = None
    workspace: int | None = None


@dataclass(frozen=True)
class Explanation:
    """Which backend would be used for a problem, why, and how the others stand.

    Attributes:
        problem, deployment, threads, machine: what the choice was made for.
        chosen: name of the candidate, or None if there is none that the options allow.
        evidence: why.
        layer: the profile layer that the measurements are from, or None.
        rows: one a backend, the chosen first, then by time; those that may not be used last.
    """

    problem: Problem
    deployment: str
    threads: int
    machine: str
    chosen: str | None
    evidence: Evidence
    layer: str | None
    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        """Return the table: it is what a prompt is to show."""
        return str(self)

    def __str__(self) -> str:
        lines = [
            f"{self.problem}  ({self.deployment}, {self.threads} threads, {self.machine})",
            f"chosen: {self.chosen or 'none'}  [{self.evidence}]",
        ]
        head = ("backend", "candidate", "measured", "spread", "estimate", "error", "workspace", "why not")
        table = [head, *(cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        return printable("\n".join(lines))


def cells(row: Row) -> tuple[str, str, str, str, str, str, str, str]:
    """Return a row as texts: backend, candidate, measured, spread, estimate, error, workspace, reason."""
    return (
        ("* " if row.chosen else "  ") + row.backend,
        row.candidate or "-",
        time_text(row.median),
        "-" if row.spread is None else f"{row.spread:.1%}",
        time_text(row.estimate),
        "-" if row.error is None else f"{row.error:.1e}",
        "-" if row.workspace is None else bytes_text(row.workspace),
        row.reason,
    )


def explain(
    input: Any,
    filters: Any,
    strides: Any = 1,
    padding: Any = "SAME",
    data_format: str = "NHWC",
    dilations: Any = 1,
    *,
    groups: int | None = None,
    filter_format: str = "HWIO",
    bias: Any = False,
    activation: Any = None,
    residual: Any = False,
    dtype: Any = "float32",
    backend: Any = None,
    deployment: str = "plan",
) -> Explanation:
    """Tell which backend would do a convolution and why, and why the others would not.

    Args:
        input, filters: shapes, or arrays; of these, shape and dtype matter, and whether filters are separable.
        strides, padding, data_format, dilations, groups, filter_format, activation: as in ``conv2d``.
        bias, residual: whether there is one; or the array, which says that there is.
        dtype: name of the dtype, where shapes are given.
        backend: as in ``conv2d``.
        deployment: ``"plan"`` or ``"call"``.

    Returns:
        An ``Explanation``; ``print`` shows it as a table.

    Raises:
        ArgumentError, ArgumentTypeError: as ``conv2d``.
    """
    x, w = _as_array_or_shape("input", input), _as_array_or_shape("filters", filters)
    name = arguments.dtype_name(getattr(x, "dtype", getattr(w, "dtype", dtype)))
    if isinstance(w, np.ndarray):
        arguments.check_same_dtype(name, w.dtype)
    problem = arguments.make_problem(
        getattr(x, "shape", x), getattr(w, "shape", w), name, strides, padding, data_format,
        dilations, groups, filter_format, activation, bias=_is_there("bias", bias),
        residual=_is_there("residual", residual),
    )  # fmt: skip
    arguments.check_deployment(deployment)
    if isinstance(w, np.ndarray):
        problem = separation.noticed(problem, arguments.check_filters(problem, w, filter_format))
    return explain_problem(problem, deployment, backend)


def _as_array_or_shape(name: str, given: Any) -> Any:
    return arguments.as_array(name, given) if hasattr(given, "__array__") else given


def _is_there(name: str, given: Any) -> bool:
    """Return whether there is a bias or a residual, which may be given as in ``conv2d``."""
    if given is None or isinstance(given, bool | np.bool_):
        return bool(given)
    arguments.as_array(name, given)
    return True


def explain_problem(problem: Problem, deployment: str = "plan", backend: Any = None) -> Explanation:
    """Tell the same of a ``Problem``; see ``explain``."""
    arguments.check_deployment(deployment)
    refusal = ""
    decision: Decision | None = None
    try:
        decision = dispatch.look(problem, deployment, parse_forced(backend))
    except (BackendRejectedError, ProfileMissError) as error:
        refusal = str(error)
    key = Question(problem, deployment, settings.current()).key
    found = (decision and decision.found) or next(iter(profile.find(key)), None)
    layer, entry = (found.layer, found.entry) if found else (None, None)
    return Explanation(
        problem, deployment, key.threads, machine.current().id,
        decision.candidate.name if decision else None,
        _evidence(decision, problem, entry) if decision else Evidence("none", refusal),
        layer,
        tuple(_rows(key, entry, decision)),
    )  # fmt: skip


def _evidence(decision: Decision, problem: Problem, entry: Entry | None) -> Evidence:
    """Return a decision's evidence, with what kept a measured winner from being chosen."""
    told = decision.evidence
    if entry is None or told.source == "forced" or decision.candidate.name == entry.winner.name:
        return told
    winner, known = entry.winner, heuristic.usable(problem, settings.current())[0].get(entry.winner.backend)
    if known is None or known.version != winner.version:
        return told  # the row of that backend says why
    against = _objection(problem, Candidate(known, winner.config), [winner], None)
    return replace(told, detail=f"{told.detail}; not the winner, {winner.name}: {against}") if against else told


def _objection(problem: Problem, candidate: Candidate, measured: Sequence[Result], failed: Failure | None) -> str:
    """Return what the options or a measurement hold against a candidate that could do the problem, or nothing."""
    options, off = settings.current(), heuristic.measured_error(candidate, measured)
    workspace, complaint = _workspace(candidate, problem)
    if workspace is None:
        return complaint
    if not heuristic.fits_memory(workspace, options):
        return f"needs more workspace than memory_limit={options.memory_limit}"
    if off is not None and not heuristic.accurate_by_measure(candidate.backend, problem, off, options):
        return f"its error was measured above what accuracy={options.accuracy!r} allows"
    if off is None and failed is not None:
        return f"failed when measured: {failed.reason}"
    allowed = heuristic.accurate_by_kind(candidate.backend, options)
    if off is None and not (allowed and heuristic.accurate_by_bound(candidate, problem, options)):
        return f"accuracy={options.accuracy!r} needs its error measured"
    return ""


def _rows(key: Key, entry: Entry | None, decision: Decision | None) -> Sequence[Row]:
    problem = key.problem
    usable, refused = heuristic.usable(problem, settings.current())
    everything = transfer.rank(problem, usable.values(), key.threads, key.deployment).estimates
    estimates = {estimate.candidate.name: estimate.seconds for estimate in everything}
    rows = []
    for name, backend in usable.items():
        ranked = [estimate for estimate in everything if estimate.candidate.backend is backend]
        chosen = decision is not None and decision.candidate.backend is backend
        own = (name, backend.version)
        results = (
            sorted((r for r in entry.results if (r.backend, r.version) == own), key=lambda r: r.median) if entry else []
        )
        failed = next((f for f in entry.failures if (f.backend, f.version) == own), None) if entry else None
        reason = ""
        candidate: Candidate | None
        if chosen and decision:
            candidate = decision.candidate
        elif results:
            candidate = Candidate(backend, results[0].config)
        elif ranked:
            candidate = ranked[0].candidate
        else:
            candidate, reason = _unranked(backend, key)
        if candidate is None:
            rows.append(Row(name, reason=reason))
            continue
        measured = next((r for r in results if r.name == candidate.name), None)
        rows.append(
            Row(
                name,
                chosen,
                candidate.name,
                "" if chosen else _objection(problem, candidate, results, failed),
                estimates[candidate.name] if candidate.name in estimates else _estimate(candidate, problem),
                measured.median if measured else None,
                measured.spread if measured and measured.rounds > 1 else None,
                measured.rounds if measured else None,
                measured.error if measured else None,
                _workspace(candidate, problem)[0],
            )
        )
    rows.sort(key=lambda row: (not row.chosen, bool(row.reason), row.median or row.estimate or float("inf")))
    return [*rows, *(Row(name, reason=reason) for name, reason in refused.items())]


def _workspace(candidate: Candidate, problem: Problem) -> tuple[int | None, str]:
    """Return a candidate's workspace, or None and why it cannot be told."""
    try:
        return candidate.workspace(problem), ""
    except (Exception, SystemExit) as error:  # noqa: BLE001  # somebody's backend is no reason to explain nothing
        return None, f"its workspace raised {type(error).__name__}: {error}"


def _unranked(backend: Backend, key: Key) -> tuple[Candidate | None, str]:
    """Return the default candidate of a backend that ranking passed over, or None and why there is none."""
    try:
        candidates = heuristic.candidates_of(backend, key.problem, key.threads, "estimate")
    except (Exception, SystemExit) as error:  # noqa: BLE001  # somebody's backend is no reason to say nothing of the others
        return None, f"its configs raised {type(error).__name__}: {error}"
    return (candidates[0], "") if candidates else (None, "it has no configs")


def _estimate(candidate: Candidate, problem: Problem) -> float | None:
    """Return what a backend says of a candidate that is not among those it ranked, such as one from a profile."""
    try:
        return candidate.estimate(problem, machine.current())
    except (Exception, SystemExit):  # noqa: BLE001
        return None
