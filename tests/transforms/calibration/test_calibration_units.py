"""Blocks are found by their shape or by name; what cannot be run one by one is done layer by layer, or refused."""

import pytest
import torch
from torch import nn

from lowmem import BigNet
from lowmem.transforms.calibration.calibration_units import run_and_group_into_units, select_block_lists


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


def linear_layers(model):
    return [module for module in model.modules() if type(module) is nn.Linear]


def found(model, blocks=None):
    paths = {module: path for path, module in model.named_modules()}
    return [[paths[block] for block in one] for one in select_block_lists(model, linear_layers(model), blocks)]


class Two(nn.Module):
    """An encoder and a decoder, and heads; inside of blocks a list of experts."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(Block() for _ in range(3))
        self.decoder = nn.Sequential(*(Block() for _ in range(2)))
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 2), "b": nn.Linear(8, 3)})
        for block in self.decoder:
            block.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))


def test_blocks_are_what_a_list_holds_of_one_type():
    two = ["encoder.0", "encoder.1", "encoder.2"], ["decoder.0", "decoder.1"]
    assert found(Two()) == [list(one) for one in two]
    assert found(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))) == [["0", "2"]]
    assert found(nn.Sequential(nn.Linear(8, 8), Block())) == []
    assert found(nn.Sequential(Block())) == []
    assert found(nn.Linear(8, 8)) == []
    big = found(BigNet())
    assert [len(one) for one in big] == [6]


def test_blocks_by_name_are_the_outermost():
    assert found(Two(), "*coder.*") == [["encoder.0", "encoder.1", "encoder.2"], ["decoder.0", "decoder.1"]]
    assert found(Two(), ["encoder.0", "heads.?"]) == [["encoder.0"], ["heads.a", "heads.b"]]
    assert found(Two(), ()) == []


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ("nowhere.*", ValueError, r"blocks='nowhere\.\*' matches no module of Two that holds layers"),
        (3, TypeError, "blocks=3 must be glob patterns"),
        ([None], TypeError, "must be glob patterns"),
    ],
)
def test_invalid_patterns_are_refused(blocks, error, message):
    with pytest.raises(error, match=message):
        found(Two(), blocks)


class Runs(nn.Module):
    """Calls what a list says, in its order."""

    def __init__(self, order, count=3):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.order = order

    def forward(self, x):
        x = self.first(x)
        for number in self.order:
            x = self.blocks[number](x)
        return self.last(x)


def units(model, lists=None, asked=False, batches=None):
    paths = {module: path for path, module in model.named_modules()}
    layers = linear_layers(model)
    lists = select_block_lists(model, layers, None) if lists is None else lists
    made = run_and_group_into_units(
        model, batches or [torch.randn(5, 8)], layers, lists, {model.first}, blocks_requested=asked
    )
    return [(paths[unit.block] if unit.block else None, [paths[layer] for layer in unit.layers]) for unit in made]


def test_units_come_in_the_order_of_calls():
    assert units(Runs([2, 0])) == [
        (None, ["first"]),
        ("blocks.2", ["blocks.2.a", "blocks.2.b"]),
        ("blocks.0", ["blocks.0.a", "blocks.0.b"]),
        (None, ["last"]),
    ]


def test_layers_with_one_input_are_one_unit_unless_their_moments_differ():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.a(x) + self.first(x) + self.b(x)

    assert units(Three()) == [(None, ["a", "b"]), (None, ["first"])]


def test_blocks_that_are_called_again_are_done_layer_by_layer_or_refused():
    model = Runs([0, 1, 0])
    inside = [(None, [f"blocks.{number}.{name}"]) for number in (0, 1) for name in "ab"]
    assert units(model) == [(None, ["first"]), *inside, (None, ["last"])]
    with pytest.raises(
        ValueError, match=r"blocks\.0 is called 2 times in one run: name other blocks, or blocks=\(\)"
    ):
        units(model, asked=True)


def test_a_layer_of_several_blocks_or_called_outside_is_no_blocks():
    model = Runs([0, 1])
    model.blocks[1].a = model.blocks[0].a
    with pytest.raises(ValueError, match=r"blocks\.0\.a is in several blocks"):
        units(model, asked=True)
    model = Runs([0, 1])
    model.first.register_forward_hook(lambda *_: (model.blocks[1].a(torch.ones(1, 8)), None)[1])
    with pytest.raises(ValueError, match=r"blocks\.1\.a is called outside of its block, too"):
        units(model, asked=True)
    assert not model.blocks[0]._forward_hooks


def test_layers_that_the_first_batch_does_not_reach_come_last():
    class Maybe(Runs):
        def forward(self, x):
            return super().forward(x) if len(x) > 2 else self.blocks[1](x)

    order = units(Maybe([0, 1]), batches=[torch.randn(2, 8), torch.randn(5, 8)])
    assert order == [("blocks.1", ["blocks.1.a", "blocks.1.b"]), (None, ["first"]), (None, ["last"])]
