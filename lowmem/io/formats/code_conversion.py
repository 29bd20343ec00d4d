"""Codes and scales of other programs' weights, as ``QuantizedTensor`` holds them exactly, and the reverse.

Exact means: ``dequantize(torch.float32)`` gives the bits that the other program computes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.io.formats.foreign_format import LayerTensors, LazyForeignTensor
from lowmem.quant.packing import pack
from lowmem.quant.scale_encodings import get_scale_encoding
from lowmem.quant.tensor import QuantizedTensor


def imported_quantized_tensor(
    packed: Tensor,
    scales: Tensor,
    shape: tuple[int, ...],
    format: str,
    block_size: int,
    offsets: Tensor | None = None,
) -> QuantizedTensor:
    """Return the weight of packed codes and float32 scales (..., blocks).

    ``smallest_exact_scale_encoding`` chooses the encoding of the scales.
    """
    encoding = smallest_exact_scale_encoding(scales, offsets)
    stored = (scales if offsets is None else torch.cat([scales, offsets], dim=-1)).to(
        get_scale_encoding(encoding).dtype
    )
    return QuantizedTensor(packed, stored, torch.Size(shape), format, block_size, encoding, "imported")


def smallest_exact_scale_encoding(scales: Tensor, offsets: Tensor | None = None) -> str:
    """Return the smallest encoding that holds float32 scales, and offsets; a ValueError if some are not finite."""
    parts = [scales] if offsets is None else [scales, offsets]
    broken = sum(int((~part.isfinite()).sum()) for part in parts)
    if broken:
        raise ValueError(f"it holds {broken} scales that are NaN, infinite or too large for float32; get it again")
    name = "float16" if all(torch.equal(part.to(torch.float16).float(), part) for part in parts) else "float32"
    return name if offsets is None else f"{name}_offsets"


def largest_dividing_block_size(group_size: int, columns: int) -> int:
    """Return the largest valid block size that divides groups of ``group_size`` columns, or rows, into whole blocks.

    Raises:
        ValueError: no divisor of the groups is an even number from 8 to 4096.
    """
    group_size = min(group_size, columns)
    for parts in range(1, min(group_size // 8, 4097) + 1):
        size, rest = divmod(group_size, parts)
        if not rest and size % 2 == 0 and size <= 4096:
            return size
    raise ValueError(
        f"a scale for each {group_size} of {columns} columns has no blocks of an even number from 8 to 4096"
    )


def unpacked_nibbles(packed: Tensor) -> Tensor:
    """Return the low and the high nibble of each byte, in this order: uint8 (..., m) -> (..., 2 m)."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def unpacked_4bit_codes_from_int32(words: Tensor, count: int) -> Tensor:
    """Return eight codes of each word, the lowest bits first: int32 (..., count / 8) -> uint8 (..., count)."""
    return unpacked_nibbles(tensor_bytes_copy(words))[..., :count]


def packed_4bit_codes_in_int32(codes: Tensor) -> Tensor:
    """Return codes with eight in a word, the first of them lowest: uint8 (n, m) -> int32 (n, m / 8)."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).view(codes.shape[0], -1, 4, 2)
    pairs = (padded[..., 0] | padded[..., 1] << 4).contiguous()  # (n, words, 4 bytes)
    return pairs.view(torch.int32).squeeze(-1)


def tensor_bytes_copy(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: (..., n) -> uint8 (..., n * itemsize)."""
    # Not contiguous(), which leaves dimensions of one number their strides.
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def remapped_nibbles(packed: Tensor, new_codes: tuple[int, ...]) -> Tensor:
    """Replace both nibbles of each byte: nibble n becomes ``codes[n]``."""
    pairs = [new_codes[byte & 15] | new_codes[byte >> 4] << 4 for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.uint8, device="cpu")[packed.int()]


def largest_block_size_dividing_rows(weight: QuantizedTensor) -> int:
    """Return the largest block size in which all blocks of a weight are whole, and have its scales."""
    columns, block_size = weight.shape[-1], weight.block_size
    return columns if columns <= block_size else math.gcd(block_size, columns)


def unpacked_codes(weight: QuantizedTensor) -> Tensor:
    """Return the codes of a weight: uint8 (..., n)."""
    return weight.unpacked(weight.packed.detach())


def float32_scales_for_smaller_blocks(weight: QuantizedTensor, block_size: int) -> Tensor:
    """Return the scales of a weight in blocks of ``block_size``, which divides its own blocks: float32 (...,
    blocks)."""
    return weight.encoding.decode(weight.scales.detach())[
        ..., _original_block_indices(weight, block_size)
    ].contiguous()


