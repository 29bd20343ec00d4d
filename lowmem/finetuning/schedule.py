"""The learning rate over the steps: warm-up, and decay. For ``torch.optim.lr_scheduler.LambdaLR``."""

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
"""What is left of the learning rate, by the share of the steps after the warm-up that is done."""


@dataclass(frozen=True)
class Schedule:
    """The factor of the learning rate at a step, which counts from 0.

    It rises in equal parts to 1, which it has after ``warmup`` steps, and decays towards 0 after the last step.

    Args:
        steps: how many there are.
        warmup: how many of them have a factor below 1 at the beginning.
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
