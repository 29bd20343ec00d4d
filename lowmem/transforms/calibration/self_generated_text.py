"""Text that a causal language model generates itself, to calibrate it without data: LLM-QAT, arXiv 2305.17888."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import error_type_and_first_line, short_repr
from lowmem.transforms.calibration.model_runs import evaluation_without_gradients, linear_layers_in_fast_dtype

TOKENS = 128
"""Of a text, if the model takes as many."""

ROWS_PER_BATCH = 8

_NOT_FINITE = "what it predicts of a text is NaN or infinite"

# The temperature below which 0 / temperature could be NaN in float32
_COLDEST = torch.finfo(torch.float32).tiny

# Of the tokens that a model knows, those that its tokenizer makes: models pad their vocabularies by some percent
_LEAST_SHARE = 0.5


def are_of_one_vocabulary(tokenizer_size: int, model_size: int) -> bool:
    """Whether a tokenizer of so many tokens can be that of a model that knows so many."""
    return _LEAST_SHARE * model_size <= tokenizer_size <= model_size


def check_seed(seed: object) -> None:
    """Raise a TypeError or ValueError unless a generator of torch takes ``seed``."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={short_repr(seed)} must be an integer")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed} must be below 2^63, and at least -2^63")


def check_token_count(tokens: object) -> None:
    """Raise a TypeError or ValueError unless ``tokens`` is an integer above 0."""
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"tokens={short_repr(tokens)} must be an integer")
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be a whole number above 0; 4096 suit most models")


def self_generated_token_batches(
    model: nn.Module, tokenizer: Any, seed: int, temperature: float, tokens: int = 4096
) -> list[Tensor]:
    """Return text of a causal language model, sampled from all that it predicts: tokens int64 (batch, tokens).

    Each text begins with what the tokenizer puts before any, and a token that is drawn evenly. It goes on behind the
    end of a document. The same arguments give the same text on one machine.

    Args:
        model: called with tokens (batch, tokens), it returns logits (batch, tokens, vocabulary) or has them as
            ``logits``. One of transformers keeps what it has computed of a text.
        tokenizer: of the model; ``len`` is the number of its tokens.
        seed: of the draws.
        temperature: above 0; by which logits are divided.
        tokens: how many texts there are, of 128 tokens each; those of a model that takes fewer are shorter.
    """
    check_seed(seed)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature={short_repr(temperature)} must be a number")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature!r} must be finite and above 0; 1 draws what the model predicts")
    if not hasattr(tokenizer, "__len__"):
        raise TypeError(
            f"tokenizer={short_repr(tokenizer)} must be the model's, as AutoTokenizer.from_pretrained returns it: "
            'batches="self" needs to know the vocabulary'
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    with linear_layers_in_fast_dtype(model), evaluation_without_gradients(model):
        _check_causal_language_model(model, tokenizer)
        texts = -(-tokens // TOKENS)
        first = torch.randint(len(tokenizer), (texts, 1), generator=generator, dtype=torch.int64, device="cpu")
        start = [torch.full_like(first, token) for token in _prepended_bos_token_ids(tokenizer)]
        ids = torch.cat([*start, first], dim=1).to(first_parameter_device_or_cpu(model))  # (texts, 1 or 2)
        past, cache = None, _cache_argument_name_or_none(model)
        while ids.shape[1] < capped_positions(model, TOKENS):
            more = {} if cache is None else {"use_cache": True, cache: past}
            try:
                out: Any = model(ids if past is None else ids[:, -1:], **more)
            except Exception as error:
                reason = error_type_and_first_line(error)
                failure_text = f"{type(model).__name__} fails at a text of {ids.shape[1]} tokens ({reason})"
                raise ValueError(f"{failure_text}: pass batches of its inputs, as long as it takes them") from error
            if cache is not None:
                # None: it has kept nothing, and gets all tokens again
                past = getattr(out, cache, None)
            logits = _checked_logits(model, out)[:, -1, : len(tokenizer)].float().cpu()
            # The largest stays 0
            logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, _COLDEST)
            # Multinomial draws a number for each token: slow
            shares = logits.softmax(-1).double().cumsum(-1)
            if not shares[:, -1].isfinite().all():
                raise ValueError(_cannot_generate_message(model, _NOT_FINITE))
            points = torch.rand(first.shape, generator=generator, dtype=shares.dtype, device="cpu") * shares[:, -1:]
            drawn = torch.searchsorted(shares, points, right=True)  # (texts, 1)
            ids = torch.cat([ids, drawn.to(ids.device)], dim=1)
    return list(ids.split(ROWS_PER_BATCH))


def _check_causal_language_model(model: nn.Module, tokenizer: Any) -> None:
    """Raise a ValueError unless a model predicts tokens of a tokenizer from those before them alone."""
    can: Any = getattr(model, "can_generate", None)
    if callable(can) and not can():
        raise ValueError(_cannot_generate_message(model, "its class has no generate()"))
    probe = torch.tensor([[0, 1]], dtype=torch.int64, device=first_parameter_device_or_cpu(model))
    try:
        outputs = [model(tokens) for tokens in (probe[:, :1], probe)]
    except Exception as error:
        raise ValueError(
            _cannot_generate_message(model, f"called with tokens, it fails: {error_type_and_first_line(error)}")
        ) from error
    prefix_logits, full_logits = (_checked_logits(model, out) for out in outputs)
    size, vocabulary = len(tokenizer), full_logits.shape[-1]
    if not are_of_one_vocabulary(size, vocabulary):
        raise ValueError(
            f"the tokenizer has {size} tokens, and {type(model).__name__} predicts {vocabulary}: they are not of one "
            "vocabulary; pass the model's own tokenizer"
        )
    if not full_logits.isfinite().all():
        raise ValueError(_cannot_generate_message(model, _NOT_FINITE))
    if (prefix_logits[:, 0] - full_logits[:, 0]).abs().max() > 1e-2 * full_logits.abs().max():
        raise ValueError(_cannot_generate_message(model, "what it predicts depends on the tokens to come"))


def _cache_argument_name_or_none(model: Any) -> str | None:
    """Return the argument by which a model of transformers gets what it has computed of a text; None: it has none."""
    if not callable(getattr(model, "generate", None)):
        return None
    known = inspect.signature(model.forward).parameters
    # Renamed in transformers 5
    return next((name for name in ("cache", "past_key_values") if name in known), None)


def capped_positions(model: Any, most: int) -> int:
    """Return ``most``, or how many tokens a model of transformers takes by its config, if these are fewer."""
    return min(most, getattr(getattr(model, "config", None), "max_position_embeddings", None) or most)


def _prepended_bos_token_ids(tokenizer: Any) -> list[int]:
    """Return what a tokenizer puts before each text: the token that begins one, or nothing."""
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is None or not callable(tokenizer):
        return []
    return [begin] if list(tokenizer("")["input_ids"])[:1] == [begin] else []


def _checked_logits(model: nn.Module, output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
        raise ValueError(_cannot_generate_message(model, "it returns no logits (batch, tokens, vocabulary)"))
    return logits


def _cannot_generate_message(model: nn.Module, reason: str) -> str:
    return (
        f'{type(model).__name__} generates no text ({reason}), so that batches="self" has none: pass batches of its '
        "inputs"
    )


def first_parameter_device_or_cpu(model: nn.Module) -> torch.device:
    """Return where a model's tokens go."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
