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
from lowmem.nn.calls import autocasts, is_plain_call, no_slow_autocast, refuse_nested
from lowmem.nn.forms import CodedForm
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.nn.techniques import LoRA

_OVERSAMPLING = 16  # columns of the basis beyond the rank
_STEPS = 8  # of subspace iteration; the singular values of a 4-bit error lie close together, so it needs several


def is_conv1d_class(kind: type) -> bool:
    """Whether a class is the ``Conv1D`` of transformers: a linear layer with a transposed weight, (in, out)."""
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the ``Conv1D`` of transformers, or of a subclass."""
    return any(map(is_conv1d_class, type(module).__mro__))


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

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as matrices (*stack, out, in)."""
        if self.kind == "transposed":
            return weight.mT
        if self.kind == "kernel":
            return weight.flatten(1)
        return weight.movedim(1, 0).flatten(1) if self.kind == "transposed kernel" else weight

    def weight(self, matrix: Tensor) -> Tensor:
        """Return matrices (*stack, out, in) as a tensor of the parameter's shape."""
        if self.kind == "transposed":
            return matrix.mT
        if self.kind == "kernel":
            return matrix.view(self.shape)
        if self.kind == "transposed kernel":
            rows, outputs, *kernel = self.shape
            return matrix.view(outputs, rows, *kernel).movedim(0, 1)
        return matrix

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A, (*stack, rank, in), and B, (*stack, out, rank)."""
        *stack, outputs, inputs = self.matrix(torch.empty(self.shape, dtype=torch.float32, device="meta")).shape
        return {"lora_a": (*stack, rank, inputs), "lora_b": (*stack, outputs, rank)}


def layout_of(module: nn.Module, name: str = "weight") -> Layout:
    """Return the layout of a parameter of a module."""
    shape = tuple(getattr(module, name).shape)
    if isinstance(module, _ConvNd):
        return Layout(shape, "transposed kernel" if isinstance(module, _ConvTransposeNd) else "kernel")
    transposed = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or is_conv1d(module)
    transposed = transposed or (len(shape) > 2 and bool(getattr(module, "is_transposed", False)))
    return Layout(shape, "transposed" if transposed else "linear")


class Update(NamedTuple):
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

    def with_matrices(self, left: Tensor, right: Tensor) -> Update:
        """Return the change with other matrices, which are views of these."""
        return self._replace(left=left, right=right, adapter=None)

    def selected(self, index: Any) -> Update:
        """Return the change of ``weight[index]``, for an index of the first dimension of the weight."""
        if self.adapter is not None and self.left.dim() == 3 and (number := _whole_number(index)) is not None:
            return self.with_matrices(*self.adapter.matrices(number))
        (update,) = self.rows(lambda matrix: matrix[index])
        return update

    def rows(self, select: Callable[[Tensor], Any]) -> list[Update]:
        """Return the changes of what ``select`` returns, a tensor or several, of the first dimension of a weight."""
        left, right = self.left, self.right
        lefts = [left] if left.dim() < right.dim() else select(left)  # the same for all rows of a transposed kernel
        rights = [right] if right.dim() < 3 else select(right)
        lefts, rights = ([side] if isinstance(side, Tensor) else list(side) for side in (lefts, rights))
        count = max(len(lefts), len(rights))
        lefts, rights = (side * count if len(side) < count else side for side in (lefts, rights))
        return [self.with_matrices(*pair) for pair in zip(lefts, rights, strict=True)]

    def dropped(self, x: Tensor) -> Tensor:
        """Return an input in the dtype of the matrices, after dropout."""
        x = x if x.dtype is self.left.dtype else x.to(self.left.dtype)
        return x if drops_nothing(self.dropout) else self.dropout(x)


def _whole_number(index: Any) -> int | None:
    """Return the index of one matrix of a stack as an int; None if it is none, or a tensor that is being traced."""
    if isinstance(index, Tensor) and index.dim() == 0 and index.dtype in (torch.int64, torch.int32):
        return None if torch.compiler.is_compiling() else int(index)
    return index if type(index) is int else None


def drops_nothing(dropout: nn.Module | None) -> bool:
    """Whether a dropout module returns its input unchanged."""
    return type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)


def add_low_rank(out: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ``out + s B A x`` in out's dtype, for out (..., out_features), x (..., in_features)."""
    if x.dim() != 2:
        refuse_nested(x)
    wide = out if out.dim() == 2 else out.reshape(-1, b.shape[0])  # (batch, out)
    rows = x if x.dim() == 2 else x.reshape(-1, a.shape[1])  # (batch, in)
    with no_slow_autocast(x):
        # Under autocast the fused addition would cast its operands, ``out`` included, to 16 bits.
        if autocasts(x):
            narrow = nn.functional.linear(rows, a) * scaling  # (batch, rank)
            wide = wide + nn.functional.linear(narrow, b).to(out.dtype)
        else:
            add = kernels.add_low_rank if is_plain_call(x, out, a, b) else reference.add_low_rank
            wide = add(wide, rows, a, b, scaling)
    return wide if out.dim() == 2 else wide.view(out.shape)


