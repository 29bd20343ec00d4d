"""Convolutions with weights in 4, 8 or 16 bits: bases of generated classes that compute the geometry once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lowmem.nn.calls import autocast, recorded_call
from lowmem.nn.coded_module import CodedModule, weight_compute_dtype
from lowmem.nn.frozen_conv import Geometry, frozen_conv
from lowmem.nn.module_copy import LAYERS
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.stored_tensor import StoredTensor


def geometry_of(layer: nn.Conv1d | nn.Conv2d) -> Geometry:
    """Return the geometry of a dense layer: channels and kernel from its weight, the rest from its attributes."""
    out_channels, channels, *kernel = layer.weight.shape
    stride, dilation = _each(layer.stride, kernel), _each(layer.dilation, kernel)
    around: tuple[int, ...] = ()
    padding, mode = _each(0, kernel), "constant"
    if layer.padding_mode != "zeros":
        around, mode = tuple(layer._reversed_padding_repeated_twice), layer.padding_mode
    elif layer.padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple(span // 2 for span in spans)
        # An odd span cannot be halved: torch puts the extra zero at the end.
        around = tuple(size for span in reversed(spans) for size in (0, span % 2))
    elif not isinstance(layer.padding, str):
        padding = _each(layer.padding, kernel)
    around = around if any(around) else ()
    groups = layer.groups
    return Geometry(channels * groups, out_channels, groups, tuple(kernel), stride, padding, dilation, around, mode)


def _each(sizes: int | Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    return (sizes,) * len(kernel) if isinstance(sizes, int) else tuple(sizes)


class _Conv(StoredModule):
    """Base of the stored convolutions."""

    geometry: Geometry

    @classmethod
    def attributes_of(cls, module: nn.Module) -> dict[str, Any]:
        """Return the geometry of a dense layer."""
        return {"geometry": geometry_of(cast(nn.Conv1d, module))}


class HalfConv(_Conv):
    """An nn.Conv1d or nn.Conv2d whose weight and bias are stored in 16 bits and frozen.

    It computes in ``torch.promote_types(x.dtype, D)``, where D is the stored dtype: in float32 for a float32 input.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve: ([batch,] in_channels, *size) -> ([batch,] out_channels, *out size), in the input's dtype."""
        if isinstance(input, Proxy):
            return recorded_call(self, input)
        x, own = autocast(input), self._parameters
        weight: Tensor = self.weight_rounded  # type: ignore[assignment]
        bias: Any = own["bias_rounded"] if "bias_rounded" in own else self.bias  # noqa: SIM401 - get would evaluate it
        bias = bias.dequantize() if isinstance(bias, StoredTensor) else bias
        return frozen_conv(x, weight, self.geometry, torch.promote_types(x.dtype, weight.dtype), bias)


class Conv4Bit(CodedModule, _Conv):
    """An nn.Conv1d or nn.Conv2d whose weight is stored in 4 or 8 bits and frozen; the bias is unchanged."""

    compute_dtype = weight_compute_dtype

    def forward(self, input: Tensor) -> Tensor:
        """Convolve: ([batch,] in_channels, *size) -> ([batch,] out_channels, *out size), in the input's dtype."""
        if isinstance(input, Proxy):
            return recorded_call(self, input)
        x = autocast(input)
        bias = cast("Tensor | None", self.bias)
        return frozen_conv(x, self.quantized, self.geometry, self._forms["weight"].form.product_dtype(x), bias)


for _dense in (nn.Conv1d, nn.Conv2d):
    LAYERS.update({(_dense, 4): Conv4Bit, (_dense, 8): Conv4Bit, (_dense, 16): HalfConv})
