"""Makes a model with its parameters on the meta device: shapes and dtypes without values."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from lowmem.errors import check_callable_with

M = TypeVar("M", bound=nn.Module)


def check_model_factory(argument_name: str, factory: Any) -> None:
    """Raise a TypeError unless a factory can be called without arguments, and is no model itself."""
    # A module is callable, with its inputs
    if isinstance(factory, nn.Module):
        raise TypeError(
            f"{argument_name} is a {type(factory).__name__}, a model with weights: pass what makes it, as its class "
            "or a "
            "function, whose weights are never allocated"
        )
    check_callable_with(argument_name, factory, "a callable without arguments that makes the model")


def make_model_with_meta_parameters(factory: Callable[[], M]) -> M:
    """Return the model that ``factory`` makes, with its parameters on the meta device and its buffers as they are.

    Each parameter is moved when its module registers it, so that one of them has memory at a time. The global random
    state does not change.

    Raises:
        TypeError: the factory returned no module.
        ValueError: the factory needs the values of its parameters, or returned an existing model.
    """
    registered_modules: set[nn.Module] = set()
    with torch.random.fork_rng(devices=[]), _parameter_registration_on_meta(registered_modules):
        try:
            model = factory()
        except (RuntimeError, ValueError) as reason:
            # NotImplementedError is a RuntimeError
            if "meta" not in str(reason):
                raise
            raise ValueError(
                f"the factory needs the values of its parameters, which it is called without ({reason}): leave moves "
                "between devices, convert, and weights that are computed out of it"
            ) from reason
    if not isinstance(model, nn.Module):
        raise TypeError(f"factory returned a {type(model).__name__}, not a torch.nn.Module")
    if not any(module in registered_modules for module in model.modules()) and any(True for _ in model.parameters()):
        raise ValueError("the factory returned a model that was there before, or a copy of one, and must make one")
    existing_parameters = [p for p in model.parameters() if not p.is_meta and not is_lazy(p)]
    if (
        existing_parameters
    ):  # layers that existed before the call, or copies of them: their values must stay as they are
        model = copy.deepcopy(
            model, {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in existing_parameters}
        )
    return model


@contextmanager
def _parameter_registration_on_meta(registered_modules: set[nn.Module]) -> Iterator[None]:
    """Move each parameter that this thread registers to the meta device, and add its module to
    ``registered_modules``: shared ones stay shared. Copies of modules (of an nn.TransformerEncoder) register nothing.

    torch's hooks for all modules are registered for the block, because nothing else tells a parameter from a buffer
    when it is made: ``torch.device("meta")`` would take the values of buffers, too.
    """
    meta_copies: Any = WeakTensorKeyDictionary()
    thread = threading.get_ident()

    def record_module(module: nn.Module, *_: object) -> None:
        if threading.get_ident() == thread:
            registered_modules.add(module)

    def move_parameter_to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        record_module(module)
        if parameter is None or parameter.is_meta or is_lazy(parameter) or threading.get_ident() != thread:
            return None
        if parameter not in meta_copies:
            meta_copies[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        meta_parameter: nn.Parameter = meta_copies[parameter]
        return meta_parameter

    with (
        register_module_parameter_registration_hook(move_parameter_to_meta),  # type: ignore[arg-type]
        register_module_module_registration_hook(record_module),
    ):
        yield
