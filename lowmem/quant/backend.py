"""The protocol of backends, which compute with stored weights, and the backend of each device type, which
``lowmem.kernels`` registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from lowmem.quant.formats import Format
from lowmem.quant.tensor import DEQUANTIZERS, QuantizedTensor, Squares, device_scratch_bytes

Weight: TypeAlias = Tensor | QuantizedTensor
"""A stored weight: float16 or bfloat16 (out, in), or a QuantizedTensor of that shape."""

LowRank: TypeAlias = tuple[Tensor, Tensor, float]
"""A low-rank adapter: A (rank, in), B (out, rank) and the scaling of their product."""


class SigmoidPolynomial(NamedTuple):
    """act(x) = x sigmoid(z(x)).

    Attributes:
        terms: z(x) = terms[0] x + terms[1] x^3 + terms[2] x^5 ..., at most seven.
        uses_erf: whether that stands for the normal distribution, which plain torch computes.
    """

    terms: tuple[float, ...]
    uses_erf: bool = False

    @property
    def degree(self) -> int:
        """``|act(x)|`` is at most ``(1 + |x|)^degree``."""
        return 1


@dataclass(frozen=True)
class SquaredReLU:
    """act(x) = relu(x)^2."""

    degree = 2


Activation: TypeAlias = SigmoidPolynomial | SquaredReLU
"""What ``Backend.gated`` computes of its first argument."""


class ColumnPanel(NamedTuple):
    """Columns of a weight that are rounded; a row of each tensor but ``matrix`` is a column of the weight.

    Attributes:
        values: float32 (columns, out), contiguous; becomes the changes d of ``lowmem.kernels.column_rounding``.
        scales: float32 (columns, out): of each number's block. A scale of 0 has the zero code.
        pivots: float32 (columns,), not 0.
        matrix: float32 (columns, columns): M, of which only the part left of the diagonal is read.
        approximate: float32 (columns, out): the values of the codes; in a descent those before it, too.
        codes: uint8 (columns, out), which are written.
    """

    values: Tensor
    scales: Tensor
    pivots: Tensor
    matrix: Tensor
    approximate: Tensor
    codes: Tensor


class KeyOrValueStates(NamedTuple):
    """Keys or values of attention.

    Attributes:
        numbers: (batch, heads, rows, width), floating point; or int8 codes, with scales.
        scales: float32 (batch, heads, rows, 1); None for floating point numbers.
    """

    numbers: Tensor
    scales: Tensor | None = None


class Backend(Protocol):
    """What a device computes: products with stored weights, their dequantized rows, functions of rows.

    No method may hold a whole dequantized weight. ``lowmem.kernels.reference`` defines the results and documents the
    arguments: of ``dequantize``, ``quantize_rows``, ``encode_8bit`` and ``decode_8bit`` bit for bit, of all others
    within rounding.
    """

    @property
    def name(self) -> str:
        """What ``lowmem.backend()`` says."""

    @property
    def fast_bfloat16(self) -> bool:
        """Whether products in bfloat16 are faster than in float32, so that ``add_product`` in it pays off."""

    @property
    def is_asynchronous(self) -> bool:
        """Whether operations run behind the host, as on a GPU: reading a value of a tensor waits for all of them."""

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        low_rank: LowRank | None = None,
    ) -> Tensor:
        """Return ``x @ W.T + bias + s (x @ A.T) @ B.T``: (..., in) -> (..., out)."""

    def input_grad(self, grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Return ``grad @ W``: (batch, out) -> (batch, in)."""

    def add_low_rank(self, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """Return ``base + scaling * (x @ A.T) @ B.T``: (batch, out)."""

    def add_product(self, out: Tensor, x: Tensor, weight: Weight, transposed: bool) -> Tensor:
        """Add ``x @ W.T`` to ``out``, or ``x @ W`` if transposed, in place."""

    def explain(self, weight: Weight, rows: int, dtype: torch.dtype) -> str:
        """Return what computes the products of an input of ``rows`` rows, and why: a line for each product."""

    def dequantize(self, weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return rows of a quantized matrix (out, in)."""

    def quantizing_bytes(self, rows: Tensor, into: QuantizedTensor) -> float:
        """Return the scratch of ``quantize_rows`` in bytes per weight."""

    def quantize_rows(self, rows: Tensor, into: QuantizedTensor, chunk: slice, importance: Tensor | None) -> Squares:
        """Quantize rows (rows, n) into the rows ``chunk`` of the matrix ``into``, and return what that loses."""

    def squares(self, x: Tensor, other: Tensor) -> Squares:
        """Return the sums of ``(x - other)^2`` and ``x^2`` of two matrices."""

    def serves_rows(self, x: Tensor) -> bool:
        """Whether ``norm``, ``gated`` and their gradients of tensors as x are faster here than torch's functions."""

    def norm(self, x: Tensor, factor: Tensor, eps: float, rounds_first: bool) -> Tensor:
        """Return ``x / sqrt(mean(x^2) + eps) * factor`` of rows."""

    def norm_grad(self, grad: Tensor, x: Tensor, factor: Tensor, eps: float) -> Tensor:
        """Return the gradient of x for ``norm``."""

    def gated(self, a: Tensor, b: Tensor | None, activation: Activation, dtype: torch.dtype) -> Tensor:
        """Return ``act(a) b`` in ``dtype``."""

    def gated_grad(
        self,
        grad: Tensor,
        a: Tensor,
        b: Tensor | None,
        activation: Activation,
        into: tuple[Tensor, Tensor | None],
    ) -> None:
        """Write the gradients of a and b for ``gated``."""

    def entropies(self, logits: Tensor, targets: Tensor, smoothing: float, gradient: bool) -> Tensor:
        """Return the cross entropies of rows; ``logits`` become their gradient."""

    def encode_8bit(self, numbers: Tensor, into: tuple[Tensor, Tensor]) -> tuple[int, int]:
        """Write 8-bit codes and scales; return how many numbers and codes are not zero."""

    def decode_8bit(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``codes * scales`` in ``dtype``."""

    def round_columns(self, form: Format, columns: ColumnPanel, descends: bool) -> None:
        """Round columns of a weight one after the other."""

    def attention(
        self,
        query: Tensor,
        key: KeyOrValueStates,
        value: KeyOrValueStates,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Return the output of each query: (batch, queries, heads, value width)."""

    def encode_states(self, numbers: Tensor, into: KeyOrValueStates) -> None:
        """Write states as 8-bit codes with a scale for each row."""


# The table of tensor.py: what dequantizes the tensors of a device is its backend, which ``set_backend`` puts there.
_backends: dict[str, Backend] = DEQUANTIZERS  # type: ignore[assignment]


def backend_of(tensor: Tensor) -> Backend:
    """Return the backend of a tensor's device."""
    # ``device.type`` takes 0.2 microseconds
    return _backends["cpu" if tensor.is_cpu else tensor.device.type]


def backend_for(device_type: str = "cpu") -> Backend:
    """Return the backend of a device type, as ``torch.device.type`` names it, or ``ANY``."""
    return _backends[device_type]


def chunk_length(tensor: Tensor, on_cpu: int, scratch_bytes: int) -> int:
    """Return how many rows or numbers, each of which takes so many bytes of scratch, are computed at a time.

    It is ``on_cpu``; on a GPU, where each chunk starts kernels, as many as its scratch holds, if these are more.
    """
    if not backend_of(tensor).is_asynchronous:
        return on_cpu
    return max(on_cpu, device_scratch_bytes(tensor.device) // max(1, scratch_bytes))


def fast_matmul_dtype(dtype: torch.dtype, tensor: Tensor) -> torch.dtype:
    """Return the dtype in which torch multiplies numbers of ``dtype`` on a tensor's device.

    It is float32 in place of 16-bit floats for which a CPU has no instructions: torch takes up to 200 times as long
    there. Few CPUs have some for float16, which counts as slow on all.
    """
    if dtype is torch.float16 or (dtype is torch.bfloat16 and not backend_of(tensor).fast_bfloat16):
        return dtype if backend_of(tensor).is_asynchronous else torch.float32
    return dtype


def product_result_dtype(compute_dtype: torch.dtype, input_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a product's result and of its gradients: the compute dtype, or, for int8, the input's."""
    return input_dtype if compute_dtype is torch.int8 else compute_dtype


def set_backend(device_type: str, backend: Backend) -> None:
    """Let a backend serve a device type; ``lowmem.kernels.register_backend`` also tells torch's dispatcher."""
    _backends[device_type] = backend
