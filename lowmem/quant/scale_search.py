"""Chooses the scale of a block: its largest magnitude, or the candidate around it with the least squared error.

A smaller scale clips the largest weight and brings the others closer to a level; a larger one may move levels to
where more weights are. Errors can be weighted by an importance for each column. Sums are added in a fixed order, so
that compiled kernels find the same scales bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.quant.formats import Format
from lowmem.quant.packing import apply_to_blocks_and_rest

CANDIDATES = tuple(n / 16 for n in (16, 15, 17, 14, 18, 13, 19, 12, 20))
"""Scales that are tried, as multiples of the block's largest magnitude; with both signs if the format is signed."""

# Partial sums per block
LANES = 16


def expand_block_scales(scales: Tensor, block_size: int, columns: int) -> Tensor:
    """Repeat each block's scale for all of its weights: (rows, blocks) -> (rows, columns)."""
    return scales.repeat_interleave(min(block_size, columns), dim=-1)[:, :columns]


def block_absmax(rows: Tensor, block_size: int, signed: bool) -> Tensor:
    """Return each block's largest magnitude, with the sign of that weight if signed: (rows, blocks)."""
    high = apply_to_blocks_and_rest(
        rows if signed else rows.abs(), block_size, lambda block: block.amax(-1, keepdim=True)
    )
    if not signed:
        return high
    low = apply_to_blocks_and_rest(rows, block_size, lambda block: block.amin(-1, keepdim=True))
    # -0 becomes +0
    return torch.where(-low > high, low, high) + 0.0


def block_sums(rows: Tensor, block_size: int) -> Tensor:
    """Return the sum of each block: (rows, n) -> (rows, blocks)."""
    return apply_to_blocks_and_rest(rows, block_size, lambda block: block.sum(-1, keepdim=True))


def block_range_offsets(rows: Tensor, form: Format, block_size: int) -> Tensor:
    """Return the offset with which a block's smallest and largest weight fall on the end levels: (rows, blocks)."""
    low, high = form.levels[0], form.levels[-1]

    def block_offset(block: Tensor) -> Tensor:
        least, most = block.amin(-1, keepdim=True), block.amax(-1, keepdim=True)
        return least * (high / (high - low)) - most * (low / (high - low))

    return apply_to_blocks_and_rest(rows, block_size, block_offset)


def least_unclipped_scales(rows: Tensor, form: Format, block_size: int) -> Tensor:
    """Return the least scale, 0 or more, with which no weight of a block is beyond the end levels: (rows, blocks)."""
    low, high = form.levels[0], form.levels[-1]

    def block_scale(block: Tensor) -> Tensor:
        most = block.amax(-1, keepdim=True) / high
        return most if low == 0 else torch.maximum(most, block.amin(-1, keepdim=True) / low)

    return apply_to_blocks_and_rest(rows, block_size, block_scale).clamp_min(0)


def least_error_scales(
    rows: Tensor,
    form: Format,
    block_size: int,
    largest_scale: float,
    importance: Tensor | None = None,
    base_scales: Tensor | None = None,
) -> Tensor:
    """Return the candidate scale of each block with the least squared error.

    Args:
        rows: float32 (rows, n), finite.
        form: the format; both signs are tried if it is signed.
        block_size: weights per block.
        largest_scale: the largest magnitude of a scale that can be stored.
        importance: float32 (n,) or (rows, n), at least 0: factor of each weight's squared error; None: 1.
        base_scales: (rows, blocks), of which the candidates are multiples, in its own sign; None: the largest
            weights.

    Returns:
        float32 (rows, blocks), at least ``min(CANDIDATES)`` times the block's largest magnitude. The first of
        several candidates with equal errors is taken, also where squares overflow.
    """
    signs = (1.0, -1.0) if form.signed and base_scales is None else (1.0,)
    base_scales = (
        block_absmax(rows, block_size, form.signed) if base_scales is None else base_scales
    )  # (rows, blocks)
    best = least = None
    for factor in CANDIDATES:
        for sign in signs:
            scales = (base_scales * (sign * factor)).clamp(-largest_scale, largest_scale)
            error = block_squared_errors(rows, scales, form, block_size, importance)
            if least is None or best is None:
                best, least = scales, error
            else:
                better = error < least
                best, least = torch.where(better, scales, best), torch.where(better, error, least)
    assert best is not None
    return best


def nearest_codes(rows: Tensor, scales: Tensor, form: Format, block_size: int) -> Tensor:
    """Return the nearest code of each weight divided by its scale: uint8 (rows, n)."""
    divisors = expand_block_scales(
        scales.masked_fill(scales == 0, torch.inf), block_size, rows.shape[-1]
    )  # w / inf = 0: the zero code
    boundaries = torch.tensor(form.boundaries, dtype=torch.float32, device=rows.device)
    return _count_boundaries_below(rows / divisors, boundaries).to(torch.uint8)


def _count_boundaries_below(values: Tensor, boundaries: Tensor) -> Tensor:
    """Return, int32, how many thresholds lie below each value. The 255 of 8 bits are -inf and evenly spaced ones: the
    place is computed to within one threshold, which takes a fourth of the time of a search."""
    if len(boundaries) < 255:
        return torch.bucketize(values, boundaries, out_int32=True)
    low, high = float(boundaries[1]), float(boundaries[-1])
    places = (values - low).mul_((len(boundaries) - 2) / (high - low)).add_(1.5)
    places = places.clamp_(1, len(boundaries) - 1).int()
    return places + (boundaries[places] < values)


def block_squared_errors(
    rows: Tensor, scales: Tensor, form: Format, block_size: int, importance: Tensor | None
) -> Tensor:
    """Return the squared error of each block with these scales, (rows, blocks), from ``LANES`` partial sums."""
    columns = rows.shape[-1]
    levels = torch.tensor(form.levels, dtype=torch.float32, device=rows.device)
    codes = nearest_codes(rows, scales, form, block_size)
    error = rows - levels[codes.int()] * expand_block_scales(scales, block_size, columns)
    error = error * error
    if importance is not None:
        error = error * importance

    def sum_in_lanes(block: Tensor) -> Tensor:  # (rows, blocks, size) -> (rows, blocks, 1)
        padded = torch.nn.functional.pad(block, (0, -block.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
        sums: Tensor = padded[..., 0, :]
        for part in padded.unbind(-2)[1:]:
            sums = sums + part
        while sums.shape[-1] > 1:
            low, high = sums.chunk(2, dim=-1)
            sums = low + high
        return sums

    return apply_to_blocks_and_rest(error, block_size, sum_in_lanes)
