"""Codes and scales of other programs' weights, as ``QuantizedTensor`` holds them exactly, and the reverse.

Exact means: ``dequantize(torch.float32)`` gives the bits that the other program computes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.io.formats.foreign import ForeignTensor, Parts
from lowmem.quant.packing import pack
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
    pairs = [codes[byte & 15] | codes[byte >> 4] << 4 for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.uint8, device="cpu")[packed.int()]


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
    starts = torch.arange(0, weight.shape[-1], size, dtype=torch.int64, device=weight.scales.device)
    return starts // weight.block_size


@dataclass(frozen=True)
class IntegerLayer:
    """A layer's weight of integers, ``(code - zero) * scale``, as GPTQ, AWQ and compressed-tensors have it.

    Its parts are read when they are asked for.

    Args:
        parts: its tensors.
        kind: how the weight is stored, as text.
        shape: (..., out, in).
        group: columns of a scale; the last group may be shorter.
        dtype: of the scales.
        codes: returns the codes, integers (..., out, in).
        scales: returns the scales, (..., out, groups).
        zeros: returns the zero points, integers (..., out, groups); None: they are 8.
        groups: returns the group of each column; None if the groups are in order.
    """

    parts: Parts
    kind: str
    shape: tuple[int, ...]
    group: int
    dtype: torch.dtype
    codes: Callable[[], Tensor]
    scales: Callable[[], Tensor]
    zeros: Callable[[], Tensor | None] = lambda: None
    groups: Callable[[], Tensor] | None = None

    def tensor(self) -> ForeignTensor:
        """Return the weight, refused if it is not 16 levels times the scales of blocks."""
        zeros = self.zeros()
        try:
            is_in_order = _is_sorted(self.order())
            if self.dtype not in (torch.float16, torch.bfloat16) and zeros is not None and bool((zeros != 8).any()):
                raise ValueError(f"zero points times scales in {self.dtype} have more bits than float32")
            fitting_blocks(self.group, self.shape[-1])
        except ValueError as reason:
            return self.refused(str(reason))
        return self.parts.weight(self.kind, self.shape, self.read, order=None if is_in_order else self.order)

    def refused(self, why: str) -> ForeignTensor:
        """Return the weight, which is quantized again or not read."""
        return self.parts.refused(self.kind, self.shape, why, self.values)

    def _groups_of_columns(self) -> Tensor:
        """Return the group of each column; a ValueError if one has no scale."""
        if self.groups is None:
            return torch.arange(self.shape[-1], dtype=torch.int64, device="cpu") // self.group
        groups, count = self.groups().long(), -(-self.shape[-1] // self.group)
        if not bool(((groups >= 0) & (groups < count)).all()):
            raise ValueError(f"its columns are of groups that {count} scales do not have; get it again")
        return groups

    def order(self) -> Tensor:
        """Return the columns with those of a group side by side: int32 (in,); a ValueError if sizes differ."""
        groups = self._groups_of_columns()
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], torch.arange(len(groups), dtype=torch.int64, device="cpu") // self.group):
            raise ValueError(f"its groups do not have {self.group} columns each")
        return order.to(torch.int32)

    def read(self) -> QuantizedTensor:
        """Return the weight, with its columns in the order of their groups.

        Where all zeros are 8 it has the levels (code - 8) / 8, else code / 16 and the offsets ``-zero * scale``. Both
        products, and so their sum, are exact: a scale of 16 bits times 4 bits.

        Raises:
            ValueError: scales that are not finite.
        """
        columns, size = self.shape[-1], fitting_blocks(self.group, self.shape[-1])
        # The group of each block.
        starts = torch.arange(0, columns, size, dtype=torch.int64, device="cpu") // self.group
        codes, scales, zeros, order = self.codes(), self.scales().float(), self.zeros(), self.order()
        codes = codes if _is_sorted(order) else codes[..., order]
        if columns % 2:
            codes = torch.nn.functional.pad(codes, (0, 1), value=8)  # fills the last byte
        packed = pack(codes, size)
        if zeros is None or bool((zeros == 8).all()):
            return quantized(packed, (8 * scales)[..., starts].contiguous(), self.shape, "q4_0", size)
        offsets = -(zeros.float() * scales)[..., starts].contiguous()
        return quantized(packed, (16 * scales)[..., starts].contiguous(), self.shape, "uint4", size, offsets)

    def values(self) -> Tensor:
        """Return the weight in float32, with its columns as the file has them."""
        groups, zeros = self._groups_of_columns(), self.zeros()
        less = 8 if zeros is None else zeros.int()[..., groups]
        return (self.codes().int() - less).float() * self.scales().float()[..., groups]


def _is_sorted(order: Tensor) -> bool:
    return bool((order.diff() > 0).all())
