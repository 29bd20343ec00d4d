"""Products in 8-bit integers: what becomes of inputs and levels. Kernels are tested against this definition.

Inputs are rounded as in LLM.int8(), arXiv 2208.07339, section 2.1, but with a unit for every few columns. Weights
stay in 4 bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["BYTES_PER_NUMBER", "COLUMNS", "LARGEST", "float_dtype", "on_a_grid", "round_inputs"]

COLUMNS = 128
"""Of an input, that are rounded with one unit, where blocks are whole parts of them; else as many as a block has."""

LARGEST = 127
"""The largest integer that an input or a level becomes."""

BYTES_PER_NUMBER = 24
"""At the peak of ``round_inputs``: float32 and padded to twice as many, its magnitude or its product, the result."""

_LEAST = 2.0**-100  # no unit is smaller than that of such a number: its inverse would be infinite
_EXACT = 1e-6  # of a step: what float32 may have taken from a level


def round_inputs(x: Tensor, block_size: int) -> Tensor:
    """Return float32 ``unit * round(x / unit)``, where a unit is 1/127 of the largest magnitude of its columns.

    A number is off by at most half a unit, which is no smaller than 2^-100 / 127. Columns that hold one that is NaN,
    or infinite in float32, become NaN.

    Args:
        x: floating point (batch, n).
        block_size: of the weight it is multiplied with.
    """
    batch, columns = x.shape
    size = min(block_size if COLUMNS % block_size else COLUMNS, max(1, columns))
    padded = functional.pad(x.float(), (0, -columns % size))
    parts = padded.view(batch, padded.shape[1] // size, size)
    largest = parts.abs().amax(-1, keepdim=True).clamp_min(_LEAST)
    inverse = largest.new_tensor(LARGEST) / largest  # rounded once; LARGEST / largest is LARGEST * (1 / largest)
    rounded = (parts * inverse).round_().mul_(largest / LARGEST)
    return rounded.view(padded.shape)[:, :columns]


def float_dtype(dtype: torch.dtype, given: torch.dtype) -> torch.dtype:
    """Return the dtype of a product's result, and of its derivatives, which pass straight through a rounding.

    Args:
        dtype: to compute in.
        given: the input's dtype, which is that of a result computed in torch.int8.
    """
    return given if dtype is torch.int8 else dtype


@lru_cache(maxsize=64)
def on_a_grid(levels: tuple[float, ...]) -> tuple[int, tuple[float, ...]]:
    """Return how many steps make the largest level, at most 127, and the levels as multiples of that step.

    The levels of int4 and fp4 are such multiples, of 1/15 and 1/12. Those of others are rounded, by at most 1/254 of
    the largest.

    Args:
        levels: of a format.
    """
    largest = max(map(abs, levels))
    for points in range(1, LARGEST):
        steps = [level / largest * points for level in levels]
        if all(abs(step - round(step)) <= _EXACT for step in steps):
            break
    else:
        points = LARGEST
    return points, tuple(round(level / largest * points) * largest / points for level in levels)
