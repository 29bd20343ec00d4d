"""Layers are grouped by their paths without indices; what a group costs and loses adds up to the model's."""

import math

import pytest
import torch
from torch import nn

import lowmem
from lowmem import measure
from lowmem.report.layer_groups import LayerGroup, VariantBytesAndErrors, group_layers


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return x + self.norm(self.down(self.up(x)))


def model():
    torch.manual_seed(0)
    return nn.Sequential(*[Layer(32) for _ in range(4)], nn.Linear(32, 8))


def test_layers_of_one_role_are_one_group():
    groups = group_layers(model(), {})
    assert [(g.name, g.type, g.shape, g.layers) for g in groups] == [
        ("0-3.up", "Linear", (64, 32), 4),
        ("0-3.down", "Linear", (32, 64), 4),
        ("0-3.norm", "LayerNorm", (32,), 4),
        ("4", "Linear", (8, 32), 1),
    ]
    assert groups[0].dense_bytes == 4 * 4 * (64 * 32 + 64)
    assert groups[0].weights == 4 * (64 * 32 + 64)


def test_names_are_cleaned_for_what_draws_them():
    dense = nn.Sequential()
    dense.add_module("a\x00\u2028", type("B\x1b", (nn.Linear,), {})(4, 4))
    (group,) = group_layers(dense, {})
    assert (group.name, group.type) == (r"a\x00\u2028", r"B\x1b")


def test_bytes_add_up_to_those_of_the_models():
    dense, half = model(), lowmem.convert(model(), lowmem.Half())
    small = lowmem.convert(model(), lowmem.FourBit("nf4", block_size=32))
    groups = group_layers(
        dense, {"half": VariantBytesAndErrors.from_model(half), "nf4": VariantBytesAndErrors.from_model(small)}
    )
    assert sum(g.dense_bytes for g in groups) == measure.theoretical_bytes(dense)
    for name, converted in (("half", half), ("nf4", small)):
        assert sum(g.bytes[name] for g in groups) == measure.theoretical_bytes(converted)


def test_buffers_outside_of_layers_are_a_group_of_their_own():
    dense = model()
    dense.register_module("positions", nn.Module())
    dense.positions.register_buffer("table", torch.ones(300, 500))  # larger than the layers
    groups = group_layers(dense, {"same": VariantBytesAndErrors.from_model(dense)})
    assert groups[-1] == LayerGroup("buffers", "", (), 0, 0, 600_000, {"same": 600_000}, {"same": None})


def test_the_error_of_a_group_is_that_of_its_weights_taken_as_one():
    dense = model()
    small = lowmem.convert(model(), lowmem.FourBit("int4", block_size=16))
    (up, _, norm, head) = group_layers(dense, {"int4": VariantBytesAndErrors.from_model(small)})
    lost = size = 0.0
    for layer, stored in zip(list(dense)[:4], list(small)[:4], strict=True):
        lost += float((layer.up.weight.detach() - stored.up.quantized.dequantize()).double().square().sum())
        size += float(layer.up.weight.detach().double().square().sum())
    assert up.errors["int4"] == pytest.approx(math.sqrt(lost / size), rel=1e-3)
    assert head.errors["int4"] == pytest.approx(small[4].weight_error, rel=1e-9)
    assert norm.errors == {"int4": None}  # it stays dense
    assert norm.bytes == {"int4": norm.dense_bytes}


def test_layers_of_one_path_and_several_shapes_are_told_apart_by_their_shapes():
    groups = group_layers(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 8)), {})
    assert [g.name for g in groups] == ["0,2", "1,3"]
    mixed = nn.ModuleList([nn.Linear(8, 4 if n in (0, 1, 3, 6, 9) else 5) for n in (*range(9), 9)])
    assert [g.name for g in group_layers(mixed, {})] == ["0...9", "2...8"]
    crossed = nn.ModuleList(
        [nn.ModuleList([nn.Linear(8, 1 + (row + column) % 2) for column in range(2)]) for row in range(2)]
    )
    assert [g.name for g in group_layers(crossed, {})] == ["0,1.0,1 (1 x 8)", "0,1.0,1 (2 x 8)"]
