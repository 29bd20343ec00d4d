"""Dots are within their axes, on a desk and on a phone, under names that can be read, whatever they are."""

import math
from dataclasses import replace

import pytest

from tests.pages import report
from tests.report.specs import assert_readable

pytest.importorskip("altair", reason="the charts need the extra: pip install '.[report]'")
pytest.importorskip("vl_convert", reason="the charts need the extra: pip install '.[report]'")

from lowmem.report.charts import draw_wide_and_narrow_svg
from lowmem.report.dot_plots import (
    MOST_GROUPS,
    _truncate_name_start,
    format_error_by_bits_chart,
    gate_ratio_chart,
    layer_group_bytes_and_error_chart,
    output_error_by_bits_chart,
    variant_output_error_chart,
)
from lowmem.testing.gate_verdicts import FigureComparison

LONG = "model." + "x" * 100 + ".up_proj"


def drawn(name):
    found = report(name)
    return draw_wide_and_narrow_svg(
        lambda narrow: layer_group_bytes_and_error_chart(found.groups, list(found.losses), narrow)
    )


def test_a_name_is_cut_to_its_limit_and_keeps_its_end():
    assert _truncate_name_start("a" * 19 + "b", 20) == "a" * 19 + "b"
    assert _truncate_name_start("b" + "a" * 20, 20) == "…" + "a" * 19
    narrow = drawn(LONG).narrow
    assert "up_proj<" in narrow
    assert "x" * 60 not in narrow


def test_of_many_groups_the_largest_are_drawn():
    some = report().groups[0]
    groups = [replace(some, name=f"g{n}", dense_bytes=1000 + n) for n in range(MOST_GROUPS + 2)]
    axis = layer_group_bytes_and_error_chart(groups, ["small", "lora"], False).to_dict()["hconcat"][0]["encoding"][
        "y"
    ]
    assert axis["sort"] == [f"~g{n}" for n in reversed(range(2, MOST_GROUPS + 2))]


@pytest.mark.parametrize("narrow", [False, True])
def test_errors_against_bits_are_within_their_axes_and_above_the_bound(narrow):
    found = report()
    for points in (found.distortions, found.distortions[:1]):
        chart = format_error_by_bits_chart(points, narrow)
        assert_readable(chart, narrow)
        panels = chart.to_dict()["vconcat" if narrow else "hconcat"]
        assert [panel["title"] for panel in panels] == list(dict.fromkeys(f"{p.scales} scales" for p in points))
        last = max(point.bits_per_weight for point in points)
        for panel in panels:
            area, line, label, *marks = panel["layer"]
            bound = area["data"]["values"]
            assert line["data"]["values"] == bound
            assert bound[0]["bits"] == 4
            assert bound[-1]["bits"] == pytest.approx(last)
            assert len({row["bits"] for row in bound}) == 41
            assert all(row["error"] == 2 ** -row["bits"] > row["lowest"] for row in bound)
            (text,) = label["data"]["values"]
            assert (text["bits"], text["error"]) == (4, bound[0]["lowest"])  # in the corner below the line
            expected = [(p.bits_per_weight, p.error) for p in points if f"{p.scales} scales" == panel["title"]]
            for mark in marks:
                rows = mark["data"]["values"]
                assert [(row["bits"], row["error"]) for row in rows] == expected
                low, high = mark["encoding"]["y"]["scale"]["domain"]
                assert low < min(row["error"] for row in rows)
                assert max(p.error for p in points) < high < 2 * max(p.error for p in points)
        assert last < mark["encoding"]["x"]["scale"]["domain"][1] < last + 0.5

    few = replace(found.qualities[0], bits=3.2, error=0.4)
    lost = [replace(few, error=error, series="8 bits") for error in (0.0, math.inf, math.nan)]
    for qualities in (found.qualities, [few, *lost]):
        chart = output_error_by_bits_chart(qualities, narrow)
        assert_readable(chart, narrow)
        (line, points), wanted = chart.to_dict()["layer"], [one for one in qualities if one not in lost]
        x, y = (points["encoding"][axis]["scale"]["domain"] for axis in "xy")
        assert x[0] == min(4.0, *(one.bits for one in wanted))
        assert max(one.bits for one in wanted) < x[1] < max(one.bits for one in wanted) + 0.5
        least, most = (end(one.error for one in wanted) for end in (min, max))
        assert least / 1.5 < y[0] < least <= most < y[1] < 1.5 * most
        assert points["encoding"]["color"]["scale"]["domain"] == list(dict.fromkeys(one.series for one in wanted))
        assert line["encoding"]["color"] == points["encoding"]["color"]
        assert len(chart.to_dict()["data"]["values"]) == len(wanted)


