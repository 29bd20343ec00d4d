"""The picture of a training step, in each kind of file that it is written as."""

import re
from xml.etree import ElementTree

import pytest

pytest.importorskip("altair", reason="the picture needs the extra: pip install '.[report]'")
pytest.importorskip("vl_convert", reason="the picture needs the extra: pip install '.[report]'")

from lowmem.report.picture import picture
from lowmem.report.step import PARTS
from lowmem.report.theme import DARK, LIGHT
from tests.report.test_step import FOUND


def test_each_kind_of_file():
    svg = picture("Step", FOUND, ".svg").decode()
    assert {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()} >= {
        "svg",
        "style",
        "path",
    }
    assert "prefers-color-scheme:dark" in svg
    assert all(f"--{name}: {theme[name]};" in svg for theme in (LIGHT, DARK) for name in PARTS.values())
    assert "<script" not in svg
    assert picture("Step", FOUND, ".png").startswith(b"\x89PNG")
    page = picture("A <step>", FOUND, ".html").decode()
    assert "<script" not in page
    assert "A &lt;step&gt;" in page
    assert f"{FOUND['qlora'].total_bytes:,}" in page
    assert re.search(r"<th[^>]*>activations: Kind4</th>", page)
