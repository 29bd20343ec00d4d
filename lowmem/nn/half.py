"""Half precision: weights are stored in 16 bits, and rounded only once, when they are converted.

A product is computed in the wider of the input's and the weight's dtypes, for one chunk of the weight's rows at a
time.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lowmem.kernels.frozen_operator import refuse_training
from lowmem.nn.frozen_linear import autocast, frozen_linear, recorded_call
from lowmem.nn.stored import HalfForm, StoredTensor
from lowmem.nn.stored_module import LAYERS, StoredModule, stored_copy, stored_property
from lowmem.nn.techniques import Half, HalfStore, half_weights

__all__ = [
    "HalfLinear",
]


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
