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

from lowmem.kernels.frozen_operator import FrozenOperator, StoredParts, parts_of, stored
from lowmem.kernels.ops import FIELDS
from lowmem.kernels.reference import multiply_into
from lowmem.quant.backend import Backend, Weight, matmul_dtype
from lowmem.quant.tensor import QuantizedTensor


def _reads(offsets: Tensor) -> bool:
    return offsets.is_cpu


def _groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield the number and the rows of each group that has rows."""
    start = 0
    for number, end in enumerate(offsets.tolist()):
        if end > start:
            yield number, slice(start, end)
        start = max(start, end)


class Blocks(NamedTuple):
    """Rows in blocks of equal size, each of one group; blocks and their ends may be empty.

    Attributes:
        group: of each block, int64 (blocks,).
        rows: numbers of its rows, int64 (blocks, size); where there is none, the number of all rows.
    """

    group: Tensor
    rows: Tensor

    @classmethod
    def of(cls, offsets: Tensor, rows: int) -> Blocks:
        """Cut rows into blocks, without a value of the offsets: int (count,), the end of each group."""
        count = offsets.shape[0]
        size = max(1, -(-rows // count))
        ends = offsets.long().cummax(0).values
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        blocks = (ends - starts + size - 1) // size  # of each group: (count,)
        last = blocks.cumsum(0)
        numbers = torch.arange(min(rows, rows // size + count), dtype=torch.int64, device=offsets.device)
        group = torch.searchsorted(last, numbers, right=True).clamp(max=count - 1)
        first = starts[group] + (numbers - (last - blocks)[group]) * size
        found = first[:, None] + torch.arange(size, dtype=torch.int64, device=offsets.device)  # (blocks, size)
        return cls(group, torch.where(found < ends[group][:, None], found, rows))

    def gather(self, x: Tensor) -> Tensor:
        """Return the blocks of rows of x (rows, n), (blocks, size, n); zeros where there is no row."""
        return torch.cat([x, x.new_zeros(1, x.shape[1])])[self.rows]

    def scatter(self, blocks: Tensor, rows: int) -> Tensor:
        """Return the rows (rows, n) of blocks (blocks, size, n); rows of no group are zero."""
        out = blocks.new_zeros(rows + 1, blocks.shape[2])
        return out.index_copy_(0, self.rows.flatten(), blocks.flatten(0, 1))[:rows]


def _compute(
    backend: Backend, x: Tensor, weight: Weight, dtype: torch.dtype, transposed: bool, count: int, offsets: Tensor
) -> Tensor:
    multiply = backend.input_grad if transposed else backend.linear
    if not _reads(offsets):
        blocks = Blocks.of(offsets, x.shape[0])
        pairs = zip(blocks.gather(x), blocks.group.split(1), strict=True)
        outs = [multiply(rows, _selected(weight, count, group), dtype) for rows, group in pairs]
        return blocks.scatter(torch.stack(outs), x.shape[0]) if outs else _fake(x, weight, dtype, transposed, count)
    out = _fake(x, weight, dtype, transposed, count).zero_()
    matrices = _matrices(weight, count)
    for number, rows in _groups(offsets):
        out[rows] = multiply(x[rows], matrices(number), dtype)
    return out


def _fake(x: Tensor, weight: Weight, dtype: torch.dtype, transposed: bool, count: int, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1] if transposed else weight.shape[0] // count, dtype=dtype)


def _selected(weight: Weight, count: int, number: Tensor) -> Weight:
    """Return the matrix of a stack whose number is in a tensor (1,), which is not read."""

    def part(stack: Tensor) -> Tensor:
        stacked: Tensor = stack.detach().unflatten(0, (count, -1))  # type: ignore[no-untyped-call, unused-ignore]
        return stacked.index_select(0, number)[0]

    if not isinstance(weight, QuantizedTensor):
        return part(weight)
    packed, scales = part(weight.packed), part(weight.scales)
    return replace(weight, packed=packed, scales=scales, shape=torch.Size((packed.shape[0], weight.shape[1])))


def _matrices(weight: Weight, count: int) -> Callable[[int], Weight]:
    """Return a function from the number of a matrix to that matrix of a stack; 4-bit ones keep what is cached."""
    rows = weight.shape[0] // count
    if not isinstance(weight, QuantizedTensor):
        return lambda number: weight[number * rows : (number + 1) * rows]
    packed, scales, key = weight.packed, weight.scales, ("stack", count, weight.packed.data_ptr())
    kept: dict[int, QuantizedTensor] = weight.cache.setdefault(str(key), {})

    def matrix(number: int) -> QuantizedTensor:
        if number not in kept:
            part = slice(number * rows, (number + 1) * rows)
            shape = torch.Size((rows, weight.shape[1]))
            kept[number] = replace(weight, packed=packed.detach()[part], scales=scales.detach()[part], shape=shape)
        return kept[number]

    return matrix


def _record(x: Tensor, weight: Weight | StoredParts, *rest: Any) -> Tensor:
    if not isinstance(weight, (QuantizedTensor, StoredParts)):
        return cast(Tensor, torch.ops.lowmem.grouped_product_16bit(x, weight, *rest))
    weight.check_layout()  # here: the operator gets no row count to check against
    return cast(Tensor, torch.ops.lowmem.grouped_product_4bit(x, *parts_of(weight), *rest))


grouped_product = FrozenOperator(
    _compute,
    _fake,
    _record,
    lambda x, dtype, transposed, *rest: ((dtype, transposed, *rest), (dtype, not transposed, *rest)),
    rows_alike=False,
)
"""``grouped_product(x, W, dtype, transposed, count, offsets)`` multiplies rows ``offsets[e - 1]`` to ``offsets[e]``
of x by matrix e of a stack W (count * out, in): by its transpose, as ``product`` does, or by itself if transposed.
Other rows are zero."""

_GROUPS = "ScalarType dtype, bool transposed, int count, Tensor offsets"
grouped_product.declare(f"grouped_product_16bit(Tensor x, Tensor weight, {_GROUPS}) -> Tensor", lambda *given: given)
grouped_product.declare(
    f"grouped_product_4bit(Tensor x, {FIELDS}, {_GROUPS}) -> Tensor",
    lambda x, *given: (x, stored(*given[:3]), *given[3:]),
)

_LIBRARY = torch.library.Library("lowmem", "FRAGMENT")
_LIBRARY.define(
    "grouped_matmul(Tensor x, Tensor matrices, Tensor offsets) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
_LIBRARY.define("grouped_outer(Tensor x, Tensor grad, Tensor offsets) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def grouped_matmul(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Return (rows, columns): rows ``offsets[e - 1]`` to ``offsets[e] - 1`` of x, multiplied by matrix e.

    Rows after the last group are zero. It is differentiable in rows and matrices.

    Args:
        x: (rows, n).
        matrices: (count, n, columns), in the dtype of x.
        offsets: int (count,), the end of each group.
    """
    out: Tensor = torch.ops.lowmem.grouped_matmul(x, matrices, offsets)
    return out


