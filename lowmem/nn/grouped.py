"""Grouped matrix product: each group of rows is multiplied by its own matrix. Differentiable in rows and matrices.

``torch.nn.functional.grouped_mm`` does not serve here: it needs strides that are multiples of 16 bytes, which thin
matrices seldom have, and its backward rejects expanded gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["grouped_matmul"]

_LIBRARY = torch.library.Library("lowmem", "FRAGMENT")
_LIBRARY.define(
    "grouped_matmul(Tensor x, Tensor matrices, Tensor offsets) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
_LIBRARY.define("grouped_outer(Tensor x, Tensor grad, Tensor offsets) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def grouped_matmul(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Return (rows, columns): rows ``offsets[e - 1]`` to ``offsets[e] - 1`` of x, multiplied by matrix e.

    Rows after the last group are zero.

    Args:
        x: (rows, n).
        matrices: (count, n, columns), in the dtype of x.
        offsets: int (count,), the end of each group.
    """
    out: Tensor = torch.ops.lowmem.grouped_matmul(x, matrices, offsets)
    return out


def _groups(offsets: Tensor) -> Any:
    start = 0
    for number, end in enumerate(offsets.tolist()):
        if end > start:
            yield number, slice(start, end)
        start = max(start, end)


def _matmul(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], matrices.shape[2])
    for number, rows in _groups(offsets):
        torch.mm(x[rows], matrices[number], out=out[rows])
    return out


def _outer(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """Return the gradient of the matrices: (count, n, columns)."""
    out = x.new_zeros(offsets.shape[0], x.shape[1], grad.shape[1])
    for number, rows in _groups(offsets):
        torch.mm(x[rows].t(), grad[rows], out=out[number])
    return out


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, matrices, offsets = ctx.saved_tensors
    of_x = grouped_matmul(grad, matrices.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    of_matrices = torch.ops.lowmem.grouped_outer(x, grad, offsets) if ctx.needs_input_grad[1] else None
    return of_x, of_matrices, None


_LIBRARY.impl("grouped_matmul", _matmul, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_outer", _outer, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lowmem::grouped_matmul", lambda x, matrices, _: x.new_empty(x.shape[0], matrices.shape[2]), lib=_LIBRARY
)
torch.library.register_fake(
    "lowmem::grouped_outer",
    lambda x, grad, offsets: x.new_empty(offsets.shape[0], x.shape[1], grad.shape[1]),
    lib=_LIBRARY,
)
torch.library.register_autograd("lowmem::grouped_matmul", _backward, setup_context=_keep, lib=_LIBRARY)
