"""Fused norms, gated MLPs and activations, which save only their inputs for backward (Hsu et al., Liger Kernel, arXiv
2410.10989, section 3.2). Layers inside are called as modules: adapters and hooks work as before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lowmem import kernels
from lowmem.kernels.memory import keeps_results
from lowmem.nn.adapted_module import LoRALinear
from lowmem.nn.adapter_autograd import narrow_results
from lowmem.nn.calls import is_observed
from lowmem.nn.linear import Linear4Bit
from lowmem.nn.recomputed import can_recompute, recomputed_input, saves_in_any_dtype
from lowmem.training.fused_functions import activated, gated_product, layer_norm, recompute_of_product, rms_norm
from lowmem.training.prepared_module import PreparedModule, plain_copy, prepare_module


@dataclass(frozen=True)
class RMSNorm:
    """How a module computes an RMS norm, in the terms of ``rms_norm``."""

    weight: str  # name of the module's parameter
    eps: str  # name of the attribute that holds epsilon
    offset: float  # 0 or 1
    rounds_first: bool
    mixes: bool = False  # whether calls are fused, too, where one of x and weight is float32 and the other bfloat16

    def __str__(self) -> str:
        return "RMS norm fused: keeps its input"


@dataclass(frozen=True)
class GatedMLP:
    """How a module computes ``down(act(gate(x)) * up(x))``: the names of its layers, and act."""

    gate: str
    up: str | None  # None: the output of ``gate`` is gate and up, concatenated
    down: str
    activation: str  # a key of ``ACTIVATIONS``
    gate_first: bool = True  # whether the concatenated output starts with the gate
    again: bool = False  # whether backward calls gate and up again instead of saving their outputs ("lean")

    def __str__(self) -> str:
        does = "computes again" if self.again else "keeps"
        return (
            f"gated MLP fused ({self.activation}): {does} the outputs of {self.gate}{f', {self.up}' * bool(self.up)}"
        )


@dataclass(frozen=True)
class Act:
    """How a module without parameters computes an activation, a key of ``ACTIVATIONS``."""

    activation: str

    def __str__(self) -> str:
        return f"activation fused ({self.activation}): keeps its input"


@dataclass(frozen=True)
class LayerNorm:
    """An ``nn.LayerNorm``, which saves only its input anyway; the layers that read its output can recompute it."""

    def __str__(self) -> str:
        return "layer norm fused: adapted layers compute again what it returns"


How: TypeAlias = "RMSNorm | GatedMLP | Act | LayerNorm"
"""How a fusable module computes its output."""


class FusedModule(PreparedModule):
    """Base of modules whose forward is fused."""

    prepared_attributes = ("fused_as", "fused_with")
    fused_as: How
    fused_with: list[Any]  # ``_functions_of`` the module when it was fused; where it differs, the own forward runs

    @property
    def note(self) -> str:
        """What was done to the module, for reports."""
        return str(self.fused_as)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the fused form in training, where it takes the argument; else the module's own forward."""
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        run = _RUNS[type(self.fused_as)] if x is not None and self.training and _is_eager(x) else None
        found = None if run is None else run(self, x, self.fused_as)
        return super().forward(*args, **kwargs) if found is None else found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy or pickle the plain module, and fuse the copy."""
        return fuse, (plain_copy(self), self.fused_as)


def fuse(module: nn.Module, how: How) -> nn.Module:
    """Fuse a module that computes ``how``, in place; it stays an instance of its class. Returns the module."""
    prepare_module(module, FusedModule, fused_as=how, fused_with=_functions_of(module, how))
    return module


def _functions_of(module: nn.Module, how: How) -> list[Any]:
    """Return a gated MLP's activation classes and callable attributes; the fused forward checks them on each call."""
    if not isinstance(how, GatedMLP):
        return []
    return [*map(type, activations(module, how)), *(one for one in module.__dict__.values() if callable(one))]


