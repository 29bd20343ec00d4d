"""Numbers as 8-bit codes in blocks of 32 with one scale each, by the backend of a tensor; and the definition.

    scale = max |x| / 127,    code = round(x / scale),    x ~ code scale

Halves are rounded to even. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861,
section 2. All backends give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lowmem.quant.backend import backend_of

__all__ = ["BLOCK", "code", "code_in_torch", "decode", "decode_in_torch", "empty_codes"]

BLOCK = 32

_CHUNK = 2**18
"""Numbers that torch compresses at a time, so that temporaries stay in a processor's cache."""


def code(numbers: Tensor, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Return codes, scales, and how many numbers and codes are other than zero.

    Args:
        numbers: floating point (length,), contiguous.
        into: codes and scales to write to; None: new ones.

    Returns:
        codes: int8 (blocks, 32), from -127 to 127; zeros behind the last number.
        scales: float32 (blocks, 1). NaN, with any codes, where a number is not finite.
        counts: of the numbers and of the codes.
    """
    return backend_of(numbers).encode_8bit(numbers, into or empty_codes(numbers))


def code_in_torch(
    numbers: Tensor, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Compute ``code``, by definition."""
    length, (codes, scales) = numbers.numel(), into or empty_codes(numbers)
    before = int(numbers.count_nonzero())
    numbers = functional.pad(numbers, (0, codes.numel() - length))
    rows = max(1, min(_CHUNK // BLOCK, len(codes)))
    scratch = torch.empty(rows, BLOCK, dtype=torch.float32, device=numbers.device)
    after = 0
    for source, part, scale in zip(
        numbers.view(-1, BLOCK).split(rows), codes.split(rows), scales.split(rows), strict=True
    ):
        scaled = scratch[: len(source)]
        torch.amax(torch.abs(scaled.copy_(source), out=scaled), 1, keepdim=True, out=scale).div_(127)
        torch.div(source.float(), scale.clamp_min(torch.finfo(torch.float32).tiny), out=scaled)
        part.copy_(scaled.round_())
        after += int(part.count_nonzero())
    return codes, scales.masked_fill_(~scales.isfinite(), torch.nan), (before, after)


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``codes * scales`` in a dtype: (blocks, 32)."""
    return backend_of(codes).decode_8bit(codes, scales, dtype)


def decode_in_torch(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``decode``, by definition."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows = max(1, min(_CHUNK // BLOCK, len(out)))
    scratch = torch.empty(rows, BLOCK, dtype=torch.float32, device=out.device)
    for part, scale, into in zip(codes.split(rows), scales.split(rows), out.split(rows), strict=True):
        exact = into if dtype is torch.float32 else scratch[: len(into)]
        torch.mul(part, scale, out=exact)
        if exact is not into:
            into.copy_(exact)
    return out


def empty_codes(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return uninitialized codes and scales for numbers."""
    blocks = -(-numbers.numel() // BLOCK)
    codes = torch.empty(blocks, BLOCK, dtype=torch.int8, device=numbers.device)
    return codes, torch.empty(blocks, 1, dtype=torch.float32, device=numbers.device)
