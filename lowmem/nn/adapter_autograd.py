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
from lowmem.kernels.frozen_operator import parts_of, stored
from lowmem.kernels.memory import is_batch, is_traced, keeps_results
from lowmem.nn.adapter import Adapter, drops_nothing
from lowmem.nn.calls import autocast, is_plain_call
from lowmem.nn.forms import HalfForm
from lowmem.nn.recomputed import Recompute, differentiable_once, recompute_of, saves_in_any_dtype
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.quant.tensor import QuantizedTensor

LEAST_ROWS = 64
"""Fewest rows for which dequantizing the weight to bfloat16 costs less than a separate low-rank product."""

_KEEP_RESULTS = ("ReluBackward0", "SigmoidBackward0", "TanhBackward0")
"""Autograd nodes of functions that save their own result."""

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16)


def read_product(
    input: Tensor, weight: Any, adapter: Any, matrices: tuple[Tensor, Tensor], bias: Any, transposed: bool
) -> Tensor | None:
    """Return the product of an input with a frozen weight that has an adapter, for a module in training: (..., out).

    Args:
        input: float32 or bfloat16 (..., in).
        weight: without the adapter: (out, in); (in, out) if transposed.
        adapter: of the weight.
        matrices: its A and B, of ``trained_matrices``.
        bias: (out,), or None.
        transposed: whether the product is ``input @ weight``, instead of ``input @ weight.T``.

    Returns:
        The output in the dtype that the module without adapters returns (bfloat16 within ``narrow_results``); or None
        if base and adapter must be computed one after the other: products that are not in bfloat16, parametrizations,
        tensor subclasses, or devices without fast bfloat16.
    """
    x = autocast(input)
    found: kernels.Weight
    if type(weight) is StoredTensor:
        form = weight.form
        dtype = form.product_dtype(x) if isinstance(form, HalfForm) else form.compute_dtype or x.dtype
        wanted = form.dtype if isinstance(form, HalfForm) else torch.bfloat16
        if kernels.recorded_dtype(dtype, x) is not torch.bfloat16 or wanted is not torch.bfloat16 or weight.swapped:
            return None
        found = weight.stored
    elif type(weight) is nn.Parameter and not weight.requires_grad and weight.dtype is x.dtype is torch.bfloat16:
        found = weight.detach()
    else:
        return None
    bias = bias.dequantize() if isinstance(bias, StoredTensor) else bias
    if len(found.shape) != 2 or (bias is not None and (type(bias) not in _PLAIN or bias.requires_grad)):
        return None
    if bias is not None and tuple(bias.shape) != (weight.shape[1 if transposed else 0],):
        return None
    bias = None if bias is None else bias.detach()
    return product_of(input, x, adapter, matrices, (found, bias), transposed)


