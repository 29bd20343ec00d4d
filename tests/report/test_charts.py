"""Each chart shows every figure that it is given, in the theme's colours, for a desk and for a phone."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from tests.pages import STEPS, report
from tests.report.specs import DESK, PHONE, assert_readable

pytest.importorskip("altair", reason="the charts need the extra: pip install '.[report]'")
pytest.importorskip("vl_convert", reason="the charts need the extra: pip install '.[report]'")

from lowmem.report import charts, dot_plots
from lowmem.report.charts import draw_wide_and_narrow_svg, percent_text, readable_bytes
from lowmem.report.footprint import KINDS
from lowmem.report.theme import LIGHT
from lowmem.training.step_memory import TrainingMemory
from lowmem.variants import VARIANTS


@pytest.fixture(scope="module", autouse=True)
def _a_font_of_every_machine():
    """Measure text in the font that vl-convert brings, whatever is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "FONT", "Liberation Sans")
        yield


def every_chart(found):
    peers = [t for t in found.timings if t.panel.startswith("peers")]
    own = [t for t in found.timings if t not in peers]
    return {
        "memory": lambda narrow: charts.stored_and_peak_bytes_chart(found.footprints, narrow),
        "speed": lambda narrow: charts.relative_speed_chart(own, narrow),
        "peers": lambda narrow: charts.relative_speed_chart(peers, narrow),
        "loss": lambda narrow: dot_plots.variant_output_error_chart(found.losses, narrow),
        "distortion": lambda narrow: dot_plots.format_error_by_bits_chart(found.distortions, narrow),
        "groups": lambda narrow: dot_plots.layer_group_bytes_and_error_chart(
            found.groups, list(found.losses), narrow
        ),
        "ratios": lambda narrow: dot_plots.gate_ratio_chart(found.verdicts[0].rows, narrow),
        "quality": lambda narrow: dot_plots.output_error_by_bits_chart(found.qualities, narrow),
        "step": lambda narrow: charts.training_step_memory_chart(
            {f.name: f.step for f in found.footprints if f.step}, narrow
        ),
    }


def rows_in(spec):
    """Yield all rows of data of a specification."""
    if isinstance(spec, dict):
        yield from spec["values"] if isinstance(spec.get("values"), list) else []
    for value in spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else ():
        yield from rows_in(value)


def spec_of(chart, narrow=False):
    return every_chart(report())[chart](narrow).to_dict()


@pytest.mark.parametrize("name", list(every_chart(report())))
def test_a_chart_is_one_well_formed_picture_of_both_widths(name):
    drawing = draw_wide_and_narrow_svg(every_chart(report())[name])
    for svg in (drawing.wide, drawing.narrow):
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= set(LIGHT)
        assert "#" not in re.sub(r"url\(#|&#", "", " ".join(re.findall(r'(?:fill|stroke)="([^"]*)"', svg)))
    for narrow, svg, column in ((True, drawing.narrow, PHONE), (False, drawing.wide, DESK)):
        assert int(ElementTree.fromstring(svg).get("width")) <= column
        assert_readable(every_chart(report(max(VARIANTS, key=len)))[name](narrow), narrow)
    json.dumps(drawing.spec)


def test_memory_has_every_byte_of_every_variant():
    found = report().footprints
    rows = [row for row in rows_in(spec_of("memory")) if isinstance(row, dict)]
    for footprint in found:
        stacked = sum(row["size"] for row in rows if row.get("name") == footprint.name and row.get("kind") in KINDS)
        assert stacked * 2**20 == pytest.approx(footprint.stored_bytes)
        texts = {row["text"] for row in rows if row.get("name") == footprint.name and "text" in row}
        step = "no step" if footprint.step is None else readable_bytes(footprint.step.step_bytes)
        assert texts == {*map(readable_bytes, (footprint.stored_bytes, footprint.forward_bytes)), step}
    for narrow in (False, True):
        for panel in spec_of("memory", narrow)["vconcat" if narrow else "hconcat"]:
            domain = panel["layer"][0]["encoding"]["x"]["scale"]["domain"]
            largest = max(row["size"] for row in panel["layer"][1]["data"]["values"])
            assert domain == [0, pytest.approx(largest * panel["width"] / (panel["width"] - 62))]  # room for a label
    assert charts._x_scale_with_label_margin([{"size": 0.0}], 124).domain == [0, 2.0]


def test_no_peak_has_the_colour_of_a_kind_of_stored_bytes():
    stored, *peaks = spec_of("memory")["hconcat"]
    legend = set(stored["layer"][0]["encoding"]["color"]["scale"]["range"])
    marks = [panel["layer"][0]["mark"] for panel in peaks]
    assert len(marks) == 2
    assert not any({mark["color"], mark["stroke"]} & legend for mark in marks)


def test_letters_of_the_front_picture_have_nine_pixels_at_a_width_of_400():
    dense, small = report(max(VARIANTS, key=len)).footprints[:2]
    footprints = [replace(dense, name=name) for name in VARIANTS] + [small]
    root = ElementTree.fromstring(
        draw_wide_and_narrow_svg(lambda narrow: charts.front_page_memory_chart(footprints)).wide
    )
    sizes = [
        float(text.get("font-size").removesuffix("px")) for text in root.iter("{http://www.w3.org/2000/svg}text")
    ]
    assert min(sizes) * 400 / int(root.get("width")) >= 9


