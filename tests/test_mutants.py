"""Which mutants are drawn: the same ones each time, in code that runs, with the tests that must kill them."""

import ast
from dataclasses import replace
from pathlib import PurePosixPath

import pytest

from tests.faults.copies import SOURCE, Outcome

pytest.importorskip("cosmic_ray")  # it comes with tox -e mutants alone
from tests.faults import mutants

CODE = """\
from typing import Protocol


class Shape(Protocol):
    def area(self, side: int = 2 + 1) -> int | None: ...


def area(side: int | None = 3) -> int | float:
    if side is None or side < 1:
        return 0
    return side * side
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "lowmem").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "lowmem" / "area.py").write_text(CODE)
    (tmp_path / "tests" / "test_area.py").write_text("")
    return tmp_path


def draw(tree, size=1000, seed=0):
    return mutants.sample(size, seed, ["lowmem/area.py"], tree)


def test_mutants_are_other_code_that_compiles_with_the_tests_of_its_module(tree):
    drawn = draw(tree)
    assert len(drawn) > 5
    for mutant in drawn:
        assert ast.dump(ast.parse(mutant.text)) != ast.dump(ast.parse(CODE))
        assert mutant.tests == ("tests/test_area.py",)
        assert CODE.splitlines()[mutant.number - 1].strip() in mutant.line


def test_no_mutant_is_of_an_annotation_or_a_protocol(tree):
    for mutant in draw(tree):
        assert mutant.number > 7
        changed = ast.parse(mutant.text).body[2]
        assert ast.unparse(changed.returns) == "int | float"
        assert ast.unparse(changed.args.args[0].annotation) == "int | None"


def test_a_sample_is_the_beginning_of_a_larger_one_and_a_seed_draws_another(tree):
    few, more = draw(tree, 3), draw(tree, 6)
    assert len(few) == 3
    assert more[:3] == few == draw(tree, 3)
    assert draw(tree, 3, seed=1) != few


def test_a_module_without_tests_is_an_error_that_names_it(tree):
    (tree / "tests" / "test_area.py").unlink()
    with pytest.raises(ValueError, match=r"^lowmem/area.py has no tests: there is no tests/test_area.py"):
        draw(tree)


def test_every_module_that_is_drawn_from_has_tests():
    files = mutants.modules()
    folders = {
        str(path.parent.relative_to(SOURCE)) for path in (SOURCE / "lowmem").rglob("*.py") if path.stem[0] != "_"
    }
    assert folders | {"benchmarks", "benchmarks/latency", "."} == {str(PurePosixPath(file).parent) for file in files}
    assert mutants.mirror_tests("benchmarks/latency/rounds.py") == ("tests/benchmarks/test_latency.py",)
    assert "benchmarks/latency/rounds.py" in files
    for file in files:
        assert all((SOURCE / test).is_file() for test in mutants.mirror_tests(file))


class Pool:
    """A pool whose workers run nothing: how the first tests end without a mutant, and which mutants live."""

    def __init__(self, clean="passed", lives=()):
        self.clean, self.lives = clean, lives

    def imap(self, function, given):
        if function is mutants._run_clean:
            verdicts = [self.clean, *["passed"] * (len(given) - 1)]
            return [Outcome(one, 1.0, f"{test}::test_it", "") for test, one in zip(given, verdicts, strict=True)]
        assert function is mutants._run_mutant
        verdicts = ["passed" if number in self.lives else "failed" for number in range(len(given))]
        return [(mutant, Outcome(verdict, 1.0, "", "")) for (mutant, _), verdict in zip(given, verdicts, strict=True)]


@pytest.fixture
def twenty(tree):
    """Twenty mutants of one module: two that live are as many as may."""
    return (4 * draw(tree, 5))[:20]


@pytest.mark.parametrize(("lives", "code"), [((), 0), ((18, 19), 0), ((17, 18, 19), 1)])
def test_more_survivors_than_one_in_ten_end_with_1_and_the_score_is_in_the_summary_of_the_job(
    twenty, lives, code, capsys, tmp_path
):
    summary = tmp_path / "summary.md"
    assert mutants._try_all(Pool(lives=lives), twenty, 7, str(summary)) == code
    text = summary.read_text()
    assert text in capsys.readouterr().out
    assert "seed 7" in text
    assert f"{20 - len(lives)} of 20 killed" in text
    assert [line for line in text.splitlines() if line.startswith("- ")] == [f"- `{twenty[one]}`" for one in lives]


def test_tests_that_fail_without_a_mutant_are_named_and_their_mutants_not_tried(twenty, capsys):
    other = [replace(mutant, tests=("tests/test_other.py",)) for mutant in twenty[:3]]
    error = "^without a change 1 sets of tests fail, and 20 were not tried: first tests/test_area.py$"
    for more, tried in (([], 0), (other, 3)):
        with pytest.raises(ValueError, match=error):
            mutants._try_all(Pool(clean="failed"), twenty + more, 0, "")
        out = capsys.readouterr().out
        assert "FAILED    without a change: tests/test_area.py failed: tests/test_area.py::test_it\n" in out
        assert out.count("\nkilled ") == tried
