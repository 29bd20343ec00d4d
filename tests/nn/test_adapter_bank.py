"""A bank holds the adapters of a module: by name, active or not, and one of them merged."""

import pytest
import torch
from torch import nn

from lowmem import LoRA, add_adapter, convert, deactivate, merge_adapter
from lowmem.nn.adapter import Adapter
from lowmem.nn.fold import merged_copy_and_errors


def adapted():
    layer = add_adapter(convert(nn.Linear(8, 4), LoRA(2)), "other", LoRA(3))
    for name in layer.adapters.names:
        nn.init.normal_(layer.adapters.adapters_by_parameter(name)["weight"].lora_b)
    return layer


def test_names_stand_in_the_order_of_adding_and_those_in_use_are_active_or_merged():
    layer = adapted()
    bank = layer.adapters
    assert bank.names == bank.active_or_merged_names == bank.active == ("default", "other")
    merge_adapter(layer, "default")
    deactivate(layer, "other")
    assert (bank.active_or_merged_names, bank.merged_name) == (("default",), "default")
    assert "active=default, merged=default" in repr(bank)
    bank.drop_merged_copy()
    bank.remove("default")
    assert (bank.names, bank.active_or_merged_names, bank.merged_name, bank.adapters_by_parameter("default")) == (
        ("other",),
        (),
        None,
        {},
    )


def test_parts_are_added_to_a_name_that_is_there():
    layer = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    convert(layer, LoRA(2), where=lambda path, _: path == "")
    bank, before = layer.adapters, layer.adapters.adapters_by_parameter("default")
    assert before.keys() == {"q_proj_weight", "k_proj_weight", "v_proj_weight"}
    bank.add_and_activate("more", {"q_proj_weight": before["q_proj_weight"]})
    added = Adapter(layer, LoRA(2), None, "k_proj_weight")
    bank.add_and_activate("more", {"k_proj_weight": added})
    assert bank.adapters_by_parameter("more") == {"q_proj_weight": before["q_proj_weight"], "k_proj_weight": added}
    assert bank.active == ("default", "more")


def test_a_forward_beside_a_merge_takes_a_copy_and_its_adapter_s_name_together():
    """Another thread merges while a forward reads the layer."""
    layer, x = convert(nn.Linear(8, 4), LoRA(2)), torch.randn(3, 8)
    nn.init.normal_(layer.lora_b)
    folded = merged_copy_and_errors(layer, ["default"]).layer
    expected = folded(x)

    class Merging(type(layer.adapters)):
        @property
        def active(self):
            self.adopt_merged_copy("default", folded)
            return ("default",)

    del layer.adapters.active
    layer.adapters.__class__ = Merging
    assert torch.equal(layer(x), expected)
    assert torch.equal(nn.functional.linear(x, layer.weight, layer.bias), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_reaches_the_merged_copy(dtype):
    layer, x = adapted(), torch.randn(3, 8)
    merge_adapter(layer, "default")
    expected = layer(x)
    out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert (out.double() - expected.double()).norm() < 0.02 * expected.double().norm()
