"""Sharded parameters: DTensors, as FSDP2 and tensor parallelism make them."""

from __future__ import annotations

import sys

__all__ = ["sharded_types"]

# torch 2.4 has DTensor in the second one; its ``torch.distributed.tensor`` holds tensor parallelism alone.
_MODULES = ("torch.distributed.tensor", "torch.distributed._tensor")


def sharded_types() -> tuple[type, ...]:
    """Return the classes of sharded parameters; () if no module that has one was imported."""
    for name in _MODULES:
        if found := getattr(sys.modules.get(name), "DTensor", None):
            return (found,)
    return ()
