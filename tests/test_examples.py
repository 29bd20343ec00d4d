"""The examples run, here in small, and say in their headers what they reach.

Those that need other packages: tests/formats/test_example.py, tests_minilm/test_example.py.
"""

import pytest

from tests.examples import EXAMPLES, example
from tests.selection import NIGHTLY


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_header_says_how_to_run_it_and_what_came_out(path):
    header = path.read_text(encoding="utf8").split('"""')[1]
    assert f"python examples/{path.name}" in header
    assert "2 cores of a Zen 4" in header
    assert "MiB" in header
    assert f"examples/{path.name}" in (EXAMPLES.parent / "README.md").read_text(encoding="utf8")


def test_digits(capsys):
    pytest.importorskip("sklearn", reason="the digits need the extra: pip install '.[digits]'")
    found = example("digits").main(*([] if NIGHTLY else [2]))
    assert list(found) == ["upright", "turned", "full", "qlora"]
    printed = capsys.readouterr().out
    assert printed.count("peak, in") == 2
    assert f"qlora: {found['qlora']:.1%} of held-out digits" in printed
    if NIGHTLY:
        assert found["turned"] < 0.3 < 0.9 < found["full"]
        assert found["qlora"] >= found["full"] - 0.01
