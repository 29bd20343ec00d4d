"""Attention that reads keys and values in 8 bits: what it computes itself, and what it leaves to torch's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowmem.integrations.transformers import attention_interface
from lowmem.integrations.transformers.attention_interface import lowmem_attention_forward
from lowmem.integrations.transformers.key_value_cache import KeyValueCache
from lowmem.nn.cached_keys_and_values import EightBitStates
from lowmem.nn.dot_product_attention import MOST
from tests.compiled import needs_kernel
from tests.integrations.transformers.test_key_value_cache import CONFIGS


def states(queries, dtype=torch.float32):
    """Return a query and keys and values of 20 rows in 8 bits, and the same in float64."""
    generator = torch.Generator().manual_seed(0)
    cache = KeyValueCache(CONFIGS["llama"], bits=8)
    for count in (15, 5):
        key, value = cache.update(*torch.randn(2, 2, 2, count, 16, generator=generator, dtype=dtype), 0)
    return torch.randn(2, 4, queries, 16, generator=generator, dtype=dtype), key, value


def expected(query, key, value, mask=None):
    key, value = ((one + 0).double().repeat_interleave(2, 1) for one in (key, value))
    return functional.scaled_dot_product_attention(query.double(), key, value, mask).transpose(1, 2)


class Layer(nn.Module):
    num_key_value_groups = 2
    is_causal = True


def calls_of_torch(monkeypatch):
    calls = []
    own = attention_interface.sdpa_attention_forward
    monkeypatch.setattr(
        attention_interface, "sdpa_attention_forward", lambda *given, **more: calls.append(1) or own(*given, **more)
    )
    return calls


@pytest.mark.parametrize("queries", [1, MOST, MOST + 1])
def test_few_queries_are_computed_from_the_codes(queries, monkeypatch):
    query, key, value = states(queries)
    assert isinstance(key, EightBitStates)
    mask = torch.ones(queries, 20, dtype=torch.bool).tril(20 - queries)
    calls = calls_of_torch(monkeypatch)
    got, weights = lowmem_attention_forward(Layer(), query, key, value, mask[None, None])
    assert weights is None
    assert bool(calls) == (queries > MOST)
    torch.testing.assert_close(got.double(), expected(query, key, value, mask), rtol=1e-5, atol=1e-5)


def test_gradients_dropout_and_full_precision_are_left_to_torch():
    query, key, value = states(1)
    wanted = expected(query, key, value)
    got, _ = lowmem_attention_forward(Layer(), query, key + 0, value + 0, None)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    query.requires_grad_()
    got, _ = lowmem_attention_forward(Layer(), query, key, value, None)
    (grad,) = torch.autograd.grad(got.sum(), query)
    assert grad.abs().sum() > 0
    with torch.no_grad():
        torch.manual_seed(0)
        got, _ = lowmem_attention_forward(Layer(), query, key, value, None, dropout=0.9)
    assert (got.double() - wanted).abs().max() > 0.1


@pytest.mark.parametrize(("queries", "dtype"), [(8, torch.bfloat16), (4, torch.float32), (9, torch.bfloat16)])
@needs_kernel
def test_few_queries_are_computed_by_the_kernel(queries, dtype, monkeypatch):
    query, key, value = states(queries, dtype)
    mask = torch.arange(20).expand(2, 1, queries, 20) > 2
    calls = calls_of_torch(monkeypatch)
    got, _ = lowmem_attention_forward(Layer(), query, key + 0, value + 0, mask)
    assert bool(calls) == (queries > 8)
    torch.testing.assert_close(got.double(), expected(query, key, value, mask), rtol=2e-2, atol=2e-2)


def test_a_prompt_with_capped_scores_is_causal():
    query, key = torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    got, _ = lowmem_attention_forward(Layer(), query, key, key, None, softcap=2.0)
    scores = 2 * torch.tanh(query.double() @ key.double().mT * 8**-0.5 / 2)
    hidden = torch.ones(12, 12, dtype=torch.bool).triu(1)
    wanted = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ key.double()
    torch.testing.assert_close(got.double(), wanted.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_sinks_are_refused():
    query, key, value = states(1)
    with pytest.raises(ValueError, match="the attention 'lowmem' has no sinks, which a Layer needs"):
        lowmem_attention_forward(Layer(), query, key, value, None, s_aux=torch.zeros(4))


def test_gradients_are_computed_in_float32_where_16_bits_are_slow(monkeypatch):
    dtypes, own = [], attention_interface.sdpa_attention_forward
    monkeypatch.setattr(
        attention_interface,
        "sdpa_attention_forward",
        lambda *given, **more: dtypes.append([one.dtype for one in given[1:5]]) or own(*given, **more),
    )
    query, key, value = (one.detach() for one in states(20, torch.float16))
    key, value, mask = key + 0, value + 0, torch.zeros(20, 20, dtype=torch.float16)
    lowmem_attention_forward(Layer(), query, key, value, mask)
    got, _ = lowmem_attention_forward(Layer(), query.requires_grad_(), key, value, mask)
    assert dtypes == [[torch.float16] * 4, [torch.float32] * 4]
    assert got.dtype is torch.float16
    torch.testing.assert_close(got.double(), expected(query, key, value), rtol=1e-2, atol=1e-2)
