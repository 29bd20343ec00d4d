"""Numbers as 8-bit codes in blocks of 32 with one scale each: the definitions of these methods of ``Backend``.

    scale = min(max |x| / 127, LARGEST_SCALE),    code = round(x / scale),    x ~ code scale

Halves are rounded to even. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861,
section 2. All backends give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 32

LARGEST_SCALE = float.fromhex("0x1.020406p+121")
"""The largest float32 whose product with 127 is finite: less than the largest float32 / 127, which rounds up."""

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
