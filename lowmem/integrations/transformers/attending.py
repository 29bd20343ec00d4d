"""Attention of transformers' models that reads keys and values in 8 bits as they are: lowmem's kernel for few
queries, torch's own for prompts and for numbers in full precision."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowmem.integrations.transformers.cache import EightBitStates
from lowmem.quant.backend import HeadStates, backend_of

ATTENTION = "lowmem"
"""What ``model.set_attn_implementation`` takes to let this module's attention serve a model."""

MOST = 8  # queries of a sequence that the kernel computes: the tokens of a step, and of an assistant's

CHANGES = "position_bias", "s_aux", "output_attentions"  # arguments that change the result


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the outputs (batch, queries, heads, width) of attention, as functions of ``AttentionInterface`` do."""
    coded = isinstance(key, EightBitStates) and isinstance(value, EightBitStates) and query.shape[2] <= MOST
    records = torch.is_grad_enabled() and query.requires_grad
    others = dropout or records or any(kwargs.get(name) is not None for name in CHANGES)
    if others or not (coded or softcap is not None) or torch.compiler.is_compiling():
        given = module, query, key, value, attention_mask, dropout, scaling
        return cast("tuple[Tensor, None]", sdpa_attention_forward(*given, softcap=softcap, **kwargs))
    if attention_mask is None and query.shape[2] > 1 and kwargs.get("is_causal", getattr(module, "is_causal", True)):
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys, values = (one.states if isinstance(one, EightBitStates) else HeadStates(one) for one in (key, value))
    return backend_of(query).attention(query, keys, values, attention_mask, scaling, softcap), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
