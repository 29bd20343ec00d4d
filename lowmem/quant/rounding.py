"""Rounds a weight to 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.quant.quantize import check_weight

__all__ = ["round_to"]


def round_to(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a contiguous copy in ``dtype``.

    Raises:
        TypeError, ValueError: no dense floating-point tensor with values, values that are not finite, or that exceed
            the range of ``dtype``.
    """
    check_weight(tensor)
    wide = tensor.detach() if tensor.itemsize > 1 else tensor.detach().float()  # float8 has no isfinite
    broken = int((~wide.isfinite()).sum())
    if broken:
        raise ValueError(f"{name} holds {broken} values that are NaN or infinite; repair them first")
    rounded = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not rounded.isfinite().all():
        largest = float(wide.abs().max())
        raise ValueError(
            f"{name} holds the magnitude {largest:.6g}, above {torch.finfo(dtype).max:.6g}, the most that "
            f"{dtype} can hold; use Half(torch.bfloat16), or leave the layer out with skip="
        )
    return rounded
