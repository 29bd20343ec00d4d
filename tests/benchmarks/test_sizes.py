"""The benchmark of sizes: its models are what transformers and lowmem read, and its table says what was measured."""

import json
import re

import pytest
import torch

import lowmem
from benchmarks import sizes
from tests.benchmarks.test_resident import needs_high_water

pytest.importorskip("transformers")


@pytest.fixture
def few_cells(monkeypatch):
    monkeypatch.setattr(sizes, "MODES", ("fast",))


@pytest.fixture
def in_this_process(monkeypatch, few_cells):
    def measured_here(folder, name, *arguments):
        return sizes.measured(lambda: sizes.RUNS[name](folder, *arguments))

    monkeypatch.setattr(sizes, "measured_apart", measured_here)


def test_a_stored_model_has_the_shape_and_weights_of_a_converted_one(tmp_path):
    from transformers import AutoModelForCausalLM

    import lowmem.integrations.transformers

    sizes.write_stored_model(tmp_path, "tiny", lowmem.FourBit())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    whole = lowmem.convert(
        AutoModelForCausalLM.from_config(sizes.config_of("tiny"), dtype=torch.bfloat16), lowmem.FourBit()
    )
    assert len(model.model.layers) == sizes.config_of("tiny").num_hidden_layers
    assert {name: (one.shape, one.dtype) for name, one in model.state_dict().items()} == {
        name: (one.shape, one.dtype) for name, one in whole.state_dict().items()
    }
    assert lowmem.measure.actual_bytes(model) == lowmem.measure.actual_bytes(whole)
    assert model(torch.zeros(1, 4, dtype=torch.int64)).logits.isfinite().all()


def test_a_dense_model_is_read_by_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    sizes.write_dense_model(tmp_path, "tiny")
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    first, last = model.model.layers
    assert torch.equal(first.mlp.up_proj.weight, last.mlp.up_proj.weight)


@needs_high_water
def test_each_row_has_the_figures_of_its_run(tmp_path, in_this_process):
    figures = sizes.figures_of("tiny", ["train", "run", "quantize"], tmp_path / "tiny", [64])
    assert [*figures] == ["quantize", "train 64 tokens, fast", "run"]
    for name, found in figures.items():
        _, shape, what, planned, peak, times, _ = map(str.strip, sizes.row_of("tiny", name, found).split("|"))
        assert (shape, what) == ("tiny", name)
        assert (planned == "") == (what == "quantize")
        assert float(peak) > 0.05
        assert re.search(r"\d", times)


@needs_high_water
def test_predictions_alone_measure_nothing_and_are_saved(tmp_path, in_this_process, monkeypatch):
    figures = sizes.figures_of("tiny", ["plan"], tmp_path / "tiny", [64])
    dense = {f"train 64 tokens, {name}" for name in sizes.DENSE}
    assert {*figures} == {*dense, "train 64 tokens, fast", "run"}
    assert all({*found} == {"planned"} for found in figures.values())
    weights = lowmem.measure.theoretical_bytes(sizes.one_layer_model("tiny"))
    assert figures["train 64 tokens, all weights"]["planned"] > 4 * weights  # of float32, with gradients and moments
    monkeypatch.setattr(sizes, "STORED", tmp_path / "sizes.json")
    sizes.save("a machine", "tiny", figures)
    sizes.save("a machine", "tiny", {"run": {"planned": 7.0, "decode": 1.234}})
    stored = json.loads(sizes.STORED.read_text())
    assert stored["planned"]["tiny"] == {name: int(found["planned"]) for name, found in figures.items()} | {"run": 7}
    assert stored["measured"] == {"a machine": {"tiny": {"run": {"decode": 1.23}}}}


def test_unknown_sizes_are_refused(capsys):
    for given in (["2b"], []):
        with pytest.raises(SystemExit):
            sizes.main(given)
        assert "is not of 0.6b, 1b, 3b, 8b, tiny" in capsys.readouterr().err
