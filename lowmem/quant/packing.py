"""How codes become bytes, for each number of bits. The only Python file that depends on the order of the nibbles.

Two 4-bit codes share a byte. Within a block of B codes, byte j holds code j in its low nibble and code j + B/2 in its
high nibble ("split halves"), so unpacking takes a mask, a shift and no shuffle::

    block  c0 c1 c2 c3 c4 c5 c6 c7
    byte   c0|c4  c1|c5  c2|c6  c3|c7      (low|high)

The last block of a row may be shorter; it is split in halves like the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import short_repr

# Weights
MAX_BLOCK_SIZE = 4096


def check_block_size(block_size: int) -> None:
    """Raise a ValueError unless ``block_size`` is an even integer from 8 to 4096."""
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise ValueError(f"block_size={short_repr(block_size)} must be an integer")
    if block_size % 2 or not 8 <= block_size <= MAX_BLOCK_SIZE:
        raise ValueError(f"block_size={block_size} must be an even number from 8 to {MAX_BLOCK_SIZE}")


def pack(codes: Tensor, block_size: int) -> Tensor:
    """Pack 4-bit codes, two per byte.

    Args:
        codes: uint8 (..., n), values 0 to 15, n even.
        block_size: B, even, 8 to 4096.

    Returns:
        uint8 (..., n // 2).

    Raises:
        TypeError: ``codes`` is not a uint8 tensor.
        ValueError: a code above 15, an odd or missing last dimension, or a bad block size.
    """
    check_block_size(block_size)
    _check_uint8_with_last_dim("codes", codes)
    if codes.shape[-1] % 2:
        raise ValueError(f"codes.shape={tuple(codes.shape)}: the last dimension must be even; pad it by one code")
    if codes.numel() and not codes.is_meta and int(codes.max()) > 15:
        raise ValueError(f"codes hold {int(codes.max())}: a 4-bit code is 0 to 15")

    def join_nibbles(block: Tensor) -> Tensor:
        low, high = block.chunk(2, dim=-1)  # (..., B / 2) each
        return low | (high << 4)

    return apply_to_blocks_and_rest(codes, block_size, join_nibbles)


def unpack(packed: Tensor, block_size: int) -> Tensor:
    """Unpack what ``pack`` packed: uint8 (..., m) -> uint8 (..., 2 m). ``pack(unpack(p)) == p`` for all bytes.

    Raises:
        TypeError: ``packed`` is not a uint8 tensor.
        ValueError: no last dimension, or a bad block size.
    """
    check_block_size(block_size)
    _check_uint8_with_last_dim("packed", packed)

    def split_nibbles(block: Tensor) -> Tensor:
        return torch.cat([block & 15, block >> 4], dim=-1)  # (..., B)

    return apply_to_blocks_and_rest(packed, block_size // 2, split_nibbles)


def apply_to_blocks_and_rest(rows: Tensor, block_size: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``function`` to the whole blocks of each row (..., blocks, size), and to a shorter last one; join
    them."""
    length = rows.shape[-1]
    blocks, rest = divmod(length, block_size)
    whole = rows[..., : length - rest].reshape(*rows.shape[:-1], blocks, block_size)  # (..., blocks, size)
    changed = function(whole).flatten(-2)
    return torch.cat([changed, function(rows[..., length - rest :])], dim=-1) if rest else changed


def _check_uint8_with_last_dim(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8:
        actual = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a uint8 tensor, found {actual}")
    if tensor.dim() == 0:
        raise ValueError(f"{name}.shape=() has no last dimension to pack along")


class CodeWidth(ABC):
    """What codes of one number of bits have of their own; ``CODE_WIDTHS`` has an object for each width.

    Attributes:
        bits: of a code.
        is_centered: whether a level is ``(code - 2^(bits - 1)) / divisor``. Then kernels and graphs compute levels,
            and code 0 is not chosen, so that codes are symmetric. Otherwise levels are a table of numbers in [-1, 1].
        is_packed_by_block: whether the bytes of a row depend on the block size.
    """

    bits: ClassVar[int]
    is_centered: ClassVar[bool]
    is_packed_by_block: ClassVar[bool]

    @abstractmethod
    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of codes."""

    @abstractmethod
    def pack_rows(self, codes: Tensor, block_size: int, padding_code: int) -> Tensor:
        """Return codes, uint8 (..., n), as bytes: uint8 (..., row_bytes(n)); ``padding_code`` fills the last byte."""

    @abstractmethod
    def unpack_rows(self, packed: Tensor, block_size: int, columns: int) -> Tensor:
        """Return the codes (..., columns) of bytes that ``pack_rows`` returned: uint8, which may be a view."""

    @abstractmethod
    def unpack_float_rows(self, packed: Tensor, block_size: int, columns: int) -> Tensor:
        """Return what ``unpack_rows`` returns, for bytes as floats, in operations of floats alone: exporters to other
        formats have no others."""


class _FourBitWidth(CodeWidth):
    bits, is_centered, is_packed_by_block = 4, False, True

    def row_bytes(self, columns: int) -> int:
        return (columns + 1) // 2

    def pack_rows(self, codes: Tensor, block_size: int, padding_code: int) -> Tensor:
        if codes.shape[-1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1), value=padding_code)
        return pack(codes, block_size)

    def unpack_rows(self, packed: Tensor, block_size: int, columns: int) -> Tensor:
        return unpack(packed, block_size)[..., :columns]

    def unpack_float_rows(self, packed: Tensor, block_size: int, columns: int) -> Tensor:
        def split_nibbles(block: Tensor) -> Tensor:
            high = (block / 16).floor()
            return torch.cat([block - 16 * high, high], dim=-1)  # (..., B)

        return apply_to_blocks_and_rest(packed, block_size // 2, split_nibbles)[..., :columns]


class _EightBitWidth(CodeWidth):
    bits, is_centered, is_packed_by_block = 8, True, False

    def row_bytes(self, columns: int) -> int:
        return columns

    def pack_rows(self, codes: Tensor, block_size: int, padding_code: int) -> Tensor:
        return codes

    def unpack_rows(self, packed: Tensor, block_size: int, columns: int) -> Tensor:
        return packed

    def unpack_float_rows(self, packed: Tensor, block_size: int, columns: int) -> Tensor:
        return packed


CODE_WIDTHS = MappingProxyType({width.bits: width for width in (_FourBitWidth(), _EightBitWidth())})
"""The widths of codes that a format can have, by their bits."""
