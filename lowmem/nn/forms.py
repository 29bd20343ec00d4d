"""How a parameter is stored: the frozen records that a stored tensor and its module keep of it."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["freeze"]


def freeze(tensor: Tensor) -> nn.Parameter:
    """Return a parameter without gradient: ``tensor`` itself if it is one, so that shared weights stay shared."""
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
        return tensor
    return nn.Parameter(tensor, requires_grad=False)
