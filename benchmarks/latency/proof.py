"""The proof of the gates: ``tox -e gate-proof``. Base against base raises no alarm, and each planted fault does.

Each run is a line that is added to a file, and what is there is not run again: the proof can be stopped and taken up.
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
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import nn

import lowmem
from benchmarks.busy import busy_cores
from benchmarks.latency.builds import CACHE, KERNEL, ROOT, GateError, check_out, git, machine
from lowmem.errors import truncated_error_line
from lowmem.testing.gate_verdicts import FAILING
from lowmem.testing.latency import measure_speedup

RESULTS = ROOT / ".tox" / "gate-proof.jsonl"
BEGIN, END = "<!-- gate-proof -->\n", "<!-- end -->\n"
WIDTH = 2048  # of the model of docs/guides/gate-your-own-model.md
MORE = 0.3  # of the rows of both layers, in the slower candidate


@dataclass(frozen=True)
class Case:
    """What is run, how often, and what has to come of it."""

    name: str
    runs: int = 5
    alarm: bool = True  # whether a gate has to fail, or none may
    file: str = ""  # where a fault is planted; empty: base against base
    found: str = ""  # the text that the fault replaces; it occurs once
    planted: str = ""
    gates: tuple[str, ...] = ("latency",)  # which are run: the keys of run_case's commands, or "guide" and "slower"
    busy: int = 0  # how many other processes keep a core busy each
    undecided: int = 0  # how many runs may be


OF_MEMORY = ("memory", "resident")  # without a baseline of this kernel they fail
FEW_ROWS = "        rows[job->m1 - job->m0 - 1](job, r, end);\n"
LAYER = "lowmem/nn/linear.py"
CALL = """\
        x = autocast_linear_input(input)
        # Faster than attributes; a parametrization may have moved a parameter out
        parameters = self._parameters
        bias"""
DIGEST = "        digest = _sha256_with_zeroed_digest(file)\n        if digest"
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
        file="lowmem/io/lowmem_file.py",
        found=DIGEST,
        # The file is read twice.
        planted="        _sha256_with_zeroed_digest(file)\n" + DIGEST,
    ),
    Case(
        "one megabyte kept",
        file=LAYER,
        found=CALL,
        # In a plain attribute of one layer of BigNet, in its first call.
        planted=CALL.replace(
            "(input)\n",
            "(input)\n        if self.in_features == 1024 and not hasattr(QuantizedModule, 'kept'):\n"
            "            QuantizedModule.kept = b'1' * 2**20\n",
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
    Case("the guide's gate, beside two busy cores", runs=20, alarm=False, gates=("guide",), busy=2, undecided=10),
    Case("30% in the guide's candidate", runs=20, gates=("slower",)),
    Case("30% in the guide's candidate, beside two busy cores", runs=20, gates=("slower",), busy=2, undecided=10),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left of the proof, print its table, and return 0 where all of it holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency.proof", description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", metavar="TEXT", help="run the cases whose names contain this")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="run no more than N of each case")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="what was found")
    parser.add_argument("--table", action="store_true", help="run nothing: print what was found")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the table into docs/benchmarking.md, say")
    given = parser.parse_args(arguments)
    chosen = [case for case in CASES if given.case in case.name]
    if not chosen:
        parser.error(f"--case {given.case}: choose from {'; '.join(case.name for case in CASES)}")
    try:
        given.results.parent.mkdir(parents=True, exist_ok=True)
        with given.results.open("a+", encoding="utf8") as results:
            results.seek(0)
            found = [json.loads(line) for line in results]
            for case in () if given.table else chosen:
                for _ in range(len(runs_of(case, found)), min(given.runs, case.runs)):
                    with planted(case) as clone:
                        found.append(run_case(case, clone))
                    print(json.dumps(found[-1]), file=results, flush=True)
                    print(f"{case.name}: {found[-1]}", file=sys.stderr)
        if given.page:
            update_page(given.page, found)
    except (GateError, OSError, ValueError) as error:
        print(truncated_error_line(f"gate proof: {error}"), file=sys.stderr)
        return 2
    Console().print(Markdown(table(found)))
    return 0 if all(holds(case, found, given.runs) for case in chosen) else 1


@contextmanager
def planted(case: Case) -> Iterator[Path]:
    """Yield a clone of the repository at HEAD, with the case's fault committed on top."""
    with tempfile.TemporaryDirectory(prefix="lowmem-proof-", ignore_cleanup_errors=True) as made:
        clone = Path(made) / "clone"
        check_out(ROOT, "HEAD", clone)
        git(clone, "update-ref", "refs/heads/proof-base", "HEAD")
        if case.file:
            path = clone / case.file
            text = path.read_text(encoding="utf8")
            if text.count(case.found) != 1:
                raise GateError(f"{case.name}: {case.file} must hold {case.found!r} once")
            path.write_text(text.replace(case.found, case.planted), encoding="utf8")
            who = ("-c", "user.name=proof", "-c", "user.email=proof@localhost", "-c", "commit.gpgsign=false")
            git(clone, *who, "commit", "--quiet", "--no-verify", "--all", "--message", case.name)
        if (ROOT / KERNEL).exists():  # for the gates that run in place
            shutil.copy(ROOT / KERNEL, clone / KERNEL)
        yield clone


