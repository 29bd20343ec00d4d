"""Convolutions in 16 and in 4 bits, over one dimension or two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lowmem.nn.fourbit import FourBit, FourBitStorage, FourBitStore
from lowmem.nn.frozen_conv import Geometry, frozen_conv
from lowmem.nn.frozen_linear import FrozenStorage, autocast, freeze
from lowmem.nn.half import Half, HalfStore
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["Conv4Bit", "HalfConv", "geometry_of"]


def geometry_of(layer: nn.Conv1d | nn.Conv2d) -> Geometry:
    """Read the geometry of a dense layer: channels and kernel off its weight, the rest off its attributes."""
    out_channels, channels, *kernel = layer.weight.shape
    stride, dilation = _each(layer.stride, kernel), _each(layer.dilation, kernel)
    around: tuple[int, ...] = ()
    padding, mode = _each(0, kernel), "constant"
    if layer.padding_mode != "zeros":
        around, mode = tuple(layer._reversed_padding_repeated_twice), layer.padding_mode
    elif layer.padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple(span // 2 for span in spans)
        # A span that is odd has no middle: torch adds its last zero behind.
        around = tuple(size for span in reversed(spans) for size in (0, span % 2))
    elif not isinstance(layer.padding, str):
        padding = _each(layer.padding, kernel)
    around = around if any(around) else ()
    groups = layer.groups
    return Geometry(channels * groups, out_channels, groups, tuple(kernel), stride, padding, dilation, around, mode)


def _each(sizes: int | Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    return (sizes,) * len(kernel) if isinstance(sizes, int) else tuple(sizes)


class HalfConv(FrozenStorage):
    """An nn.Conv1d or nn.Conv2d whose weight and bias are stored in 16 bits and frozen.

    It is computed in ``torch.promote_types(x.dtype, weight.dtype)``: float32 for a float32 input.

    Args:
        weight: float16 or bfloat16 ``(out_channels, in_channels / groups, *kernel)``.
        bias: the same dtype (out_channels,), or None.
        geometry: strides, paddings and the like.
    """

    stored = ("weight", "bias")
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.weight = freeze(weight)
        self.register_parameter("bias", None if bias is None else freeze(bias))

    @classmethod
    def from_layer(cls, layer: nn.Conv1d | nn.Conv2d, technique: Half, store: HalfStore | None = None) -> HalfConv:
        """Build it from a dense layer, whose tensors ``store`` stores (None: the technique does).

        Raises:
            TypeError, ValueError: weights that are not floating point, have no values, or that the
                dtype cannot hold.
        """
        store = store or technique.store
        bias = None if layer.bias is None else store(layer.bias, "bias")
        return cls(store(layer.weight, "weight"), bias, geometry_of(layer))

    def forward(self, input: Tensor) -> Tensor:
        """Return (batch, out_channels, *size) in the input's dtype, for (batch, in_channels, *size), batch or not."""
        x = autocast(input)
        return frozen_conv(x, self.weight, self.geometry, torch.promote_types(x.dtype, self.weight.dtype), self.bias)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Conv2d does, and how it is stored."""
        return f"{self.geometry}, bias={self.bias is not None}, dtype={self.weight.dtype}"


class Conv4Bit(FourBitStorage):
    """An nn.Conv1d or nn.Conv2d whose weight is stored in 4 bits, frozen, and whose bias is as it was.

    Args:
        weight: quantized (out_channels, in_channels / groups * kernel): a row an output channel.
        bias: floating point (out_channels,), or None.
        geometry: strides, paddings and the like.
        compute_dtype: to compute in; None takes the input's.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: nn.Parameter | None,
        geometry: Geometry,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        if compute_dtype is torch.int8:
            raise ValueError(f"compute_dtype={compute_dtype} is for linear layers: give a float dtype, or None")
        super().__init__(weight)
        self.geometry, self.compute_dtype = geometry, compute_dtype
        self.register_parameter("bias", bias)

    @classmethod
    def from_layer(
        cls, layer: nn.Conv1d | nn.Conv2d, technique: FourBit, store: FourBitStore | None = None
    ) -> Conv4Bit:
        """Build it from a dense layer, whose weight ``store`` stores (None: the technique does); its bias stays.

        Raises:
            TypeError, ValueError: weights that ``quantize`` refuses.
        """
        weight = (store or technique.store)(layer.weight.flatten(1), "weight")
        bias = cast("nn.Parameter | None", layer.bias)
        compute = technique.compute_dtype if technique.compute_dtype is not torch.int8 else None  # for linear layers
        return cls(weight, bias, geometry_of(layer), compute)

    def forward(self, input: Tensor) -> Tensor:
        """Return (batch, out_channels, *size) in the input's dtype, for (batch, in_channels, *size), batch or not."""
        x = autocast(input)
        return frozen_conv(x, self.quantized, self.geometry, self.compute_dtype or x.dtype, self.bias)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Conv2d does, and how it is stored."""
        return f"{self.geometry}, bias={self.bias is not None}, {super().extra_repr()}"
