"""Groups of layers are drawn under names that can be read, whatever they are."""

import pytest

from tests.pages import report

pytest.importorskip("altair", reason="the charts need the extra: pip install '.[report]'")
pytest.importorskip("vl_convert", reason="the charts need the extra: pip install '.[report]'")

from lowmem.report.charts import draw
from lowmem.report.dots import group_chart


def drawn(name):
    found = report(name)
    return draw(lambda narrow: group_chart(found.groups, list(found.losses), narrow))


def test_a_name_that_is_too_long_keeps_its_end():
    long = "model." + "x" * 100 + ".up_proj"
    narrow = drawn(long).narrow
    assert "up_proj<" in narrow
    assert "x" * 60 not in narrow


def test_names_that_every_object_has_are_shown():
    assert ">layers.0-29.__proto__<" in drawn("__proto__").wide