def _is_eager(x: Any) -> bool:
    """Whether x is a plain, nonempty floating point tensor, and no compiler, tracer or functorch transform runs."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._is_tracing() or forward_ad._current_level >= 0:
        return False
    numbers = x.is_floating_point() and x.dim() > 0 and x.numel() > 0 and x.layout is torch.strided
    return numbers and not x.is_nested and not x.is_meta


def _run_norm(module: Any, x: Tensor, how: RMSNorm) -> Tensor | None:
    weight = getattr(module, how.weight)
    if type(weight) not in (Tensor, nn.Parameter) or x.shape[-1:] != weight.shape or x.device != weight.device:
        return None
    dtypes = {x.dtype, weight.dtype}
    if len(dtypes) > 1 and not (how.mixes and dtypes == {torch.float32, torch.bfloat16}):
        return None
    return rms_norm(x, weight, getattr(module, how.eps), how.offset, how.rounds_first)


def _run_layer_norm(module: Any, x: Tensor, how: LayerNorm) -> Tensor | None:
    own = module.weight, module.bias
    plain = all(one is None or (type(one) in (Tensor, nn.Parameter) and one.dtype is x.dtype) for one in own)
    if not plain or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    return layer_norm(x, *own, module.normalized_shape, module.eps)


def _run_activation(module: Any, x: Tensor, how: Act) -> Tensor | None:
    """Fuse contiguous inputs only: torch's result has the input's layout, such as channels last."""
    return activated(x, how.activation) if x.is_contiguous() else None


def _run_mlp(module: Any, x: Tensor, how: GatedMLP) -> Tensor | None:
    """Call the layers and fuse what is between them; return None, before any call, if hooks watch the activation."""
    if any(is_observed(child) for child in activations(module, how)):
        return None
    if module.fused_with != _functions_of(module, how):
        return None
    down, layers = getattr(module, how.down), [getattr(module, name) for name in (how.gate, how.up) if name]
    narrow = x.dtype is torch.float32 and all(_is_narrow(layer, x) for layer in (*layers, down))

    state: list[Any] = []

    def product(x: Tensor) -> Tensor:
        now = [_state_of(layer) for layer in layers] if again else None
        if state and state != [now]:
            raise RuntimeError(
                "layers of a gated MLP, which lean computes again in backward, have other parameters, adapters or "
                'another mode than in forward: change them after backward, or prepare_training(model, "fast")'
            )
        state[:] = [now]
        with narrow_results(narrow):
            gate, *rest = (layer(x) for layer in layers)
        return gated_product(gate, rest[0] if rest else None, how.activation, how.gate_first)

    # Only directly under the hooks of "lean": a checkpoint recomputes the layers anyway.
    again = how.again and torch.is_grad_enabled() and saves_in_any_dtype()
    again = again and not any(is_observed(one) for layer in layers for one in layer.modules())
    hidden: Tensor = checkpoint(product, x, use_reentrant=False) if again else product(x)
    recompute = recompute_of_product(hidden)
    context: AbstractContextManager[None] = nullcontext()
    # A selective checkpoint recomputes the product anyway, and would take our saved-tensor hooks for the user's.
    if recompute is not None and can_recompute() and not keeps_results():
        context = recomputed_input(hidden, recompute)
    with context:
        out: Tensor = down(hidden)
    return out.to(x.dtype) if narrow else out


def _state_of(layer: nn.Module) -> list[Any]:
    """Return the state that a layer's output depends on: parameters by identity, mode, and active adapters."""
    return [
        (one.training, [*map(id, one._parameters.values())], str(getattr(one, "active", "")))
        for one in layer.modules()
    ]


def _is_narrow(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer in training rounds its input x to bfloat16 and its output is exact in bfloat16."""
    if not isinstance(layer, LoRALinear) or layer._plain_class is not Linear4Bit or is_observed(layer):
        return False
    bank = layer.adapters
    if bank.merged is not None or len(bank.active) != 1:
        return False
    return kernels.recorded_dtype(cast(Any, layer).compute_dtype, x) is torch.bfloat16


def activations(module: nn.Module, how: GatedMLP) -> list[nn.Module]:
    """Return the children of a gated MLP other than its linear layers, which the fused forward does not call."""
    return [child for name, child in module.named_children() if name not in (how.gate, how.up, how.down)]


_RUNS: dict[type, Callable[[Any, Tensor, Any], Tensor | None]] = {
    RMSNorm: _run_norm,
    GatedMLP: _run_mlp,
    Act: _run_activation,
    LayerNorm: _run_layer_norm,
}
"""For each way to compute: the fused forward, which returns None where the module's own forward must run."""
