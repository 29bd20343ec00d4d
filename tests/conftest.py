"""Fixtures that keep tests independent of each other and of the kernel's stand-in, and those of the commands."""

import gc
import json
import os
import random
import signal
import sys
import zlib
from collections import Counter

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies

from lowmem import backend
from lowmem.__main__ import main
from lowmem.kernels import cpu, reference
from tests.selection import FULL, MARKERS, PROFILE

THREADS = 2


def pytest_collection_modifyitems(config, items):
    """Leave out the tests of ``MARKERS``, but for the first cases that ``keep=`` counts.

    All run where a test is named, where ``-m`` selects a marker, and where planted faults and mutants are tried.
    """
    named = any("::" in argument for argument in config.args)
    if FULL or PROFILE == "faults" or named or any(name in config.option.markexpr for name in MARKERS):
        return
    kept, left_out, cases = [], [], Counter()
    for item in items:
        mark = next(filter(None, map(item.get_closest_marker, MARKERS)), None)
        test = item.nodeid.partition("[")[0]
        cases[test] += 1
        (kept if mark is None or cases[test] <= mark.kwargs.get("keep", 0) else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_configure(config):
    """Declare the markers."""
    for name, what in MARKERS.items():
        config.addinivalue_line("markers", f"{name}(keep=0): {what}; left out by default (tests/selection.py).")


class TorchRandom:
    """torch's generator for hypothesis, which seeds it before every example and gives its state back after."""

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(TORCH_RANDOM)


# Those that a verdict depends on: libraries set others of their own when they are imported.
VARIABLES = ("LOWMEM_", "OMP_", "MKL_", "PYTHON", "HYPOTHESIS_", "TZ")


def process_state() -> dict[str, object]:
    """Return what a test could leave changed for those that run after it."""
    return {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "kernel": backend(),
        "directory": os.getcwd(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
    }


@pytest.fixture(scope="session", autouse=True)
def every_thread_computes():
    """Let the kernel use all of a test's threads, on one CPU and beside other processes, too."""
    if native := cpu.load_native_module_and_reason()[0]:
        native.limit_threads(THREADS, False)


@pytest.fixture(scope="session")
def first_example():
    """Let hypothesis make its own generator: later it would warn, where frozen objects do not tell who holds it."""
    hypothesis.find(strategies.none(), lambda _: True, settings=hypothesis.settings(database=None))


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect(first_example):
    """Leave what modules and caches hold by now out of garbage collection, which gates and some tests run in full."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def isolated(request):
    """Seed every generator from the test's name, and fail a test that changes the process for the next one.

    Threads are as many wherever it runs: each has scratch of its own, and they decide in what order torch adds. Tests
    of other counts set them. It is set up after fixtures of a wider scope: those draw from generators of their own.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    before = process_state()
    yield
    after = process_state()
    torch.set_num_threads(threads)
    assert after == before


@pytest.fixture(autouse=True)
def no_worker_of_xdist(monkeypatch):
    """Let the pytest that a test starts be none of xdist's processes, in which pytest-benchmark times nothing."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Let what prints, here and in processes that a test starts, see neither the user's terminal nor a CI's.

    With FORCE_COLOR rich takes every pipe for a terminal, and where CI is set pytest says its failures in full.
    """
    colors = "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"
    for name in (*colors, "LINES", "CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")  # where it is dumb, rich draws no bar


@pytest.fixture
def terminal_signals():
    """Handle SIGINT and SIGHUP as in a terminal, here and in processes that a test starts.

    A script's ``&`` lets pytest ignore SIGINT, and ``nohup`` SIGHUP; processes inherit that.
    """
    handlers = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    numbers = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def poisoned():
    """Fill every fresh tensor with NaN, so that an element that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def only_c(monkeypatch):
    """Let no test here pass because plain torch did the work: its products raise."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("plain torch served")

    monkeypatch.setattr(reference, "linear", refuse)
    monkeypatch.setattr(reference, "input_grad", refuse)
    monkeypatch.setattr(reference, "add_low_rank", refuse)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Return a function that writes a module into the working directory, which is ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    names = []

    def write(name, text):
        names.append(name)
        (tmp_path / f"{name}.py").write_text(text)

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def results(capsys):
    """Return a function that runs a command with ``--json`` and returns the document."""

    def run(*argv):
        capsys.readouterr()
        assert main([*argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(capsys):
    """Return a function that runs a command that must end with code 2 and one short line, and returns that line.

    ``printed`` is the first word of what the command prints to stdout before.
    """

    def run(*argv, printed=""):
        capsys.readouterr()
        try:
            code = main(list(map(str, argv)))
        except SystemExit as stopped:  # argparse ends the process
            code = stopped.code
        out, err = capsys.readouterr()
        assert (code, out.partition(" ")[0], err.count("\n")) == (2, printed, 1), err
        assert err.startswith("lowmem")
        assert err[:-1].isprintable()
        assert len(err) < 300
        return err

    return run
