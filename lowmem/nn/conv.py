"""1-d and 2-d convolutions with weights in 16 or 4 bits."""

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
        # An odd span cannot be split in halves: torch puts the extra zero at the end.
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

    It computes in ``torch.promote_types(x.dtype, weight.dtype)``: in float32 for a float32 input.

    Args:
        weight: float16 or bfloat16 ``(out_channels, in_channels / groups, *kernel)``.
        bias: (out_channels,) in the dtype of the weight, or None.
        geometry: channels, kernel, stride, padding, dilation and groups.
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
        """Build it from a dense layer, whose tensors are stored by ``store``, or ``technique.store`` for None.

        Raises:
            TypeError, ValueError: weights that are not floating point, have no values, or exceed the range of the
                dtype.
        """
        store = store or technique.store
        bias = None if layer.bias is None else store(layer.bias, "bias")
        return cls(store(layer.weight, "weight"), bias, geometry_of(layer))

    def forward(self, input: Tensor) -> Tensor:
        """Convolve: ([batch,] in_channels, *size) -> ([batch,] out_channels, *out size), in the input's dtype."""
        x = autocast(input)
        return frozen_conv(x, self.weight, self.geometry, torch.promote_types(x.dtype, self.weight.dtype), self.bias)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Conv2d does, and how it is stored."""
        return f"{self.geometry}, bias={self.bias is not None}, dtype={self.weight.dtype}"


class Conv4Bit(FourBitStorage):
    """An nn.Conv1d or nn.Conv2d whose weight is stored in 4 bits and frozen; the bias is unchanged.

    Args:
        weight: quantized (out_channels, in_channels / groups * kernel), one row per output channel.
        bias: floating point (out_channels,), or None.
        geometry: channels, kernel, stride, padding, dilation and groups.
        compute_dtype: to compute in, floating point; None: the dtype of the input.
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
        """Build it from a dense layer, whose weight is stored by ``store``, or ``technique.store`` for None.

        Raises:
            TypeError, ValueError: weights that ``quantize`` rejects.
        """
        weight = (store or technique.store)(layer.weight.flatten(1), "weight")
        bias = cast("nn.Parameter | None", layer.bias)
        compute = technique.compute_dtype if technique.compute_dtype is not torch.int8 else None  # int8: linear only
        return cls(weight, bias, geometry_of(layer), compute)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve: ([batch,] in_channels, *size) -> ([batch,] out_channels, *out size), in the input's dtype."""
        x = autocast(input)
        return frozen_conv(x, self.quantized, self.geometry, self.compute_dtype or x.dtype, self.bias)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Conv2d does, and how it is stored."""
        return f"{self.geometry}, bias={self.bias is not None}, {super().extra_repr()}"
