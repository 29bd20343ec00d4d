"""The product with a frozen weight and its adapter in training: one autograd node, computed in bfloat16.

    y = x W^T + bias + s (x A^T) B^T        dx = g W + s (g B) A
    dA = s (g B)^T x                        dB = s g^T (x A^T)

The thin product is computed first, and the product with W is accumulated onto it with a single rounding. That is more
exact than rounding both products, and saves a pass over the output. A and B keep their dtype (float32 or bfloat16),
and get gradients in it; products take bfloat16 copies (Micikevicius et al., Mixed Precision Training, arXiv
1710.03740, section 3.1, for master weights). Layers that read the same input share its bfloat16 copy, which autograd
saves once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowmem import kernels
from lowmem.kernels import ops
from lowmem.kernels.frozen_weight_operator import codes_scales_and_description, quantized_tensor_from_operands
from lowmem.kernels.tensor_checks import (
    is_batched_or_under_functorch,
    is_recording_operations,
    is_selective_checkpointing,
)
from lowmem.nn.adapter import Adapter, is_inactive_dropout
from lowmem.nn.call_context import autocast_linear_input, can_bypass_autograd
from lowmem.nn.forms import HalfForm
from lowmem.nn.recomputed_inputs import (
    Recompute,
    has_dtype_independent_pack_hook,
    recompute_function_or_none,
    with_double_backward_error,
)
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.quant.tensor import QuantizedTensor

LEAST_ROWS = 64
"""Fewest rows for which dequantizing the weight to bfloat16 costs less than a separate low-rank product."""

_KEEP_RESULTS = ("ReluBackward0", "SigmoidBackward0", "TanhBackward0")
"""Autograd nodes of functions that save their own result."""

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16)


def fused_lora_product_or_none(
    input: Tensor, weight: Any, adapter: Any, lora_a_and_b: tuple[Tensor, Tensor], bias: Any, transposed: bool
) -> Tensor | None:
    """Return the product of an input with a frozen weight that has an adapter, for a module in training: (..., out).

    Args:
        input: float32 or bfloat16 (..., in).
        weight: without the adapter: (out, in); (in, out) if transposed.
        adapter: of the weight.
        lora_a_and_b: its A and B, of ``fusible_lora_matrices_or_none``.
        bias: (out,), or None.
        transposed: whether the product is ``input @ weight``, instead of ``input @ weight.T``.

    Returns:
        The output in the dtype of the module without adapters (bfloat16 within ``bfloat16_adapter_outputs``); or None
        if base and adapter must be computed one after the other: products that are not in bfloat16, parametrizations,
        tensor subclasses, or devices without fast bfloat16.
    """
    x = autocast_linear_input(input)
    plain_weight: kernels.Weight
    if type(weight) is StoredTensor:
        form = weight.form
        dtype = form.product_dtype(x) if isinstance(form, HalfForm) else form.compute_dtype or x.dtype
        wanted = form.dtype if isinstance(form, HalfForm) else torch.bfloat16
        if (
            kernels.differentiable_dtype(dtype, x) is not torch.bfloat16
            or wanted is not torch.bfloat16
            or weight.swapped
        ):
            return None
        plain_weight = weight.kernel_weight
    elif type(weight) is nn.Parameter and not weight.requires_grad and weight.dtype is x.dtype is torch.bfloat16:
        plain_weight = weight.detach()
    else:
        return None
    bias = bias.dequantize() if isinstance(bias, StoredTensor) else bias
    if len(plain_weight.shape) != 2 or (bias is not None and (type(bias) not in _PLAIN or bias.requires_grad)):
        return None
    if bias is not None and tuple(bias.shape) != (weight.shape[1 if transposed else 0],):
        return None
    bias = None if bias is None else bias.detach()
    return bfloat16_lora_product_or_none(input, x, adapter, lora_a_and_b, (plain_weight, bias), transposed)


def fusible_lora_matrices_or_none(adapter: Any, input: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return an adapter's A and B if one autograd node can compute its product with the base's.

    None for fewer than 64 rows, without gradients, and in graphs, transforms and selective checkpoints.
    """
    if not (adapter.training or torch.is_grad_enabled()):
        # Without gradients, too: a checkpoint first runs its region so, and must get the same numbers.
        return None
    # A graph, transform or forward derivative
    if not can_bypass_autograd() or is_recording_operations():
        return None
    # The checkpoint would keep the thin product, which is then overwritten
    if is_selective_checkpointing():
        return None
    if type(adapter) is not Adapter or type(input) not in _PLAIN or input.is_nested:
        return None
    if input.dim() < 2 or input.numel() < LEAST_ROWS * input.shape[-1] or input.dtype not in _DTYPES:
        return None
    parameters = adapter._parameters
    a, b = parameters.get("lora_a"), parameters.get("lora_b")
    if a is None or b is None or "forward" in adapter.__dict__:
        return None
    if not all(type(matrix) in _PLAIN and matrix.dtype in _DTYPES and matrix.dim() == 2 for matrix in (a, b)):
        return None
    if not (input.requires_grad or a.requires_grad or b.requires_grad):
        return None
    return a, b