@pytest.mark.parametrize("narrow", [False, True])
def test_the_segments_of_a_step_sum_to_its_peak_and_empty_ones_are_left_out(narrow):
    spec = charts.training_step_memory_chart(STEPS, narrow).to_dict()
    rows = spec["layer"][0]["data"]["values"]
    for name, one in STEPS.items():
        assert sum(row["size"] for row in rows if row["name"] == name) * 2**20 == pytest.approx(
            one.total_bytes, abs=1e-6
        )
    parts = [row["part"] for row in rows if row["name"] == "qlora"]
    kinds = [f"activations: {kind}" for kind in ("Kind0", "Kind1", "Kind2", "other layers")]
    assert parts == ["weights", "adapters", "inputs", "optimizer", *kinds, "scratch"]
    assert [row["order"] for row in rows if row["name"] == "qlora"] == sorted(r["order"] for r in rows[-9:])
    scale = spec["layer"][0]["encoding"]["color"]["scale"]
    assert scale["domain"] == [*charts.PARTS, *kinds, "scratch"]
    assert len(set(scale["range"])) == len(scale["domain"])
    spec = charts.training_step_memory_chart(
        {"one": TrainingMemory("sgd", "forward", 5, 0, 0, 0, 0, {}, 0)}, False
    ).to_dict()
    assert [row["part"] for row in spec["layer"][0]["data"]["values"]] == ["weights"]


def test_speed_has_a_panel_for_each_dtype_with_the_dense_line_and_logarithmic_axes():
    spec = spec_of("speed")
    assert [panel["title"] for panel in spec["hconcat"]] == ["float32", "bfloat16"]
    for panel in spec["hconcat"]:
        dense, *_ = panel["layer"]
        assert dense["mark"]["type"] == "rule"
        assert [row["speed"] for row in rows_in(dense)] == [1.0]
        scales = [layer["encoding"][axis]["scale"]["type"] for layer in panel["layer"][-2:] for axis in "xy"]
        assert set(scales) == {"log"}
        x, y = (panel["layer"][-1]["encoding"][axis] for axis in "xy")
        assert x["axis"]["values"] == [1, 8, 64]  # the batches
        assert y["axis"]["values"] == [1, 2, 4, 8]
        assert x["scale"]["domain"][0] < 1 < 64 < x["scale"]["domain"][1]
        assert y["scale"]["domain"][0] < 0.9 < 9 < y["scale"]["domain"][1]
    first, second = spec["hconcat"]
    assert [layer["mark"]["type"] for layer in first["layer"]] == ["rule", "text", "rule", "line", "point"]
    assert [layer["mark"]["type"] for layer in second["layer"]] == ["rule", "text", "line", "point"]  # no intervals
    for chart, reference in (("peers", "lowmem's nf4"), ("speed", "dense")):
        rule, text = spec_of(chart)["hconcat"][0]["layer"][:2]
        assert rule["data"] == text["data"]
        assert text["data"]["values"] == [{"batch": 1, "speed": 1.0, "text": reference}]
    slow = [replace(timing, speed=0.9, low=0.7, high=0.95) for timing in report().timings[:3]]
    for given in (slow, [replace(timing, low=None, high=None) for timing in slow]):
        chart = charts.relative_speed_chart(given, False)
        assert_readable(chart, False)
        y = chart.to_dict()["hconcat"][0]["layer"][-1]["encoding"]["y"]
        assert y["axis"]["values"] == [1]
        assert y["scale"]["domain"][0] < (0.7 if given is slow else 0.9)
        assert y["scale"]["domain"][1] > 1.1


@pytest.mark.parametrize(
    ("base", "low", "high", "found"),
    [
        (2, 0.25, 4, [0.25, 0.5, 1, 2, 4]),
        (2, 0.26, 3.99, [0.5, 1, 2]),
        (2, 2**12, 2**13, [4096, 8192]),
        (10, 1e-3, 10, [1e-3, 0.01, 0.1, 1, 10]),
        (10, 0.011, 0.099, []),
    ],
)
def test_ticks_are_powers_within_an_axis(base, low, high, found):
    assert charts.powers_between(base, low, high) == pytest.approx(found)


BYTES = {
    0: "0 bytes",
    1023: "1,023 bytes",
    1024: "1.00 KiB",
    9_888_000: "9.43 MiB",
    2**30: "1.00 GiB",
    -2048: "-2.00 KiB",
}
SHARES = {
    0: "0.0%",
    0.0367: "3.7%",
    8.1e-5: "0.0081%",
    1.24e-7: "0.000012%",
    1e-9: "0.000000%",
    1: "100%",
}


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        *((readable_bytes, value, text) for value, text in BYTES.items()),
        *((percent_text, value, text) for value, text in SHARES.items()),
    ],
)
def test_bytes_and_shares_are_readable(form, value, text):
    assert form(value) == text
