"""``python -m benchmarks.latency --base REF``: 0 passed, 1 something is slower, 2 undecided or bad input."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from lowmem import errors
from lowmem.io import atomic

try:
    from benchmarks.latency import gate, show
    from benchmarks.latency.builds import GateError
except ModuleNotFoundError as missing:  # of the extra
    sys.stderr.write(f"latency gate: it needs {str(missing.name).partition('.')[0]}: pip install '.[gate]'\n")
    raise SystemExit(2) from None

GATES = ("latency", "instructions")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(message))


def main(arguments: Sequence[str] | None = None) -> int:
    options, output, everything = parse(arguments)
    began = time.monotonic()

    def progress(what: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {what}", file=sys.stderr)

    try:
        if output is not None:
            check_writable(output)
        verdicts = gate.run(options, progress)
    except GateError as error:
        sys.stderr.write(one_line(str(error)))
        return 2
    except OSError as error:
        sys.stderr.write(one_line(f"{error.filename or ''}: {error.strerror or error}"))
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(one_line("interrupted: no verdict"))
        return 2
    console = Console(width=None if sys.stdout.isatty() else 160)
    for verdict in verdicts:
        console.print()
        show.print_verdict(verdict, console, everything)
    try:
        show.write(verdicts, output)
    except GateError as error:
        sys.stderr.write(one_line(str(error)))
        return 2
    outcomes = {verdict.outcome for verdict in verdicts}
    return 1 if "failed" in outcomes else 2 if "undecided" in outcomes else 0


def parse(arguments: Sequence[str] | None) -> tuple[gate.Options, Path | None, bool]:
    parser = _Parser(prog="python -m benchmarks.latency", description=__doc__, allow_abbrev=False)
    parser.add_argument("--base", required=True, metavar="REF", help="compare HEAD with its merge base with REF")
    parser.add_argument(
        "--threshold", type=percent, default=0.05, metavar="PERCENT", help="how much slower a workload may be (5)"
    )
    parser.add_argument("--workloads", default="*", metavar="PATTERN", help="time these alone: 'inference * batch 1'")
    parser.add_argument("--gate", choices=GATES, action="append", help="run this gate alone")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write latency.json and instructions.json here")
    parser.add_argument(
        "--cache", type=Path, default=gate.ROOT / ".tox" / "gate-cache", metavar="DIR", help="keep wheels here"
    )
    parser.add_argument("--all", action="store_true", help="print the workloads that stayed the same, too")
    given = parser.parse_args(arguments)
    gates = tuple(given.gate or GATES)
    if given.workloads != "*" and "latency" not in gates:
        parser.error("--workloads names what is timed: leave it out, or add --gate latency")
    return gate.Options(given.base, given.threshold, given.cache, given.workloads, gates), given.output, given.all


def percent(text: str) -> float:
    """Return 0.05 for ``5`` and for ``5%``."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} must be a percentage above 0 and up to 1000, as 5 is")
    return value / 100


def check_writable(directory: Path) -> None:
    """Refuse a directory in which no verdict could be written, before minutes are spent."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in GATES:
            atomic.check_writable(directory / f"{name}.json")
    except OSError as error:
        raise GateError(f"--output {str(directory)!r} cannot be written: {error.strerror or error}") from error


def one_line(message: str) -> str:
    return errors.one_line(f"latency gate: {message}") + "\n"


if __name__ == "__main__":
    sys.exit(main())
