"""The block types of GGUF: what a row of bytes means, as ``ggml-common.h`` of llama.cpp has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lowmem.io.formats.code_conversion import remapped_nibbles
from lowmem.io.formats.mxfp4 import E2M1_CODES, fp4_scales_from_exponents


@dataclass(frozen=True)
class GGUFBlockType:
    """One type of block: a row of n weights is n / ``size`` blocks of ``nbytes`` bytes.

    Args:
        name: as ggml names the type.
        size: weights in a block.
        nbytes: bytes of a block.
        file_type: ``general.file_type`` of a file whose matrices are mostly of it; None: lowmem writes none.
        format: lowmem's format with the same levels; None if there is no such format.
        divisor: the power of two by which lowmem's scales are divided; None for MXFP4.
        packed: uint8 (rows, blocks, nbytes) -> codes, packed as lowmem does, (rows, blocks, size / 2); in 8 bits
            (rows, blocks, size).
        factors: the same -> float32 (rows, blocks, scales of a block): the scales divided by ``divisor``.
        offsets: the same -> float32 offsets, as many as scales; None: the type has none.
        dense: the same -> the weights, (rows, blocks, size), in ``dtype``; with a format, those of vectors.
        dtype: that holds them exactly.
        refusal: why it is not read.
    """

    name: str
    size: int
    nbytes: int
    file_type: int | None = None
    format: str | None = None
    divisor: float | None = None
    packed: Callable[[Tensor], Tensor] | None = None
    factors: Callable[[Tensor], Tensor] | None = None
    offsets: Callable[[Tensor], Tensor] | None = None
    dense: Callable[[Tensor], Tensor] | None = None
    dtype: torch.dtype = torch.float32
    refusal: str | None = None

    def decoded_block_scales(self, raw: Tensor) -> Tensor:
        """Return the scales of blocks, (rows, blocks, scales of a block)."""
        assert self.factors
        return (self.divisor or 1) * self.factors(raw)


def _float16_field_as_float32(raw: Tensor, byte_offset: int = 0) -> Tensor:
    """Return the float16 at byte ``byte_offset`` of each block, in float32: (rows, blocks, 1)."""
    return _reinterpreted_bytes(raw[..., byte_offset : byte_offset + 2], torch.float16).float()


def _reinterpreted_bytes(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bytes (..., n) as another dtype: (..., n / itemsize)."""
    # Clone: it may lie at any address
    return raw.clone(memory_format=torch.contiguous_format).view(dtype)


