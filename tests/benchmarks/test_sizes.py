"""The benchmark of sizes: its models are what transformers and lowmem read, and its table says what was measured."""

import pytest
import torch

from benchmarks import sizes
from tests.benchmarks.test_resident import needs_high_water

pytest.importorskip("transformers")


@pytest.fixture
def few_cells(monkeypatch):
    monkeypatch.setattr(sizes, "LENGTHS", (64,))
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
    rows = sizes.rows_of("tiny", ["train", "run", "quantize"], tmp_path / "tiny")
    assert [row[1] for row in rows] == ["quantize", "train 64 tokens, fast", "run"]
    for _, what, planned, peak, _ in rows:
        assert (planned == "") == (what == "quantize")
        assert float(peak) > 0.05


def test_unknown_sizes_are_refused(capsys):
    for given in (["2b"], []):
        with pytest.raises(SystemExit):
            sizes.main(given)
        assert "is not of 1b, 3b, 8b, tiny" in capsys.readouterr().err
