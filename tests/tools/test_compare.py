"""`lowmem compare` prints how close outputs stay, and gates on it."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lowmem import VARIANTS, measure
from lowmem.__main__ import main

MODELS = """
import torch
from torch import nn

class Constant(nn.Module):
    y = 4.0
    def forward(self, x):
        return torch.tensor([3.0, self.y])

class Other(Constant):
    y = 6.0

class Complex(nn.Module):
    factor = 1j
    def forward(self, x):
        return x + self.factor

class OtherComplex(Complex):
    factor = 3j

class Nan(nn.Module):
    def forward(self, x):
        return x * float("nan")

class Pair(nn.Module):
    def forward(self, x):
        return x, x

class NoEval(nn.Module):
    def eval(self):
        raise LookupError("no")

class Shift(nn.Linear):
    def forward(self, x):
        return super().forward(x.add_(1.0))

narrow = lambda: nn.Linear(1024, 3)
shift = lambda: Shift(32, 32)
globals()['\\x1b[31m|\\u202e[b]'] = narrow
"""


@pytest.fixture(autouse=True)
def compare_models(user_module):
    user_module("compare_models", MODELS)


def test_a_comparison_is_four_lines(capsys):
    assert main(["compare", "bignet", "half_precision"]) == 0
    first, largest, mean, relative, _ = capsys.readouterr().out.splitlines()
    assert first == "Comparing bignet and half_precision"
    assert largest.startswith(" - Max difference: 0.000")
    assert mean == " - Mean difference: 0.0001"
    assert relative.startswith(" - Relative error: ")


@pytest.mark.thorough
def test_json_of_every_variant(results):
    by_name = {row["other"]: row for row in results("compare", "--batch", "4")}
    assert list(by_name) == list(VARIANTS)[1:]
    assert by_name["half_precision"]["max_difference"] <= 0.0005
    assert by_name["half_precision"]["mean_difference"] <= 0.0001
    assert by_name["lora"]["max_difference"] == by_name["half_precision"]["max_difference"]
    assert by_name["qlora"]["max_difference"] == by_name["low_precision"]["max_difference"]
    assert 0.01 < by_name["low_precision"]["relative_error"] < 0.05


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("base", "other", "figures"),
    [("Constant", "Other", (2, 1, 2 / 5)), ("Complex", "OtherComplex", (2, 2, None))],
)
def test_the_largest_difference_is_held_to_the_tolerance(base, other, figures, capsys):
    """Figures are those of arithmetic; imaginary parts count; what failed is named."""
    models = f"compare_models:{base}", f"compare_models:{other}"
    assert main(["compare", *models, "--json", "--tolerance", "1.9"]) == 1
    shown = capsys.readouterr()
    (row,) = json.loads(shown.out)
    assert (row["base"], row["other"]) == models
    found = row["max_difference"], row["mean_difference"], row["relative_error"]
    assert found == pytest.approx(figures if figures[2] else (*figures[:2], found[2]))
    assert shown.err == f"lowmem compare: {models[1]} differs from {models[0]} by 2, above --tolerance 1.9\n"
    assert main(["compare", *models, "--tolerance", "2"]) == 0


@pytest.mark.parametrize("models", [("qlora", "low_precision"), ("compare_models:shift", "compare_models:shift")])
def test_equal_models_have_no_difference(models, results):
    """Also one that writes to its input, and an adapter that starts at zero."""
    shape = ["--input-shape", "32"] if ":" in models[0] else []
    assert results("compare", *models, *shape, "--tolerance", "0")[0]["max_difference"] == 0


def test_outputs_that_are_not_finite_fail(capsys):
    assert main(["compare", "bignet", "compare_models:Nan", "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)[0]["max_difference"] is None
    assert shown.err == "lowmem compare: compare_models:Nan differs from bignet by nan, which is not finite\n"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Pair", "returns a tuple; compare takes models that return a tensor"),
        ("narrow", "returns shape (1, 3), 'bignet' (1, 1024)"),
        ("NoEval", "model='compare_models:NoEval' cannot take this input: LookupError: no;"),
    ],
)
def test_a_model_that_cannot_be_compared_is_refused(name, why, refused):
    assert why in refused("compare", "bignet", f"compare_models:{name}")


def test_names_are_shown_without_control_characters(capsys):
    name = "compare_models:\x1b[31m|\u202e[b]"
    assert main(["compare", name, name]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        r"Comparing compare_models:\x1b[31m|\u202e[b] and compare_models:\x1b[31m|\u202e[b]"
    )
    assert main(["compare", name, name, "--markdown"]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    for line in (header, row):
        assert line.isprintable()
        assert r"compare_models:\\x1b\[31m\|\\u202e\[b]" in line


@dataclass(frozen=True)
class Score:
    model: str
    tokens: int
    perplexity: float
    divergence: float
    tokens_per_second: float
    ratio: float = 1.0
    agreement: float = 1.0
    divergence_interval: tuple[float, float] | None = None
    ratio_interval: tuple[float, float] | None = None
    agreement_interval: tuple[float, float] | None = None
    layers: tuple = ()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Return a text and three folders, whose scores are made up: transformers is not needed."""
    language = ModuleType("lowmem.integrations.transformers.text_comparison")
    names = [str(tmp_path / name) for name in ("base", "near", "far")]
    differences = 0.0, 0.02, math.inf
    found = [Score(name, 9, 20.0 + at, differences[at], 5.0) for at, name in enumerate(names)]
    language.compare_folders_on_text = lambda paths, text, **_: [found[names.index(str(path))] for path in paths]
    for module in ("lowmem.integrations.transformers", "lowmem.integrations.transformers.text_comparison"):
        monkeypatch.setitem(sys.modules, module, language)
    for name in names:
        Path(name).mkdir()
    text = tmp_path / "text.txt"
    text.write_text("some words")
    return str(text), *names


