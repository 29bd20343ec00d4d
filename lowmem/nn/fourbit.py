"""The 4-bit technique and its linear layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lowmem import kernels
from lowmem.nn.blockwise import Blockwise, check_compute_dtype
from lowmem.nn.frozen_linear import autocast, frozen_linear, is_plain_call, recorded_call
from lowmem.nn.stored import FourBitForm
from lowmem.nn.stored_module import LAYERS, FourBitStorage, kept_weight, stored_copy, stored_property
from lowmem.quant.formats import DEFAULT, DEFAULT_BLOCK_SIZE, get_format
from lowmem.quant.packing import check_block_size
from lowmem.quant.scales import OFFSETS, get_encoding
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["FourBit", "FourBitStore", "Linear4Bit"]

FourBitStore: TypeAlias = Callable[[Tensor, str], QuantizedTensor]
"""Quantizes a weight; the second argument names it in errors. ``FourBit.store``, or a replacement for it."""


@dataclass(frozen=True)
class FourBit(Blockwise):
    """4-bit quantization: weights are stored as 4-bit codes with a scale per block, frozen; biases are unchanged.

    QLoRA, arXiv 2305.14314, section 2.

    Args:
        format: a key of ``FORMATS``; or several, of which each weight gets the one with the smallest squared error.
            None: "bof4s", in blocks of 32 unless ``block_size`` is given.
        block_size: weights per scale, even, 8 to 4096; None: the format's default.
        scales: "float32", "float16" or "double", or one of the first two with "_offsets"; None: the format's default.
        compute_dtype: dtype of products, in stored layers and in modules that read stored weights (``Conv1D``,
            experts, torch's attention); None: the dtype of the input. With torch.int8, linear layers round inputs,
            to 8 bits, and levels to multiples of one step (``lowmem.kernels.int8``), and multiply integers; gradients
            and other modules use the dtype of the input.
        search: whether to search for the scales with the smallest squared error; None: the format's default.
        offsets: whether each block has an offset, too, the middle of its weights: scales become "float16_offsets" or
            "float32_offsets". Products then also need the sums of the input over blocks, in float32.
        embeddings: "8bit": embeddings, the output layer of a language model, and layers that share a weight with them
            are stored by ``EightBit()``; "4bit": like all other layers.

    Raises:
        ValueError: an unknown format or scales, a bad block size, another ``embeddings``, or a ``compute_dtype`` that
            is neither floating point with at least 16 bits nor torch.int8.
    """

    format: str | tuple[str, ...] = None  # type: ignore[assignment]  # which __post_init__ replaces
    block_size: int | None = None
    scales: str | None = None
    compute_dtype: torch.dtype | None = None
    search: bool | None = None
    offsets: bool = False
    embeddings: str = "8bit"

    def __post_init__(self) -> None:
        if self.format is None:
            object.__setattr__(self, "format", DEFAULT)
            if self.block_size is None:
                object.__setattr__(self, "block_size", DEFAULT_BLOCK_SIZE)
        if not isinstance(self.format, str):
            object.__setattr__(self, "format", tuple(self.format))  # a list would not be hashable
        if not self.format:
            raise ValueError(f"format={self.format!r} names no format: name one, or several to choose from")
        for name in [self.format] if isinstance(self.format, str) else self.format:
            if get_format(name).bits != 4:
                raise ValueError(f"format={name!r} has codes of 8 bits: EightBit() stores those")
        if self.block_size is not None:
            check_block_size(self.block_size)
        if self.offsets and self.scales not in OFFSETS:
            if self.scales not in (None, "float16", "float32"):
                raise ValueError(f"scales={self.scales!r} has no offsets: choose from {', '.join(OFFSETS)}")
            object.__setattr__(self, "scales", f"{self.scales or 'float16'}_offsets")
        if self.scales is not None:
            object.__setattr__(self, "offsets", get_encoding(self.scales).offsets)
        if self.embeddings not in ("8bit", "4bit"):
            raise ValueError(f"embeddings={self.embeddings!r} must be '8bit' or '4bit'")
        check_compute_dtype(self.compute_dtype)


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
