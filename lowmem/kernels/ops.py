"""The products as custom operators, for ``torch.compile``, ``torch.export`` and ``torch.jit.trace``.

They are opaque to these, so that compiled and traced graphs run the active backend. Eager calls bypass them: the
dispatch of a Python operator costs more than a small product.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lowmem import kernels
from lowmem.kernels.int8 import float_dtype
from lowmem.quant.backend import Weight
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["dequantize_rows", "product"]


def product(x: Tensor, weight: Weight, dtype: torch.dtype, transposed: bool) -> Tensor:
    """Return ``x @ W.T``, or ``x @ W`` when transposed, differentiable in ``x``: (batch, in) -> (batch, out)."""
    if isinstance(weight, QuantizedTensor):
        weight.check_layout()  # here: the operator gets no row count to check against
        stored, described = (weight.packed, weight.scales), (weight.format, weight.block_size, weight.scale_encoding)
        out = torch.ops.lowmem.product_4bit(x, *stored, *described, weight.shape[1], dtype, transposed)
    else:
        out = torch.ops.lowmem.product_16bit(x, weight, dtype, transposed)
    return cast(Tensor, out)


def dequantize_rows(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Return a 4-bit weight (rows, columns), dequantized to ``dtype``."""
    described = weight.format, weight.block_size, weight.scale_encoding, weight.shape[-1]
    return cast(Tensor, torch.ops.lowmem.dequantize_rows(weight.packed, weight.scales, *described, dtype))


@torch.library.custom_op(
    "lowmem::product_4bit",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor scales, str format, int block_size, str scale_encoding, int columns, "
    "ScalarType dtype, bool transposed) -> Tensor",
)
def _product_4bit(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    format: str,
    block_size: int,
    scale_encoding: str,
    columns: int,
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    shape = torch.Size((packed.shape[0], columns))
    weight = QuantizedTensor(packed, scales, shape, format, block_size, scale_encoding)
    return (kernels.input_grad if transposed else kernels.linear)(x, weight, dtype)


@torch.library.custom_op(
    "lowmem::product_16bit",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, ScalarType dtype, bool transposed) -> Tensor",
)
def _product_16bit(x: Tensor, weight: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    return (kernels.input_grad if transposed else kernels.linear)(x, weight, dtype)


@_product_4bit.register_fake
def _(x: Tensor, packed: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    columns, dtype, transposed = rest[-3:]
    size = columns if transposed else packed.shape[0]
    return x.new_empty(x.shape[0], size, dtype=float_dtype(dtype, x.dtype))


@_product_16bit.register_fake
def _(x: Tensor, weight: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 0], dtype=dtype)


@torch.library.custom_op(
    "lowmem::dequantize_rows",
    mutates_args=(),
    schema="(Tensor packed, Tensor scales, str format, int block_size, str scale_encoding, int columns, "
    "ScalarType dtype) -> Tensor",
)
def _dequantize_rows(
    packed: Tensor,
    scales: Tensor,
    format: str,
    block_size: int,
    scale_encoding: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    shape = torch.Size((packed.shape[0], columns))
    return QuantizedTensor(packed, scales, shape, format, block_size, scale_encoding).dequantize(dtype)


@_dequantize_rows.register_fake
def _(packed: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    columns, dtype = rest[-2:]
    return packed.new_empty(packed.shape[0], columns, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight = inputs
    ctx.input_dtype = x.dtype
    ctx.save_for_backward(*(item for item in weight if isinstance(item, Tensor)))
    ctx.rest = [item for item in weight if not isinstance(item, Tensor)]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    *described, dtype, transposed = ctx.rest
    operator = torch.ops.lowmem.product_4bit if len(saved) == 2 else torch.ops.lowmem.product_16bit
    found = operator(grad, *saved, *described, float_dtype(dtype, ctx.input_dtype), not transposed)
    return found.to(ctx.input_dtype), *([None] * (len(saved) + len(ctx.rest)))


for _operator in (_product_4bit, _product_16bit):
    _operator.register_autograd(_backward, setup_context=_setup_context)
