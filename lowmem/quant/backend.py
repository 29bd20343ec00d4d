"""The backend protocol for computing with stored weights, and the backend that is active in this process.

``lowmem.kernels`` lists the implementations and selects one. The protocol is defined here because ``lowmem.quant``,
which must not import ``lowmem.kernels``, quantizes and dequantizes through the active backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lowmem.quant.tensor import QuantizedTensor

__all__ = ["Backend", "LowRank", "Weight", "active_backend", "set_backend"]

Weight: TypeAlias = "Tensor | QuantizedTensor"
"""A stored weight: float16 or bfloat16 (out, in), or a QuantizedTensor of that shape."""

LowRank: TypeAlias = tuple[Tensor, Tensor, float]
"""A low-rank adapter: A (rank, in), B (out, rank) and the scaling of their product."""


class Backend(Protocol):
    """Products with stored weights, and quantizing and dequantizing rows of 4-bit ones.

    No method may hold a whole dequantized weight. ``lowmem.kernels.reference`` defines the results: of ``dequantize``
    and ``quantize_rows`` bit for bit, of products within rounding.
    """

    @property
    def name(self) -> str:
        """The value of ``LOWMEM_KERNEL`` that selects this backend."""
        ...

    @property
    def adds_products(self) -> bool:
        """Whether ``add_product`` in bfloat16 is as fast as ``linear`` and ``input_grad``, for 64 rows and more."""
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

        With torch.int8, 8-bit integers are multiplied (``lowmem.kernels.int8``), and the result has the dtype of x.
        """
        ...

    def linear_again(
        self,
        x: Tensor,
        cache: dict[str, Any],
        packed: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        low_rank: LowRank | None,
    ) -> Tensor | None:
        """Return what ``linear`` would in the dtype of x, by what it has put into a weight's cache; None: it cannot.

        For calls that nothing records, on plain tensors: it does not ask.
        """
        ...

    def input_grad(self, grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Return ``grad @ W``: (batch, out) -> (batch, in), in ``dtype``, which is floating point."""
        ...

    def add_low_rank(self, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """Return ``base + scaling * (x @ A.T) @ B.T``: (batch, out), in the dtype of ``base``."""
        ...

    def add_product(self, out: Tensor, x: Tensor, weight: Weight, transposed: bool) -> Tensor:
        """Add ``x @ W.T`` to ``out``, or ``x @ W`` if transposed, in place; sums are rounded once."""
        ...

    def dequantize(self, weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return rows of a 4-bit matrix (out, in), dequantized in float32 and rounded once to ``dtype``."""
        ...

    def quantize_rows(self, rows: Tensor, into: QuantizedTensor, chunk: slice, importance: Tensor | None) -> None:
        """Quantize float32 (rows, n) into the rows ``chunk`` of the matrix ``into``, by its method."""
        ...

    def explain(self, weight: Weight, rows: int, dtype: torch.dtype) -> str:
        """Return what computes the products of an input of ``rows`` rows, and why: a line for each product."""
        ...


_active: Backend


def active_backend() -> Backend:
    """Return the backend of this process."""
    return _active


def set_backend(backend: Backend) -> None:
    """Make ``backend`` the one of this process; ``lowmem.kernels`` selects it."""
    global _active
    _active = backend
