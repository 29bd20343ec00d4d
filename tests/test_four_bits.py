"""The page ``docs/four-bits.md``: its code prints what it says, its 60 lines are QLoRA as lowmem does it, and its
drawings show what was computed. ``tests_minilm/test_trained_layer.py`` holds what was measured of trained models."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lowmem
from tests.compiled import on_threads
from tests.rounding import gamma, unit

DOCS = Path(__file__).parents[1] / "docs"
sys.path.append(str(DOCS))

import drawings  # noqa: E402

PAGE = drawings.PAGE.read_text(encoding="utf8")
(LINES,) = re.findall(r"^<!-- qlora -->\n```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
QLORA = {"__name__": "qlora"}
exec(compile(LINES, "docs/four-bits.md", "exec"), QLORA)
NUMBER = r"\d[\d,]*(?:\.\d+)?"


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small are faster on one thread."""
    with on_threads(1):
        yield


def test_the_code_prints_what_the_page_says():
    """To the last digit but one, since processors round sums in another order."""
    _, printed = drawings.run_page()
    assert len([shown for _, shown in printed if shown]) == 5
    for got, shown in printed:
        assert re.sub(NUMBER, "", got) == re.sub(NUMBER, "", shown or "")
        for number, wanted in zip(re.findall(NUMBER, got), re.findall(NUMBER, shown or ""), strict=True):
            decimals = len(wanted.partition(".")[2])
            off = float(number.replace(",", "")) - float(wanted.replace(",", ""))
            assert abs(off) <= (1.01 * 10**-decimals if decimals or "%" in shown else 0), (number, wanted)


def test_what_the_page_says_of_its_figures_is_so():
    page, _ = drawings.run_page()
    sizes = {name: sum(parts) for name, parts in page["memory"].items()}
    assert sizes["LoRA on 4 bits"] < 16 / 3 < 15 < sizes["LoRA on bfloat16"] < 16 < sizes["all weights, float32"]
    for size, q in page["stored"].items():
        rows, columns = q.shape
        assert q.nbytes == rows * (columns / 2 + columns / size + 2)
    assert page["update"].square().mean().sqrt() < page["half_gaps"]
    assert page["after"] < page["dense"] < page["before"]
    assert page["moved"].mean() < 0.5  # most weights keep their code
    kept = (page["before"] - page["requantized"]) / (page["before"] - page["after"])
    assert kept < 0.5 < 0.99 < (page["before"] - page["rounded"]) / (page["before"] - page["after"])
    error = (page["weights_by_hand"] - page["by_hand"].dequantize()).abs()
    assert (error <= page["by_hand"].error_bound()).all()


def test_the_60_lines_are_60():
    assert len(LINES.splitlines()) <= 60
    assert "lowmem" not in LINES


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 3), st.integers(-40, 12), st.booleans())
def test_the_codes_are_those_of_lowmem(seed, rows, blocks, exponent, outlier):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 64 * blocks, generator=generator) * 2.0**exponent
    weight *= torch.randint(0, 2, (rows, blocks), generator=generator).repeat_interleave(64, 1)  # blocks of zeros
    if outlier:
        weight[0, 0] = 1000.0
    for _ in range(2):  # the second time with weights whose scales are whole counts
        layer = nn.Linear(64 * blocks, rows, bias=False)
        layer.weight = nn.Parameter(weight)
        stored = lowmem.convert(layer, lowmem.FourBit("nf4")).quantized
        packed, counts, row = QLORA["quantize"](weight)
        assert torch.equal(packed.flatten(1), stored.packed)
        assert torch.equal(torch.cat([counts, row.view(torch.uint8)], 1), stored.scales)
        weight = stored.dequantize()
        assert torch.equal(QLORA["dequantize"](packed, counts, row), weight)


RANK, ALPHA, RATE, STEPS = 2, 4, 0.2, 12


