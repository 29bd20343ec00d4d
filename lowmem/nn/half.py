"""Half precision: weights are stored in 16 bits, and rounded only once, when they are converted.

A product is computed in the wider of the input's and the weight's dtypes, for one chunk of the weight's rows at a
time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lowmem.kernels.frozen_operator import refuse_training
from lowmem.nn.frozen_linear import autocast, frozen_linear, recorded_call
from lowmem.nn.stored import HalfForm, StoredTensor
from lowmem.nn.stored_module import LAYERS, StoredModule, freeze, stored_copy, stored_property
from lowmem.quant.rounding import round_to

__all__ = ["Half", "HalfLinear", "HalfStore", "half_weights"]

HalfStore: TypeAlias = Callable[[Tensor, str], nn.Parameter]
"""Rounds a tensor; the second argument names it in errors. ``Half.store``, or a replacement for it."""


@dataclass(frozen=True)
class Half:
    """Half precision: weights and biases are stored in float16 or bfloat16 and frozen.

    Args:
        dtype: ``torch.float16`` (11 significant bits, largest number 65504) or ``torch.bfloat16`` (8 significant
            bits, the range of float32).

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


class HalfLinear(StoredModule, nn.Linear):
    """``y = x W^T + b`` with W and b stored in 16 bits and frozen.

    The product is computed in ``torch.promote_types(x.dtype, D)``, where D is the stored dtype.

    Args:
        weight: float16 or bfloat16 (out_features, in_features).
        bias: (out_features,) in the dtype of the weight, or None.
        dtype: of the ``weight`` and ``bias`` attributes.
    """

    dense_class = nn.Linear
    stored_names = ("weight", "bias")
    weight = stored_property("weight")
    bias = stored_property("bias")

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        StoredModule.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.store("weight", weight, (self.in_features,), dtype)
        if bias is None:
            self._parameters["bias"] = None
        else:
            self.store("bias", bias, (self.out_features,), dtype)

    @classmethod
    def from_layer(cls, layer: nn.Linear, technique: Half, store: HalfStore | None = None) -> HalfLinear:
        """Build it from a dense layer, whose tensors ``store`` rounds; None: ``technique.store``.

        Raises:
            TypeError, ValueError: weights that are not floating point, have no values, or exceed the range of the
                dtype.
        """
        return cast(HalfLinear, stored_copy(layer, half_weights(layer, store or technique.store)))

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features) in the input's dtype, for input (..., in_features)."""
        if isinstance(input, Proxy):
            return recorded_call(self, input)
        x = autocast(input)
        own = self._parameters  # faster than attributes; a parametrization may have moved a parameter out
        weight = own.get("weight_rounded")
        weight = cast(nn.Parameter, self.weight_rounded) if weight is None else weight
        bias = own["bias_rounded"] if "bias_rounded" in own else self.bias  # noqa: SIM401 - get would evaluate it
        bias = bias.dequantize() if isinstance(bias, StoredTensor) else bias
        if x.dtype is weight.dtype and not (x.is_cpu and x.dtype is torch.float16):  # torch's is slow on CPUs
            if torch.is_grad_enabled():
                refuse_training(weight)
            bias = bias if bias is None or bias.dtype is x.dtype else bias.to(x.dtype)  # it may be dense, and shared
            return nn.functional.linear(x, weight.detach(), None if bias is None else bias.detach())
        wide = x.dtype if x.dtype is torch.float32 else torch.promote_types(x.dtype, weight.dtype)
        return frozen_linear(x, weight, wide, bias)


LAYERS[nn.Linear, HalfForm] = HalfLinear


def half_weights(layer: nn.Module, store: HalfStore) -> dict[str, Tensor]:
    """Return a layer's weight and bias, rounded."""
    found = {name: layer._parameters.get(name) for name in ("weight", "bias")}
    return {name: store(tensor, name) for name, tensor in found.items() if tensor is not None}
