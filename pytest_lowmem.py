"""The pytest plugin of lowmem: memory and latency gates for a user's own model.

pytest imports this module at every start, also in projects that never use it. It is therefore outside the package,
whose import loads torch, and imports the package only when a gate is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.testing.gate_verdicts import GateVerdict
    from lowmem.testing.latency import Speedup
    from lowmem.testing.memory_baseline import BaselineKey, Figures
    from lowmem.testing.memory_gates import MemoryGateSession

__all__ = ["LatencyGate", "MemoryGate", "latency_gate", "memory_gate"]

MODES = ("compare", "store", "update")
UNDECIDED = ("skip", "fail")
GATES = {"latency_gate", "memory_gate"}
REMEDY = "measure on a quieter machine, or ask for less"
CANNOT_JUDGE = 2  # exit code if a gate fails without a verdict: bad baseline, model or option


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("lowmem", "memory and latency gates for models (lowmem)")
    group.addoption(
        "--lowmem-baseline",
        choices=MODES,
        default="compare",
        help="What memory_gate does with the exact bytes of a model. compare: fail when a figure is not the stored "
        "one, or none is stored, or no test measures a stored one any more (default). store: store the figures of "
        "gates that have none, and compare the others. update: store all, and drop those of tests that are gone.",
    )
    group.addoption(
        "--lowmem-json",
        type=Path,
        metavar="PATH",
        help="Write the verdict of the memory gates as JSON, for `lowmem report --verdict PATH`.",
    )
    parser.addini(
        "lowmem_baselines",
        "Directory of the figures that memory_gate compares with, from the rootdir (default: memory_baselines). "
        "One JSON file for each kernel backend and minor version of torch: keep them in version control.",
        default="memory_baselines",
    )
    parser.addini(
        "lowmem_undecided",
        "What an undecided latency_gate does to its test. skip: skip it, with the reason (default). fail: fail it, "
        "with exit code 2.",
        default="skip",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin that collects the verdicts of this session."""
    if (undecided := config.getini("lowmem_undecided")) not in UNDECIDED:
        raise pytest.UsageError(f"lowmem_undecided={undecided!r}: choose {' or '.join(UNDECIDED)}")
    config.pluginmanager.register(Session(config), "lowmem-session")


@pytest.fixture
def memory_gate(request: pytest.FixtureRequest) -> MemoryGate:
    """Compare a model's bytes with the stored ones: ``memory_gate(model, *inputs, name="", loss=None, **named)``.

    ``memory_gate.counted(count, name="")`` compares the figures that a function of your own returns. Both take a
    ceiling beside them: ``at_most="2 GiB"``.
    """
    return MemoryGate(_session(request), request.node)


@pytest.fixture
def latency_gate(request: pytest.FixtureRequest) -> LatencyGate:
    """Compare speeds: ``latency_gate(candidate, reference, *inputs, at_least=1.0, seconds=60, **named)``."""
    return LatencyGate(_session(request), request.node)


class MemoryGate:
    """The value of the fixture ``memory_gate``."""

    def __init__(self, session: Session, item: pytest.Item) -> None:
        self._session, self._test = session, _node_id(item)
        self._names: set[str] = set()

    def __call__(
        self,
        model: Any,
        *inputs: Any,
        name: str = "",
        loss: Callable[[Any], Tensor] | None = None,
        at_most: str | int | None = None,
        **named: Any,
    ) -> Figures:
        """Fail the test unless the memory figures of a model equal the stored ones, and keep to a ceiling.

        Args:
            model: any module, on any device.
            *inputs: example inputs of its forward.
            name: of this gate, where a test has several.
            loss: returns the scalar loss of a training step for the model's output; None: the output's ``loss``, or
                the sum of its tensors.
            at_most: bytes, or text such as "2 GiB", that ``stored_bytes`` and the larger of ``forward_bytes`` and
                ``step_bytes`` may take together, whatever the stored figures are.
            **named: further example inputs of its forward.

        Returns:
            The figures, in bytes, by name.
        """
        __tracebackhide__ = True
        with self._session.judging():
            from lowmem.testing.memory import memory_figures

            self._take(name, at_most)
            key, figures = memory_figures(model, *inputs, loss=loss, **named)
        total = figures["stored_bytes"] + max(figures["forward_bytes"], figures["step_bytes"])
        return self._judge(name, key, figures, at_most, total)

    def counted(
        self, count: Callable[[], Mapping[str, int]], *, name: str = "", at_most: str | int | None = None
    ) -> Figures:
        """Fail the test unless the figures that a function counts equal the stored ones.

        The function runs with the threads, the kernel and the seed that models are measured with.

        Args:
            count: returns the figures in bytes by name, such as ``{"peak_bytes": lowmem.measure.peak_bytes(run)}``.
            name: of this gate, where a test has several.
            at_most: bytes, or text such as "2 GiB", that the largest figure may take, whatever the stored ones are.

        Returns:
            The figures.
        """
        __tracebackhide__ = True
        with self._session.judging():
            from lowmem.testing.memory import key_and_counted_figures

            self._take(name, at_most)
            key, figures = key_and_counted_figures(count)
        return self._judge(name, key, figures, at_most, max(figures.values()))

    def _take(self, name: str, at_most: str | int | None) -> None:
        from lowmem.testing.memory_gates import parse_ceiling

        if not isinstance(name, str) or name in self._names:
            hint = "give each memory gate of a test its own name=" if self._names else "it must be a string"
            raise ValueError(f"name={name!r}: {hint}")
        if not name.isprintable():
            raise ValueError(f"name={name!r}: it must be one printable line, as tables show it")
        parse_ceiling(at_most)
        self._names.add(name)

    def _judge(
        self, name: str, key: BaselineKey, figures: Figures, at_most: str | int | None, total_bytes: int
    ) -> Figures:
        __tracebackhide__ = True
        with self._session.judging():
            from lowmem.testing.memory_gates import ceiling_excess, stored_gate_name

            gate_name = stored_gate_name(self._test, name)
            failure = self._session.memory().judge_figures_and_explain_failure(
                gate_name, self._test, key, figures, ceiling_excess(gate_name, at_most, total_bytes)
            )
        if failure is not None:
            pytest.fail(failure, pytrace=False)
        return figures


