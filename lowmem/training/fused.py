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
from lowmem.kernels.tensor_checks import is_selective_checkpointing
from lowmem.nn.adapted_module import LoRALinear
from lowmem.nn.adapter_autograd import bfloat16_adapter_outputs
from lowmem.nn.call_context import has_customized_call
from lowmem.nn.linear import Linear4Bit
from lowmem.nn.recomputed_inputs import (
    are_saved_tensor_hooks_allowed,
    has_dtype_independent_pack_hook,
    recomputed_instead_of_saved,
)
from lowmem.quant.backend import backend_of
from lowmem.training.fused_functions import (
    gated_product,
    gated_product_recompute_or_none,
    recomputable_activation,
    recomputable_layer_norm,
    recomputable_rms_norm,
)
from lowmem.training.prepared_module import PreparedModule, prepend_prepared_class, unprepared_shallow_copy


@dataclass(frozen=True)
class RMSNormSpec:
    """How a module computes an RMS norm, in the terms of ``recomputable_rms_norm``."""

    weight: str  # name of the module's parameter
    eps: str  # name of the attribute that holds epsilon
    offset: float  # 0 or 1
    rounds_first: bool
    mixes: bool = False  # whether calls are fused, too, where one of x and weight is float32 and the other bfloat16

    def __str__(self) -> str:
        return "RMS norm fused: keeps its input"


@dataclass(frozen=True)
class GatedMLPSpec:
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
class LayerNormSpec:
    """An ``nn.LayerNorm``, which saves only its input anyway; the layers that read its output can recompute it."""

    def __str__(self) -> str:
        return "layer norm fused: adapted layers compute again what it returns"


FusionSpec: TypeAlias = "RMSNormSpec | GatedMLPSpec | Act | LayerNormSpec"
"""How a fusable module computes its output."""


class FusedModule(PreparedModule):
    """Base of modules whose forward is fused."""

    prepared_attributes = ("fused_as", "fused_with")
    fused_as: FusionSpec
    fused_with: list[
        Any
    ]  # ``_mlp_activation_callables`` the module when it was fused; where it differs, the own forward runs

    @property
    def report_note(self) -> str:
        """What was done to the module, for reports."""
        return str(self.fused_as)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the fused form in training, where it takes the argument; else the module's own forward."""
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        run = (
            _FUSED_FORWARDS[type(self.fused_as)]
            if x is not None and self.training and _is_plain_eager_tensor(x)
            else None
        )
        output = None if run is None else run(self, x, self.fused_as)
        return super().forward(*args, **kwargs) if output is None else output

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy or pickle the plain module, and fuse the copy."""
        return fuse, (unprepared_shallow_copy(self), self.fused_as)


def fuse(module: nn.Module, spec: FusionSpec) -> nn.Module:
    """Fuse a module that computes ``spec``, in place; it stays an instance of its class. Returns the module."""
    prepend_prepared_class(module, FusedModule, fused_as=spec, fused_with=_mlp_activation_callables(module, spec))
    return module


def _mlp_activation_callables(module: nn.Module, spec: FusionSpec) -> list[Any]:
    """Return a gated MLP's activation classes and callable attributes; the fused forward checks them on each call."""
    if not isinstance(spec, GatedMLPSpec):
        return []
    return [
        *map(type, mlp_children_except_linears(module, spec)),
        *(value for value in module.__dict__.values() if callable(value)),
    ]


