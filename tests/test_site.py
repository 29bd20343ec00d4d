"""The site: graphs are drawn when it is built, and ``docs/check_pages.py`` finds what pages must not do."""

import re
import shutil
import sys
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parents[1] / "docs"
sys.path.append(str(DOCS))

import check_pages  # noqa: E402
import graphs  # noqa: E402

ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf8")
EDGES = graphs.EDGE.findall(graphs.GRAPH.search(ARCHITECTURE)[1])
BROWSER = next((path for name in check_pages.BROWSERS if (path := shutil.which(name))), None)


def test_a_node_is_above_those_that_it_points_to_and_none_covers_another():
    places, paths = graphs.places_of(EDGES)
    assert [(path[0], path[-1]) for path in paths] == EDGES
    for path in paths:
        heights = [places[node][1] for node in path]
        assert heights == sorted(set(heights))
    boxes = [(x - graphs.width_of(node) / 2, x + graphs.width_of(node) / 2, y) for node, (x, y) in places.items()]
    assert all(0 <= left < right <= graphs.WIDTH for left, right, _ in boxes)
    for (left, right, y), (other_left, other_right, other_y) in combinations(boxes, 2):
        assert y != other_y or right < other_left or other_right < left


def test_a_graph_stands_in_place_of_its_lines():
    shown = graphs.put_graphs_into(ARCHITECTURE)
    assert "```mermaid" not in shown
    (figure,) = re.findall("<figure.*?</figure>", shown)
    svg = ElementTree.fromstring(figure).find("svg")
    assert {text.text for text in svg.iter("text")} == {name for edge in EDGES for name in edge}
    assert "tools imports report" in svg.get("aria-label")
    assert graphs.put_graphs_into("# A page\n") == "# A page\n"


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([("a", "b"), ("b", "a")], "points to itself"),
        ([("a", "x" * 40), ("a", "y" * 40)], "is wider than the drawing"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(edges, message):
    with pytest.raises(ValueError, match=message):
        graphs.draw_graph(edges)


def page(body="", head='<meta name="description" content="A page.">', title="A page"):
    return f"<html><head><title>{title}</title>{head}</head><body>{body}</body></html>"


@pytest.mark.parametrize(
    "loads",
    [
        '<script src="https://example.org/a.js"></script>',
        '<img src="//example.org/a.png">',
        '<img srcset="a.png 1x, https://example.org/a.png 2x">',
        '<link rel="stylesheet" href="https://example.org/a.css">',
    ],
)
def test_a_page_that_loads_from_another_host_is_found(loads, tmp_path):
    (tmp_path / "good.html").write_text(page('<a href="https://example.org">a link</a><img src="a.png">'))
    assert [*check_pages.files_that_load_from_elsewhere(tmp_path)] == []
    (tmp_path / "bad.html").write_text(page(loads))
    (found,) = check_pages.files_that_load_from_elsewhere(tmp_path)
    assert found.startswith("bad.html loads ")
    assert "example.org/a." in found


@pytest.mark.parametrize("rule", ["@import 'https://example.org/a.css';", "a { src: url(//example.org/a.woff) }"])
def test_a_style_sheet_that_loads_from_another_host_is_found(rule, tmp_path):
    (tmp_path / "site.css").write_text("a { background: url(a.png) }" + rule)
    (found,) = check_pages.files_that_load_from_elsewhere(tmp_path)
    assert found.startswith("site.css loads ")


def test_pages_without_a_title_of_their_own_or_a_description_are_found(tmp_path):
    for name in ("one", "other"):
        (tmp_path / f"{name}.html").write_text(page())
    (tmp_path / "third.html").write_text(page(title="Third", head=""))
    one, other, third = check_pages.pages_without_words(tmp_path)
    assert "one.html has the title of another page" in one
    assert "other.html has the title of another page" in other
    assert third == "third.html has 0 descriptions"


@pytest.mark.skipif(not BROWSER or not find_spec("playwright"), reason="Chromium or playwright is not installed")
def test_in_chromium_what_is_cut_is_found(tmp_path):
    long, cut = "x" * 400, "pre { overflow: hidden; width: 300px }"
    (tmp_path / "search.html").write_text(page('<div id="search-results"><ul><li><a>found</a></li></ul></div>'))
    (tmp_path / "good.html").write_text(page("<pre>short</pre>"))
    assert [*check_pages.faults_in_chromium(tmp_path, BROWSER)] == []
    (tmp_path / "cut.html").write_text(page(f"<style>{cut}</style><pre>{long}</pre>"))
    (tmp_path / "outside.html").write_text(page(f"<pre>{long}</pre>"))
    (tmp_path / "loads.html").write_text(page('<script>fetch("https://example.org/a")</script>'))
    (tmp_path / "hidden.html").write_text(page('<img class="only-dark" src="none.png">'))
    found = "\n".join(check_pages.faults_in_chromium(tmp_path, BROWSER))
    for wanted in (
        "cut.html at 360 pixels, light: code is cut by ",
        "cut.html at 1280 pixels, dark: code is cut by ",
        "outside.html at 360 pixels, light: the page is ",
        "hidden.html at 1280 pixels, dark: a picture is not shown",
        "a page asks for https://example.org/a",
    ):
        assert wanted in found
    assert "good.html" not in found
