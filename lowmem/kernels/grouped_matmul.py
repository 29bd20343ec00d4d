"""Grouped matrix products: each group of rows is multiplied by its own matrix, stored or dense.

``torch.nn.functional.grouped_mm`` does not serve here: it needs strides that are multiples of 16 bytes, which thin
matrices seldom have, its backward rejects expanded gradients, and it takes no stored weight.

Offsets on the CPU are read, and each group is one product. Offsets on another device are not, since that would wait
for the device: the rows are cut into blocks of one group each, of which there are at most twice as many as groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lowmem.kernels.frozen_weight_operator import (
    FrozenWeightOperator,
    QuantizedOperands,
    codes_scales_and_description,
    quantized_tensor_from_operands,
)
from lowmem.kernels.ops import FIELDS
from lowmem.kernels.reference import matmul_into
from lowmem.quant.backend import Backend, Weight, backend_of, fast_matmul_dtype
from lowmem.quant.tensor import QuantizedTensor


def _can_read_without_sync(group_ends: Tensor) -> bool:
    return not backend_of(group_ends).is_asynchronous


def _nonempty_groups_and_row_slices(group_ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield the number and the rows of each group that has rows."""
    start = 0
    for number, end in enumerate(group_ends.tolist()):
        if end > start:
            yield number, slice(start, end)
        start = max(start, end)


