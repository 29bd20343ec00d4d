"""Keys and values of 1,000 tokens of an answer: their bytes, and the peaks of keeping them and of the last token."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import lowmem
from lowmem.measure import peak_bytes

PROMPT, TOKENS, WINDOW = 744, 1000, 256


@pytest.mark.parametrize("window", [None, WINDOW], ids=["all", "window"])
@pytest.mark.parametrize("bits", [None, 8], ids=["exact", "8bit"])
def test_cache(memory_gate, bits, window):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 9, 1, 64, generator=generator)
    states = torch.randn(2, 1, 3, TOKENS, 64, generator=generator)

    def kept():
        """Return keys and values of all tokens but the last."""
        caches = lowmem.CachedStates(bits, window), lowmem.CachedStates(bits, window)
        for cache, whole in zip(caches, states, strict=True):
            for part in whole[:, :, :-1].split([PROMPT] + [1] * (TOKENS - PROMPT - 1), 2):
                cache.append(part)
        return caches

    def step(caches):
        return lowmem.scaled_dot_product_attention(
            query,
            *(cache.append(whole[:, :, -1:]) for cache, whole in zip(caches, states, strict=True)),
            enable_gqa=True,
        )

    def figures():
        made = []
        peak = peak_bytes(lambda: made.extend(kept()))
        return {"peak_bytes": peak, "step_bytes": peak_bytes(lambda: step(made)), "stored_bytes": made[0].nbytes * 2}

    memory_gate.counted(figures)
    exact = (whole[:, :, -(window or TOKENS) :] for whole in states)
    expected = scaled_dot_product_attention(query, *exact, enable_gqa=True)
    torch.testing.assert_close(step(kept()), expected, rtol=0.05, atol=0.01)
