"""Convolutions with weights in 4, 8 or 16 bits: bases of generated classes that compute the geometry once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lowmem.nn.call_context import autocast_linear_input, record_as_fx_leaf
from lowmem.nn.frozen_conv import Geometry, frozen_conv
from lowmem.nn.module_copy import LAYERS
from lowmem.nn.quantized_module import QuantizedModule, weight_compute_dtype
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.stored_tensor import StoredTensor


def conv_geometry(layer: nn.Conv1d | nn.Conv2d) -> Geometry:
    """Return the geometry of a dense layer: channels and kernel from its weight, the rest from its attributes."""
    out_channels, channels, *kernel = layer.weight.shape
    stride, dilation = (
        _repeated_for_kernel_dims(layer.stride, kernel),
        _repeated_for_kernel_dims(layer.dilation, kernel),
    )
    around: tuple[int, ...] = ()
    padding, mode = _repeated_for_kernel_dims(0, kernel), "constant"
    if layer.padding_mode != "zeros":
        around, mode = tuple(layer._reversed_padding_repeated_twice), layer.padding_mode
    elif layer.padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple(span // 2 for span in spans)
        # An odd span cannot be halved: torch puts the extra zero at the end.
        around = tuple(size for span in reversed(spans) for size in (0, span % 2))
    elif not isinstance(layer.padding, str):
        padding = _repeated_for_kernel_dims(layer.padding, kernel)
    around = around if any(around) else ()
    groups = layer.groups
    return Geometry(channels * groups, out_channels, groups, tuple(kernel), stride, padding, dilation, around, mode)


def _repeated_for_kernel_dims(sizes: int | Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    return (sizes,) * len(kernel) if isinstance(sizes, int) else tuple(sizes)


class _StoredConv(StoredModule):
    """Base of the stored convolutions."""

    geometry: Geometry

    @classmethod
    def extra_attributes_from_dense(cls, dense_module: nn.Module) -> dict[str, Any]:
        """Return the geometry of a dense layer."""
        return {"geometry": conv_geometry(cast(nn.Conv1d, dense_module))}


class HalfConv(_StoredConv):
    """An nn.Conv1d or nn.Conv2d whose weight and bias are stored in 16 bits and frozen.

    It computes in ``torch.promote_types(x.dtype, D)``, where D is the stored dtype: in float32 for a float32 input.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve: ([batch,] in_channels, *size) -> ([batch,] out_channels, *out size), in the input's dtype."""
        if isinstance(input, Proxy):
            return record_as_fx_leaf(self, input)
        x, parameters = autocast_linear_input(input), self._parameters
        weight: Tensor = self.weight_rounded  # type: ignore[assignment]
        bias: Any = parameters["bias_rounded"] if "bias_rounded" in parameters else self.bias  # noqa: SIM401 - get would evaluate it
        bias = bias.dequantize() if isinstance(bias, StoredTensor) else bias
        return frozen_conv(x, weight, self.geometry, torch.promote_types(x.dtype, weight.dtype), bias)


class Conv4Bit(QuantizedModule, _StoredConv):
    """An nn.Conv1d or nn.Conv2d whose weight is stored in 4 or 8 bits and frozen; the bias is unchanged."""

    compute_dtype = weight_compute_dtype

    def forward(self, input: Tensor) -> Tensor:
        """Convolve: ([batch,] in_channels, *size) -> ([batch,] out_channels, *out size), in the input's dtype."""
        if isinstance(input, Proxy):
            return record_as_fx_leaf(self, input)
        x = autocast_linear_input(input)
        bias = cast("Tensor | None", self.bias)
        return frozen_conv(x, self.quantized, self.geometry, self._forms["weight"].form.product_dtype(x), bias)


for _dense in (nn.Conv1d, nn.Conv2d):
    LAYERS.update({(_dense, 4): Conv4Bit, (_dense, 8): Conv4Bit, (_dense, 16): HalfConv})
