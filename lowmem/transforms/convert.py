"""Converts any model in one walk: selects layers, builds all replacements, then swaps them in.

The model does not change before every replacement exists, so an error leaves it as it was.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

from lowmem.nn.fourbit import FourBitStorage
from lowmem.nn.frozen_linear import FrozenStorage
from lowmem.nn.lora import Adapter, LoRA
from lowmem.quant.quantize import relative_error
from lowmem.transforms.placement import techniques_by_layer
from lowmem.transforms.registry import (
    MADE_BY,
    REGISTRY,
    Technique,
    layer_name,
    module_paths,
    no_match_message,
    parameter_owners,
    refuse_peft,
    select_modules,
    skip_reason,
    supported_types,
)

__all__ = [
    "Store",
    "convert",
    "drop_partial_ties",
    "freeze_all_but_adapters",
    "layers_to_convert",
    "one_at_a_time",
    "rebuild",
    "stored_weight",
    "swap",
    "weight_key",
]


_P = ParamSpec("_P")
_R = TypeVar("_R")
_LOCK = threading.RLock()  # held while modules are replaced, and while all of them are read


def _renew_lock() -> None:
    global _LOCK
    _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):  # in the child, a thread that held the lock does not exist
    os.register_at_fork(after_in_child=_renew_lock)


def one_at_a_time(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate functions that replace or list a model's modules: one thread at a time runs any of them."""

    @wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _LOCK:
            return function(*args, **kwargs)

    return alone


def convert(
    model: nn.Module,
    *techniques: Technique,
    where: Callable[[str, nn.Module], bool] | None = None,
    skip: str | Iterable[str] = (),
) -> nn.Module:
    """Apply techniques, left to right, to every layer that the first one supports.

    A layer is converted if its type is exactly one that the technique supports (subclasses are skipped) and its
    weight is a parameter of its own (not computed by a parametrization or pruning hook), unless
    nn.MultiheadAttention reads that weight itself. Later techniques skip layers that they do not support. A module
    at several paths is replaced by one module at all of them. Modules that share a weight (tied embeddings) share
    the stored weight, or are skipped together. Forward and backward hooks move to the replacement. After ``LoRA``,
    only adapters train. ``LoRA`` leaves out the output layer of a language model (what ``get_output_embeddings()``
    returns), layers that share its weight, and linear layers whose weight is tied to an embedding, unless ``where``
    is given: their adapters would be as large as the vocabulary. ``summary`` lists how each layer was treated, and
    why.

    Args:
        model: any module; the root itself can be the layer.
        techniques: ``Half``, ``FourBit``, ``LoRA``.
        where: called with (path, module); a layer is taken only where it returns True, for all its paths.
        skip: glob patterns of paths to leave as they are.

    Returns:
        The model, changed in place; or the new layer, when the root itself was the layer.

    Raises:
        TypeError: the model is not a module, or a technique is of another type.
        ValueError: no technique, techniques that do not compose, nothing to convert, a pattern of ``skip`` or of
            ``LoRA`` that matches nothing, a layer that has the technique already or is inside a PEFT layer, or a
            weight that cannot be stored (its path is named). The model is left as it was.
    """
    _check_arguments(techniques)
    candidates = layers_to_convert(model, techniques, where, skip)
    chosen = techniques_by_layer(model, techniques, candidates, where)
    store = Store()
    unused: dict[type[Technique], str | None] = {}
    replacements = {
        module: rebuild(module, chosen[module], path, unused, store.by)
        for module, path in candidates.items()
        if chosen[module]
    }
    for why in unused.values():
        if why is not None:
            raise ValueError(why)
    model = swap(model, replacements)
    if any(isinstance(t, LoRA) for t in techniques):
        freeze_all_but_adapters(model)
    return model


def layers_to_convert(
    model: nn.Module,
    techniques: tuple[Technique, ...],
    where: Callable[[str, nn.Module], bool] | None,
    skip: str | Iterable[str],
) -> dict[nn.Module, str]:
    """Return the layers that the first technique converts, each with its first path.

    Raises:
        TypeError: the model is not a module, or a pattern is not a string.
        ValueError: nothing to convert, a pattern that matches nothing, a layer that has one of the techniques
            already, or is inside a PEFT layer.
    """
    candidates: dict[nn.Module, str] = {}
    for module, path in select_modules(model, where, skip).items():
        made_by = MADE_BY.get(type(module))
        if made_by is not None and made_by in {type(t) for t in techniques}:
            remedy = "add another with add_adapter" if made_by is LoRA else "convert a model once"
            raise ValueError(
                f"{layer_name(path)} is a {type(module).__name__}: it has {made_by.__name__} already; "
                f"{remedy}, or leave the layer out with skip="
            )
        if skip_reason(type(techniques[0]), module) is None:
            candidates[module] = path
    if type(techniques[0]) is not LoRA:  # LoRA keeps the weight, and with it all ties
        drop_partial_ties(model, candidates)
    refuse_peft(model, candidates, freezes=any(isinstance(t, LoRA) for t in techniques))
    if not candidates:
        raise ValueError(no_match_message(type(techniques[0]), model))
    return candidates