def test_errors_from_a_billionth_to_ten_have_a_tick_at_each_power_of_ten():
    chart = variant_output_error_chart(
        {"least": 1e-9, "most": 10.0, "none": 0.0, "nan": math.nan, "all": math.inf}, False
    )
    assert_readable(chart, False)
    encoding = chart.to_dict()["layer"][0]["encoding"]
    assert encoding["x"]["axis"]["values"] == pytest.approx([10.0**power for power in range(-9, 2)])
    assert encoding["y"]["sort"] == ["least", "most", "none", "nan", "all"]  # rows without a dot
    for error in (0.016, 0.0149, 0.1, 0.0067, 3e-5):
        for narrow in (False, True):
            chart = variant_output_error_chart({"one": error}, narrow)
            assert_readable(chart, narrow)
            low, high = chart.to_dict()["layer"][0]["encoding"]["x"]["scale"]["domain"]
            assert low < error
            assert high > 5 * error  # right of the dot stands its text


@pytest.mark.parametrize("narrow", [False, True])
def test_groups_and_ratios_are_within_their_axes(narrow):
    found = report()
    stack = "vconcat" if narrow else "hconcat"
    groups = [replace(found.groups[0], name=LONG), replace(found.groups[1], bytes={"small": 0, "lora": 3840})]
    chart = layer_group_bytes_and_error_chart(groups, ["small"], narrow)
    assert_readable(chart, narrow)
    costs, loses = chart.to_dict()[stack]
    assert [row["variant"] for row in costs["data"]["values"]] == ["dense", "small", "dense"]
    assert [row["value"] for row in costs["data"]["values"]] == [240.0, 40000 / 1024, 3.75]
    assert costs["encoding"]["x"]["axis"]["values"] == [1, 10, 100, 1000]
    assert loses["data"]["values"] == [{"name": f"~{LONG}", "variant": "small", "value": 0.09}]
    assert loses["encoding"]["x"]["axis"]["values"] == [0.01, 0.1, 1.0]
    for dense, small, ticks in ((8, 2, [1, 10]), (80, 9, [1, 10, 100])):  # with room on both sides
        close = [replace(groups[0], dense_bytes=1024 * dense, bytes={"small": 1024 * small})]
        costs, _ = layer_group_bytes_and_error_chart(close, ["small"], narrow).to_dict()[stack]
        assert costs["encoding"]["x"]["axis"]["values"] == ticks
    nothing_lost = [replace(group, errors={"small": None, "lora": 0.0}) for group in groups]
    assert [
        panel["title"] for panel in layer_group_bytes_and_error_chart(nothing_lost, ["lora"], narrow).to_dict()[stack]
    ] == ["Costs"]

    verdicts = {"slower": 1.2, "faster": 0.9, "same": 1.001, "grew": 1.3, "shrank": 0.99, "missing": 2.0}
    rows = [FigureComparison(f"{LONG} {v}", "ratio", 1.0, r, r, r - 0.1, r + 0.1, v) for v, r in verdicts.items()]
    exact = [
        FigureComparison(LONG, "bytes", 10, 10, 1.0, None, None, "same"),
        FigureComparison("new", "bytes", None, 9, None, None, None, "new"),
    ]
    for given in ([*rows, *exact], exact):
        chart = gate_ratio_chart(given, narrow)
        assert_readable(chart, narrow)
        one, intervals, dots = chart.to_dict()["layer"]
        assert one["data"]["values"] == [{"ratio": 1.0}]
        low, high = dots["encoding"]["x"]["scale"]["domain"]
        assert low < 0.95 < 1.05 < high
        shown = [row["ratio"] for row in dots["data"]["values"]]
        assert shown == [row.ratio for row in given if row.ratio is not None]
        assert (intervals["encoding"]["x"]["field"], intervals["encoding"]["x2"]["field"]) == ("low", "high")
        colours = dict(zip(*(dots["encoding"]["color"]["scale"][key] for key in ("domain", "range")), strict=True))
        good, bad = ("shrank", "faster"), ("slower", "grew", "missing")
        for verdict, colour in colours.items():
            kind = "good" if verdict in good else "bad" if verdict in bad else "grey"
            assert colour == f"var(--{kind})", verdict
        assert len(set(dots["encoding"]["shape"]["scale"]["range"])) == len(colours)


@pytest.mark.parametrize("name", ["constructor", "toString", "__proto__"])
def test_layers_and_workloads_may_have_the_names_of_what_every_object_has(name):
    found = report()
    groups = [replace(group, name=name) for group in found.groups[:1]]
    assert (
        f">{name}<"
        in draw_wide_and_narrow_svg(lambda narrow: layer_group_bytes_and_error_chart(groups, ["small"], narrow)).wide
    )
    rows = [FigureComparison(name, "ratio", 1.0, 1.1, 1.1, 1.0, 1.2, "slower")]
    assert f">{name}<" in draw_wide_and_narrow_svg(lambda narrow: gate_ratio_chart(rows, narrow)).wide
    if name == "__proto__":  # of a variant, too, and the end of a path
        assert f">layers.0-29.{name}<" in drawn(name).wide
