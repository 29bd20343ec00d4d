"""Output of the commands: tables or JSON on stdout (with ``--json`` nothing else), progress on stderr."""

from __future__ import annotations

import json
import math
import os
import re
import select
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from threading import Event, Thread
from typing import Any, TextIO, TypeAlias

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Column, Table
from rich.text import Text

from lowmem.errors import printable_line
from lowmem.io.formats.requantization import GrowthWarning
from lowmem.transforms.bits_per_weight import techniques_as_code
from lowmem.transforms.memory_plan import Plan
from lowmem.transforms.model_summary import Summary

# Least width of a wrapped column of text, in characters
MIN_COLUMN_WIDTH = 12
# Least width of a terminal for a progress bar, in characters
MIN_BAR_WIDTH = 60
# Width of tables in files and pipes, in characters; only a name that is longer exceeds it
PIPED_WIDTH = 120
SECONDS_APART = 30.0  # of the lines that tell of long work where there is no terminal

ColumnOrText: TypeAlias = Callable[..., ProgressColumn] | str

# The original stdout while it is redirected to stderr
_results: TextIO | None = None


class BrokenPipeRaisingConsole(Console):
    """A Console that leaves closed pipes to the command."""

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError again, where rich would exit with 1."""
        raise


def escaped_and_truncated(text: str) -> str:
    """Return a name from a user or file with control characters escaped, cut to 2000 characters."""
    return printable_line(text, 2000)


@contextmanager
def warnings_printed_as_notes() -> Iterator[None]:
    """Print the block's warnings to stderr behind it, a line each, unless it ends in an error. A model that became
    larger than its file is told of first."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        yield
    for note in sorted(notes, key=lambda note: not issubclass(note.category, GrowthWarning)):
        print(f"note: {escaped_and_truncated(str(note.message))}", file=sys.stderr)


@contextmanager
def stdout_reserved_for_json(enabled: bool, owns_process: bool) -> Iterator[None]:
    """If ``enabled``, redirect stdout to stderr in the block, except for ``print_json``.

    Args:
        enabled: whether to redirect.
        owns_process: whether the process is the command's own; then the file descriptor of stdout, to which
            libraries may write, is redirected until the process ends.
    """
    global _results
    if not enabled:
        yield
        return
    results = sys.stdout
    if owns_process:
        results.flush()
        results = open(os.dup(sys.stdout.fileno()), "w")  # noqa: SIM115  closed below
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _results = results
    try:
        with redirect_stdout(sys.stderr):
            yield
        results.flush()
    finally:
        _results = None
        if owns_process:
            # A full disk: closing writes again what flush could not, an error already
            with suppress(OSError):
                results.close()


def is_stdout_or_stderr_pipe_closed() -> bool:
    """Whether stdout or stderr of the process is a pipe whose reader has closed it."""
    # Windows
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    for number in (1, 2):
        # Errors and hang-ups are always reported
        poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextmanager
def preserved_stdout_and_stderr() -> Iterator[None]:
    """Restore stdout and stderr after a block that may close, detach, replace or remove them."""
    streams = [
        (name, stream, *_encoding_and_errors(stream))
        for name in ("stdout", "stderr")
        if (stream := getattr(sys, name))
    ]
    try:
        yield
    finally:
        for name, stream, encoding, errors in streams:
            # Before the check: the replaced stream may close a shared buffer
            setattr(sys, name, stream)
            if isinstance(stream, TextIOWrapper) and _is_closed_or_detached(stream):
                # Python does not close descriptors 1 and 2
                number = ("stdout", "stderr").index(name) + 1
                setattr(sys, name, open(number, "w", encoding=encoding, errors=errors, closefd=False))  # noqa: SIM115


def _encoding_and_errors(stream: TextIO) -> tuple[str | None, str | None]:
    return (stream.encoding, stream.errors) if isinstance(stream, TextIOWrapper) else (None, None)


