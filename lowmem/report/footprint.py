"""The memory footprint of a model: stored bytes by kind, and the peaks of a forward and a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem import measure
from lowmem.nn.adapter import Adapter
from lowmem.nn.stored_module import StoredModule
from lowmem.training.step_memory import TrainingMemory, training_memory

KINDS = (
    "float32 weights",
    "16-bit weights",
    "8-bit codes",
    "4-bit codes",
    "scales",
    "biases, norms",
    "LoRA adapters",
    "other",
)
"""The kinds of stored bytes, in the order in which charts stack them."""

_BY_DTYPE = {
    torch.float32: "float32 weights",
    torch.float16: "16-bit weights",
    torch.bfloat16: "16-bit weights",
}


@dataclass(frozen=True)
class MemoryFootprint:
    """The memory of one model.

    Attributes:
        name: of the variant.
        kinds: bytes of the distinct parameters and buffers, for every kind of ``KINDS``.
        forward_bytes: peak of an inference forward beyond model and input.
        step: the memory of a training step with AdamW; None if nothing trains.
    """

    name: str
    kinds: Mapping[str, int]
    forward_bytes: int
    step: TrainingMemory | None

    @property
    def stored_bytes(self) -> int:
        """The sum over all kinds, which equals ``measure.theoretical_bytes``."""
        return sum(self.kinds.values())


def stored_bytes_by_kind(model: nn.Module) -> dict[str, int]:
    """Sum numel * itemsize over the distinct parameters and buffers, by kind; a kind without bytes has 0.

    Vectors and scalars count as biases and norms, also running statistics.
    """
    kinds = dict.fromkeys(KINDS, 0)
    seen: set[Tensor] = set()
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor not in seen and not is_lazy(tensor):
                kinds[_stored_tensor_kind(module, name, tensor)] += tensor.numel() * tensor.element_size()
            seen.add(tensor)
    return kinds


def _stored_tensor_kind(module: nn.Module, name: str, tensor: Tensor) -> str:
    if isinstance(module, Adapter):
        return "LoRA adapters"
    if isinstance(module, StoredModule) and name in module.part_parameter_names:
        if name.endswith("_scales"):
            return "scales"
        if name.endswith("_packed"):
            return f"{module.forms[name.removesuffix('_packed')].bits}-bit codes"
    if tensor.dim() <= 1:
        return "biases, norms"
    return _BY_DTYPE.get(tensor.dtype, "other")


def measure_footprint(name: str, model: nn.Module, x: Tensor, *, trains: bool = True) -> MemoryFootprint:
    """Measure the memory of a model on ``x``; ``trains``: whether it has a training step."""
    step = training_memory(model, x) if trains else None
    return MemoryFootprint(name, stored_bytes_by_kind(model), measure.forward_bytes(model, x), step)
