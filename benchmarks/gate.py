"""The gate: ``pytest benchmarks --benchmark-compare`` fails when memory grew or a benchmark went missing.

It prints memory beside latency; latency fails only with ``--ratio-tolerance``. To store a new baseline:

    pytest benchmarks --benchmark-json=benchmarks/baselines/0001_baseline.json
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import Result, improvements, read_results, read_run, regressions, table

STORE = "pytest benchmarks --benchmark-json=benchmarks/baselines/0001_baseline.json"


class Gate:
    """Gathers what pytest and pytest-benchmark tell their hooks, and judges when the session ends."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.comparing = bool(config.getoption("benchmark_compare")) and not config.getoption("collectonly")
        self.stored: dict[str, Result] | None = None
        self.now: dict[str, Result] = {}
        self.differences: list[str] = []  # between the machines
        self.failures: list[str] = []
        self.files: set[str] = set()
        self.deselected: set[str] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_compare_machine_info(self, machine_info: Any, compared_benchmark: Any) -> None:
        try:
            self.stored, theirs = read_run(compared_benchmark)  # of several runs, the last one
        except ValueError as reason:
            raise pytest.UsageError(f"--benchmark-compare: not a stored run: {reason}") from reason
        self.differences = [
            f"{key} {theirs[key]} stored, {machine_info[key]} now"
            for key in theirs
            if key in machine_info and theirs[key] != machine_info[key]
        ]

    def pytest_sessionstart(self) -> None:
        if self.comparing and self.stored is None:
            which, storage = self.config.getoption("benchmark_compare"), self.config.getoption("benchmark_storage")
            option = "--benchmark-compare" + ("" if which is True else f"={which}")
            raise pytest.UsageError(f"{option} found no stored run in {storage}; store one: {STORE}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.files.add(report.nodeid)

    def pytest_itemcollected(self, item: pytest.Item) -> None:  # a file of which a part was asked for has no report
        self.files.add(item.nodeid.partition("::")[0])

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected.update(item.nodeid for item in items)

    def pytest_benchmark_group_stats(self, benchmarks: Any) -> None:
        self.now = read_results(bench for bench in benchmarks if bench["path"] is None)  # a stored one has a path

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if not self.comparing or self.stored is None:
            return
        self.failures = regressions(self.stored, self.now, self.config.getoption("ratio_tolerance"))
        cut_short = session.shouldstop or session.shouldfail or exitstatus == pytest.ExitCode.INTERRUPTED
        if not cut_short:
            self.failures += [
                f"{name} went missing: it is in the stored run and gave no figures in this one"
                for name in self.stored
                if name not in self.now and self._was_asked_for(name)
            ]
        if not self.now and not self.failures:
            self.failures = ["no benchmark ran, so that nothing was compared"]
        if self.failures and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _was_asked_for(self, name: str) -> bool:
        """Whether the command line selects the benchmark, were it there."""
        if name in self.deselected or self.config.getoption("lf"):  # --lf drops tests without saying which
            return False
        file = name.partition("::")[0]
        if file not in self.files and (self.config.rootpath / file).exists():  # left out, as by --ignore
            return False
        directories = self.config.invocation_params.dir, self.config.rootpath
        return any(covers(argument, name, *directories) for argument in self.config.args)

    @pytest.hookimpl(trylast=True)  # below pytest-benchmark's own table
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.now and not self.failures:
            return
        write = terminalreporter.write_line
        terminalreporter.section("latency, as a ratio to float32 in the same run, and memory in MiB")
        for line in table(self.now, self.stored) if self.now else ():
            write(line)
        if not self.comparing or self.stored is None:
            return
        write("")
        if self.differences:
            write(f"The stored run is of another machine: {'; '.join(self.differences)}", yellow=True)
        for line in self.failures:
            write(f"FAILED {line}", red=True)
        if stale := improvements(self.stored, self.now):
            for line in stale:
                write(line)
            write(f"The stored run is stale. To store a new one: {STORE}", yellow=True)
        if not self.failures:
            compared = len(self.now.keys() & self.stored.keys())
            write(f"{compared} of the {len(self.stored)} stored benchmarks compared: no memory grew", green=True)


def covers(argument: str, name: str, invoked_in: Path, root: Path) -> bool:
    """Whether a command-line argument (a directory, a file, or a part of a file) asks for a benchmark."""
    path, *parts = argument.split("::", 1)
    asked = "::".join([Path(os.path.relpath(invoked_in / path, root)).as_posix(), *parts])
    return asked == "." or (name.startswith(asked) and name[len(asked) :][:1] in ("", "/", ":", "["))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("benchmark").addoption(
        "--ratio-tolerance",
        type=_factor,
        metavar="F",
        help="With --benchmark-compare: fail when a benchmark's ratio to float32 grew by more than the factor F. "
        "Default: latency does not fail.",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_compare"):
        _check_storage(Path(config.getoption("benchmark_storage").removeprefix("file://")))
    elif config.getoption("ratio_tolerance") is not None:
        raise pytest.UsageError("--ratio-tolerance needs --benchmark-compare")
    config.pluginmanager.register(Gate(config), "benchmark-gate")


def _check_storage(storage: Path) -> None:
    """Raise for a run that cannot be read: pytest-benchmark would pass over it and take the one before."""
    for file in sorted(storage.rglob("*.json")):
        try:
            read_run(json.loads(file.read_text(encoding="utf8")))
        except ValueError as reason:
            raise pytest.UsageError(f"{file} is not a stored run: {reason}; store a new one: {STORE}") from reason


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 1")
    return value
