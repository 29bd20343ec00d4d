"""``pytest benchmarks --report OUT.html``: the page of ``lowmem report``, with the latency of this very run.

With the extra ``peers`` installed the run times other libraries, too, and the page shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.errors import one_line, reason
from lowmem.report.timings import Timing, from_benchmarks
from lowmem.testing.memory import THREADS
from lowmem.testing.verdicts import Verdict, read_verdict
from lowmem.tools import report

FAILURES = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)


class ReportPlugin:
    """Gathers the benchmarks of the session, and writes the page when it ends."""

    def __init__(self, config: pytest.Config) -> None:
        self.target: Path = config.invocation_params.dir / config.getoption("report")
        self.verdicts = [config.invocation_params.dir / path for path in config.getoption("report_verdict")]
        report.check_extra("--report")
        report.check_target(self.target)
        self.read = [read_verdict(path) for path in self.verdicts]
        self.timings: list[Timing] = []
        self.says = ""

    def pytest_benchmark_group_stats(self, benchmarks: Any) -> None:
        self.timings = from_benchmarks(
            bench for bench in benchmarks if bench["path"] is None
        )  # a stored one has a path

    @pytest.hookimpl(trylast=True)  # after pytest-benchmark has gathered, and the memory gates have judged
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.config.getoption("collectonly"):
            return
        if session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            self.says = f"--report: {self.target} is not written: the run did not end"
            return
        own = session.config.pluginmanager.get_plugin("lowmem-session").verdict  # of the memory gates of this run
        threads = torch.get_num_threads()
        torch.set_num_threads(THREADS)
        try:
            self._write([own] if own is not None else [])
            self.says = f"saved {self.target}"
        except FAILURES as error:
            self.says = f"--report failed: {one_line(reason(error), 20)}"
            session.exitstatus = pytest.ExitCode.INTERRUPTED  # 2, as of bad input
        finally:
            torch.set_num_threads(threads)

    def _write(self, own: Sequence[Verdict]) -> None:
        timed = report.of_a_run("this run of the benchmarks") if self.timings else ""
        measured = report.measure_variants(
            report.BIGNET, torch.randn(1, 1024, generator=torch.Generator().manual_seed(0))
        )
        page = replace(
            measured,
            title="BigNet in every variant",
            lead="The benchmarks of this repository, and what each variant costs and loses for one float32 input.",
            timings=self.timings,
            timed=timed or "This run held no benchmark of inference, so that there is no latency to show.",
            verdicts=[*own, *self.read],
        )
        report.write(self.target, page)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.says:
            terminalreporter.write_line(self.says)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmark")
    group.addoption(
        "--report",
        metavar="OUT.html",
        help="Write a page on every variant: memory, the latency of this run, error, and what gates said.",
    )
    group.addoption(
        "--report-verdict",
        action="append",
        default=[],
        metavar="FILE",
        help="With --report: show what a gate said, as it wrote it in JSON; may be given again.",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("report") is None or hasattr(config, "workerinput"):  # a process of xdist's
        return
    try:
        config.pluginmanager.register(ReportPlugin(config), "benchmark-report")
    except FAILURES as error:
        pytest.exit(one_line(f"--report: {reason(error)}"), returncode=2)
