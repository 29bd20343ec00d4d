"""The examples run, here in small, and say in their headers what they reach.

Those that need trained models: tests_minilm/test_example.py.
"""

import re

import pytest

from tests.examples import EXAMPLES, example
from tests.selection import FULL


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_header_says_how_to_run_it_and_what_came_out(path):
    header = path.read_text(encoding="utf8").split('"""')[1]
    assert f"python examples/{path.name}" in header
    assert re.search("2 cores of a (Zen 4|Xeon with AMX)", header)
    assert "MiB" in header
    assert f"examples/{path.name}" in (EXAMPLES.parent / "README.md").read_text(encoding="utf8")


@pytest.mark.thorough
def test_digits(capsys):
    pytest.importorskip("sklearn", reason="the digits need the extra: pip install '.[digits]'")
    run = example("digits")
    found = run.main(*([] if FULL else [2]))
    assert list(found) == ["upright", "turned", "full", "qlora"]
    printed = capsys.readouterr().out
    peaks = [float(peak) for peak in re.findall(r"peak, in \w+ +([\d.]+)", printed)]
    header = " ".join(run.__doc__.split())
    told = re.search(r"(\d+) MiB at its peak with all weights.*?(\d+) MiB by QLoRA", header)
    # Another kernel's or torch's scratch may move a peak by some hundred KiB.
    assert peaks == pytest.approx([int(one) for one in told.groups()], abs=1)
    assert f"qlora: {found['qlora']:.1%} of held-out digits" in printed
    if FULL:
        assert found["turned"] < 0.3 < 0.9 < found["full"]
        assert found["qlora"] >= found["full"] - 0.01