def offsets_for_smaller_blocks(weight: QuantizedTensor, block_size: int) -> Tensor:
    """Return the offsets of a weight that has them, as ``float32_scales_for_smaller_blocks`` does the scales."""
    return weight.offsets().detach()[..., _original_block_indices(weight, block_size)].contiguous()


def _original_block_indices(weight: QuantizedTensor, block_size: int) -> Tensor:
    """Return the block of a weight in which each block of ``block_size`` lies."""
    starts = torch.arange(0, weight.shape[-1], block_size, dtype=torch.int64, device=weight.scales.device)
    return starts // weight.block_size


@dataclass(frozen=True)
class LazyIntegerWeight:
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

    parts: LayerTensors
    kind: str
    shape: tuple[int, ...]
    group: int
    dtype: torch.dtype
    codes: Callable[[], Tensor]
    scales: Callable[[], Tensor]
    zeros: Callable[[], Tensor | None] = lambda: None
    groups: Callable[[], Tensor] | None = None

    def exact_or_refused_foreign_tensor(self) -> LazyForeignTensor:
        """Return the weight, refused if it is not 16 levels times the scales of blocks."""
        zeros = self.zeros()
        try:
            is_in_order = _is_sorted(self.checked_column_order_by_group())
            if self.dtype not in (torch.float16, torch.bfloat16) and zeros is not None and bool((zeros != 8).any()):
                raise ValueError(f"zero points times scales in {self.dtype} have more bits than float32")
            largest_dividing_block_size(self.group, self.shape[-1])
        except ValueError as reason:
            return self.as_refused_foreign_tensor(str(reason))
        return self.parts.foreign_tensor_of_weight(
            self.kind,
            self.shape,
            self.read_quantized_in_group_order,
            order=None if is_in_order else self.checked_column_order_by_group,
        )

    def as_refused_foreign_tensor(self, reason: str) -> LazyForeignTensor:
        """Return the weight, which is quantized again or not read."""
        return self.parts.refused_tensor_of_weight(self.kind, self.shape, reason, self.read_float32_values)

    def _checked_group_of_each_column(self) -> Tensor:
        """Return the group of each column; a ValueError if one has no scale."""
        if self.groups is None:
            return torch.arange(self.shape[-1], dtype=torch.int64, device="cpu") // self.group
        groups, count = self.groups().long(), -(-self.shape[-1] // self.group)
        if not bool(((groups >= 0) & (groups < count)).all()):
            raise ValueError(f"its columns are of groups that {count} scales do not have; get it again")
        return groups

    def checked_column_order_by_group(self) -> Tensor:
        """Return the columns with those of a group side by side: int32 (in,); a ValueError if sizes differ."""
        groups = self._checked_group_of_each_column()
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], torch.arange(len(groups), dtype=torch.int64, device="cpu") // self.group):
            raise ValueError(f"its groups do not have {self.group} columns each")
        return order.to(torch.int32)

    def read_quantized_in_group_order(self) -> QuantizedTensor:
        """Return the weight, with its columns in the order of their groups.

        Where all zeros are 8 it has the levels (code - 8) / 8, else code / 16 and the offsets ``-zero * scale``. Both
        products, and so their sum, are exact: a scale of 16 bits times 4 bits.

        Raises:
            ValueError: scales that are not finite.
        """
        columns, size = self.shape[-1], largest_dividing_block_size(self.group, self.shape[-1])
        # The group of each block.
        starts = torch.arange(0, columns, size, dtype=torch.int64, device="cpu") // self.group
        codes, scales, zeros, order = (
            self.codes(),
            self.scales().float(),
            self.zeros(),
            self.checked_column_order_by_group(),
        )
        codes = codes if _is_sorted(order) else codes[..., order]
        if columns % 2:
            # Fills the last byte
            codes = torch.nn.functional.pad(codes, (0, 1), value=8)
        packed = pack(codes, size)
        if zeros is None or bool((zeros == 8).all()):
            return imported_quantized_tensor(packed, (8 * scales)[..., starts].contiguous(), self.shape, "q4_0", size)
        offsets = -(zeros.float() * scales)[..., starts].contiguous()
        return imported_quantized_tensor(
            packed, (16 * scales)[..., starts].contiguous(), self.shape, "uint4", size, offsets
        )

    def read_float32_values(self) -> Tensor:
        """Return the weight in float32, with its columns as the file has them."""
        groups, zeros = self._checked_group_of_each_column(), self.zeros()
        less = 8 if zeros is None else zeros.int()[..., groups]
        return (self.codes().int() - less).float() * self.scales().float()[..., groups]


def _is_sorted(order: Tensor) -> bool:
    return bool((order.diff() > 0).all())
