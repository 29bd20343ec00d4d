"""A copy of the tree in which one file at a time is changed, and the tests that run in it.

The working tree is never touched: a run that is killed leaves nothing behind but a temporary folder.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from tests.faults import library

SOURCE = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".tox", ".venv", ".hypothesis", ".*_cache", "build", "dist", "__pycache__", "*.egg-info", "*.so"
)

LIVES = ("passed", "unusable")  # verdicts of tests that noticed nothing: they passed, or none ran

# Threads that wait for work must not keep a core busy: another copy's tests need it.
QUIET = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HYPOTHESIS_PROFILE": "faults"}


def import_once() -> None:
    """Import what is slow to import and no part of the tree, for all forks of this process."""
    import hypothesis  # noqa: F401
    import pytest_benchmark.plugin  # noqa: F401
    import torch  # noqa: F401


def exit_on_sigterm() -> None:
    """Let SIGTERM, by which a pool ends its workers, end this process as sys.exit does: its fork ends with it."""

    def leave(number: int, _: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # nothing interrupts the end of the fork
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


# Of pytest. Assertions stay as they are: plugins that are imported already cannot be rewritten, and none is shown.
OPTIONS = (
    "-x",
    "-q",
    "-rfE",
    "--no-header",
    "--tb=short",
    "--assert=plain",
    "-pno:cacheprovider",
)


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended."""

    verdict: str  # "passed", "failed", "crashed", "timed out", or "unusable" where pytest ran no test at all
    seconds: float
    first: str  # the first test that failed, or how the run ended
    output: str = field(repr=False)


class Copy:
    """A copy of a tree in an empty folder.

    Its library is linked of ``objects`` where a C file is changed, or the tree has none.
    """

    def __init__(self, root: Path, source: Path, objects: Path | None) -> None:
        self.source, self.root, self._objects = source, root / "tree", objects
        self._binary = self.root / library.LIBRARY
        shutil.copytree(source, self.root, ignore=LEFT_OUT)
        if (source / library.LIBRARY).exists():
            shutil.copy2(source / library.LIBRARY, self._binary)
        elif objects is not None:
            library.link(self.root, sorted(objects.glob("*.o")))

    @contextmanager
    def unoptimized(self) -> Iterator[None]:
        """Let the library be that of the objects inside the block, as it is while a C file is changed."""
        with self._kept_library():
            if self._objects is not None:
                library.link(self.root, sorted(self._objects.glob("*.o")))
            yield

    @contextmanager
    def changed(self, file: str, text: str, kernel: str = "") -> Iterator[None]:
        """Let a file hold another text inside the block; of a C file, compile what the binding and a kernel use.

        Raises:
            BuildError: it does not compile.
        """
        path = self.root / file
        original = path.read_bytes()
        _write(path, text.encode())
        try:
            with self._kept_library():
                if self._objects is not None and path.parent == self.root / library.CSRC:
                    library.rebuild(self.root, self._objects, path.name, kernel, self.root.parent / "changed")
                yield
        finally:
            _write(path, original)

    @contextmanager
    def _kept_library(self) -> Iterator[None]:
        kept = self.root.parent / "kept.so"
        if self._binary.exists():
            shutil.copy2(self._binary, kept)
        try:
            yield
        finally:
            if kept.exists():
                kept.replace(self._binary)

    def run(
        self, tests: Sequence[str], select: str = "", environment: Mapping[str, str] = QUIET, seconds: float = 600
    ) -> Outcome:
        """Run tests in a fork of this process, which has imported torch, and stop at the first that fails."""
        temporary = f"--basetemp={self.root.parent / 'tests'}"  # runs beside it clear the folders that all share
        arguments = [*OPTIONS, temporary, *(["-k", select] if select else []), *tests]
        log = self.root.parent / "log"
        start = time.monotonic()
        kept = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until _wait can end the fork
        process = os.fork()
        if not process:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, kept)
            self._run_pytest(arguments, environment, log)  # never returns
        status = _wait(process, start + seconds, kept)
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


def _write(path: Path, content: bytes) -> None:
    """Write a file, and remove its compiled code: Python takes it for that of a file of the same size and second."""
    path.write_bytes(content)
    for stale in path.parent.glob(f"__pycache__/{path.stem}.*"):
        stale.unlink()


def _wait(process: int, deadline: float, mask: Iterable[int]) -> int | None:
    """Return the status that a child, which leads a session, ended with; None where it was killed at the deadline.

    The signals of ``mask`` are blocked while it waits.
    """
    ended = 0
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while time.monotonic() < deadline:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.02)
        return None
    finally:
        if not ended:  # also where the wait was interrupted
            with suppress(ProcessLookupError):  # of one that leads no session yet, and has started nothing
                os.killpg(process, signal.SIGKILL)
            os.kill(process, signal.SIGKILL)
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
