"""What commands print: tables and JSON on stdout, where nothing else goes with ``--json``; progress on stderr."""

from __future__ import annotations

import json
import os
import re
import select
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper
from typing import TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Column, Table
from rich.text import Text

from lowmem.errors import printable
from lowmem.transforms.summary import Summary

__all__ = [
    "Terminal",
    "print_json",
    "print_summary",
    "print_table",
    "progress",
    "reader_gone",
    "results_alone",
    "shown",
    "streams_kept",
    "whole",
]

LEAST = 12  # characters that a column of text is narrowed to
ROOMY = 60  # columns of a terminal that has room for a bar

_results: TextIO | None = None  # where JSON goes while stdout is stderr


class Terminal(Console):
    """A Console that leaves it to the command what a closed pipe means."""

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError again, where rich would exit with 1."""
        raise


def shown(text: str) -> str:
    """Return a name of any origin as a table or a line of text can show it."""
    return printable(text, 2000)


@contextmanager
def results_alone(wanted: bool, program: bool) -> Iterator[None]:
    """Where ``wanted``, send to stderr what is printed in the block but by ``print_json``.

    Args:
        program: the process is the command's: what any library writes to the file descriptor of stdout goes to
            stderr too, until the process ends.
    """
    global _results
    if not wanted:
        yield
        return
    results = sys.stdout
    if program:
        results.flush()
        results = open(os.dup(sys.stdout.fileno()), "w")  # noqa: SIM115  to the end of the process
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _results = results
    try:
        with redirect_stdout(sys.stderr):
            yield
        results.flush()
    finally:
        _results = None


def reader_gone() -> bool:
    """Return whether stdout or stderr of the process is a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)  # errors and hang-ups are always reported
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextmanager
def streams_kept() -> Iterator[None]:
    """Give stdout and stderr back after a block that may close, detach, replace or remove them."""
    streams = [(name, stream, *_encoding(stream)) for name in ("stdout", "stderr") if (stream := getattr(sys, name))]
    try:
        yield
    finally:
        for name, stream, encoding, errors in streams:
            setattr(sys, name, stream)  # first: what stood there may close the buffer that it shares
            if isinstance(stream, TextIOWrapper) and _is_closed(stream):
                number = ("stdout", "stderr").index(name) + 1  # Python closes neither file with its stream
                setattr(sys, name, open(number, "w", encoding=encoding, errors=errors, closefd=False))  # noqa: SIM115


def _encoding(stream: TextIO) -> tuple[str | None, str | None]:
    return (stream.encoding, stream.errors) if isinstance(stream, TextIOWrapper) else (None, None)


def _is_closed(stream: TextIO) -> bool:
    try:
        return stream.closed
    except ValueError:  # its buffer is detached
        return True


def print_json(document: object) -> None:
    """Print one JSON document to stdout."""
    print(json.dumps(document, indent=2), file=_results)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: Collection[int] = (0,), markdown: bool = False
) -> None:
    """Print a table to stdout, with every figure whole: where a terminal is too narrow, one line a figure.

    Args:
        columns: the titles.
        rows: the cells; they and the titles may hold anything.
        text: the columns that are no figures: they stand to the left, and are wrapped where that is needed.
        markdown: a Markdown table.
    """
    columns, *rows = [[shown(cell) for cell in row] for row in (columns, *rows)]
    if markdown:
        rule = [":--" if number in text else "--:" for number in range(len(columns))]
        titles, *rows = [[re.sub(r"([\\|<*\[])", r"\\\1", cell) for cell in row] for row in (columns, *rows)]
        for row in (titles, rule, *rows):
            print("| " + " | ".join(row) + " |")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    widths = []
    for number, column in enumerate(columns):
        title = column.replace(" ", "\n")
        width = max(map(cell_len, [*title.split("\n"), *(row[number] for row in rows)]))
        if number in text:
            table.add_column(Text(title), overflow="fold", min_width=min(width, LEAST))
        else:
            table.add_column(Text(title), justify="right", no_wrap=True, min_width=width)
        widths.append(width)
    for row in rows:
        table.add_row(*map(Text, row))  # no str: rich would read markup and emoji in it
    least = [min(width, LEAST) if number in text else width for number, width in enumerate(widths)]
    if sum(least) + len(columns) + 1 <= _width():
        _print(table, sum(widths) + len(columns) + 1)
    else:
        for row in rows:
            _print_upright(columns, row)


def print_summary(layers: Summary, *, grouped: bool = False, markdown: bool = False) -> None:
    """Print a summary of layers to stdout, those of one role as one if ``grouped``: aligned, where there is room."""
    cells = layers.grouped_cells if grouped else layers.cells
    lines = layers.aligned(cells)
    if not markdown and max(map(cell_len, lines.splitlines())) <= _width():
        print(lines)
    else:
        text = {*range(len(layers.columns))} - {*layers.FIGURES}
        print_table(layers.columns, cells, text=text, markdown=markdown)


def whole() -> Column:
    """Return how a figure of ``progress`` is laid out: never cut, however narrow the terminal."""
    return Column(no_wrap=True)


def progress(
    *figures: ProgressColumn, roomy: Sequence[ProgressColumn] = (), redirect_stdout: bool = True
) -> Progress:
    """Return a display of progress on stderr: a name, a bar where there is room for one, and figures.

    Args:
        figures: what is always shown behind the bar.
        roomy: what is shown behind these where there is room for a bar.
        redirect_stdout: lines that are printed meanwhile go above it.
    """
    console = Terminal(stderr=True)
    has_room = console.width >= ROOMY
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
        *([BarColumn()] if has_room else []),
        *figures,
        *(roomy if has_room else []),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=redirect_stdout,
    )


def _print_upright(columns: Sequence[str], row: Sequence[str]) -> None:
    """Print a row as its first cell, and below it a line for each other that is not empty."""
    _print(Text(row[0], overflow="fold"))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for column, cell in zip(columns[1:], row[1:], strict=True):
        if cell:
            table.add_row(Text(f"  {column}"), Text(cell))
    _print(table)
    print()


def _print(what: RenderableType, width: int = 0) -> None:
    console = Terminal()
    if not console.is_terminal:
        console.width = max(width, console.width)
    console.print(what, crop=False)


def _width() -> float:
    """Return how many characters a line of stdout has room for: a file or a pipe has no width to keep to."""
    console = Terminal()
    return console.width if console.is_terminal else float("inf")
