"""Forwards with adapters that do not read the weight as a tensor: of linear layers and stored convolutions.

QLoRA (arXiv 2305.14314) is ``linear_forward`` over a 4-bit layer. All other modules with adapters keep their forward,
which reads an ``AdaptedWeight``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lowmem import kernels
from lowmem.kernels import ops
from lowmem.nn.adapter import Adapter, drops_nothing
from lowmem.nn.adapter_autograd import adapted_product
from lowmem.nn.conv import Conv1d4Bit, Conv2d4Bit, HalfConv1d, HalfConv2d
from lowmem.nn.eightbit import Conv1d8Bit, Conv2d8Bit, Linear8Bit
from lowmem.nn.fourbit import Linear4Bit
from lowmem.nn.frozen_linear import autocast_enabled, is_plain_call, recorded_call
from lowmem.nn.gathered_linear import GatheredLinear4Bit
from lowmem.nn.half import HalfLinear
from lowmem.nn.low_rank_sum import LowRankSum
from lowmem.nn.stored_module import kept_weight

__all__ = ["FORWARDS", "LINEAR"]


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
            fused = adapted_product(base, kind, adapter, input)
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
    """Return the output of a layer and its adapter from one fused kernel; None if they must be computed separately.

    Args:
        base: the layer, whose adapters are ignored.
        kind: its class without adapters.
        adapter: of its weight.
        x: the input.
    """
    if kind is Linear4Bit or kind is Linear8Bit:
        if base.compute_dtype is not None and base.compute_dtype is not torch.float32:
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
        or autocast_enabled("cpu" if x.is_cpu else x.device.type)
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


def convolution_forward(layer: Any, input: Tensor) -> Tensor:
    """Convolve with the stored kernel, as without adapters, and add the adapters' output."""
    plain = layer._plain_class
    if layer.adapters.merged_copy is not None:
        out: Tensor = plain.dense_class.forward(layer, input)
        return out
    out, weight = plain.forward(layer, input), layer.weight
    return layer._conv_forward(input, weight.added_to(out), None) if isinstance(weight, LowRankSum) else out


LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, HalfLinear, Linear4Bit, Linear8Bit, GatheredLinear4Bit)
"""The exact types of layers that become a ``LoRALinear``."""

FORWARDS: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    **dict.fromkeys(LINEAR, linear_forward),
    **dict.fromkeys((HalfConv1d, HalfConv2d, Conv1d4Bit, Conv2d4Bit, Conv1d8Bit, Conv2d8Bit), convolution_forward),
}
"""Class of a layer -> its forward with adapters.

A class of ``LAYERS`` that is not here takes the dense class's forward, and any other class its own.
"""
