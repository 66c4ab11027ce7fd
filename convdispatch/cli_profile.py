"""``convdispatch profile``: look at what tuning learnt, compare it, give it away, take it in, tidy it."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from convdispatch import exit_codes, machine, profile, profile_file, profile_tools, quarantine, report, safe_file
from convdispatch.errors import ProfileError
from convdispatch.profile import Entry, Key
from convdispatch.profile_doctor import Finding, examine
from convdispatch.profile_file import Profile
from convdispatch.profile_tools import Joined, Selection
from convdispatch.terminal import (
    UserFile,
    alone_option,
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
)
from convdispatch.units import bytes_text, time_text

_FEW = 10
_file = UserFile(dir_okay=False)
_present = UserFile(dir_okay=False, exists=True)


@click.group("profile")
def profile_group() -> None:
    """Look at what tuning learnt, compare it, give it away, take it in, tidy it."""


def _place(file: Path | None) -> Path:
    with scope(None, file):
        return profile.writable_path()


def _tell_if_missing(place: Path) -> None:
    """Say that a file is not there which somebody has named: it may be misspelt."""
    if place != profile.user_path() and not place.exists():
        say(f"convdispatch: {place} does not exist", err=True)


@profile_group.command()
@click.option("--all", "every", is_flag=True, help="Every layer's file, those that win first.")
@profile_option
@json_option
@explained
def path(every: bool, file: Path | None, as_json: bool) -> None:
    """Print the file that tuning writes."""
    with scope(None, file):
        rows = [
            {"layer": layer, "path": str(place), "exists": place.exists(), "written": place == profile.writable_path()}
            for layer, place in profile.layers()
        ]
        if as_json:
            print_json(rows)
        elif every:
            for row in rows:
                notes = ["exists" if row["exists"] else "not there"] + ["written by tune"] * bool(row["written"])
                say(f"{row['layer']:9} {row['path']} ({', '.join(notes)})")
        else:
            click.echo(profile.writable_path())  # as it is: for other programs


# show -------------------------------------------------------------------------------------------------------------

_ORDERS: Mapping[str, Callable[[Entry], Any]] = {
    "time": lambda entry: entry.winner.median,
    "problem": lambda entry: (str(entry.key.problem), entry.key.deployment, entry.key.threads),
    "gflops": lambda entry: -(entry.key.problem.flops / entry.winner.median) if entry.winner.median else 0.0,
    "winner": lambda entry: entry.winner.name,
    "tuned": lambda entry: entry.tuned,
}


@profile_group.command()
@click.argument("containing", default="")
@click.option("--sort", type=click.Choice(list(_ORDERS)), help="Order of the rows; the file's if unsaid.")
@click.option("--machine", "where", metavar="ID", help="Only what was measured on this machine; 'here' is this one.")
@click.option("--backend", metavar="NAME", help="Only what this backend won.")
@click.option("--flagged", is_flag=True, help="Only measurements that are marked as doubtful.")
@alone_option
@json_option
@explained
def show(
    containing: str,
    sort: str | None,
    where: str | None,
    backend: str | None,
    flagged: bool,
    file: Path | None,
    as_json: bool,
) -> None:
    """Show the profile's entries whose key contains CONTAINING: what won, and by how much.

    The column "here" says whether an entry counts on this machine: exact; soft (measured on a machine much like this
    one, used until the problem is tuned here); or no.
    """
    place, here = _place(file), machine.current()
    found = profile_file.read(place)
    _tell_if_missing(place)
    where = here.id if where == "here" else where
    entries = [
        entry
        for entry in found.entries()
        if containing in str(entry.key)
        and where in {None, entry.key.machine}
        and backend in {None, entry.winner.backend}
        and (entry.doubts or not flagged)
    ]
    if sort is not None:
        entries.sort(key=_ORDERS[sort], reverse=sort == "tuned")  # the newest first
    if as_json:
        print_json([_entry_data(entry, found) for entry in entries])
        return
    if not entries:
        matching = f" whose key contains {containing!r}" if containing else ""
        matching += " that are asked for" if where or backend or flagged else ""
        say(f"{place} has no entries{matching}; {_what_there_is(found)}")
    else:
        right = ("threads", "time", "spread", "GFLOP/s", "error", "workspace", "next best")
        columns = ("problem", "for", "threads", "winner", "time", "spread", "GFLOP/s", "error", "workspace")
        rows = table(str(place), (*columns, "next best", "here", "flags", "machine"), right, whole=("for", "here"))
        for entry in entries:
            rows.add_row(*_entry_cells(entry, found))
        print_table(console(), rows)
    for one in quarantine.written(found)[0]:
        say(f"quarantined: {one.backend} version {one.version} on {one.machine}: {one.reason} ({one.when})")


def _what_there_is(found: Profile) -> str:
    """Return what might have been asked for."""
    entries = list(found.entries())
    if not entries:
        return (
            "convdispatch tune WORKLOAD makes some, and convdispatch profile path --all names the other layers' files"
        )
    winners, machines = {entry.winner.backend for entry in entries}, {entry.key.machine for entry in entries}
    count = f"there are {len(entries)}" if len(entries) > 1 else "there is one"
    return f"{count}, won by {', '.join(sorted(winners))}, on {', '.join(sorted(machines))}"


def _counts_here(entry: Entry, found: Profile) -> str:
    grade = profile_tools.grade(found, entry.key, machine.current())
    return "no" if grade == "hard" else grade


def _entry_cells(entry: Entry, found: Profile) -> tuple[str, ...]:
    key, winner = entry.key, entry.winner
    other = next((result for result in entry.results if result.backend != winner.backend), None)
    rival = "-" if other is None or not winner.median else f"{other.backend} {other.median / winner.median:.3g}x"
    return (
        str(key.problem), key.deployment, str(key.threads), winner.name, time_text(winner.median),
        "-" if winner.rounds < 2 else f"{winner.spread:.1%}", report.rate_text(key.problem, winner.median),
        f"{winner.error:.1e}",
        bytes_text(winner.workspace), rival, _counts_here(entry, found), ", ".join(entry.flags) or "-", key.machine,
    )  # fmt: skip


def _key_data(key: Key) -> dict[str, Any]:
    return {
        "problem": str(key.problem), "deployment": key.deployment, "threads": key.threads, "machine": key.machine,
    }  # fmt: skip


def _entry_data(entry: Entry, found: Profile) -> dict[str, Any]:
    rows = [{**asdict(result), "config": dict(result.config)} for result in entry.results]
    failures = [{**asdict(failure), "config": dict(failure.config)} for failure in entry.failures]
    about: dict[str, Any] = {"effort": entry.effort, "tuned": entry.tuned, "flags": list(entry.flags)}
    about |= {"here": _counts_here(entry, found), "winner": entry.winner.name, "by_hand": entry.by_hand}
    return {**_key_data(entry.key), **about, "results": rows, "failures": failures}


# diff -------------------------------------------------------------------------------------------------------------


@profile_group.command()
@click.argument("first", type=_present)
@click.argument("second", type=_present)
@click.option("--across", is_flag=True, help="Compare entries of different machines too.")
@json_option
@explained
def diff(first: Path, second: Path, across: bool, as_json: bool) -> None:
    """Say what profile SECOND holds differently from profile FIRST.

    Of each problem whose winner differs: both winners, the second's time over the first's ("ratio"), and what the
    second's winner took in the first profile over the winner there ("cost"; near 1 it was a tie).
    """
    found = profile_tools.diff(profile_file.read(first), profile_file.read(second), across=across)
    if as_json:
        changed = [
            {
                **_key_data(change.first.key), "first": change.first.winner.name, "second": change.second.winner.name,
                "first_seconds": change.first.winner.median, "second_seconds": change.second.winner.median,
                "ratio": change.ratio, "cost": change.cost,
            }
            for change in found.changed
        ]  # fmt: skip
        only = {"only_first": found.only_first, "only_second": found.only_second}
        lists = {name: [_key_data(entry.key) for entry in entries] for name, entries in only.items()}
        print_json({**lists, "changed": changed, "same": [_key_data(key) for key in found.same]})
        return
    if found.changed:
        columns = ("problem", "for", "threads", "first", "time", "second", "time ", "ratio", "cost")
        rows = table("another winner", columns, right=("threads", "time", "time ", "ratio", "cost"))
        for change in found.changed:
            key, cost = change.first.key, "-" if change.cost is None else f"{change.cost:.2f}x"
            one, two = change.first.winner, change.second.winner
            about = (str(key.problem), key.deployment, str(key.threads))
            times = (one.name, time_text(one.median), two.name, time_text(two.median))
            rows.add_row(*about, *times, f"{change.ratio:.2f}x", cost)
        print_table(console(), rows)
    for file, entries in ((first, found.only_first), (second, found.only_second)):
        for entry in entries:
            say(f"only in {file}: {entry.key}: {entry.winner.name} {time_text(entry.winner.median)}")
    say(
        f"{len(found.same)} with the same winner, {len(found.changed)} with another, "
        f"{len(found.only_first)} only in {first}, {len(found.only_second)} only in {second}"
    )


# merge, import, export --------------------------------------------------------------------------------------------


def _joined(target: Path, sources: Sequence[Path]) -> Joined:
    profiles = [profile_file.read(source) for source in sources]
    done: list[Joined] = []

    def add(old: Profile) -> Mapping[str, str | None]:
        done.append(profile_tools.join(old, profiles, machine.current()))
        return done[-1].changes

    profile_file.edit(target, add)
    return done[-1]


def _print_joined(done: Joined, target: Path, as_json: bool) -> None:
    counts = {"new": len(done.new), "better": len(done.better), "kept": len(done.kept), "by_hand": len(done.by_hand)}
    here = {grade: done.grades.get(grade, 0) for grade in ("exact", "soft", "hard")}
    if as_json:
        print_json({"profile": str(target), **counts, "refused": dict(done.refused), "here": here})
        return
    say(
        f"{target}: {counts['new']} new, {counts['better']} better than what was there, {counts['kept']} kept as they "
        f"were, {len(done.refused)} refused"
    )
    if done.by_hand:
        many = "1 keeps the winner" if len(done.by_hand) == 1 else f"{len(done.by_hand)} keep the winners"
        say(f"{many} chosen by hand")
    for key, reason in done.refused.items():
        say(f"refused: {ascii(key)[1:-1]}: {reason}")
    say(
        f"on this machine {here['exact']} of those read count fully, {here['soft']} softly (used until the problem is "
        f"tuned here), {here['hard']} not at all"
    )


@profile_group.command()
@click.argument("files", nargs=-1, required=True, type=_present)
@click.option("--into", required=True, type=_file, metavar="FILE", help="Where the result goes; what is there stays.")
@json_option
@explained
def merge(files: Sequence[Path], into: Path, as_json: bool) -> None:
    """Join FILES, and what is in --into FILE already, into that file.

    Of two entries for one problem on one machine that is taken which measured the newer versions of the backends; else
    the one that is not doubtful, or has no flag; else the one whose winner has the tighter interval, the higher effort,
    the newer date. A winner that was chosen by hand in --into FILE stays: in the better entry if that measured it too,
    else with its whole entry.
    """
    _print_joined(_joined(into, files), into, as_json)


@profile_group.command("import")
@click.argument("file", type=_present)
@click.option("--profile", "target", type=_file, help="Profile file to add to.")
@json_option
@explained
def import_(file: Path, target: Path | None, as_json: bool) -> None:
    """Add the entries of FILE to the profile, and say how many were new, better or refused, and count here.

    Which of two entries is taken, and that winners chosen by hand stay, is decided as in merge.
    """
    place = _place(target)
    _print_joined(_joined(place, [file]), place, as_json)


@profile_group.command()
@click.argument("target", metavar="FILE", type=_file)
@click.option("--portable", is_flag=True, help="For all machines of the same kind; see above.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@alone_option
@json_option
@explained
def export(target: Path, portable: bool, force: bool, file: Path | None, as_json: bool) -> None:
    """Write a clean copy of the profile to FILE, to be kept or given away.

    With --portable it is for every machine with the same processor architecture, instruction sets and operating system:
    processor model, core count, caches and library versions are left out, and so are doubtful entries. On such a
    machine the entries are used as they are, softly: until a problem is tuned there, when only the old winner, the
    estimate's own pick and backends that are new race. An entry counts for its number of threads only; tune with
    --threads for each number that you ship for. Ship it as the file that CONVDISPATCH_PROFILE names, or import it.
    """
    if target.exists() and not force:
        raise ProfileError(f"{target} is there already; --force replaces it, profile merge --into adds to it")
    source = _place(file)
    if safe_file.real(target) == safe_file.real(source):
        raise ProfileError(f"{target} is the profile itself; name another file, or take entries out with profile prune")
    done = profile_tools.export(profile_file.read(source), portable=portable)
    if not done.entries:
        why = f"{source} has no entries" if source.exists() else f"{source} does not exist"
        if done.left_out:
            why = f"all {len(done.left_out)} entries are left out: {'; '.join(sorted(set(done.left_out.values())))}"
        raise ProfileError(f"nothing would be in {target}: {why}")
    profile_file.replace_file(target, done.text)
    if as_json:
        print_json({"profile": str(target), "entries": done.entries, "left_out": dict(done.left_out)})
        return
    say(f"{target}: {done.entries} entries{', for all machines of their kind' if portable else ''}")
    for key, reason in done.left_out.items():
        say(f"left out: {ascii(key)[1:-1]}: {reason}")


# prune, doctor ----------------------------------------------------------------------------------------------------


@profile_group.command()
@click.option("--stale", is_flag=True, help="Won by another version of a backend than the installed one.")
@click.option("--flagged", is_flag=True, help="Marked as doubtful.")
@click.option("--broken", is_flag=True, help="Cannot be read; the text goes to PROFILE.broken.")
@click.option("--quarantined", is_flag=True, help="Quarantines: the backends are tried again.")
@click.option("--machine", "where", metavar="ID", help="Only what was measured on this machine; 'here' is this one.")
@click.option("--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Only what is older.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@profile_option
@json_option
@explained
def prune(
    stale: bool,
    flagged: bool,
    broken: bool,
    quarantined: bool,
    where: str | None,
    older_than: float | None,
    dry_run: bool,
    file: Path | None,
    as_json: bool,
) -> None:
    """Take entries out of the profile.

    --stale, --flagged, --broken and --quarantined name kinds, of which any goes; --machine and --older-than narrow
    that, and select by themselves where no kind is named.
    """
    where = machine.current().id if where == "here" else where
    what = Selection(stale, flagged, broken, quarantined, where, older_than)
    if what.empty:
        raise click.UsageError("say what goes: --stale, --flagged, --broken, --quarantined, --machine, --older-than")
    place = _place(file)
    _tell_if_missing(place)
    if dry_run or not place.exists():
        done = profile_tools.prune(profile_file.read(place), what)
    else:
        runs = []

        def take_out(old: Profile) -> Mapping[str, str | None]:
            runs.append(profile_tools.prune(old, what))
            return runs[-1].changes

        profile_file.edit(place, take_out)
        done = runs[-1]
    if as_json:
        print_json({"profile": str(place), "dry_run": dry_run, "pruned": dict(done.reasons)})
        return
    for key, reason in done.reasons.items():
        say(f"{ascii(key)[1:-1]}: {reason}")
    say(f"{place}: {len(done.reasons)} {'would go' if dry_run else 'taken out'}")


@profile_group.command()
@click.option("--all", "every", is_flag=True, help=f"Every finding, not only the first {_FEW} of a kind.")
@read_option
@json_option
@explained
def doctor(every: bool, file: Path | None, as_json: bool) -> None:
    """Say what is wrong with the profiles in force, and the command that mends each thing.

    Ends with 1 if something needs mending: a file or an entry that cannot be read, a backend that has changed or gone
    since, a doubtful measurement, a quarantined backend. What is only worth knowing is marked "note".
    """
    with scope(None, file):
        found = examine(profile.layers(), profile.writable_path(), machine.current())
        places = [str(place) for _, place in profile.layers() if place.exists()]
        _tell_if_missing(profile.writable_path())
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        _print_findings(found, every=every)
        wrong = sum(finding.wrong for finding in found)
        say(f"{wrong or 'nothing'} to mend in {', '.join(places) or 'no profile at all'}")
    if any(finding.wrong for finding in found):
        sys.exit(exit_codes.ERROR)


def _print_findings(found: Sequence[Finding], *, every: bool) -> None:
    for kind in dict.fromkeys((finding.kind, finding.layer) for finding in found):
        alike = [finding for finding in found if (finding.kind, finding.layer) == kind]
        for finding in alike if every else alike[:_FEW]:
            note = "" if finding.wrong else "note: "
            say(f"{note}{finding.kind} ({finding.layer}): {finding.about}: {finding.reason}")
            say(f"    {finding.command}")
        if not every and len(alike) > _FEW:
            say(f"    ... and {len(alike) - _FEW} more like these; --all shows them")
