"""``pytest benchmarks --against REF``: the latency gate as part of a pytest session, which it fails."""

from __future__ import annotations

import sys
from typing import Any

import pytest


class Against:
    """Runs the gate once the session's tests are done: nothing else may run beside it."""

    def __init__(self, reference: str) -> None:
        self.reference = reference
        self.code: int | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Run the gate; its exit code 1 or 2 becomes the session's, unless tests have failed."""
        ended = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
        if session.shouldstop or session.shouldfail or exitstatus not in ended:
            return
        from benchmarks.latency.__main__ import main

        capture: Any = session.config.pluginmanager.getplugin("capturemanager")
        if capture:
            capture.suspend_global_capture(in_=True)
        try:
            print(file=sys.stderr)
            self.code = main(["--base", self.reference])
        finally:
            if capture:
                capture.resume_global_capture()
        if self.code and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = self.code


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("latency gate", "the latency gate of this repository (docs/benchmarking.md)").addoption(
        "--against",
        metavar="REF",
        help="After the tests, time the workloads of HEAD against those of its merge base with REF, in processes of "
        "both that take turns, and fail where one is slower.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Run the gate where it is asked for, in the process that collects, not in those of xdist."""
    reference = config.getoption("--against")
    if reference is None or config.getoption("collectonly") or hasattr(config, "workerinput"):
        return
    try:
        from benchmarks.latency import builds, gate
    except ModuleNotFoundError as error:  # of the extra
        pytest.exit(f"--against needs {str(error.name).partition('.')[0]}: pip install '.[gate]'", returncode=2)
    try:
        builds.resolve(gate.ROOT, reference)  # before the tests run for minutes
    except builds.GateError as error:
        pytest.exit(f"--against: {error}", returncode=2)
    config.pluginmanager.register(Against(reference), "latency-gate")
