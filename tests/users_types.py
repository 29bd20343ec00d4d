"""A user's file: type checkers know the model's own class after each of lowmem's functions (`tox -e types`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import torch
from torch import nn

import lowmem
from lowmem import measure
from lowmem.kernels import explain
from pytest_lowmem import LatencyGate, MemoryGate


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


class Wide(Net):
    """A subclass whose factory takes arguments."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.more = nn.Linear(64, features)


def is_linear(path: str, module: nn.Module) -> bool:
    """Select layers for ``where=``."""
    return isinstance(module, nn.Linear) and not path.endswith("head")


def batches() -> list[dict[str, torch.Tensor]]:
    """Return keyword arguments of the model."""
    return [{"x": torch.randn(2, 64)}]


def make() -> Wide:
    """Return a subclass of what a function names."""
    return Wide(128)


def select() -> None:
    """Convert parts of a model, by every kind of argument."""
    assert_type(lowmem.convert(Net(), lowmem.EightBit()), Net)
    assert_type(lowmem.convert(Wide(), lowmem.EightBit(64, "double"), where=is_linear), Wide)
    assert_type(lowmem.convert(Wide(), lowmem.Half(torch.bfloat16), skip="more"), Wide)
    assert_type(lowmem.convert(Wide(), lowmem.Budget(4.5, inputs=batches()), skip=["more", "*.head"]), Wide)
    assert_type(lowmem.convert(Net(), lowmem.LoRA(16, ranks={"layer": 8}), where=lambda p, _: "layer" in p), Net)
    assert_type(lowmem.convert(Net(), lowmem.FourBit(("nf4", "int4"), compute_dtype=torch.bfloat16)), Net)
    assert_type(lowmem.convert(Net(), lowmem.FourBit(), parameters=lambda path, one: one.dim() > 2, at_most=5.5), Net)
    techniques: list[lowmem.FourBit | lowmem.LoRA] = [lowmem.FourBit(), lowmem.LoRA(8)]
    assert_type(lowmem.convert(Net(), *techniques), Net)
    assert_type(lowmem.convert(nn.Sequential(nn.Linear(8, 8)), lowmem.FourBit()), nn.Sequential)
    assert_type(lowmem.restore(Net(), where=is_linear, dtype="bfloat16"), Net)


def keep(path: Path) -> None:
    """Write and read files."""
    model = lowmem.convert(Wide(), lowmem.EightBit())
    lowmem.save(model, path)
    lowmem.save(model, "model.safetensors")
    assert_type(lowmem.load(path, make), Wide)
    assert_type(lowmem.load(path, Wide), Wide)
    assert_type(lowmem.load(path, lambda: Wide(32)), Wide)
    lowmem.save_adapter(lowmem.add_adapter(model, "mine", lowmem.LoRA(2), where=is_linear), path, "mine")
    assert_type(lowmem.adapter_names(model), list[str])
    lowmem.activate(model, "mine")
    lowmem.deactivate(model)


def ask() -> None:
    """Read what lowmem tells of a model."""
    planned = lowmem.plan(Wide, lowmem.EightBit(), lowmem.LoRA(8), batch=torch.zeros(2, 64), where=is_linear)
    assert_type(planned, lowmem.Plan)
    assert_type(planned.total_bytes, int)
    assert_type(lowmem.plan(make, batch={"x": torch.zeros(2, 64)}, training=None, at_most="2GiB"), lowmem.Plan)
    found = lowmem.summary(Net())
    assert_type(found, lowmem.Summary)
    assert_type([row.reason for row in found], list[str | None])
    assert_type(found.bits_per_weight, float)
    assert_type(lowmem.calibrate(Wide(), batches(), lowmem.FourBit("nf4"), skip="more", progress=print), Wide)
    assert_type(lowmem.calibrate(Net(), "self", tokenizer=None), Net)
    assert_type(explain(lowmem.convert(nn.Linear(64, 64), lowmem.EightBit()), 2), str)
    assert_type(measure.forward_bytes(Net(), torch.zeros(2, 64)), int)
    assert_type(lowmem.adapter_parameter_groups(Net(), lr=1e-4), list[dict[str, Any]])


def test_gates(memory_gate: MemoryGate, latency_gate: LatencyGate) -> None:
    """Use the fixtures of the pytest plugin."""
    model, x = lowmem.convert(Net(), lowmem.FourBit()), torch.zeros(2, 64)
    memory_gate(model, x, name="net", at_most="2 GiB")
    latency_gate(model, Net(), x, at_least=1.1)
