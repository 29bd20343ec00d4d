"""The operators: products with a stored weight, and the rows of a 4-bit one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lowmem.kernels import decompositions, reference
from lowmem.kernels.decompositions import decomposes
from lowmem.kernels.frozen_operator import FrozenOperator, StoredParts, parts_of, stored
from lowmem.quant.backend import Backend, Weight, float_dtype
from lowmem.quant.tensor import QuantizedTensor


def _compute(
    backend: Backend, x: Tensor, weight: Weight, dtype: torch.dtype, transposed: bool, *added: Any
) -> Tensor:
    if transposed:
        return backend.input_grad(x, weight, float_dtype(dtype, x.dtype))
    bias, a, *rest = (*added, None, None)[: max(2, len(added))]
    return backend.linear(x, weight, dtype, bias, None if a is None else (a, *rest))


def _fake(x: Tensor, weight: Weight, dtype: torch.dtype, transposed: bool, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 0], dtype=float_dtype(dtype, x.dtype))


def _record(x: Tensor, weight: Weight | StoredParts, dtype: torch.dtype, *rest: Any) -> Tensor:
    if not isinstance(weight, (QuantizedTensor, StoredParts)):  # a tuple: torch 2.9's compiler takes no union
        return cast(Tensor, torch.ops.lowmem.product_16bit(x, weight, dtype, *rest))
    weight.check_layout()  # here: the operator gets no row count to check against
    own = None if dtype is x.dtype else dtype  # a dtype takes the dispatcher as long as all other arguments
    return cast(Tensor, torch.ops.lowmem.product_4bit(x, *parts_of(weight), own, *rest))


def _derivatives(x: Tensor, dtype: torch.dtype, transposed: bool) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    dtype = float_dtype(dtype, x.dtype)
    return (dtype, transposed), (dtype, not transposed)


def _differentiable(
    x: Tensor,
    weight: Weight,
    dtype: torch.dtype,
    transposed: bool,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    *rest: Any,
) -> Tensor:
    out = product.node(x, weight, dtype, transposed)
    out = out if bias is None else out + bias.to(out.dtype)
    return out if a is None else reference.add_low_rank(out, x, a, *rest)


product = FrozenOperator(_compute, _fake, _record, _derivatives, _differentiable)
"""``product(x, W, dtype, transposed, bias, A, B, s)`` is ``x @ W.T + bias + s (x @ A.T) @ B.T``, with gradients of
all but W; or ``x @ W`` when transposed. The arguments from ``bias`` on may be left out."""


FIELDS = "Tensor packed, Tensor scales, str described"
_REST = "bool transposed, Tensor? bias=None, Tensor? a=None, Tensor? b=None, float? scaling=None"
product.declare(f"product_16bit(Tensor x, Tensor weight, ScalarType dtype, {_REST}) -> Tensor", lambda *given: given)
product.declare(
    f"product_4bit(Tensor x, {FIELDS}, ScalarType? dtype, {_REST}) -> Tensor",
    lambda x, packed, scales, text, dtype, *rest: (x, stored(packed, scales, text), dtype or x.dtype, *rest),
)


@decomposes("product_16bit")
def _written_16bit(x: Tensor, weight: Tensor, dtype: torch.dtype, transposed: bool, *added: Any) -> Tensor:
    return decompositions.product(x, weight.to(dtype), transposed, *(added or (None,)))


decomposes("product_4bit")(decompositions.product_4bit)


def dequantize_rows(weight: QuantizedTensor | StoredParts, dtype: torch.dtype) -> Tensor:
    """Return a 4-bit weight (rows, columns), dequantized to ``dtype``, by its operator."""
    return cast(Tensor, torch.ops.lowmem.dequantize_rows(*parts_of(weight), dtype))


FrozenOperator(
    lambda backend, weight, dtype: backend.dequantize(weight, slice(None), dtype),
    lambda weight, dtype: weight.packed.new_empty(weight.shape, dtype=dtype),
    dequantize_rows,
).declare(f"dequantize_rows({FIELDS}, ScalarType dtype) -> Tensor", lambda *given: (stored(*given[:3]), given[3]))

decomposes("dequantize_rows")(decompositions.dequantized)