def _batched(a: Tensor, b: Tensor) -> Tensor:
    wide = matmul_dtype(a.dtype, a)
    return (a.to(wide) @ b.to(wide)).to(a.dtype)


def _matmul(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    if not _reads(offsets):
        blocks = Blocks.of(offsets, x.shape[0])
        return blocks.scatter(_batched(blocks.gather(x), matrices[blocks.group]), x.shape[0])
    out, wide = x.new_zeros(x.shape[0], matrices.shape[2]), matmul_dtype(x.dtype, x)
    for number, rows in _groups(offsets):
        multiply_into(out[rows], x[rows].to(wide), matrices[number].to(wide))
    return out


def _outer(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """Return the gradient of the matrices: (count, n, columns)."""
    out = x.new_zeros(offsets.shape[0], x.shape[1], grad.shape[1])
    if not _reads(offsets):
        blocks = Blocks.of(offsets, x.shape[0])
        return out.index_add_(0, blocks.group, _batched(blocks.gather(x).mT, blocks.gather(grad)))
    wide = matmul_dtype(x.dtype, x)
    for number, rows in _groups(offsets):
        multiply_into(out[number], x[rows].t().to(wide), grad[rows].to(wide))
    return out


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
torch.library.register_autograd(
    "lowmem::grouped_matmul",
    _backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=_LIBRARY,
)