def bfloat16_lora_product_or_none(
    input: Tensor,
    autocast_input: Tensor,
    adapter: Any,
    lora_a_and_b: tuple[Tensor, Tensor],
    weight_and_bias: tuple[kernels.Weight, Tensor | None],
    transposed: bool,
) -> Tensor | None:
    """Return the product with a frozen weight, A and B; ``autocast_input`` is ``input`` in autocast's dtype.

    None if the device is slow at bfloat16, or the shapes do not fit.
    """
    a, b = lora_a_and_b
    if not kernels.fast_bfloat16(autocast_input) or autocast_input.shape[-1] != a.shape[1]:
        return None
    weight, bias = weight_and_bias
    # The input lives until backward; a cached copy would, too
    shared = type(input.grad_fn).__name__ in _KEEP_RESULTS
    factor = input.to(torch.bfloat16) if shared else cast_cached_on_tensor(input, torch.bfloat16)
    dropout = cast(nn.Module, adapter._modules["dropout"])
    dropped = None if is_inactive_dropout(dropout) else dropout(factor)
    again = None if dropped is not None else recompute_function_or_none(input)
    # In these cases save the input itself, which other functions save, too: it is then kept only once.
    saved_input = factor if dropped is None else dropped
    saved_input = (
        input if dropped is None and again is None and (shared or has_dtype_independent_pack_hook()) else saved_input
    )
    out: Tensor = _AdaptedProductFunction.apply(
        factor, dropped, a, b, weight, transposed, bias, adapter.scaling, again, saved_input
    )  # type: ignore[no-untyped-call, unused-ignore]
    # Viewed here: autograd refuses writes to a view that a function of its own has made.
    out = out if input.dim() == 2 else out.view(*input.shape[:-1], -1)
    return out if _bfloat16_output_flag.enabled else _widen_and_mark_exact(out, autocast_input.dtype)


