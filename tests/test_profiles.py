"""What is tried where: the same examples and a selection of cases in what gates a merge, and more every night."""

import os
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import conftest
from tests.compiled import ISAS
from tests.selection import covering, selection

ROOT = Path(__file__).parents[1]

SHOW = (
    "import conftest; from hypothesis import settings; "
    "from tests.compiled import ISAS, bound; from tests.selection import covering; "
    "found, axes = settings(), {'a': range(3), 'b': range(3), 'c': range(3)}; "
    "print(found.derandomize, found.database is not None, found.max_examples, found.deadline, "
    "*(len(covering(strength, **axes).args[1]) for strength in (1, 2)), bound.args[1] == ISAS)"
)
SHOWN = {
    "ci": f"True False 15 None 3 3 {len(ISAS) <= 2}",
    "faults": f"True False 60 None 3 9 {len(ISAS) <= 2}",
    "full": "True False 60 None 27 27 True",
    "nightly": "False True 2000 None 27 27 True",
}


@covering(1, profile=SHOWN, ci=["", "true"])
def test_a_profile_is_the_same_wherever_it_runs(profile, ci):
    """Where CI is set, hypothesis's own defaults are others."""
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {
        "HYPOTHESIS_PROFILE": profile
    }
    environment |= {"CI": ci} if ci else {}
    done = subprocess.run([sys.executable, "-c", SHOW], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == SHOWN[profile], done.stderr


class Item:
    def __init__(self, nodeid, **marks):
        self.nodeid, self.marks = nodeid, marks

    def get_closest_marker(self, name):
        return SimpleNamespace(kwargs=self.marks[name]) if name in self.marks else None


@pytest.mark.parametrize(
    ("profile", "markexpr", "args", "left"),
    [
        ("ci", "", ["tests"], ["t::b[2]", "t::c"]),
        ("ci", "hypothesis", ["tests"], ["t::b[2]", "t::c"]),
        ("ci", "compile", ["tests"], []),
        ("ci", "", ["t::c"], []),
        ("faults", "", ["tests"], []),
        ("full", "", ["tests"], []),
    ],
)
def test_of_tests_with_a_marker_the_first_cases_run_by_default(profile, markexpr, args, left):
    items = [Item("t::a"), Item("t::b[1]", compile={"keep": 1}), Item("t::b[2]", compile={"keep": 1})]
    items.append(Item("t::c", gates={}))
    names, deselected = [item.nodeid for item in items], []
    hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(item.nodeid for item in items))
    config = SimpleNamespace(option=SimpleNamespace(markexpr=markexpr), args=args, hook=hook)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "PROFILE", profile)
        patch.setattr(conftest, "FULL", profile == "full")
        conftest.pytest_collection_modifyitems(config, items)
    assert deselected == left
    assert [item.nodeid for item in items] == [name for name in names if name not in left]


@pytest.mark.parametrize("sizes", [(3,), (2, 2), (10, 4), (4, 2, 2), (9, 4, 3), (2, 3, 2, 5)])
def test_a_selection_holds_every_combination_and_takes_values_alike_often(sizes):
    axes = [[f"{axis}{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    for strength in range(1, len(axes) + 1):
        rows = selection(axes, strength)
        for few in combinations(range(len(axes)), strength):
            assert {tuple(row[i] for i in few) for row in rows} == set(product(*(axes[i] for i in few)))
        assert len(set(rows)) == len(rows) <= prod(sizes)
    uses = Counter(value for row in selection(axes, 1) for value in row)
    for axis in axes:
        assert max(uses[value] for value in axis) - min(uses[value] for value in axis) <= 1
    assert len(selection(axes, 1)) == max(sizes)


@pytest.mark.parametrize("values", [{"a", "b"}, frozenset("ab")])
def test_values_without_an_order_are_refused(values):
    """Each process orders strings of a set in its own way: workers of pytest-xdist would collect different tests."""
    with pytest.raises(TypeError, match=r"\['mode'\] must have an order: pass a tuple or a list"):
        covering(name=["x"], mode=values)
