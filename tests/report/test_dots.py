"""Groups of layers are drawn under names that can be read, whatever they are."""

from dataclasses import replace

import pytest

from tests.pages import report
from tests.selection import rows_in_one_case

pytest.importorskip("altair", reason="the charts need the extra: pip install '.[report]'")
pytest.importorskip("vl_convert", reason="the charts need the extra: pip install '.[report]'")

from lowmem.report.charts import draw
from lowmem.report.dots import MOST_GROUPS, _short, distortion_chart, group_chart, loss_chart, ratio_chart
from lowmem.testing.verdicts import Row


def drawn(name):
    found = report(name)
    return draw(lambda narrow: group_chart(found.groups, list(found.losses), narrow))


def test_a_name_that_is_too_long_keeps_its_end():
    long = "model." + "x" * 100 + ".up_proj"
    narrow = drawn(long).narrow
    assert "up_proj<" in narrow
    assert "x" * 60 not in narrow


def test_a_name_is_cut_to_its_limit():
    assert _short("a" * 19 + "b", 20) == "a" * 19 + "b"
    assert _short("b" + "a" * 20, 20) == "…" + "a" * 19


def test_of_many_groups_the_largest_are_drawn():
    some = report().groups[0]
    groups = [replace(some, name=f"g{n}", dense_bytes=1000 + n) for n in range(MOST_GROUPS + 2)]
    axis = group_chart(groups, ["small", "lora"], False).to_dict()["hconcat"][0]["encoding"]["y"]
    assert axis["sort"] == [f"~g{n}" for n in reversed(range(2, MOST_GROUPS + 2))]


def test_panels_that_a_phone_stacks_are_lower_than_those_side_by_side():
    phone, desk = (distortion_chart(report().distortions, narrow).to_dict() for narrow in (True, False))
    assert max(panel["height"] for panel in phone["vconcat"]) < min(panel["height"] for panel in desk["hconcat"])


def test_errors_from_a_billionth_to_ten_have_a_tick_at_each_power_of_ten():
    x = loss_chart({"least": 1e-9, "most": 10.0}, False).to_dict()["layer"][0]["encoding"]["x"]
    assert x["axis"]["values"] == pytest.approx([10.0**power for power in range(-9, 2)])


def test_names_that_every_object_has_are_shown():
    assert ">layers.0-29.__proto__<" in drawn("__proto__").wide


@rows_in_one_case("name", ["constructor", "toString", "__proto__"])
def test_layers_and_workloads_may_have_the_names_of_what_every_object_has(name):
    found = report()
    groups = [replace(group, name=name) for group in found.groups[:1]]
    assert f">{name}<" in draw(lambda narrow: group_chart(groups, ["small"], narrow)).wide
    rows = [Row(name, "ratio", 1.0, 1.1, 1.1, 1.0, 1.2, "slower")]
    assert f">{name}<" in draw(lambda narrow: ratio_chart(rows, narrow)).wide
