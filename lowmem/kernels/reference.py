"""The contract in plain torch: restore a chunk of rows, multiply, forget it, go on.

Readable rather than fast. Every compiled kernel is tested against these lines.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from lowmem.kernels import int8
from lowmem.quant.formats import get_format
from lowmem.quant.tensor import QuantizedTensor, row_chunks

__all__ = ["Update", "Weight", "add_update", "input_grad", "linear"]

Weight: TypeAlias = Tensor | QuantizedTensor
Update: TypeAlias = tuple[Tensor, Tensor, float]
"""A low-rank update: A (rank, in), B (out, rank) and the scaling."""


def linear(
    x: Tensor, weight: Weight, dtype: torch.dtype, bias: Tensor | None = None, update: Update | None = None
) -> Tensor:
    """Return ``x @ W.T + bias``, and an update: (batch, in) -> (batch, out), computed in ``dtype``, and returned so.

    With torch.int8 the input, and levels of a 4-bit weight that need it, are rounded to 8 bits
    (``lowmem.kernels.int8``); their products are added up in float32, and come in the dtype of x.

    Args:
        x: (batch, in).
        weight: (out, in); of 4 bits for torch.int8.
        dtype: to compute in.
        bias: (out,), or None.
        update: what ``add_update`` adds for x, in the dtype of A and B; or None.

    Raises:
        RuntimeError: x has another shape, or is not floating point; or a 4-bit weight's stored tensors have another
            layout than its shape needs.
        TypeError: torch.int8, and a weight that has no codes.
    """
    out_features, in_features = weight.shape
    if not x.is_floating_point():
        raise RuntimeError(f"input.dtype={x.dtype} must be a floating-point dtype")
    if x.shape[1] != in_features:
        raise RuntimeError(f"input.shape={tuple(x.shape)} must end in in_features={in_features}")
    levels = None
    if dtype is torch.int8:
        if not isinstance(weight, QuantizedTensor):
            raise TypeError(f"dtype={dtype} is for weights of 4 bits, not for {weight.dtype}: give a float dtype")
        dtype, levels = torch.float32, int8.on_a_grid(get_format(weight.format).levels)[1]
        factor = int8.round_inputs(x, weight.block_size)
    else:
        factor = x.to(dtype)
    out = factor.new_empty(x.shape[0], out_features)
    for rows in row_chunks(out_features, in_features):
        torch.mm(factor, _restore(weight, rows, dtype, levels).t(), out=out[:, rows])  # (batch, rows)
    if bias is not None:
        out.add_(bias)
    out = out if levels is None else out.to(x.dtype)
    return out if update is None else add_update(out, x, *update)


def input_grad(grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return ``grad @ W``: (batch, out) -> (batch, in), computed and returned in ``dtype``.

    Half-precision sums over chunks are kept in float32, as a single product keeps them. The arguments are
    those of ``linear``; dtype is a float.
    """
    out_features, in_features = weight.shape
    if grad.shape[1] != out_features:
        raise RuntimeError(f"grad.shape={tuple(grad.shape)} must end in out_features={out_features}")
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
        del part  # before the next is restored
    return sums.to(dtype)


def add_update(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ``base + scaling * (x @ A.T) @ B.T``: (batch, out), in its dtype.

    Args:
        base: (batch, out).
        x: (batch, in), in the dtype of A and B.
        a, b: (rank, in) and (out, rank).
        scaling: of the update.
    """
    narrow = x @ a.t()  # (batch, rank)
    if base.dtype == b.dtype:
        return torch.addmm(base, narrow, b.t(), alpha=scaling)
    return base + ((narrow * scaling) @ b.t()).to(base.dtype)


def _restore(weight: Weight, rows: slice, dtype: torch.dtype, levels: tuple[float, ...] | None = None) -> Tensor:
    return weight.restore(rows, levels).to(dtype) if isinstance(weight, QuantizedTensor) else weight[rows].to(dtype)
