"""The errors of outputs that merging leaves, for layers and the whole model."""

import pytest
import torch
from torch import nn

from lowmem import FourBit, LoRA, convert
from lowmem.transforms.merge_adapters import first_path_by_adapted_layer, merged_copy_and_errors_by_layer
from lowmem.transforms.merge_output_errors import layer_output_errors_and_model_error


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
    layers = first_path_by_adapted_layer(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = merged_copy_and_errors_by_layer(model, dict.fromkeys(layers, ("default",)))
    of_layers, whole = layer_output_errors_and_model_error(model, folded, x, None)
    assert of_layers.keys() == layers.keys()
    for without, merged in (*of_layers.values(), whole):
        assert merged <= most < 5 * without
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Reading(nn.Module):
    """Calls a layer that it holds in a list, too, reads the weight of another, and attends."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.attention = nn.Linear(16, 16), nn.Linear(16, 16), nn.MultiheadAttention(16, 2)

    def forward(self, x):
        self.seen = [(type(one), vars(one)) for one in self.held]
        x = self.held[0](x) + nn.functional.linear(x, self.read.weight, self.read.bias)
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("to", [None, torch.bfloat16])
def test_layers_are_what_they_were_while_merged_copies_compute(to):
    torch.manual_seed(0)
    model = convert(Reading(), LoRA(4), where=lambda *_: True).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.3)
    model.held, called = [model.called], []
    model.called.register_forward_hook(lambda *_: called.append(1))
    kind, own, children = type(model.called), vars(model.called), [*model.modules()]
    x, layers = torch.randn(3, 2, 16), first_path_by_adapted_layer(model)
    expected = model(x)
    folded = merged_copy_and_errors_by_layer(model, dict.fromkeys(layers, ("default",)), to)
    _, (before, after) = layer_output_errors_and_model_error(model, folded, x, to)
    assert [(one is kind, attributes is own) for one, attributes in model.seen] == [(True, True)]
    assert [*model.modules()] == children
    assert called == [1] * 4  # once above, exactly, without adapters, and merged
    assert torch.equal(model(x), expected)
    assert before > 0.1
    assert after < 1e-5 if to is None else 2**-12 < after < 2**-5
