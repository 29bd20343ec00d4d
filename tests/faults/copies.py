"""A copy of the tree in which one file at a time is changed, and the tests that run in it.

The working tree is never touched: a run that is killed leaves nothing behind but a temporary folder.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).parents[2]
CSRC = Path("lowmem/kernels/csrc")
LIBRARY = Path("lowmem/kernels/_native.abi3.so")
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".tox", ".venv", ".hypothesis", ".*_cache", "build", "dist", "__pycache__", "*.egg-info", "*.so", "*.html"
)

# Threads that wait for work must not keep a core busy: another copy's tests need it.
QUIET = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HYPOTHESIS_PROFILE": "faults"}


def import_once() -> None:
    """Import what is slow to import and no part of the tree, for all forks of this process."""
    import hypothesis  # noqa: F401
    import pytest_benchmark.plugin  # noqa: F401
    import torch  # noqa: F401


# Of pytest. Assertions stay as they are: plugins that are imported already cannot be rewritten, and none is shown.
OPTIONS = (
    "-x",
    "-q",
    "-rfE",
    "--no-header",
    "--tb=short",
    "--assert=plain",
    "-pno:cacheprovider",
    "-ptests.faults.profile",
)


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended.

    Attributes:
        verdict: "passed", "failed", "crashed" or "timed out"; "unusable" where pytest ran no test at all.
        seconds: that it took.
        first: the first test that failed, or how the run ended.
        output: of pytest.
    """

    verdict: str
    seconds: float
    first: str
    output: str = field(repr=False)


class BuildError(Exception):
    """The C files of a copy cannot be compiled."""


class Copy:
    """A copy of the tree in ``root``, with a C library of its own that is compiled without optimization.

    Args:
        root: an empty folder.
        source: the tree that is copied.
    """

    def __init__(self, root: Path, source: Path = SOURCE) -> None:
        self.source, self.root = source, root / "tree"
        self._objects = root / "objects"
        shutil.copytree(source, self.root, ignore=LEFT_OUT)
        self._objects.mkdir()

    def build(self) -> None:
        """Compile every C file and link the library.

        Raises:
            BuildError: a file does not compile.
        """
        self._link([self._compile(unit, self._objects) for unit in sorted(self.root.joinpath(CSRC).glob("*.c"))])

    def take_library(self) -> None:
        """Take the tree's own library, which is optimized, where it has one; else compile one."""
        own = self.source / LIBRARY
        if own.exists():
            shutil.copy2(own, self.root / LIBRARY)
        else:
            self.build()

    def kernels(self) -> list[str]:
        """Return the compiled kernels that this processor can run."""
        script = "from lowmem.kernels.cpu import load; print(*load()[0].levels())"
        done = subprocess.run([sys.executable, "-c", script], cwd=self.root, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"the compiled kernel cannot be loaded: {done.stderr.strip()[-300:]}")
        return done.stdout.split()

    @contextmanager
    def changed(self, file: str, text: str, kernel: str = "") -> Iterator[None]:
        """Let a file hold another text inside the block; of a C file, compile what the binding and a kernel use.

        Raises:
            BuildError: it does not compile.
        """
        path, library = self.root / file, self.root / LIBRARY
        original, kept = path.read_bytes(), self._objects / "kept.so"
        path.write_text(text, encoding="utf8")
        try:
            for stale in path.parent.glob(f"__pycache__/{path.stem}.*"):
                stale.unlink()  # one with the same size and second would be taken for that of the changed file
            if path.parent == self.root / CSRC:
                shutil.copy2(library, kept)
                self._rebuild(path.name, kernel)
            yield
        finally:
            path.write_bytes(original)
            if kept.exists():
                kept.replace(library)

    def run(
        self, tests: Sequence[str], select: str = "", environment: Mapping[str, str] = QUIET, seconds: float = 600
    ) -> Outcome:
        """Run tests in a fork of this process, which has imported torch, and stop at the first that fails."""
        arguments = [*OPTIONS, *(["-k", select] if select else []), *tests]
        log = self.root.parent / "log"
        start = time.monotonic()
        process = os.fork()
        if not process:
            self._run_pytest(arguments, environment, log)  # never returns
        status = _wait(process, start + seconds)
        return _outcome(status, time.monotonic() - start, log.read_text(encoding="utf8", errors="replace"))

    def _run_pytest(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        code = 3  # pytest's own for an internal error
        try:
            os.setsid()  # so that a run that takes too long ends with all that it started
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(self.root)
            for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "benchmarks", "lowmem")]:
                del sys.modules[name]  # of the tree that this was started from
            sys.path[:] = [str(self.root), *(p for p in sys.path if p and Path(p).resolve() != self.source.resolve())]
            os.environ.update(environment, PYTHONPATH=str(self.root))  # for what the tests start
            import pytest

            code = int(pytest.main(list(arguments)))
        except BaseException:  # noqa: BLE001 - the fork must not return into the code that made it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _rebuild(self, file: str, kernel: str) -> None:
        changed = self._objects / "changed"
        shutil.rmtree(changed, ignore_errors=True)
        changed.mkdir()
        made = []
        for unit in (self.root / CSRC / f"{name}.c" for name in ("module", kernel)):
            if file == unit.name or file in self._included(unit):
                made.append(self._compile(unit, changed))
        if not made:
            raise BuildError(f"neither module.c nor {kernel}.c includes {file}")
        names = {path.name for path in made}
        self._link([*made, *(path for path in sorted(self._objects.glob("*.o")) if path.name not in names)])

    def _compile(self, unit: Path, folder: Path) -> Path:
        made = folder / f"{unit.stem}.o"
        self._gcc("-c", str(unit), "-o", str(made))
        return made

    def _included(self, unit: Path) -> Collection[str]:
        return {Path(word).name for word in self._gcc("-MM", str(unit)).split()}

    def _link(self, objects: Sequence[Path]) -> None:
        options = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        library = self.root / LIBRARY
        library.unlink(missing_ok=True)  # a process that has mapped it keeps what it has
        self._gcc("-shared", *options, *map(str, objects), "-o", str(library))

    def _gcc(self, *arguments: str) -> str:
        compiler = (sysconfig.get_config_var("CC") or "cc").split()
        flags = [
            "-std=gnu11",
            "-ffp-contract=off",
            "-O0",
            "-g0",
            "-w",
            "-fPIC",
            f"-I{sysconfig.get_paths()['include']}",
        ]
        done = subprocess.run([*compiler, *flags, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(done.stderr.strip() or f"{compiler[0]} ended with {done.returncode}")
        return done.stdout


def _wait(process: int, deadline: float) -> int | None:
    """Return the status that a child ended with; None where it had to be killed at the deadline."""
    ended = 0
    try:
        while time.monotonic() < deadline:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.02)
        return None
    finally:
        if not ended:  # also where the wait was interrupted
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)


def _outcome(status: int | None, seconds: float, output: str) -> Outcome:
    if status is None:
        return Outcome("timed out", seconds, f"after {seconds:.0f} s", output)
    if os.WIFSIGNALED(status):
        return Outcome("crashed", seconds, signal.Signals(os.WTERMSIG(status)).name, output)
    code = os.WEXITSTATUS(status)
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    first = found[1] if found else (output.strip().splitlines() or ["no output"])[-1]
    verdict = {0: "passed", 1: "failed", 2: "failed", 3: "failed", 4: "failed"}.get(code, "unusable")
    return Outcome(verdict, seconds, first, output)
