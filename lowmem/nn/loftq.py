"""Truncated SVD of a quantization error, with which LoftQ initializes an adapter."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["truncated_svd"]

_OVERSAMPLING = 16  # columns of the basis beyond the rank
_STEPS = 8  # of subspace iteration; the singular values of a 4-bit error lie close together, so it needs several


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return approximate ``U, S, V^T`` for the ``rank`` largest singular values: ``U diag(S) V^T`` ~ matrix.

    Randomized subspace iteration, Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4. It takes about
    ``17 * rows * columns * (rank + 16)`` multiplications, where an exact SVD of a large layer takes minutes. The
    random start is always the same, and the global random state does not change.

    Args:
        matrix: float32 or float64 (rows, columns).
        rank: at least 1.

    Returns:
        (rows, k), (k,) in descending order, and (k, columns), where k = min(rank, rows, columns).
    """
    rows, columns = matrix.shape
    size = min(rank + _OVERSAMPLING, rows, columns)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(columns, size, generator=generator, dtype=matrix.dtype).to(matrix.device)
    for _ in range(_STEPS):
        basis = torch.linalg.qr(matrix.t() @ (matrix @ basis)).Q  # (columns, size)
    u, s, vt = torch.linalg.svd(matrix @ basis, full_matrices=False)  # (rows, size), (size,), (size, size)
    return u[:, :rank], s[:rank], vt[:rank] @ basis.t()
