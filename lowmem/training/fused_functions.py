"""Autograd functions of fused modules. They save only their inputs for backward, and layers that read the result of a
norm or an activation recompute it instead of saving it (``register_recompute_if_contiguous``)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from lowmem.kernels import rms_norm_and_gating
from lowmem.kernels.rms_norm_and_gating import ACTIVATIONS
from lowmem.kernels.tensor_checks import is_batched_or_under_functorch
from lowmem.kernels.torch_versions import TORCH
from lowmem.nn.adapter_autograd import is_marked_exact_in_bfloat16
from lowmem.nn.recomputed_inputs import (
    Recompute,
    is_possibly_in_checkpoint,
    register_recompute_if_contiguous,
    with_double_backward_error,
)
from lowmem.quant.backend import backend_of

_OF_TORCH: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "SiLU": (functional.silu, torch.ops.aten.silu_backward),
    "GELU (tanh)": (
        partial(functional.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
    "GELU": (functional.gelu, torch.ops.aten.gelu_backward),
}
"""For each activation that torch has a function for: that function, and the one that computes its gradient."""


def recomputable_rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, round_before_scaling: bool = False
) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * (offset + weight)``; only x and the weight are saved for backward.

    Args:
        x: floating point (..., n).
        weight: floating point (n,); the offset is added in float32 (float64 for a float64 x).
        round_before_scaling: whether the quotient is rounded to x's dtype before the multiplication; the result then
            has the wider dtype of x and the weight, else that of x.
    """
    out: Tensor = _RMSNormFunction.apply(x, weight, eps, offset, round_before_scaling)  # type: ignore[no-untyped-call, unused-ignore]
    return _make_recomputable(out)


def recomputable_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_shape: tuple[int, ...], eps: float
) -> Tensor:
    """Return ``torch.nn.functional.layer_norm``, whose readers can recompute the result."""
    out: Tensor = _LayerNormFunction.apply(x, weight, bias, normalized_shape, eps)  # type: ignore[no-untyped-call, unused-ignore]
    return _make_recomputable(out)


class _PendingReader:
    """Identifies a reader of a result whose backward has not run yet; ``recompute`` itself would be a cycle."""

    edge: GradientEdge | None = None  # owns the graph that made the result, where its node in Python does not


def _make_recomputable(out: Tensor) -> Tensor:
    """Let the layers that read a function's result recompute it in backward, once for all of them. The note holds the
    autograd node weakly, since a detached copy of the result may outlive the graph; without it a reader saves the
    result."""
    if out.grad_fn is None:
        return out
    held, result = weakref.ref(cast(Any, out.grad_fn)), weakref.ref(out)

    def recompute_for_new_reader_or_none() -> Recompute | None:
        made: Any = held()
        if made is None or made.done:
            return None

        reader = _PendingReader()
        # Where the graph alone owns a node in Python, whose saved tensors are freed with it
        if TORCH < (2, 13):
            known = result()
            if known is None:
                return None
            reader.edge = get_gradient_edge(known)

        def recompute_result(dtype: torch.dtype | None) -> Tensor:
            made.waiting.discard(reader)
            wanted = dtype or made.dtype
            if made.left is not None:
                return cast(Tensor, made.left.to(wanted))
            if made.again is None or made.again.dtype is not wanted:
                made.again = made.compute(*_unpack_and_cache_saved_tensors(made), wanted)
            return cast(Tensor, made.again)

        made.waiting.add(reader)
        return recompute_result

    register_recompute_if_contiguous(out, recompute_for_new_reader_or_none)
    return out


def _init_recompute_state(ctx: Any, dtype: torch.dtype, compute: Callable[..., Tensor]) -> None:
    """Initialize the state by which readers recompute a result, of this dtype, which ``compute`` makes in a dtype."""
    ctx.dtype, ctx.compute = dtype, compute
    # The saved tensors, once they are unpacked
    ctx.kept = None
    # The recomputed result, from the first reader's backward until this function's own
    ctx.again = None
    # Readers whose backward has not run yet
    ctx.waiting = weakref.WeakSet()
    # The result for readers whose backward runs after this function's own, as of a detached copy
    ctx.left = None
    # Whether this function's backward has run: later readers save the result themselves
    ctx.done = False


