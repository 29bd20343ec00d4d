"""The gate from a reference to its verdicts: builds, rounds, instructions.

python -m benchmarks.latency --base origin/main        the same as: tox -e gate -- --base origin/main
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.latency import builds, instructions, rounds
from benchmarks.latency.builds import Environment, GateError
from benchmarks.latency.rounds import Start
from benchmarks.latency.verdict import FEWEST_AGAIN, Times, judge, looks_different, needs_second_look
from lowmem.testing.verdicts import Row, Verdict

ROOT = Path(__file__).resolve().parent.parent.parent

FIRST_ROUNDS = 6  # all workloads; a multiple of 3, so that each side begins as often
AGAIN_ROUNDS = 15  # those that look different: fewer could not pass Holm's correction over all workloads
LONG_EVERY = 2  # of the first rounds, workloads of long calls, which vary less, take part in each so many
AGAIN_TURNS = 3


@dataclass(frozen=True)
class Options:
    """What a run of the gate is asked for."""

    base: str  # a reference; its merge base with HEAD is the base
    threshold: float  # 0.05 lets a workload be 5% slower
    cache: Path  # of wheels
    workloads: str = "*"  # a shell pattern of names
    gates: tuple[str, ...] = ("latency", "instructions")


def run(options: Options, progress: Callable[[str], None], root: Path = ROOT) -> list[Verdict]:
    """Build base and head, compare them, and return a verdict of each gate."""
    base, head, dirty = builds.resolve(root, options.base)
    notes = ["The working tree differs from HEAD: what is not committed is not measured."] if dirty else []
    if base.sha == head.sha:
        notes.append("Base and head are the same commit: nothing changed between them.")
    with tempfile.TemporaryDirectory(prefix="lowmem-gate-", ignore_cleanup_errors=True) as made:
        scratch = Path(made)
        environments = []
        for side, commit in (("base", base), ("head", head)):
            progress(f"building {commit}")
            wheel = builds.build_wheel(root, commit, options.cache.resolve(), scratch)
            environments.append(builds.install(wheel, commit, scratch / side))
        check_kernels(*environments)
        if not environments[1].has_kernel:
            notes.append("Neither side has a compiled kernel: plain torch was timed.")
        kernels = [builds.backend(environment) for environment in environments]
        if kernels[0] != kernels[1]:
            notes.append(f"Base runs the kernel {kernels[0]} here, and head {kernels[1]}.")
        harness = scratch / "harness"
        rounds.copy_harness(root, harness)

        def verdict(gate: str, rows: list[Row], notes: list[str]) -> Verdict:
            return Verdict.of_rows(gate, str(base), str(head), machine() | {"kernel": kernels[1]}, rows, notes)

        verdicts = []
        if "instructions" in options.gates:  # first: where valgrind fails, no minutes of timing are lost
            progress("counting instructions under callgrind")
            rows, said = instructions.compare(*environments, harness, scratch / "counts")
            verdicts.append(verdict("instructions", rows, notes + said))
        if "latency" in options.gates:
            start = rounds.starter(*environments, harness, scratch / "rounds")
            rows = compare(start, options, progress)
            verdicts.insert(0, verdict("latency", rows, notes))
        return verdicts


def check_kernels(base: Environment, head: Environment) -> None:
    """Refuse to compare a compiled kernel with plain torch, which serves where C did not compile."""
    if base.has_kernel != head.has_kernel:
        without = head.commit if base.has_kernel else base.commit
        raise GateError(
            f"the C kernel of {without} does not compile; the other side's does: see the log in the cache"
        )


def compare(start: Start, options: Options, progress: Callable[[str], None]) -> list[Row]:
    """Time all workloads, those that look different or were disturbed again in fresh processes, and judge."""

    def told(what: str) -> None:
        progress(f"timing, {what} of {FIRST_ROUNDS + AGAIN_ROUNDS} at most")

    first, broken = rounds.measure(
        start,
        range(FIRST_ROUNDS),
        only=lambda name: fnmatchcase(name, options.workloads),
        long_every=LONG_EVERY,
        progress=told,
    )
    if not first and not broken:
        raise GateError(f"no workload is called {options.workloads!r}: see benchmarks/latency/workloads.py")
    suspects = {name for name, times in first.items() if needs_second_look(times, options.threshold)}
    second: dict[str, Times] = {}
    if suspects:
        progress(f"again in fresh processes: {', '.join(sorted(suspects))}")
        second, newly = rounds.measure(
            start,
            range(FIRST_ROUNDS, FIRST_ROUNDS + AGAIN_ROUNDS),
            only=suspects.__contains__,
            turns=AGAIN_TURNS,
            settled=lambda times: settled(times, options.threshold),
            progress=told,
        )
        broken |= newly
    rows = judge({name: times for name, times in first.items() if name not in broken}, second, options.threshold)
    if not rows and all(said.startswith("base") for said in broken.values()):
        raise GateError(f"base can run no workload: {next(iter(broken.values()))}")
    return rows + [_broken_row(name, said) for name, said in broken.items()]


def settled(times: Times, threshold: float) -> bool:
    """Whether a workload needs no further round: it is within the threshold, or other work disturbs every round."""
    clean = times.clean()
    if len(times.head) >= FEWEST_AGAIN and not clean.head:
        return True
    return len(clean.head) >= FEWEST_AGAIN and not looks_different(clean, threshold)


def _broken_row(name: str, said: str) -> Row:
    side, _, reason = said.partition(": ")
    if side == "base":
        return Row(name, "", verdict="new", says=f"base cannot run it ({reason}): nothing to compare with")
    return Row(name, "", verdict="missing", says=f"head cannot run it, and base can: {reason}")


def machine() -> dict[str, Any]:
    """Return what the figures can depend on."""
    import torch

    return {
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
