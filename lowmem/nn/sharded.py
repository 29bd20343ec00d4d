"""Parameters of which this process has a part: DTensors, as FSDP2 and tensor parallelism make them."""

from __future__ import annotations

import sys

__all__ = ["sharded_types"]


def sharded_types() -> tuple[type, ...]:
    """Return the types of parameters of which this process has a part, without importing them."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else (module.DTensor,)
