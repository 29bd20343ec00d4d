"""How a run of tests in a copy ended, and that it ends with the process that waits for it."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.faults.copies import SOURCE, Copy, _outcome
from tests.selection import rows_in_one_case

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="faults are tried in forks, which this system has not")
REPORT = "...F\nFAILED tests/test_a.py::test_b[1] - assert 0\nERROR tests/test_c.py\n1 failed\n"


def exited(code):
    return code << 8  # as waitpid gives it


@FORKS
@rows_in_one_case(
    ("status", "verdict", "first"),
    [
        (exited(0), "passed", "tests/test_a.py::test_b[1]"),
        (exited(1), "failed", "tests/test_a.py::test_b[1]"),
        (exited(2), "failed", "tests/test_a.py::test_b[1]"),  # of pytest, an error while it collects
        (exited(3), "failed", "tests/test_a.py::test_b[1]"),
        (exited(4), "failed", "tests/test_a.py::test_b[1]"),
        (exited(5), "unusable", "tests/test_a.py::test_b[1]"),  # no test is left
        (exited(77), "unusable", "tests/test_a.py::test_b[1]"),
        (signal.SIGTERM.value, "crashed", "SIGTERM"),
        (signal.SIGABRT.value | 0x80, "crashed", "SIGABRT"),  # with a core dump
        (None, "timed out", "after 7 s"),
    ],
)
def test_an_outcome_says_how_the_process_ended(status, verdict, first):
    found = _outcome(status, 7.2, REPORT)
    assert (found.verdict, found.first, found.seconds, found.output) == (verdict, first, 7.2, REPORT)


@FORKS
@pytest.mark.parametrize(("output", "first"), [("", "no output"), ("one\n5 passed\n\n", "5 passed")])
def test_where_no_test_is_named_the_last_line_says_how_it_ended(output, first):
    assert _outcome(exited(1), 1.0, output).first == first


POOL = """
import multiprocessing
import sys
import time
from pathlib import Path

from tests.faults.copies import Copy, exit_on_sigterm

folder = Path(sys.argv[1])


def run(_):
    Copy(folder / "copy", folder / "source", None).run(["test_sleeps.py"])


with multiprocessing.get_context("fork").Pool(1, exit_on_sigterm) as pool:
    running = pool.apply_async(run, [None])
    while not ((folder / "sleeps").exists() or running.ready()):
        time.sleep(0.02)
"""

SLEEPS = """
import os, pathlib, signal, time

def test_it():
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    made = pathlib.Path({made!r})
    made.write_text(str(os.getpid()))
    made.rename(made.with_name("sleeps"))
    time.sleep(120)
"""


@pytest.mark.processes
@FORKS
def test_a_pool_that_ends_ends_the_tests_that_its_workers_run(tmp_path):
    source = tmp_path / "source"
    (source / "tests" / "faults").mkdir(parents=True)
    for name in ("tests/__init__.py", "tests/faults/__init__.py"):
        shutil.copy(SOURCE / name, source / name)
    (source / "test_sleeps.py").write_text(SLEEPS.format(made=str(tmp_path / "made")))
    (tmp_path / "copy").mkdir()
    done = subprocess.run([sys.executable, "-c", POOL, str(tmp_path)], cwd=SOURCE, timeout=300)
    assert done.returncode == 0
    with pytest.raises(ProcessLookupError):  # its worker has waited for it
        os.kill(int((tmp_path / "sleeps").read_text()), 0)


@pytest.mark.processes
def test_compiled_code_is_that_of_the_file_before_while_and_after_it_is_changed(tmp_path):
    """Python takes compiled code for that of a file of the same size and second."""
    source, root = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    root.mkdir()
    (source / "a.py").write_text("VALUE = 1\n")
    copy = Copy(root, source, None)
    file = copy.root / "a.py"

    def value():
        os.utime(file, (0, 0))
        code = (
            "import sys; sys.dont_write_bytecode = False; sys.path.insert(0, sys.argv[1]); import a; print(a.VALUE)"
        )
        return subprocess.check_output([sys.executable, "-c", code, str(copy.root)], text=True).strip()

    assert value() == "1"
    with copy.changed("a.py", "VALUE = 2\n"):
        assert value() == "2"
    assert value() == "1"
