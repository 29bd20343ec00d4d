"""Checkpoints of whole models: the same gradients to the bit, and selective ones compute no product again."""

from functools import partial
from inspect import signature

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowmem import FourBit, LoRA, convert, keep_products
from lowmem.measure import PeakMemory
from tests.training.test_sharded import gradients, halves, make


def checkpointed(model, **options):
    for block in model.layers:
        block.forward = partial(checkpoint, block.forward, **options)
    return model


@pytest.mark.parametrize("memory", [None, "fast", "lean"], ids=str)
def test_a_prepared_model_gets_the_same_gradients(memory):
    """In "lean" other tensors are compressed then: inputs of regions, and not what is inside."""
    expected = gradients(make(memory), halves()[0])
    for reentrant in (False, True):
        found = gradients(checkpointed(make(memory), use_reentrant=reentrant), halves()[0])
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            near = torch.equal(grad, expected[name])
            assert near or (memory == "lean" and (grad - expected[name]).norm() <= 0.06 * expected[name].norm()), name


@pytest.mark.skipif(
    "respect_saved_tensors_hooks" not in signature(checkpoint).parameters, reason="torch before 2.15 does not ask"
)
def test_what_a_selective_checkpoint_keeps_is_compressed_where_asked_for():
    expected, peaks = gradients(make(None), halves()[0]), []
    for respected in (False, True):
        options = {"use_reentrant": False, "context_fn": keep_products, "respect_saved_tensors_hooks": respected}
        model, memory = checkpointed(make("lean"), **options), PeakMemory()
        with memory:
            found = gradients(model, halves()[0])
        peaks.append(memory.peak)
        for name, grad in expected.items():
            assert (found[name] - grad).norm() <= 0.06 * grad.norm(), name
    assert peaks[1] < peaks[0]


class Block(nn.Module):
    """Of no family: a norm, a convolution, attention, and an MLP with dropout."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(64), nn.Conv1d(64, 64, 3, padding=1)
        self.up, self.down, self.drop = nn.Linear(64, 256), nn.Linear(256, 64), nn.Dropout(0.1)

    def forward(self, x):
        x = x + nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        x = x + self.mix(self.norm(x).mT).mT
        return x + self.down(self.drop(torch.tanh(nn.functional.gelu(self.up(x)) * 0.5)))


@pytest.mark.parametrize("techniques", [(), (FourBit(), LoRA(4))], ids=["dense", "adapters"])
def test_products_are_kept_and_the_rest_is_computed_again(techniques):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3)))
    model = convert(model, *techniques) if techniques else model
    x = torch.randn(4, 32, 64, requires_grad=True)
    ways = {"plain": None, "selective": {"context_fn": keep_products}, "all": {}}
    peaks, found = {}, {}
    for way, options in ways.items():
        run = model if options is None else partial(_each, model, partial(checkpoint, use_reentrant=False, **options))
        torch.manual_seed(1)  # of dropout
        model.zero_grad()
        memory = PeakMemory()
        with memory:
            run(x).square().mean().backward()
        peaks[way], found[way] = memory.peak, [p.grad for p in model.parameters() if p.grad is not None]
    for grads in found.values():
        assert all(map(torch.equal, grads, found["plain"]))
    assert peaks["all"] < peaks["selective"] < peaks["plain"]


def _each(model, call, x):
    for block in model:
        x = call(block, x)
    return x
