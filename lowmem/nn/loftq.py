"""The best low-rank approximation of a quantization error, from which LoftQ initializes an adapter."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["truncated_svd"]

_OVERSAMPLING = 16  # more columns of the basis than the rank
_STEPS = 8  # of subspace iteration; the error of 4 bits, whose singular values lie close together, needs several


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U, S, V^T`` of about the ``rank`` largest singular values: ``U diag(S) V^T`` is near to the matrix.

    Randomized subspace iteration, Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4. It takes
    ``16 rows columns (rank + 16)`` products, where an exact SVD takes minutes for a large layer. The random start is
    always the same, and the global random state does not change.

    Args:
        matrix: float32 or float64 (rows, columns).
        rank: at least 1.

    Returns:
        (rows, k), (k,), descending, and (k, columns), where k is the least of rank, rows and columns.
    """
    rows, columns = matrix.shape
    size = min(rank + _OVERSAMPLING, rows, columns)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(columns, size, generator=generator, dtype=matrix.dtype).to(matrix.device)
    for _ in range(_STEPS):
        basis = torch.linalg.qr(matrix.t() @ (matrix @ basis)).Q  # (columns, size)
    u, s, vt = torch.linalg.svd(matrix @ basis, full_matrices=False)  # (rows, size), (size,), (size, size)
    return u[:, :rank], s[:rank], vt[:rank] @ basis.t()
