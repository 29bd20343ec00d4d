"""The operators: products with a stored weight, and the rows of a 4-bit one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lowmem.kernels import decompositions, reference
from lowmem.kernels.decompositions import register_decomposition
from lowmem.kernels.frozen_weight_operator import (
    FrozenWeightOperator,
    QuantizedOperands,
    codes_scales_and_description,
    quantized_tensor_from_operands,
)
from lowmem.quant.backend import Backend, Weight, product_result_dtype
from lowmem.quant.tensor import QuantizedTensor


def _compute_product(
    backend: Backend, x: Tensor, weight: Weight, dtype: torch.dtype, transposed: bool, *bias_and_low_rank: Any
) -> Tensor:
    if transposed:
        return backend.input_grad(x, weight, product_result_dtype(dtype, x.dtype))
    bias, a, *rest = (*bias_and_low_rank, None, None)[: max(2, len(bias_and_low_rank))]
    return backend.linear(x, weight, dtype, bias, None if a is None else (a, *rest))


def _fake_product(x: Tensor, weight: Weight, dtype: torch.dtype, transposed: bool, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 0], dtype=product_result_dtype(dtype, x.dtype))


def _call_product_operator(
    x: Tensor, weight: Weight | QuantizedOperands, dtype: torch.dtype, *transposed_bias_and_low_rank: Any
) -> Tensor:
    # A tuple: torch 2.9's compiler takes no union
    if not isinstance(weight, (QuantizedTensor, QuantizedOperands)):
        return cast(Tensor, torch.ops.lowmem.product_16bit(x, weight, dtype, *transposed_bias_and_low_rank))
    # Here: the operator gets no row count to check against
    weight.check_layout()
    # A dtype takes the dispatcher as long as all other arguments
    dtype_or_none = None if dtype is x.dtype else dtype
    return cast(
        Tensor,
        torch.ops.lowmem.product_4bit(
            x, *codes_scales_and_description(weight), dtype_or_none, *transposed_bias_and_low_rank
        ),
    )


def _tangent_and_gradient_arguments(
    x: Tensor, dtype: torch.dtype, transposed: bool
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    dtype = product_result_dtype(dtype, x.dtype)
    return (dtype, transposed), (dtype, not transposed)


def _differentiable_product(
    x: Tensor,
    weight: Weight,
    dtype: torch.dtype,
    transposed: bool,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    *b_and_scaling: Any,
) -> Tensor:
    out = product.compute_as_autograd_node(x, weight, dtype, transposed)
    if bias is not None:
        out = out + (bias if bias.dtype is out.dtype else bias.to(out.dtype))
    return out if a is None else reference.add_low_rank(out, x, a, *b_and_scaling)


product = FrozenWeightOperator(
    _compute_product, _fake_product, _call_product_operator, _tangent_and_gradient_arguments, _differentiable_product
)
"""``product(x, W, dtype, transposed, bias, A, B, s)`` is ``x @ W.T + bias + s (x @ A.T) @ B.T``, with gradients of
all but W; or ``x @ W`` when transposed. The arguments from ``bias`` on may be left out."""


FIELDS = "Tensor packed, Tensor scales, str described"
_REST = "bool transposed, Tensor? bias=None, Tensor? a=None, Tensor? b=None, float? scaling=None"
product.register_torch_operator(
    f"product_16bit(Tensor x, Tensor weight, ScalarType dtype, {_REST}) -> Tensor", lambda *operands: operands
)
product.register_torch_operator(
    f"product_4bit(Tensor x, {FIELDS}, ScalarType? dtype, {_REST}) -> Tensor",
    lambda x, packed, scales, text, dtype, *rest: (
        x,
        quantized_tensor_from_operands(packed, scales, text),
        dtype or x.dtype,
        *rest,
    ),
)


@register_decomposition("product_16bit")
def _decomposed_product_16bit(
    x: Tensor, weight: Tensor, dtype: torch.dtype, transposed: bool, *bias_and_low_rank: Any
) -> Tensor:
    return decompositions.decomposed_product(x, weight.to(dtype), transposed, *(bias_and_low_rank or (None,)))


register_decomposition("product_4bit")(decompositions.decomposed_product_4bit)


def dequantize_by_operator(weight: QuantizedTensor | QuantizedOperands, dtype: torch.dtype) -> Tensor:
    """Return a 4-bit weight (rows, columns), dequantized to ``dtype``, by its operator."""
    return cast(Tensor, torch.ops.lowmem.dequantize_rows(*codes_scales_and_description(weight), dtype))


FrozenWeightOperator(
    lambda backend, weight, dtype: backend.dequantize(weight, slice(None), dtype),
    lambda weight, dtype: weight.packed.new_empty(weight.shape, dtype=dtype),
    dequantize_by_operator,
).register_torch_operator(
    f"dequantize_rows({FIELDS}, ScalarType dtype) -> Tensor",
    lambda *operands: (quantized_tensor_from_operands(*operands[:3]), operands[3]),
)

register_decomposition("dequantize_rows")(decompositions.decomposed_dequantize)
