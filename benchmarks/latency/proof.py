"""The proof of the gates: ``tox -e gate-proof``. Base against base raises no alarm, and each planted fault does.

    python -m benchmarks.latency.proof                          all of it: hours on two cores
    python -m benchmarks.latency.proof --case "extra copy" --runs 1
    python -m benchmarks.latency.proof --table --page docs/benchmarking.md      only show what was found so far

Each run is added to a JSON file, and what is there is not run again: the proof can be stopped and taken up. Faults
are planted in a clone: the repository and its working tree are left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.busy import busy_cores
from benchmarks.latency.builds import GateError, git
from benchmarks.latency.gate import ROOT, machine
from lowmem.errors import one_line
from lowmem.io.atomic import check_writable, write_atomically
from lowmem.testing.verdicts import FAILING

RESULTS = ROOT / ".tox" / "gate-proof.json"
BEGIN, END = "<!-- gate-proof -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Case:
    """What is run, how often, and what has to come of it."""

    name: str
    runs: int = 5
    alarm: bool = True  # whether a gate has to fail, or none may
    file: str = ""  # where a fault is planted; empty: base against base
    found: str = ""  # the text that the fault replaces; it occurs once
    planted: str = ""
    gates: tuple[str, ...] = ("latency",)  # which are run: the keys of run_case's commands
    busy: int = 0  # how many other processes keep a core busy each
    decided: int | None = None  # the fewest runs that must pass or fail; None: no run may be undecided


OF_MEMORY = ("memory", "resident")  # without a baseline of this kernel they fail
FEW_ROWS = "        rows[job->m1 - job->m0 - 1](job, r, end);\n"
LAYER = "lowmem/nn/linear.py"
CALL = "        x = autocast(input)\n        found = self._parameters"
STORED_COPY = '    if isinstance(module, nn.RNNBase):\n        copied.__dict__.pop("_flat_weights", None)\n'
CASES = (
    Case("base against base", runs=10, alarm=False),
    Case("base against base, beside a busy core", runs=10, alarm=False, busy=1),
    Case(
        "10% in a kernel",
        file="lowmem/kernels/csrc/few.h",
        found=FEW_ROWS,
        # A tenth of the rows is multiplied twice.
        planted=FEW_ROWS + FEW_ROWS.replace("r, end", "r, r + (end - r) / 10"),
    ),
    Case(
        "30% in a layer's Python at batch 1",
        file=LAYER,
        found=CALL,
        # Of about 6 microseconds that the call of a small layer takes, 2.
        planted=CALL.replace("(input)\n", "(input)\n        for _ in range(100):\n            pass\n"),
    ),
    Case("one extra copy of the input", file=LAYER, found=CALL, planted=CALL.replace("(input)", "(input).clone()")),
    Case(
        "a slower load",
        file="lowmem/io/container.py",
        found="        digest = _digest(file)\n        if digest",
        # The file is read twice.
        planted="        _digest(file)\n        digest = _digest(file)\n        if digest",
    ),
    Case(
        "one megabyte kept",
        file=LAYER,
        found=CALL,
        # In a plain attribute of one layer of BigNet, in its first call.
        planted=CALL.replace(
            "(input)\n",
            "(input)\n        if self.in_features == 1024 and not hasattr(CodedModule, 'kept'):\n"
            "            CodedModule.kept = b'1' * 2**20\n",
        ),
        gates=OF_MEMORY,
    ),
    Case(
        "one byte more in a state",
        file="lowmem/nn/module_copy.py",
        found=STORED_COPY,
        planted='    copied.register_buffer("one", torch.zeros(1, dtype=torch.uint8))\n' + STORED_COPY,
        gates=OF_MEMORY,
    ),
    Case("the baselines' own commit", alarm=False, gates=OF_MEMORY),
    Case("the baselines' own commit, beside a busy core", alarm=False, gates=OF_MEMORY, busy=1),
    Case("the guide's gate", runs=20, alarm=False, gates=("guide",)),
    Case("the guide's gate, beside two busy cores", runs=20, alarm=False, gates=("guide",), busy=2, decided=10),
    Case("30% in the guide's candidate", runs=20, gates=("slower",)),
    Case("30% in the guide's candidate, beside two busy cores", runs=20, gates=("slower",), busy=2, decided=10),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left of the proof, print its table, and return 0 where all of it holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency.proof", description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", metavar="TEXT", help="run the cases whose names contain this")
    parser.add_argument("--runs", type=int, metavar="N", help="run no more than N of each case")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FILE", help="what was found (.tox/gate-proof.json)"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / ".tox" / "gate-cache", metavar="DIR")
    parser.add_argument("--workloads", default="*", metavar="PATTERN", help="time these alone, for a quick look")
    parser.add_argument("--table", action="store_true", help="run nothing: print what was found")
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="put the table into this page: docs/benchmarking.md"
    )
    given = parser.parse_args(arguments)
    chosen = [case for case in CASES if not given.case or any(text in case.name for text in given.case)]
    if not chosen:
        parser.error(f"--case {given.case}: choose from {'; '.join(case.name for case in CASES)}")
    if given.workloads != "*" and given.results == RESULTS:
        parser.error("--workloads is a quick look, and no proof: name another file with --results")
    try:
        found = read_results(given.results)
        if not given.table:
            given.results.parent.mkdir(parents=True, exist_ok=True)
            check_writable(given.results)  # before a run of minutes
        for case in () if given.table else chosen:
            runs = case.runs if given.runs is None else min(given.runs, case.runs)
            while sum(run["case"] == case.name for run in found) < runs:
                with planted(case) as clone:
                    found.append(run_case(case, clone, given.cache.resolve(), given.workloads))
                write_results(given.results, found)
                print(f"{case.name}: {outcome(found[-1])}", file=sys.stderr)
        if given.page:
            update_page(given.page, found)
    except (GateError, OSError) as error:
        print(one_line(f"gate proof: {error}"), file=sys.stderr)
        return 2
    Console().print(Markdown(table(found)))
    return 0 if all(holds(case, found, given.runs) for case in chosen) else 1


@contextmanager
def planted(case: Case) -> Iterator[Path]:
    """Yield a clone of the repository at HEAD, with the case's fault committed on top."""
    with tempfile.TemporaryDirectory(prefix="lowmem-proof-", ignore_cleanup_errors=True) as made:
        clone = Path(made) / "clone"
        head = git(ROOT, "rev-parse", "HEAD")
        git(ROOT, "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(clone))
        git(clone, "checkout", "--quiet", "--detach", head)
        git(clone, "update-ref", "refs/heads/proof-base", head)
        if case.file:
            path = clone / case.file
            text = path.read_text(encoding="utf8")
            if text.count(case.found) != 1:
                raise GateError(
                    f"{case.name}: {case.file} holds {text.count(case.found)} times {case.found!r}, not once"
                )
            path.write_text(text.replace(case.found, case.planted), encoding="utf8")
            who = ("-c", "user.name=proof", "-c", "user.email=proof@localhost", "-c", "commit.gpgsign=false")
            git(clone, *who, "commit", "--quiet", "--no-verify", "--all", "--message", case.name)
        for kernel in (ROOT / "lowmem" / "kernels").glob("_native*"):  # for the gates that run in place
            if kernel.suffix in (".so", ".pyd"):
                shutil.copy(kernel, clone / "lowmem" / "kernels")
        yield clone


def run_case(case: Case, clone: Path, cache: Path, workloads: str) -> dict[str, Any]:
    """Run the case's gates once, and return the rows that raised an alarm, by gate."""
    out = clone.parent / "verdicts"
    out.mkdir(exist_ok=True)
    variables = os.environ | {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    variables.pop("GITHUB_STEP_SUMMARY", None)
    python = sys.executable
    latency = [python, "-m", "benchmarks.latency", "--base", "proof-base", "--cache", str(cache)]
    memory = [python, "-m", "pytest", "benchmarks", "-q", "--benchmark-disable"]
    commands = {
        "latency": [*latency, "--output", str(out), "--workloads", workloads],
        "memory": [*memory, f"--lowmem-json={out / 'memory.json'}"],
        "resident": [python, "-m", "benchmarks.resident", "--json", str(out / "resident.json")],
        "guide": [python, "-m", "benchmarks.latency.guide", str(out / "guide.json")],
        "slower": [python, "-m", "benchmarks.latency.guide", str(out / "slower.json"), "--slower"],
    }
    began = time.monotonic()

    def run(gate: str) -> None:
        # Users run their gate by default settings.
        env = dict(os.environ) if gate in ("guide", "slower") else variables
        done = subprocess.run(commands[gate], cwd=clone, env=env, capture_output=True, text=True, check=False)
        undecided = done.returncode == 2 and (out / f"{gate}.json").exists()
        if done.returncode not in (0, 1) and not undecided:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["it said nothing"]
            raise GateError(f"{case.name}: the {gate} gate ended with {done.returncode}: {said[-1]}")

    # Those of memory beside each other, as where a merge is gated: they judge bytes.
    with busy_cores(case.busy), ThreadPoolExecutor() as pool:
        list(pool.map(run, case.gates))
    alarms: dict[str, list[str]] = {}
    undecided: dict[str, list[str]] = {}
    for path in sorted(out.glob("*.json")):
        verdict = json.loads(path.read_text(encoding="utf8"))
        if not verdict["passed"]:
            failed = [row for row in verdict["rows"] if row["verdict"] in FAILING[verdict["gate"]]]
            unsure = [row for row in verdict["rows"] if row["verdict"] == "undecided" and not failed]
            found = undecided if unsure else alarms
            found[verdict["gate"]] = [f"{row['name']} {row['figure']}: {row['says']}" for row in failed or unsure]
    return {
        "case": case.name,
        "alarms": alarms,
        "undecided": undecided,
        "seconds": round(time.monotonic() - began),
        "machine": machine(),
        "workloads": workloads,
        "beside": ("nothing", "a loop", "two loops")[case.busy],
        "commit": git(ROOT, "rev-parse", "HEAD"),
    }


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a results file."""
    if not path.exists():
        return []
    try:
        runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf8"))["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise GateError(f"{path} holds no results of a proof ({error!r}): remove it, or name another") from error
    return runs


def write_results(path: Path, runs: list[dict[str, Any]]) -> None:
    """Write the results, whole or not at all: a run is a line."""
    lines = ",\n".join(json.dumps(run) for run in runs)
    write_atomically(path, f'{{"runs": [\n{lines}\n]}}\n'.encode())


def outcome(run: dict[str, Any]) -> str:
    by = ", ".join(f"{gate} ({len(rows)})" for gate, rows in run["alarms"].items())
    undecided = "; ".join(said for rows in run.get("undecided", {}).values() for said in rows)
    return f"{f'alarm: {by}' if by else undecided or 'no alarm'}, {run['seconds']} s"


def holds(case: Case, runs: list[dict[str, Any]], most: int | None = None) -> bool:
    """Whether as many runs as the proof asks for, or ``most``, came out right, and none wrong."""
    own = [run for run in runs if run["case"] == case.name]
    decided = [run for run in own if not _undecided(run)]
    wanted = case.runs if most is None else min(most, case.runs)
    enough = len(own) >= wanted and len(decided) >= min(wanted, case.runs if case.decided is None else case.decided)
    return enough and all(bool(run["alarms"]) is case.alarm for run in decided)


def _undecided(run: dict[str, Any]) -> bool:
    return bool(run.get("undecided")) and not run["alarms"]


def table(runs: list[dict[str, Any]]) -> str:
    """Return what was found as a Markdown table: a line for each case."""
    lines = [
        "| Planted | Runs | Alarms | Has to be | Undecided | Raised by | Seconds |",
        "| :-- | --: | --: | --: | --: | :-- | --: |",
    ]
    for case in CASES:
        own = [run for run in runs if run["case"] == case.name]
        alarms = [run for run in own if run["alarms"]]
        by = Counter(gate for run in alarms for gate in run["alarms"])
        least = case.runs if case.decided is None else case.decided
        wanted = f"{least if case.alarm else 0} of {case.runs}"
        undecided = sum(map(_undecided, own))
        seconds = sorted(run["seconds"] for run in own)
        took = f"{seconds[0]} to {seconds[-1]}" if seconds else ""
        gates = ", ".join(f"{gate} in {count}" for gate, count in sorted(by.items()))
        lines.append(f"| {case.name} | {len(own)} | {len(alarms)} | {wanted} | {undecided} | {gates} | {took} |")
    return "\n".join(lines) + "\n"


def update_page(page: Path, runs: list[dict[str, Any]]) -> None:
    """Put the table between the marks of a page."""
    try:
        text = page.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise GateError(f"--page {page} cannot be read: {error}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise GateError(f"--page {page} has no marks {BEGIN.strip()} and {END.strip()} for the table")
    page.write_text(before + begin + table(runs) + end + after, encoding="utf8")


if __name__ == "__main__":
    sys.exit(main())
