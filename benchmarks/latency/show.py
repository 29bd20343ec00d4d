"""A verdict as a table that is read in ten seconds, as Markdown for the page of an Actions run, and as JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.latency.builds import GateError
from lowmem.testing.verdicts import FAILING, Row, Verdict, write_verdict

ORDER = ("slower", "missing", "grew", "undecided", "faster", "shrank", "new", "skipped", "same")
COLORS = {"slower": "bold red", "missing": "bold red", "grew": "bold red", "faster": "green", "shrank": "green"}
COLORS |= {"undecided": "yellow"}
OUTCOMES = {"passed": "bold green", "undecided": "bold yellow", "failed": "bold red"}
FAILS = FAILING["latency"] | FAILING["instructions"]
HEADINGS = ("Workload", "Head / base", "Interval", "Verdict", "")


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Put what fails first, then what improved, then the rest; within each, the slowest first."""
    return sorted(rows, key=lambda row: (ORDER.index(row.verdict), -(row.ratio or 0.0)))


def headline(verdict: Verdict) -> str:
    counts = {word: sum(row.verdict == word for row in verdict.rows) for word in ORDER}
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "nothing was compared"
    if verdict.rows and all(row.verdict == "skipped" for row in verdict.rows):
        return f"{verdict.gate}: SKIPPED: {verdict.rows[0].says}"
    return f"{verdict.gate}: {verdict.outcome if verdict.passed else verdict.outcome.upper()}: {said}"


def print_verdict(verdict: Verdict, console: Console, everything: bool = False) -> None:
    """Print the table: what differs, or all rows, and the verdict last."""
    console.print(Text(f"{verdict.gate}: head {verdict.head} against base {verdict.base}"), soft_wrap=True)
    table = Table(*HEADINGS, box=None, pad_edge=False)
    shown = [row for row in in_order(verdict.rows) if everything or row.verdict not in ("same", "skipped")]
    for row in shown:
        cells = _cells(row)
        style = COLORS.get(row.verdict, "")
        table.add_row(*(Text(cell, overflow="fold") for cell in cells), style=style)
    if shown:
        console.print(table)
    for note in [*verdict.notes, *_summary_of_same(verdict)]:
        console.print(Text(note), soft_wrap=True)
    console.print(Text(headline(verdict), style=OUTCOMES[verdict.outcome]), soft_wrap=True)


def markdown(verdict: Verdict) -> str:
    """Return the table as Markdown, all rows, those of workloads that stayed the same folded."""
    lines = [f"### {headline(verdict)}", "", f"head {verdict.head} against base {verdict.base}", ""]
    rows = in_order(verdict.rows)
    differ = [row for row in rows if row.verdict != "same"]
    same = [row for row in rows if row.verdict == "same"]
    if differ:
        lines += [*_markdown_table(differ), ""]
    lines += [*verdict.notes, ""] if verdict.notes else []
    if same:
        lines += ["<details><summary>", "", f"{len(same)} the same", "", "</summary>", "", *_markdown_table(same)]
        lines += ["", "</details>", ""]
    return "\n".join(lines) + "\n"


def write(verdicts: list[Verdict], output: Path | None) -> None:
    """Write each verdict as JSON into a directory, and all as Markdown to the summary of an Actions job."""
    try:
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            for verdict in verdicts:
                write_verdict(output / f"{verdict.gate}.json", verdict)
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            with Path(summary).open("a", encoding="utf8") as out:
                out.writelines(markdown(verdict) for verdict in verdicts)
    except OSError as error:
        raise GateError(f"the verdict cannot be written: {error}") from error


def _summary_of_same(verdict: Verdict) -> list[str]:
    ratios = [row.ratio for row in verdict.rows if row.verdict == "same" and row.ratio is not None]
    if not ratios:
        return []
    return [f"{len(ratios)} the same, from {100 * (min(ratios) - 1):+.1f}% to {100 * (max(ratios) - 1):+.1f}%"]


def _cells(row: Row) -> tuple[str, ...]:
    return row.name, *row.ratio_cells, row.verdict.upper() if row.verdict in FAILS else row.verdict, row.says


def _markdown_table(rows: list[Row]) -> list[str]:
    def line(cells: tuple[str, ...]) -> str:
        escaped = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    return [line(HEADINGS), "| :-- | --: | :-- | :-- | :-- |", *(line(_cells(row)) for row in rows)]
