"""The importance of errors is that of the output's change, exactly where this can be computed."""

import copy
import math

import pytest
import torch
from torch import nn

from lowmem import Budget, calibrate
from lowmem.transforms.calibration.sensitivity import measure_importance_by_weight


def weights_of(model):
    return {name: (one, one.shape[-1]) for name, one in model.named_parameters() if one.dim() > 1}


def test_the_change_of_a_linear_layers_output_is_what_its_inputs_say():
    """For y = W x the expected change of an error of one number is the mean of x_j^2, whichever row it is in."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False)
    batches = [(1 + torch.randn(64, 6)) * torch.arange(1.0, 7) for _ in range(30)]
    found = measure_importance_by_weight(layer, batches, weights_of(layer))["weight"]
    x = torch.cat(batches).double()
    size = float((x @ layer.weight.detach().double().T).square().sum())
    expected = x.square().sum(0).expand(5, -1) / size  # (out, in)
    importance = found.rows[:, None] * found.columns
    # Each number is the mean of 30 squares of one normal variable: its standard deviation is sqrt(2 / 30) of it.
    assert torch.allclose(importance, expected, rtol=4 * math.sqrt(2 / 30))
    assert float(importance.sum()) == pytest.approx(float(expected.sum()), rel=4 * math.sqrt(2 / 30 / 6))


def test_padding_does_not_count_and_the_model_is_as_it_was():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.drop = nn.Dropout(0.5)

        def forward(self, hidden, attention_mask):
            return {"states": self.drop(self.layer(hidden)), "count": attention_mask.sum()}

    torch.manual_seed(0)
    model = Encoder()
    model.layer.bias.requires_grad = False
    model.layer.weight.grad = torch.ones(4, 4)
    state = copy.deepcopy(model.state_dict())
    hidden = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"hidden": hidden, "attention_mask": mask}
    found = measure_importance_by_weight(model, [batch], weights_of(model))["layer.weight"]
    padded = {**batch, "hidden": torch.where(mask[..., None] == 0, 100.0, hidden)}
    again = measure_importance_by_weight(model, [padded], weights_of(model))["layer.weight"]
    assert torch.equal(found.rows, again.rows)
    assert torch.equal(found.columns, again.columns)
    assert (model.training, model.layer.weight.requires_grad, model.layer.bias.requires_grad) == (True, True, False)
    assert torch.equal(model.layer.weight.grad, torch.ones(4, 4))
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())


def test_a_weight_that_has_no_part_in_the_output_is_left_out_and_errors_say_why():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x)
    assert measure_importance_by_weight(model, [torch.ones(1, 4)], weights_of(model)).keys() == {"used.weight"}
    with pytest.raises(ValueError, match="inputs is empty: pass one batch at least"):
        measure_importance_by_weight(model, [], weights_of(model))
    with pytest.raises(ValueError, match="used: its inputs hold NaN or infinite values"):
        measure_importance_by_weight(model, [torch.full((1, 4), math.nan)], weights_of(model))
    model["used"].weight.data.fill_(10)
    with pytest.raises(ValueError, match="used.weight: the gradients of the samples hold NaN"):
        measure_importance_by_weight(model, [torch.full((1, 4), 3e38)], weights_of(model))  # its output is infinite
    model.forward = lambda x: model["used"](x).argmax(-1)
    with pytest.raises(ValueError, match="does not depend on its weights by gradients: convert"):
        measure_importance_by_weight(model, [torch.ones(1, 4)], weights_of(model))
    assert all(one.requires_grad and one.grad is None for one in model.parameters())


def test_the_layer_with_nan_inputs_is_named():
    """Not the first of the model, of which the gradients are none either."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight.data[2] = math.inf
    batches = [torch.zeros(3, 4), torch.ones(3, 4)]
    with pytest.raises(ValueError, match=r"^2: its inputs hold NaN or infinite values: look for a broken batch or w"):
        measure_importance_by_weight(model, batches, weights_of(model))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"^2: its inputs hold NaN"):
        calibrate(model, batches, Budget(9, batches))
    assert all(type(module) in (nn.Linear, nn.LayerNorm) for module in model)
