"""What a training loop needs of the processes that train together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn

__all__ = ["Alone", "Ranks"]


class Ranks(Protocol):
    """One of the processes that train together.

    Attributes:
        rank: its number.
        world: how many there are.
        gradient_scale: what a process multiplies its part of the mean loss with: ``world`` where the gradients of the
            processes are averaged.
    """

    @property
    def rank(self) -> int: ...  # noqa: D102

    @property
    def world(self) -> int: ...  # noqa: D102

    @property
    def gradient_scale(self) -> float: ...  # noqa: D102

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a model that trains together with those of the other processes."""

    def whole(self, model: nn.Module) -> nn.Module | None:
        """Return the model, whole, of one that was wrapped; None: it is in rank 0."""

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Return the context of forward and backward of a batch, the ``last`` one of a step or not."""

    def clip(self, parameters: Iterable[Tensor], most: float | None) -> float:
        """Return the norm of all gradients, which are scaled down to a norm of at most ``most``."""

    def sum(self, value: float) -> float:
        """Return the sum of a value over the processes."""

    def rest(self, model: nn.Module) -> None:
        """Let go of what a forward without backward has gathered."""


class Alone:
    """One process that trains by itself."""

    rank = 0
    world = 1
    gradient_scale = 1.0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model."""
        return model

    def whole(self, model: nn.Module) -> nn.Module | None:
        """Return the model."""
        return model

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Return a context that does nothing."""
        return nullcontext()

    def clip(self, parameters: Iterable[Tensor], most: float | None) -> float:
        """Return the norm of all gradients, which are scaled down to a norm of at most ``most``."""
        return float(nn.utils.clip_grad_norm_(parameters, math.inf if most is None else most))

    def sum(self, value: float) -> float:
        """Return the value."""
        return value

    def rest(self, model: nn.Module) -> None:
        """Do nothing."""
