"""Rounds a weight to 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.quant.quantize import check_weight
from lowmem.quant.tensor import row_chunks

__all__ = ["round_to"]


def round_to(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a contiguous copy in ``dtype``.

    Raises:
        TypeError, ValueError: no dense floating-point tensor with values, values that are not finite, or that exceed
            the range of ``dtype``.
    """
    check_weight(tensor)
    broken = _count_not_finite(tensor)
    if broken:
        raise ValueError(f"{name} holds {broken} values that are NaN or infinite; repair them first")
    rounded = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if _count_not_finite(rounded):
        largest = float(tensor.detach().double().abs().max())
        raise ValueError(
            f"{name} holds the magnitude {largest:.6g}, above {torch.finfo(dtype).max:.6g}, the most that "
            f"{dtype} can hold; use Half(torch.bfloat16), or leave the layer out with skip="
        )
    return rounded


def _count_not_finite(tensor: Tensor) -> int:
    """Return how many values are NaN or infinite, with scratch of a few rows: torch's own would copy the tensor."""
    rows = tensor.detach() if tensor.dim() else tensor.detach()[None]
    columns = rows[0].numel() if len(rows) else 0
    count = 0
    for chunk in row_chunks(len(rows), columns):
        part = rows[chunk] if tensor.itemsize > 1 else rows[chunk].float()  # float8 has no isfinite
        count += int((~part.isfinite()).sum())
    return count
