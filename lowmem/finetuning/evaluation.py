"""The perplexity of a language model on held-out text."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from lowmem.finetuning.calling import evaluating, logits_of
from lowmem.finetuning.ranks import Ranks
from lowmem.finetuning.rows import Rows, check_rows
from lowmem.finetuning.text import IGNORED
from lowmem.transforms.registry import check_module

_CHUNK = 128
"""Tokens whose log-probabilities exist at once."""


def perplexity(model: nn.Module, rows: Rows, ranks: Ranks | None = None) -> float:
    """Return ``exp`` of the mean negative log-likelihood of the tokens that count: inf if it overflows.

    It is NaN if a loss is. One row is computed at a time; processes that train together share the rows.

    Args:
        model: is evaluated in eval mode; the modes of its modules are restored.
        rows: held-out text.
        ranks: the processes that train together; None if this process evaluates alone.

    Raises:
        TypeError: the model is no module, or the rows are no ``Rows``.
    """
    check_module(model)
    check_rows("rows", rows)
    ranks = ranks or Ranks()
    device = next(model.parameters()).device
    total = 0.0
    try:
        with evaluating(model):
            for start in range(0, len(rows), ranks.world):
                own = [index for index in (start + ranks.rank,) if index < len(rows)]
                batch = rows.batch(own, device)
                total += _negative_log_likelihood(logits_of(model(**batch.inputs)), batch.targets)
    finally:
        ranks.rest(model)
    mean = ranks.sum(total) / int(rows.counted.sum())
    return math.inf if mean >= 700 else math.exp(mean)


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Return the sum over the tokens that count, of logits (1, tokens, vocabulary)."""
    total = 0.0
    for part, own in zip(logits[0].split(_CHUNK), targets[0].split(_CHUNK), strict=True):
        total += float(functional.cross_entropy(part.float(), own, ignore_index=IGNORED, reduction="sum"))
    return total
