"""The 4-bit technique and its linear layer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lowmem import kernels
from lowmem.nn.frozen_linear import autocast, frozen_linear, is_plain_call, recorded_call
from lowmem.nn.stored import FourBitForm
from lowmem.nn.stored_module import LAYERS, FourBitStorage, kept_weight, stored_copy, stored_property
from lowmem.nn.techniques import FourBit, FourBitStore
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["Linear4Bit"]


class Linear4Bit(FourBitStorage, nn.Linear):
    """``y = x W^T + b`` with W stored in 4 bits and frozen; the bias is unchanged.

    Args:
        weight: quantized (out_features, in_features).
        bias: floating point (out_features,), or None.
        compute_dtype: dtype of the product; None: the dtype of the input; torch.int8: 8-bit integers.
        dtype: of the ``weight`` attribute; None: that of the bias, or float32.
    """

    dense_class = nn.Linear
    stored_names = ("weight",)
    compute_dtype: torch.dtype | None = None
    weight = stored_property("weight")

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: nn.Parameter | None,
        compute_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        FourBitStorage.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        dtype = dtype or (torch.float32 if bias is None else bias.dtype)
        self.store("weight", weight, (self.in_features,), dtype)
        self.register_parameter("bias", bias)

    @classmethod
    def from_layer(cls, layer: nn.Linear, technique: FourBit, store: FourBitStore | None = None) -> Linear4Bit:
        """Build it from a dense layer, whose weight ``store`` quantizes; None: ``technique.store``.

        Raises:
            TypeError, ValueError: weights that ``quantize`` rejects.
        """
        weight = (store or technique.store)(layer.weight, "weight")
        dtype = technique.compute_dtype
        return cast(Linear4Bit, stored_copy(layer, {"weight": weight}, computed_in=dtype, compute_dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features) in the input's dtype, for input (..., in_features)."""
        if isinstance(input, Proxy):
            return recorded_call(self, input)
        x = autocast(input)
        found = self._parameters  # faster than attributes; a parametrization may have moved a parameter out
        bias = found["bias"] if "bias" in found else self.bias  # noqa: SIM401 - get would evaluate self.bias each time
        dtype = self.compute_dtype or x.dtype
        if is_plain_call(x, bias) and x.dim() == 2 and not x.is_nested:  # inline, for speed
            weight = kept_weight(self)
            if weight is not None:
                out = kernels.linear(x, weight, dtype, bias)
                return out if dtype is x.dtype else out.to(x.dtype)
        return frozen_linear(x, self.quantized, dtype, bias)


LAYERS[nn.Linear, FourBitForm] = Linear4Bit