def drop_partial_ties(model: nn.Module, candidates: dict[nn.Module, str]) -> None:
    """Drop candidates that share their weight with a module that is no candidate.

    Once is enough: whoever shares that weight is dropped with them, and a candidate holds no other one.
    """
    owners = parameter_owners(model)  # lacks modules that another thread has just replaced, which swap rejects
    for module in [m for m in candidates if any(o not in candidates for o, _ in owners.get(id(m.weight), ()))]:
        del candidates[module]


def stored_weight(layer: nn.Module) -> Any:
    """Return the stored weight of a converted layer: a QuantizedTensor, or a 16-bit tensor."""
    return layer.quantized if isinstance(layer, FourBitStorage) else layer.weight


def weight_key(weight: Tensor) -> Hashable:
    """Return a key that is equal for tensors that view the same memory with the same shape and strides."""
    return weight.untyped_storage()._cdata, weight.storage_offset(), weight.shape, weight.stride()


class Store:
    """Stores each weight once per technique, so that layers with a shared weight share the stored one."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Tensor, Any]] = {}

    def by(self, technique: Any) -> Callable[[Tensor, str], Any]:
        """Return ``technique.store`` with a cache."""

        def store(tensor: Tensor, name: str) -> Any:
            key = technique, weight_key(tensor)
            if key not in self._known:
                self._known[key] = tensor, technique.store(tensor, name)  # keeps tensor alive: key has its address
            return self._known[key][1]

        return store


def _check_arguments(techniques: tuple[Technique, ...]) -> None:
    if not techniques:
        raise ValueError("no technique was given: pass Half(), FourBit() or LoRA()")
    known = {technique for technique, _ in REGISTRY}
    for technique in techniques:
        if type(technique) not in known:
            raise TypeError(f"technique={technique!r} must be an instance of Half, FourBit or LoRA")
    for kind, count in Counter(type(t) for t in techniques).items():
        if count > 1:
            raise ValueError(f"{kind.__name__} was given {count} times: a layer takes a technique once")


def rebuild(
    module: nn.Module,
    techniques: tuple[Technique, ...],
    path: str,
    unused: dict[type[Technique], str | None],
    store_by: Callable[[Any], Callable[[Tensor, str], Any]],
) -> nn.Module:
    """Return the replacement of a layer, by all techniques that support it.

    Args:
        module: the layer.
        techniques: applied left to right.
        path: of the layer, for errors.
        unused: for each kind of technique, why it has converted no layer so far; None once it has. It is updated.
        store_by: returns, for a technique, the function that stores the weight: ``Store.by``.

    Raises:
        TypeError, ValueError: a weight that cannot be stored.
    """
    layer: Any = module
    for technique in techniques:
        made: Any = REGISTRY.get((type(technique), type(layer)))
        if made is None:
            unused.setdefault(
                type(technique),
                f"{layer_name(path)}: {type(technique).__name__} cannot follow the techniques before it, which made "
                f"a {type(layer).__name__}; it takes {supported_types(type(technique))}",
            )
            continue
        unused[type(technique)] = None
        try:
            if isinstance(technique, LoRA):
                dense: Any = None if layer is module else module.weight
                layer = made.from_layer(layer, technique, dense)
            else:
                layer = made.from_layer(layer, technique, store_by(technique))
        except (TypeError, ValueError) as reason:
            raise type(reason)(f"{layer_name(path)}: {reason}") from reason
        if isinstance(layer, FrozenStorage):
            weight: Any = module.weight
            layer.weight_error = relative_error(weight, stored_weight(layer))
    built: nn.Module = layer.train(module.training)
    return built


@one_at_a_time
def swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Replace layers at all of their paths and move their hooks; return the model, or the replacement of the root.

    Raises:
        RuntimeError: another thread has removed one of the layers. The model is left as it is.
    """
    found = module_paths(model)
    gone = [type(old).__name__ for old in replacements if old not in found]
    if gone:
        raise RuntimeError(
            f"{len(gone)} of the layers to replace (a {gone[0]}) left {type(model).__name__} meanwhile: change a "
            "model from one thread, or one after the other"
        )
    for old, new in replacements.items():
        if old._is_full_backward_hook is not None:
            new._is_full_backward_hook = old._is_full_backward_hook
        for name in _HOOKS:
            hooks = vars(old)[name]
            if hooks:
                vars(old)[name] = type(hooks)()  # a base inside its replacement must not run them a second time
                hooks.update(vars(new)[name])  # hooks that were set on a base while a LoRALinear held it
                vars(new)[name] = hooks  # the same dictionary, so that handles still remove them
        for path in found[old]:
            parent_path, _, child = path.rpartition(".")
            if not path:
                return new
            parent = model.get_submodule(parent_path)
            setattr(parent, child, new)
            if isinstance(parent, nn.TransformerEncoderLayer):
                # Disables its fused inference path, which would read the dense weights.
                parent.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(m in replacements.values() for m in module.modules()):
            module.use_nested_tensor = False
    return model


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def freeze_all_but_adapters(model: nn.Module) -> None:
    """Freeze every parameter that does not belong to an adapter; adapters keep their ``requires_grad``."""
    adapters = {p for module in model.modules() if isinstance(module, Adapter) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter not in adapters:
            parameter.requires_grad_(False)
