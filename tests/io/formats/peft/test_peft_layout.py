"""What PEFT cannot adapt, and names inside of adapted modules. A file that PEFT wrote is read in test_reading.py."""

import pytest
import torch
from torch import nn

from lowmem import FourBit, convert
from lowmem.io.formats.peft.peft_layout import PeftTargetLayers, dense_parameter_names
from tests.io.formats.peft_model import Experts, Parts, parts


class Scaled(nn.Linear):
    """Computes with another weight than it has."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 2)


class Others(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 8)
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, dilation=2)
        self.circular = nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular")
        self.transposed = nn.ConvTranspose1d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.scaled = Scaled(8, 8)
        self.rnn = nn.GRU(8, 8)
        self.flat_experts = Experts()
        self.flat_experts.up = nn.Parameter(torch.empty(2, 3, 4, 5))
        self.one = nn.Linear(8, 8)
        self.two = self.one


def test_what_lies_inside_of_an_adapted_module_is_named_behind_its_base_layer():
    layers = PeftTargetLayers(Parts(), ["fc"], ["attention.in_proj_weight", "experts.up", "experts.down"])
    assert (
        layers.innermost_tensor_name_prefix("attention.out_proj") == "base_model.model.attention.base_layer.out_proj"
    )
    assert layers.innermost_tensor_name_prefix("attention") == "base_model.model.attention.base_layer"
    assert layers.innermost_tensor_name_prefix("experts") == "base_model.model.experts.base_layer.base_layer"
    assert layers.innermost_tensor_name_prefix("fc") == "base_model.model.fc.base_layer"
    assert layers.innermost_tensor_name_prefix("head") == "base_model.model.head"


@pytest.mark.parametrize(
    ("modules", "parameters", "message"),
    [
        (["bag"], [], "bag is a EmbeddingBag: PEFT does not adapt such a module: leave it out"),
        (["grouped"], [], "PEFT adapts convolutions without groups, dilation and other padding than zeros"),
        (["dilated"], [], "without groups, dilation"),
        (["circular"], [], "without groups, dilation"),
        (["transposed"], [], "PEFT does not adapt transposed convolutions"),
        (["attention"], [], "PEFT has no working adapter of out_proj, which it adds twice or not at all"),
        (["attention.out_proj"], [], "PEFT has no working adapter of out_proj"),
        (["scaled"], [], "PEFT would not add to the weight that it computes with"),
        (["rnn"], [], "PEFT does not adapt such a module"),
        (["one"], [], "one is two, too, of which PEFT would adapt one alone"),
        (["gone"], [], "it adapts gone, which the model has not: it is of another architecture"),
        ([""], [], "PEFT does not adapt a model that is a layer itself"),
        ([], ["flat_experts.up"], "flat_experts.up has 4 dimensions, and PEFT adapts parameters of 2 and 3"),
        ([], ["bag.weight"], "bag is no matrix"),
        ([], ["attention.in_proj_bias"], "attention.in_proj_bias, in a MultiheadAttention here: it is no weight"),
        (["scaled"], ["scaled.weight"], "PEFT would adapt both it and a parameter|PEFT would not add"),
    ],
)
def test_what_peft_cannot_adapt_is_refused_by_name(modules, parameters, message):
    with pytest.raises(ValueError, match=message):
        PeftTargetLayers(Others(), modules, parameters)


def test_parameters_of_stored_modules_have_the_names_and_order_of_dense_ones():
    for module in (parts().float().experts, nn.MultiheadAttention(8, 2), nn.Linear(8, 8)):
        expected = [name for name, one in module._parameters.items() if one is not None]
        holder = convert(nn.ModuleDict({"one": module}), FourBit(block_size=8), where=lambda *_: True)
        found = dense_parameter_names(holder["one"])
        assert set(found) == set(expected)
        stored = [name for name in expected if name in holder["one"].forms]
        assert [name for name in found if name in stored] == stored
