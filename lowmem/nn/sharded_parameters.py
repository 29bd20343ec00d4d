"""Sharded parameters: DTensors, as FSDP2 and tensor parallelism make them."""

from __future__ import annotations

import sys

from torch import nn


def imported_dtensor_types() -> tuple[type, ...]:
    """Return the classes of sharded parameters; () if their module was not imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else (module.DTensor,)


def is_fsdp2_module(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called with a module, whose weights FSDP2 gathers before its forward."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