def test_folders_are_compared_on_a_text(folders, capsys):
    text, base, near, far = folders
    assert main(["compare", base, near, "--text", text, "--markdown", "--tolerance", "0.05"]) == 0
    assert "| 21.0000" in capsys.readouterr().out.replace("|  ", "| ")
    assert main(["compare", base, near, far, "--text", text, "--json", "--tolerance", "0.01"]) == 1
    shown = capsys.readouterr()
    assert [row["divergence"] for row in json.loads(shown.out)] == [0.0, 0.02, None]
    first, second = shown.err.splitlines()
    assert first.endswith(f"near diverges from {base} by 0.02 nats a token, above --tolerance 0.01")
    assert second.endswith("by inf nats a token, which is not finite")


def test_arguments_that_cannot_be_compared_on_a_text_are_refused(folders, tmp_path, refused):
    text, base, near, _ = folders
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"a\xff")
    for message, arguments in {
        "--layers needs a text: add --text FILE": ["--layers"],
        "is no folder: --text compares folders": [base, "bignet", "--text", text],
        "at least one other folder": [base, "--text", text],
        "it is no UTF-8 text, from byte 1": [base, near, "--text", str(binary)],
        "--batch, --input-shape and": [base, near, "--text", text, "--batch", "4"],
        "with --text leave them out": [base, near, "--text", text, "--input-dtype", "int64"],
    }.items():
        assert message in refused("compare", *arguments)


def test_without_a_gpu_device_is_one_line(no_gpu, tmp_path):
    no_gpu("compare", "bignet", "qlora")
    no_gpu("compare", tmp_path, tmp_path, "--text", tmp_path / "none.txt")


def test_models_and_inputs_are_on_the_device(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("lowmem.tools.compare.select_local_rank_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(
        "lowmem.measure.difference", lambda *both: seen.extend(both) or measure.Difference(0.0, 0.0, 0.0)
    )
    assert main(["compare", "bignet", "low_precision", "--device", "cuda"]) == 0
    assert [one.device.type for one in seen] == ["meta", "meta"]
