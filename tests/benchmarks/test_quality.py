"""What the table of the formats says: the choices, their bits, and how it is computed what a model loses."""

import copy
import math
import re
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks import quality
from lowmem import EightBit, FourBit, convert, measure
from lowmem.quant.tensor import QuantizedTensor

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guides" / "results-and-quality.md"
# of each block of SmolLM2: queries, keys, values, output; gate, up, down
LINEAR = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
BLOCKS, EMBEDDINGS, NORMS = 30, (49152, 576), 61 * 576


class Language(nn.Module):
    """Answers as a causal model of transformers does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(11, 32), nn.Linear(32, 11)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.tokens(input_ids)))


def table() -> list[str]:
    text = PAGE.read_text(encoding="utf8")
    return text.partition("<!-- python -m benchmarks.quality -->\n")[2].partition("<!-- end -->")[0].splitlines()


def test_the_table_has_the_choices_their_bits_and_the_language_model_s_size():
    lines = table()
    weights = sum(rows * columns for rows, columns in LINEAR)
    dense = 4 * (BLOCKS * weights + EMBEDDINGS[0] * EMBEDDINGS[1] + NORMS)
    assert lines[:3] == quality.table([quality.dense_row(dense)])
    for page in (PAGE, ROOT / "README.md"):
        assert f"{dense / 2**21:.2f} MiB in bfloat16" in page.read_text(encoding="utf8")
    assert len(lines[3:]) == len(quality.CHOICES) == 5
    for line, (name, (technique, when)) in zip(lines[3:], quality.CHOICES.items(), strict=True):
        code, bits, mib, *figures, said = (cell.strip() for cell in line.strip("|").split("|"))
        stored = sum(technique.skeleton(torch.empty(shape, device="meta")).nbytes for shape in LINEAR)
        embeddings = EightBit().skeleton(torch.empty(EMBEDDINGS, device="meta")).nbytes
        assert bits == f"{8 * stored / weights:.2f}"
        assert mib == f"{(BLOCKS * stored + embeddings + 4 * NORMS) / 2**20:.2f}"
        assert (code, said) == (f"`{name}`", when)
        assert all(math.isfinite(float(figure)) for figure in figures)
        assert eval(name, vars(quality)) == technique


def test_the_readme_has_three_rows_of_the_table():
    found = {}
    for line in table()[2:]:
        code, bits, mib, _, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        found[code] = [bits, mib, *figures[:2]]
    text = (ROOT / "README.md").read_text(encoding="utf8").partition("## What 4 bits lose")[2]
    rows = [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| (`.*) \|$", text, re.MULTILINE)]
    assert [row[0] for row in rows] == ['`FourBit("nf4")`', "`FourBit()`", "`EightBit()`"]
    assert all(found[code] == figures for code, *figures in rows)
    assert "grid of 4 bits (Q4_1)" in text  # on which the dense model lies


def test_losses_are_the_divergence_and_the_perplexity_of_the_next_token():
    dense = Language()
    other = convert(copy.deepcopy(dense), FourBit("int4"))
    rows = torch.randint(11, (3, 100), generator=torch.Generator().manual_seed(0))
    found = quality.losses(dense, {"other": other, "same": dense}, rows)
    p, q = (model(rows[:, :-1]).logits.detach().double().log_softmax(-1) for model in (dense, other))
    divergence = nn.functional.kl_div(q, p, log_target=True, reduction="sum") / 297
    surprise = [nn.functional.nll_loss(one.flatten(0, 1), rows[:, 1:].flatten()) for one in (p, q)]
    torch.testing.assert_close(found["other"].divergence, float(divergence), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found["other"].perplexity, math.exp(surprise[1] - surprise[0]), rtol=1e-5, atol=0)
    assert found["same"] == quality.Lost(measure.theoretical_bytes(dense), 0, 1)


def test_bits_are_of_the_linear_layers_alone():
    model = convert(Language(), FourBit("nf4"), where=quality.is_linear)
    assert type(model.tokens) is nn.Embedding
    weight: QuantizedTensor = model.head.quantized
    assert quality.bits(model) == 8 * weight.nbytes / (32 * 11)
