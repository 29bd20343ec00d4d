"""Folding adapters gives a copy of a module; the module does not change."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lowmem import FourBit, Half, LoRA, convert
from lowmem.nn.fold import merged_copy_and_errors, unadapted_shallow_copy
from lowmem.nn.linear import GatheredLinear4Bit
from tests.nn.test_gathered_weight import layer as gathered_layer
from tests.rounding import stored_weight

MADE = {
    "dense": lambda: nn.Linear(32, 8),
    "half": lambda: convert(nn.Linear(32, 8), Half(torch.bfloat16)),
    "nf4": lambda: convert(nn.Linear(32, 8), FourBit("nf4", 16)),
    "gathered": lambda: gathered_layer()[0],
}


def adapted(name):
    torch.manual_seed(0)
    layer = convert(MADE[name](), LoRA(2, alpha=4)).eval()
    nn.init.normal_(layer.lora_b)
    return layer


@pytest.mark.parametrize("to", [None, torch.float64])
@pytest.mark.parametrize("name", MADE)
def test_a_folded_copy_computes_what_the_layer_does_but_for_storing_the_sum(name, to):
    layer, x = adapted(name), torch.randn(3, 32)
    kind, before = type(layer), copy.deepcopy(layer.state_dict())
    folded, errors = merged_copy_and_errors(layer, ["default"], to)
    assert type(folded) is (nn.Linear if to else layer._plain_class)
    expected = layer(x).to(to or torch.float32)
    lost, wide = (folded(x.to(expected.dtype)) - expected).norm() / expected.norm(), to is not None
    assert lost < {"dense": 1e-6, "half": 2**-7}.get(name, 0.3) if not wide else lost < 1e-6
    assert errors["weight"][0] > errors["weight"][1] >= 0
    assert type(layer) is kind
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    layer.lora_b.data.zero_()
    kept, errors = merged_copy_and_errors(layer, ["default"])
    assert errors["weight"][0] == 0
    assert torch.equal(stored_weight(kept), stored_weight(layer))


@pytest.mark.parametrize("name", MADE)
def test_a_copy_without_adapters_shares_the_layer_s_parameters_and_has_no_hooks(name):
    layer, x = adapted(name), torch.randn(3, 32)
    layer.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    plain = unadapted_shallow_copy(layer)
    assert type(plain) is layer._plain_class
    assert plain._parameters.keys() == layer._parameters.keys()
    assert all(value is layer._parameters[key] for key, value in plain._parameters.items())
    assert [*plain.children()] == []
    assert torch.equal(plain(x), plain.forward(x))
    plain.load_state_dict(plain.state_dict())


def test_an_adapted_gathered_layer_copies_and_pickles():
    layer, x = adapted("gathered"), torch.randn(3, 32)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(other, GatheredLinear4Bit)
        assert torch.equal(other(x), layer(x))
