"""The hyperparameters of fine-tuning, and the learning rates that they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowmem.errors import short_repr
from lowmem.training.step_memory import NAMED_OPTIMIZERS

DECAYS: dict[str, Callable[[float], float]] = {
    "none": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""Factor of the learning rate as a function of the completed share of the steps after the warm-up."""

OPTIMIZERS = {name: make for name, make in NAMED_OPTIMIZERS.items() if name != "sgd"}
"""The optimizers of ``finetune``: those whose memory is known by name, but for SGD, which couples weight decay.

The loop calls one with ``(parameters, lr=, weight_decay=)``, and a dry run with the parameters alone. Before each
step it sets the learning rate of ``param_groups[0]``. A saved state holds what is in ``state[parameter]``: tensors,
and numbers that JSON can hold, under names without dots.
"""

# AdamW computes lr / (1 - 0.9) in its first step; 0.09 instead of 0.1 leaves a margin for rounding.
LARGEST_LR = 0.09 * torch.finfo(torch.float32).max

MAX_REPEATED_ROWS = 1024
"""A step may have this many rows even if the data has fewer, which are then repeated within the step."""


@dataclass(frozen=True)
class FineTuning:
    """Settings of ``finetune``.

    Args:
        steps: number of updates; None makes as many as ``epochs`` need.
        epochs: passes over the rows; None makes one, unless ``steps`` is given.
        batch_size: rows that each process computes at a time.
        accumulate: batches per step and process. The gradient is that of one batch of all their rows, in which each
            token that counts has the same weight.
        lr: peak learning rate.
        warmup: steps over which the learning rate rises.
        decay: of the learning rate after the warm-up: "cosine", "linear", or "none".
        clip: gradients are scaled down to at most this norm; None leaves them as they are.
        weight_decay: decoupled weight decay.
        seed: of the order of rows, and of dropout.
        eval_every: steps between evaluations; None evaluates only at the end.
        patience: stop after this many evaluations that are not better than the best one, and keep the best weights;
            None never stops early.
        save_every: steps between saved states.
        warmup_ratio: share of the steps over which the learning rate rises, in place of ``warmup``.
        optimizer: "adamw", or "adamw8bit", whose moments take 8 bits (``AdamW8bit``).

    Raises:
        ValueError: a value out of its range.
    """

    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 4
    accumulate: int = 1
    lr: float = 2e-4
    warmup: int = 0
    decay: str = "cosine"
    clip: float | None = 1.0
    weight_decay: float = 0.0
    seed: int = 0
    eval_every: int | None = None
    patience: int | None = None
    save_every: int = 50
    warmup_ratio: float | None = None
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "batch_size", "accumulate", "eval_every", "patience", "save_every"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 1):
                raise ValueError(f"{name}={short_repr(value)} must be a number of at least 1")
        for name in ("warmup", "seed"):
            value = getattr(self, name)
            if not (type(value) is int and 0 <= value < 2**63):
                raise ValueError(f"{name}={short_repr(value)} must be a number from 0 to 2**63 - 1")
        for name, least in (("lr", True), ("clip", True), ("weight_decay", False), ("warmup_ratio", False)):
            value = getattr(self, name)
            if name in ("clip", "warmup_ratio") and value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (least and value == 0):
                raise ValueError(
                    f"{name}={short_repr(value)} must be a number {'above' if least else 'of at least'} 0"
                )
        if self.lr > LARGEST_LR:
            raise ValueError(
                f"lr={self.lr:g} is above {LARGEST_LR:.1e}, where AdamW's first step overflows float32: lower it"
            )
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs} say both when to end: leave one out")
        if self.warmup_ratio is not None and (self.warmup or self.warmup_ratio >= 1):
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio:g} must be below 1, and warmup={self.warmup} must be 0 beside it"
            )
        if self.decay not in DECAYS:
            raise ValueError(f"decay={short_repr(self.decay)} is none of {', '.join(DECAYS)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={short_repr(self.optimizer)} is none of {', '.join(OPTIMIZERS)}")
        if self.patience is not None and self.eval_every is None:
            raise ValueError(f"patience={self.patience} counts evaluations: set eval_every (--eval-every), too")

    def total_rows(self, row_count: int, world: int = 1) -> int:
        """Return the rows of all steps together, for a data set of ``row_count`` rows.

        Raises:
            ValueError: the warm-up is as long as all steps, or ``steps`` is given and a step has more rows than the
                data and than ``MAX_REPEATED_ROWS``.
        """
        per_step = self.batch_size * self.accumulate * world
        if self.steps is not None and per_step > max(row_count, MAX_REPEATED_ROWS):
            raise ValueError(
                f"batch_size={self.batch_size} and accumulate={self.accumulate} make steps of {per_step} rows, and "
                f"there are {row_count} rows of text, which would repeat in each: lower them"
            )
        total = self.steps * per_step if self.steps is not None else (self.epochs or 1) * row_count
        steps = -(-total // per_step)
        if self.warmup >= steps:
            raise ValueError(f"warmup={self.warmup} must be below the {steps} steps that there are")
        return total

    def lr_at(self, step: int, total_steps: int) -> float:
        """Return the learning rate of a step, from 0 to ``total_steps - 1``.

        It rises linearly, is ``lr`` after the warm-up, and decays so that it would be 0 at step ``total_steps`` (but
        for "none").
        """
        warmup = self.warmup
        if self.warmup_ratio is not None:
            warmup = min(round(self.warmup_ratio * total_steps), total_steps - 1)
        if step < warmup:
            return self.lr * ((step + 1) / (warmup + 1))
        return self.lr * DECAYS[self.decay](min(1.0, (step - warmup) / (total_steps - warmup)))
