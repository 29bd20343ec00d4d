"""What the guide's table of caches says: its rows, their bytes, and how it is computed what a cache loses."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks import caches
from lowmem.nn.cached_keys_and_values import cache_capacity_rows

PAGE = Path(__file__).parents[2] / "docs/guides/use-what-you-trained.md"
LAYERS, HEADS, WIDTH = 30, 3, 64  # of SmolLM2


def test_the_table_has_the_caches_and_their_bytes():
    text = PAGE.read_text(encoding="utf8").partition("| Cache |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert [row[0] for row in rows] == list(caches.CACHES)
    states = 2 * LAYERS * HEADS
    sizes = [
        caches.TOKENS * 4 * WIDTH,
        cache_capacity_rows(caches.TOKENS) * 4 * WIDTH,
        cache_capacity_rows(caches.TOKENS) * (WIDTH + 4),
    ]
    assert [row[1] for row in rows[:3]] == [f"{states * size / 2**20:.1f}" for size in sizes]


def test_losses_are_the_divergence_the_perplexity_and_the_likeliest_token():
    generator = torch.Generator().manual_seed(0)
    exact, noise = torch.randn(2, 200, 11, generator=generator, dtype=torch.float64)
    logits, targets = exact + 0.3 * noise, torch.randint(11, (200,), generator=generator)
    found = caches.kept(logits, exact, targets, 7)
    p, q = exact.softmax(-1), logits.softmax(-1)
    assert found.nbytes == 7
    assert math.isclose(found.divergence, float((p * (p / q).log()).sum(-1).mean()))
    assert math.isclose(found.perplexity, float(functional.cross_entropy(logits, targets).exp()))
    assert found.same == float((p.argmax(-1) == q.argmax(-1)).double().mean()) < 1


def test_the_bytes_of_a_cache_are_those_of_its_storages():
    pytest.importorskip("transformers")
    from tests.integrations.transformers.test_key_value_cache import CONFIGS

    for make, rows in ((caches.dynamic, 100), (caches.own(), cache_capacity_rows(100))):
        cache = make(CONFIGS["llama"])
        for layer in range(2):
            cache.update(*torch.zeros(2, 3, 2, 100, 16), layer)
        assert caches.bytes_of(cache) == 2 * 2 * 3 * 2 * rows * 16 * 4  # layers, keys and values, sequences, heads
