"""Folders that lowmem did not write as they are, and what models of transformers can do afterwards."""

import copy
import json
import pickle
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import lowmem
from lowmem import FourBit, Half, resident
from lowmem.integrations.transformers import LowmemConfig
from tests.integrations.transformers.folders import IDS, assert_same, load, write


def test_free_pages_are_returned_after_loading(small, tmp_path, monkeypatch):
    trims = []
    monkeypatch.setattr(resident, "_malloc_trim_function_or_none", lambda: trims.append)
    monkeypatch.setattr(resident, "_SMALL", 1)
    load(tmp_path / "dense", quantization_config=LowmemConfig(FourBit("nf4")))
    load(small)
    assert trims == [0, 0]


def test_a_dense_folder_refuses_weights_on_disk_and_a_config_without_a_technique(tmp_path):
    folder, disk = write(tmp_path), {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="load and save the model without it first"):
        load(folder, quantization_config=LowmemConfig(FourBit()), device_map=disk)
    with pytest.raises(ValueError, match="has no technique, and the folder is dense"):
        load(folder, quantization_config=LowmemConfig(layers=[{"names": []}]))


@pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning", "default::UserWarning")
def test_device_maps(small, tmp_path):
    """Of one device while weights are stored; a stored model can be offloaded to disk, too."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: tox -e transformers")
    config = LowmemConfig(FourBit("nf4"))
    model = load(small)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        assert_same(load(tmp_path / "dense", quantization_config=config, device_map=device_map), model)
        assert_same(load(small, device_map=device_map), model)
    places = dict.fromkeys(
        ("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb", "model.layers.0"), "cpu"
    )
    disk = load(small, device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path / "offloaded")
    assert torch.equal(disk(IDS).logits, model(IDS).logits)


def test_it_does_what_a_dense_model_does(small, tmp_path):
    model = load(small)
    assert not model.is_quantized
    assert model.half().dtype == torch.float16
    assert_same(copy.deepcopy(load(small)), load(small))
    model = load(small)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    dense = load(small).dequantize()
    assert torch.equal(dense.lm_head.weight, model.lm_head.weight.dequantize())
    dense.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.parametrize(
    ("made", "dtype"),
    [("saved", None), ("loaded", "bfloat16"), ("converted", None), ("copied", torch.bfloat16), ("saved", "float64")],
)
def test_dequantize_gives_a_dense_model_that_runs_in_the_dtype(small, tmp_path, made, dtype):
    if made == "converted":
        model = lowmem.convert(load(tmp_path / "dense"), FourBit("nf4"))
    else:
        model = load(small)
        if made == "saved":  # which leaves the name of a dtype in the config
            model.save_pretrained(tmp_path / "again")
    if made == "copied":
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    dense = model.dequantize() if dtype is None else model.dequantize(dtype)
    wanted = {None: torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}.get(dtype, dtype)
    assert {one.dtype for one in dense.parameters()} == {wanted}
    assert type(dense.lm_head) is torch.nn.Linear
    assert dense(IDS).logits.dtype == wanted
    assert not hasattr(dense, "hf_quantizer")
    dense.save_pretrained(tmp_path / "out")
    assert_same(load(tmp_path / "out", dtype="auto"), dense)


def test_dequantize_names_what_is_no_dtype(small):
    model = load(small)
    with pytest.raises(TypeError, match="dtype='bfloat17' must be a floating-point dtype"):
        model.dequantize("bfloat17")
    assert model.hf_quantizer is not None
    model.bfloat16()
    assert {one.dtype for one in model.dequantize().parameters()} == {torch.bfloat16}  # the model's, as it is now


def test_quantizers_of_others_and_models_inside_of_models_keep_theirs(small, tmp_path):
    model = load(tmp_path / "dense")
    wrapped = torch.nn.Sequential(model)
    lowmem.convert(wrapped, FourBit("nf4"))
    first = model.hf_quantizer
    assert not hasattr(model.model, "hf_quantizer")
    lowmem.restore(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "again", state_dict=state)  # which transformers ignores with a quantizer
    assert_same(load(tmp_path / "again"), model)
    lowmem.convert(model, FourBit("nf4"))
    assert model.hf_quantizer is not first
    assert load(small).hf_quantizer.pre_quantized
    kept = weakref.ref(model)
    del model, wrapped
    assert kept() is None  # without a garbage collection


@pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning", "default::UserWarning")
def test_it_generates(small):
    """With dynamic and static caches, by itself and in a pipeline: what the dense weights generate."""
    model = load(small)
    dense = load(small).dequantize()
    expected = dense.generate(IDS, max_new_tokens=6, do_sample=False)
    for more in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, **more), expected)


def test_half_precision_keeps_its_own_dtype(tmp_path):
    model = load(write(tmp_path / "dense", "gpt2"), quantization_config=LowmemConfig(Half(torch.bfloat16)))
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "small")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "float32"
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto"), model)


def test_none_asks_a_class_of_a_model_for_what_a_folder_says(small):
    assert_same(load(small, as_class=LlamaForCausalLM, quantization_config=None), load(small))


def test_a_config_that_does_not_say_how_weights_are_stored_is_refused(small, tmp_path):
    config = AutoConfig.from_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"weights of .*small' are stored by lowmem.*leave out config="):
        load(small, config=config, quantization_config=LowmemConfig(FourBit("nf4")))
    state = {name: value.detach() for name, value in load(tmp_path / "dense").state_dict().items()}
    made = type(load(small)).from_pretrained(None, config=config, state_dict=state)
    assert_same(made, load(tmp_path / "dense"))


def test_other_loads_are_as_they_were(tmp_path):
    folder = write(tmp_path, "llama")
    model = load(folder)
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model) is LlamaForCausalLM
    config = LowmemConfig(FourBit())
    assert_same(load(folder, quantization_config=config), load(folder, quantization_config=config))