def _is_closed_or_detached(stream: TextIO) -> bool:
    try:
        return stream.closed
    except ValueError:  # its buffer is detached
        return True


def print_json(document: object) -> None:
    """Print one JSON document to stdout."""
    print(json.dumps(document, indent=2), file=_results)


def print_saved_path_to_stderr(path: Path) -> None:
    """Say on stderr that a file or folder was written."""
    print(f"saved {escaped_and_truncated(str(path))}", file=sys.stderr)


def finite_or_none(value: float) -> float | None:
    """Return a number as JSON has it, which knows neither infinity nor NaN."""
    return value if math.isfinite(value) else None


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: Collection[int] = (0,),
    markdown: bool = False,
) -> None:
    """Print a table to stdout. Numbers are never cut: if the terminal is too narrow, each cell gets its own line. In
    files and pipes, tables have at most ``PIPED_WIDTH`` columns, and cells of the first column are not wrapped.

    Args:
        columns: the titles.
        rows: the cells; cells and titles may hold any text.
        text_columns: columns of text, which are left-aligned and may be wrapped; the others hold numbers.
        markdown: print Markdown.
    """
    columns, *rows = [[escaped_and_truncated(cell) for cell in row] for row in (columns, *rows)]
    if markdown:
        rule = [":--" if number in text_columns else "--:" for number in range(len(columns))]
        titles, *rows = [[re.sub(r"([\\|<*\[])", r"\\\1", cell) for cell in row] for row in (columns, *rows)]
        for row in (titles, rule, *rows):
            print("| " + " | ".join(row) + " |")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    wrapped = {*text_columns} - (set() if BrokenPipeRaisingConsole().is_terminal else {0})
    least = []
    for number, column in enumerate(columns):
        title = column.replace(" ", "\n")
        width = max(map(cell_len, [*title.split("\n"), *(row[number] for row in rows)]))
        least.append(min(width, MIN_COLUMN_WIDTH) if number in wrapped else width)
        justify: JustifyMethod = "left" if number in text_columns else "right"
        table.add_column(
            Text(title), justify=justify, overflow="fold", no_wrap=number not in wrapped, min_width=least[-1]
        )
    for row in rows:
        # Not str, in which rich interprets markup and emoji codes
        table.add_row(*map(Text, row))
    if sum(least) + len(columns) + 1 <= _stdout_width():
        _print_renderable(table)
    else:
        for row in rows:
            _print_row_vertically(columns, row)


def print_layer_summary(summary: Summary, *, grouped: bool = False, markdown: bool = False) -> None:
    """Print a summary to stdout, with layers of one role as one row if ``grouped``; as a table if it is too wide."""
    cells = summary.grouped_cells if grouped else summary.cells
    lines = summary.aligned(cells)
    if not markdown and max(map(cell_len, lines.splitlines())) <= _stdout_width():
        print(lines)
    else:
        text = {*range(len(summary.columns))} - {*summary.FIGURES}
        print_table(summary.columns, cells, text_columns=text, markdown=markdown)


def print_memory_plan(model_name: str, plan: Plan, *, markdown: bool = False) -> None:
    """Print the plan of the model called ``model_name`` to stdout, as a table below its techniques."""
    print(f"{escaped_and_truncated(model_name)}: {techniques_as_code(plan.techniques)}\n")
    print_table(plan.columns, plan.cells, markdown=markdown)


@contextmanager
def progress_display(
    task_name: str,
    *figures: ColumnOrText,
    wide_terminal_columns: Sequence[ColumnOrText] = (),
    total: float | None = None,
    visible: bool = True,
    **task_fields: Any,
) -> Iterator[Callable[..., None]]:
    """Show progress on stderr for the block; yield the function that updates it, by rich's ``advance=N`` or others.

    Without a terminal, a plain line every ``SECONDS_APART`` has the figures and the time so far.

    Args:
        task_name: of what is done.
        figures: classes of rich's columns, or texts, that are shown on any terminal.
        wide_terminal_columns: columns that are shown only if there is room for a bar.
        total: the value at the end; None: unknown.
        visible: whether a terminal shows it.
        task_fields: values of the fields that texts of ``figures`` show as ``{task.fields[NAME]}``.
    """
    for name in task_fields:
        if not any(f"fields[{name}]" in figure for figure in figures if isinstance(figure, str)):
            raise TypeError(f"no figure shows the field {name!r}")
    with make_rich_progress(figures, wide_terminal_columns) as display:
        task = display.add_task(escaped_and_truncated(task_name), total=total, visible=visible, **task_fields)
        with nullcontext() if display.console.is_terminal else _periodic_progress_lines(display):
            yield partial(display.update, task)


