"""Which quantizer a load gets: other programs' folders and files keep their codes, or are refused with the remedy."""

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from lowmem import FourBit
from lowmem.integrations.transformers import LowmemConfig
from tests.integrations.transformers.folders import assert_same, load, write
from tests.integrations.transformers.foreign import write_foreign


def test_a_folder_that_another_program_quantized_is_not_quantized_again(tmp_path):
    with pytest.raises(ValueError, match=r"that 'awq' quantized has weights.*LowmemConfig\('exact'\) keeps"):
        load(write_foreign(tmp_path, "awq"), quantization_config=LowmemConfig(FourBit("nf4")))


def test_a_gguf_file_is_not_quantized_again(tmp_path):
    with pytest.raises(ValueError, match=r"GGUF file 'a.gguf' has weights.*LowmemConfig\('exact'\) keeps"):
        load(
            write(tmp_path),
            gguf_file="a.gguf",
            config=load(tmp_path).config,
            quantization_config=LowmemConfig(FourBit()),
        )


def test_a_folder_that_lowmem_wrote_is_exact_already(tmp_path):
    load(write(tmp_path / "dense"), quantization_config=LowmemConfig(FourBit("nf4"))).save_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match="already has a"):
        found = load(tmp_path / "a", quantization_config=LowmemConfig("exact"))
    assert_same(found, load(tmp_path / "a"))


def test_weights_on_disk_are_refused_and_on_one_device_are_not(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: tox -e transformers")
    folder, config = write_foreign(tmp_path, "gptq"), LowmemConfig("exact")
    for where in ("cpu", {"": "cpu"}, "auto"):
        model = load(folder, quantization_config=config, device_map=where)
        assert_same(model, load(folder, quantization_config=config))
    places = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="load and save the model without it first"):
        load(folder, quantization_config=config, device_map=places)


def test_other_loads_are_as_they_were(tmp_path):
    folder = write(tmp_path, "llama")
    model = load(folder)
    assert type(model.lm_head) is torch.nn.Linear
    assert_same(
        load(folder, quantization_config=LowmemConfig(FourBit())),
        load(folder, quantization_config=LowmemConfig(FourBit())),
    )