class GroupedRowBlocks(NamedTuple):
    """Rows in blocks of equal size, each of one group; blocks and their ends may be empty.

    Attributes:
        group: of each block, int64 (blocks,).
        rows: numbers of its rows, int64 (blocks, size); where there is none, the number of all rows.
    """

    group: Tensor
    rows: Tensor

    @classmethod
    def from_group_ends(cls, group_ends: Tensor, row_count: int) -> GroupedRowBlocks:
        """Cut rows into blocks, without a value of the offsets: int (count,), the end of each group."""
        count = group_ends.shape[0]
        size = max(1, -(-row_count // count))
        ends = group_ends.long().cummax(0).values
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        blocks = (ends - starts + size - 1) // size  # of each group: (count,)
        last = blocks.cumsum(0)
        numbers = torch.arange(min(row_count, row_count // size + count), dtype=torch.int64, device=group_ends.device)
        group = torch.searchsorted(last, numbers, right=True).clamp(max=count - 1)
        first = starts[group] + (numbers - (last - blocks)[group]) * size
        row_numbers = first[:, None] + torch.arange(
            size, dtype=torch.int64, device=group_ends.device
        )  # (blocks, size)
        return cls(group, torch.where(row_numbers < ends[group][:, None], row_numbers, row_count))

    def gather_rows(self, x: Tensor) -> Tensor:
        """Return the blocks of rows of x (rows, n), (blocks, size, n); zeros where there is no row."""
        return torch.cat([x, x.new_zeros(1, x.shape[1])])[self.rows]

    def scatter_to_rows(self, blocks: Tensor, row_count: int) -> Tensor:
        """Return the rows (rows, n) of blocks (blocks, size, n); rows of no group are zero."""
        out = blocks.new_zeros(row_count + 1, blocks.shape[2])
        return out.index_copy_(0, self.rows.flatten(), blocks.flatten(0, 1))[:row_count]


def _compute_grouped_product(
    backend: Backend,
    x: Tensor,
    weight: Weight,
    dtype: torch.dtype,
    transposed: bool,
    group_count: int,
    group_ends: Tensor,
) -> Tensor:
    multiply = backend.input_grad if transposed else backend.linear
    if not _can_read_without_sync(group_ends):
        blocks = GroupedRowBlocks.from_group_ends(group_ends, x.shape[0])
        pairs = zip(blocks.gather_rows(x), blocks.group.split(1), strict=True)
        outs = [multiply(rows, _matrix_at_tensor_index(weight, group_count, group), dtype) for rows, group in pairs]
        return (
            blocks.scatter_to_rows(torch.stack(outs), x.shape[0])
            if outs
            else _empty_grouped_product(x, weight, dtype, transposed, group_count)
        )
    out = _empty_grouped_product(x, weight, dtype, transposed, group_count).zero_()
    matrices = _cached_matrix_getter(weight, group_count)
    for number, rows in _nonempty_groups_and_row_slices(group_ends):
        out[rows] = multiply(x[rows], matrices(number), dtype)
    return out


def _empty_grouped_product(
    x: Tensor, weight: Weight, dtype: torch.dtype, transposed: bool, group_count: int, *_: Tensor
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1] if transposed else weight.shape[0] // group_count, dtype=dtype)


def _matrix_at_tensor_index(stacked_weight: Weight, matrix_count: int, matrix_index: Tensor) -> Weight:
    """Return the matrix of a stack whose number is in a tensor (1,), which is not read."""

    def indexed_slice(stack: Tensor) -> Tensor:
        stacked: Tensor = stack.detach().unflatten(0, (matrix_count, -1))  # type: ignore[no-untyped-call, unused-ignore]
        return stacked.index_select(0, matrix_index)[0]

    if not isinstance(stacked_weight, QuantizedTensor):
        return indexed_slice(stacked_weight)
    packed, scales = indexed_slice(stacked_weight.packed), indexed_slice(stacked_weight.scales)
    return replace(
        stacked_weight, packed=packed, scales=scales, shape=torch.Size((packed.shape[0], stacked_weight.shape[1]))
    )


def _cached_matrix_getter(stacked_weight: Weight, matrix_count: int) -> Callable[[int], Weight]:
    """Return a function from the number of a matrix to that matrix of a stack; 4-bit ones keep what is cached."""
    rows = stacked_weight.shape[0] // matrix_count
    if not isinstance(stacked_weight, QuantizedTensor):
        return lambda number: stacked_weight[number * rows : (number + 1) * rows]
    packed, scales, key = (
        stacked_weight.packed,
        stacked_weight.scales,
        ("stack", matrix_count, stacked_weight.packed.data_ptr()),
    )
    cached_matrices: dict[int, QuantizedTensor] = stacked_weight.cache.setdefault(str(key), {})

    def cached_matrix(matrix_index: int) -> QuantizedTensor:
        if matrix_index not in cached_matrices:
            part = slice(matrix_index * rows, (matrix_index + 1) * rows)
            shape = torch.Size((rows, stacked_weight.shape[1]))
            cached_matrices[matrix_index] = replace(
                stacked_weight, packed=packed.detach()[part], scales=scales.detach()[part], shape=shape
            )
        return cached_matrices[matrix_index]

    return cached_matrix


def _call_grouped_product_operator(x: Tensor, weight: Weight | QuantizedOperands, *arguments: Any) -> Tensor:
    if not isinstance(weight, (QuantizedTensor, QuantizedOperands)):
        return cast(Tensor, torch.ops.lowmem.grouped_product_16bit(x, weight, *arguments))
    # Here: the operator gets no row count to check against
    weight.check_layout()
    return cast(Tensor, torch.ops.lowmem.grouped_product_4bit(x, *codes_scales_and_description(weight), *arguments))


grouped_product = FrozenWeightOperator(
    _compute_grouped_product,
    _empty_grouped_product,
    _call_grouped_product_operator,
    lambda x, dtype, transposed, *rest: ((dtype, transposed, *rest), (dtype, not transposed, *rest)),
    rows_share_weight=False,
)
"""``grouped_product(x, W, dtype, transposed, count, offsets)`` multiplies rows ``offsets[e - 1]`` to ``offsets[e]``
of x by matrix e of a stack W (count * out, in): by its transpose, as ``product`` does, or by itself if transposed.
Other rows are zero."""

_GROUPS = "ScalarType dtype, bool transposed, int count, Tensor offsets"
grouped_product.register_torch_operator(
    f"grouped_product_16bit(Tensor x, Tensor weight, {_GROUPS}) -> Tensor", lambda *operands: operands
)
grouped_product.register_torch_operator(
    f"grouped_product_4bit(Tensor x, {FIELDS}, {_GROUPS}) -> Tensor",
    lambda x, *operands: (x, quantized_tensor_from_operands(*operands[:3]), *operands[3:]),
)

_LIBRARY = torch.library.Library("lowmem", "FRAGMENT")
_LIBRARY.define(
    "grouped_matmul(Tensor x, Tensor matrices, Tensor offsets) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
_LIBRARY.define("grouped_outer(Tensor x, Tensor grad, Tensor offsets) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def grouped_matmul(x: Tensor, matrices: Tensor, group_ends: Tensor) -> Tensor:
    """Return (rows, columns): rows ``offsets[e - 1]`` to ``offsets[e] - 1`` of x, multiplied by matrix e.

    Rows after the last group are zero. It is differentiable in rows and matrices.

    Args:
        x: (rows, n).
        matrices: (count, n, columns), in the dtype of x.
        group_ends: int (count,), the end of each group.
    """
    out: Tensor = torch.ops.lowmem.grouped_matmul(x, matrices, group_ends)
    return out


def _matmul_in_fast_dtype(a: Tensor, b: Tensor) -> Tensor:
    wide = fast_matmul_dtype(a.dtype, a)
    return (a.to(wide) @ b.to(wide)).to(a.dtype)


def _grouped_matmul_kernel(x: Tensor, matrices: Tensor, group_ends: Tensor) -> Tensor:
    if not _can_read_without_sync(group_ends):
        blocks = GroupedRowBlocks.from_group_ends(group_ends, x.shape[0])
        return blocks.scatter_to_rows(
            _matmul_in_fast_dtype(blocks.gather_rows(x), matrices[blocks.group]), x.shape[0]
        )
    out, wide = x.new_zeros(x.shape[0], matrices.shape[2]), fast_matmul_dtype(x.dtype, x)
    for number, rows in _nonempty_groups_and_row_slices(group_ends):
        matmul_into(out[rows], x[rows].to(wide), matrices[number].to(wide))
    return out


def _grouped_matrices_grad(x: Tensor, grad: Tensor, group_ends: Tensor) -> Tensor:
    """Return the gradient of the matrices: (count, n, columns)."""
    out = x.new_zeros(group_ends.shape[0], x.shape[1], grad.shape[1])
    if not _can_read_without_sync(group_ends):
        blocks = GroupedRowBlocks.from_group_ends(group_ends, x.shape[0])
        return out.index_add_(
            0, blocks.group, _matmul_in_fast_dtype(blocks.gather_rows(x).mT, blocks.gather_rows(grad))
        )
    wide = fast_matmul_dtype(x.dtype, x)
    for number, rows in _nonempty_groups_and_row_slices(group_ends):
        matmul_into(out[number], x[rows].t().to(wide), grad[rows].to(wide))
    return out


def _grouped_matmul_input_and_matrix_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, matrices, offsets = ctx.saved_tensors
    of_x = grouped_matmul(grad, matrices.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    of_matrices = torch.ops.lowmem.grouped_outer(x, grad, offsets) if ctx.needs_input_grad[1] else None
    return of_x, of_matrices, None


_LIBRARY.impl("grouped_matmul", _grouped_matmul_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_outer", _grouped_matrices_grad, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lowmem::grouped_matmul", lambda x, matrices, _: x.new_empty(x.shape[0], matrices.shape[2]), lib=_LIBRARY
)
torch.library.register_fake(
    "lowmem::grouped_outer",
    lambda x, grad, offsets: x.new_empty(offsets.shape[0], x.shape[1], grad.shape[1]),
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "lowmem::grouped_matmul",
    _grouped_matmul_input_and_matrix_grads,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=_LIBRARY,
)
