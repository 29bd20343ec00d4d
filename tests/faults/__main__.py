"""Plant faults in C, one at a time in a copy of the tree, and see that a test fails: ``python -m tests.faults``."""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.pool
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.faults.command import clean_outcomes, natural, refuse, refuse_broken
from tests.faults.copies import LIVES, QUIET, SOURCE, Copy, Outcome, exit_on_sigterm, import_once
from tests.faults.library import BuildError, compile_all, kernels
from tests.faults.planted import LIST, Fault, errors_of, read_faults

LEAST_SECONDS = 120  # that a run with a fault may take, or SLOWER times what it takes without
SLOWER = 10

_copy: Copy  # of a worker process


@dataclass(frozen=True)
class Trial:
    """Some tests, and the kernel that serves them."""

    tests: tuple[str, ...]
    select: str
    kernel: str

    def __str__(self) -> str:
        return f"{' '.join(self.tests)} -k {self.select!r}"

    @classmethod
    def of(cls, fault: Fault) -> Trial:
        return cls(fault.tests, fault.select, fault.kernel)

    @property
    def parts(self) -> list[Trial]:
        """Return a trial for each of the tests, which other faults may share."""
        return [replace(self, tests=(test,)) for test in self.tests]

    def run(self, copy: Copy, seconds: float = 1800) -> Outcome:
        return copy.run(self.tests, self.select, {**QUIET, "LOWMEM_KERNEL": self.kernel}, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0 where every fault was caught, 1 where one was not, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        faults = _chosen(read_faults(LIST), options.only)
        if stale := errors_of(faults, SOURCE):
            raise ValueError(f"{len(stale)} faults do not apply, the first: {stale[0]}")
    except ValueError as reason:
        return refuse("faults", str(reason))
    if options.list:
        for fault in faults:
            print(f"{fault.id:34} {fault.file}: {fault.breaks}")
        return 0
    if not hasattr(os, "fork"):
        return refuse("faults", "faults are tried in forks, which this system has not: run them on Linux or macOS")
    import_once()
    with tempfile.TemporaryDirectory(prefix="lowmem-faults-") as folder:
        objects = options.objects or Path(folder, "objects")
        try:
            compile_all(SOURCE, objects)
            # Tests run in forks of the workers, which have no thread that could hold a lock.
            with multiprocessing.get_context("fork").Pool(options.jobs, _start_worker, (folder, objects)) as pool:
                return _try_all(pool, faults)
        except (OSError, ValueError, BuildError) as reason:
            return refuse("faults", str(reason))


def _try_all(pool: multiprocessing.pool.Pool, faults: Sequence[Fault]) -> int:
    have = pool.apply(_kernels)
    skipped = [fault for fault in faults if fault.kernel not in have]
    tried = [fault for fault in faults if fault not in skipped]
    for fault in skipped:
        _say("skipped", fault.id, 0.0, f"this processor has no {fault.kernel}")
    if not tried:
        raise ValueError("no fault can be tried on this processor: choose others with --only")
    parts = list(dict.fromkeys(part for fault in tried for part in Trial.of(fault).parts))
    print(f"{len(tried)} faults; first their {len(parts)} sets of tests without a fault", flush=True)
    # Of several files, -k may leave nothing of one: unusable.
    clean, broken = clean_outcomes(zip(parts, pool.imap(_run_clean, parts), strict=True), LIVES)
    untried = [fault for fault in tried if not set(broken).isdisjoint(Trial.of(fault).parts)]
    given = []
    for fault in (one for one in tried if one not in untried):
        own = [clean[part] for part in Trial.of(fault).parts]
        if all(outcome.verdict == "unusable" for outcome in own):
            raise ValueError(f"{fault.id}: select={fault.select!r} leaves no test of {', '.join(fault.tests)}")
        given.append((fault, max(LEAST_SECONDS, SLOWER * sum(outcome.seconds for outcome in own))))
    survived = []
    for fault, outcome in pool.imap(_run_planted, given):
        killed = outcome.verdict not in LIVES
        _say("killed" if killed else "SURVIVED", fault.id, outcome.seconds, outcome.first if killed else fault.breaks)
        if not killed:
            survived.append(fault)
    _close(faults, skipped + untried, survived)
    refuse_broken(broken, len(untried))
    return 1 if survived else 0


def _close(faults: Sequence[Fault], skipped: Sequence[Fault], survived: Sequence[Fault]) -> None:
    print(f"\n{'faults':>8}{'killed':>8}{'survived':>10}{'skipped':>9}")
    print(f"{len(faults):8}{len(faults) - len(skipped) - len(survived):8}{len(survived):10}{len(skipped):9}")
    for fault in survived:
        print(f"SURVIVED {fault.id}: {fault.breaks} ({fault.file}); none of {', '.join(fault.tests)} fails")
    if not survived:
        print("Every fault that was tried is caught.")


def _say(verdict: str, name: str, seconds: float, text: str) -> None:
    print(f"{verdict:9} {name:34} {seconds:6.1f} s  {text}", flush=True)


def _chosen(faults: list[Fault], only: Sequence[str]) -> list[Fault]:
    known = {fault.id for fault in faults}
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"--only {unknown[0]}: there is no such fault; --list shows all")
    return [fault for fault in faults if not only or fault.id in only]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--only", nargs="+", default=(), metavar="ID", help="try these faults alone")
    parser.add_argument("--list", action="store_true", help="list the faults, and try none")
    parser.add_argument("--jobs", type=natural, default=1, metavar="N", help="try N at a time, each in a copy (1)")
    parser.add_argument("--objects", type=Path, metavar="DIR", help="keep compiled C files there for the next run")
    return parser


def _start_worker(folder: str, objects: Path) -> None:
    global _copy
    exit_on_sigterm()
    _copy = Copy(Path(tempfile.mkdtemp(dir=folder)), SOURCE, objects)


def _kernels() -> list[str]:
    return kernels(_copy.root)


def _run_clean(trial: Trial) -> Outcome:
    with _copy.unoptimized():
        return trial.run(_copy)


def _run_planted(given: tuple[Fault, float]) -> tuple[Fault, Outcome]:
    fault, seconds = given
    text = fault.planted_in((_copy.root / fault.file).read_text(encoding="utf8"))
    with _copy.changed(fault.file, text, fault.kernel):
        return fault, Trial.of(fault).run(_copy, seconds)


if __name__ == "__main__":
    sys.exit(main())
