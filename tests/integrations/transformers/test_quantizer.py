"""Folders that lowmem did not write as they are, and what models of transformers can do afterwards."""

import copy
import json
import pickle
import weakref

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import lowmem
from lowmem import FourBit, Half, resident
from lowmem.integrations.transformers import LowmemConfig
from tests.integrations.transformers.folders import IDS, assert_same, load, write


@pytest.fixture
def small(tmp_path):
    """Return a folder of stored weights."""
    model = load(write(tmp_path / "dense"), quantization_config=LowmemConfig(FourBit("nf4")))
    model.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_free_pages_are_returned_after_loading(small, tmp_path, monkeypatch):
    trims = []
    monkeypatch.setattr(resident, "_malloc_trim", lambda: trims.append)
    monkeypatch.setattr(resident, "_SMALL", 1)
    load(tmp_path / "dense", quantization_config=LowmemConfig(FourBit("nf4")))
    load(small)
    assert trims == [0, 0]


def change(folder, **weights):
    """Change tensors of a folder; None removes one."""
    state = load_file(folder / "model.safetensors")
    state |= {name: value for name, value in weights.items() if value is not None}
    save_file(
        {n: v for n, v in state.items() if weights.get(n, v) is not None},
        folder / "model.safetensors",
        {"format": "pt"},
    )


NAME = "model.layers.1.mlp.up_proj"


def test_a_folder_without_a_part_is_refused(small):
    change(small, **{f"{NAME}.weight_scales": None})
    with pytest.raises(ValueError, match=f"the folder lacks {NAME}.weight_scales"):
        load(small)


def test_a_part_of_another_shape_is_refused(small):
    change(small, **{f"{NAME}.weight_packed": torch.zeros(96, 8, dtype=torch.uint8)})
    with pytest.raises(RuntimeError, match="mismatched"):
        load(small)


def test_a_part_of_another_dtype_is_refused(small, tmp_path):
    """A byte may be a number of another kind, as may be 16 bits; shapes do not tell."""
    scales = load(small).state_dict()[f"{NAME}.weight_scales"]
    change(small, **{f"{NAME}.weight_scales": scales.view(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=rf"{NAME}.weight_scales is torch.float8_e4m3fn .* says torch.uint8: get it"):
        load(small)
    half = load(tmp_path / "dense", quantization_config=LowmemConfig(Half(torch.bfloat16)))
    half.save_pretrained(tmp_path / "half")
    rounded = half.state_dict()[f"{NAME}.weight_rounded"]
    change(tmp_path / "half", **{f"{NAME}.weight_rounded": rounded.view(torch.float16)})
    with pytest.raises(ValueError, match=rf"{NAME}.weight_rounded is torch.float16 .* says torch.bfloat16: get it"):
        load(tmp_path / "half")


def test_codes_of_another_format_are_refused(small):
    text = b"int4, block_size=64, scales=double"
    change(small, **{f"{NAME}._extra_state": torch.tensor(list(text), dtype=torch.uint8)})
    with pytest.raises((ValueError, RuntimeError), match="int4"):
        load(small)


def test_a_config_that_is_wrong_is_refused(small):
    file = small / "config.json"
    config = json.loads(file.read_text())

    def edited(edit):
        changed = copy.deepcopy(config)
        edit(changed["quantization_config"])
        file.write_text(json.dumps(changed))
        return pytest.raises(ValueError, match=r"\w")

    with edited(lambda c: c.update(layers=[{**c["layers"][0], "names": ["nowhere"]}])) as refused:
        load(small)
    assert "names no module that LlamaForCausalLM has" in str(refused.value)
    with edited(lambda c: c["layers"][0].pop("names")) as refused:
        load(small)
    assert "without the names of its weights" in str(refused.value)
    with edited(lambda c: c["layers"][0].update(format="nf5")) as refused:
        load(small)
    assert "format='nf5'" in str(refused.value)
    with edited(lambda c: c.update(version=7)) as refused:
        load(small)
    assert "upgrade lowmem" in str(refused.value)


def test_weights_on_disk_are_refused_while_they_are_stored(tmp_path):
    with pytest.raises(ValueError, match="load and save the model without it first"):
        load(
            write(tmp_path),
            quantization_config=LowmemConfig(FourBit()),
            device_map={"model": "cpu", "lm_head": "disk"},
        )


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


def test_scales_that_lie_at_odd_addresses_are_read(tmp_path):
    """transformers maps files, in which bytes lie anywhere; float32 scales need addresses that 4 divides."""
    model = lowmem.convert(load(write(tmp_path / "dense")), FourBit("nf4", 32, "float32"))
    model.save_pretrained(tmp_path / "small")
    change(tmp_path / "small", **{f"{'a' * pad}": torch.zeros(1, dtype=torch.uint8) for pad in (1,)})
    again = load(tmp_path / "small")
    assert_same(again, model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    scales = [value for name, value in again.named_parameters() if name.endswith("_scales")]
    assert all(value.data_ptr() % 4 == 0 for value in scales)


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


def test_a_technique_is_needed_for_a_dense_folder(tmp_path):
    with pytest.raises(ValueError, match="has no technique, and the folder is dense"):
        load(write(tmp_path), quantization_config=LowmemConfig(layers=[{"names": []}]))


def test_half_precision_keeps_its_own_dtype(tmp_path):
    model = load(write(tmp_path / "dense", "gpt2"), quantization_config=LowmemConfig(Half(torch.bfloat16)))
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "small")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "float32"
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto"), model)


def test_none_asks_for_what_a_folder_says_unless_it_is_an_auto_class(small):
    """AutoConfig takes None for what config.json says: the shapes are then another model's."""
    model = load(small)
    assert_same(load(small, as_class=LlamaForCausalLM, quantization_config=None), model)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(small, quantization_config=None)


def test_a_config_that_does_not_say_how_weights_are_stored_is_refused(small, tmp_path):
    config = AutoConfig.from_pretrained(tmp_path / "dense")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(small, config=config)
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
