"""Codes and scales of other programs' weights, as ``QuantizedTensor`` holds them exactly, and the reverse.

Exact means: ``dequantize(torch.float32)`` gives the bits that the other program computes in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowmem.quant.scales import get_encoding
from lowmem.quant.tensor import QuantizedTensor


def quantized(
    packed: Tensor,
    scales: Tensor,
    shape: tuple[int, ...],
    format: str,
    block_size: int,
    offsets: Tensor | None = None,
) -> QuantizedTensor:
    """Return the weight of packed codes and float32 scales (..., blocks), whose encoding is ``encoding_of`` them."""
    encoding = encoding_of(scales, offsets)
    stored = (scales if offsets is None else torch.cat([scales, offsets], dim=-1)).to(get_encoding(encoding).dtype)
    return QuantizedTensor(packed, stored, torch.Size(shape), format, block_size, encoding, "imported")


def encoding_of(scales: Tensor, offsets: Tensor | None = None) -> str:
    """Return the smallest encoding that holds float32 scales, and offsets; a ValueError if some are not finite."""
    parts = [scales] if offsets is None else [scales, offsets]
    broken = sum(int((~part.isfinite()).sum()) for part in parts)
    if broken:
        raise ValueError(f"it holds {broken} scales that are NaN, infinite or too large for float32; get it again")
    name = "float16" if all(torch.equal(part.to(torch.float16).float(), part) for part in parts) else "float32"
    return name if offsets is None else f"{name}_offsets"


def fitting_blocks(group: int, columns: int) -> int:
    """Return the largest valid block size that divides groups of ``group`` columns, or rows, into whole blocks.

    Raises:
        ValueError: no divisor of the groups is an even number from 8 to 4096.
    """
    group = min(group, columns)
    for parts in range(1, min(group // 8, 4097) + 1):
        size, rest = divmod(group, parts)
        if not rest and size % 2 == 0 and size <= 4096:
            return size
    raise ValueError(f"a scale for each {group} of {columns} columns has no blocks of an even number from 8 to 4096")


def nibbles(packed: Tensor) -> Tensor:
    """Return the low and the high nibble of each byte, in this order: uint8 (..., m) -> (..., 2 m)."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def unpacked(words: Tensor, count: int) -> Tensor:
    """Return eight codes of each word, the lowest bits first: int32 (..., count / 8) -> uint8 (..., count)."""
    return nibbles(as_bytes(words))[..., :count]


def words(codes: Tensor) -> Tensor:
    """Return codes with eight in a word, the first of them lowest: uint8 (n, m) -> int32 (n, m / 8)."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).view(codes.shape[0], -1, 4, 2)
    pairs = (padded[..., 0] | padded[..., 1] << 4).contiguous()  # (n, words, 4 bytes)
    return pairs.view(torch.int32).squeeze(-1)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: (..., n) -> uint8 (..., n * itemsize)."""
    # Not contiguous(), which leaves dimensions of one number their strides.
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def remapped(packed: Tensor, codes: tuple[int, ...]) -> Tensor:
    """Replace both nibbles of each byte: nibble n becomes ``codes[n]``."""
    table = torch.tensor([codes[byte & 15] | codes[byte >> 4] << 4 for byte in range(256)], dtype=torch.uint8)
    return table[packed.int()]


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
