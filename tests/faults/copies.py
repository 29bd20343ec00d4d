"""Changes of the tree, one at a time in a copy of it, and the tests that must fail with each.

The working tree is never touched: a run that is killed leaves nothing behind but a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from queue import SimpleQueue

SOURCE = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".tox", ".venv", ".hypothesis", ".*_cache", "build", "dist", "__pycache__", "*.egg-info", "*.so"
)
CSRC = Path("lowmem/kernels/csrc")
LIBRARY = Path("lowmem/kernels/_native.abi3.so")
FLAGS = ("-std=gnu11", "-ffp-contract=off", "-O0", "-g0", "-w", "-fPIC")

LIVES = ("passed", "unusable")  # verdicts of tests that noticed nothing: they passed, or none ran
LEAST_SECONDS = 120  # that tests with a change may take, or SLOWER times what they take without
SLOWER = 10
LINES = 30  # of the output of tests that fail without a change

# Threads that wait for work must not keep a core busy: another copy's tests need it.
QUIET = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HYPOTHESIS_PROFILE": "faults"}
OPTIONS = ("-x", "-q", "-rfE", "--no-header", "--tb=short", "--assert=plain", "-pno:cacheprovider")


@dataclass(frozen=True)
class Change:
    """One change of one file, and the tests of which at least one must fail with it."""

    name: str
    file: str
    text: str = field(repr=False)  # of the changed file
    tests: tuple[str, ...]
    select: str = ""  # what pytest -k takes
    kernel: str = ""  # that serves, and is compiled where a C file is changed; empty: the machine's own

    @property
    def parts(self) -> list[Change]:
        """What its tests are without the change, a part for each file of tests, which other changes may share."""
        return [replace(self, name=test, file="", text="", tests=(test,)) for test in self.tests]


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended."""

    verdict: str  # "passed", "failed", "crashed", "timed out", or "unusable" where pytest ran no test at all
    seconds: float
    first: str  # the first test that failed, or how the run ended
    output: str = field(repr=False)


class Copy:
    """A copy of a tree in an empty folder; with ``objects``, its library is linked of these, without optimization."""

    def __init__(self, root: Path, source: Path, objects: Path | None = None) -> None:
        self.source, self.root, self._objects = source, root / "tree", objects
        shutil.copytree(source, self.root, ignore=LEFT_OUT)
        if objects is not None:
            link(self.root, sorted(objects.glob("*.o")))
        elif (source / LIBRARY).exists():
            shutil.copy2(source / LIBRARY, self.root / LIBRARY)

    @contextmanager
    def changed(self, file: str, text: str, kernel: str = "") -> Iterator[None]:
        """Let a file hold another text inside the block; of a C file, compile what the binding and a kernel use."""
        path = self.root / file
        original = path.read_bytes()
        compiled = self._objects is not None and path.parent == self.root / CSRC
        _write(path, text.encode())
        try:
            if compiled:
                self._rebuild(path.name, kernel)
            yield
        finally:
            _write(path, original)
            if compiled:
                link(self.root, sorted(self._objects.glob("*.o")))

    def _rebuild(self, file: str, kernel: str) -> None:
        assert self._objects is not None
        made = {path.name: path for path in self._objects.glob("*.o")}
        units = [self.root / CSRC / f"{name}.c" for name in dict.fromkeys(("module", kernel))]
        changed = [unit for unit in units if any(Path(word).name == file for word in gcc("-MM", str(unit)).split())]
        if not changed:
            raise ValueError(f"neither module.c nor {kernel}.c includes {file}")
        for unit in changed:
            made[f"{unit.stem}.o"] = compile_unit(unit, self.root.parent)
        link(self.root, list(made.values()))

    def run(self, change: Change, seconds: float = 1800) -> Outcome:
        """Run a change's tests, and stop at the first that fails."""
        temporary = f"--basetemp={self.root.parent / 'tests'}"  # runs beside it clear the folders that all share
        select = ["-k", change.select] if change.select else []
        command = [sys.executable, "-m", "pytest", *OPTIONS, temporary, *select, *change.tests]
        own = QUIET | {"PYTHONPATH": str(self.root)} | ({"LOWMEM_KERNEL": change.kernel} if change.kernel else {})
        log, start, code = self.root.parent / "log", time.monotonic(), None
        with log.open("wb") as out, suppress(subprocess.TimeoutExpired):
            code = subprocess.run(
                command, cwd=self.root, env=os.environ | own, stdout=out, stderr=out, timeout=seconds, check=False
            ).returncode
        return outcome(code, time.monotonic() - start, log.read_text(encoding="utf8", errors="replace"))