def _finish_and_unpack_saved_tensors(ctx: Any) -> Any:
    """Return the saved tensors for the function's own backward, and release all that late readers do not need."""
    saved = _unpack_and_cache_saved_tensors(ctx)
    if ctx.waiting and ctx.left is None:
        ctx.left = ctx.compute(*saved, ctx.dtype)
    ctx.kept, ctx.again, ctx.done = None, None, True
    return saved


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a backward: it runs without grad, and differentiating its gradients again is an error."""

    @wraps(backward)
    def once_differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, grad)
        return tuple(gradient if gradient is None else with_double_backward_error(gradient) for gradient in gradients)

    return once_differentiable_backward


def _rms_norm_forward(x: Tensor, weight: Tensor, eps: float, offset: float, round_before_scaling: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype) if round_before_scaling else x.dtype
    if dtype is x.dtype:
        return backend_of(x).norm(x, _offset_weight_at_least_float32(x, weight, offset), eps, round_before_scaling)
    ones = torch.ones_like(weight, dtype=torch.float32)
    return (backend_of(x).norm(x, ones, eps, False) * _offset_weight_at_least_float32(x, weight, offset)).to(dtype)


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, round_before_scaling: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = eps, offset, round_before_scaling
        out = _rms_norm_forward(x, weight, *ctx.how)
        _init_recompute_state(
            ctx,
            out.dtype,
            lambda x, weight, dtype: _rms_norm_forward(x, weight, eps, offset, round_before_scaling).to(dtype),
        )
        return out

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (eps, offset, _) = _finish_and_unpack_saved_tensors(ctx), ctx.how
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = backend_of(x).norm_grad(grad, x, _offset_weight_at_least_float32(x, weight, offset), eps)
        if ctx.needs_input_grad[1]:
            of_weight = rms_norm_and_gating.norm_factor_grad(grad, x, eps).to(weight.dtype)
        return of_x, of_weight, None, None, None


class _LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_shape: tuple[int, ...], eps: float
    ) -> Tensor:
        out, mean, inverse = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, inverse, weight, bias)
        ctx.shape = normalized_shape

        def recompute_layer_norm(
            x: Tensor, mean: Tensor, inverse: Tensor, weight: Any, bias: Any, dtype: torch.dtype
        ) -> Tensor:
            return torch.native_layer_norm(x, normalized_shape, weight, bias, eps)[0].to(dtype)

        _init_recompute_state(ctx, out.dtype, recompute_layer_norm)
        return out

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, weight, bias = _finish_and_unpack_saved_tensors(ctx)
        asked = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.aten.native_layer_norm_backward(grad, x, ctx.shape, mean, inverse, weight, bias, asked)
        return *gradients, None, None


def _offset_weight_at_least_float32(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    wide = weight.detach().to(torch.float64 if x.dtype is torch.float64 else torch.float32)
    return wide + offset if offset else wide


def gated_product(gate: Tensor, up: Tensor | None, activation: str, gate_first: bool = True) -> Tensor:
    """Return ``act(gate) * up``; gate and up are saved for backward, in bfloat16 where that is lossless.

    torch computes it for tensors that are not plain, or differ in dtype or shape.

    Args:
        gate: floating point (..., n); without ``up``, (..., 2n): gate and up, concatenated.
        up: (..., n), or None.
        activation: a key of ``ACTIVATIONS``.
        gate_first: whether the gate is the first half.
    """
    plain = all(type(tensor) is Tensor for tensor in (gate, up) if tensor is not None)
    if not plain or (up is not None and (gate.dtype is not up.dtype or gate.shape != up.shape)):
        dtype = gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype)
        both = _gate_and_up_or_split_gate(gate.to(dtype), None if up is None else up.to(dtype), gate_first)
        return rms_norm_and_gating.gated(*both, ACTIVATIONS[activation], dtype)
    out: Tensor = _GatedProductFunction.apply(gate, up, activation, gate_first)  # type: ignore[no-untyped-call, unused-ignore]
    return out


def gated_product_recompute_or_none(product: Tensor) -> Recompute | None:
    """Return how to recompute what ``gated_product`` returned; None if torch computed it, or gradients are off."""
    node: Any = product.grad_fn
    node_class: Any = _GatedProductFunction._backward_cls
    if type(node) is not node_class:
        return None

    def recompute_gated_product(dtype: torch.dtype | None) -> Tensor:
        gate, up = _unpack_and_cache_saved_tensors(node)
        return backend_of(gate).gated(
            *_gate_and_up_or_split_gate(gate, up, node.gate_first), node.activation, dtype or node.dtype
        )

    return recompute_gated_product


class _GatedProductFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: str, gate_first: bool) -> Tensor:
        ctx.activation, ctx.dtype, ctx.gate_first = ACTIVATIONS[activation], gate.dtype, gate_first
        ctx.kept = None
        saved = [tensor if tensor is None else _bfloat16_if_lossless(tensor) for tensor in (gate, up)]
        if up is not None and len({tensor.dtype for tensor in saved if tensor is not None}) > 1:
            saved = [gate, up]
        ctx.save_for_backward(*saved)
        return backend_of(gate).gated(
            *_gate_and_up_or_split_gate(saved[0], saved[1], gate_first), ctx.activation, gate.dtype
        )

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = _unpack_and_cache_saved_tensors(ctx)
        ctx.kept = None
        if is_batched_or_under_functorch(grad):
            gradients = rms_norm_and_gating.gated_input_grads(
                grad, *_gate_and_up_or_split_gate(gate, up, ctx.gate_first), ctx.activation
            )
            of_gate, of_up = (cast(Tensor, tensor).to(ctx.dtype) for tensor in gradients)
            if up is not None:
                return of_gate, of_up, None, None
            return torch.cat((of_gate, of_up) if ctx.gate_first else (of_up, of_gate), -1), None, None, None
        into = [None if tensor is None else torch.empty_like(tensor, dtype=ctx.dtype) for tensor in (gate, up)]
        both = _gate_and_up_or_split_gate(into[0], into[1], ctx.gate_first)
        backend_of(grad).gated_grad(grad, *_gate_and_up_or_split_gate(gate, up, ctx.gate_first), ctx.activation, both)
        return into[0], into[1], None, None


class _ActivationFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str) -> Tensor:
        ctx.activation, x_dtype = activation, x.dtype
        _init_recompute_state(ctx, x_dtype, lambda saved, dtype: _apply_activation(saved, activation, x_dtype, dtype))
        # A checkpoint that recomputes its region may get another input then, which may not be lossless in bfloat16.
        saved = x if is_possibly_in_checkpoint() else _bfloat16_if_lossless(x)
        ctx.save_for_backward(saved)
        return _apply_activation(
            x if _should_use_torch_activation(activation, x) else saved, activation, x_dtype, x_dtype
        )

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = _finish_and_unpack_saved_tensors(ctx)
        if _should_use_torch_activation(ctx.activation, x, grad):
            return _OF_TORCH[ctx.activation][1](grad, x.to(ctx.dtype)), None
        if is_batched_or_under_functorch(grad):
            return rms_norm_and_gating.gated_input_grads(grad, x, None, ACTIVATIONS[ctx.activation])[0].to(
                ctx.dtype
            ), None
        of_x = torch.empty_like(x, dtype=ctx.dtype)
        backend_of(x).gated_grad(grad, x, None, ACTIVATIONS[ctx.activation], (of_x, None))
        return of_x, None


def _apply_activation(x: Tensor, activation: str, original_dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """Return an activation of x in ``out_dtype``; ``original_dtype`` is x's dtype before it was narrowed."""
    if _should_use_torch_activation(activation, x):
        return _OF_TORCH[activation][0](x.to(original_dtype)).to(out_dtype)
    return backend_of(x).gated(x, None, ACTIVATIONS[activation], out_dtype)


