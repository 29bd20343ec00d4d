"""What the training loop needs from a group of processes that train together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn


class TrainingProcessGroup:
    """One process that trains by itself. Subclasses are one of several processes that train together.

    Attributes:
        rank: of this process.
        world: number of processes.
        gradient_scale: factor of a process's part of the mean loss before backward: ``world`` if gradients are
            averaged over the processes, so that the average is the gradient of the mean loss.
    """

    rank = 0
    world = 1
    gradient_scale = 1.0

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """Wrap a model so that it trains together with those of the other processes."""
        return model

    def full_model_on_rank_zero(self, model: nn.Module) -> nn.Module | None:
        """Return the unwrapped model with whole parameters in rank 0; None in other ranks."""
        return model

    def gradient_sync_on_last_batch(self, model: nn.Module, is_last: bool) -> AbstractContextManager[object]:
        """Return the context of a batch's forward and backward; ``is_last``: whether it is the step's last batch."""
        return nullcontext()

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float | None) -> float:
        """Scale the gradients down to a common norm of at most ``max_norm`` (None: any); return the norm before."""
        norm: Any = nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
        # FSDP2's norm is sharded
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def all_reduce_sum(self, value: float) -> float:
        """Return the sum of a value over the processes: the same number in each."""
        return value

    def free_gathered_parameters(self, model: nn.Module) -> None:
        """Free parameters that a forward without backward has gathered."""
