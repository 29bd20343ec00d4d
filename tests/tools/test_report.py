"""`lowmem report` writes a page or one clear line."""

import json
import os
from pathlib import Path

import pytest
import torch

from lowmem.__main__ import main
from lowmem.variants import VARIANTS
from lowmem.version import install_command
from tests.pages import report as made_up
from tests.testing.test_gate_verdicts import VERDICT

pytest.importorskip("altair", reason="the report needs the extra: pip install '.[report]'")
pytest.importorskip("vl_convert", reason="the report needs the extra: pip install '.[report]'")


from lowmem.report.charts import ChartSvgsAndSpec
from lowmem.tools import report as command

ROOT = Path(__file__).parents[2]
MODELS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(self.up(x))

class Pair(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return {"out": y, "again": (y, 3)}

make = lambda: Pair(Block(), Block())

class Shift(nn.Module):
    def forward(self, x):
        return x.add_(1.0)

class Shifted(nn.Module):
    def forward(self, x):
        return x + 1.0

writes = lambda: nn.Sequential(Shift(), nn.Linear(32, 32))
reads = lambda: nn.Sequential(Shifted(), nn.Linear(32, 32))
ONE = nn.Linear(32, 32)
always_one = lambda: ONE

class Broken(nn.Linear):
    def forward(self, x):
        raise LookupError("<no>")

class Silent(nn.Linear):
    def forward(self, x):
        return None

class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]

class Chooses(nn.Linear):
    def forward(self, x):
        return super().forward(x).argmax(-1)

recurrent = lambda: Recurrent(32, 32)
chooses = lambda: nn.Sequential(nn.Linear(32, 32), Chooses(32, 32))
embedding = lambda: nn.Embedding(128, 64)
broken = lambda: Broken(32, 32)
silent = lambda: nn.Sequential(nn.Linear(32, 32), Silent(32, 32))
nothing = lambda: nn.ReLU()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch, user_module):
    """Leave out what takes long and has tests of its own: drawing, and the errors of normal weights."""
    empty = '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"></svg>'
    monkeypatch.setattr(
        "lowmem.report.page.draw_wide_and_narrow_svg", lambda chart: ChartSvgsAndSpec(empty, empty, {})
    )
    monkeypatch.setattr(
        "lowmem.report.quantization_errors.measure_format_gaussian_errors", lambda: made_up().distortions
    )
    user_module("report_models", MODELS)


@pytest.fixture
def unmeasured(monkeypatch):
    """Leave out measuring BigNet."""
    monkeypatch.setattr(command, "measure_variants", lambda *_, **__: made_up(groups=[], verdicts=[]))


OWN = ("report_models:make", "out.html", "--input-shape", "32")


def test_the_page_of_a_users_model(capsys):
    assert main(["report", *OWN, "--batches", "2"]) == 0
    assert capsys.readouterr().out == ""
    html = Path("out.html").read_text()
    for text in (
        "<h1>report_models:make</h1>",
        "0,1.up",
        "0,1.down",
        "low_precision_nf4",
        "Of a training step with AdamW",
        "Measured for this page",
        "Against bits",
        "bof4s, blocks of 16",
        "batch 2",
    ):
        assert text in html, text


def test_measurements_of_a_users_model_are_complete():
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    measured = command.measure_variants("report_models:make", x, timed_inputs=[x], by_layer_group=True)
    dense, *others = measured.footprints
    names = [dense.name, *(one.name for one in others)]
    assert names == ["dense", *list(VARIANTS)[1:]] == list(measured.meanings)
    untrained = [one.name for one in measured.footprints if one.step is None]
    assert untrained == ["half_precision"]  # in 4 bits biases train
    assert dense.step.weights == dense.stored_bytes
    lora = next(one for one in others if one.name == "lora")
    assert lora.step.adapters == lora.kinds["LoRA adapters"]
    assert measured.meanings["four_bit"] == ("FourBit()", "4-bit weights (bof4s in blocks of 32)")
    assert list(measured.losses) == [t.name for t in measured.timings] == names[1:]
    assert measured.losses["lora"] == measured.losses["half_precision"] < measured.losses["low_precision"] < 0.3
    assert sum(group.dense_bytes for group in measured.groups) == dense.stored_bytes == 2 * 4 * (2 * 32 * 64 + 96)
    for one in others:
        assert sum(group.bytes[one.name] for group in measured.groups) == one.stored_bytes


