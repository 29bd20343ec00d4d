"""The names and shapes of PEFT's tensors by lowmem's places, and what PEFT cannot adapt."""

import pytest
import torch
from torch import nn

from lowmem import FourBit, convert
from lowmem.io.formats.peft.layers import Layers, dense_parameters
from tests.io.formats.peft_model import Experts, Parts, parts
from tests.selection import rows_in_one_case


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


def names(modules=(), parameters=()):
    return [tuple(slot.keys.values()) for slot in Layers(Parts(), modules, parameters).slots]


def test_names_are_those_of_peft():
    assert names(["embed"]) == [
        ("base_model.model.embed.lora_embedding_A", "base_model.model.embed.lora_embedding_B")
    ]
    start = "base_model.model.inner.fc.lora_"
    assert names(["inner.fc"]) == [(f"{start}A.weight", f"{start}B.weight")]
    up, down = names(parameters=["experts.down", "experts.up"])
    assert up[0] == "base_model.model.experts.base_layer.lora_A.weight"
    assert down[1] == "base_model.model.experts.lora_B.weight"


def test_what_lies_inside_of_an_adapted_module_is_named_behind_its_base_layer():
    layers = Layers(Parts(), ["fc"], ["attention.in_proj_weight", "experts.up", "experts.down"])
    assert layers.inner_key("attention.out_proj") == "base_model.model.attention.base_layer.out_proj"
    assert layers.inner_key("attention") == "base_model.model.attention.base_layer"
    assert layers.inner_key("experts") == "base_model.model.experts.base_layer.base_layer"
    assert layers.inner_key("fc") == "base_model.model.fc.base_layer"
    assert layers.inner_key("head") == "base_model.model.head"


def test_shapes_and_orders_are_those_of_peft():
    slots = {slot.place: slot for slot in Layers(Parts(), ["fc", "embed", "conv"], ["experts.up"]).slots}
    assert slots["fc"].shapes(2) == {"lora_a": (2, 8), "lora_b": (8, 2)}
    assert slots["embed"].shapes(2) == {"lora_a": (2, 20), "lora_b": (8, 2)}
    assert slots["conv"].shapes(2) == {"lora_a": (2, 8, 3), "lora_b": (8, 2, 1)}
    assert slots["experts.up"].shapes(2) == {"lora_a": (6, 8), "lora_b": (12, 6)}
    assert slots["experts.up"].shapes(10**18)["lora_a"] == (3 * 10**18, 8)
    a, b = torch.arange(48.0).view(3, 2, 8), torch.arange(72.0).view(3, 12, 2)
    wide_a, wide_b = slots["experts.up"].to_file("lora_a", a), slots["experts.up"].to_file("lora_b", b)
    for expert in range(3):
        for rank in range(2):
            assert torch.equal(wide_a[expert * 2 + rank], a[expert, rank])
            assert torch.equal(wide_b[:, rank * 3 + expert], b[expert, :, rank])
    for slot in slots.values():
        for part, shape in slot.shapes(2).items():
            value = torch.arange(float(torch.Size(shape).numel())).view(shape)
            assert torch.equal(slot.to_file(part, slot.from_file(part, value, 2)), value)


@rows_in_one_case(
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
        Layers(Others(), modules, parameters)


def test_parameters_of_stored_modules_have_the_names_and_order_of_dense_ones():
    for module in (parts().float().experts, nn.MultiheadAttention(8, 2), nn.Linear(8, 8)):
        expected = [name for name, one in module._parameters.items() if one is not None]
        holder = convert(nn.ModuleDict({"one": module}), FourBit(block_size=8), where=lambda *_: True)
        found = dense_parameters(holder["one"])
        assert set(found) == set(expected)
        stored = [name for name in expected if name in holder["one"].forms]
        assert [name for name in found if name in stored] == stored