def _should_use_torch_activation(activation: str, x: Tensor, grad: Tensor | None = None) -> bool:
    """Whether to call torch's function for an activation: the backend has none, or vmap asks."""
    ours = backend_of(x).serves_rows(x) and (grad is None or not is_batched_or_under_functorch(grad))
    return activation in _OF_TORCH and not ours


def recomputable_activation(x: Tensor, activation: str) -> Tensor:
    """Return one of ``ACTIVATIONS`` of x; only x is saved for backward, and readers can recompute the result."""
    out: Tensor = _ActivationFunction.apply(x, activation)  # type: ignore[no-untyped-call, unused-ignore]
    return _make_recomputable(out)


def _unpack_and_cache_saved_tensors(ctx: Any) -> Any:
    """Return the saved tensors, unpacked only once: a checkpoint frees a tensor when it is first unpacked."""
    if ctx.kept is None:
        ctx.kept = ctx.saved_tensors
    return ctx.kept


def _gate_and_up_or_split_gate(gate: Any, up: Any, gate_first: bool) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


_CHUNK = 2**18
"""Elements that are processed at a time, so that temporaries stay in the processor's cache."""


def _bfloat16_if_lossless(x: Tensor) -> Tensor:
    """Return a float32 tensor as bfloat16 if that is lossless, else x. All elements are compared, unless the product
    marked its result as exact; then the first row, since writes through ``.data`` keep the mark."""
    if x.dtype is not torch.float32 or not x.numel():
        return x
    first = x.detach()[(0,) * (x.dim() - 1)]
    if not torch.equal(first.bfloat16().float(), first):
        return x
    if is_marked_exact_in_bfloat16(x):
        return x.detach().bfloat16()
    rows, few = x.detach().reshape(-1, x.shape[-1]), max(1, _CHUNK // x.shape[-1])
    narrow = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    for part, into in zip(rows.split(few), narrow.view(-1, x.shape[-1]).split(few), strict=True):
        if not torch.equal(into.copy_(part).float(), part):
            return x
    return narrow
