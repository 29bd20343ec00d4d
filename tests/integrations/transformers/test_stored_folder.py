"""A folder of stored weights is read as it was written; parts and records that do not fit are refused."""

import copy

import pytest
import torch

import lowmem
from lowmem import FourBit, Half
from lowmem.integrations.transformers import LowmemConfig
from tests.integrations.transformers.folders import IDS, assert_same, change_config, change_weights, load, write

NAME = "model.layers.1.mlp.up_proj"


INT4 = torch.tensor(list(b"int4, block_size=64, scales=double"), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("part", "made", "says"),
    [
        ("weight_scales", lambda _: None, f"the folder lacks {NAME}.weight_scales"),
        ("weight_packed", lambda _: torch.zeros(96, 8, dtype=torch.uint8), "mismatched"),
        (
            "weight_scales",
            lambda one: one.view(torch.float8_e4m3fn),
            "scales is torch.float8_e4m3fn .* torch.uint8: get",
        ),
        ("_extra_state", lambda _: INT4, "int4"),
    ],
    ids=["none", "another shape", "another dtype", "another format"],
)
def test_a_part_that_does_not_fit_is_refused(small, part, made, says):
    """A byte may be a number of another kind, and codes of another format have the same shape."""
    change_weights(small, {f"{NAME}.{part}": made(load(small).state_dict()[f"{NAME}.{part}"])})
    with pytest.raises((ValueError, RuntimeError), match=says):
        load(small)


def test_16_bits_of_another_dtype_are_refused(tmp_path):
    write(tmp_path / "dense")
    half = load(tmp_path / "dense", quantization_config=LowmemConfig(Half(torch.bfloat16)))
    half.save_pretrained(tmp_path / "half")
    rounded = half.state_dict()[f"{NAME}.weight_rounded"]
    change_weights(tmp_path / "half", {f"{NAME}.weight_rounded": rounded.view(torch.float16)})
    with pytest.raises(ValueError, match=rf"{NAME}.weight_rounded is torch.float16 .* says torch.bfloat16: get it"):
        load(tmp_path / "half")


def test_a_config_that_is_wrong_is_refused(small):
    config = change_config(small)
    for edit, says in (
        (
            lambda c: c.update(layers=[{**c["layers"][0], "names": ["nowhere"]}]),
            "names no module that Llama",
        ),
        (lambda c: c["layers"][0].pop("names"), "without the names of its weights"),
        (lambda c: c["layers"][0].update(format="nf5"), "format='nf5'"),
        (lambda c: c.update(version=7), "upgrade lowmem"),
    ):
        changed = copy.deepcopy(config)
        edit(changed["quantization_config"])
        change_config(small, **changed)
        with pytest.raises(ValueError, match=says):
            load(small)


def test_scales_that_lie_at_odd_addresses_are_read(tmp_path):
    """transformers maps files, in which bytes lie anywhere; float32 scales need addresses that 4 divides."""
    model = lowmem.convert(load(write(tmp_path / "dense")), FourBit("nf4", 32, "float32"))
    model.save_pretrained(tmp_path / "small")
    change_weights(tmp_path / "small", {"a": torch.zeros(1, dtype=torch.uint8)})
    again = load(tmp_path / "small")
    assert_same(again, model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    scales = [value for name, value in again.named_parameters() if name.endswith("_scales")]
    assert all(value.data_ptr() % 4 == 0 for value in scales)
