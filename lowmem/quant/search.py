"""Which scale a block gets: its largest weight, or the candidate around it that loses least.

A block's largest magnitude wastes levels on one weight. A smaller scale clips it and brings the others nearer to a
level; a larger one moves levels to where weights are. The search takes what leaves the least squared error, weight by
weight as important as the caller says. Sums have one order, so that a compiled kernel finds the same scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.quant.formats import Format
from lowmem.quant.packing import by_block

__all__ = ["CANDIDATES", "LANES", "block_errors", "largest_weights", "nearest_codes", "searched_scales", "spread"]

CANDIDATES = tuple(n / 16 for n in (16, 15, 17, 14, 18, 13, 19, 12, 20))
"""Scales that are tried, in units of the block's largest magnitude; with both signs where the format is signed."""

LANES = 16  # partial sums of a block's error


def spread(scales: Tensor, block_size: int, columns: int) -> Tensor:
    """Repeat the scales of blocks, (rows, blocks), for each of their weights: (rows, columns)."""
    return scales.repeat_interleave(min(block_size, columns), dim=-1)[:, :columns]


def largest_weights(rows: Tensor, size: int, signed: bool) -> Tensor:
    """Return the largest magnitude of each block, with its weight's sign if signed: (rows, blocks)."""
    high = by_block(rows if signed else rows.abs(), size, lambda block: block.amax(-1, keepdim=True))
    if not signed:
        return high
    low = by_block(rows, size, lambda block: block.amin(-1, keepdim=True))
    return torch.where(-low > high, low, high) + 0.0  # a zero gets no sign


def searched_scales(
    rows: Tensor, form: Format, size: int, largest: float, importance: Tensor | None = None
) -> Tensor:
    """Return the scale of each block that leaves the least squared error, of those tried.

    Args:
        rows: float32 (rows, n), finite.
        form: the format; both signs are tried if it is signed.
        size: of a block.
        largest: magnitude of a scale.
        importance: float32 (n,) or (rows, n), at least 0, what each weight's squared error counts; None: 1.

    Returns:
        float32 (rows, blocks), at least ``min(CANDIDATES)`` of the block's largest magnitude. Of equal errors, and
        where squares overflow, the first candidate's counts.
    """
    top = largest_weights(rows, size, form.signed)  # (rows, blocks)
    best = least = None
    for factor in CANDIDATES:
        for sign in (1.0, -1.0) if form.signed else (1.0,):
            scales = (top * (sign * factor)).clamp(-largest, largest)
            error = block_errors(rows, scales, form, size, importance)
            if least is None or best is None:
                best, least = scales, error
            else:
                better = error < least
                best, least = torch.where(better, scales, best), torch.where(better, error, least)
    assert best is not None
    return best


def nearest_codes(rows: Tensor, scales: Tensor, form: Format, size: int) -> Tensor:
    """Return the code nearest to each weight over its block's scale: uint8 (rows, n), padded to be even."""
    divisors = spread(scales.masked_fill(scales == 0, torch.inf), size, rows.shape[-1])  # a zero scale: the zero code
    boundaries = torch.tensor(form.boundaries, dtype=torch.float32, device=rows.device)
    codes: Tensor = torch.bucketize(rows / divisors, boundaries, out_int32=True).to(torch.uint8)
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=form.zero_code)
    return codes


def block_errors(rows: Tensor, scales: Tensor, form: Format, size: int, importance: Tensor | None) -> Tensor:
    """Return the squared error of each block at these scales, (rows, blocks), added up in ``LANES`` parts."""
    columns = rows.shape[-1]
    levels = torch.tensor(form.levels, dtype=torch.float32, device=rows.device)
    codes = nearest_codes(rows, scales, form, size)[:, :columns]
    error = rows - levels[codes.int()] * spread(scales, size, columns)
    error = error * error
    if importance is not None:
        error = error * importance

    def add_up(block: Tensor) -> Tensor:  # (rows, blocks, size) -> (rows, blocks, 1)
        padded = torch.nn.functional.pad(block, (0, -block.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
        sums: Tensor = padded[..., 0, :]
        for part in padded.unbind(-2)[1:]:
            sums = sums + part
        while sums.shape[-1] > 1:
            low, high = sums.chunk(2, dim=-1)
            sums = low + high
        return sums

    return by_block(error, size, add_up)
