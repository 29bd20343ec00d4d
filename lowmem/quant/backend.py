"""What computes with stored weights: one protocol, and the implementation that serves this process.

``lowmem.kernels`` registers the implementations, chooses one, and says why. The protocol stands here because a
tensor is quantized and dequantized by what serves, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lowmem.quant.tensor import QuantizedTensor

__all__ = ["Backend", "LowRank", "Weight", "serve", "serving"]

Weight: TypeAlias = "Tensor | QuantizedTensor"
"""A stored weight: float16 or bfloat16 (out, in), or a 4-bit one of that shape."""

LowRank: TypeAlias = tuple[Tensor, Tensor, float]
"""What an adapter adds to a product: A (rank, in), B (out, rank) and the scaling."""


class Backend(Protocol):
    """Products with stored weights, and the rows of 4-bit ones.

    No method may hold a whole dequantized weight. ``lowmem.kernels.reference`` is the definition of what is true:
    ``dequantize`` and ``quantize_rows`` give its bytes, and products its results within rounding.
    """

    @property
    def name(self) -> str:
        """What ``LOWMEM_KERNEL`` calls it."""
        ...

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        low_rank: LowRank | None = None,
    ) -> Tensor:
        """Return ``x @ W.T + bias + s (x @ A.T) @ B.T``: (batch, in) -> (batch, out), in ``dtype``.

        With torch.int8 products are of 8-bit integers (``lowmem.kernels.int8``), in the dtype of x.
        """
        ...

    def input_grad(self, grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Return ``grad @ W``: (batch, out) -> (batch, in), in ``dtype``, a float."""
        ...

    def add_low_rank(self, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """Return ``base + scaling * (x @ A.T) @ B.T``: (batch, out), in its dtype."""
        ...

    def dequantize(self, weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return some rows of a matrix, dequantized in float32 and rounded once to ``dtype``."""
        ...

    def quantize_rows(self, rows: Tensor, into: QuantizedTensor, chunk: slice, importance: Tensor | None) -> None:
        """Quantize float32 (rows, n) into a chunk of a matrix, by its method."""
        ...


_serving: Backend


def serving() -> Backend:
    """Return what computes in this process."""
    return _serving


def serve(backend: Backend) -> None:
    """Let a backend compute in this process; ``lowmem.kernels`` chooses which."""
    global _serving
    _serving = backend
