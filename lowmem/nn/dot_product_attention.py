"""``scaled_dot_product_attention`` that reads keys and values in 8 bits as they are, and caps scores: lowmem's kernel
where it is faster, torch's own elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lowmem.kernels.attention import attention
from lowmem.nn.cached_states import EightBitStates
from lowmem.nn.calls import autocasts, is_cast, is_plain_call, no_slow_autocast
from lowmem.quant.backend import HeadStates, backend_of, matmul_dtype

MOST = 8  # queries of a sequence that the kernel computes: the tokens of a step, and of an assistant's
MOST_FLOATS = 4  # the same, of float32


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float | None = None,
) -> Tensor:
    """Return what ``torch.nn.functional.scaled_dot_product_attention`` returns, within rounding.

    The kernel computes up to 8 queries of a sequence in 16 bits (300 keys and more, two cores of a Zen 4: one query
    in 0.05 to 0.2 of the time of torch's own, eight in 0.8 to 0.95) or with what ``lowmem.CachedStates`` keeps in 8
    bits, and up to 4 in float32 (0.45 to 0.95). Torch's own computes all others, and what records gradients, drops
    out, or runs under autocast or ``torch.compile``; in float32, if it records gradients of 16-bit floats for which a
    CPU has no instructions, since torch's backward takes 6 to 11 times as long in these.

    Args:
        query, key, value: (batch, heads, queries or keys, width), and any other shape that torch's own takes; key and
            value may be what ``CachedStates.append`` returned.
        attn_mask, dropout_p, is_causal, scale, enable_gqa: as torch's own takes them.
        softcap: c of ``c tanh(score / c)``, which replaces each score before the mask (Gemma 2, arXiv 2408.00118);
            None: scores stay as they are. Gradients are recorded, but there is no dropout.

    Raises:
        ValueError: ``softcap`` with dropout, or with tensors that are not floating point of four dimensions that fit.
    """
    fits = _fits(query, key, value, attn_mask, is_causal, enable_gqa)
    if softcap is not None and (dropout_p or not fits):
        shapes = ", ".join(str(tuple(one.shape)) for one in (query, key, value))
        raise ValueError(
            f"softcap={softcap!r} takes floating point numbers of one dtype, (batch, heads, rows, width), without "
            f"dropout, not {shapes} of {query.dtype} with dropout_p={dropout_p!r}: leave softcap out, or compute the "
            "scores in torch"
        )
    dense = (one for one in (query, key, value, attn_mask) if not isinstance(one, EightBitStates))
    plain = fits and not dropout_p and not autocasts(query) and is_plain_call(*dense)
    if softcap is None and not (plain and is_faster(query, key, value)):

        def by_torch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            given = query, key, value, mask, dropout_p, is_causal
            return functional.scaled_dot_product_attention(*given, scale=scale, enable_gqa=enable_gqa)

        return without_slow_backward(by_torch, query, key, value, attn_mask)
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    compute = backend_of(query).attention if plain else attention
    keys, values = (one.states if isinstance(one, EightBitStates) else HeadStates(one) for one in (key, value))
    return compute(query, keys, values, attn_mask, scale, softcap).transpose(1, 2)


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, grouped: bool) -> bool:
    """Whether these are arguments that backends take, and torch's own, too."""
    if not query.is_floating_point():
        return False
    if any(one.dim() != 4 or one.dtype != query.dtype or not one.numel() for one in (query, key, value)):
        return False
    (batch, heads, queries, width), (_, shared, keys, _) = query.shape, key.shape
    fits = heads % shared == 0 if grouped else heads == shared
    fits = fits and key.shape == (batch, shared, keys, width) and value.shape[:3] == key.shape[:3]
    if mask is None or not fits:
        return fits
    sizes = zip(reversed(mask.shape), (keys, queries, heads, batch), strict=False)
    fits = mask.dim() <= 4 and all(size in (1, wanted) for size, wanted in sizes)
    return fits and mask.dtype in (torch.bool, query.dtype) and not is_causal


def without_slow_backward(
    compute: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Return ``compute(query, key, value, mask)``, in float32 if it records gradients in a dtype that slows torch."""
    dtype = torch.get_autocast_dtype(query.device.type) if is_cast(query) else query.dtype
    wide = matmul_dtype(dtype, query)
    records = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    if wide is dtype or not records:
        return compute(query, key, value, mask)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(wide)
    with no_slow_autocast(query):
        return compute(query.to(wide), key.to(wide), value.to(wide), mask).to(dtype)


class _ByLowmem(TorchFunctionMode):
    """Lets ``scaled_dot_product_attention`` of this module serve calls of torch's own."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.scaled_dot_product_attention:
            function = scaled_dot_product_attention
        return function(*args, **kwargs or {})


def without_slow_attention(model: nn.Module) -> AbstractContextManager[Any]:
    """Let a training step compute attention in float32, for the block, if the model's dtype slows torch's backward.

    It is for models without ``torch.utils.checkpoint``, which would recompute attention outside of the function mode.
    """
    is_slow = any(matmul_dtype(one.dtype, one) is not one.dtype for one in model.parameters())
    return _ByLowmem() if is_slow else nullcontext()


def is_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes these: where it is faster than torch's own."""
    coded = [isinstance(one, EightBitStates) for one in (key, value)]
    if any(coded) or not query.is_cpu:
        return all(coded) and query.shape[2] <= MOST
    most = MOST if query.element_size() == 2 else MOST_FLOATS
    return query.shape[2] <= most and backend_of(query).name != "reference"  # whose plain torch is slower
