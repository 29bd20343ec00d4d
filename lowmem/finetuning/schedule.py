"""Learning rate schedules with warm-up and decay, for ``torch.optim.lr_scheduler.LambdaLR``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["DECAYS", "Schedule"]

DECAYS: dict[str, Callable[[float], float]] = {
    "none": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""Factor of the learning rate as a function of the completed share of the steps after the warm-up."""


@dataclass(frozen=True)
class Schedule:
    """The factor of the learning rate at a step; the first step is 0.

    It rises linearly, is 1 at step ``warmup``, and decays so that it would be 0 at step ``steps`` (but for "none").

    Args:
        steps: number of steps.
        warmup: number of steps at the beginning whose factor is below 1.
        decay: a key of ``DECAYS``.
    """

    steps: int
    warmup: int = 0
    decay: str = "cosine"

    def __call__(self, step: int) -> float:
        """Return the factor."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return DECAYS[self.decay](min(1.0, (step - self.warmup) / (self.steps - self.warmup)))