def run_case(case: Case, clone: Path) -> dict[str, Any]:
    """Run the case's gates once, and return the rows that raised an alarm or are undecided, by gate."""
    out = clone.parent
    commands = {
        "latency": ["benchmarks.latency", "--base", "proof-base", "--cache", str(CACHE), "--output", str(out)],
        "memory": ["pytest", "benchmarks", "-q", "--benchmark-disable", f"--lowmem-json={out / 'memory.json'}"],
        "resident": ["benchmarks.resident", "--json", str(out / "resident.json")],
    }
    variables = os.environ | {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "GITHUB_STEP_SUMMARY": ""}

    def run(gate: str) -> None:
        command = [sys.executable, "-m", *commands[gate]]
        done = subprocess.run(command, cwd=clone, env=variables, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1) and not (out / f"{gate}.json").exists():
            said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["it said nothing"]
            raise GateError(f"{case.name}: the {gate} gate ended with {done.returncode}: {said[-1]}")

    began = time.monotonic()
    alarms: dict[str, list[str]] = {}
    undecided: dict[str, list[str]] = {}
    with busy_cores(case.busy):
        if case.gates[0] in ("guide", "slower"):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                verdict, says = pool.submit(guide, case.gates[0] == "slower").result()
            if verdict != "faster":
                (alarms if verdict == "slower" else undecided)["latency"] = [says]
        else:  # those of memory beside each other, as where a merge is gated: they judge bytes
            with ThreadPoolExecutor() as pool:
                list(pool.map(run, case.gates))
    for path in sorted(out.glob("*.json")):
        verdict = json.loads(path.read_text(encoding="utf8"))
        for words, group in ((FAILING[verdict["gate"]], alarms), (("undecided",), undecided)):
            rows = [row for row in verdict["rows"] if row["verdict"] in words]
            if rows:
                group[verdict["gate"]] = [f"{row['name']} {row['figure']}: {row['says']}" for row in rows]
    seconds = round(time.monotonic() - began)
    figures = {"alarms": alarms, "undecided": undecided, "seconds": seconds, "machine": machine()}
    return {"case": case.name, **figures, "busy": case.busy, "commit": git(ROOT, "rev-parse", "HEAD")}


class Slower(nn.Module):
    """A model whose call also computes ``MORE`` of its rows in another layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.more = model, lowmem.convert(nn.Linear(WIDTH, round(MORE * 2 * WIDTH)), lowmem.FourBit())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.more(x)
        return self.model(x)


def guide(slower: bool) -> tuple[str, str]:
    """Run the gate of docs/guides/gate-your-own-model.md by default settings; return its verdict and what it says.

    Either 4-bit must be 1.5 times as fast as dense, or the slower 4-bit model is compared with the 4-bit one.
    """

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    candidate, reference, at_least = lowmem.convert(model(), lowmem.FourBit()), model(), 1.5
    if slower:
        candidate, reference, at_least = Slower(candidate), lowmem.convert(reference, lowmem.FourBit()), 0.95
    found = measure_speedup(candidate, reference, torch.ones(1, WIDTH), at_least=at_least)
    return found.verdict, f"the candidate is {found}"


def runs_of(case: Case, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in runs if run["case"] == case.name]


def holds(case: Case, runs: list[dict[str, Any]], most: int = 20) -> bool:
    """Whether as many runs as the proof asks for, or ``most``, came out right, and none wrong."""
    own, wanted = runs_of(case, runs), min(most, case.runs)
    decided = [run for run in own if run["alarms"] or not run["undecided"]]
    enough = len(own) >= wanted and len(decided) >= min(wanted, case.runs - case.undecided)
    return enough and all(bool(run["alarms"]) is case.alarm for run in decided)


def table(runs: list[dict[str, Any]]) -> str:
    """Return what was found as a Markdown table: a line for each case."""
    lines = [
        "| Planted | Runs | Alarms | Undecided | Raised by | Seconds |",
        "| :-- | --: | --: | --: | :-- | --: |",
    ]
    for case in CASES:
        own = runs_of(case, runs)
        by = Counter(gate for run in own for gate in run["alarms"])
        seconds = sorted(run["seconds"] for run in own)
        took = f"{seconds[0]} to {seconds[-1]}" if seconds else ""
        gates = ", ".join(f"{gate} in {count}" for gate, count in sorted(by.items()))
        undecided = sum(bool(run["undecided"] and not run["alarms"]) for run in own)
        cells = (len(own), sum(bool(run["alarms"]) for run in own), undecided, gates, took)
        lines.append(f"| {case.name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def update_page(page: Path, runs: list[dict[str, Any]]) -> None:
    """Put the table between the marks of a page."""
    text = page.read_text(encoding="utf8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise GateError(f"--page {page} has no marks {BEGIN.strip()} and {END.strip()} for the table")
    page.write_text(before + begin + table(runs) + end + after, encoding="utf8")


if __name__ == "__main__":
    sys.exit(main())
