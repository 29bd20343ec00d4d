"""`lowmem compare` prints how close outputs stay, and gates on it."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from lowmem import VARIANTS
from lowmem.__main__ import main


def test_the_lines_of_a_comparison(capsys):
    assert main(["compare", "bignet", "half_precision"]) == 0
    first, largest, mean, relative, _ = capsys.readouterr().out.splitlines()
    assert first == "Comparing bignet and half_precision"
    assert largest.startswith(" - Max difference: 0.000")
    assert mean == " - Mean difference: 0.0001"
    assert relative.startswith(" - Relative error: ")


@pytest.mark.thorough
def test_json_of_every_variant(capsys):
    assert main(["compare", "--json", "--batch", "4"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["other"] for row in rows] == list(VARIANTS)[1:]
    assert all(row["base"] == "bignet" for row in rows)
    by_name = {row["other"]: row for row in rows}
    assert by_name["half_precision"]["max_difference"] <= 0.0005
    assert by_name["half_precision"]["mean_difference"] <= 0.0001
    assert by_name["lora"]["max_difference"] == by_name["half_precision"]["max_difference"]
    assert by_name["qlora"]["max_difference"] == by_name["low_precision"]["max_difference"]
    assert 0.01 < by_name["low_precision"]["relative_error"] < 0.05


@pytest.mark.parametrize(("tolerance", "code"), [("0.0005", 0), ("0.00001", 1)])
def test_a_tolerance_gates_and_what_failed_is_named(tolerance, code, capsys):
    assert main(["compare", "bignet", "half_precision", "lora", "--json", "--tolerance", tolerance]) == code
    shown = capsys.readouterr()
    found = {row["other"]: row["max_difference"] for row in json.loads(shown.out)}
    assert shown.err.splitlines() == code * [
        f"lowmem compare: {other} differs from bignet by {largest:.4g}, above --tolerance 1e-05"
        for other, largest in found.items()
    ]


def test_figures_are_those_of_arithmetic_and_the_largest_is_held_to_the_tolerance(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "compare_arithmetic.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Base(nn.Module):\n"
        "    y = 4.0\n"
        "    def forward(self, x):\n"
        "        return torch.tensor([3.0, self.y])\n"
        "class Other(Base):\n"
        "    y = 6.0\n"
    )
    models = "compare_arithmetic:Base", "compare_arithmetic:Other"
    assert main(["compare", *models, "--json", "--tolerance", "1.9"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["base"], row["other"]) == models
    assert (row["max_difference"], row["mean_difference"], row["relative_error"]) == pytest.approx((2, 1, 2 / 5))
    assert main(["compare", *models, "--tolerance", "2"]) == 0


def test_a_model_equals_itself_exactly(capsys):
    assert main(["compare", "qlora", "low_precision", "--json", "--tolerance", "0"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["max_difference"] == 0


def test_outputs_that_are_not_finite_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "compare_nan.py").write_text(
        "from torch import nn\nclass Nan(nn.Module):\n    def forward(self, x):\n        return x * float('nan')\n"
    )
    assert main(["compare", "bignet", "compare_nan:Nan", "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)[0]["max_difference"] is None
    assert shown.err == "lowmem compare: compare_nan:Nan differs from bignet by nan, which is not finite\n"


@pytest.mark.filterwarnings("error")
def test_imaginary_parts_count(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "compare_complex.py").write_text(
        "from torch import nn\n"
        "class Complex(nn.Module):\n"
        "    factor = 1j\n"
        "    def forward(self, x):\n"
        "        return x + self.factor\n"
        "class Other(Complex):\n"
        "    factor = 3j\n"
    )
    models = "compare_complex:Complex", "compare_complex:Other"
    assert main(["compare", *models, "--json", "--tolerance", "1.9"]) == 1
    found = json.loads(capsys.readouterr().out)[0]
    assert found["max_difference"] == pytest.approx(2)
    assert found["mean_difference"] == pytest.approx(2)


def test_what_cannot_be_compared_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "compare_models.py").write_text(
        "from torch import nn\n"
        "class Pair(nn.Module):\n    def forward(self, x):\n        return x, x\n"
        "narrow = lambda: nn.Linear(1024, 3)\n"
    )
    assert main(["compare", "bignet", "compare_models:Pair"]) == 2
    assert "returns a tuple; compare takes models that return a tensor" in capsys.readouterr().err
    assert main(["compare", "bignet", "compare_models:narrow"]) == 2
    assert "returns shape (1, 3), 'bignet' (1, 1024)" in capsys.readouterr().err


def test_names_are_shown_without_control_characters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "compare_names.py").write_text(
        "from torch import nn\nglobals()['\\x1b[31m|\\u202e[b]'] = lambda: nn.Linear(1024, 3)\n"
    )
    name = "compare_names:\x1b[31m|\u202e[b]"
    assert main(["compare", name, name]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        r"Comparing compare_names:\x1b[31m|\u202e[b] and compare_names:\x1b[31m|\u202e[b]"
    )
    assert main(["compare", name, name, "--markdown"]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    for line in (header, row):
        assert line.isprintable()
        assert r"compare_names:\\x1b\[31m\|\\u202e\[b]" in line


def test_a_model_that_cannot_be_put_in_eval_mode_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "compare_eval.py").write_text(
        "from torch import nn\nclass Model(nn.Module):\n    def eval(self):\n        raise LookupError('no')\n"
    )
    assert main(["compare", "bignet", "compare_eval:Model"]) == 2
    assert "model='compare_eval:Model' cannot take this input: LookupError: no;" in capsys.readouterr().err


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
    language = ModuleType("lowmem.integrations.transformers.comparing")
    names = [str(tmp_path / name) for name in ("base", "near", "far")]
    differences = 0.0, 0.02, math.inf
    found = [Score(name, 9, 20.0 + at, differences[at], 5.0) for at, name in enumerate(names)]
    language.compare_text = lambda paths, text, **_: [found[names.index(str(path))] for path in paths]
    for module in ("lowmem.integrations.transformers", "lowmem.integrations.transformers.comparing"):
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
    assert main(["compare", "--layers"]) == 2
    assert "--layers needs a text: add --text FILE" in capsys.readouterr().err
    assert main(["compare", base, near, far, "--text", text, "--json", "--tolerance", "0.01"]) == 1
    shown = capsys.readouterr()
    assert [row["divergence"] for row in json.loads(shown.out)] == [0.0, 0.02, None]
    first, second = shown.err.splitlines()
    assert first.endswith(f"near diverges from {base} by 0.02 nats a token, above --tolerance 0.01")
    assert second.endswith("by inf nats a token, which is not finite")


def test_what_cannot_be_compared_on_a_text_is_said(folders, tmp_path, capsys):
    text, base, near, _ = folders
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"a\xff")
    cases = {
        "is no folder: --text compares folders": [base, "bignet", "--text", text],
        "at least one other folder": [base, "--text", text],
        "it is no UTF-8 text, from byte 1": [base, near, "--text", str(binary)],
        "--batch, --input-shape and": [base, near, "--text", text, "--batch", "4"],
        "with --text leave them out": [base, near, "--text", text, "--input-dtype", "int64"],
    }
    for message, arguments in cases.items():
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_model_that_writes_to_its_input_is_compared_on_the_one_that_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "compare_writes.py").write_text(
        "from torch import nn\n"
        "class Shift(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x.add_(1.0))\n"
        "make = lambda: Shift(32, 32)\n"
    )
    model = "compare_writes:make"
    assert main(["compare", model, model, model, "--input-shape", "32", "--tolerance", "0"]) == 0
