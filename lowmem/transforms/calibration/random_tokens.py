"""Random token ids, to calibrate a model without text: their second moments are those of its embeddings, whatever it
reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import error_type_and_first_line, short_repr
from lowmem.transforms.calibration.model_runs import evaluation_without_gradients
from lowmem.transforms.calibration.self_generated_text import (
    ROWS_PER_BATCH,
    are_of_one_vocabulary,
    capped_positions,
    check_seed,
    first_parameter_device_or_cpu,
)

# Tokens of a row, if the model takes as many
_ROW = 256


def random_token_batches(model: nn.Module, tokenizer: Any, seed: int, tokens: int) -> list[Tensor]:
    """Return token ids, drawn evenly from a model's vocabulary without special tokens: int64 (batch, row).

    Args:
        model: called with tokens (batch, row); it has an embedding of tokens, as ``get_input_embeddings()`` or its
            largest ``nn.Embedding``.
        tokenizer: of the model. None: all rows of the embedding are tokens, and special tokens are those that the
            model's config names.
        seed: of the draws.
        tokens: how many at least.
    """
    check_seed(seed)
    special = _special_token_ids(model, tokenizer)
    size = _embedding_rows(model)
    if tokenizer is not None:
        if not hasattr(tokenizer, "__len__"):
            raise TypeError(
                f"tokenizer={short_repr(tokenizer)} must be the model's, as AutoTokenizer returns it, "
                "its length is the vocabulary; or None"
            )
        if not are_of_one_vocabulary(len(tokenizer), size):
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, and the embedding of {type(model).__name__} has {size}: "
                "they are not of one vocabulary; pass the model's own tokenizer"
            )
        size = len(tokenizer)
    allowed = torch.tensor([token for token in range(size) if token not in special], dtype=torch.int64, device="cpu")
    if not len(allowed):
        raise ValueError(f"all {size} tokens are special, so that none is left to draw: pass batches of its inputs")
    row = min(tokens, capped_positions(model, _ROW))
    generator = torch.Generator("cpu").manual_seed(seed)
    places = torch.randint(
        len(allowed), (-(-tokens // row), row), generator=generator, dtype=torch.int64, device="cpu"
    )
    ids = allowed[places].to(first_parameter_device_or_cpu(model))
    with evaluation_without_gradients(model):
        try:
            model(ids[:1])
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} fails with random tokens ({error_type_and_first_line(error)}): pass batches "
                "of its inputs"
            ) from error
    return list(ids.split(ROWS_PER_BATCH))


def _embedding_rows(model: nn.Module) -> int:
    """Return how many tokens a model's input embedding has."""
    inputs: Any = getattr(model, "get_input_embeddings", None)
    embedding = inputs() if callable(inputs) else None
    if isinstance(embedding, nn.Embedding):
        return embedding.num_embeddings
    rows = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if not rows:
        raise ValueError(
            f'{type(model).__name__} has no embedding of tokens, so that batches="random" has no vocabulary: pass '
            "batches of its inputs"
        )
    return max(rows)


def _special_token_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    if tokenizer is not None:
        return set(getattr(tokenizer, "all_special_ids", ()))
    config = getattr(model, "config", None)
    named = [getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")]
    return {
        token for ids in named for token in (ids if isinstance(ids, list | tuple) else [ids]) if token is not None
    }
