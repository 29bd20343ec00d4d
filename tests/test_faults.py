"""The list of planted faults is not stale, and the script that tries them tells killed from survived."""

import subprocess
import sys
from dataclasses import replace

import pytest

from tests.faults.copies import SOURCE
from tests.faults.planted import Fault, errors_of, read_faults

FAULTS = read_faults()
FAULT = Fault("a", "lowmem/version.py", "nothing", "__version__", "_version", ("tests/test_main.py",))


def test_no_fault_is_stale():
    assert errors_of(FAULTS, SOURCE) == []


def test_there_are_forty_faults_in_python_and_forty_in_c():
    in_c = sum(fault.is_c for fault in FAULTS)
    assert in_c >= 40
    assert len(FAULTS) - in_c >= 40


def test_every_module_that_computes_converts_or_writes_has_a_fault():
    others = {"__init__", "__main__", "bignet", "messages", "startup", "version"}
    modules = {p for folder in ("lowmem", "lowmem/kernels") for p in (SOURCE / folder).glob("*.py")}
    expected = {p.relative_to(SOURCE).as_posix() for p in modules if p.stem not in others}
    assert expected - {fault.file for fault in FAULTS} == set()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"find": "_"}, "stands"),
        ({"find": "what is nowhere"}, "stands 0 times"),
        ({"file": "lowmem/gone.py"}, "there is no lowmem/gone.py"),
        ({"replace": "("}, "version.py, line 3"),
        ({"replace": "__version__"}, "changes nothing"),
        ({"tests": ("tests/test_gone.py::test_a",)}, "there is no tests/test_gone.py::test_a"),
        ({"tests": ()}, "names no tests"),
        ({"kernel": "portable"}, "kernel='portable'"),
        ({"file": "lowmem/kernels/csrc/portable.c", "find": "LANES 8"}, "kernel=''"),
    ],
)
def test_what_is_wrong_with_a_fault_is_said(changes, error):
    assert errors_of([FAULT], SOURCE) == []
    (found,) = errors_of([replace(FAULT, **changes)], SOURCE)
    assert error in found
    assert len(found) < 300


def test_two_faults_of_one_name_are_said():
    assert errors_of([FAULT, FAULT], SOURCE) == ["a is there 2 times"]


@pytest.mark.parametrize("text", ["", "fault = 3", "[[fault]]\nid = 'a'", "[[fault]]\nid = 'a'\nwhat = 1", "[["])
def test_a_damaged_list_is_an_error_that_names_it(tmp_path, text):
    path = tmp_path / "some.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^some.toml is no list of faults: "):
        read_faults([path])


def run(*arguments):
    command = [sys.executable, "-m", "tests.faults", *arguments]
    return subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)


def test_the_command_lists_the_faults():
    done = run("--list")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(FAULTS)


def test_a_fault_that_is_not_there_is_one_line_and_exit_2():
    done = run("--only", "gone")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "faults: --only gone: there is no such fault; --list shows all\n"
