"""Sample inputs: what a batch may be, and how a model is called with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["check_batch", "run_batch"]


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch, and return its output.

    Raises:
        TypeError: a batch of another type than ``check_batch`` takes.
    """
    check_batch(batch)
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def check_batch(batch: Any) -> None:
    """Raise unless a batch is a Tensor, a tuple or list of a model's arguments, or a mapping of keyword arguments.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(batch, Tensor | Mapping | tuple | list):
        raise TypeError(
            f"a batch is a {type(batch).__name__}; it must be a Tensor, a tuple or list of the model's arguments, or "
            "a mapping of its keyword arguments"
        )
