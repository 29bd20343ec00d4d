"""The whole model of the parts that processes have, to be saved or used in one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed, nn

from lowmem.distributed.shard import check_group
from lowmem.nn.sharded import sharded_types
from lowmem.transforms.registry import check_module

__all__ = ["gather"]

_ENGINE = "torch.distributed.fsdp"


def gather(model: nn.Module) -> nn.Module | None:
    """Return a whole copy of a sharded model in rank 0, on the CPU, and None elsewhere; all processes must call it.

    Packed bytes are those that the model had before ``shard``. The sharded model stays as it is::

        whole = lowmem.gather(model)
        if whole is not None:
            lowmem.save_adapter(whole, "adapter.safetensors")

    Args:
        model: that ``shard``, or FSDP2's ``fully_shard``, has cut; not inside a step, between forward and backward.

    Raises:
        TypeError: the model is not a module.
        RuntimeError: no process group is initialized.
        ValueError: the model is not sharded.
    """
    check_module(model)
    check_group("gather")
    for module in model.modules():
        if _is_engine(module):
            module.reshard()  # type: ignore[operator]  # the root keeps its weights whole after a forward
    sharded = sharded_types()
    if not any(isinstance(one, sharded) for one in model.parameters()):
        raise ValueError(f"{type(model).__name__} is not sharded: each process has all of it, so take it as it is")
    main = distributed.get_rank() == 0
    known: dict[int, Any] = {}
    for parameter in model.parameters():
        one: Any = parameter
        whole: Any = one.detach()
        whole = whole.full_tensor() if isinstance(one, sharded) else whole.clone()
        if main:
            known[id(one)] = nn.Parameter(whole.cpu(), requires_grad=one.requires_grad)
    if not main:
        return None
    with _without_engine(model):
        copied = copy.deepcopy(model, known)
    return copied.cpu()


def _is_engine(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


@contextmanager
def _without_engine(model: nn.Module) -> Iterator[None]:
    """Take FSDP2's classes, states and hooks, which cannot be copied, off a model for the time of the context."""
    before = [(module, module.__class__, module.__dict__) for module in model.modules()]
    try:
        for module, kind, own in before:
            if _is_engine(module):
                module.__class__ = kind.__mro__[2]  # [FSDPBlock, FSDPModule, Block, ...]
            object.__setattr__(
                module, "__dict__", {name: _kept(name, value) for name, value in own.items() if _is_own(name)}
            )
        yield
    finally:
        for module, kind, own in before:
            object.__setattr__(module, "__dict__", own)
            module.__class__ = kind


def _is_own(name: str) -> bool:
    return not name.startswith(("__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params"))


def _kept(name: str, value: Any) -> Any:
    """Return a dictionary of hooks without the engine's, or any other attribute as it is."""
    if not name.endswith("_hooks") or not isinstance(value, dict):
        return value
    copied = copy.copy(value)
    for key, hook in value.items():
        if str(getattr(hook, "__module__", "")).startswith(_ENGINE):
            del copied[key]
    return copied