def test_a_model_that_writes_to_its_input_is_compared_on_the_one_that_was_given():
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    found = [
        command.measure_variants(f"report_models:{name}", x, by_layer_group=True) for name in ("reads", "writes")
    ]
    assert found[0].losses == found[1].losses
    assert found[0].qualities == found[1].qualities


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        (
            "recurrent",
            ["--input-shape", "5,32"],
            [
                "<p>Without lora, qlora_4bit, qlora_8bit, qlora, qlora_nf4: ",
                "LoRA leaves recurrent layers out",
            ],
        ),
        (
            "embedding",
            ["--input-shape", "5", "--input-dtype", "int64"],
            [
                "<p>Without lora: ",
                "<p>Without qlora_4bit, qlora_8bit, qlora, qlora_nf4: ",
                "LoRA leaves embeddings out",
            ],
        ),
    ],
)
def test_variants_that_cannot_be_made_are_left_out_with_the_reason(name, shape, said):
    assert main(["report", f"report_models:{name}", "out.html", *shape, "--batches", "1"]) == 0
    html = Path("out.html").read_text()
    for text in ("as it is and in 5 variants", *said, "low_precision_nf4"):
        assert text in html, text
    assert html.count("qlora_nf4") == 1  # in the reason


def test_a_model_whose_output_has_no_gradient_has_no_training_step():
    assert main(["report", "report_models:chooses", "out.html", "--input-shape", "32", "--batches", "1"]) == 0
    html = Path("out.html").read_text()
    assert "Of a training step" not in html
    assert "low_precision_nf4" in html


def test_a_stored_run_gives_latency_and_the_same_bytes_twice(unmeasured):
    stored = str(ROOT / "benchmarks" / "baselines" / "0001_baseline.json")
    assert main(["report", "one.html", "--run", stored]) == main(["report", "two.html", "--run", stored]) == 0
    one = Path("one.html").read_text()
    assert one == Path("two.html").read_text()
    assert "Of the run 0001_baseline.json" in one
    assert "5.11" in one  # four_bit, batch 1
    assert str(ROOT) not in one


def test_verdicts_are_shown(unmeasured):
    Path("latency.json").write_text(json.dumps(VERDICT))
    Path("memory.json").write_text(json.dumps(VERDICT | {"gate": "memory", "passed": True, "rows": []}))
    assert main(["report", "out.html", "--verdict", "latency.json", "--verdict", "memory.json"]) == 0
    html = Path("out.html").read_text()
    assert 'Latency gate <span class="badge failed">failed</span>' in html
    assert 'Memory gate <span class="badge passed">passed</span>' in html


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["report_models:broken", "out.html", "--input-shape", "32"], "LookupError: <no>"),
        (["report_models:silent", "out.html", "--input-shape", "32"], "returns no tensor"),
        (["report_models:nothing", "out.html", "--input-shape", "32"], "nothing to convert"),
        (["report_models:always_one", "out.html", "--input-shape", "32"], "returned the same model twice"),
        (["report_models:none", "out.html"], "has no 'none'"),
        (["report_models:make", "out.html"], "check the input's shape"),
        (["report_models:make@lora", "out.html"], "must be module:factory"),
        (["qlora", "out.html"], "must be module:factory"),
        (["report_models:make"], "must end with .html"),
        (["report_models.py"], "must end with .html"),
        (["folder.html"], "it is a directory"),
        (["missing/out.html"], "cannot write"),
        (["out.html", "--run", "missing.json"], "cannot read 'missing.json'"),
        (["out.html", "--run", "report_models.py"], "the JSON is broken"),
        (["out.html", "--verdict", "report_models.py"], "the JSON is broken"),
        (["out.html", "--verdict", "run.json"], "it is no verdict of a gate: gate is missing"),
        (["out.html", "--run", "verdict.json"], "it is no run of pytest-benchmark"),
        (["report_models:make", "out.html", "--run", "run.json"], "--run holds times of BigNet"),
        (["out.html", "--batches", "0"], "must be a positive integer"),
    ],
)
def test_bad_input_is_one_line_and_overwrites_nothing(argv, why, refused):
    Path("folder.html").mkdir()
    Path("out.html").write_text("before")
    Path("run.json").write_text(json.dumps({"benchmarks": [], "machine_info": {}}))
    Path("verdict.json").write_text(json.dumps(VERDICT))
    files = sorted(os.listdir())
    assert why in refused("report", *argv)
    assert Path("out.html").read_text() == "before"
    assert sorted(set(os.listdir()) - {"__pycache__"}) == files


def test_a_page_in_place_of_an_input_is_refused(refused):
    Path("run.html").write_text("{}")
    for option in ("--run", "--verdict"):
        told = refused("report", "run.html", option, "./run.html")
        assert told == f"lowmem report: OUT='run.html' is {option}, which would be lost: name another place\n"
    assert Path("run.html").read_text() == "{}"


@pytest.mark.parametrize("package", ["altair", "vl_convert", "jinja2", "scipy"])
def test_without_the_extra_it_says_what_to_install(package, monkeypatch, refused):
    imported = command.import_module

    def without(name):
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return imported(name)

    monkeypatch.setattr(command, "import_module", without)
    assert install_command("report") in refused("report", "out.html")
    assert not Path("out.html").exists()
