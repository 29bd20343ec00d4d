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

KINDS = (
    "float32 weights",
    "16-bit weights",
    "4-bit codes",
    "scales",
    "biases, norms",
    "LoRA adapters",
    "8-bit codes",
    "other",
)
"""The kinds of stored bytes, in the order in which charts stack them."""

_BY_DTYPE = {
    torch.float32: "float32 weights",
    torch.float16: "16-bit weights",
    torch.bfloat16: "16-bit weights",
}


@dataclass(frozen=True)
class Footprint:
    """The memory of one model.

    Attributes:
        name: of the variant.
        kinds: bytes of the distinct parameters and buffers, for every kind of ``KINDS``.
        forward_bytes: peak of an inference forward beyond model and input.
        step_bytes: peak of the first training step beyond model and input.
    """

    name: str
    kinds: Mapping[str, int]
    forward_bytes: int
    step_bytes: int

    @property
    def stored_bytes(self) -> int:
        """The sum over all kinds, which equals ``measure.theoretical_bytes``."""
        return sum(self.kinds.values())


def stored_by_kind(model: nn.Module) -> dict[str, int]:
    """Sum numel * itemsize over the distinct parameters and buffers, by kind; a kind without bytes has 0.

    Vectors and scalars count as biases and norms, also running statistics.
    """
    kinds = dict.fromkeys(KINDS, 0)
    seen: set[Tensor] = set()
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor not in seen and not is_lazy(tensor):
                kinds[_kind(module, name, tensor)] += tensor.numel() * tensor.element_size()
            seen.add(tensor)
    return kinds


def _kind(module: nn.Module, name: str, tensor: Tensor) -> str:
    if isinstance(module, Adapter):
        return "LoRA adapters"
    if isinstance(module, StoredModule) and name in module.part_names:
        if name.endswith("_scales"):
            return "scales"
        if name.endswith("_packed"):
            return f"{module.forms[name.removesuffix('_packed')].bits}-bit codes"
    if tensor.dim() <= 1:
        return "biases, norms"
    return _BY_DTYPE.get(tensor.dtype, "other")


def step_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the peak bytes of the first training step with AdamW beyond model and input, optimizer state included.

    The loss is that of ``lowmem.measure.backward_bytes``. The learning rate is 0, so that no parameter changes;
    buffers may change, and the model is left in training mode. Without trainable parameters, this is the peak of the
    forward.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return measure.backward_bytes(model, x)
    optimizer = torch.optim.AdamW(trained, lr=0.0, foreach=False)

    def step() -> None:
        optimizer.zero_grad()
        if losses := measure.losses_of(model, model(x), None):
            torch.autograd.backward(losses)
        optimizer.step()

    model.train()
    return measure.peak_bytes(step, x.device)


def footprint(name: str, model: nn.Module, x: Tensor) -> Footprint:
    """Measure the memory of a model on ``x``; its mode and buffers change as by ``step_bytes``."""
    return Footprint(
        name=name,
        kinds=stored_by_kind(model),
        forward_bytes=measure.forward_bytes(model, x),
        step_bytes=step_bytes(model, x),
    )
