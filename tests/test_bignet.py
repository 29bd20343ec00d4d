"""BigNet is what the results speak of."""

import pytest
import torch

from lowmem import BigNet, measure


def test_parameters_and_bytes_are_exact():
    model = BigNet()
    assert measure.counts(model).total == 18_903_040
    assert measure.theoretical_bytes(model) == 75_612_160
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("Linear") == 18
    assert kinds.count("LayerNorm") == 5


@pytest.mark.parametrize("shape", [(1024,), (0, 1024), (2, 3, 1024)])
def test_it_maps_1024_channels_to_1024(shape):
    assert BigNet()(torch.randn(shape)).shape == shape


def test_a_block_adds_its_input():
    block = BigNet()[0]
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 1024)
    assert torch.equal(block(x), x)
