"""Which mutants are drawn: the same ones each time, in code that runs, with the tests that must kill them."""

import ast
import subprocess
import sys

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


def test_mutants_are_other_code_that_compiles_with_the_tests_of_its_module(tree):
    drawn = draw(tree)
    assert len(drawn) > 5
    for mutant in drawn:
        assert ast.dump(ast.parse(mutant.text)) != ast.dump(ast.parse(CODE))
        assert mutant.tests == ("tests/test_area.py",)
        assert CODE.splitlines()[mutant.number - 1].strip() in mutant.survivor.line


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


def test_code_in_front_changes_no_mutant_of_what_follows(tree):
    before = {mutant.survivor for mutant in draw(tree)}
    (tree / "lowmem" / "area.py").write_text("import math\n\n" + CODE)
    assert {mutant.survivor for mutant in draw(tree)} == before


def test_a_module_without_tests_is_an_error_that_names_it(tree):
    (tree / "tests" / "test_area.py").unlink()
    with pytest.raises(ValueError, match=r"^lowmem/area.py has no tests: there is no tests/test_area.py"):
        draw(tree)


def test_every_module_that_is_drawn_from_has_tests():
    files = mutants.modules()
    assert {"lowmem/quant/packing.py", "lowmem/kernels/cpu.py", "benchmarks/gate.py"} <= set(files)
    for file in files:
        assert all((SOURCE / test).is_file() for test in mutants.mirror_tests(file))


def test_a_module_that_is_not_drawn_from_is_one_line_and_exit_2():
    command = [sys.executable, "-m", "tests.faults.mutants", "lowmem/gone.py"]
    done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mutants: lowmem/gone.py is none of the modules")
    assert done.stderr.count("\n") == 1
