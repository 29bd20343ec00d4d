"""The list of planted faults in C is not stale, and the script that tries them tells killed from survived."""

from dataclasses import replace

import pytest

from tests.faults import __main__ as command
from tests.faults.copies import SOURCE, Outcome
from tests.faults.planted import LIST, Fault, errors_of, read_faults
from tests.selection import rows_in_one_case

FAULTS = read_faults(LIST)
PORTABLE = "lowmem/kernels/csrc/portable.h"
FAULT = Fault("a", PORTABLE, "nothing", "LANES 4", "LANES 8", ("tests/test_main.py",), "portable")


def test_there_are_forty_faults_and_none_is_stale():
    assert errors_of(FAULTS, SOURCE) == []
    assert len(FAULTS) >= 40


@rows_in_one_case(
    ("changes", "error"),
    [
        ({"find": " "}, "stands"),
        ({"find": "what is nowhere"}, "stands 0 times"),
        ({"file": "lowmem/gone.c"}, "there is no lowmem/gone.c"),
        ({"replace": "LANES 4"}, "changes nothing"),
        ({"tests": ("tests/test_gone.py::test_a",)}, "there is no tests/test_gone.py::test_a"),
        ({"tests": ()}, "names no tests"),
    ],
)
def test_what_is_wrong_with_a_fault_is_said(changes, error):
    assert errors_of([FAULT], SOURCE) == []
    (found,) = errors_of([replace(FAULT, **changes)], SOURCE)
    assert error in found
    assert len(found) < 300
    assert errors_of([FAULT, FAULT], SOURCE) == ["a is there 2 times"]


@rows_in_one_case("text", ["", "fault = 3", "[[fault]]\nid = 'a'", "[[fault]]\nid = 'a'\nwhat = 1", "[["])
def test_a_damaged_list_is_an_error_that_names_it(tmp_path, text):
    path = tmp_path / "some.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^some.toml is no list of faults: "):
        read_faults(path)


def test_the_command_lists_the_faults_and_refuses_others(capsys):
    assert command.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(FAULTS)
    assert command.main(["--only", "gone"]) == 2
    assert capsys.readouterr() == ("", "faults: --only gone: there is no such fault; --list shows all\n")


class Pool:
    """A pool whose workers run nothing: how FAULT's tests end without a fault, and those of faults with them."""

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


OTHER = replace(FAULT, id="c")


def test_faults_that_are_all_killed_end_with_0(capsys):
    assert command._try_all(Pool(c="timed out"), [FAULT, OTHER]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["killed", "a"], ["killed", "c"]]
    assert [line.split() for line in lines[4:6]] == [
        ["faults", "killed", "survived", "skipped"],
        ["2", "2", "0", "0"],
    ]
    assert lines[-1] == "Every fault that was tried is caught."


@rows_in_one_case("verdict", ["passed", "unusable"])
def test_a_fault_that_survives_ends_with_1_and_is_named(verdict, capsys):
    assert command._try_all(Pool(a=verdict), [FAULT, OTHER]) == 1
    out = capsys.readouterr().out
    assert f"SURVIVED a: nothing ({PORTABLE}); none of tests/test_main.py fails" in out
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
    lacking = replace(OTHER, kernel="neon")
    assert command._try_all(Pool(), [FAULT, lacking]) == 0
    assert "this processor has no neon" in capsys.readouterr().out
    with pytest.raises(ValueError, match="^no fault can be tried on this processor"):
        command._try_all(Pool(), [lacking])


@rows_in_one_case("text", ["0", "-1", "1.5", "many", ""])
def test_a_number_of_jobs_is_a_whole_number_above_0(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main([f"--jobs={text}"])
    assert f"{text!r} must be a whole number above 0" in capsys.readouterr().err
