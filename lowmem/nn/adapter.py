"""``Adapter``: the pair of thin matrices with which LoRA adapts one parameter of a layer (Hu et al., arXiv
2106.09685, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lowmem import kernels
from lowmem.kernels import reference
from lowmem.nn.call_context import (
    autocast_disabled_if_slow,
    can_bypass_autograd,
    check_not_nested,
    is_autocast_enabled,
)
from lowmem.nn.forms import CodedForm
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.nn.techniques import LoRA

# Columns of the basis beyond the rank
_OVERSAMPLING = 16
_STEPS = 8  # of subspace iteration; the singular values of a 4-bit error lie close together, so it needs several


def is_transformers_conv1d_class(module_class: type) -> bool:
    """Whether a class is the ``Conv1D`` of transformers: a linear layer with a transposed weight, (in, out)."""
    return (module_class.__module__, module_class.__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether a module is the ``Conv1D`` of transformers, or of a subclass."""
    return any(map(is_transformers_conv1d_class, type(module).__mro__))


class Layout(NamedTuple):
    """How a parameter holds the matrices (*stack, out, in) that ``B A`` changes.

    Args:
        shape: of the parameter.
        kind: "linear": (*stack, out, in). "transposed": (*stack, in, out), as in an embedding, where in is the
            vocabulary. "kernel": (out, in / groups, *kernel), a matrix with in / groups * prod(kernel) columns.
            "transposed kernel": (in, out / groups, *kernel), a matrix with in * prod(kernel) columns and out / groups
            rows.
    """

    shape: tuple[int, ...]
    kind: str

    def to_matrices(self, weight: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as matrices (*stack, out, in)."""
        if self.kind == "transposed":
            return weight.mT
        if self.kind == "kernel":
            return weight.flatten(1)
        return weight.movedim(1, 0).flatten(1) if self.kind == "transposed kernel" else weight

    def from_matrices(self, matrices: Tensor) -> Tensor:
        """Return matrices (*stack, out, in) as a tensor of the parameter's shape."""
        if self.kind == "transposed":
            return matrices.mT
        if self.kind == "kernel":
            return matrices.view(self.shape)
        if self.kind == "transposed kernel":
            rows, outputs, *kernel = self.shape
            return matrices.view(outputs, rows, *kernel).movedim(0, 1)
        return matrices

    def lora_matrix_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A, (*stack, rank, in), and B, (*stack, out, rank)."""
        *stack, outputs, inputs = self.to_matrices(torch.empty(self.shape, dtype=torch.float32, device="meta")).shape
        return {"lora_a": (*stack, rank, inputs), "lora_b": (*stack, outputs, rank)}


def parameter_layout(module: nn.Module, parameter_name: str = "weight") -> Layout:
    """Return the layout of a parameter of a module."""
    shape = tuple(getattr(module, parameter_name).shape)
    if isinstance(module, _ConvNd):
        return Layout(shape, "transposed kernel" if isinstance(module, _ConvTransposeNd) else "kernel")
    transposed = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or is_transformers_conv1d(module)
    transposed = transposed or (len(shape) > 2 and bool(getattr(module, "is_transposed", False)))
    return Layout(shape, "transposed" if transposed else "linear")


class LowRankUpdate(NamedTuple):
    """The low-rank change ``scaling * left @ right`` of matrices (*stack, rows, columns).

    Args:
        left: (*stack, rows, rank); (rank,) of one row.
        right: (*stack, rank, columns). Columns of a kernel are all its values of an output channel.
        scaling: factor of the product.
        dropout: applied to the inputs of products.
        adapter: the adapter whose whole matrices these are; None if they are views.
    """

    left: Tensor
    right: Tensor
    scaling: float
    dropout: nn.Module
    adapter: Any = None

    def with_matrices(self, left: Tensor, right: Tensor) -> LowRankUpdate:
        """Return the change with other matrices, which are views of these."""
        return self._replace(left=left, right=right, adapter=None)

    def indexed_along_first_dim(self, index: Any) -> LowRankUpdate:
        """Return the change of ``weight[index]``, for an index of the first dimension of the weight."""
        if self.adapter is not None and self.left.dim() == 3 and (number := _int_index_or_none(index)) is not None:
            return self.with_matrices(*self.adapter.left_and_right_of_stacked_matrix(number))
        (update,) = self.updates_of_selected_rows(lambda matrix: matrix[index])
        return update

    def updates_of_selected_rows(self, select: Callable[[Tensor], Any]) -> list[LowRankUpdate]:
        """Return the changes of what ``select`` returns, a tensor or several, of the first dimension of a weight."""
        left, right = self.left, self.right
        # The same for all rows of a transposed kernel
        lefts = [left] if left.dim() < right.dim() else select(left)
        rights = [right] if right.dim() < 3 else select(right)
        lefts, rights = ([side] if isinstance(side, Tensor) else list(side) for side in (lefts, rights))
        count = max(len(lefts), len(rights))
        lefts, rights = (side * count if len(side) < count else side for side in (lefts, rights))
        return [self.with_matrices(*pair) for pair in zip(lefts, rights, strict=True)]

    def cast_and_apply_dropout(self, x: Tensor) -> Tensor:
        """Return an input in the dtype of the matrices, after dropout."""
        x = x if x.dtype is self.left.dtype else x.to(self.left.dtype)
        return x if is_inactive_dropout(self.dropout) else self.dropout(x)


def _int_index_or_none(index: Any) -> int | None:
    """Return the index of one matrix of a stack as an int; None if it is none, or a tensor that is being traced."""
    if isinstance(index, Tensor) and index.dim() == 0 and index.dtype in (torch.int64, torch.int32):
        return None if torch.compiler.is_compiling() else int(index)
    return index if type(index) is int else None


def is_inactive_dropout(dropout: nn.Module | None) -> bool:
    """Whether a dropout module returns its input unchanged."""
    return type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)


def add_low_rank_product(out: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return ``out + s B A x`` in out's dtype, for out (..., out_features), x (..., in_features)."""
    if x.dim() != 2:
        check_not_nested(x)
    wide = out if out.dim() == 2 else out.reshape(-1, lora_b.shape[0])  # (batch, out)
    rows = x if x.dim() == 2 else x.reshape(-1, lora_a.shape[1])  # (batch, in)
    with autocast_disabled_if_slow(x):
        # Under autocast the fused addition would cast its operands, ``out`` included, to 16 bits.
        if is_autocast_enabled(x):
            narrow = nn.functional.linear(rows, lora_a) * scaling  # (batch, rank)
            wide = wide + nn.functional.linear(narrow, lora_b).to(out.dtype)
        else:
            add = kernels.add_low_rank if can_bypass_autograd(x, out, lora_a, lora_b) else reference.add_low_rank
            wide = add(wide, rows, lora_a, lora_b, scaling)
    return wide if out.dim() == 2 else wide.view(out.shape)


def _cast_to_matmul_dtype(matrix: Tensor) -> Tensor:
    """Return a matrix of an adapter in the dtype in which torch multiplies it."""
    dtype = kernels.fast_matmul_dtype(matrix.dtype, matrix)
    return matrix if matrix.dtype is dtype else matrix.to(dtype)


def randomized_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
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
    generator = torch.Generator("cpu").manual_seed(0)
    basis = torch.randn(columns, size, generator=generator, dtype=matrix.dtype, device="cpu").to(matrix.device)
    for _ in range(_STEPS):
        basis = torch.linalg.qr(matrix.t() @ (matrix @ basis)).Q  # (columns, size)
    u, s, vt = torch.linalg.svd(matrix @ basis, full_matrices=False)  # (rows, size), (size,), (size, size)
    return u[:, :rank], s[:rank], vt[:rank] @ basis.t()


_MATRICES: WeakKeyDictionary[Adapter, tuple[Any, list[tuple[Tensor, Tensor]]]] = WeakKeyDictionary()
"""Cache of ``Adapter.matrices``: a key of the current values, and the unbound matrices. It is not in the modules, so
that copies of these do not have it."""


class Adapter(nn.Module):
    """The low-rank change of one parameter, ``s B A``: A (*stack, rank, in) and B (*stack, out, rank).

    A starts random and B at zero, so a new adapter does not change the output, bit for bit, unless ``init="loftq"``
    (of a recurrent layer: within rounding, since torch multiplies by the whole sum).
    For an embedding A starts at zero, as in PEFT, so that only the rows that batches have read change. A stack of
    matrices, as of experts, has one pair for each matrix.

    Args:
        base: the module to adapt; only shape, dtype and device of its parameter are read.
        technique: rank, alpha, dropout, scaling and init; its patterns are ignored (``LoRA.at`` resolves them).
        dense: the values that a 4- or 8-bit parameter was quantized from, for ``init="loftq"``.
        name: of the parameter.

    Attributes:
        layout: how the parameter holds the matrices that ``B A`` changes.
        rows_are_read: whether the parameter is the table of an embedding.

    Raises:
        ValueError: ``init="loftq"`` without a 4- or 8-bit parameter or its dense values.
    """

    weight_count = 0  # the summary counts only the weights of the base

    def __init__(self, base: nn.Module, technique: LoRA, dense: Tensor | None = None, name: str = "weight") -> None:
        super().__init__()
        self.technique = technique
        self.rank = technique.rank
        self.scaling = technique.scaling
        self.layout = parameter_layout(base, name)
        self.rows_are_read = isinstance(base, (nn.Embedding, nn.EmbeddingBag))
        self.dropout = nn.Dropout(technique.dropout) if technique.dropout else nn.Identity()
        stored = getattr(base, name)
        dtype = stored.dtype if stored.dtype in (torch.float32, torch.float64) else torch.float32
        shapes = self.layout.lora_matrix_shapes(self.rank)
        a, b = (torch.zeros(shapes[part], dtype=dtype, device=stored.device) for part in ("lora_a", "lora_b"))
        if self.rows_are_read:
            nn.init.normal_(b)
        else:
            # As nn.Linear initializes its weight
            nn.init.kaiming_uniform_(a.flatten(0, -2), a=math.sqrt(5))
        a, b = (matrix.to(technique.dtype or dtype) for matrix in (a, b))
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)
        if technique.init == "loftq":
            if dense is None or not (isinstance(stored, StoredTensor) and isinstance(stored.form, CodedForm)):
                raise ValueError(
                    "init='loftq' approximates what 4 or 8 bits lose of the dense weight, and needs both: apply it "
                    "in the call that quantizes, convert(model, FourBit(), LoRA(init='loftq')), or use init='zero'"
                )
            # Planned on the meta device, without values
            if dense.is_meta:
                return
            self._initialize_from_error(self.layout.to_matrices(dense.detach().to(dtype) - stored.dequantize(dtype)))

    @torch.no_grad()
    def _initialize_from_error(self, quantization_error: Tensor) -> None:
        """Set A and B so that ``s B A`` approximates ``quantization_error`` (*stack, out, in)."""
        a, b = self.lora_a.view(-1, *self.lora_a.shape[-2:]), self.lora_b.view(-1, *self.lora_b.shape[-2:])
        for number, matrix in enumerate(quantization_error.reshape(-1, *quantization_error.shape[-2:])):
            u, sizes, vt = randomized_svd(matrix, self.rank)
            # Beyond the error's rank, A stays random and B zero, and both can train
            count = int((sizes > 0).sum())
            root = (sizes[:count] / self.scaling).sqrt()
            b[number, :, :count] = u[:, :count] * root
            a[number, :count] = root[:, None] * vt[:count]

    @property
    def zero_initialized_matrix(self) -> nn.Parameter:
        """The matrix that starts at zero: B, or A of an embedding."""
        return self.lora_a if self.rows_are_read else self.lora_b

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Return ``out + s B A x`` in out's dtype, for out (..., out_features), x (..., in_features)."""
        # Faster than attributes
        parameters, dropout = self._parameters, self._modules["dropout"]
        assert dropout is not None
        a, b = parameters.get("lora_a"), parameters.get("lora_b")
        # A parametrization has moved them out
        if a is None or b is None:
            a, b = self.lora_a, self.lora_b
        right, left = _cast_to_matmul_dtype(a), _cast_to_matmul_dtype(b)
        x = x if x.dtype is right.dtype else x.to(right.dtype)
        x = x if is_inactive_dropout(dropout) else dropout(x)
        return add_low_rank_product(out, x, right, left, self.scaling)

    def low_rank_update(self) -> LowRankUpdate:
        """Return the change in the parameter's orientation: of a "transposed" layout, ``A^T B^T``."""
        a, b = _cast_to_matmul_dtype(self.lora_a), _cast_to_matmul_dtype(self.lora_b)
        if self.layout.kind == "transposed":
            return LowRankUpdate(a.mT, b.mT, self.scaling, self.dropout, self)
        if self.layout.kind == "transposed kernel":
            a = a.view(self.rank, self.layout.shape[0], -1).movedim(1, 0)  # (in, rank, values of the kernel)
        return LowRankUpdate(b, a, self.scaling, self.dropout, self)

    def left_and_right_of_stacked_matrix(self, index: int) -> tuple[Tensor, Tensor]:
        """Return ``left`` and ``right`` of ``low_rank_update`` for one matrix of a stack.

        Experts are read one by one, and the gradient of ``a[number]`` is as large as the whole stack. So the stack is
        unbound once and cached while its values stay the same; backward then makes the stack's gradient only once.
        """
        a, b = self.lora_a, self.lora_b
        if torch.compiler.is_compiling() or not all(
            type(parameter) is nn.Parameter and not parameter.is_inference() for parameter in (a, b)
        ):
            pair = a[index], b[index]
        else:
            now = (
                *(
                    (id(parameter), parameter._version, parameter.data_ptr(), parameter.requires_grad)
                    for parameter in (a, b)
                ),
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
            )
            known = _MATRICES.get(self)
            if known is None or known[0] != now:
                known = _MATRICES[self] = now, list(zip(a.unbind(), b.unbind(), strict=True))
            pair = known[1][index]
        pair = _cast_to_matmul_dtype(pair[0]), _cast_to_matmul_dtype(pair[1])
        return (pair[0].mT, pair[1].mT) if self.layout.kind == "transposed" else (pair[1], pair[0])

    def is_zero(self) -> bool:
        """Whether A or B is all zero, so that ``B A`` is zero."""
        return not (bool(self.lora_a.any()) and bool(self.lora_b.any()))

    def delta(self) -> Tensor:
        """Return ``s B A``, the change of the parameter, in its shape and in float32 or wider."""
        # The adapter may be in 16 bits
        dtype = torch.promote_types(self.lora_a.dtype, torch.float32)
        return self.layout.from_matrices(
            (self.lora_b.detach().to(dtype) * self.scaling) @ self.lora_a.detach().to(dtype)
        )

    def extra_repr(self) -> str:
        """Describe the adapter."""
        return f"rank={self.rank}, scaling={self.scaling:g}"
