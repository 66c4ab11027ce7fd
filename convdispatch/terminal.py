"""What the commands share: how they print, how errors end them, and the options that several take."""

import contextlib
import functools
import io
import json
import math
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
from rich.text import Text

from convdispatch import exit_codes, settings
from convdispatch.errors import ArgumentError, BusyMachineError, ConvDispatchError, ConvDispatchWarning, printable

_WIDE = 10_000
#: What a terminal has that does not tell how wide it is.
_USUAL = 80
_GAP = 2
#: More seconds than any command runs, and than any lock or queue can wait.
_MOST_SECONDS = 1e9

Command = Callable[..., None]


# Options ------------------------------------------------------------------------------------------------------------


class UserFile(click.Path):
    """A file that a person names; ``~`` is a home also where no shell has seen to that."""

    def __init__(self, **what: Any) -> None:
        """Take what ``click.Path`` takes."""
        super().__init__(path_type=Path, **what)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; relative ones stay so."""
        try:
            place = settings.user_file("it", value)
        except ArgumentError as error:
            self.fail(str(error), param, ctx)
        return super().convert(str(place) if str(value).startswith("~") else value, param, ctx)


class Seconds(click.FloatRange):
    """A number of seconds: neither NaN nor without end."""

    name = "seconds"

    def __init__(self, *, some: bool = False) -> None:
        """Say whether it must be more than none."""
        super().__init__(min=0, min_open=some, max=_MOST_SECONDS)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is no number", param, ctx)
        return number

    def _describe_range(self) -> str:
        return f"0{'<' if self.min_open else '<='}x<={_MOST_SECONDS:g}"


thread_count = click.IntRange(1, settings.MOST_THREADS)
threads_option = click.option("--threads", type=thread_count, help="Most threads a candidate may use.")
_profile = functools.partial(click.option, "--profile", "file", type=UserFile())
profile_option = _profile(help="Profile file to read before the usual ones, and to write.")
read_option = _profile(help="Profile file to read before the usual ones.")
alone_option = _profile(help="Profile file to read, instead of the one that tuning writes.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


# Words and tables ---------------------------------------------------------------------------------------------------


class _Console(Console):
    """Prints words as they are, but for what a terminal would obey: others wrote names, paths and reasons."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text), **how)


def console(*, stderr: bool = False) -> Console:
    """Return a console that cuts nothing off where output is not a terminal.

    It prints words as they are: the names, paths and reasons that others wrote may look like markup.
    """
    make = functools.partial(_Console, stderr=stderr, highlight=False, markup=False, emoji=False)
    found = make(soft_wrap=True)
    if not found.is_terminal:
        return make(width=_WIDE)
    return found if found.width > 0 else make(soft_wrap=True, width=_USUAL)  # COLUMNS=0 says nothing


def say(text: str, *, err: bool = False) -> None:
    """Print a text; what a terminal would obey is shown instead."""
    click.echo(printable(text), err=err)


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


def print_table(out: Console, rows: Table, spare: Sequence[str] = ()) -> None:
    """Print a table, wrapped between words; where even so it is too wide for the terminal, each row as a paragraph.

    Args:
        out: where to.
        rows: the table.
        spare: columns that are left out before that, the first of them first.
    """
    left_out: list[str] = []
    while not _fit(out, rows):
        if not spare:
            _print_paragraphs(out, rows)
            return
        left_out.append(spare[0])
        rows, spare = _without(rows, spare[0]), spare[1:]
    if out.is_terminal:
        out.print(rows)
    else:
        with out.capture() as got:
            out.print(rows)
        out.file.writelines(f"{line.rstrip()}\n" for line in got.get().splitlines())
    if left_out:
        out.print(f"for want of room without {', '.join(left_out)}")


def _fit(out: Console, rows: Table) -> bool:
    """Set the columns' widths; return whether there is room for them."""
    spans = [
        Measurement.get(out, out.options.update(width=_WIDE), Group(column.header, *column.cells))
        for column in rows.columns
    ]
    least = [span.maximum if column.no_wrap else span.minimum for span, column in zip(spans, rows.columns, strict=True)]
    room = out.width - sum(least) - _GAP * len(spans)
    wanted = [span.maximum - width for span, width in zip(spans, least, strict=True)]
    part = min(1.0, room / max(1, sum(wanted)))
    for column, width, more in zip(rows.columns, least, wanted, strict=True):
        column.width = width + int(part * more)
    return room >= 0


def _without(rows: Table, name: str) -> Table:
    """Return a table without one of its columns."""
    kept = [column for column in rows.columns if column.header != name]
    names = [str(column.header) for column in kept]
    right = [str(column.header) for column in kept if column.justify == "right"]
    whole = [str(column.header) for column in kept if column.no_wrap]
    made = table(str(rows.title or ""), names, right, whole)
    for cells in zip(*(column.cells for column in kept), strict=True):
        made.add_row(*cells)
    return made


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
    """Print plain data; a number that JSON does not know, such as infinity, is null."""
    click.echo(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


# How commands end ---------------------------------------------------------------------------------------------------


def tell_of_waiting(said: str) -> None:
    """Say on stderr what is waited for."""
    say(f"convdispatch: {said}", err=True)


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
            say(f"convdispatch: {error}", err=True)
            sys.exit(exit_codes.BUSY if isinstance(error, BusyMachineError) else exit_codes.ERROR)
        except KeyboardInterrupt:
            say(f"convdispatch: interrupted{kept}", err=True)
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
                say(f"convdispatch: {message}", err=True)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        warnings.simplefilter("always", ConvDispatchWarning)
        yield


def scope(threads: int | None, file: Path | None) -> contextlib.AbstractContextManager[object]:
    """Return the settings that ``--threads`` and ``--profile`` ask for, as a context."""
    given = {"threads": threads, "profile": file}
    return settings.options(**{name: value for name, value in given.items() if value is not None})
