"""Forwards with adapters that do not read the weight as a tensor: of linear layers and stored convolutions. QLoRA
(arXiv 2305.14314) is ``linear_forward`` over a 4-bit layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lowmem import kernels
from lowmem.kernels import ops
from lowmem.nn.adapter import Adapter, drops_nothing
from lowmem.nn.adapter_autograd import product_of, trained_matrices
from lowmem.nn.calls import autocast, autocasts, is_plain_call, recorded_call
from lowmem.nn.coded_module import kept_weight
from lowmem.nn.conv import Conv4Bit, HalfConv
from lowmem.nn.linear import GatheredLinear4Bit, HalfLinear, Linear4Bit, Linear8Bit
from lowmem.nn.low_rank_sum import LowRankSum

_IN_FLOAT32 = (None, torch.float32)


def linear_forward(layer: Any, input: Tensor) -> Tensor:
    """Return (..., out_features) in the dtype of the layer without adapters, for input (..., in_features).

    y = W x + b + sum s B A x    over the active adapters, in the order of ``active``
    """
    if isinstance(input, Proxy):
        return recorded_call(layer, input)
    bank = layer._modules["adapters"]
    active, merged = bank.active, bank.merged_copy  # read only once: another thread may change them
    base, kind, done = layer, layer._plain_class, None
    if merged is not None:
        done, base = merged
        kind = type(base)
    adapters = bank._modules
    if len(active) == 1 and active[0] != done:
        parts = adapters.get(active[0])  # None if another thread has deleted it
        adapter = None if parts is None else parts._modules.get("weight")
        fused = _fused_forward(base, kind, adapter, input)
        if fused is None and (layer.training or torch.is_grad_enabled()):
            # Without gradients, too: a checkpoint first runs its region so, and must get the same numbers.
            matrices = trained_matrices(adapter, input)
            if matrices is not None:
                x = autocast(input)
                fused = product_of(input, x, adapter, matrices, _frozen_weight(base, kind, x), False)
        if fused is not None:
            return fused
    out: Tensor = _dense_linear(base, input) if kind is nn.Linear else kind.forward(base, input)
    for name in active:
        parts = adapters.get(name)
        if name != done and parts is not None:
            out = parts._modules["weight"].forward(out, input)  # not __call__, for speed
    return out


def _dense_linear(layer: nn.Module, input: Tensor) -> Tensor:
    """Return the output of a dense layer without its adapters, which the property ``weight`` would add."""
    own = layer._parameters
    weight: Any = own["weight"] if "weight" in own else layer.__dict__.get("weight")
    if weight is None:  # a parametrization has moved it out
        weight = layer.weight
    return nn.functional.linear(input, weight, own["bias"] if "bias" in own else layer.bias)  # type: ignore[arg-type]  # noqa: SIM401


def _fused_forward(base: Any, kind: Any, adapter: nn.Module | None, x: Tensor) -> Tensor | None:
    """Return the output of a layer and its adapter from one call of the kernel; None if it cannot take both."""
    if kind is Linear4Bit or kind is Linear8Bit:
        if base._forms["weight"].form.compute_dtype not in _IN_FLOAT32:  # faster than the property
            return None
    elif kind is not HalfLinear:
        return None
    if type(adapter) is not Adapter:
        return None
    own, bases = adapter.__dict__, base._parameters  # faster than attributes
    key = "bias" if "bias" in bases else "bias_rounded"
    update, dropout = own["_parameters"], own["_modules"]["dropout"]
    a, b = update.get("lora_a"), update.get("lora_b")
    plain = is_plain_call(x, bases.get(key), a, b)
    if (
        a is None
        or b is None
        or key not in bases  # a parametrization has moved it out
        or "forward" in own
        or not (plain or torch.compiler.is_compiling())
        or not (x.dtype is a.dtype is b.dtype is torch.float32 and x.dim() == 2 and not x.is_nested)
        or not drops_nothing(dropout)
        or autocasts(x)
    ):
        return None
    if kind is HalfLinear:
        weight: Any = bases.get("weight_rounded")
        if weight is None:  # a parametrization has moved it out
            return None
    else:
        linear = cast(Linear4Bit, base)
        weight = (kept_weight(linear) if plain else None) or linear.quantized  # kept_weight is faster
    if plain:
        return kernels.linear(x, weight, torch.float32, bases[key], (a, b, adapter.scaling))
    return ops.product(x, weight, torch.float32, False, bases[key], a, b, adapter.scaling)


def _frozen_weight(base: Any, kind: Any, x: Tensor) -> tuple[kernels.Weight, Tensor | None] | None:
    """Return weight and bias of a layer if it multiplies ``x`` in bfloat16 and neither trains; else None."""
    held = base._parameters
    weight: kernels.Weight
    if kind is Linear4Bit or kind is Linear8Bit:
        dtype = base._forms["weight"].form.compute_dtype or x.dtype
        if kernels.recorded_dtype(dtype, x) is not torch.bfloat16 or "bias" not in held:
            return None
        weight, bias = base.quantized, held["bias"]
    elif kind in (HalfLinear, nn.Linear):
        names = ("weight_rounded", "bias_rounded") if kind is HalfLinear else ("weight", "bias")
        name = names[1] if names[1] in held else "bias"
        dense = held.get(names[0])
        if type(dense) is not nn.Parameter or dense.requires_grad or name not in held:
            return None
        if not dense.dtype is x.dtype is torch.bfloat16:
            return None
        weight, bias = dense.detach(), held[name]
    else:
        return None
    if bias is not None and (type(bias) is not nn.Parameter or bias.requires_grad):
        return None
    return weight, None if bias is None else bias.detach()


def convolution_forward(layer: Any, input: Tensor) -> Tensor:
    """Convolve with the stored kernel, as without adapters, and add the adapters' output."""
    plain = layer._plain_class
    if layer.adapters.merged_copy is not None:
        out: Tensor = plain.dense_class.forward(layer, input)
        return out
    out, weight = plain.forward(layer, input), layer.weight
    return (
        layer._conv_forward(input, weight.remade(weight.base, weight.updates, known=out), None)
        if isinstance(weight, LowRankSum)
        else out
    )


LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, HalfLinear, Linear4Bit, Linear8Bit, GatheredLinear4Bit)
"""The exact types of layers that become a ``LoRALinear``."""

FORWARDS: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    **dict.fromkeys(LINEAR, linear_forward),
    **dict.fromkeys((HalfConv, Conv4Bit), convolution_forward),
}
"""Class of a layer, or the base of generated classes in ``LAYERS`` -> its forward with adapters.

A class of ``LAYERS`` that is not here takes the dense class's forward, and any other class its own.
"""
