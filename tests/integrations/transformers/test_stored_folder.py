"""A folder of stored weights is read as it was written; parts and records that do not fit are refused."""

import copy
import json

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from safetensors.torch import load_file, save_file

import lowmem
from lowmem import FourBit, Half
from lowmem.integrations.transformers import LowmemConfig
from tests.integrations.transformers.folders import IDS, assert_same, load, write


@pytest.fixture
def small(tmp_path):
    """Return a folder of stored weights."""
    model = load(write(tmp_path / "dense"), quantization_config=LowmemConfig(FourBit("nf4")))
    model.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


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
