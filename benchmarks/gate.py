"""The memory gate: ``pytest benchmarks --benchmark-compare`` fails unless each figure is the baseline's to the byte.

Memory does not depend on time: with ``--benchmark-disable`` it is judged all the same, sooner, and with several
processes (``-n``), too. Its baseline (``benchmarks.memory``) is not the storage of pytest-benchmark, whose options do
here what its manual says. Latency is shown as a ratio to float32, and not judged.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest

from benchmarks import memory
from benchmarks.results import Result, read_run, table
from lowmem.errors import one_line
from lowmem.io.atomic import check_writable
from lowmem.testing.baseline import check_figures
from lowmem.testing.verdicts import FAILING, Verdict, write_verdict

USAGE = 2  # exit code of bad input; pytest's own is 4


class Recorder:
    """Attaches to each benchmark's report what it recorded: with ``-n`` it runs in a process of its own."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.deselected: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        report = yield
        if "benchmark" not in getattr(item, "fixturenames", ()):
            return report
        report.ungated = item.get_closest_marker("ungated") is not None
        if report.skipped:
            report.skip_reason = _skip_reason(report)
        elif report.passed and report.when == "call":
            fixture = item.funcargs["benchmark"]
            figures = {name: value for name, value in fixture.extra_info.items() if name.endswith("_bytes")}
            try:
                check_figures(item.nodeid, figures)
            except ValueError as reason:
                report.outcome, report.longrepr = "failed", str(reason)
                return report
            report.recorded = {
                "seconds": fixture.stats.stats.min if fixture.stats else None,
                "reference": fixture.extra_info.get("reference_seconds"),
                "memory": figures,
            }
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.files.add(report.nodeid)
        if report.skipped and report.nodeid.startswith("benchmarks/"):
            self.deselected.add(report.nodeid)

    def pytest_itemcollected(self, item: pytest.Item) -> None:  # a file of which a part was asked for has no report
        self.files.add(item.nodeid.partition("::")[0])

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected.update(item.nodeid for item in items if item.get_closest_marker("ungated") is None)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["collected"] = sorted(self.files), sorted(self.deselected)


