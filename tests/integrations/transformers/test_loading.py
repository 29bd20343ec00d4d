"""Which quantizer a load gets: other programs' folders and files keep their codes, or are refused with the remedy."""

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from transformers import AutoConfig

from lowmem import FourBit
from lowmem.integrations.transformers import LowmemConfig
from tests.integrations.transformers.folders import assert_same, load, write
from tests.integrations.transformers.foreign import write_foreign


def test_a_folder_that_another_program_quantized_is_not_quantized_again(tmp_path):
    with pytest.raises(ValueError, match=r"that 'awq' quantized has weights.*LowmemConfig\('exact'\) keeps"):
        load(write_foreign(tmp_path, "awq"), quantization_config=LowmemConfig(FourBit("nf4")))


def test_a_gguf_file_is_not_quantized_again(tmp_path):
    with pytest.raises(ValueError, match=r"GGUF file 'a.gguf' may have weights.*LowmemConfig\('exact'\) keeps"):
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


def test_none_asks_for_what_the_folder_says(tmp_path):
    """transformers' AutoConfig takes None for what config.json says, and the weights would be random."""
    load(write(tmp_path / "dense"), quantization_config=LowmemConfig(FourBit("nf4"))).save_pretrained(tmp_path / "a")
    found = load(tmp_path / "a", quantization_config=None)
    assert_same(found, load(tmp_path / "a"))
    assert AutoConfig.from_pretrained(tmp_path / "dense", quantization_config=None).vocab_size == 258
    other = write_foreign(tmp_path / "b", "awq")
    assert AutoConfig.from_pretrained(other, quantization_config=None).quantization_config is None


def test_a_config_that_does_not_say_how_weights_are_stored_is_refused(tmp_path):
    dense = write(tmp_path / "dense")
    small = load(dense, quantization_config=LowmemConfig(FourBit("nf4")))
    small.save_pretrained(tmp_path / "a", max_shard_size="20kB")
    config = AutoConfig.from_pretrained(dense)
    for asked in ({"config": config}, {"config": config, "quantization_config": LowmemConfig(FourBit("nf4"))}):
        with pytest.raises(ValueError, match=r"weights of .*a' are stored by lowmem.*leave out config="):
            load(tmp_path / "a", **asked)
    state = {name: value.detach() for name, value in load(dense).state_dict().items()}
    assert_same(type(small).from_pretrained(None, config=config, state_dict=state), load(dense))


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
