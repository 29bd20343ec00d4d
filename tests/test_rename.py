"""Renaming by scope: lines are parsed, and definitions are found. What Pyright finds of them needs its server."""

import pytest

from tests.rename import Position, Renaming, parse_renamings, positions, replace_uses

SOURCE = """
LIMIT = 1

class Layer:
    size: int

    def reset(self, one, *, "ä"=None):
        self.size = found = one
""".replace('"ä"', "other")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a/b.py::LIMIT -> MOST", [(1, 0)]),
        ("a/b.py::Layer -> Module", [(3, 6)]),
        ("a/b.py::Layer.reset -> clear", [(6, 8)]),
        ("a/b.py::Layer.reset(one) -> width", [(6, 20)]),
        ("a/b.py::Layer.reset:found -> width  # why", [(7, 20)]),
        ("a/b.py::Layer:size -> width", [(4, 4), (7, 13)]),
        ("a/b.py::missing -> found", []),
    ],
)
def test_definitions_are_found_in_their_scope(line, expected):
    (renaming,) = parse_renamings(line)
    assert sorted(positions(SOURCE, renaming)) == [Position(*place) for place in expected]


def test_a_line_of_another_form_is_an_error_with_its_number():
    with pytest.raises(ValueError, match="line 2: 'a.py -> b.py' is not PATH::NAME"):
        parse_renamings("# a comment\na.py -> b.py")


def test_a_renaming_knows_its_old_name():
    assert [Renaming("a.py", "A.b", *names, "x").old_name for names in ((None, None), ("c", None))] == ["b", "c"]


def test_uses_are_replaced_together():
    assert replace_uses("a = b + a\nb\n", {(0, 0, 1): "left", (0, 8, 9): "left"}) == "left = b + left\nb\n"