def _write(path: Path, content: bytes) -> None:
    """Write a file, and remove its compiled code: Python takes it for that of a file of the same size and second."""
    path.write_bytes(content)
    for stale in path.parent.glob(f"__pycache__/{path.stem}.*"):
        stale.unlink()


def outcome(code: int | None, seconds: float, output: str) -> Outcome:
    """Return how a process ended with an exit code; None where it took too long."""
    if code is None:
        return Outcome("timed out", seconds, f"after {seconds:.0f} s", output)
    if code < 0:
        return Outcome("crashed", seconds, signal.Signals(-code).name, output)
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    first = found[1] if found else (output.strip().splitlines() or ["no output"])[-1]
    verdict = "passed" if code == 0 else "failed" if code in (1, 2, 3, 4) else "unusable"
    return Outcome(verdict, seconds, first, output)


# The compiler


def compile_unit(unit: Path, folder: Path) -> Path:
    made = folder / f"{unit.stem}.o"
    gcc("-c", str(unit), "-o", str(made))  # without optimization
    return made


def link(tree: Path, objects: Sequence[Path]) -> None:
    options = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    (tree / LIBRARY).unlink(missing_ok=True)  # a process that has mapped it keeps what it has
    gcc("-shared", *options, *map(str, objects), "-o", str(tree / LIBRARY))


def gcc(*arguments: str) -> str:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    command = [*compiler, *FLAGS, "-I", sysconfig.get_paths()["include"], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip() or f"{compiler[0]} ended with {done.returncode}")
    return done.stdout


# All changes


def parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"python -m tests.{command}", description=description.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="list the changes, and try none")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="try N at a time, each in a copy (1)")
    return parser


def try_changes(changes: Sequence[Change], jobs: int, unoptimized: bool = False) -> list[Change]:
    """Try each change with its tests, which must pass without it; return those that survived.

    Raises:
        ValueError: tests fail without a change, or a selection leaves none; the other changes were tried.
    """
    with tempfile.TemporaryDirectory(prefix="lowmem-faults-") as folder, ThreadPool(jobs) as pool:
        objects = Path(folder, "objects") if unoptimized else None
        if objects is not None:
            objects.mkdir()
            for unit in sorted((SOURCE / CSRC).glob("*.c")):
                compile_unit(unit, objects)
        free: SimpleQueue[Copy] = SimpleQueue()
        for _ in range(jobs):
            free.put(Copy(Path(tempfile.mkdtemp(dir=folder)), SOURCE, objects))

        def run(change: Change, seconds: float) -> Outcome:
            copy = free.get()
            try:
                if not change.file:
                    return copy.run(change)
                with copy.changed(change.file, change.text, change.kernel):
                    return copy.run(change, seconds)
            finally:
                free.put(copy)

        return try_all(lambda given: pool.imap(lambda one: run(*one), given), changes)


def try_all(
    run: Callable[[list[tuple[Change, float]]], Iterable[Outcome]], changes: Sequence[Change]
) -> list[Change]:
    """Do what ``try_changes`` does; ``run`` returns how tests with changes end, which may take so many seconds."""
    parts = list(dict.fromkeys(part for change in changes for part in change.parts))
    print(f"{len(changes)} changes; first their {len(parts)} sets of tests without a change", flush=True)
    clean = dict(zip(parts, run([(part, 1800.0) for part in parts]), strict=True))
    broken = {part: found for part, found in clean.items() if found.verdict not in LIVES}
    for part, found in broken.items():  # which could not tell a change
        print(f"FAILED    without a change: {part.name} -k {part.select!r} {found.verdict}: {found.first}")
        print(*found.output.splitlines()[-LINES:], sep="\n", flush=True)
    given = []
    for change in (one for one in changes if broken.keys().isdisjoint(one.parts)):
        own = [clean[part] for part in change.parts]
        if all(found.verdict == "unusable" for found in own):  # of several files, -k may leave nothing of one
            raise ValueError(f"{change.name}: select={change.select!r} leaves no test of {', '.join(change.tests)}")
        given.append((change, max(LEAST_SECONDS, SLOWER * sum(found.seconds for found in own))))
    survived = []
    for (change, _), found in zip(given, run(given), strict=True):
        lives = found.verdict in LIVES
        survived += [change] * lives
        word = "SURVIVED" if lives else "killed"
        print(f"{word:9}{found.seconds:6.1f} s  {change.name}  {found.first}", flush=True)
    print(f"\n{len(given) - len(survived)} of {len(given)} killed")
    for change in survived:
        print(f"SURVIVED {change.name}; none of {', '.join(change.tests)} fails")
    if broken:
        untried = f"{len(broken)} sets of tests fail, and {len(changes) - len(given)} changes were not tried"
        raise ValueError(f"without a change {untried}")
    return survived
