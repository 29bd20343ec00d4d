"""Instructions that base and head execute, counted by callgrind: the same in each run to some thousandths.

They show what times cannot: a few percents, on a loaded machine. They do not show waiting, caches, or the vector
kernels: what is counted is portable C on one thread, and the Python of a layer.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.latency.builds import GateError, Side
from lowmem.kernels.native_loader import configured_c_compiler_command
from lowmem.testing.gate_verdicts import FigureComparison, figure_verdict
from lowmem.testing.memory_baseline import byte_count_text

LIMIT = 0.02  # more instructions than this fail
FIGURE = "instructions"


def compare(base: Side, head: Side, harness: Path, scratch: Path) -> tuple[list[FigureComparison], list[str]]:
    """Count both sides at once, and return a row for each workload; or one that says why nothing was counted."""
    if why := unavailable(harness / "marks.so"):
        return [FigureComparison("all", FIGURE, verdict="skipped", says=why)], [
            f"Instructions were not counted: {why}."
        ]
    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(lambda side: count(side, harness, scratch / side.tree.name), (base, head)))
    return judge(*counts), []


def unavailable(marks: Path) -> str | None:
    """Return why instructions cannot be counted here; or None, and the requests to callgrind are compiled."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed (Debian: apt-get install valgrind)"
    source = Path(__file__).with_name("marks.c")
    command = [*configured_c_compiler_command(), "-shared", "-fPIC", "-O1", "-o", str(marks), str(source)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return f"{source.name} does not compile; valgrind's headers may be missing"
    return None


def count(side: Side, harness: Path, directory: Path) -> dict[str, int | None]:
    """Return the instructions of each workload on one side; None for one that it cannot run."""
    directory.mkdir(parents=True)
    variables = side.variables(harness) | {"LOWMEM_KERNEL": "portable", "OMP_NUM_THREADS": "1"}
    out = f"--callgrind-out-file={directory / 'callgrind.out'}"
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", out, sys.executable]
    command += ["-m", "benchmarks.latency.worker", str(harness / "marks.so")]
    done = subprocess.run(command, cwd=directory, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if not line.startswith("==")] or ["it wrote nothing"]
        raise GateError(f"{side.commit} ended ({done.returncode}) under callgrind: {said[-1]}")
    counts = read_counts(directory)
    return {name: counts.get(name) for name in done.stdout.splitlines()}


def read_counts(directory: Path) -> dict[str, int]:
    """Return what callgrind wrote, by the name that was asked for with each dump."""
    counts = {}
    for path in directory.glob("callgrind.out.*"):
        text = path.read_text(errors="replace")
        name = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
        total = re.search(r"^(?:totals|summary): (\d+)$", text, re.MULTILINE)
        if name and total:
            counts[name[1]] = int(total[1])
    return counts


def judge(base: Mapping[str, int | None], head: Mapping[str, int | None]) -> list[FigureComparison]:
    """Return a row for each workload: beyond ``LIMIT`` in either direction it is no longer the same."""
    rows = []
    for name in dict.fromkeys([*base, *head]):
        before, after = base.get(name), head.get(name)
        if before is None and after is None:
            raise GateError(f"neither side counts {name!r} under callgrind: see benchmarks/latency/worker.py")
        verdict = figure_verdict(before, after, LIMIT * (before or 0))
        ratio = after / before if before and after else None
        says = "" if verdict == "same" else f"{byte_count_text(before)} to {byte_count_text(after)} instructions"
        rows.append(FigureComparison(name, FIGURE, before, after, ratio, verdict=verdict, says=says))
    return rows
