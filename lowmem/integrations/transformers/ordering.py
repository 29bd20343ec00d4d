"""Puts a dense parameter first in a converted model, for programs that ask the first one for the model's dtype.

sentence-transformers is one of them: it reads ``next(model.parameters()).dtype``, which of a stored parameter is the
dtype of its codes.
"""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowmem.integrations.transformers.saving import presented_dtype

__all__ = ["put_dense_first"]


def put_dense_first(model: nn.Module) -> None:
    """Order the children of modules, so that the first parameter of each model of transformers has the model's dtype.

    Names stay. So does the order where no dense parameter has that dtype, or where code depends on the order.
    """
    if isinstance(model, PreTrainedModel):
        dtype = presented_dtype(model)
        first = next(model.parameters(), None)
        if dtype is not None and first is not None and first.dtype is not dtype:
            _put_first(model, dtype)
        return
    for child in model.children():
        put_dense_first(child)


def _put_first(module: nn.Module, dtype: torch.dtype) -> bool:
    """Let the first parameter of a module have a dtype, if it has a dense one; return whether it does now."""
    own = next((one for one in module._parameters.values() if one is not None), None)
    if own is not None:
        return own.dtype is dtype
    children: dict[str, Any] = module._modules
    filled = {name: one for name, one in children.items() if one is not None and any(True for _ in one.parameters())}
    if _order_is_read(module):
        return bool(filled) and _put_first(next(iter(filled.values())), dtype)
    # Norms and others with parameters of their own, before modules whose children would be moved, too.
    for name in sorted(filled, key=lambda name: not any(True for _ in filled[name].parameters(recurse=False))):
        if _put_first(filled[name], dtype):
            if name != next(iter(filled)):
                rest = {other: child for other, child in children.items() if other != name}
                module._modules = {name: children[name], **rest}
            return True
    return False


def _order_is_read(module: nn.Module) -> bool:
    """Whether a module is a container, or its ``forward`` calls its children in their order."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return True
    code = getattr(unwrap(type(module).forward), "__code__", None)
    return code is None or not {"children", "named_children", "modules", "_modules"}.isdisjoint(code.co_names)
