"""Puts replacements into a model, all or none, from one thread at a time, and tells its library's integration."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from importlib import import_module
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

from torch import nn

from lowmem.nn.adapted_module import AdaptedModule, share_adapters_of_tied_embeddings
from lowmem.nn.adapter import Adapter
from lowmem.nn.adapter_buffers import sync_buffers_with_adapters
from lowmem.nn.module_class import replace_class_and_parameters
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms.module_registry import all_paths_by_module
from lowmem.transforms.peft_models import register_global_peft_check_hook

INTEGRATIONS = MappingProxyType({"transformers": "lowmem.integrations.transformers"})
"""Library that saves models in a way of its own -> the module that makes it save converted ones. Without that, what
``save_pretrained`` wrote could not be loaded again. Its ``adopt(model)`` is called with each changed model, and its
``cached_bytes(model, sequences, tokens, bits)`` with one whose cache is planned. ``prepare_inference`` calls its
``find_blocks(model, parts)`` and ``in_place_cache_hook_or_none(model)``."""

_P = ParamSpec("_P")
_R = TypeVar("_R")
# Held while modules are replaced, and while all of them are read
_LOCK = threading.RLock()


def _replace_lock_after_fork() -> None:
    global _LOCK
    _LOCK = threading.RLock()


# In the child, a thread that held the lock does not exist
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_replace_lock_after_fork)


def with_model_lock(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate functions that replace or list a model's modules: one thread at a time runs any of them."""

    @wraps(function)
    def call_with_lock(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _LOCK:
            return function(*args, **kwargs)

    return call_with_lock


@with_model_lock
def commit_replacements_and_freeze_if_adapted(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Turn modules, in place, into what ``converted_copy`` has made of them; if some get adapters, freeze the rest.

    Raises:
        RuntimeError: another thread has removed or converted one of the modules. The model is left as it is.
    """
    changed = {old: new for old, new in replacements.items() if new is not old}
    paths_by_module = all_paths_by_module(model)
    for old, new in changed.items():
        if old not in paths_by_module:
            raise RuntimeError(
                f"a {type(old).__name__} to convert left {type(model).__name__} meanwhile: change a model from one "
                "thread, or one after the other"
            )
        if type(old) not in _possible_original_classes(new):
            raise RuntimeError(f"another thread has converted a {type(old).__name__} of {type(model).__name__}")
    if any(isinstance(new, StoredModule) for new in changed.values()):
        register_global_peft_check_hook()
    adapted = [new for new in changed.values() if isinstance(new, AdaptedModule)]
    if adapted:
        share_adapters_of_tied_embeddings(adapted)
    replace_modules_and_update_encoder_nesting(model, changed)
    if adapted:
        freeze_non_adapter_parameters(model)
        sync_buffers_with_adapters(model)
    let_integrations_adopt_model(model)


def _possible_original_classes(converted: nn.Module) -> list[type[nn.Module]]:
    """Return the classes whose modules can become ``converted``."""
    plain: Any = converted._plain_class if isinstance(converted, AdaptedModule) else type(converted)
    before = [plain.dense_class] if issubclass(plain, StoredModule) else []
    return [*before, plain] if isinstance(converted, AdaptedModule) else before


@with_model_lock
def replace_modules_and_update_encoder_nesting(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Turn modules of a model, in place, into copies of them with or without adapters or stored parameters.

    Encoders with adapters take no nested tensors.
    """
    for module, copied in replacements.items():
        replace_class_and_parameters(module, copied)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and encoder.use_nested_tensor:
            encoder.use_nested_tensor = not any(
                isinstance(submodule, AdaptedModule) for submodule in encoder.modules()
            )


def freeze_non_adapter_parameters(model: nn.Module) -> None:
    """Freeze every parameter that does not belong to an adapter; adapters keep their ``requires_grad``."""
    adapters = {p for module in model.modules() if isinstance(module, Adapter) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter not in adapters:
            # Lazy ones, too, on which no method can be called
            parameter.requires_grad = False


def iterate_integrations_or_warn(model: nn.Module, consequence: str, alternative: str) -> Iterator[Any]:
    """Yield the integrations of the libraries that made a model, or parts of it; warn of one that does not import.

    ``consequence`` and ``alternative`` say what does not work without it, and what does.
    """
    libraries = {kind.__module__.partition(".")[0] for module in model.modules() for kind in type(module).__mro__}
    for library in libraries & INTEGRATIONS.keys() & sys.modules.keys():
        try:
            yield import_module(INTEGRATIONS[library])
        except ImportError as reason:
            warnings.warn(f"{consequence}: {reason}. {alternative}", UserWarning, stacklevel=5)


def let_integrations_adopt_model(model: nn.Module) -> None:
    """Tell the integrations of the libraries that made a model, or parts of it, that its layers have changed."""
    consequence = f"{type(model).__name__}.save_pretrained would write what nothing can load"
    for integration in iterate_integrations_or_warn(
        model, consequence, "lowmem.save and lowmem.load need no integration"
    ):
        integration.adopt(model)