class LatencyGate:
    """The value of the fixture ``latency_gate``."""

    def __init__(self, session: Session, item: pytest.Item) -> None:
        self._session, self._test = session, _node_id(item)

    def __call__(
        self,
        candidate: Callable[..., object],
        reference: Callable[..., object],
        *inputs: Any,
        at_least: float = 1.0,
        seconds: float = 60.0,
        **named: Any,
    ) -> Speedup:
        """Fail the test if a candidate is less than ``at_least`` times as fast as a reference, at 99% confidence.

        Where that is undecided, the test is skipped, or fails where the ini option ``lowmem_undecided`` is ``fail``.

        Args:
            candidate: a module, which is called in eval mode without gradients, or another callable.
            reference: a module or callable to compare with, in turns.
            *inputs: positional arguments of both.
            at_least: how many times as fast the candidate must be; below 1 it may be slower.
            seconds: after which the gate is undecided.
            **named: keyword arguments of both.

        Returns:
            The ratio with its interval.
        """
        __tracebackhide__ = True
        with self._session.judging():
            try:
                from lowmem.testing.latency import measure_speedup
            except ModuleNotFoundError as error:
                from lowmem.version import install_command

                raise ImportError(f"latency_gate needs {error.name}: {install_command('testing')}") from error
            found = measure_speedup(candidate, reference, *inputs, at_least=at_least, seconds=seconds, **named)
        self._session.latency.append([self._test, str(found), found.verdict])
        if found.verdict == "slower":
            pytest.fail(f"the candidate is {found}", pytrace=False)
        if found.verdict == "undecided":
            reason = f"undecided ({seconds:g} s allowed): the candidate is {found}; {REMEDY}"
            if self._session.fails_undecided:
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
        return found


