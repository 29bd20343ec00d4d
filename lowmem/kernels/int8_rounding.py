"""Products in 8-bit integers: how inputs and levels are rounded. Scales are those of LLM.int8(), arXiv 2208.07339,
section 2.1, but one for every ``COLUMNS`` columns; weights stay in 4 bits."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor
from torch.nn import functional

COLUMNS = 128
"""Columns per activation scale; ``block_size`` where it does not divide 128."""

LARGEST = 127
"""The largest integer that an input or a level is rounded to."""

BYTES_PER_NUMBER = 24
"""Peak scratch of ``round_inputs_to_int8_grid`` per input: in float32 (4 bytes), padded to at most twice as many (8),
magnitudes or products (8), and the result (4)."""

# Least value of a largest magnitude: inverses of smaller ones could be infinite
_LEAST = 2.0**-100
# In steps: how far float32 rounding may move a level off the grid
_EXACT = 1e-6


def round_inputs_to_int8_grid(x: Tensor, weight_block_size: int) -> Tensor:
    """Return float32 ``scale * round(x / scale)``, where scale is 1/127 of the largest magnitude of its columns.

    The error is at most half a scale; a scale is at least 2^-100 / 127. Columns that hold a NaN, or a value that is
    infinite in float32, become NaN. ``weight_block_size`` is that of the weight that x (batch, n) is multiplied with.
    """
    batch, columns = x.shape
    size = min(weight_block_size if COLUMNS % weight_block_size else COLUMNS, max(1, columns))
    padded = functional.pad(x.float(), (0, -columns % size))
    parts = padded.view(batch, padded.shape[1] // size, size)
    largest = parts.abs().amax(-1, keepdim=True).clamp_min(_LEAST)
    # LARGEST / largest would round twice: LARGEST * (1 / largest)
    inverse = largest.new_full((), LARGEST) / largest
    rounded = (parts * inverse).round_().mul_(largest / LARGEST)
    return rounded.view(padded.shape)[:, :columns]


@lru_cache(maxsize=64)
def step_count_and_rounded_levels(levels: tuple[float, ...]) -> tuple[int, tuple[float, ...]]:
    """Return the largest of 16 levels in steps, at most 127, and the levels rounded to multiples of that step.

    The levels of int4 and fp4 are exact multiples, of 1/15 and 1/12. Those of other formats are rounded, by at most
    1/254 of the largest level.
    """
    largest = max(map(abs, levels))
    for points in range(1, LARGEST):
        steps = [level / largest * points for level in levels]
        if all(abs(step - round(step)) <= _EXACT for step in steps):
            break
    else:
        points = LARGEST
    return points, tuple(round(level / largest * points) * largest / points for level in levels)