def test_the_trained_adapter_is_that_of_lowmem_within_rounding():
    """In float64, by gradient descent. Both differ from exact descent by at most ``training_error_bound``."""
    torch.manual_seed(0)
    base = [torch.randn(64, 128) / 128**0.5, torch.randn(8, 64) / 64**0.5]
    x, y = torch.randn(32, 128).double(), torch.randn(32, 8).double()
    model = nn.Sequential(*(QLORA["QLoRALinear"](weight, RANK, ALPHA) for weight in base)).double()
    model.insert(1, nn.Tanh())
    other = nn.Sequential(nn.Linear(128, 64, bias=False), nn.Tanh(), nn.Linear(64, 8, bias=False))
    for layer, weight in zip((other[0], other[2]), base, strict=True):
        layer.weight = nn.Parameter(weight)
    lowmem.convert(other, lowmem.FourBit("nf4"), lowmem.LoRA(RANK, alpha=ALPHA)).double()
    adapters = list(lowmem.adapter_layers(other, "default").values())
    for adapter, layer in zip(adapters, (model[0], model[2]), strict=True):
        adapter.lora_a.data.copy_(layer.a.data)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    weights = [QLORA["dequantize"](*layer.stored).double() for layer in (model[0], model[2])]
    bound, exact = training_error_bound(start, weights, x, y)
    for trained in (model, other):
        parameters = [one for one in trained.parameters() if one.requires_grad]
        QLORA["train"](trained, torch.optim.SGD(parameters, lr=RATE), x, y, STEPS)
    moved = sum(float((a - b).square().sum()) for a, b in zip(exact, start, strict=True)) ** 0.5
    assert bound < 1e-6 * moved
    found = [matrix for adapter in adapters for matrix in (adapter.lora_a, adapter.lora_b)]
    for got in (found, list(model.parameters())):
        off = sum(float((a - b).detach().square().sum()) for a, b in zip(got, exact, strict=True)) ** 0.5
        assert off <= 2 * bound  # twice: exact descent is computed in float64, too


def training_error_bound(start, weights, x, y):
    """Return how far gradient descent in float64 may lie from the exact one, to first order, and what it reaches.

    A gradient is a polynomial of the factors and of tanh, and is off by at most gamma_n times itself with all
    terms positive (``tests.rounding``). A step multiplies earlier errors by I - rate H, H the Hessian.
    """
    shapes, sizes = [one.shape for one in start], [one.numel() for one in start]
    (first, second), scaling = weights, ALPHA / RANK

    def matrices(flat):
        return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]

    def loss(flat):
        a, b, c, d = matrices(flat)
        hidden = torch.tanh(x @ first.T + scaling * (x @ a.T) @ b.T)
        return nn.functional.mse_loss(hidden @ second.T + scaling * (hidden @ c.T) @ d.T, y)

    def magnitudes(flat):
        a, b, c, d = (matrix.abs() for matrix in matrices(flat))
        inputs = x.abs()
        hidden = inputs @ first.abs().T + scaling * (inputs @ a.T) @ b.T  # an error of tanh(z) is at most one of z
        out = hidden @ second.abs().T + scaling * (hidden @ c.T) @ d.T
        grad = 2 / y.numel() * (out + y.abs())
        below = (grad @ second.abs() + scaling * grad @ d @ c) * (1 + 2 * hidden)  # 1 - tanh^2 is off by 2 |z|
        parts = (below @ b).T @ inputs, below.T @ (inputs @ a.T), (grad @ d).T @ hidden, grad.T @ (hidden @ c.T)
        return scaling * torch.cat([part.flatten() for part in parts])

    terms = (
        sum(first.shape) + second.shape[0] + len(x) + 4 * RANK + 40
    )  # sums one after the other, and single products
    flat, error = torch.cat([one.flatten() for one in start]), 0.0
    for _ in range(STEPS):
        hessian, slope = torch.func.hessian(loss)(flat), torch.func.grad(loss)(flat)
        growth = float((1 - RATE * torch.linalg.eigvalsh(hessian)).abs().max())
        step = RATE * gamma(terms, torch.float64) * magnitudes(flat)
        step += unit(torch.float64) * (flat.abs() + 2 * RATE * slope.abs())
        flat, error = flat - RATE * slope, growth * error + float(step.norm())
    return error, matrices(flat)


@pytest.mark.parametrize("name", list(drawings.DRAWINGS))
def test_a_drawing_is_in_the_page_and_fits_a_phone(name):
    (description,) = [words for found, words in drawings.DRAWING.findall(PAGE) if found == name]
    figure = ElementTree.fromstring(drawings.draw(name, description))
    svg = figure.find("svg")
    assert svg.get("aria-label") == " ".join(description.split())
    width, height = map(float, svg.get("viewBox").split()[2:])
    assert width <= 340
    for text in svg.iter("text"):
        x, half = float(text.get("x")), 6.2 * len(text.text)
        left = {"middle": x - half / 2, "end": x - half, None: x}[text.get("text-anchor")]
        assert left >= -4, text.text
        assert left + half <= width + 4, text.text
        assert 8 <= float(text.get("y")) <= height
    assert "#" not in re.sub("&#.*?;", "", ElementTree.tostring(svg, "unicode"))  # colours are the theme's


def test_drawings_stand_in_place_of_their_names_with_one_style():
    shown = drawings.put_drawings_into(PAGE)
    assert len(drawings.DRAWING.findall(PAGE)) == len(drawings.DRAWINGS) == shown.count("<svg ")
    assert "{drawing}" not in shown
    assert shown.count("<style>") == 1
    assert drawings.put_drawings_into("# A page\n") == "# A page\n"
    for colour in set(re.findall(r"var\(--(\w+)\)", shown)):
        assert drawings.STYLE.count(f"--{colour}: ") == 3  # light, dark, and dark by the system
