"""Attention of a few queries to keys and values as they are cached, in 8 bits, too: the definitions of these methods
of ``Backend``.

    out = softmax(cap(scaling q k') + mask) v,    cap(s) = c tanh(s / c)
    scale = min(max |x| / 127, LARGEST_SCALE),    code = round(x / scale),    x ~ code scale

Vaswani et al., Attention Is All You Need, arXiv 1706.03762, section 3.2; heads of queries share heads of keys as in
Ainslie et al., GQA, arXiv 2305.13245; scores are capped as in Gemma 2, arXiv 2408.00118, section 2. Everything is
computed in float32 (float64 where the queries are) and rounded once. A query to which the mask hides all keys
gets zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.kernels.codes_8bit import LARGEST_SCALE
from lowmem.quant.backend import KeyOrValueStates


def attention(
    query: Tensor,
    key: KeyOrValueStates,
    value: KeyOrValueStates,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Return the output of each query: (batch, queries, heads, value width), contiguous, in the dtype of ``query``.

    Args:
        query: floating point (batch, heads, queries, width).
        key: (batch, key heads, keys, width); ``heads`` is a multiple of the key heads, which neighbours share.
        value: (batch, key heads, keys, value width).
        mask: broadcasts to (batch, heads, queries, keys): bool, False hides a key; or floating point, which is added.
        scaling: of the scores.
        softcap: c; None: scores are not capped.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, heads, queries, width = query.shape
    grouped = query.to(wide).reshape(batch, key.numbers.shape[1], -1, width)
    scores = (grouped @ decoded_states(key, wide).transpose(-1, -2) * scaling).view(batch, heads, queries, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    sees_none = (scores == -torch.inf).all(-1, keepdim=True)
    shares = torch.softmax(scores, -1).masked_fill(sees_none, 0.0).view(*grouped.shape[:3], -1)
    out = (shares @ decoded_states(value, wide)).view(batch, heads, queries, -1)
    return out.transpose(1, 2).to(query.dtype).contiguous()


def decoded_states(states: KeyOrValueStates, dtype: torch.dtype) -> Tensor:
    """Return states as floating point numbers of a dtype, multiplied in float32 or float64 and rounded once."""
    numbers, scales = states
    # A scale may be too small for float16
    wide = torch.promote_types(dtype, torch.float32)
    return numbers.to(dtype) if scales is None else (numbers.to(wide) * scales.to(wide)).to(dtype)


def encode_states(numbers: Tensor, into: KeyOrValueStates) -> None:
    """Write states (batch, heads, rows, width) as signed bytes with a scale for each row.

    Args:
        numbers: floating point; float64 is clamped to float32's range.
        into: codes, int8, of the same shape; scales, float32 (batch, heads, rows, 1): NaN, with any codes, where a
            number of the row is not finite.
    """
    codes, scales = into
    assert scales is not None
    if numbers.dtype is torch.float64:
        most = torch.finfo(torch.float32).max
        numbers = torch.where(numbers.isfinite(), numbers.clamp(-most, most), numbers)
    wide = numbers.float()
    scales.copy_(wide.abs().amax(-1, keepdim=True) / 127)
    scales.masked_fill_(~scales.isfinite(), torch.nan).clamp_(max=LARGEST_SCALE)
    codes.copy_((wide / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_())
