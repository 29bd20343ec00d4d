"""The list of planted faults is not stale, and the script that tries them tells killed from survived."""

import subprocess
import sys
from dataclasses import replace

import pytest

from tests.faults import __main__ as command
from tests.faults.copies import SOURCE, Outcome
from tests.faults.modules import EXEMPT, modules
from tests.faults.planted import Fault, errors_of, read_faults
from tests.faults.survivors import Survivor, read_survivors
from tests.selection import rows_in_one_case

FAULTS = read_faults()
FAULT = Fault("a", "lowmem/version.py", "nothing", "__version__", "_version", ("tests/test_main.py",))


def test_no_fault_is_stale():
    assert errors_of(FAULTS, SOURCE) == []


def test_there_are_forty_faults_in_python_and_forty_in_c():
    in_c = sum(fault.is_c for fault in FAULTS)
    assert in_c >= 40
    assert len(FAULTS) - in_c >= 40


def test_every_module_that_computes_converts_or_writes_has_a_fault():
    expected = set(modules(SOURCE))
    assert {
        "lowmem/tools/fit.py",
        "lowmem/report/page.py",
        "benchmarks/latency/rounds.py",
        "pytest_lowmem.py",
    } < expected
    assert expected - {fault.file for fault in FAULTS} == set()


def test_every_exempt_module_is_there():
    assert [name for name in sorted(EXEMPT) if not (SOURCE / name).is_file()] == []


@rows_in_one_case(
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
        ({"file": "lowmem/kernels/csrc/portable.c", "find": "LANES 4"}, "kernel=''"),
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


class Pool:
    """A pool whose workers run nothing: what each run gives is known before.

    Args:
        clean: how the tests of FAULT end without a fault, where they do not pass.
        planted: how they end with a fault, where they do not fail.
    """

    def __init__(self, clean="passed", **planted):
        self.clean, self.planted = clean, planted

    def apply(self, function):
        assert function is command._kernels
        return ["portable"]

    def imap(self, function, given):
        if function is command._run_clean:
            verdicts = (self.clean if one.tests == FAULT.tests else "passed" for one in given)
            return [Outcome(verdict, 1.0, "tests/test_main.py::test_it", "\n".join("abc")) for verdict in verdicts]
        assert function is command._run_planted
        return [(fault, Outcome(self.planted.get(fault.id, "failed"), 1.0, "", "")) for fault, _ in given]


OF_C = replace(FAULT, id="c", file="lowmem/kernels/csrc/portable.c", kernel="portable")


def test_faults_that_are_all_killed_end_with_0(capsys):
    assert command._try_all(Pool(c="timed out"), [FAULT, OF_C]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["killed", "a"], ["killed", "c"]]
    assert [line.split() for line in lines[5:7]] == [["Python", "1", "1", "0", "0"], ["C", "1", "1", "0", "0"]]
    assert lines[-1] == "Every fault that was tried is caught."


@pytest.mark.parametrize("verdict", ["passed", "unusable"])
def test_a_fault_that_survives_ends_with_1_and_is_named(verdict, capsys):
    assert command._try_all(Pool(a=verdict), [FAULT, OF_C]) == 1
    out = capsys.readouterr().out
    assert "SURVIVED a: nothing (lowmem/version.py); none of tests/test_main.py fails" in out
    assert "caught" not in out


@rows_in_one_case("verdict", ["failed", "crashed", "timed out"])
def test_tests_that_fail_without_a_fault_are_shown_and_their_faults_not_tried(verdict, capsys):
    other = replace(FAULT, id="b", tests=("tests/test_other.py",))
    error = r"^without a change 1 sets of tests fail, and 1 were not tried: first tests/test_main.py -k ''$"
    for faults, killed in (([FAULT], []), ([FAULT, other], [["killed", "b"]])):
        with pytest.raises(ValueError, match=error):
            command._try_all(Pool(clean=verdict), faults)
        out = capsys.readouterr().out
        where = "tests/test_main.py::test_it"
        assert f"\nFAILED    without a change: tests/test_main.py -k '' {verdict}: {where}\na\nb\nc\n" in out
        assert [line.split()[:2] for line in out.splitlines() if line.startswith("killed")] == killed


def test_a_selection_that_leaves_no_test_is_an_error_that_names_the_fault():
    with pytest.raises(ValueError, match="^a: select='none' leaves no test of tests/test_main.py"):
        command._try_all(Pool(clean="unusable"), [replace(FAULT, select="none")])


def test_a_fault_of_a_kernel_that_the_processor_lacks_is_skipped(capsys):
    lacking = replace(OF_C, kernel="neon")
    assert command._try_all(Pool(), [FAULT, lacking]) == 0
    assert "this processor has no neon" in capsys.readouterr().out
    with pytest.raises(ValueError, match="^no fault can be tried on this processor"):
        command._try_all(Pool(), [lacking])


@rows_in_one_case("text", ["0", "-1", "1.5", "many", ""])
def test_a_number_of_jobs_is_a_whole_number_above_0(text):
    done = run(f"--jobs={text}")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{text!r} must be a whole number above 0" in done.stderr


def test_every_listed_survivor_is_of_code_that_is_there():
    for survivor in read_survivors():
        code = " ".join((SOURCE / survivor.file).read_text(encoding="utf8").split())
        assert " ".join(survivor.line.split()) in code, survivor


ENTRY = "[[survivor]]\nfile = 'a.py'\nline = 'x = 1'\nmutant = 'x = 2'\n"


def test_a_list_of_survivors_gives_the_reason_of_each(tmp_path):
    path = tmp_path / "survivors.toml"
    path.write_text(ENTRY + "reason = 'x is not read'")
    assert read_survivors(path) == {Survivor("a.py", "x = 1", "x = 2"): "x is not read"}


@rows_in_one_case(
    ("text", "error"),
    [
        (ENTRY, "'x = 2' has no reason"),
        (ENTRY + "reason = ' '", "'x = 2' has no reason"),
        (2 * (ENTRY + "reason = 'because'\n"), "'x = 2' is there twice"),
        (ENTRY + "reason = 'because'\nmore = 1", "more"),
        ("[[survivor]]\nfile = 'a.py'\nreason = 'because'", "line"),
        ("survivor = 3", "iterable"),
        ("", "survivor"),
        ("[[", "survivors.toml"),
    ],
)
def test_a_damaged_list_of_survivors_is_an_error_that_says_how(tmp_path, text, error):
    path = tmp_path / "survivors.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^survivors.toml is no list of survivors: .*{error}|^{error}"):
        read_survivors(path)
