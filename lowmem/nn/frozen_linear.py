"""Product with a frozen weight: only the input gets a gradient, and autograd saves only the stored weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowmem import kernels
from lowmem.kernels import ops, reference
from lowmem.nn.call_context import (
    can_bypass_autograd,
    check_not_nested,
    is_jit_tracing,
    is_onnx_export_or_raise_if_quantized,
)
from lowmem.quant.backend import backend_of


def frozen_linear(x: Tensor, weight: kernels.Weight, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias``, computed in ``dtype``, without a gradient for W: (..., in) -> (..., out).

    Args:
        x: floating point (..., in); the result has its dtype.
        weight: float16 or bfloat16 (out, in), or a QuantizedTensor of that shape.
        dtype: to compute in; torch.int8 multiplies 8-bit integers, unless a gradient of x is recorded: then the
            product and its gradient are computed in ``kernels.differentiable_dtype``.
        bias: floating point (out,), or None.
    """
    plain = can_bypass_autograd(x, bias)
    if plain and x.dim() > 1 and not x.is_nested:
        out = backend_of(x).linear(x, weight, dtype, bias)
        return out if dtype is x.dtype else out.to(x.dtype)
    if is_jit_tracing():
        return _jit_traceable_frozen_linear(x, weight, dtype, bias)
    check_not_nested(x)
    out_features, in_features = weight.shape
    reference.check_input_dtype_and_width(x, in_features)
    if dtype is torch.int8 and x.requires_grad and torch.is_grad_enabled():
        dtype = kernels.differentiable_dtype(dtype, x)
    is_matrix = x.dim() == 2
    rows = x if is_matrix else _flatten_to_rows(x)
    out = backend_of(x).linear(rows, weight, dtype, bias) if plain else ops.product(rows, weight, dtype, False, bias)
    # Each of the two may add a node to autograd's graph
    out = out if out.dtype is x.dtype else out.to(x.dtype)
    return out if is_matrix else out.view(*x.shape[:-1], out_features)


def _jit_traceable_frozen_linear(
    x: Tensor, weight: kernels.Weight, dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    """Compute ``frozen_linear`` without branches on sizes: torch.jit.trace records only one side of a branch."""
    if is_onnx_export_or_raise_if_quantized(weight):
        return nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(
            x.dtype
        )
    return (
        ops.product(_flatten_to_rows(x), weight, dtype, False, bias).to(x.dtype).view(*x.shape[:-1], weight.shape[0])
    )


def _flatten_to_rows(x: Tensor) -> Tensor:
    """Return (..., in) as (batch, in), without reading a size that may be dynamic."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
