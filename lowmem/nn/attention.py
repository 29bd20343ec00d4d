"""torch's multi-head attention with stored and adapted weights, which torch's own function cannot take."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowmem.nn.adapted_weight import AdaptedWeight, adapted_linear_or_not_implemented, implements_adapted
from lowmem.nn.call_context import autocast_disabled_if_slow
from lowmem.nn.stored_tensor import implements_for_stored
from lowmem.quant.backend import fast_matmul_dtype


@implements_for_stored(functional.multi_head_attention_forward)
@implements_adapted(functional.multi_head_attention_forward)
def _multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    if static_k is not None or static_v is not None:
        return NotImplemented
    if is_causal and attn_mask is None:
        raise RuntimeError("attn_mask=None with is_causal=True: give the mask, as generate_square_subsequent_mask")
    batched = query.dim() == 3
    if not batched:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    rows, batch, width = query.shape
    columns = key.shape[0]
    is_causal = is_causal and key_padding_mask is None
    mask = None
    if not is_causal or need_weights:
        mask = _checked_additive_mask(
            "attn_mask", attn_mask, query.dtype, (rows, columns), (batch * num_heads, rows, columns)
        )
    if mask is not None and mask.dim() == 3:
        mask = mask.view(batch, num_heads, rows, columns)
    padding = _checked_additive_mask("key_padding_mask", key_padding_mask, query.dtype, (batch, columns))
    if padding is not None:
        mask = padding.view(batch, 1, 1, columns) if mask is None else mask + padding.view(batch, 1, 1, columns)
    sizes = [3 * width] if query is key is value else [width, 2 * width] if key is value else [width] * 3
    if use_separate_proj_weight:
        sizes, weights = [width] * 3, [q_proj_weight, k_proj_weight, v_proj_weight]
    elif len(sizes) == 1:
        weights = [in_proj_weight]
    else:
        # The rows of the queries, and those of the keys and values
        starts = itertools.accumulate(sizes[:-1], initial=0)
        weights = [
            _sliced_weight_rows(in_proj_weight, slice(at, at + size)) for at, size in zip(starts, sizes, strict=True)
        ]
    biases = [None] * len(sizes) if in_proj_bias is None else in_proj_bias.split(sizes)
    parts = [
        _linear_with_any_weight(x, tensor, bias)
        for x, tensor, bias in zip((query, key, value), weights, biases, strict=False)
    ]
    q, k, v = (tensor for part in parts for tensor in part.chunk(part.shape[-1] // width, -1))  # (rows, batch, width)
    if bias_k is not None:
        k, v = torch.cat([k, bias_k.expand(1, batch, -1)]), torch.cat([v, bias_v.expand(1, batch, -1)])
    if add_zero_attn:
        k, v = (functional.pad(tensor, (0, 0, 0, 0, 0, 1)) for tensor in (k, v))
    if mask is not None and k.shape[0] > columns:
        mask = functional.pad(mask, (0, k.shape[0] - columns))
    q, k, v = (tensor.reshape(tensor.shape[0], batch, num_heads, -1).permute(1, 2, 0, 3) for tensor in (q, k, v))
    dropout_p, chances = dropout_p if training else 0.0, None
    dtype, wide = q.dtype, fast_matmul_dtype(q.dtype, q)
    if wide is not dtype:
        q, k, v, mask = q.to(wide), k.to(wide), v.to(wide), None if mask is None else mask.to(wide)
    with autocast_disabled_if_slow(q):
        if need_weights:
            scores = (q * math.sqrt(num_heads / width)) @ k.mT
            scores = scores if mask is None else scores + mask
            chances = functional.softmax(scores, -1)  # (batch, heads, rows, columns)
            chances = functional.dropout(chances, dropout_p) if dropout_p else chances
            out, chances = (chances @ v).to(dtype), chances.to(dtype)
        else:
            out = functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal).to(dtype)
    out = _linear_with_any_weight(
        out.permute(2, 0, 1, 3).flatten(-2), out_proj_weight, out_proj_bias
    )  # (rows, batch, width)
    if chances is not None and average_attn_weights:
        chances = chances.mean(1)
    if batched:
        return out, chances
    return out.squeeze(1), None if chances is None else chances.squeeze(0)


def _checked_additive_mask(
    argument_name: str, mask: Any, dtype: torch.dtype, *allowed_shapes: tuple[int, ...]
) -> Any:
    """Return a mask as numbers to add to scores."""
    if mask is None:
        return None
    if tuple(mask.shape) not in allowed_shapes or not (mask.dtype is torch.bool or mask.is_floating_point()):
        wanted = " or ".join(map(str, allowed_shapes))
        raise RuntimeError(
            f"{argument_name} is {mask.dtype} {tuple(mask.shape)}, and must be bool or floating point {wanted}"
        )
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


# Inside a ``__torch_function__``, Dynamo does not call that of other arguments: so these call functions themselves.


def _linear_with_any_weight(x: Tensor, weight: Any, bias: Any) -> Tensor:
    out = adapted_linear_or_not_implemented(x, weight, bias)
    return functional.linear(x, weight, bias) if out is NotImplemented else out


def _sliced_weight_rows(weight: Any, rows: slice) -> Any:
    return weight.indexed_along_first_dim(rows) if isinstance(weight, AdaptedWeight) else weight[rows]
