"""The errors of outputs that merging leaves, for layers and the whole model."""

import pytest
import torch
from torch import nn

from lowmem import FourBit, LoRA, convert
from lowmem.transforms.merge import adapted_layers, fold
from lowmem.transforms.merge_errors import output_errors


def adapted(*techniques):
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), *techniques, LoRA(4))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(("techniques", "most"), [((), 1e-6), ((FourBit("nf4"),), 0.2)])
def test_merging_leaves_the_error_of_storing_the_sum_alone(techniques, most):
    model, x = adapted(*techniques), torch.randn(5, 64)
    layers = adapted_layers(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold(model, dict.fromkeys(layers, ("default",)))
    of_layers, whole = output_errors(model, folded, x, None)
    assert of_layers.keys() == layers.keys()
    for without, merged in (*of_layers.values(), whole):
        assert merged <= most < 5 * without
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
