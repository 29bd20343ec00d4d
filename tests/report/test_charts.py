"""Each chart shows every figure that it is given, in the theme's colours, for a desk and for a phone."""

import json
import re
from functools import cache
from xml.etree import ElementTree

import pytest

from tests.pages import HOSTILE, report
from tests.selection import rows_in_one_case

pytest.importorskip("altair", reason="the charts need the extra: pip install '.[report]'")
pytest.importorskip("vl_convert", reason="the charts need the extra: pip install '.[report]'")

from lowmem.report import charts, dots
from lowmem.report.charts import draw, percent, readable_bytes
from lowmem.report.footprint import KINDS
from lowmem.report.theme import LIGHT

PHONE = 360 - 2 * 16  # pixels of the page's column on a phone


def every_chart(found):
    peers = [t for t in found.timings if t.panel.startswith("peers")]
    own = [t for t in found.timings if t not in peers]
    return {
        "memory": lambda narrow: charts.memory_chart(found.footprints, narrow),
        "speed": lambda narrow: charts.speed_chart(own, narrow),
        "peers": lambda narrow: charts.speed_chart(peers, narrow),
        "loss": lambda narrow: dots.loss_chart(found.losses, narrow),
        "distortion": lambda narrow: dots.distortion_chart(found.distortions, narrow),
        "groups": lambda narrow: dots.group_chart(found.groups, list(found.losses), narrow),
        "ratios": lambda narrow: dots.ratio_chart(found.verdicts[0].rows, narrow),
    }


def values(spec):
    """Return all rows of data of a specification."""
    return [row for rows in spec["datasets"].values() for row in rows] if "datasets" in spec else list(inline(spec))


def inline(spec):
    if isinstance(spec, dict):
        yield from spec.get("values", []) if isinstance(spec.get("values"), list) else []
        for value in spec.values():
            yield from inline(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from inline(value)


@cache
def drawn(chart, name="small"):
    return draw(every_chart(report(name))[chart])


@rows_in_one_case("name", list(every_chart(report())))
def test_a_chart_is_one_well_formed_picture_of_both_widths(name):
    drawing = drawn(name)
    for svg in (drawing.wide, drawing.narrow):
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= set(LIGHT)
        assert "#" not in re.sub(r"url\(#|&#", "", " ".join(re.findall(r'(?:fill|stroke)="([^"]*)"', svg)))
    assert int(ElementTree.fromstring(drawing.narrow).get("width")) <= PHONE + 12  # which the page then scales
    assert int(ElementTree.fromstring(drawing.wide).get("width")) <= 960
    json.dumps(drawing.spec)


@rows_in_one_case("name", list(every_chart(report())))
def test_names_of_any_origin_are_text(name):
    drawing = drawn(name, HOSTILE)
    for svg in (drawing.wide, drawing.narrow):
        assert "<script" not in svg
        ElementTree.fromstring(svg)


def test_memory_has_every_byte_of_every_variant():
    found = report().footprints
    rows = values(drawn("memory").spec)
    for footprint in found:
        stacked = sum(row["size"] for row in rows if row.get("name") == footprint.name and row.get("kind") in KINDS)
        assert stacked * 2**20 == pytest.approx(footprint.stored_bytes)
        texts = {row["text"] for row in rows if row.get("name") == footprint.name and "text" in row}
        assert texts == {
            readable_bytes(size) for size in (footprint.stored_bytes, footprint.forward_bytes, footprint.step_bytes)
        }


def test_speed_has_a_panel_for_each_dtype_with_the_dense_line_and_logarithmic_axes():
    spec = drawn("speed").spec
    assert [panel["title"] for panel in spec["hconcat"]] == ["float32", "bfloat16"]
    for panel in spec["hconcat"]:
        dense, *_ = panel["layer"]
        assert dense["mark"]["type"] == "rule"
        assert [row["speed"] for row in inline(dense)] or 1.0 in [row.get("speed") for row in values(spec)]
        scales = [layer["encoding"][axis]["scale"]["type"] for layer in panel["layer"][-2:] for axis in "xy"]
        assert set(scales) == {"log"}
    assert "lowmem's nf4" in drawn("peers").wide


@rows_in_one_case(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1,023 bytes"), (1024, "1.00 KiB"), (9_888_000, "9.43 MiB"), (2**31, "2.00 GiB")],
)
def test_bytes_are_readable(count, text):
    assert readable_bytes(count) == text


@rows_in_one_case(("value", "text"), [(0, "0.0%"), (0.0367, "3.7%"), (0.17, "17%"), (8.1e-5, "0.0081%"), (1, "100%")])
def test_shares_have_two_digits(value, text):
    assert percent(value) == text
