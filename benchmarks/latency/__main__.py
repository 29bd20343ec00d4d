"""``python -m benchmarks.latency --base REF``: 0 passed, 1 something is slower, 2 undecided or bad input."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.latency import instructions, rounds
from benchmarks.latency.builds import CACHE, ROOT, GateError, build, git, machine, resolve
from benchmarks.latency.rounds import Start
from benchmarks.latency.verdict import judge, needs_second_look, settled
from lowmem import errors
from lowmem.testing.gate_verdicts import FAILING, FigureComparison, GateVerdict, write_verdict

GATES = ("latency", "instructions")
FIRST_ROUNDS = 6  # all workloads; a multiple of 3, so that each side begins as often
AGAIN_ROUNDS = 15  # those that look different: fewer could not pass the correction over all workloads
LONG_EVERY = 2  # of the first rounds, workloads of long calls, which vary less, take part in each so many
AGAIN_TURNS = 3
ORDER = ("slower", "missing", "grew", "undecided", "faster", "shrank", "new", "skipped", "same")


@dataclass(frozen=True)
class Options:
    """What a run of the gate is asked for."""

    base: str  # a reference; its merge base with HEAD is the base
    threshold: float = 0.05  # lets a workload be 5% slower
    workloads: str = "*"  # a shell pattern of names
    gates: Sequence[str] = GATES
    cache: Path = CACHE  # of compiled kernels


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__, allow_abbrev=False)
    parser.add_argument("--base", required=True, metavar="REF", help="compare HEAD with its merge base with REF")
    parser.add_argument(
        "--threshold", type=percent, default=0.05, metavar="PERCENT", help="how much slower a workload may be (5)"
    )
    parser.add_argument("--workloads", default="*", metavar="PATTERN", help="time these alone: 'inference * batch 1'")
    parser.add_argument("--gate", choices=GATES, action="append", help="run this gate alone")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write latency.json and instructions.json here")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="keep compiled kernels here")
    parser.add_argument("--all", action="store_true", help="print the workloads that stayed the same, too")
    given = parser.parse_args(arguments)
    options = Options(given.base, given.threshold, given.workloads, given.gate or GATES, given.cache.resolve())
    try:
        if given.output is not None:
            given.output.mkdir(parents=True, exist_ok=True)  # before minutes are spent
        verdicts = run(options)
        for verdict in verdicts if given.output is not None else ():
            write_verdict(given.output / f"{verdict.gate}.json", verdict)
        text = "".join(markdown(verdict, given.all) for verdict in verdicts)
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            with Path(summary).open("a", encoding="utf8") as out:
                out.write(text)
    except (GateError, OSError) as error:
        print(errors.truncated_error_line(f"latency gate: {error}"), file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 160).print(Markdown(text))
    outcomes = {verdict.outcome for verdict in verdicts}
    return 1 if "failed" in outcomes else 2 if "undecided" in outcomes else 0


def percent(text: str) -> float:
    value = float(text.removesuffix("%"))  # 5 and 5% are 0.05
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} must be a percentage above 0 and up to 1000, as 5 is")
    return value / 100


def run(options: Options) -> list[GateVerdict]:
    """Build base and head, compare them, and return a verdict of each gate."""
    base_sha, head_sha = resolve(ROOT, options.base)
    notes = []
    if git(ROOT, "status", "--porcelain"):
        notes.append("The working tree differs from HEAD: what is not committed is not measured.")
    if base_sha == head_sha:
        notes.append("Base and head are the same commit: nothing changed between them.")
    with tempfile.TemporaryDirectory(prefix="lowmem-gate-", ignore_cleanup_errors=True) as made:
        scratch = Path(made)
        print("building base and head", file=sys.stderr)
        asked = f"merge base of HEAD and {options.base}"
        base = build(ROOT, base_sha, asked, scratch / "base", options.cache)
        head = build(ROOT, head_sha, "HEAD", scratch / "head", options.cache)
        if base.kernel != head.kernel:
            notes.append(f"Base runs the kernel {base.kernel} here, and head {head.kernel}.")
        harness = scratch / "harness"  # what the processes import of benchmarks: the same code for both sides
        shutil.copytree(ROOT / "benchmarks", harness / "benchmarks")
        found: dict[str, tuple[list[FigureComparison], list[str]]] = {}
        if "instructions" in options.gates:  # first: where valgrind fails, no minutes of timing are lost
            print("counting instructions under callgrind", file=sys.stderr)
            found["instructions"] = instructions.compare(base, head, harness, scratch / "counts")
        if "latency" in options.gates:
            start = rounds.starter(base, head, harness, scratch / "rounds")
            found = {"latency": (compare(start, options), []), **found}
    figures = machine() | {"kernel": head.kernel}
    return [
        GateVerdict.from_rows(gate, base.commit, head.commit, figures, rows, notes + said)
        for gate, (rows, said) in found.items()
    ]


def compare(start: Start, options: Options) -> list[FigureComparison]:
    """Time all workloads, those that look different or were disturbed again in fresh processes, and judge."""
    first, broken = rounds.measure(
        start,
        range(FIRST_ROUNDS),
        only=lambda name: fnmatchcase(name, options.workloads),
        long_every=LONG_EVERY,
    )
    if not first and not broken:
        raise GateError(f"no workload is called {options.workloads!r}: see benchmarks/latency/workloads.py")
    suspects = {name for name, times in first.items() if needs_second_look(times, options.threshold)}
    print(f"again in fresh processes: {', '.join(sorted(suspects)) or 'none'}", file=sys.stderr)
    second, newly = rounds.measure(
        start,
        range(FIRST_ROUNDS, FIRST_ROUNDS + AGAIN_ROUNDS) if suspects else (),
        only=suspects.__contains__,
        turns=AGAIN_TURNS,
        settled=lambda times: settled(times, options.threshold),
    )
    broken |= newly
    rows = judge({name: times for name, times in first.items() if name not in broken}, second, options.threshold)
    if not rows and all(said.startswith("base") for said in broken.values()):
        raise GateError(f"base can run no workload: {next(iter(broken.values()))}")
    for name, said in broken.items():
        rows.append(
            FigureComparison(name, "", verdict={"base": "new", "head": "missing"}[said[:4]], says=f"failed on {said}")
        )
    return rows


def markdown(verdict: GateVerdict, everything: bool = False) -> str:
    """Return what differs, or all, as a table, what fails first and the slowest first; and the verdict last."""
    rows = sorted(verdict.rows, key=lambda row: (ORDER.index(row.verdict), -(row.ratio or 0.0)))
    lines = [f"### {verdict.gate}: head {verdict.head} against base {verdict.base}", ""]
    shown = [row for row in rows if everything or row.verdict not in ("same", "skipped")]
    if shown:
        lines += ["| Workload | Head / base | Interval | Verdict | |", "| :-- | --: | :-- | :-- | :-- |"]
    for row in shown:
        word = row.verdict.upper() if row.verdict in FAILING[verdict.gate] else row.verdict
        cells = (
            cell.replace("|", "\\|").replace("\n", " ")
            for cell in (row.name, *row.ratio_and_interval_texts, word, row.says)
        )
        lines.append(f"| {' | '.join(cells)} |")
    ratios = [row.ratio - 1 for row in rows if row.verdict == "same" and row.ratio is not None]
    same = [f"{len(ratios)} the same, from {min(ratios):+.1%} to {max(ratios):+.1%}"] if ratios else []
    counts = {word: sum(row.verdict == word for row in rows) for word in ORDER}
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    outcome = verdict.outcome if verdict.passed else verdict.outcome.upper()
    return "\n\n".join(["\n".join(lines), *verdict.notes, *same, f"**{verdict.gate}: {outcome}: {said}**", ""])


if __name__ == "__main__":
    sys.exit(main())
