"""A call that is refused leaves a model as it was: its modules, tensors, modes, hooks and attributes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def public(module: nn.Module) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_")]  # others are caches of calls


def facts(model: nn.Module) -> tuple[list, list]:
    modules = [
        (path, one, type(one), one.training, len(one._forward_pre_hooks), public(one), vars(one).get("forward"))
        for path, one in model.named_modules(remove_duplicate=False)
    ]
    return modules, [(name, id(one), one.requires_grad) for name, one in tensors_of(model).items()]


@contextmanager
def refused(model: object, error: Any, message: str) -> Iterator[pytest.ExceptionInfo]:
    """Assert that the block raises an error, and that a model is afterwards what it was before."""
    if not isinstance(model, nn.Module):
        with pytest.raises(error, match=message) as caught:
            yield caught
        return
    before, tensors = facts(model), tensors_of(model)
    values = {n: one.detach().clone() for n, one in tensors.items() if not is_lazy(one) and not one.is_meta}
    with pytest.raises(error, match=message) as caught:
        yield caught
    assert facts(model) == before
    for name, value in values.items():
        torch.testing.assert_close(tensors[name].detach(), value, rtol=0, atol=0, equal_nan=True)
