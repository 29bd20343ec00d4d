"""The contract in plain torch: restore a chunk of rows, multiply, forget it, go on.

Readable rather than fast. Every compiled kernel is tested against these lines.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from lowmem.blockwise import QuantizedTensor, row_chunks

__all__ = ["Weight", "input_grad", "linear"]

Weight: TypeAlias = Tensor | QuantizedTensor


def linear(x: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return ``x @ W.T``: (batch, in) -> (batch, out), computed and returned in ``dtype``."""
    out_features, in_features = weight.shape
    x = x.to(dtype)
    out = x.new_empty(x.shape[0], out_features)
    for rows in row_chunks(out_features, in_features):
        torch.mm(x, _restore(weight, rows, dtype).t(), out=out[:, rows])  # (batch, rows)
    return out


def input_grad(grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return ``grad @ W``: (batch, out) -> (batch, in), computed and returned in ``dtype``.

    Half-precision sums over chunks are kept in float32, as a single product keeps them.
    """
    out_features, in_features = weight.shape
    grad = grad.to(dtype)
    sums = torch.zeros(
        grad.shape[0], in_features, dtype=torch.promote_types(dtype, torch.float32), device=grad.device
    )
    for rows in row_chunks(out_features, in_features):
        part = _restore(weight, rows, dtype)  # (rows, in)
        if sums.dtype == dtype:
            sums.addmm_(grad[:, rows], part)
        else:
            sums += grad[:, rows] @ part
    return sums.to(dtype)


def _restore(weight: Weight, rows: slice, dtype: torch.dtype) -> Tensor:
    return weight.restore(rows).to(dtype) if isinstance(weight, QuantizedTensor) else weight[rows].to(dtype)
