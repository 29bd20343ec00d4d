"""A user's file: type checkers know the model's own class after each of lowmem's functions (`tox -e types`)."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import nn

import lowmem


class Net(nn.Module):
    """A model with a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output."""
        y: torch.Tensor = self.layer(x)
        return y

    def name(self) -> str:
        """Return what a Module has not."""
        return "net"


def use() -> str:
    """Call everything that returns the model that it is given."""
    model = lowmem.convert(Net(), lowmem.FourBit("nf4"), lowmem.LoRA(rank=8))
    assert_type(model, Net)
    assert_type(lowmem.calibrate(Net(), [torch.randn(2, 64)]), Net)
    assert_type(lowmem.add_adapter(model, "other", lowmem.LoRA()), Net)
    assert_type(lowmem.load_adapter(model, "adapter.safetensors"), Net)
    assert_type(lowmem.delete_adapter(model, "other"), Net)
    assert_type(lowmem.prepare_training(model, "lean"), Net)
    assert_type(lowmem.release_training(model), Net)
    assert_type(lowmem.merge(model), Net)
    assert_type(lowmem.merge(model, torch.bfloat16, report=True), tuple[Net, lowmem.MergeReport])
    assert_type(lowmem.restore(model), Net)
    assert_type(lowmem.load("model.safetensors", Net), Net)
    assert_type(lowmem.shard(model), Net)
    assert_type(lowmem.gather(model), Net | None)
    return lowmem.load("model.safetensors", Net).name()
