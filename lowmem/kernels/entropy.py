"""The cross entropy of rows of logits and its gradient, by the backend of a tensor; and the definition.

    loss = -(1 - e) log p[target] - e mean(log p),    d loss / d logits = p - (1 - e) onehot - e / vocabulary

for p the softmax of a row and e the label smoothing. Everything is computed in float32 (float64 for such logits) and
rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.quant.backend import backend_of

__all__ = ["entropies", "entropies_in_torch"]

_ROWS = 16
"""Rows whose probabilities are computed at a time in float32: few enough to stay in a processor's cache."""


def entropies(logits: Tensor, targets: Tensor, smoothing: float, gradient: bool) -> Tensor:
    """Return the losses of rows, (rows,), in float32 or wider; the logits are lost.

    Args:
        logits: floating point (rows, vocabulary), contiguous; replaced by the gradient of each row's loss.
        targets: int64 (rows,), each from 0 to vocabulary - 1, which is not checked.
        smoothing: how much of each target is spread over the vocabulary, in [0, 1].
        gradient: whether to compute the gradient.
    """
    return backend_of(logits).entropies(logits, targets, smoothing, gradient)


def entropies_in_torch(logits: Tensor, targets: Tensor, smoothing: float, gradient: bool) -> Tensor:
    """Compute ``entropies``, by definition."""
    parts = zip(logits.split(_ROWS), targets.unsqueeze(1).split(_ROWS), strict=True)
    losses = [_of_few(part, target, smoothing, gradient) for part, target in parts]
    return (
        torch.cat(losses) if losses else logits.new_empty(0, dtype=torch.promote_types(logits.dtype, torch.float32))
    )


def _of_few(logits: Tensor, targets: Tensor, smoothing: float, gradient: bool) -> Tensor:
    logs = torch.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))  # (rows, vocabulary)
    spread = smoothing / logits.shape[1]
    losses = (smoothing - 1) * logs.gather(1, targets).squeeze(1)
    if smoothing:
        losses -= spread * logs.sum(1)
    if gradient:
        errors = logs.exp_()
        errors.scatter_add_(1, targets, errors.new_full(targets.shape, smoothing - 1))
        logits.copy_(errors.sub_(spread) if smoothing else errors)
    return losses
