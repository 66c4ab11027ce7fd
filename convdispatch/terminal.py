"""What the commands share: how they print, how errors end them, and the options that several take."""

import contextlib
import functools
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import click
from rich.console import Console, Group
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table

from convdispatch import exit_codes, settings
from convdispatch.errors import BusyMachineError, ConvDispatchError, ConvDispatchWarning

_WIDE = 10_000
_GAP = 2

Command = Callable[..., None]

threads_option = click.option(
    "--threads", type=click.IntRange(1, settings.MOST_THREADS), help="Most threads a candidate may use."
)
_profile = functools.partial(click.option, "--profile", "file", type=click.Path(path_type=Path))
profile_option = _profile(help="Profile file to read before the usual ones, and to write.")
read_option = _profile(help="Profile file to read before the usual ones.")
alone_option = _profile(help="Profile file to read, instead of the one that tuning writes.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def console(*, stderr: bool = False) -> Console:
    """Return a console that cuts nothing off where output is not a terminal.

    It prints words as they are: the names, paths and reasons that others wrote may look like markup.
    """
    make = functools.partial(Console, stderr=stderr, highlight=False, markup=False, emoji=False)
    found = make(soft_wrap=True)
    return found if found.is_terminal else make(width=_WIDE)


def table(title: str, columns: Sequence[str], right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """Return an empty table, to be printed with ``print_table``.

    Args:
        title: above it.
        columns: their names.
        right: those that hold numbers.
        whole: others of short words. Where a terminal is narrow, what is neither is wrapped.
    """
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for name in columns:
        number, short = name in right, name in right or name in whole
        made.add_column(name, justify="right" if number else "left", no_wrap=short, overflow="fold")
    return made


def print_table(out: Console, rows: Table) -> None:
    """Print a table, wrapped between words; where even so it is too wide for the terminal, each row as a paragraph."""
    spans = [
        Measurement.get(out, out.options.update(width=_WIDE), Group(column.header, *column.cells))
        for column in rows.columns
    ]
    least = [span.maximum if column.no_wrap else span.minimum for span, column in zip(spans, rows.columns, strict=True)]
    room = out.width - sum(least) - _GAP * len(spans)
    if room < 0:
        _print_paragraphs(out, rows)
        return
    wanted = [span.maximum - width for span, width in zip(spans, least, strict=True)]
    part = min(1.0, room / max(1, sum(wanted)))
    for column, width, more in zip(rows.columns, least, wanted, strict=True):
        column.width = width + int(part * more)
    out.print(rows)


def _print_paragraphs(out: Console, rows: Table) -> None:
    if rows.title:
        out.print(rows.title, style="bold")
    names = [str(column.header).strip() for column in rows.columns]
    for first, *others in zip(*(column.cells for column in rows.columns), strict=True):
        told = [f"{name} {cell}" for name, cell in zip(names[1:], others, strict=True) if cell not in {"", "-"}]
        out.print(first, style="bold")
        out.print(Padding(", ".join(told), (0, 0, 0, 4)), soft_wrap=False)


def print_what_can_be_printed() -> None:
    """Have a question mark printed for what the output's encoding lacks: no command is to fail over a sign."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def print_json(data: object) -> None:
    """Print plain data."""
    click.echo(json.dumps(data, indent=2))


def tell_of_waiting(said: str) -> None:
    """Say on stderr what is waited for."""
    click.echo(f"convdispatch: {said}", err=True)


def explained(command: Command) -> Command:
    """Turn errors into a line on stderr and an exit code, and what convdispatch warns of into lines there too."""
    return _explained(command, "")


def resumable(command: Command) -> Command:
    """Do as ``explained`` does for a command that loses nothing by being interrupted."""
    return _explained(command, "; what is done is kept, and the same command goes on")


def _explained(command: Command, kept: str) -> Command:
    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with _warnings_as_lines():
                command(*args, **kwargs)
        except ConvDispatchError as error:
            click.echo(f"convdispatch: {error}", err=True)
            sys.exit(exit_codes.BUSY if isinstance(error, BusyMachineError) else exit_codes.ERROR)
        except KeyboardInterrupt:
            click.echo(f"convdispatch: interrupted{kept}", err=True)
            sys.exit(exit_codes.INTERRUPTED)

    return run


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, lineno: int,
            file: TextIO | None = None, line: str | None = None,
        ) -> None:  # fmt: skip
            if issubclass(category, ConvDispatchWarning):
                click.echo(f"convdispatch: {message}", err=True)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        warnings.simplefilter("always", ConvDispatchWarning)
        yield


def scope(threads: int | None, file: Path | None) -> contextlib.AbstractContextManager[object]:
    """Return the settings that ``--threads`` and ``--profile`` ask for, as a context."""
    given = {"threads": threads, "profile": file}
    return settings.options(**{name: value for name, value in given.items() if value is not None})
