"""Names are drawn uniformly of all functions and classes, and shown as a reader meets them."""

import pytest

from tests.drawn_names import OWN, ROOT, drawn, names_of

SOURCE = '''
class A(B):
    def __init__(self): ...

    async def run(self, x: int = 1, *, fast=True):
        """Says what it does."""
        def inner(y): ...
'''


@pytest.fixture
def package(tmp_path):
    (tmp_path / "p" / "q").mkdir(parents=True)
    (tmp_path / "p" / "q" / "r.py").write_text(SOURCE)
    return tmp_path / "p"


def test_a_name_is_shown_with_its_place_and_arguments_and_without_its_docstring(package):
    assert names_of(package) == [
        "p/q/r.py: class A(B)",
        "p/q/r.py: def A.run(self, x: int=1, *, fast=True)",
        "p/q/r.py: def A.run.inner(y)",
    ]


def test_a_seed_draws_the_same_names_of_the_whole_library_and_another_seed_others():
    first = drawn(ROOT / "lowmem", OWN, "a")
    assert first == drawn(ROOT / "lowmem", OWN, "a") != drawn(ROOT / "lowmem", OWN, "b")
    assert len(set(first)) == OWN
    assert len({name.partition(":")[0] for name in first}) > OWN / 4