def trained_matrices(adapter: Any, input: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return an adapter's A and B if one autograd node can compute its product with the base's.

    None for fewer than 64 rows, without gradients, and in graphs, transforms and selective checkpoints.
    """
    if not (adapter.training or torch.is_grad_enabled()):
        # Without gradients, too: a checkpoint first runs its region so, and must get the same numbers.
        return None
    if not is_plain_call() or is_traced():  # a graph, transform or forward derivative
        return None
    if keeps_results():  # the checkpoint would keep the thin product, which is then overwritten
        return None
    if type(adapter) is not Adapter or type(input) not in _PLAIN or input.is_nested:
        return None
    if input.dim() < 2 or input.numel() < LEAST_ROWS * input.shape[-1] or input.dtype not in _DTYPES:
        return None
    own = adapter._parameters
    a, b = own.get("lora_a"), own.get("lora_b")
    if a is None or b is None or "forward" in adapter.__dict__:
        return None
    if not all(type(one) in _PLAIN and one.dtype in _DTYPES and one.dim() == 2 for one in (a, b)):
        return None
    if not (input.requires_grad or a.requires_grad or b.requires_grad):
        return None
    return a, b


def product_of(
    input: Tensor,
    x: Tensor,
    adapter: Any,
    matrices: tuple[Tensor, Tensor],
    frozen: tuple[kernels.Weight, Tensor | None],
    transposed: bool,
) -> Tensor | None:
    """Return the product with a frozen weight, A and B; ``x`` is ``input`` in autocast's dtype.

    None if the device is slow at bfloat16, or the shapes do not fit.
    """
    a, b = matrices
    if not kernels.fast_bfloat16(x) or x.shape[-1] != a.shape[1]:
        return None
    weight, bias = frozen
    shared = type(input.grad_fn).__name__ in _KEEP_RESULTS  # the input lives until backward; a cached copy would, too
    factor = input.to(torch.bfloat16) if shared else converted(input, torch.bfloat16)
    dropout = cast(nn.Module, adapter._modules["dropout"])
    dropped = None if drops_nothing(dropout) else dropout(factor)
    again = None if dropped is not None else recompute_of(input)
    # In these cases save the input itself, which other functions save, too: it is then kept only once.
    kept = factor if dropped is None else dropped
    kept = input if dropped is None and again is None and (shared or saves_in_any_dtype()) else kept
    out: Tensor = _AdaptedProduct.apply(factor, dropped, a, b, weight, transposed, bias, adapter.scaling, again, kept)  # type: ignore[no-untyped-call, unused-ignore]
    # Viewed here: autograd refuses writes to a view that a function of its own has made.
    out = out if input.dim() == 2 else out.view(*input.shape[:-1], -1)
    return out if _results.narrow else _widened(out, x.dtype)


def _widened(narrow: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bfloat16 product, and mark the result's storage as exact in bfloat16 (``is_narrow``)."""
    wide = narrow.to(dtype)
    if wide is not narrow and not wide.is_inference():
        cast(Any, wide.untyped_storage()).lowmem_narrow = wide._version, dtype
    return wide


def is_narrow(x: Tensor) -> bool:
    """Whether a tensor is marked as exact in bfloat16: a widened product, or a view of one, without writes since."""
    if x.is_inference():
        return False
    return getattr(x.untyped_storage(), "lowmem_narrow", None) == (x._version, x.dtype)


class _Results(threading.local):
    """Whether products of this thread are returned in bfloat16, without widening."""

    narrow = False


_results = _Results()


@contextmanager
def narrow_results(narrow: bool = True) -> Iterator[None]:
    """Let products with an adapter stay in bfloat16, for a caller that would round them to it."""
    before, _results.narrow = _results.narrow, narrow
    try:
        yield
    finally:
        _results.narrow = before


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
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


class _AdaptedProduct(torch.autograd.Function):
    """``x W^T + bias + s (d A^T) B^T``: (..., in) -> (rows, out); d is ``dropped``, x after dropout, or x itself.
    ``weight`` is W, or W^T if ``transposed``; ``kept`` is d to be saved, unless ``again`` is given, which recomputes
    d."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        a: Tensor,
        b: Tensor,
        weight: kernels.Weight,
        transposed: bool,
        bias: Tensor | None,
        scaling: float,
        again: Recompute | None,
        kept: Tensor,
    ) -> Tensor:
        ctx.weight, ctx.scaling, ctx.shape, ctx.drops = weight, scaling, x.shape, dropped is not None
        ctx.again, ctx.transposed = again, transposed
        # save_for_backward raises an error if the weight is changed in place before backward.
        frozen = (weight.packed, weight.scales) if isinstance(weight, QuantizedTensor) else (weight,)
        with torch.autocast(x.device.type, enabled=False):
            rows, adapted = (_rows(one, a.shape[1]) for one in (x, x if dropped is None else dropped))  # (rows, in)
            narrow = adapted @ a.to(x.dtype).t()  # (rows, rank)
            wide = (b * scaling).to(x.dtype).t()  # (rank, out)
            out = narrow @ wide if bias is None else torch.addmm(bias.to(x.dtype), narrow, wide)  # (rows, out)
            kernels.add_product(out, rows, weight, transposed)
        ctx.save_for_backward(None if again else kept, narrow, a, b, *frozen)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments of ``_AdaptedProduct.forward``."""
    adapted, narrow, a, b, frozen, *scales = ctx.saved_tensors
    if ctx.again:
        adapted = differentiable_once(ctx.again(grad.dtype))
    weight = frozen
    if scales:
        weight = stored(frozen, scales[0], parts_of(ctx.weight)[2])
    g, rows = _rows(grad, b.shape[0]), _rows(adapted.to(grad.dtype), a.shape[1])
    factor, twice = (b * ctx.scaling).to(g.dtype), torch.is_grad_enabled()
    if twice:
        narrow = rows @ a.to(rows.dtype).t()
    wanted = ctx.needs_input_grad
    thin = g @ factor  # (rows, rank): s g B
    dx = dd = da = db = None
    if ctx.drops:
        dd = (thin @ a.to(g.dtype)).view(ctx.shape) if wanted[1] else None
    if wanted[0]:
        if is_batch(grad):
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


def _rows(x: Tensor, columns: int) -> Tensor:
    rows = x.reshape(-1, columns)
    return rows if rows.is_contiguous() else rows.contiguous()
