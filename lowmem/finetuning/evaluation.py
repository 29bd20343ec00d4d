"""The perplexity of a language model on held-out text."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from lowmem.finetuning.calling_convention import eval_mode_without_grad, logits_from_output
from lowmem.finetuning.packed_rows import Rows, check_rows_type
from lowmem.finetuning.process_group import TrainingProcessGroup
from lowmem.finetuning.text_examples import IGNORED
from lowmem.transforms.module_registry import check_is_module

_CHUNK = 128
"""Tokens whose log-probabilities exist at once."""


def perplexity(model: nn.Module, rows: Rows, ranks: TrainingProcessGroup | None = None) -> float:
    """Return ``exp`` of the mean negative log-likelihood of the tokens that count: inf if it overflows.

    It is NaN if a loss is. One row is computed at a time; processes that train together share the rows.

    Args:
        model: is evaluated in eval mode; the modes of its modules are restored.
        rows: held-out text.
        ranks: the processes that train together; None if this process evaluates alone.

    Raises:
        TypeError: the model is no module, or the rows are no ``Rows``.
    """
    check_is_module(model)
    check_rows_type("rows", rows)
    ranks = ranks or TrainingProcessGroup()
    device = next(model.parameters()).device
    total = 0.0
    try:
        with eval_mode_without_grad(model):
            for start in range(0, len(rows), ranks.world):
                row_indices = [index for index in (start + ranks.rank,) if index < len(rows)]
                batch = rows.batch(row_indices, device)
                total += summed_negative_log_likelihood(logits_from_output(model(**batch.inputs)), batch.targets)
    finally:
        ranks.free_gathered_parameters(model)
    mean = ranks.all_reduce_sum(total) / int(rows.counted.sum())
    return math.inf if mean >= 700 else math.exp(mean)


def summed_negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Return the sum over the tokens that count, of logits (1, tokens, vocabulary)."""
    total = 0.0
    for logits_chunk, target_chunk in zip(logits[0].split(_CHUNK), targets[0].split(_CHUNK), strict=True):
        total += float(
            functional.cross_entropy(logits_chunk.float(), target_chunk, ignore_index=IGNORED, reduction="sum")
        )
    return total
