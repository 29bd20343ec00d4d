"""Text that a causal language model generates itself, to calibrate it without data: LLM-QAT, arXiv 2305.17888."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import describe, show
from lowmem.transforms.calibration.runs import evaluation_mode

SEQUENCES = 32
TOKENS = 128
"""Of a sequence, if the model takes as many: 4096 tokens in all."""

_NOT_FINITE = "what it predicts of a text is NaN or infinite"

_COLDEST = torch.finfo(torch.float32).tiny  # the temperature below which 0 / temperature could be NaN in float32

LEAST_SHARE = 0.5
"""Of the tokens that a model knows, those that its tokenizer makes: models pad their vocabularies by some percent."""


def generated_batches(model: nn.Module, tokenizer: Any, seed: int, temperature: float) -> list[Tensor]:
    """Return text of a causal language model, sampled from all that it predicts: tokens int64 (batch, tokens).

    Each text begins with what the tokenizer puts before any, and a token that is drawn evenly. It goes on behind the
    end of a document. The same arguments give the same text on one machine.

    Args:
        model: called with tokens (batch, tokens), it returns logits (batch, tokens, vocabulary) or has them as
            ``logits``. One of transformers keeps what it has computed of a text.
        tokenizer: of the model; ``len`` is the number of its tokens.
        seed: of the draws.
        temperature: above 0; by which logits are divided.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={show(seed)} must be an integer")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed} must be below 2^63, and at least -2^63")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature={show(temperature)} must be a number")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature!r} must be finite and above 0; 1 draws what the model predicts")
    if not hasattr(tokenizer, "__len__"):
        raise TypeError(
            f"tokenizer={show(tokenizer)} must be the model's, as AutoTokenizer.from_pretrained returns it: "
            'batches="self" needs to know the vocabulary'
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    with evaluation_mode(model):
        _check(model, tokenizer)
        first = torch.randint(len(tokenizer), (SEQUENCES, 1), generator=generator, dtype=torch.int64, device="cpu")
        start = [torch.full_like(first, token) for token in _prefix(tokenizer)]
        tokens = torch.cat([*start, first], dim=1).to(_device(model))  # (sequences, 1 or 2)
        past, cache = None, _cache_argument(model)
        while tokens.shape[1] < min(TOKENS, _positions(model)):
            more = {} if cache is None else {"use_cache": True, cache: past}
            try:
                out: Any = model(tokens if past is None else tokens[:, -1:], **more)
            except Exception as error:
                told = f"{type(model).__name__} fails at a text of {tokens.shape[1]} tokens ({describe(error)})"
                raise ValueError(f"{told}: pass batches of its inputs, as long as it takes them") from error
            if cache is not None:
                past = getattr(out, cache, None)  # None: it has kept nothing, and gets all tokens again
            logits = _logits(model, out)[:, -1, : len(tokenizer)].float().cpu()
            logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, _COLDEST)  # the largest stays 0
            shares = logits.softmax(-1).double().cumsum(-1)  # multinomial draws a number for each token: slow
            if not shares[:, -1].isfinite().all():
                raise ValueError(_cannot(model, _NOT_FINITE))
            points = torch.rand(first.shape, generator=generator, dtype=shares.dtype, device="cpu") * shares[:, -1:]
            drawn = torch.searchsorted(shares, points, right=True)  # (sequences, 1)
            tokens = torch.cat([tokens, drawn.to(tokens.device)], dim=1)
    return list(tokens.split(SEQUENCES // 4))


def _check(model: nn.Module, tokenizer: Any) -> None:
    """Raise a ValueError unless a model predicts tokens of a tokenizer from those before them alone."""
    can: Any = getattr(model, "can_generate", None)
    if callable(can) and not can():
        raise ValueError(_cannot(model, "its class has no generate()"))
    probe = torch.tensor([[0, 1]], dtype=torch.int64, device=_device(model))
    try:
        outputs = [model(tokens) for tokens in (probe[:, :1], probe)]
    except Exception as error:
        raise ValueError(_cannot(model, f"called with tokens, it fails: {describe(error)}")) from error
    one, two = (_logits(model, out) for out in outputs)
    size, vocabulary = len(tokenizer), two.shape[-1]
    if not LEAST_SHARE * vocabulary <= size <= vocabulary:
        raise ValueError(
            f"the tokenizer has {size} tokens, and {type(model).__name__} predicts {vocabulary}: they are not of one "
            "vocabulary; pass the model's own tokenizer"
        )
    if not two.isfinite().all():
        raise ValueError(_cannot(model, _NOT_FINITE))
    if (one[:, 0] - two[:, 0]).abs().max() > 1e-2 * two.abs().max():
        raise ValueError(_cannot(model, "what it predicts depends on the tokens to come"))


def _cache_argument(model: Any) -> str | None:
    """Return the argument by which a model of transformers gets what it has computed of a text; None: it has none."""
    if not callable(getattr(model, "generate", None)):
        return None
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in known), None)  # renamed in transformers 5


def _positions(model: Any) -> int:
    """Return how many tokens a model of transformers takes, as its config says."""
    config = getattr(model, "config", None)
    return getattr(config, "max_position_embeddings", None) or TOKENS


def _prefix(tokenizer: Any) -> list[int]:
    """Return what a tokenizer puts before each text: the token that begins one, or nothing."""
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is None or not callable(tokenizer):
        return []
    return [begin] if list(tokenizer("")["input_ids"])[:1] == [begin] else []


def _logits(model: nn.Module, out: Any) -> Tensor:
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
        raise ValueError(_cannot(model, "it returns no logits (batch, tokens, vocabulary)"))
    return logits


def _cannot(model: nn.Module, why: str) -> str:
    return (
        f'{type(model).__name__} generates no text ({why}), so that batches="self" has none: pass batches of its '
        "inputs"
    )


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