@contextmanager
def _periodic_progress_lines(display: Progress) -> Iterator[None]:
    """Print a line of the figures of a display to stderr every ``SECONDS_APART``, until the block ends."""
    ended = Event()

    def print_lines_until_ended() -> None:
        while not ended.wait(SECONDS_APART):
            task, texts = display.tasks[0], []
            for column in display.columns[1:] if display.tasks[0].total else ():
                shown_figure = column.format(task=task) if isinstance(column, str) else column(task)
                # No bar
                texts += [str(shown_figure)] if isinstance(shown_figure, str | Text) else []
            seconds = int(task.elapsed or 0)
            line = " ".join([f"{task.description}:", *texts, f"{seconds // 60}:{seconds % 60:02} so far"])
            try:
                print(line, file=sys.stderr, flush=True)
            except BrokenPipeError:
                # The command's own next line raises it where it is handled
                return

    thread = Thread(target=print_lines_until_ended, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def make_rich_progress(
    figures: Sequence[ColumnOrText], wide_terminal_columns: Sequence[ColumnOrText] = ()
) -> Progress:
    """Return a display of a name, a bar if there is room, and columns whose figures are never cut."""
    console = BrokenPipeRaisingConsole(stderr=True)
    has_room = console.width >= MIN_BAR_WIDTH
    shown_figures = [*figures, *(wide_terminal_columns if has_room else ())]
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
        *([BarColumn()] if has_room else []),
        *(
            column if isinstance(column, str) else column(table_column=Column(no_wrap=True))
            for column in shown_figures
        ),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # files and pipes get plain lines
    )


def tokens_per_second_text(tokens_per_second: float) -> str:
    """Return a number of tokens a second as text: whole, or with two digits below 10."""
    return f"{tokens_per_second:.0f}" if tokens_per_second >= 9.95 else f"{tokens_per_second:.2g}"


def mib_text(byte_count: int) -> str:
    """Return a number of bytes in MiB, as tables show it."""
    return f"{byte_count / 2**20:.2f}"


def bytes_before_and_after_text(rows: Sequence[Any]) -> str:
    """Return what the bytes of converted tensors were and are together, as text."""
    before, after = (sum(getattr(row, part) for row in rows) for part in ("before_bytes", "after_bytes"))
    return f"{mib_text(before)} MiB became {mib_text(after)} MiB"


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as tables show it, such as "768 x 3072"."""
    return " x ".join(map(str, shape)) or "scalar"


def _print_row_vertically(columns: Sequence[str], row: Sequence[str]) -> None:
    """Print the first cell of a row, and below it a line for each other cell that is not empty."""
    _print_renderable(Text(row[0], overflow="fold"), cell_len(row[0]))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for column, cell in zip(columns[1:], row[1:], strict=True):
        if cell:
            table.add_row(Text(f"  {column}"), Text(cell))
    _print_renderable(table)
    print()


def _print_renderable(renderable: RenderableType, min_width: int = 0) -> None:
    console = BrokenPipeRaisingConsole()
    if not console.is_terminal:
        console.width = max(min_width, PIPED_WIDTH)
    console.print(renderable, crop=False)


def _stdout_width() -> int:
    """Return the width of stdout in characters."""
    console = BrokenPipeRaisingConsole()
    return console.width if console.is_terminal else PIPED_WIDTH
