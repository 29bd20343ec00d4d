"""The pictures of the pages show what the code measures and draws now."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lowmem import backend
from lowmem.testing.memory import THREADS
from tests.compiled import on_threads

pytest.importorskip("altair", reason="the pictures need the extra: pip install '.[report]'")
pytest.importorskip("vl_convert", reason="the pictures need the extra: pip install '.[report]'")

from benchmarks import pictures

ROOT = Path(__file__).parents[2]


@pytest.fixture
def specification(monkeypatch):
    """Return what gives the specification of a picture without drawing it: fonts differ between machines."""
    drawn = []
    monkeypatch.setattr(pictures.charts, "_chart_svg", lambda chart: drawn.append(chart) or "<svg></svg>")
    return lambda name: pictures.data_of(pictures.PICTURES[name]().spec)


def stored(name, theme):
    root = ElementTree.parse(pictures.IMAGES / f"{name}-{theme}.svg").getroot()
    return json.loads(root.find("{http://www.w3.org/2000/svg}metadata").text)


def leaves(value, path=""):
    """Yield the path of each number and text in JSON, the text without its numbers, and these."""
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(one, f"{path}/{key}")
    else:
        number = r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
        numbers = [float(found.replace(",", "")) for found in re.findall(number, str(value))]
        yield path, re.sub(number, "", str(value)), numbers


def assert_same(got, wanted, rel=0.02):
    """To the last digit but for figures, which other versions of torch change by some temporaries."""
    for (path, text, numbers), (wanted_path, wanted_text, wanted_numbers) in zip(
        leaves(got), leaves(wanted), strict=True
    ):
        assert (path, text) == (wanted_path, wanted_text)
        assert numbers == pytest.approx(wanted_numbers, rel=rel), path


@pytest.mark.gates
@pytest.mark.parametrize("name", list(pictures.PICTURES))
def test_a_picture_is_current(name, specification):
    if name != "speed" and backend().startswith("reference"):
        pytest.skip("the peaks are those of the compiled kernel, and this machine compiled none")
    with on_threads(THREADS):  # each has scratch of its own
        now = specification(name)
    for theme in pictures.THEMES:
        # The stored run is the same everywhere; only its logarithms are computed.
        assert_same(
            json.loads(json.dumps(now, sort_keys=True)), stored(name, theme), rel=1e-12 if name == "speed" else 0.02
        )


@pytest.mark.parametrize("theme", list(pictures.THEMES))
@pytest.mark.parametrize("name", list(pictures.PICTURES))
def test_a_picture_stands_alone_in_its_colours(name, theme):
    text = (pictures.IMAGES / f"{name}-{theme}.svg").read_text()
    text = re.sub("<metadata>.*?</metadata>", "", text)  # where the specification names them
    assert "var(" not in text
    assert pictures.THEMES[theme]["ink"] in text
    other = next(colours for mode, colours in pictures.THEMES.items() if mode != theme)
    assert other["ink"] not in text