def _low_then_high_nibbles(raw: Tensor, block_size: int) -> Tensor:
    """Return the nibbles of bytes, in split halves of ``block_size`` values: (..., n) -> (..., 2 n / block,
    block)."""
    halves = raw.unflatten(-1, (-1, block_size // 2))
    return torch.cat([halves & 15, halves >> 4], dim=-1)


def _iq4_xs_scales(raw: Tensor) -> Tensor:
    """IQ4_XS: eight 6-bit scales of a block, 4 low bits in bytes 4 to 7, 2 high bits in the 16 of bytes 2 and 3."""
    low = torch.stack([raw[..., 4:8] & 15, raw[..., 4:8] >> 4], dim=-1).flatten(-2).int()  # (rows, blocks, 8)
    both = raw[..., 2:3].int() | raw[..., 3:4].int() << 8
    high = both >> torch.arange(0, 16, 2, dtype=torch.int32, device="cpu") & 3
    return _float16_field_as_float32(raw) * ((low | high << 4) - 32).float()


def _q4_k_q5_k_scales(raw: Tensor) -> Tensor:
    """Q4_K and Q5_K: the 6-bit scales of the eight sub-blocks in bytes 4 to 15, (rows, blocks, 8)."""
    low, high = raw[..., 4:8], raw[..., 12:16]
    return _float16_field_as_float32(raw) * torch.cat([low & 63, high & 15 | (low >> 6) << 4], dim=-1).float()


def _q4_k_q5_k_minima(raw: Tensor) -> Tensor:
    """Q4_K and Q5_K: their 6-bit minima, (rows, blocks, 8)."""
    middle, high = raw[..., 8:12], raw[..., 12:16]
    return (
        _float16_field_as_float32(raw, 2) * torch.cat([middle & 63, high >> 4 | (middle >> 6) << 4], dim=-1).float()
    )


def _q4_k_q5_k_low_nibbles(raw: Tensor, byte_offset: int) -> Tensor:
    """Q4_K and Q5_K: the low four bits, 32 low nibbles before 32 high ones: (rows, blocks, 8, 32)."""
    parts = raw[..., byte_offset:].unflatten(-1, (4, 1, 32))
    return torch.cat([parts & 15, parts >> 4], dim=-2).flatten(-3, -2)


def _repacked_q4_k_codes(raw: Tensor) -> Tensor:
    low, high = _q4_k_q5_k_low_nibbles(raw, 16).chunk(2, dim=-1)  # (rows, blocks, 8, 16) each
    return (low | high << 4).flatten(-2)


def _dequantized_q5_k(raw: Tensor) -> Tensor:
    """Q5_K: the fifth bits of sub-block i are the bits i of bytes 16 to 47."""
    shifts = torch.arange(8, dtype=torch.uint8, device="cpu")[:, None]
    fifth = raw[..., None, 16:48] >> shifts & 1  # (rows, blocks, 8, 32)
    weights = _q4_k_q5_k_scales(raw)[..., None] * (_q4_k_q5_k_low_nibbles(raw, 48) | fifth << 4).float()
    return (weights - _q4_k_q5_k_minima(raw)[..., None]).flatten(-2)


def _q5_0_q5_1_codes(raw: Tensor, byte_offset: int) -> Tensor:
    """Q5_0 and Q5_1: the codes, whose fifth bits are the four bytes from ``byte_offset`` on: (rows, blocks, 32)."""
    bits = (
        raw[..., byte_offset : byte_offset + 4, None] >> torch.arange(8, dtype=torch.uint8, device="cpu") & 1
    )  # (rows, blocks, 4, 8)
    return (_low_then_high_nibbles(raw[..., byte_offset + 4 :], 32).flatten(-2) | bits.flatten(-2) << 4).float()


def _unpacked_two_bit_codes(raw: Tensor) -> Tensor:
    """Return the four pairs of bits of each byte: first the lowest ones of 32 bytes: (..., 64) -> (..., 256)."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device="cpu")[:, None]
    pairs: Tensor = (raw.unflatten(-1, (2, 1, 32)) >> shifts & 3).flatten(-3)
    return pairs


def _codes_scaled_in_groups_of_16(scales: Tensor, codes: Tensor) -> Tensor:
    """Multiply 16 codes with each scale: (rows, blocks, 16) and (rows, blocks, 256) -> (rows, blocks, 256)."""
    weights: Tensor = (scales[..., None] * codes.float().unflatten(-1, (16, 16))).flatten(-2)
    return weights


def _dequantized_q2_k(raw: Tensor) -> Tensor:
    """Q2_K: 16 bytes of a 4-bit scale and minimum, the codes in bytes 16 to 79, and two float16."""
    scales, minima = (
        _float16_field_as_float32(raw, 80) * (raw[..., :16] & 15).float(),
        _float16_field_as_float32(raw, 82) * (raw[..., :16] >> 4).float(),
    )
    return _codes_scaled_in_groups_of_16(scales, _unpacked_two_bit_codes(raw[..., 16:80])) - minima.repeat_interleave(
        16, -1
    )


def _dequantized_q3_k(raw: Tensor) -> Tensor:
    """Q3_K: the third bit of each code in bytes 0 to 31, two bits in 32 to 95, 16 scales of 6 bits, and a float16."""
    low = torch.cat([raw[..., 96:104] & 15, raw[..., 96:104] >> 4], dim=-1)
    shifts = torch.arange(8, dtype=torch.uint8, device="cpu")[:, None]
    high = (raw[..., None, 104:108] >> shifts[::2] & 3).flatten(-2)
    third = (raw[..., None, :32] >> shifts & 1).flatten(-2)  # (..., 256)
    codes = (_unpacked_two_bit_codes(raw[..., 32:96]) | third << 2).float() - 4
    return _codes_scaled_in_groups_of_16(
        _float16_field_as_float32(raw, 108) * ((low | high << 4).float() - 32), codes
    )


def _dequantized_q6_k(raw: Tensor) -> Tensor:
    """Q6_K: 4 low bits in bytes 0 to 127, 2 high bits in 128 to 191, 16 signed scales, and a float16."""
    low = _low_then_high_nibbles(raw[..., :128], 128).flatten(-2)  # (rows, blocks, 256)
    codes = (low | _unpacked_two_bit_codes(raw[..., 128:192]) << 4).float() - 32
    return _codes_scaled_in_groups_of_16(
        _float16_field_as_float32(raw, 208) * _reinterpreted_bytes(raw[..., 192:208], torch.int8).float(), codes
    )


def _float_block_type(name: str, file_type: int, dtype: torch.dtype) -> GGUFBlockType:
    return GGUFBlockType(
        name, 1, dtype.itemsize, file_type, dense=lambda raw: _reinterpreted_bytes(raw, dtype), dtype=dtype
    )


_NO_LEVELS = "its weights are not 16 levels times a scale; take the model's Q4_K_M, Q4_0, Q8_0 or F16 file"

BLOCKS = MappingProxyType(
    {
        0: _float_block_type("F32", 0, torch.float32),
        1: _float_block_type("F16", 1, torch.float16),
        30: _float_block_type("BF16", 32, torch.bfloat16),
        2: GGUFBlockType("Q4_0", 32, 18, 2, "q4_0", 8.0, lambda raw: raw[..., 2:], _float16_field_as_float32),
        20: GGUFBlockType("IQ4_NL", 32, 18, 25, "iq4_nl", 128.0, lambda raw: raw[..., 2:], _float16_field_as_float32),
        23: GGUFBlockType("IQ4_XS", 256, 136, 30, "iq4_nl", 128.0, lambda raw: raw[..., 8:], _iq4_xs_scales),
        3: GGUFBlockType(
            "Q4_1",
            32,
            20,
            3,
            "uint4",
            16.0,
            lambda raw: raw[..., 4:],
            _float16_field_as_float32,
            lambda raw: _float16_field_as_float32(raw, 2),
        ),
        12: GGUFBlockType(
            "Q4_K",
            256,
            144,
            15,
            "uint4",
            16.0,
            _repacked_q4_k_codes,
            _q4_k_q5_k_scales,
            lambda raw: -_q4_k_q5_k_minima(raw),
        ),
        39: GGUFBlockType(
            "MXFP4",
            32,
            17,
            38,
            "fp4",
            None,
            lambda raw: remapped_nibbles(raw[..., 1:], (*E2M1_CODES[:8], 8, *E2M1_CODES[9:])),  # ggml has no -0
            lambda raw: fp4_scales_from_exponents(raw[..., :1]),
        ),
        10: GGUFBlockType("Q2_K", 256, 84, dense=_dequantized_q2_k),
        11: GGUFBlockType("Q3_K", 256, 110, dense=_dequantized_q3_k),
        13: GGUFBlockType("Q5_K", 256, 176, dense=_dequantized_q5_k),
        6: GGUFBlockType(
            "Q5_0", 32, 22, dense=lambda raw: _float16_field_as_float32(raw) * (_q5_0_q5_1_codes(raw, 2) - 16)
        ),
        7: GGUFBlockType(
            "Q5_1",
            32,
            24,
            dense=lambda raw: (
                _float16_field_as_float32(raw) * _q5_0_q5_1_codes(raw, 4) + _float16_field_as_float32(raw, 2)
            ),
        ),
        8: GGUFBlockType(
            "Q8_0",
            32,
            34,
            7,
            "q8_0",
            1.0,
            lambda raw: raw[..., 2:] ^ 128,
            _float16_field_as_float32,
            dense=lambda raw: _float16_field_as_float32(raw) * _reinterpreted_bytes(raw[..., 2:], torch.int8).float(),
        ),
        14: GGUFBlockType("Q6_K", 256, 210, dense=_dequantized_q6_k),
        **{
            number: GGUFBlockType(name, size, nbytes, refusal=_NO_LEVELS)
            for number, name, size, nbytes in (
                (9, "Q8_1", 32, 40),
                (15, "Q8_K", 256, 292),
                (16, "IQ2_XXS", 256, 66),
                (17, "IQ2_XS", 256, 74),
                (18, "IQ3_XXS", 256, 98),
                (19, "IQ1_S", 256, 50),
                (21, "IQ3_S", 256, 110),
                (22, "IQ2_S", 256, 82),
                (29, "IQ1_M", 256, 56),
                (34, "TQ1_0", 256, 54),
                (35, "TQ2_0", 256, 66),
                (40, "NVFP4", 64, 36),
            )
        },
    }
)
"""By the number of the type in a file. ``dense`` ones in float32 are exact: no product has more than 24 bits; Q5_1,
Q2_K and Q5_K add, and round once, as ggml does."""

# Weights of a block, in the types that are written
SIZE = 32

KINDS = {block.format: kind for kind, block in BLOCKS.items() if block.format and block.size == SIZE}
SUPERBLOCKS = {block.format: kind for kind, block in BLOCKS.items() if block.format and block.size > SIZE}
"""Types by lowmem's format that has their levels: those with a scale for each block, and Q4_K and IQ4_XS."""

DENSE = {block.dtype: kind for kind, block in BLOCKS.items() if block.size == 1}
"""The types of dense tensors."""