def _factor(matrix: Tensor) -> Tensor:
    """Return a matrix of an adapter in the dtype in which torch multiplies it."""
    dtype = kernels.matmul_dtype(matrix.dtype, matrix)
    return matrix if matrix.dtype is dtype else matrix.to(dtype)


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
        self.layout = layout_of(base, name)
        self.rows_are_read = isinstance(base, (nn.Embedding, nn.EmbeddingBag))
        self.dropout = nn.Dropout(technique.dropout) if technique.dropout else nn.Identity()
        stored = getattr(base, name)
        dtype = stored.dtype if stored.dtype in (torch.float32, torch.float64) else torch.float32
        shapes = self.layout.shapes(self.rank)
        a, b = (torch.zeros(shapes[part], dtype=dtype, device=stored.device) for part in ("lora_a", "lora_b"))
        if self.rows_are_read:
            nn.init.normal_(b)
        else:
            nn.init.kaiming_uniform_(a.flatten(0, -2), a=math.sqrt(5))  # as nn.Linear initializes its weight
        a, b = (one.to(technique.dtype or dtype) for one in (a, b))
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)
        if technique.init == "loftq":
            if dense is None or not (isinstance(stored, StoredTensor) and isinstance(stored.form, CodedForm)):
                raise ValueError(
                    "init='loftq' approximates what 4 or 8 bits lose of the dense weight, and needs both: apply it "
                    "in the call that quantizes, convert(model, FourBit(), LoRA(init='loftq')), or use init='zero'"
                )
            if dense.is_meta:  # planned on the meta device, without values
                return
            self._approximate(self.layout.matrix(dense.detach().to(dtype) - stored.dequantize(dtype)))

    @torch.no_grad()
    def _approximate(self, error: Tensor) -> None:
        """Set A and B so that ``s B A`` approximates ``error`` (*stack, out, in)."""
        a, b = self.lora_a.view(-1, *self.lora_a.shape[-2:]), self.lora_b.view(-1, *self.lora_b.shape[-2:])
        for number, matrix in enumerate(error.reshape(-1, *error.shape[-2:])):
            u, sizes, vt = truncated_svd(matrix, self.rank)
            count = int((sizes > 0).sum())  # beyond the error's rank, A stays random and B zero, and both can train
            root = (sizes[:count] / self.scaling).sqrt()
            b[number, :, :count] = u[:, :count] * root
            a[number, :count] = root[:, None] * vt[:count]

    @property
    def starts_at_zero(self) -> nn.Parameter:
        """The matrix that starts at zero: B, or A of an embedding."""
        return self.lora_a if self.rows_are_read else self.lora_b

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Return ``out + s B A x`` in out's dtype, for out (..., out_features), x (..., in_features)."""
        own, dropout = self._parameters, self._modules["dropout"]  # faster than attributes
        assert dropout is not None
        a, b = own.get("lora_a"), own.get("lora_b")
        if a is None or b is None:  # a parametrization has moved them out
            a, b = self.lora_a, self.lora_b
        right, left = _factor(a), _factor(b)
        x = x if x.dtype is right.dtype else x.to(right.dtype)
        x = x if drops_nothing(dropout) else dropout(x)
        return add_low_rank(out, x, right, left, self.scaling)

    def update(self) -> Update:
        """Return the change in the parameter's orientation: of a "transposed" layout, ``A^T B^T``."""
        a, b = _factor(self.lora_a), _factor(self.lora_b)
        if self.layout.kind == "transposed":
            return Update(a.mT, b.mT, self.scaling, self.dropout, self)
        if self.layout.kind == "transposed kernel":
            a = a.view(self.rank, self.layout.shape[0], -1).movedim(1, 0)  # (in, rank, values of the kernel)
        return Update(b, a, self.scaling, self.dropout, self)

    def matrices(self, number: int) -> tuple[Tensor, Tensor]:
        """Return ``left`` and ``right`` of ``update`` for one matrix of a stack.

        Experts are read one by one, and the gradient of ``a[number]`` is as large as the whole stack. So the stack is
        unbound once and cached while its values stay the same; backward then makes the stack's gradient only once.
        """
        a, b = self.lora_a, self.lora_b
        if torch.compiler.is_compiling() or not all(
            type(one) is nn.Parameter and not one.is_inference() for one in (a, b)
        ):
            pair = a[number], b[number]
        else:
            now = (
                *((id(one), one._version, one.data_ptr(), one.requires_grad) for one in (a, b)),
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
            )
            known = _MATRICES.get(self)
            if known is None or known[0] != now:
                known = _MATRICES[self] = now, list(zip(a.unbind(), b.unbind(), strict=True))
            pair = known[1][number]
        pair = _factor(pair[0]), _factor(pair[1])
        return (pair[0].mT, pair[1].mT) if self.layout.kind == "transposed" else (pair[1], pair[0])

    def changes_nothing(self) -> bool:
        """Whether A or B is all zero, so that ``B A`` is zero."""
        return not (bool(self.lora_a.any()) and bool(self.lora_b.any()))

    def delta(self) -> Tensor:
        """Return ``s B A``, the change of the parameter, in its shape and in float32 or wider."""
        dtype = torch.promote_types(self.lora_a.dtype, torch.float32)  # the adapter may be in 16 bits
        return self.layout.weight((self.lora_b.detach().to(dtype) * self.scaling) @ self.lora_a.detach().to(dtype))

    def extra_repr(self) -> str:
        """Describe the adapter."""
        return f"rank={self.rank}, scaling={self.scaling:g}"
