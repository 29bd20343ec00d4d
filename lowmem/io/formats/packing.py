"""What a format of packed linear layers is: how it packs one, how it quantizes one anew, and what its config says."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.quant.tensor import QuantizedTensor

__all__ = ["Packed", "Packing", "codes_of", "offsets_of", "scales_of", "uniform_block"]


@dataclass(frozen=True)
class Packed:
    """A linear layer's weight in another program's format.

    Args:
        kind: how it is stored, as text.
        parts: its tensors, by their names in the layer.
        scheme: what the config says of it; hashable.
    """

    kind: str
    parts: Mapping[str, Tensor]
    scheme: Any


@dataclass(frozen=True)
class Packing:
    """A format of folders with packed linear layers.

    Args:
        name: of the format.
        pack: weight (out, in) and dtype of the model -> the same weight packed; ValueError: why that cannot be.
        pack_again: values (out, in), dtype, and the weight as it is stored unless that is transposed -> them packed
            with other scales or codes, and what they became. On the meta device the parts have no values. ValueError:
            why it is impossible.
        config: schemes by layer, dense layers, dtype -> the ``quantization_config``.
        conv1d: whether the format has transformers' Conv1D layers, transposed.
        keeps_weight: whether a loaded layer's codes are called ``weight``.
        warning: schemes of a folder -> what its user should know, or None.
    """

    name: str
    pack: Callable[[QuantizedTensor, torch.dtype], Packed]
    pack_again: Callable[[Tensor, torch.dtype, QuantizedTensor | None], tuple[Packed, Tensor | QuantizedTensor]]
    config: Callable[[Mapping[str, Any], Collection[str], torch.dtype], dict[str, Any]]
    conv1d: bool
    keeps_weight: bool
    warning: Callable[[Collection[Any]], str | None] = lambda schemes: None


def uniform_block(weight: QuantizedTensor) -> int:
    """Return the largest block size in which all blocks of a weight are whole, and have its scales."""
    columns, own = weight.shape[-1], weight.block_size
    return columns if columns <= own else math.gcd(own, columns)


def codes_of(weight: QuantizedTensor) -> Tensor:
    """Return the codes of a weight: uint8 (..., n)."""
    return weight.unpacked(weight.packed.detach())


def scales_of(weight: QuantizedTensor, size: int) -> Tensor:
    """Return the scales of a weight in blocks of ``size``, which divides its own blocks: float32 (..., blocks)."""
    return weight.encoding.decode(weight.scales.detach())[..., _blocks_of(weight, size)].contiguous()


def offsets_of(weight: QuantizedTensor, size: int) -> Tensor:
    """Return the offsets of a weight that has them, as ``scales_of`` does the scales."""
    return weight.offsets().detach()[..., _blocks_of(weight, size)].contiguous()


def _blocks_of(weight: QuantizedTensor, size: int) -> Tensor:
    """Return the block of a weight in which each block of ``size`` lies."""
    return torch.arange(0, weight.shape[-1], size, device=weight.scales.device) // weight.block_size