def _is_plain_eager_tensor(x: Any) -> bool:
    """Whether x is a plain, nonempty floating point tensor, and no compiler, tracer or functorch transform runs."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._is_tracing() or forward_ad._current_level >= 0:
        return False
    numbers = x.is_floating_point() and x.dim() > 0 and x.numel() > 0 and x.layout is torch.strided
    return numbers and not x.is_nested and not x.is_meta


def _run_fused_rms_norm_or_none(module: Any, x: Tensor, spec: RMSNormSpec) -> Tensor | None:
    weight = getattr(module, spec.weight)
    if type(weight) not in (Tensor, nn.Parameter) or x.shape[-1:] != weight.shape or x.device != weight.device:
        return None
    dtypes = {x.dtype, weight.dtype}
    if len(dtypes) > 1 and not (spec.mixes and dtypes == {torch.float32, torch.bfloat16}):
        return None
    return recomputable_rms_norm(x, weight, getattr(module, spec.eps), spec.offset, spec.rounds_first)


def _run_fused_layer_norm_or_none(module: Any, x: Tensor, spec: LayerNormSpec) -> Tensor | None:
    affine = module.weight, module.bias
    plain = all(
        parameter is None or (type(parameter) in (Tensor, nn.Parameter) and parameter.dtype is x.dtype)
        for parameter in affine
    )
    if not plain or backend_of(x).is_asynchronous or torch.is_autocast_enabled("cpu"):
        return None
    return recomputable_layer_norm(x, *affine, module.normalized_shape, module.eps)


def _run_fused_activation_or_none(module: Any, x: Tensor, spec: Act) -> Tensor | None:
    """Fuse contiguous inputs only: torch's result has the input's layout, such as channels last."""
    return recomputable_activation(x, spec.activation) if x.is_contiguous() else None


def _run_fused_mlp_or_none(module: Any, x: Tensor, spec: GatedMLPSpec) -> Tensor | None:
    """Call the layers and fuse what is between them; return None, before any call, if hooks watch the activation."""
    if any(has_customized_call(child) for child in mlp_children_except_linears(module, spec)):
        return None
    if module.fused_with != _mlp_activation_callables(module, spec):
        return None
    down, layers = getattr(module, spec.down), [getattr(module, name) for name in (spec.gate, spec.up) if name]
    narrow = x.dtype is torch.float32 and all(_is_computed_in_bfloat16(layer, x) for layer in (*layers, down))

    state: list[Any] = []

    def checked_gated_product(x: Tensor) -> Tensor:
        now = [_layer_state_fingerprint(layer) for layer in layers] if again else None
        if state and state != [now]:
            raise RuntimeError(
                "layers of a gated MLP, which lean computes again in backward, have other parameters, adapters or "
                'another mode than in forward: change them after backward, or prepare_training(model, "fast")'
            )
        state[:] = [now]
        with bfloat16_adapter_outputs(narrow):
            gate, *rest = (layer(x) for layer in layers)
        return gated_product(gate, rest[0] if rest else None, spec.activation, spec.gate_first)

    # Only directly under the hooks of "lean": a checkpoint recomputes the layers anyway.
    again = spec.again and torch.is_grad_enabled() and has_dtype_independent_pack_hook()
    again = again and not any(has_customized_call(submodule) for layer in layers for submodule in layer.modules())
    hidden: Tensor = checkpoint(checked_gated_product, x, use_reentrant=False) if again else checked_gated_product(x)
    recompute = gated_product_recompute_or_none(hidden)
    context: AbstractContextManager[None] = nullcontext()
    # A selective checkpoint recomputes the product anyway, and would take our saved-tensor hooks for the user's.
    if recompute is not None and are_saved_tensor_hooks_allowed() and not is_selective_checkpointing():
        context = recomputed_instead_of_saved(hidden, recompute)
    with context:
        out: Tensor = down(hidden)
    return out.to(x.dtype) if narrow else out


def _layer_state_fingerprint(layer: nn.Module) -> list[Any]:
    """Return the state that a layer's output depends on: parameters by identity, mode, and active adapters."""
    return [
        (module.training, [*map(id, module._parameters.values())], str(getattr(module, "active", "")))
        for module in layer.modules()
    ]


def _is_computed_in_bfloat16(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer in training rounds its input x to bfloat16 and its output is exact in bfloat16."""
    if not isinstance(layer, LoRALinear) or layer._plain_class is not Linear4Bit or has_customized_call(layer):
        return False
    bank = layer.adapters
    if bank.merged_name is not None or len(bank.active) != 1:
        return False
    return kernels.differentiable_dtype(cast(Any, layer).compute_dtype, x) is torch.bfloat16


def mlp_children_except_linears(module: nn.Module, spec: GatedMLPSpec) -> list[nn.Module]:
    """Return the children of a gated MLP other than its linear layers, which the fused forward does not call."""
    return [child for name, child in module.named_children() if name not in (spec.gate, spec.up, spec.down)]


_FUSED_FORWARDS: dict[type, Callable[[Any, Tensor, Any], Tensor | None]] = {
    RMSNormSpec: _run_fused_rms_norm_or_none,
    GatedMLPSpec: _run_fused_mlp_or_none,
    Act: _run_fused_activation_or_none,
    LayerNormSpec: _run_fused_layer_norm_or_none,
}
"""For each way to compute: the fused forward, which returns None where the module's own forward must run."""
