"""Half precision: weights are stored in 16 bits and rounded only once, when they are converted.

A product is computed in the wider of the input's and the weight's dtypes, on a chunk of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lowmem.nn.frozen_linear import FrozenStorage, autocast, freeze, frozen_linear
from lowmem.quant.quantize import check_weight

__all__ = ["Half", "HalfLinear", "HalfStore", "round_to"]

HalfStore: TypeAlias = Callable[[Tensor, str], nn.Parameter]
"""Rounds a tensor, given with its name for errors: ``Half.store``, or a replacement for it."""


@dataclass(frozen=True)
class Half:
    """Half precision: weights and biases are stored in float16 or bfloat16 and frozen.

    Args:
        dtype: ``torch.float16`` has 11 significant bits and ends at 65504; ``torch.bfloat16`` has 8 significant
            bits and the range of float32.

    Raises:
        ValueError: another dtype.
    """

    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"dtype={self.dtype} must be torch.float16 or torch.bfloat16")

    def store(self, tensor: Tensor, name: str = "weight") -> nn.Parameter:
        """Round a tensor to ``dtype``, as a frozen parameter.

        Raises:
            TypeError, ValueError: it is not floating point, has no values, or exceeds the range of the dtype.
        """
        return freeze(round_to(tensor, self.dtype, name))

    def skeleton(self, tensor: Tensor, name: str = "weight") -> nn.Parameter:
        """Return what ``store`` would return, on the meta device."""
        return freeze(torch.empty_like(tensor, dtype=self.dtype, device="meta"))


class HalfLinear(FrozenStorage):
    """``y = x W^T + b`` with W and b stored in 16 bits and frozen.

    The product is computed in ``torch.promote_types(x.dtype, W.dtype)``: in float32 for a float32 input.

    Args:
        weight: float16 or bfloat16 (out_features, in_features).
        bias: (out_features,) in the dtype of the weight, or None.
    """

    stored = ("weight", "bias")
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = freeze(weight)
        self.register_parameter("bias", None if bias is None else freeze(bias))

    @classmethod
    def from_layer(cls, layer: nn.Linear, technique: Half, store: HalfStore | None = None) -> HalfLinear:
        """Build it from a dense layer, whose tensors are stored by ``store``, or ``technique.store`` for None.

        Raises:
            TypeError, ValueError: weights that are not floating point, have no values, or exceed the range of the
                dtype.
        """
        store = store or technique.store
        return cls(store(layer.weight, "weight"), None if layer.bias is None else store(layer.bias, "bias"))

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features) in the input's dtype, for input (..., in_features)."""
        x = autocast(input)
        own = self._parameters  # faster than attributes; a parametrization may have moved some out
        weight = own.get("weight")
        weight = self.weight if weight is None else weight
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        if x.dtype is weight.dtype and not (x.is_cpu and x.dtype is torch.float16):  # slow in torch on CPUs
            return nn.functional.linear(x, weight.detach(), None if bias is None else bias.detach())
        wide = x.dtype if x.dtype is torch.float32 else torch.promote_types(x.dtype, weight.dtype)
        return frozen_linear(x, weight, wide, bias)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={self.weight.dtype}"
        )


def round_to(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a contiguous copy in ``dtype``.

    Raises:
        TypeError, ValueError: no dense floating-point tensor with values, values that are not finite, or that exceed
            the range of ``dtype``.
    """
    check_weight(tensor)
    wide = tensor.detach() if tensor.itemsize > 1 else tensor.detach().float()  # float8 has no isfinite
    broken = int((~wide.isfinite()).sum())
    if broken:
        raise ValueError(f"{name} holds {broken} values that are NaN or infinite; repair them first")
    rounded = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not rounded.isfinite().all():
        largest = float(wide.abs().max())
        raise ValueError(
            f"{name} holds the magnitude {largest:.6g}, above {torch.finfo(dtype).max:.6g}, the most that "
            f"{dtype} can hold; use Half(torch.bfloat16), or leave the layer out with skip="
        )
    return rounded
