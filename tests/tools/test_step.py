"""``lowmem stats --training`` says where a step's memory goes: what ``training_memory`` measures, or one line."""

import json

import pytest
import torch

import lowmem
from lowmem.__main__ import main

MODELS = """
from torch import nn
make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
frozen = lambda: nn.Linear(12, 3).requires_grad_(False)
class Fails(nn.Linear):
    def __init__(self):
        super().__init__(12, 3)
    def forward(self, x):
        raise LookupError("not today")
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "step_models.py").write_text(MODELS)


def found(capsys, *argv):
    assert main(["stats", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_variants_by_json_and_as_a_table(capsys):
    argv = ["low_precision_nf4", "lowmem:BigNet@qlora_nf4", "--training", "sgd", "--batch", "2"]
    listed = found(capsys, *argv)
    assert [one["model"] for one in listed] == argv[:2]
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    wanted = lowmem.training_memory(lowmem.build("qlora_nf4"), x, optimizer="sgd")
    assert listed[1] == {"model": argv[1], "memory": None} | wanted.as_json()
    assert main(["stats", *argv, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| MiB | low\\_precision\\_nf4 | lowmem:BigNet@qlora\\_nf4 |".replace("\\_", "_")
    assert any(line.startswith("| weights | 9.43 | 9.43 |") for line in lines)
    assert lines[-1].endswith(f"| {wanted.moment} |")
    assert lines[-2].endswith(f"| {wanted.total_bytes / 2**20:.2f} |")


@pytest.mark.usefixtures("models")
def test_a_user_s_model_with_adapters_prepared(capsys):
    argv = ["step_models:make", "--input-shape", "3,8,8", "--batch", "4", "--training", "adamw8bit"]
    (plain,) = found(capsys, *argv)
    assert plain["adapters"] == 0
    assert plain["activations"].keys() <= {"Conv2d", "BatchNorm2d", "ReLU", "Linear", "loss"}
    (adapted,) = found(capsys, *argv, "--rank", "2", "--memory", "lean")
    assert (adapted["memory"], adapted["optimizer_name"]) == ("lean", "adamw8bit")
    assert adapted["adapters"] > 0
    (frozen,) = found(capsys, "step_models:frozen", "--input-shape", "12", "--training", "adamw", "--rank", "2")
    assert frozen["adapters"] == 4 * 2 * (12 + 3)
    (ranked,) = found(capsys, "lora", "--training", "adamw", "--rank", "2")
    assert ranked["adapters"] == 4 * 2 * 2048 * 18


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["step_models:frozen", "--input-shape", "12", "--training", "adamw"], "--rank N adds adapters"),
        (["step_models:Fails", "--input-shape", "12", "--training", "sgd"], "LookupError: not today"),
        (["bignet", "--input-shape", "12", "--training", "sgd"], "model='bignet' cannot take this input"),
        (["bignet", "--training", "adam"], "invalid choice: 'adam'"),
        (["bignet", "--memory", "lean"], "--memory applies to a measured training step"),
        (["bignet", "--training", "none", "--rank", "2"], "--rank applies to a measured training step"),
        (["bignet", "--training", "sgd", "--plan", "LoRA", "--plot", "p.svg"], "--plot applies to"),
        (["bignet", "--training", "adamw8bit", "--plan", "LoRA"], "--training adamw8bit is measured, not planned"),
        (["bignet", "--training", "sgd", "--all"], "--all lists the layers"),
        (["bignet", "--training", "sgd", "--plot", "p.pdf"], "must end with .svg, .png, .html"),
        (["bignet", "--training", "sgd", "--plot", "no/p.svg"], "no/p.svg"),
    ],
)
def test_what_cannot_be_done_is_one_line(argv, text, capsys, tmp_path):
    try:
        status = main(["stats", *argv])
    except SystemExit as stopped:  # argparse, which prints the usage before
        status = stopped.code
    shown = capsys.readouterr().err
    assert status == 2
    assert text in shown.splitlines()[-1]
    assert [one.name for one in tmp_path.iterdir() if one.suffix != ".py" and one.name != "__pycache__"] == []


@pytest.mark.thorough
@pytest.mark.usefixtures("models")
def test_it_is_drawn(tmp_path):
    pytest.importorskip("altair", reason="the picture needs the extra: pip install '.[report]'")
    for name in ("step.svg", "step.png", "step.HTML"):
        argv = ["step_models:make", "--input-shape", "3,8,8", "--training", "adamw", "--plot", name]
        assert main(["stats", *argv]) == 0
        assert (tmp_path / name).stat().st_size > 2000
