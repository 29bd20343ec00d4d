"""Steps inside backward are those after it, without all gradients at once."""

import copy

import pytest
import torch
from torch import nn

from lowmem import AdamW8bit, FourBit, LoRA, adapter_parameter_groups, convert, step_in_backward
from lowmem.measure import PeakMemory


def make(depth=4):
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(64, 64), nn.Tanh())))


def train(model, optimizer, steps=4):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda model: AdamW8bit(model.parameters(), lr=0.01),
        lambda model: torch.optim.AdamW(adapter_parameter_groups(convert(model, FourBit(), LoRA(2)), 4.0, lr=0.01)),
    ],
    ids=["adamw", "sgd", "8-bit", "lora+"],
)
def test_it_is_the_same_training(optimizer):
    models = [make(), make()]
    after = optimizer(models[0])
    inside = optimizer(models[1])
    if any(isinstance(one, nn.Module) and hasattr(one, "adapters") for one in models[0].modules()):
        models[1].load_state_dict(models[0].state_dict())
    handle = step_in_backward(inside)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step)) for one in (after, inside)]
    for _ in range(3):
        for model, one, schedule in zip(models, (after, inside), schedules, strict=True):
            train(model, one, 1)
            schedule.step()
    assert all(p.grad is None for p in models[1].parameters())
    assert len(inside.param_groups) == len(after.param_groups)
    assert handle.release() is inside
    for model, one in zip(models, (after, inside), strict=True):
        train(model, one, 1)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    resumed = optimizer(make())
    resumed.load_state_dict(inside.state_dict())


def test_gradients_never_all_live_at_once():
    peaks = []
    for inside in (False, True):
        model = make(depth=12)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if inside:
            step_in_backward(optimizer)
        train(model, optimizer, 1)
        with PeakMemory() as memory:
            train(model, optimizer, 1)
        peaks.append(memory.peak)
    gradients = 12 * 4 * 64 * 64
    assert peaks[1] <= peaks[0] - gradients * 0.6  # of 12 layers; momentary tensors of a step are as large as a few


def test_accumulation_is_refused():
    model, x = make(), torch.randn(4, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    handle = step_in_backward(optimizer)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="gradients are not accumulated here"):
        model(x).sum().backward()
    optimizer.step()
    model(x).sum().backward()
    handle.release()
    model(x).sum().backward()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_cannot_step_in_backward_is_named():
    model = make()
    with pytest.raises(TypeError, match="expected a torch.optim.Optimizer, found Sequential"):
        step_in_backward(model)
    with pytest.raises(ValueError, match="LBFGS steps with all gradients"):
        step_in_backward(torch.optim.LBFGS(model.parameters()))
    model(torch.randn(4, 64)).sum().backward()
    with pytest.raises(ValueError, match="has a gradient already"):
        step_in_backward(torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="no parameter of the optimizer trains"):
        step_in_backward(torch.optim.SGD(copy.deepcopy(model).requires_grad_(False).parameters()))


def test_clipping_by_the_norm_of_freed_gradients_is_an_error():
    """A Trainer clips by default, and would find a norm of zero."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    handle = step_in_backward(optimizer)
    for clip in (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_):
        model(torch.randn(4, 64)).sum().backward()
        with pytest.raises(RuntimeError, match="max_grad_norm=0"):
            clip(model.parameters(), 1.0)
        assert "used and freed" in repr(model[0].weight.grad)
        assert model[0].weight.grad.shape == (64, 64)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    model(torch.randn(4, 64)).sum().backward()
    handle.release()
    assert all(p.grad is None for p in model.parameters())
