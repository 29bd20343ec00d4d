"""Low-rank adaptation: train two thin matrices beside a frozen layer.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 4.1. Over a
4-bit base this is QLoRA (arXiv 2305.14314): a composition, not a class of its own.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowmem import kernels
from lowmem.fourbit import Linear4Bit
from lowmem.frozen import is_plain_call
from lowmem.half import HalfLinear, round_to
from lowmem.kernels import reference

__all__ = ["LoRA", "LoRALinear"]


@dataclass(frozen=True)
class LoRA:
    """The technique: every parameter of the model is frozen, and two thin matrices a layer train.

    Args:
        rank: of the update, at least 1.
        alpha: the update is scaled by ``alpha / rank``; None means ``rank``, a scale of 1.
        dropout: of the update's input, in [0, 1).

    Raises:
        ValueError: a rank that is not a positive integer, an alpha that is not a positive finite
            number, or a dropout outside [0, 1).
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r} must be a positive integer")
        if self.alpha is not None and not (_is_number(self.alpha) and 0 < self.alpha <= sys.float_info.max):
            raise ValueError(f"alpha={self.alpha!r} must be a positive number, or None for the rank")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout={self.dropout!r} must be at least 0 and below 1")


class LoRALinear(nn.Module):
    """``y = base(x) + (alpha / rank) B A x``, with A (rank, in) random and B (out, rank) zero at first.

    A fresh adapter therefore changes nothing, bit for bit.

    Args:
        base: an nn.Linear, HalfLinear or Linear4Bit.
        technique: rank, alpha and dropout.
    """

    weight_count = 0  # an adapter stands for no weights beyond those of its base

    def __init__(self, base: nn.Linear | HalfLinear | Linear4Bit, technique: LoRA) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank = technique.rank
        self.scaling = (technique.rank if technique.alpha is None else technique.alpha) / technique.rank
        self.dropout = nn.Dropout(technique.dropout) if technique.dropout else nn.Identity()
        stored = base.packed if isinstance(base, Linear4Bit) else base.weight
        dtype = stored.dtype if stored.dtype in (torch.float32, torch.float64) else torch.float32
        self.lora_a = nn.Parameter(torch.empty(self.rank, self.in_features, dtype=dtype, device=stored.device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, self.rank, dtype=dtype, device=stored.device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear's own weight

    @classmethod
    def from_layer(cls, layer: nn.Linear | HalfLinear | Linear4Bit, technique: LoRA) -> LoRALinear:
        """Build it over a layer, which it keeps."""
        return cls(layer, technique)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) in the base's dtype, for x (..., in_features)."""
        parts, own = self._modules, self._parameters  # faster than attributes
        base, dropout = parts["base"], parts["dropout"]
        assert base is not None
        assert dropout is not None
        a, b = own.get("lora_a"), own.get("lora_b")
        if a is None or b is None:  # something wraps the layer
            a, b = self.lora_a, self.lora_b
        out: Tensor = base(x)
        x = x if x.dtype is a.dtype else x.to(a.dtype)
        if not (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)):
            x = dropout(x)
        wide = out if out.dim() == 2 else out.reshape(-1, self.out_features)  # (batch, out)
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)  # (batch, in)
        if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):  # which would narrow a sum with the base
            narrow = nn.functional.linear(rows, a) * self.scaling  # (batch, rank)
            wide = wide + nn.functional.linear(narrow, b).to(out.dtype)
        else:
            add_update = kernels.add_update if is_plain_call(x, out, a, b) else reference.add_update
            wide = add_update(wide, rows, a, b, self.scaling)
        return wide if out.dim() == 2 else wide.view(out.shape)

    def delta(self) -> Tensor:
        """Return the update of the weight, ``(alpha / rank) B A``: (out, in), in float32 or wider."""
        dtype = torch.promote_types(self.lora_a.dtype, torch.float32)  # whatever the adapter was cast to
        return (self.lora_b.detach().to(dtype) * self.scaling) @ self.lora_a.detach().to(dtype)

    def merged(self) -> tuple[nn.Module, float]:
        """Return a new base with the update folded in, and the relative error that storing it adds.

        The error is the root mean square of what is lost over that of the adapted weight. This layer
        and its base are not changed.

        Raises:
            ValueError: the adapted weight is not finite, or the base's dtype or scales cannot hold it.
        """
        base = self.base
        if isinstance(base, Linear4Bit):
            adapted = base.quantized.dequantize() + self.delta()
            quantized = base.quantized.again(adapted)
            layer: nn.Module = Linear4Bit(quantized, base.bias, base.compute_dtype)
            stored = quantized.dequantize(adapted.dtype)
        else:
            adapted = base.weight.detach() + self.delta()
            stored = round_to(adapted, base.weight.dtype, "weight")
            if isinstance(base, HalfLinear):
                layer = HalfLinear(stored, base.bias)
            else:
                layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
                layer.weight = nn.Parameter(stored, requires_grad=base.weight.requires_grad)
                layer.bias = base.bias
            stored = stored.to(adapted.dtype)
        size = float(adapted.pow(2).mean().sqrt())
        error = float((stored - adapted).pow(2).mean().sqrt())
        return layer.train(base.training), error / size if size else 0.0

    def extra_repr(self) -> str:
        """Describe the adapter."""
        return f"rank={self.rank}, scaling={self.scaling:g}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