def _widen_and_mark_exact(bfloat16_product: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bfloat16 product, and mark the result's storage as exact in bfloat16."""
    wide = bfloat16_product.to(dtype)
    if wide is not bfloat16_product and not wide.is_inference():
        cast(Any, wide.untyped_storage()).lowmem_narrow = wide._version, dtype
    return wide


def is_marked_exact_in_bfloat16(x: Tensor) -> bool:
    """Whether a tensor is marked as exact in bfloat16: a widened product, or a view of one, without writes since."""
    if x.is_inference():
        return False
    return getattr(x.untyped_storage(), "lowmem_narrow", None) == (x._version, x.dtype)


class _ThreadBfloat16OutputFlag(threading.local):
    """Whether products of this thread are returned in bfloat16, without widening."""

    enabled = False


_bfloat16_output_flag = _ThreadBfloat16OutputFlag()


@contextmanager
def bfloat16_adapter_outputs(enabled: bool = True) -> Iterator[None]:
    """Let products with an adapter stay in bfloat16, for a caller that would round them to it."""
    before, _bfloat16_output_flag.enabled = _bfloat16_output_flag.enabled, enabled
    try:
        yield
    finally:
        _bfloat16_output_flag.enabled = before


def cast_cached_on_tensor(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in a dtype; layers that read the same ``x`` get the same tensor while ``x`` is not changed.

    The copy is cached as an attribute of ``x`` and lives as long. Without grad, and for leaves of the graph, which
    users may keep, copy and save, ``x`` is converted each time.
    """
    if x.dtype is dtype:
        return x
    if x.grad_fn is None or not torch.is_grad_enabled():
        return x.to(dtype)
    known = getattr(x, "_lowmem_converted", None)
    if known is None or known[0] != (x._version, dtype):
        known = (x._version, dtype), x.to(dtype)
        x._lowmem_converted = known  # type: ignore[attr-defined]
    return cast(Tensor, known[1])


class _AdaptedProductFunction(torch.autograd.Function):
    """``x W^T + bias + s (d A^T) B^T``: (..., in) -> (rows, out); d is ``dropped``, x after dropout, or x itself.
    ``weight`` is W, or W^T if ``transposed``; ``saved_input`` is d to be saved, unless ``recompute`` is given, which
    computes d again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        weight: kernels.Weight,
        transposed: bool,
        bias: Tensor | None,
        scaling: float,
        recompute: Recompute | None,
        saved_input: Tensor,
    ) -> Tensor:
        ctx.weight, ctx.scaling, ctx.shape, ctx.drops = weight, scaling, x.shape, dropped is not None
        ctx.again, ctx.transposed = recompute, transposed
        # save_for_backward raises an error if the weight is changed in place before backward.
        frozen = (weight.packed, weight.scales) if isinstance(weight, QuantizedTensor) else (weight,)
        with torch.autocast(x.device.type, enabled=False):
            rows, adapted = (
                _contiguous_rows(matrix, lora_a.shape[1]) for matrix in (x, x if dropped is None else dropped)
            )  # (rows, in)
            narrow = adapted @ lora_a.to(x.dtype).t()  # (rows, rank)
            wide = (lora_b * scaling).to(x.dtype).t()  # (rank, out)
            out = narrow @ wide if bias is None else torch.addmm(bias.to(x.dtype), narrow, wide)  # (rows, out)
            kernels.add_product(out, rows, weight, transposed)
        ctx.save_for_backward(None if recompute else saved_input, narrow, lora_a, lora_b, *frozen)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return _input_and_adapter_gradients(ctx, grad)


def _input_and_adapter_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments of ``_AdaptedProductFunction.forward``."""
    adapted, narrow, a, b, frozen, *scales = ctx.saved_tensors
    if ctx.again:
        adapted = with_double_backward_error(ctx.again(grad.dtype))
    weight = frozen
    if scales:
        weight = quantized_tensor_from_operands(frozen, scales[0], codes_scales_and_description(ctx.weight)[2])
    g, rows = _contiguous_rows(grad, b.shape[0]), _contiguous_rows(adapted.to(grad.dtype), a.shape[1])
    factor, twice = (b * ctx.scaling).to(g.dtype), torch.is_grad_enabled()
    if twice:
        narrow = rows @ a.to(rows.dtype).t()
    wanted = ctx.needs_input_grad
    thin = g @ factor  # (rows, rank): s g B
    dx = dd = da = db = None
    if ctx.drops:
        dd = (thin @ a.to(g.dtype)).view(ctx.shape) if wanted[1] else None
    if wanted[0]:
        if is_batched_or_under_functorch(grad):
            dense = weight.dequantize(g.dtype) if isinstance(weight, QuantizedTensor) else weight.to(g.dtype)
            dx = g @ (dense.t() if ctx.transposed else dense)
            dx = dx if ctx.drops else dx + thin @ a.to(g.dtype)
        elif twice:
            dx = ops.product(g, weight, g.dtype, not ctx.transposed)
            dx = dx if ctx.drops else dx + thin @ a.to(g.dtype)
        else:
            dx = g.new_zeros(g.shape[0], a.shape[1]) if ctx.drops else thin @ a.to(g.dtype)
            dx = kernels.add_product(dx, g, weight, not ctx.transposed)
        dx = dx.view(ctx.shape)
    if wanted[2]:
        da = (thin.t() @ rows).to(a.dtype)
    if wanted[3]:
        db = (g.t() @ narrow).to(b.dtype) * ctx.scaling
    return dx, dd, da, db, None, None, None, None, None, None


def _contiguous_rows(x: Tensor, columns: int) -> Tensor:
    rows = x.reshape(-1, columns)
    return rows if rows.is_contiguous() else rows.contiguous()
