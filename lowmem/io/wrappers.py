"""Models that a wrapper for several devices holds: files name their layers without it."""

from __future__ import annotations

from torch import nn

__all__ = ["unwrap"]

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel or DataParallel, whose paths lack ``module.``; or the model."""
    while isinstance(model, _WRAPPERS):
        model = model.module
    return model
