"""Instructions that base and head execute, counted by callgrind: the same in each run to some thousandths.

They show what times cannot: a few percents, on a loaded machine. They do not show waiting, caches, or the vector
kernels: what is counted is portable C on one thread, and the Python of a layer.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.latency.builds import Environment, GateError
from benchmarks.latency.rounds import worker_environment
from lowmem.kernels.cpu import compiler
from lowmem.testing.verdicts import Row, verdict_of

LIMIT = 0.02  # more instructions than this fail
FIGURE = "instructions"
PATIENCE = 1800  # seconds; on two idle cores it takes about one minute


def compare(base: Environment, head: Environment, harness: Path, scratch: Path) -> tuple[list[Row], list[str]]:
    """Count both sides at once, and return a row for each workload; or one that says why nothing was counted."""
    scratch.mkdir()
    why = unavailable(scratch)
    if not (base.has_kernel and head.has_kernel):
        why = why or "neither side has a compiled kernel"
    if why:
        return [Row("all", FIGURE, verdict="skipped", says=why)], [f"Instructions were not counted: {why}."]
    shutil.copy(Path(__file__).with_name("counted.py"), harness / "benchmarks" / "latency" / "counted.py")
    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(lambda side: count(*side, harness, scratch), ((base, "base"), (head, "head"))))
    return judge(*counts), []


def unavailable(scratch: Path) -> str | None:
    """Return why instructions cannot be counted here; or None, and the requests to callgrind are compiled."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed (Debian: apt-get install valgrind)"
    command = compiler()
    if shutil.which(command[0]) is None:
        return f"the C compiler {command[0]!r} is not installed"
    source = Path(__file__).with_name("marks.c")
    command += ["-shared", "-fPIC", "-O1", "-o", str(scratch / "marks.so"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{source.name} does not compile; valgrind's headers may be missing"
    return None


def count(environment: Environment, side: str, harness: Path, scratch: Path) -> dict[str, int | None]:
    """Return the instructions of each workload on one side; None for one that it cannot run."""
    directory = scratch / side
    directory.mkdir()
    out = directory / "callgrind.out"
    variables = worker_environment(harness, 0) | {"LOWMEM_KERNEL": "portable", "OMP_NUM_THREADS": "1"}
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
    command += [str(environment.python), "-m", "benchmarks.latency.counted", str(scratch / "marks.so")]
    try:
        done = subprocess.run(
            command, cwd=directory, env=variables, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired as error:
        raise GateError(f"counting the instructions of {environment.commit} took more than {PATIENCE} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if not line.startswith("==")] or ["it wrote nothing"]
        raise GateError(f"{environment.commit} ended ({done.returncode}) under callgrind: {said[-1]}")
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


def judge(base: Mapping[str, int | None], head: Mapping[str, int | None]) -> list[Row]:
    """Return a row for each workload: beyond ``LIMIT`` in either direction it is no longer the same."""
    if not any(base.values()) and not any(head.values()):
        raise GateError("callgrind counted nothing: see what valgrind --tool=callgrind python -c 'import torch' says")
    rows = []
    for name in dict.fromkeys([*base, *head]):
        before, after = base.get(name), head.get(name)
        if before is None and after is None:
            raise GateError(
                f"neither base nor head can run {name!r} under callgrind: see benchmarks/latency/counted.py"
            )
        if before is None or after is None:
            verdict, says = ("new", "base cannot run it") if before is None else ("missing", "head cannot run it")
            rows.append(Row(name, FIGURE, before, after, verdict=verdict, says=says))
            continue
        verdict = verdict_of(before, after, LIMIT * before)
        says = "" if verdict == "same" else f"{before:,} to {after:,} instructions"
        rows.append(Row(name, FIGURE, before, after, after / before, verdict=verdict, says=says))
    return rows