class Gate:
    """Gathers the reports, and judges or stores when the session ends."""

    def __init__(self, config: pytest.Config, recorder: Recorder) -> None:
        self.config = config
        self.recorder = recorder
        self.comparing = bool(config.getoption("benchmark_compare"))
        self.storing = config.getoption("store_memory")
        self.verdict_path: Path | None = config.getoption("memory_json")
        self.results: dict[str, Result] = {}
        self.ungated: set[str] = set()
        self.skipped: dict[str, str] = {}
        self.failed: set[str] = set()
        self.runs: dict[str, Result] | None = None  # what pytest-benchmark compares with, of several the last
        self.baseline: memory.Figures | None = None
        self.verdict: Verdict | None = None
        self.failures: list[str] = []
        self.remedy: list[str] = []
        self.passed: list[str] = []

    def read(self) -> None:
        """Read the baseline before anything runs, and end with one line where that cannot be."""
        self.key = memory.current_key()
        self.path = memory.baseline_path(self.config.rootpath, self.key)
        self.shown = self.path.relative_to(self.config.rootpath).as_posix()
        if self.verdict_path and self.verdict_path.resolve().parent == self.path.resolve().parent:
            stop(f"--memory-json={self.verdict_path} lies among the baselines: name a file elsewhere")
        if self.storing:
            self._refuse_a_part()
        try:
            for path in filter(None, (self.path if self.storing else None, self.verdict_path)):
                path.parent.mkdir(parents=True, exist_ok=True)
                check_writable(path)
        except OSError as reason:
            stop(str(reason))
        if self.comparing:
            try:
                self.baseline = memory.read_baseline(self.path, self.key)
            except FileNotFoundError:
                pass  # the run fails, below its tables
            except (OSError, ValueError) as reason:
                stop(f"{self.shown} is no baseline of this run: {reason}; store one: {memory.store_command()}")

    def _refuse_a_part(self) -> None:
        """End unless the whole folder runs: an entry that is left out would be lost, or grow old."""
        if self.comparing:
            stop("--store-memory and --benchmark-compare exclude each other: what was just stored is always the same")
        selecting = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "stepwise", "stepwise_skip")
        chosen = [name for name in (*selecting, "benchmark_skip") if self.config.getoption(name, None)]
        directories = self.config.invocation_params.dir, self.config.rootpath
        if chosen or not any(covers(argument, "benchmarks", *directories) for argument in self.config.args):
            stop(f"--store-memory stores all benchmarks or none; run them all: {memory.store_command()}")

    def pytest_report_header(self) -> str | None:
        if not self.comparing:
            return None
        return f"memory baseline: {self.shown}" + (" (there is none: this run will fail)" * (self.baseline is None))

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_compare_machine_info(self, compared_benchmark: Any) -> None:
        try:
            self.runs, _ = read_run(compared_benchmark)
        except ValueError as reason:
            stop(f"--benchmark-compare: not a run that pytest-benchmark stored: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not hasattr(report, "ungated"):
            return
        if report.ungated:
            self.ungated.add(report.nodeid)
        if report.failed:
            self.failed.add(report.nodeid)
        elif hasattr(report, "skip_reason"):
            self.skipped[report.nodeid] = report.skip_reason
        elif hasattr(report, "recorded"):
            self.results[report.nodeid] = Result(**report.recorded)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:  # of xdist: a process has ended
        files, deselected = getattr(node, "workeroutput", {}).get("collected", ((), ()))
        self.recorder.files.update(files)
        self.recorder.deselected.update(deselected)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if not (self.comparing or self.storing):
            return
        now = {name: self.results[name].memory for name in self.results.keys() - self.ungated - self.failed}
        if self.storing:
            self._store(session, now)
        else:
            cut_short = session.shouldstop or session.shouldfail or exitstatus == pytest.ExitCode.INTERRUPTED
            self._judge(session, now, {} if cut_short else self._missing())
        if self.failures and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _judge(self, session: pytest.Session, now: memory.Figures, missing: dict[str, str]) -> None:
        rows = memory.compare(self.baseline or {}, now, missing)
        failed = [row.says for row in rows if row.verdict in FAILING["memory"]]
        if self.baseline is None:
            self.failures = [f"there is no memory baseline of {self.key.name} in {self.shown}"]
        elif failed:
            self.failures = failed
        elif not now:
            self.failures = ["no benchmark ran, so that no memory was compared"]
        else:
            same = len(now.keys() & self.baseline.keys())
            total = len(self.baseline)
            self.passed = [f"{same} of the {total} benchmarks in {self.shown} compared: the same to the byte"]
        if self.baseline is None or failed:
            self.remedy = [
                f"To store the new figures: {memory.store_command()}",
                "and say in the commit's message why they moved.",
            ]
        passed = not self.failures and session.exitstatus == pytest.ExitCode.OK
        self.verdict = Verdict("memory", passed, self.shown, "this run", asdict(self.key), rows)
        if self.verdict_path:
            self._write(session, partial(write_verdict, self.verdict_path, self.verdict))

    def _store(self, session: pytest.Session, now: memory.Figures) -> None:
        skipped = sorted((self.skipped.keys() - self.ungated) | self.recorder.deselected)
        if session.exitstatus != pytest.ExitCode.OK or not now:
            self.failures = [f"{self.shown} is not stored: only a run whose benchmarks all pass is"]
        elif skipped:
            self.failures = [f"{self.shown} is not stored: {name} was skipped or left out" for name in skipped]
        elif self._write(session, partial(memory.write_baseline, self.path, self.key, now)):
            self.passed = [
                f"The figures of {len(now)} benchmarks are stored in {self.shown}",
                "If any moved, say why in the commit's message",
            ]

    def _write(self, session: pytest.Session, write: Callable[[], None]) -> bool:
        """Write a file, or end with one line on stderr and the exit code of bad input."""
        try:
            write()
        except OSError as reason:
            print(one_line(str(reason)), file=sys.stderr)
            self.failures.append(str(reason))
            session.exitstatus = USAGE
            return False
        return True

    def _missing(self) -> dict[str, str]:
        """Return the benchmarks of the baseline that gave no figures though they were asked for, and why."""
        ran = (self.results.keys() - self.ungated) | self.failed
        asked = [name for name in self.baseline or () if name not in ran and self._was_asked_for(name)]
        unknown = sorted(self.skipped.keys() - self.ungated - (self.baseline or {}).keys())
        return {name: self.skipped.get(name, "") for name in [*asked, *unknown]}

    def _was_asked_for(self, name: str) -> bool:
        """Whether the command line selects the benchmark, were it there."""
        if name in self.recorder.deselected or self.config.getoption("lf", False):  # --lf skips files silently
            return False
        file = name.partition("::")[0]
        # Of the command line alone: what a conftest.py leaves out is missing.
        ignoring = self.config.getoption("ignore") or self.config.getoption("ignore_glob")
        if ignoring and file not in self.recorder.files and (self.config.rootpath / file).exists():
            return False
        directories = self.config.invocation_params.dir, self.config.rootpath
        return any(covers(argument, name, *directories) for argument in self.config.args)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> Generator[None, None, None]:
        try:
            yield  # pytest-benchmark shows its own table, and raises where latency fails --benchmark-compare-fail
        finally:
            self._show(terminalreporter)

    def _show(self, terminalreporter: Any) -> None:
        write = terminalreporter.write_line
        if self.results and not self.config.getoption("benchmark_quiet"):
            terminalreporter.section("latency, as a ratio to float32 in the same run, and memory in MiB")
            for line in table(self.results, self.baseline, self.runs):
                write(line)
        if self.failures or self.passed:
            terminalreporter.section("the memory gate")
        for line in self.failures:
            write(f"FAILED {line}", red=True)
        for line in self.remedy:
            write(line, yellow=True)
        for line in self.passed:
            write(line, green=True)


def covers(argument: str, name: str, invoked_in: Path, root: Path) -> bool:
    """Whether a command-line argument (a directory, a file, or a part of a file) asks for a benchmark."""
    path, *parts = argument.split("::", 1)
    asked = "::".join([Path(os.path.relpath(invoked_in / path, root)).as_posix(), *parts])
    return asked == "." or (name.startswith(asked) and name[len(asked) :][:1] in ("", "/", ":", "["))


def stop(reason: str) -> NoReturn:
    """End the run with one line, and the exit code of bad input."""
    pytest.exit(one_line(reason, taken=len("Exit: ")), returncode=USAGE)


def _skip_reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"xfail {report.wasxfail}".strip()
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("memory gate", "the memory gate of this repository's benchmarks (docs/memory-gate.md)")
    group.addoption(
        "--store-memory",
        action="store_true",
        help="Store each benchmark's bytes as the baseline of this kernel and version of torch in benchmarks/memory "
        "once all have passed. --benchmark-compare fails where a later run has a byte more or less.",
    )
    group.addoption(
        "--memory-json", type=Path, metavar="PATH", help="With --benchmark-compare: write the gate's verdict as JSON."
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ungated: not in the memory baseline, because it does not run everywhere.")
    recorder = Recorder()
    config.pluginmanager.register(recorder, "benchmark-recorder")
    if hasattr(config, "workerinput"):  # a process of xdist's: its reports go to the one that judges
        return
    gate = Gate(config, recorder)
    if gate.verdict_path and not gate.comparing:
        stop("--memory-json needs --benchmark-compare: there is no verdict without a baseline")
    if config.getoption("collectonly"):  # nothing runs, and nothing is judged
        return
    if gate.comparing or gate.storing:
        gate.read()
    config.pluginmanager.register(gate, "benchmark-gate")
