"""Attention of transformers' models that reads keys and values in 8 bits as they are: lowmem's kernel for few queries
and for capped scores; torch's own for all others, whose gradients are computed in float32 where 16 bits are slow."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowmem.nn.dot_product_attention import (
    attention_with_fast_backward,
    is_kernel_faster_than_torch,
    scaled_dot_product_attention,
)

ATTENTION = "lowmem"
"""What ``model.set_attn_implementation`` takes to let this module's attention serve a model."""

SERVED_ATTENTION = "sdpa", "eager", ATTENTION
"""Names of attention functions that compute what blocks compute, and read states that are not contiguous."""

# Arguments that change the result
RESULT_CHANGING_ARGUMENTS = "position_bias", "s_aux", "output_attentions"


def lowmem_attention_forward(
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
    """Return the outputs (batch, queries, heads, width) of attention, as functions of ``AttentionInterface`` do.

    Raises:
        ValueError: the model has attention sinks, or caps scores and drops out at once.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError(
            f"the attention {ATTENTION!r} has no sinks, which a {type(module).__name__} needs: set another, such as "
            '"eager", which reads a KeyValueCache, too'
        )
    served = softcap is not None or is_kernel_faster_than_torch(query, key, value)
    if dropout or any(kwargs.get(name) is not None for name in RESULT_CHANGING_ARGUMENTS) or not served:

        def torch_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            positional = module, query, key, value, mask, dropout, scaling
            return cast(Tensor, sdpa_attention_forward(*positional, softcap=softcap, **kwargs)[0])

        return attention_with_fast_backward(torch_attention, query, key, value, attention_mask), None
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True)) and query.shape[2] > 1
    how = 0.0, causal and attention_mask is None, scaling, True
    out = scaled_dot_product_attention(query, key, value, attention_mask, *how, softcap=softcap)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, lowmem_attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
