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

from lowmem.kernels.cached_attention import attention
from lowmem.nn.cached_keys_and_values import EightBitStates
from lowmem.nn.call_context import (
    autocast_disabled_if_slow,
    can_bypass_autograd,
    is_autocast_enabled,
    is_cast_by_autocast,
)
from lowmem.quant.backend import KeyOrValueStates, backend_of, fast_matmul_dtype

# Queries of a sequence that the kernel computes: the tokens of a step, and of an assistant's
MOST = 8
# The same, of float32
MOST_FLOATS = 4


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
    fits = _are_supported_attention_arguments(query, key, value, attn_mask, is_causal, enable_gqa)
    if softcap is not None and (dropout_p or not fits):
        shapes = ", ".join(str(tuple(states.shape)) for states in (query, key, value))
        raise ValueError(
            f"softcap={softcap!r} takes floating point numbers of one dtype, (batch, heads, rows, width), without "
            f"dropout, not {shapes} of {query.dtype} with dropout_p={dropout_p!r}: leave softcap out, or compute the "
            "scores in torch"
        )
    dense = (states for states in (query, key, value, attn_mask) if not isinstance(states, EightBitStates))
    plain = fits and not dropout_p and not is_autocast_enabled(query) and can_bypass_autograd(*dense)
    if softcap is None and not (plain and is_kernel_faster_than_torch(query, key, value)):

        def torch_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            arguments = query, key, value, mask, dropout_p, is_causal
            return functional.scaled_dot_product_attention(*arguments, scale=scale, enable_gqa=enable_gqa)

        return attention_with_fast_backward(torch_attention, query, key, value, attn_mask)
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    compute = backend_of(query).attention if plain else attention
    keys, values = (
        states.codes_and_scales if isinstance(states, EightBitStates) else KeyOrValueStates(states)
        for states in (key, value)
    )
    return compute(query, keys, values, attn_mask, scale, softcap).transpose(1, 2)


def _are_supported_attention_arguments(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> bool:
    """Whether these are arguments that backends take, and torch's own, too."""
    if not query.is_floating_point():
        return False
    if any(states.dim() != 4 or states.dtype != query.dtype or not states.numel() for states in (query, key, value)):
        return False
    (batch, heads, queries, width), (_, shared, keys, _) = query.shape, key.shape
    fits = heads % shared == 0 if enable_gqa else heads == shared
    fits = fits and key.shape == (batch, shared, keys, width) and value.shape[:3] == key.shape[:3]
    if mask is None or not fits:
        return fits
    sizes = zip(reversed(mask.shape), (keys, queries, heads, batch), strict=False)
    fits = mask.dim() <= 4 and all(size in (1, wanted) for size, wanted in sizes)
    return fits and mask.dtype in (torch.bool, query.dtype) and not is_causal


def attention_with_fast_backward(
    attention_function: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Return ``compute(query, key, value, mask)``, in float32 if it records gradients in a dtype that slows torch."""
    dtype = torch.get_autocast_dtype(query.device.type) if is_cast_by_autocast(query) else query.dtype
    wide = fast_matmul_dtype(dtype, query)
    records = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    if wide is dtype or not records:
        return attention_function(query, key, value, mask)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(wide)
    with autocast_disabled_if_slow(query):
        return attention_function(query.to(wide), key.to(wide), value.to(wide), mask).to(dtype)


class _LowmemAttentionMode(TorchFunctionMode):
    """Lets ``scaled_dot_product_attention`` of this module serve calls of torch's own."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.scaled_dot_product_attention:
            function = scaled_dot_product_attention
        return function(*args, **kwargs or {})


def float32_attention_mode_if_faster(model: nn.Module) -> AbstractContextManager[Any]:
    """Let a training step compute attention in float32, for the block, if the model's dtype slows torch's backward.

    It is for models without ``torch.utils.checkpoint``, which would recompute attention outside of the function mode.
    """
    is_slow = any(
        fast_matmul_dtype(parameter.dtype, parameter) is not parameter.dtype for parameter in model.parameters()
    )
    return _LowmemAttentionMode() if is_slow else nullcontext()


def is_kernel_faster_than_torch(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes these: where it is faster than torch's own."""
    coded = [isinstance(states, EightBitStates) for states in (key, value)]
    if any(coded) or backend_of(query).is_asynchronous:
        return all(coded) and query.shape[2] <= MOST
    most = MOST if query.element_size() == 2 else MOST_FLOATS
    return query.shape[2] <= most and backend_of(query).name != "reference"  # whose plain torch is slower