class Session:
    """The gates of one session, and its hooks. With pytest-xdist only the controller writes baselines."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.latency: list[list[str]] = []  # test, text and verdict
        self.errors: list[str] = []  # why gates could not judge
        self.written: list[str] = []
        self.verdict: GateVerdict | None = None  # of the memory gates, once the session has ended
        self._memory: MemoryGateSession | None = None
        self._collected: set[str] = set()
        self._files: set[str] = set()
        self._passed: set[str] = set()

    @property
    def directory(self) -> Path:
        """The directory of the baselines."""
        return self.config.rootpath / cast(str, self.config.getini("lowmem_baselines"))

    @property
    def fails_undecided(self) -> bool:
        """Whether an undecided latency gate fails its test instead of skipping it."""
        return bool(self.config.getini("lowmem_undecided") == "fail")

    def memory(self) -> MemoryGateSession:
        """Return the memory gates; they are created on the first call."""
        if self._memory is None:
            from lowmem.testing.memory_gates import MemoryGateSession

            self._memory = MemoryGateSession(
                self.config.rootpath, self.directory, self.config.getoption("lowmem_baseline")
            )
        return self._memory

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Where a gate cannot judge, fail the test with one line and the session with exit code 2."""
        __tracebackhide__ = True
        try:
            yield
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            self.errors.append(str(error))
            raise pytest.fail.Exception(str(error), pytrace=False) from None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Run gates under ``--benchmark-only``, which skips tests without the fixture of pytest-benchmark."""
        for item in items:
            if GATES.intersection(getattr(item, "fixturenames", ())):
                item.own_markers[:] = [mark for mark in item.own_markers if not _is_benchmark_only(mark)]

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Record all collected tests, selected or not."""
        self._collected.add(_node_id(item))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record the files whose tests were collected; a file that is skipped or broken may have others."""
        if report.passed and "::" not in report.nodeid:
            self._files.add(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Record the tests that ran to their end."""
        result = yield
        self._passed.add(_node_id(item))
        return result

    @pytest.hookimpl(optionalhook=True)  # of pytest-xdist, in the controller
    def pytest_testnodedown(self, node: Any) -> None:
        """Merge the results of a worker."""
        handed = json.loads(getattr(node, "workeroutput", {}).get("lowmem", "{}"))
        self.latency += handed.get("latency", [])
        self.errors += handed.get("errors", [])
        if handed.get("memory"):
            self.memory().merge_worker_state(handed["memory"])

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the baselines; a worker sends its results to the controller instead."""
        compares = self.config.getoption("lowmem_baseline") != "update" and not self.config.option.collectonly
        if self._memory is None and compares:
            self._read_unmeasured()
        if self._memory is not None:
            self._memory.record_vanished_gates(self._collected, self._is_complete, self._passed)
        output: dict[str, str] | None = getattr(self.config, "workeroutput", None)
        if output is not None:
            memory = None if self._memory is None else self._memory.serializable_state()
            output["lowmem"] = json.dumps({"latency": self.latency, "errors": self.errors, "memory": memory})
            return
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return  # interrupted: nothing is stored
        if self._memory is not None and not self.errors:
            try:
                self.written = self._memory.write_pending_and_drop_vanished()
            except (OSError, ValueError) as error:
                self.errors.append(str(error))
            if self._memory.missing_gate_rows() and exitstatus == pytest.ExitCode.OK:
                session.exitstatus = exitstatus = pytest.ExitCode.TESTS_FAILED
            self._write_verdict(exitstatus == pytest.ExitCode.OK)
        undecided = any(verdict == "undecided" for *_, verdict in self.latency)
        if self.errors or (undecided and self.fails_undecided):
            session.exitstatus = CANNOT_JUDGE

    def _read_unmeasured(self) -> None:
        """Read the baselines in which a session without gates leaves a stored gate that has no test any more."""
        for path in self.directory.glob("*-torch*.json"):
            try:
                document = json.loads(path.read_bytes())
                if any(map(self._has_vanished, document["figures"])):
                    from lowmem.testing.memory_baseline import BaselineKey

                    self.memory().read_figures_cached_or_none(
                        BaselineKey(document["backend"], document["torch"], document["threads"])
                    )
            except (ValueError, KeyError, TypeError, OSError):
                continue  # a gate that needs the file says what is wrong with it

    def _has_vanished(self, name: str) -> bool:
        is_kept = any(f"{name} | ".startswith(f"{test} | ") for test in self._collected)
        return "::" in name and not is_kept and self._is_complete(name.partition("::")[0])

    def _is_complete(self, file: str) -> bool:
        """Whether all tests of a file were collected, or the file is gone from what was asked for."""
        path, directory = self.config.rootpath / file, self.config.invocation_params.dir
        asked = [argument.partition("::") for argument in self.config.args]
        if not path.exists():
            return any(path.is_relative_to(os.path.abspath(directory / name)) for name, *_ in asked)
        is_part = any(separator for _, separator, _ in asked) or self.config.getoption("lf", False)
        return file in self._files and not is_part

    def _write_verdict(self, passed: bool) -> None:
        """Keep the verdict of the memory gates, and write it where ``--lowmem-json`` asks for it."""
        from lowmem.testing.gate_verdicts import write_verdict

        self.verdict = self.memory().session_verdict(passed)
        if path := self.config.getoption("lowmem_json"):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_verdict(path, self.verdict)
            except OSError as error:
                self.errors.append(f"--lowmem-json={path}: {error}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the verdict of each gate."""
        write = terminalreporter.write_line
        memory = self._memory
        if memory is not None and (memory.rows or memory.missing_gate_rows()):
            terminalreporter.section("memory gates, in bytes")
            for line in memory.verdict_table_lines():
                write(line)
            fails = "FAILED " if memory.missing_gate_rows() else ""
            for line in memory.vanished_messages_by_gate().values():
                write(f"{fails}{line}", red=bool(fails))
            if memory.pending and not self.written:
                write("nothing is stored: the session was interrupted, or a gate could not judge", red=True)
        if memory is None and self.config.getoption("lowmem_baseline") == "update":
            for path in sorted(self.directory.glob("*-torch*.json")):
                shown = f"{self.config.getini('lowmem_baselines')}/{path.name}"
                write(f"no gate was measured: {shown} stays; remove it where no test uses memory_gate", yellow=True)
        for file in self.written:
            write(f"stored in {file}: commit it, and say in the message why figures moved", green=True)
        if self.latency:
            terminalreporter.section("latency gates")
            for test, text, verdict in self.latency:
                write(f"{test}: {text}: {verdict}", red=verdict == "slower", yellow=verdict == "undecided")
        if self.errors:
            terminalreporter.section(f"gates that could not judge: exit code {CANNOT_JUDGE}")
            for line in dict.fromkeys(self.errors):
                write(line, red=True)


def _session(request: pytest.FixtureRequest) -> Session:
    return cast(Session, request.config.pluginmanager.get_plugin("lowmem-session"))


def _node_id(item: pytest.Item) -> str:
    """Return a test's node id without the group that pytest-xdist may append to it."""
    return item.nodeid if item.parent is None else f"{item.parent.nodeid}::{item.name}"


def _is_benchmark_only(mark: pytest.Mark) -> bool:
    return mark.name == "skip" and "--benchmark-only" in str(mark.kwargs.get("reason"))
