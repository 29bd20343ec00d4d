"""The formats of an export, and what picks them."""

from pathlib import Path

import pytest

import lowmem
from lowmem.io.formats.export_model import checked_or_inferred_export_format, export_targets_by_format_name


def test_the_name_tells_the_format_or_it_is_given():
    assert checked_or_inferred_export_format(Path("a/b.gguf"), None) == "gguf"
    for name in export_targets_by_format_name():
        assert checked_or_inferred_export_format(Path("out"), name) == name
    with pytest.raises(ValueError, match=r"out.*gguf"):
        checked_or_inferred_export_format(Path("out"), None)
    with pytest.raises(ValueError, match="ggml"):
        checked_or_inferred_export_format(Path("out.gguf"), "ggml")


def test_nothing_is_overwritten(tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.gguf"):
        lowmem.export(tmp_path, out)
    assert out.read_text() == "mine"
