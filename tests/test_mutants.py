"""Which mutants are drawn: the same ones each time, in code that runs, with the tests that must kill them."""

import ast
from pathlib import PurePosixPath

import pytest

from tests.faults.copies import SOURCE

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


def line_of(mutant):
    return int(mutant.name.split(":")[1])


def test_mutants_are_other_code_that_compiles_with_the_tests_of_its_module(tree):
    drawn = draw(tree)
    assert len(drawn) > 5
    for mutant in drawn:
        assert ast.dump(ast.parse(mutant.text)) != ast.dump(ast.parse(CODE))
        assert mutant.tests == ("tests/test_area.py",)
        assert CODE.splitlines()[line_of(mutant) - 1].strip() in mutant.name


def test_no_mutant_is_of_an_annotation_or_a_protocol(tree):
    for mutant in draw(tree):
        assert line_of(mutant) > 7
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


@pytest.mark.parametrize(("lives", "code"), [(0, 0), (2, 0), (3, 1)])
def test_more_survivors_than_one_in_ten_end_with_1_and_a_job_s_summary_has_the_score(
    tree, lives, code, capsys, tmp_path, monkeypatch
):
    twenty = (4 * draw(tree, 5))[:20]
    survived = twenty[20 - lives :]
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setattr(mutants, "sample", lambda *_: twenty)
    monkeypatch.setattr(mutants, "try_changes", lambda *_: survived)
    assert mutants.main(["--seed", "7"]) == code
    text = summary.read_text()
    assert text in capsys.readouterr().out
    assert "seed 7" in text
    assert f"{20 - lives} of 20 killed" in text
    assert [line for line in text.splitlines() if line.startswith("- ")] == [f"- `{one.name}`" for one in survived]
