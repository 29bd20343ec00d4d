"""Numbers as 8-bit codes in blocks of 32 with one scale each: the definitions of these methods of ``Backend``.

    scale = min(max |x| / 127, LARGEST_SCALE),    code = round(x / scale),    x ~ code scale

Halves are rounded to even. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861,
section 2. All backends give the same bits.

Codes of roots need no host that decides which numbers they suit, for which it would wait on a GPU: they are off by
1.2 times as much for normal numbers, keep numbers that are 250 times smaller, and those that are not finite.

    scale = max |x| of the finite x,    code = sign(x) round(126 sqrt(|x| / scale)),    x ~ code |code| / 126^2 scale
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lowmem.quant.tensor import float32_table, row_slices_within_scratch

BLOCK = 32

LARGEST_SCALE = float.fromhex("0x1.020406p+121")
"""The largest float32 whose product with 127 is finite: less than the largest float32 / 127, which rounds up."""

_ROOT_STEPS = 126
# By the code's byte: 127 and -127 are infinities, and -128 is NaN
_ROOT_LEVELS = (
    *((code / _ROOT_STEPS) ** 2 for code in range(127)),
    *(math.inf, math.nan, -math.inf),
    *(-((code / _ROOT_STEPS) ** 2) for code in range(126, 0, -1)),
)

_ROOT_BYTES = 16
"""Scratch of a number whose root is coded: three float32 temporaries, and a padded copy."""

# Blocks that are computed at a time, so that temporaries stay in a processor's cache
_ROWS = 2**13


def encode_8bit(numbers: Tensor, into: tuple[Tensor, Tensor]) -> tuple[int, int]:
    """Write codes and scales; return how many numbers and codes are other than zero.

    Args:
        numbers: floating point (length,), contiguous.
        into: codes, int8 (blocks, 32), from -127 to 127, with zeros behind the last number; and scales, float32
            (blocks, 1): NaN, with any codes, where a number is not finite.
    """
    codes, scales = into
    before, after = int(numbers.count_nonzero()), 0
    blocks = functional.pad(numbers, (0, codes.numel() - numbers.numel())).view(-1, BLOCK)
    for source, part, scale in zip(blocks.split(_ROWS), codes.split(_ROWS), scales.split(_ROWS), strict=True):
        wide = source.float()
        scaled = wide.abs()
        torch.amax(scaled, 1, keepdim=True, out=scale).div_(127)
        scale.masked_fill_(~scale.isfinite(), torch.nan).clamp_(max=LARGEST_SCALE)
        torch.div(wide, scale.clamp_min(torch.finfo(torch.float32).tiny), out=scaled)
        part.copy_(scaled.round_())
        after += int(part.count_nonzero())
    return before, after


def decode_8bit(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``codes * scales``, computed in float32, in ``dtype``: (blocks, 32)."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for part, scale, into in zip(codes.split(_ROWS), scales.split(_ROWS), out.split(_ROWS), strict=True):
        into.copy_(part * scale)
    return out


def empty_codes_and_scales(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return uninitialized codes and scales for numbers."""
    blocks = -(-numbers.numel() // BLOCK)
    codes = torch.empty(blocks, BLOCK, dtype=torch.int8, device=numbers.device)
    return codes, torch.empty(blocks, 1, dtype=torch.float32, device=numbers.device)


def encode_roots(numbers: Tensor, into: tuple[Tensor, Tensor]) -> None:
    """Write codes of roots, as ``encode_8bit`` does its codes. Nothing is read by the host.

    ``|x - decoded| <= sqrt(|x| scale) / 126 + scale / 252^2``, up to rounding; what float32 cannot hold is infinite.
    """
    codes, scales = into
    missing = codes.numel() - numbers.numel()
    blocks = (functional.pad(numbers, (0, missing)) if missing else numbers).view(-1, BLOCK)
    for rows in row_slices_within_scratch(len(codes), BLOCK, _ROOT_BYTES, device=codes.device):
        wide = blocks[rows].float()
        root = wide.abs()
        scale = torch.amax(root.nan_to_num(0, 0), 1, keepdim=True, out=scales[rows])
        root.div_(scale.clamp_(min=torch.finfo(torch.float32).tiny)).sqrt_().mul_(_ROOT_STEPS).round_()
        codes[rows] = root.copysign_(wide).nan_to_num_(-128, 127, -127)


def decode_roots(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of ``encode_roots``, in ``dtype``: (blocks, 32)."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    levels = float32_table(_ROOT_LEVELS, codes.device)
    for rows in row_slices_within_scratch(len(codes), BLOCK, _ROOT_BYTES, device=codes.device):
        level = levels.index_select(0, codes[rows].view(torch.uint8).view(-1).int())
        out[rows] = level.view(-1, BLOCK).mul_(scales[rows])
    return out
