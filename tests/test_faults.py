"""The list of planted faults in C is not stale, and changes are tried in copies that tell killed from survived."""

import os
import signal
import subprocess
import sys

import pytest

from tests.faults import __main__ as command
from tests.faults import copies
from tests.faults.copies import Change, Copy, Outcome, outcome, try_all

ENTRY = """
[[fault]]
id = "a"
file = "lowmem/kernels/csrc/portable.h"
breaks = "nothing"
find = "LANES 4"
replace = "LANES 8"
tests = ["tests/test_main.py"]
kernel = "portable"
"""


def test_there_are_forty_faults_in_c_and_twenty_in_triton_and_none_is_stale():
    assert len(command.read_faults()) >= 40
    assert len(command.read_faults(command.LISTS["triton"])) >= 20


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('"LANES 4"', '" "', "stands"),
        ('"LANES 4"', '"what is nowhere"', "stands 0 times"),
        ("portable.h", "gone.h", "No such file"),
        ("LANES 8", "LANES 4", "must once, and be replaced"),
        ("test_main.py", "test_gone.py::test_a", "there is no tests/test_gone.py::test_a"),
        ('["tests/test_main.py"]', "[]", "there is no test"),
        ('find = "LANES 4"\n', "", "find"),
    ],
)
def test_what_is_wrong_with_a_fault_is_said(old, new, error, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(ENTRY)
    assert list(command.read_faults(path)) == ["a"]
    path.write_text(ENTRY.replace(old, new))
    with pytest.raises((ValueError, KeyError, OSError), match=error):
        command.read_faults(path)
    path.write_text(ENTRY * 2)
    with pytest.raises(ValueError, match="a is there twice"):
        command.read_faults(path)


def test_the_command_lists_faults_skips_absent_kernels_and_ends_with_1_of_survivors(capsys, monkeypatch):
    faults = command.read_faults()
    assert command.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(faults)
    monkeypatch.setattr(command, "kernels", lambda: ["portable"])
    other = next(name for name, fault in faults.items() if fault.kernel != "portable")
    tried = [faults["c-bfloat16-nan"]]
    for survive, code in ((False, 0), (True, 1)):
        monkeypatch.setattr(command, "try_changes", lambda given, *_, lives=survive, **__: given * lives)
        assert command.main(["--only", "c-bfloat16-nan", other]) == code
        monkeypatch.setattr(command, "try_changes", lambda given, *_, **__: [] if given == tried else given)
        assert command.main(["--only", "c-bfloat16-nan", other]) == 0
        assert f"skipped: this processor has no {faults[other].kernel}: {other}" in capsys.readouterr().out


# How changes are tried

CHANGE = Change("a", "a.py", "", ("tests/test_main.py",))
OTHER = Change("b", "b.py", "", ("tests/test_other.py",))


def run_nothing(clean="passed", **changed):
    """Return what runs nothing: CHANGE's tests end without a change as ``clean`` says, and others as told."""

    def outcome_of(change):
        if change.file:
            return Outcome(changed.get(change.name, "failed"), 1.0, "", "")
        verdict = clean if change.tests == CHANGE.tests else "passed"
        return Outcome(verdict, 1.0, "tests/test_main.py::test_it", "\n".join("abc"))

    return lambda given: [outcome_of(change) for change, _ in given]


@pytest.mark.parametrize("verdict", ["passed", "unusable", "failed", "crashed", "timed out"])
def test_a_change_survives_where_its_tests_notice_nothing(verdict, capsys):
    lives = verdict in ("passed", "unusable")
    assert try_all(run_nothing(a=verdict), [CHANGE, OTHER]) == [CHANGE] * lives
    out = capsys.readouterr().out
    assert ("SURVIVED a; none of tests/test_main.py fails" in out) == lives
    assert f"{2 - lives} of 2 killed" in out


@pytest.mark.parametrize("verdict", ["failed", "crashed", "timed out"])
def test_tests_that_fail_without_a_change_are_shown_and_their_changes_not_tried(verdict, capsys):
    for changes, killed in (([CHANGE], 0), ([CHANGE, OTHER], 1)):
        with pytest.raises(ValueError, match="^without a change 1 sets of tests fail, and 1 changes were not tried$"):
            try_all(run_nothing(clean=verdict), changes)
        out = capsys.readouterr().out
        where = "tests/test_main.py::test_it"
        assert f"\nFAILED    without a change: tests/test_main.py -k '' {verdict}: {where}\na\nb\nc\n" in out
        assert out.count("\nkilled") == killed
    with pytest.raises(ValueError, match="^a: select='' leaves no test of tests/test_main.py"):
        try_all(run_nothing(clean="unusable"), [CHANGE])


REPORT = "...F\nFAILED tests/test_a.py::test_b[1] - assert 0\nERROR tests/test_c.py\n1 failed\n"


@pytest.mark.parametrize(
    ("code", "verdict", "first"),
    [
        (0, "passed", "tests/test_a.py::test_b[1]"),
        *((code, "failed", "tests/test_a.py::test_b[1]") for code in (1, 2, 3, 4)),
        *((code, "unusable", "tests/test_a.py::test_b[1]") for code in (5, 77)),  # 5: no test is left
        (-signal.SIGTERM, "crashed", "SIGTERM"),
        (None, "timed out", "after 7 s"),
    ],
)
def test_an_outcome_says_how_the_process_ended(code, verdict, first):
    assert outcome(code, 7.2, REPORT) == Outcome(verdict, 7.2, first, REPORT)
    for output, last in (("", "no output"), ("one\n5 passed\n\n", "5 passed")):
        assert outcome(1, 1.0, output).first == last


@pytest.mark.processes
def test_changes_are_tried_in_copies(tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "tests").mkdir(parents=True)
    (source / "a.py").write_text("VALUE = 1\n")
    (source / "tests" / "test_a.py").write_text("import a\n\ndef test_a():\n    assert a.VALUE < 3\n")
    monkeypatch.setattr(copies, "SOURCE", source)
    changes = [Change(f"is {n}", "a.py", f"VALUE = {n}\n", ("tests/test_a.py",)) for n in (2, 3)]
    assert copies.try_changes(changes, jobs=2) == changes[:1]
    assert (source / "a.py").read_text() == "VALUE = 1\n"
    (tmp_path / "copy").mkdir()
    assert Copy(tmp_path / "copy", source).run(changes[0], seconds=0.01).verdict == "timed out"


@pytest.mark.processes
def test_compiled_code_is_that_of_the_file_before_while_and_after_it_is_changed(tmp_path):
    """Python takes compiled code for that of a file of the same size and second."""
    source, root = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    root.mkdir()
    (source / "a.py").write_text("VALUE = 1\n")
    copy = Copy(root, source)
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
