"""The page holds every figure as text, escapes what others named, and loads nothing."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from tests.pages import HOSTILE, STEPS, report

pytest.importorskip("altair", reason="the page needs the extra: pip install '.[report]'")
pytest.importorskip("vl_convert", reason="the page needs the extra: pip install '.[report]'")

from lowmem.report.charts import PARTS, ChartSvgsAndSpec
from lowmem.report.page import (
    CaptionedTable,
    FigureWithTable,
    _training_step_memory_figure,
    render_report_html,
    step_memory_chart_file_bytes,
)
from lowmem.report.theme import DARK, LIGHT
from lowmem.testing.gate_verdicts import FigureComparison, GateVerdict


class Outline(HTMLParser):
    """What a page is made of: its elements with their attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def html():
    return render_report_html(report())


@pytest.fixture
def undrawn(monkeypatch):
    """Leave an empty picture in the place of each chart, which takes long to draw."""
    empty = '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"></svg>'
    monkeypatch.setattr(
        "lowmem.report.page.draw_wide_and_narrow_svg", lambda chart: ChartSvgsAndSpec(empty, empty, {})
    )


@pytest.mark.thorough
def test_the_same_report_gives_the_same_bytes(html):
    assert render_report_html(report()) == html


def test_it_loads_and_runs_nothing(html):
    outline = Outline(html)
    assert not outline.all("script")
    assert not outline.all("img")
    assert not outline.all("iframe")
    assert all(link["href"].startswith("#") for link in outline.all("a"))
    assert [link["href"] for link in outline.all("link")] == ["data:,"]
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import|src=", html)
    policy = next(meta["content"] for meta in outline.all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_a_screen_reader_finds_its_way(html):
    outline = Outline(html)
    assert outline.all("html")[0]["lang"] == "en"
    assert all(len(outline.all(tag)) == 1 for tag in ("main", "header", "nav", "h1"))
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    targets = {link["href"][1:] for link in outline.all("a")}
    assert targets <= set(ids)
    assert {"memory", "layers", "latency", "error", "gates", "machine", "main"} <= targets
    assert len(ids) == len(set(ids))
    pictures = outline.all("svg")
    assert len(pictures) == 2 * 9  # for a desk and for a phone
    assert all(picture["role"] == "img" and len(picture["aria-label"]) > 40 for picture in pictures)
    assert len(outline.all("figcaption")) == len(outline.all("figure")) >= 9
    assert all(cell["scope"] in ("row", "col") for cell in outline.all("th"))
    assert len(outline.all("caption")) == len(outline.all("table"))
    assert all(region["tabindex"] == "0" for region in outline.all("div") if region.get("role") == "region")


def test_every_figure_stands_in_a_table(html):
    text = Outline(html).text
    figures = ["4,194,304", "20,480", "9.0%", "0.037", "6.000", "245,760", "0.990000", "1,003", "1.200"]
    for figure in (*figures, "8.00 (7.00 to 9.00)", "AMD EPYC"):
        assert figure in text, figure


def test_the_names_of_the_variants_are_explained(html):
    for name, said in report().meanings.items():
        assert f'<th scope="row">{name}</th><td>{said[0]}</td><td>{said[1]}</td>' in html


def test_a_chart_is_an_image_with_its_caption_as_name():
    figure = FigureWithTable(
        ChartSvgsAndSpec('<svg a="1"></svg>', '<svg a="2"></svg>', {}), 'says "<b>"', CaptionedTable("", [], [])
    )
    assert figure.svg("wide") == '<svg role="img" aria-label="says &#34;&lt;b&gt;&#34;" a="1"></svg>'
    assert 'a="2"' in figure.svg("narrow")


def test_what_moved_and_the_verdicts_are_said(html):
    text = re.sub(r"\s+", " ", Outline(html).text)
    assert "Latency gate failed" in text
    assert "Memory gate passed" in text
    assert "2 figures compared, 1 moved." in text
    assert "small is 20% slower" in text
    assert "+0.0002" in text  # by which the head is above the base


def test_tiles_say_what_is_smallest_fastest_and_loses_most(html):
    for term, value, says in (
        ("Smallest", "1.00 MiB", "small: 4.0 times smaller than dense"),
        ("Fastest", "8.0x dense", "small at batch 1, float32"),
        ("Error of the output", "0.0080% to 3.7%", "lora loses least, small most"),
        ("Gates", "failed", "failed: latency"),
    ):
        assert f"<dt>{term}</dt><dd>{value}</dd><dd>{says}</dd>" in html


def test_text_of_any_origin_is_escaped():
    html = render_report_html(report(HOSTILE))
    assert "<script" not in html
    assert not Outline(html).all("script")
    assert HOSTILE in Outline(html).text


def test_what_is_missing_is_said(undrawn):
    footprints = [replace(one, step=None) for one in report().footprints]
    given = {"timings": [], "timed": "No benchmark of inference.", "verdicts": [], "groups": []}
    html = render_report_html(report(footprints=footprints, **given))
    text = Outline(html).text
    assert "Of a training step" not in text
    assert "No gate's verdict was given" in text
    assert "No benchmark of inference." in text
    assert 'id="layers"' not in html


def test_an_output_that_is_not_finite_or_equal_is_a_figure_without_a_chart(undrawn):
    html = render_report_html(report(losses={"small": math.nan, "lora": math.inf}))
    assert ">nan<" in html
    assert ">inf<" in html
    assert len(Outline(html).all("svg")) == 2 * 8
    assert len(Outline(render_report_html(report(losses={"small": 0.0, "lora": 0.0}))).all("svg")) == 2 * 8


def test_an_undecided_gate_is_shown_as_such(undrawn):
    row = FigureComparison(
        "load, waiting", "", 1.0, 1.0, 1.0, 0.9, 1.1, "undecided", "other work disturbed 9 of 9 fresh rounds"
    )
    memory = report().verdicts[1]
    html = render_report_html(report(verdicts=[memory, GateVerdict.from_rows("latency", "main", "HEAD", {}, [row])]))
    text = re.sub(r"\s+", " ", Outline(html).text)
    assert "Latency gate undecided" in text
    assert "<dt>Gates</dt><dd>undecided</dd><dd>undecided: latency</dd>" in html
    assert "other work disturbed 9 of 9 fresh rounds" in text


def test_figures_of_gates_are_in_full_or_have_four_digits(undrawn):
    rows = [FigureComparison("w", "x", base, head) for base, head in ((1048576, 0.00123456), (2.0, None))]
    html = render_report_html(report(verdicts=[GateVerdict.from_rows("latency", "main", "HEAD", {}, rows)]))
    cells = re.findall(r'class="number">([^<]*)</td>', html[html.index("All figures of the latency gate") :])
    assert [cells[at : at + 2] for at in (0, 5)] == [["1,048,576", "0.001235"], ["2", ""]]
    assert "0 figures compared, none moved." in render_report_html(
        report(verdicts=[replace(report().verdicts[0], rows=())])
    )


def test_the_table_of_a_step_has_each_kind_of_layers(undrawn):
    table = _training_step_memory_figure(STEPS).table
    activations = [f"activations: Kind{n}" for n in range(5)]
    assert table.columns == ["Model", *PARTS, *activations, "scratch", "peak", "in"]
    for row, one in zip(table.rows, STEPS.values(), strict=True):
        numbers = [int(cell.replace(",", "")) for cell in row[1:-1]]
        assert sum(numbers[:-1]) == numbers[-1] == one.total_bytes
        assert row[-1] == one.moment


def test_the_picture_of_a_step_is_written_as_each_kind_of_file():
    svg = step_memory_chart_file_bytes("Step", STEPS, ".svg").decode()
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
    assert tags >= {"svg", "style", "path"}
    assert "prefers-color-scheme:dark" in svg
    assert all(f"--{name}: {theme[name]};" in svg for theme in (LIGHT, DARK) for name in PARTS.values())
    assert "<script" not in svg
    assert step_memory_chart_file_bytes("Step", STEPS, ".png").startswith(b"\x89PNG")
    page = step_memory_chart_file_bytes("A <step>", STEPS, ".html").decode()
    assert "<script" not in page
    assert "A &lt;step&gt;" in page
    assert f"{STEPS['qlora'].total_bytes:,}" in page
    assert re.search(r"<th[^>]*>activations: Kind4</th>", page)
