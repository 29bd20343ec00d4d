"""The benchmark of loading folders fails where a peak passes what it may be."""

import pytest

from benchmarks import folders


@pytest.mark.parametrize("beyond", [0, folders.CONSTANT, folders.CONSTANT + 0.5])
def test_more_than_the_constant_fails(monkeypatch, capsys, beyond):
    for maker in ("make", "make_exact"):
        monkeypatch.setattr(folders, maker, lambda folder, sizes: None)

    def measured(module, _, technique, *others, env):
        return {"peak": 100.0 + beyond * (technique == "bof4s"), "stored": 60.0, "largest": 40.0}

    monkeypatch.setattr(folders, "printed_json", measured)
    assert folders.main([]) == (beyond > folders.CONSTANT)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(folders.CASES) + len(folders.EXACT) * len(folders.EXACT_DTYPES)
    assert f"beyond {beyond:.1f} (at most 8)" in "".join(lines)
