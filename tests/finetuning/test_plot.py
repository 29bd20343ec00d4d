"""A run's picture, where matplotlib is; one clear error where it is not."""

import sys

import pytest

from lowmem.finetuning.plot import check_plot, plot_losses

LOSSES = [3 / (1 + step) for step in range(60)]


@pytest.mark.thorough
def test_the_same_run_gives_the_same_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[plot]'")
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    for suffix, start in starts.items():
        one, other, bare = (tmp_path / f"{name}{suffix}" for name in ("one", "other", "bare"))
        for path in (one, other):
            plot_losses(path, LOSSES, [(30, 2.5), (45, float("inf")), (60, 2.0)], {"dense": 3.0, "stored": 3.5})
        plot_losses(bare, LOSSES[:1])
        assert one.read_bytes().startswith(start)
        assert one.read_bytes() == other.read_bytes() or suffix == ".svg"  # its names are random
        assert one.read_bytes() != bare.read_bytes()


def test_what_cannot_be_drawn_is_refused_before(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"plot='a.jpeg' must end in .png, .svg, .pdf"):
        check_plot(tmp_path.joinpath("a.jpeg").relative_to(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plot needs matplotlib: pip install 'lowmem\[plot\]'"):
        check_plot(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
