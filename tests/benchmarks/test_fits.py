"""The README's table of what fits, and its picture, are those of the stored figures, which are those predicted."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import lowmem
from lowmem.report import theme

pytest.importorskip("transformers")

from benchmarks import fits, sizes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf8")
IMAGES = ROOT / "docs" / "images"


def test_the_readme_has_the_table():
    (written,) = re.findall(r"<!-- python -m benchmarks.fits -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert written.splitlines() == fits.table()
    assert all(line.count("|") == fits.table()[0].count("|") for line in fits.table())


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_picture_is_current(mode):
    colours = {"light": theme.LIGHT, "dark": theme.DARK}[mode]
    drawn = theme.svg_with_theme_colors(fits.draw(), colours)
    assert (IMAGES / f"sizes-{mode}.svg").read_text(encoding="utf8") == drawn
    assert f"docs/images/sizes-{mode}.svg" in README


def test_the_picture_has_a_bar_for_each_size_and_way_and_texts_lie_in_it():
    svg = ElementTree.fromstring(fits.draw())
    name = "{http://www.w3.org/2000/svg}"
    assert len(svg.findall(f"{name}rect")) == 1 + len(fits.DRAWN) * len(fits.WAYS)  # and the background
    for text in svg.findall(f"{name}text"):
        x, width = float(text.get("x")), 6.6 * len(text.text)
        left = {"end": x - width, "middle": x - width / 2, None: x}[text.get("text-anchor")]
        assert -2 <= left <= left + width <= fits.WIDTH + 2, text.text


def test_the_alternative_text_says_what_the_picture_shows():
    (said,) = re.findall(r'<img src="docs/images/sizes-light.svg" alt="([^"]+)"', README)
    assert "only 4 bits fit 8 billion into 8 or 16 GiB" in said
    gib = {way: size / 2**30 for way, (size, _) in fits.training_bytes("8b").items()}
    assert max(gib["fast"], gib["lean"]) < 8 < 16 < min(gib["LoRA on bfloat16"], gib["all weights"])


def test_measured_figures_take_the_place_of_predictions_and_have_columns(monkeypatch):
    stored = fits.figures()
    peft, fast = (f"train {fits.LENGTH} tokens, {way}" for way in ("PEFT with bitsandbytes", "fast"))
    stored["measured"] = {
        "a machine": {
            "1b": {
                peft: {"peak": 7 * 2**30},
                fast: {"peak": 2**31, "step": 36.0},
                "run": {"peak": 2**30, "decode": 7.4},
            }
        }
    }
    monkeypatch.setattr(fits, "figures", lambda: stored)
    assert fits.training_bytes("1b")["PEFT with bitsandbytes"] == (7 * 2**30, True)
    header, _, *rows = fits.table()
    assert "| hours, fast / lean: a machine | tokens/s written |" in header
    assert [" | 10.0 | 7 |" in row for row in rows] == [name == "1 B" for name in fits.ROWS.values()]
    assert ["| 2.0 |" in row for row in rows] == [name == "1 B" for name in fits.ROWS.values()]
    assert ">7.0*<" in fits.draw()


@pytest.mark.parametrize("shape", list(fits.ROWS))
def test_the_weights_of_a_shape_are_those_of_its_model(shape):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes.config_of(shape))
    linear, other, adapter = fits.weights_of(shape)
    assert linear + other == sum(parameter.numel() for parameter in model.parameters())
    layers = [one for name, one in model.named_modules() if type(one) is torch.nn.Linear and name != "lm_head"]
    assert linear == sum(one.weight.numel() for one in layers)
    assert adapter == sizes.SMALL_RANK * sum(sum(one.weight.shape) for one in layers)


@pytest.mark.thorough
@pytest.mark.parametrize("way", list(sizes.DENSE))
def test_a_stored_prediction_is_what_plan_says(way):
    found = sizes.planned_training_bytes("0.6b", sizes.DENSE[way], fits.LENGTH)
    stored = fits.figures()["planned"]["0.6b"][f"train {fits.LENGTH} tokens, {way}"]
    assert found == pytest.approx(stored, rel=0.02)  # of other versions of torch


def test_the_stored_weights_are_in_every_prediction():
    for shape in fits.ROWS:
        linear, other, _ = fits.weights_of(shape)
        stored = fits.figures()["planned"][shape]
        least = lowmem.FourBit().skeleton(torch.empty(1, 4096, device="meta")).nbytes / 4096 * linear + other
        assert least < stored["run"] < stored[f"train {fits.LENGTH} tokens, lean"]
        assert stored[f"train {fits.LENGTH} tokens, all weights"] > 16 * (linear + other)


def test_the_preview_has_the_size_that_previews_have():
    header = (IMAGES / "preview.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(header[at : at + 4], "big") for at in (16, 20)] == [1200, 630]
