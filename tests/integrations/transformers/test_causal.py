"""What is known of a folder before its weights are read."""

import json

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

import lowmem
from lowmem import FileError
from lowmem.integrations.transformers.causal import factory_of, sizes_of, stored_by
from tests.integrations.transformers.folders import load, write


def test_sizes_and_who_stored_it(tmp_path):
    for kind in ("llama", "gpt2"):
        folder = write(tmp_path / kind, kind)
        assert sizes_of(folder) == (258, 64, 64)
        assert stored_by(folder) is None
    model = lowmem.convert(load(folder), lowmem.FourBit("nf4"))
    model.save_pretrained(tmp_path / "stored")
    assert stored_by(tmp_path / "stored") == "lowmem"
    lowmem.add_adapter(model, "default", lowmem.LoRA(2)).save_pretrained(tmp_path / "adapted")
    with pytest.raises(FileError, match="its model has an adapter already, as of 'transformer.h.0"):
        stored_by(tmp_path / "adapted")
    lowmem.save_adapter(model, tmp_path / "adapter", format="peft")
    with pytest.raises(FileError, match="it has an adapter \\(adapter_config.json\\)"):
        stored_by(tmp_path / "adapter")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    assert stored_by(folder) == "gptq"
    config.write_text("{}")
    with pytest.raises(FileError, match=r"its config.json is of no language model"):
        sizes_of(folder)


def test_the_dense_model_is_made_of_the_config(tmp_path):
    make = factory_of(write(tmp_path / "llama", dtype=torch.bfloat16))
    with torch.device("meta"):
        made = make()
    assert {one.dtype for one in made.parameters()} == {torch.float32}
    assert next(made.parameters()).is_meta
