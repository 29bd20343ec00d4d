"""`lowmem fit --dry-run` says what a run of a folder takes, of the model and of the process."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import lowmem
from lowmem.__main__ import main
from lowmem.finetuning.packed_rows import Rows
from lowmem.finetuning.text_examples import Example
from lowmem.integrations.transformers import LowmemConfig
from lowmem.measure import PeakMemory
from lowmem.tools.fit_dry_run import MEASURED_LAYER_COUNTS, technique_dense_paths_and_bytes
from tests.fuzzing import bounded
from tests.integrations.transformers.folders import SIZES, load
from tests.integrations.transformers.tokens import write_tokenizer

LAYERS = max(MEASURED_LAYER_COUNTS) + 2
LENGTH, ROWS = 48, 3


@pytest.fixture
def folder(tmp_path):
    """A llama of more layers than are measured."""
    torch.manual_seed(0)
    place = tmp_path / "llama"
    config = LlamaConfig(**SIZES | {"num_hidden_layers": LAYERS})
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    write_tokenizer(place)
    (place.parent / "text.txt").write_text("some words " * 99)
    return place


def planned(folder, capsys, *options):
    argv = ["fit", str(folder), "--data", str(folder.parent / "text.txt"), "--length", str(LENGTH), "--dry-run"]
    assert main([*argv, "--batch-size", str(ROWS), "--rank", "4", *options]) == 0
    return capsys.readouterr().out


@pytest.mark.thorough
def test_a_dry_run_is_within_two_percent_of_the_run(folder, capsys):
    peaks = []
    for memory in ("plain", "fast", "lean"):
        found = json.loads(planned(folder, capsys, "--memory", memory, "--json"))
        base = load(folder, quantization_config=LowmemConfig(lowmem.FourBit()))
        model = lowmem.add_adapter(base, "default", lowmem.LoRA(4))
        assert found["stored_bytes"] == lowmem.measure.theoretical_bytes(model)
        if memory != "plain":
            lowmem.prepare_training(model, memory)
        examples = [Example.of([3 + n % 99 for n in range(LENGTH)], [True] * LENGTH) for _ in range(ROWS)]
        rows, peak = Rows.of(model, examples, LENGTH, 258), PeakMemory()
        with peak:
            lowmem.finetune(model, rows, lowmem.FineTuning(steps=2, batch_size=ROWS))
        expected = found["stored_bytes"] + peak.peak
        assert found["training_bytes"] - found["scratch"] == pytest.approx(expected, rel=0.02), memory
        peaks.append(peak.peak)
    assert peaks == sorted(peaks, reverse=True)


def test_a_config_of_another_size_than_the_tensors_is_refused_before_it_is_used(folder, refused):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    argv = ["fit", folder, "--data", folder.parent / "text.txt", "--length", LENGTH, "--dry-run"]
    for changes in ({"hidden_size": 2**20}, {"intermediate_size": 2**24}, {"vocab_size": 2**30}):
        path.write_text(json.dumps(config | changes))
        with bounded():
            assert "by its config.json" in refused(*argv)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 1}, "version=1, and this lowmem reads"),
        ({"unheard": 3}, "has 'unheard'"),
        ({"layers": 3}, "layers=3"),
    ],
    ids=["version", "field", "layers"],
)
def test_a_dry_run_refuses_a_stored_folder_as_a_run_does(folder, tmp_path, refused, changes, why):
    stored = tmp_path / "stored"
    assert main(["quantize", str(folder), str(stored)]) == 0
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] |= changes
    (stored / "config.json").write_text(json.dumps(config))
    argv = ["fit", str(stored), "--data", str(tmp_path / "text.txt"), "--length", str(LENGTH)]
    said = [refused(*argv, *options) for options in ([], ["--dry-run"])]
    assert said[0] == said[1]
    assert why in said[0]
    assert said[0].startswith(f"lowmem fit: cannot load {str(stored / 'config.json')!r}: ")
    assert refused("stats", stored, "--plan", "LoRA").partition(": ")[2] == said[0].partition(": ")[2]


def test_a_dry_run_says_what_it_does_and_computes_less_than_a_step(folder, capsys, monkeypatch):
    """One forward and backward of a few layers each; no update runs on more than fake parameters."""
    calls, updates = [], []
    forward, step = LlamaDecoderLayer.forward, torch.optim.AdamW.step

    def counted(layer, *args, **kwargs):
        calls.append(torch.is_grad_enabled() and type(args[0]) is torch.Tensor)
        return forward(layer, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    noted = lambda own: (updates.append(own.param_groups[0]["params"]), step(own))  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    argv = ["fit", folder, "--data", folder.parent / "text.txt", "--length", LENGTH, "--dry-run", "--memory", "plain"]
    assert main([*map(str, argv), "--skip-dense"]) == 0  # without a held-out text, too
    told = capsys.readouterr().err
    for layers in MEASURED_LAYER_COUNTS:
        assert f"runs forward and backward of {layers} of the {LAYERS} layers" in told
    assert sum(calls) == sum(MEASURED_LAYER_COUNTS)
    assert all(len(own) == 1 or type(own[0]).__name__ == "FakeTensor" for own in updates)


def test_a_dry_run_names_its_counts_and_writes_nothing(folder, capsys):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))
    before = sorted(folder.parent.rglob("*"))
    told = planned(folder, capsys, "--save", str(folder.parent / "out"))
    assert "total for training" in told
    assert f"with --memory fast, of 3 rows of {LENGTH} tokens: measured on at most 3 of its layers" in told
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("embeddings", [None, lowmem.EightBit()])
def test_the_outer_modules_of_a_stored_base_that_are_dense_stay_dense_in_the_plan(folder, tmp_path, embeddings):
    """The logits of a dense head take less than those of a coded one, which its step dequantizes."""
    technique = lowmem.FourBit("int4", 16, "float16")
    model = lowmem.convert(load(folder), technique, skip=["model.embed_tokens", "lm_head"])
    if embeddings is not None:
        lowmem.convert(model, embeddings, skip="model.layers.*")
    model.save_pretrained(tmp_path / "stored")
    found, dense, size = technique_dense_paths_and_bytes(tmp_path / "stored")
    assert (found.format, found.block_size, found.scales) == ("int4", 16, "float16")
    assert size == pytest.approx(
        lowmem.measure.theoretical_bytes(model), rel=0.002
    )  # the rotary embedding is computed
    heads = {"model.embed_tokens", "lm_head"}
    assert heads & {*dense} == (set() if embeddings else heads)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["dense", "stored"])
def test_a_dry_run_says_what_the_process_takes(kind, tmp_path):
    """Within 10% of what the run itself then reports, for a base of each kind."""
    folder, file = tmp_path / "llama", tmp_path / "text.txt"
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "max_position_embeddings": 512}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | sizes)).save_pretrained(folder)
    write_tokenizer(folder)
    file.write_text("some words " * 499)
    base = str(folder)
    if kind != "dense":
        assert main(["quantize", base, str(tmp_path / "stored")]) == 0
        base = str(tmp_path / "stored")
    argv = [sys.executable, "-m", "lowmem", "fit", base, "--data", str(file), "--length", "192", "--json"]
    argv += ["--steps", "2"]
    planned, ran = (
        json.loads(subprocess.run([*argv, *more], capture_output=True, text=True, check=True).stdout)
        for more in (["--dry-run"], [])
    )
    assert planned["process_bytes"] == pytest.approx(ran["peak_bytes"], rel=0.1)
