"""Several named adapters on one base: add, activate, deactivate, delete, merge and unmerge them.

A name stands for one adapter of the whole model, which may cover only some layers. Every function checks the whole
model before it changes anything. The functions are thread-safe: one runs at a time. A forward that runs meanwhile may
see some layers before the change and others after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, cast

from torch import nn

from lowmem.nn.lora import Adapter, LoRA, LoRALinear
from lowmem.transforms.convert import freeze_all_but_adapters, one_at_a_time, swap
from lowmem.transforms.merge import adapted_layers, fold, warn_of_requantizing
from lowmem.transforms.placement import place_adapters
from lowmem.transforms.registry import layer_name, no_match_message, refuse_peft, select_modules, skip_reason

__all__ = [
    "activate",
    "active_adapters",
    "adapter_layers",
    "adapter_names",
    "adapter_parameter_groups",
    "add_adapter",
    "check_name",
    "deactivate",
    "delete_adapter",
    "merge_adapter",
    "unmerge_adapter",
]


@one_at_a_time
def add_adapter(
    model: nn.Module,
    name: str,
    technique: LoRA,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    skip: str | Iterable[str] = (),
) -> nn.Module:
    """Add a new, active adapter to every layer that LoRA supports and that ``where`` and ``skip`` select.

    Layers without an adapter become LoRALinear, as by ``convert``. The new adapter trains, other adapters do not
    change (active or not, frozen or not), and the rest of the model is frozen. Output layers are left out as by
    ``convert``, unless ``where`` is given.

    Args:
        model: any module, with or without adapters; the root itself can be the layer.
        name: of the adapter: not empty, without dots, and no attribute of nn.ModuleDict, which holds it.
        technique: rank, alpha, dropout and scaling. Further calls may add the same name to other layers with other
            values.
        where: called with (path, module); a layer is taken only where it returns True, for all its paths.
        skip: glob patterns of paths to leave as they are.

    Returns:
        The model, changed in place; or the new layer, when the root itself was wrapped.

    Raises:
        TypeError: the model is not a module, the name is not a string, or the technique is not a ``LoRA``.
        ValueError: an invalid name, or one that a layer has already; nothing to adapt; or a pattern of ``skip`` or
            of the technique that matches nothing. The model is left as it was.
    """
    check_name(name)
    if not isinstance(technique, LoRA):
        raise TypeError(f"technique={technique!r} must be an instance of LoRA")
    selected = select_modules(model, where, skip)
    layers = [m for m in selected if isinstance(m, LoRALinear) or skip_reason(LoRA, m) is None]
    refuse_peft(model, layers, freezes=True)
    if not layers:
        raise ValueError(no_match_message(LoRA, model))
    wrapped: dict[nn.Module, nn.Module] = {}
    added: dict[LoRALinear, Adapter] = {}
    for module, own in place_adapters(model, technique, layers, where).items():
        if not isinstance(module, LoRALinear):
            wrapped[module] = LoRALinear(cast(nn.Linear, module), own, name).train(module.training)
        elif name in module.adapters:
            raise ValueError(
                f"{layer_name(selected[module])} has an adapter {name!r} already: choose another name, delete that "
                "adapter first, or leave the layer out with skip="
            )
        else:
            added[module] = Adapter(module.base, own)
    model = swap(model, wrapped)
    for adapted, adapter in added.items():
        adapted.add(name, adapter)
    freeze_all_but_adapters(model)
    return model


@one_at_a_time
def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the model's adapters, in the order of its layers, then in that in which they were added."""
    return list(dict.fromkeys(name for layer in adapted_layers(model) for name in layer.adapters))


@one_at_a_time
def active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters that contribute to the output: the active ones and the merged one."""
    return list(dict.fromkeys(name for layer in adapted_layers(model) for name in layer.in_use))


@one_at_a_time
def adapter_layers(model: nn.Module, name: str) -> dict[str, Adapter]:
    """Return the modules of one adapter, by the first path of their layers.

    Each has ``technique``, ``lora_a`` (rank, in) and ``lora_b`` (out, rank). To freeze the adapter, call
    ``requires_grad_(False)`` on each.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model has no such adapter.
    """
    layers = _layers_with(model, [name])
    return {path: cast(Adapter, layer.adapters[name]) for layer, path in layers.items() if name in layer.adapters}


@one_at_a_time
def adapter_parameter_groups(model: nn.Module, ratio: float = 16.0, *, lr: float) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer in which the matrices B learn ``ratio`` times faster.

    LoRA+, arXiv 2402.12354: B starts at zero and A does not, so that one learning rate for both is too low for B.
    ``torch.optim.AdamW(adapter_parameter_groups(model, lr=1e-4))``.

    Args:
        model: with adapters.
        ratio: of the learning rate of B to that of A, positive; the paper finds 16 to suit most models.
        lr: the learning rate of A, and of parameters of no adapter that train, positive.

    Returns:
        Two groups with ``params`` and ``lr``: first A and whatever else trains, then B. Frozen parameters are left
        out; inactive adapters are not.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model has no adapter that trains, or a ratio or lr that is not a positive number.
    """
    for name, value in (("ratio", ratio), ("lr", lr)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} must be a positive number")
    adapters = [cast(Adapter, part) for layer in adapted_layers(model) for part in layer.adapters.values()]
    fast = [adapter.lora_b for adapter in adapters if adapter.lora_b.requires_grad]
    if not fast:
        raise ValueError(
            f"{type(model).__name__} has no adapter that trains: add_adapter(model, name, LoRA()) adds one, and "
            "requires_grad_(True) on each of adapter_layers(model, name) lets it train"
        )
    known = set(fast)
    slow = [p for p in model.parameters() if p.requires_grad and p not in known]
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": ratio * lr}]


@one_at_a_time
def activate(model: nn.Module, *names: str) -> None:
    """Activate adapters, in addition to those that are active already. Without names: all of them.

    The low-rank products of several are summed in the order in which the adapters were added.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model has no such adapter.
    """
    for layer in _layers_with(model, names):
        active = {*layer.active, *(names or layer.adapters)}
        layer.active = tuple(name for name in layer.adapters if name in active)


@one_at_a_time
def deactivate(model: nn.Module, *names: str) -> None:
    """Deactivate adapters: they keep their values, and cost no time. Without names: all of them.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model has no such adapter, or it is merged.
    """
    layers = _layers_with(model, names)
    _check_not_merged(layers, names or adapter_names(model))
    for layer in layers:
        layer.active = tuple(name for name in layer.active if names and name not in names)


@one_at_a_time
def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Delete an adapter. A layer without further adapters is replaced by its base, which gets the layer's hooks.

    Returns:
        The model, changed in place; or the base, when the root itself was the layer.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model has no such adapter, or it is merged.
    """
    layers = _layers_with(model, [name])
    _check_not_merged(layers, [name])
    model = swap(model, {layer: layer.base for layer in layers if [*layer.adapters] == [name]})
    for layer in adapted_layers(model):
        if name in layer.adapters:
            layer.active = tuple(other for other in layer.active if other != name)
            del layer.adapters[name]
    return model


@one_at_a_time
def merge_adapter(model: nn.Module, name: str) -> None:
    """Merge an adapter into copies of the bases, ``W + s B A``, which are called in place of them.

    The bases are kept unchanged, and ``state_dict`` holds them without the copies. A merged adapter contributes to
    the output, active or not, and does not train; other adapters work as before. The copy of a half-precision base is
    rounded once more; that of a 4-bit base is quantized once more, and a warning gives the error that this adds.
    In-place changes of the base or adapter do not reach the copy: unmerge first. ``load_state_dict`` rebuilds it.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model has no such adapter, one is merged already, or an adapted weight cannot be
            stored. The model is left as it was.
    """
    layers = _layers_with(model, [name])
    merged = _merged(layers)
    if merged:
        raise ValueError(f"adapter {merged!r} is merged already: call unmerge_adapter(model) first")
    copies = fold(model, {layer: (name,) for layer in layers if name in layer.adapters})
    warn_of_requantizing(copies, layers)
    for layer, copy in copies.items():
        layer.merge(name, copy.layer)


@one_at_a_time
def unmerge_adapter(model: nn.Module) -> None:
    """Undo ``merge_adapter`` exactly: the original bases are called again, and the copies are freed.

    Raises:
        TypeError: the model is not a module.
        ValueError: nothing is merged.
    """
    layers = _layers_with(model, ())
    if not _merged(layers):
        raise ValueError(f"no adapter of {type(model).__name__} is merged: call merge_adapter(model, name) first")
    for layer in layers:
        layer.merged = layer.merged_base = None


def check_name(name: str) -> None:
    """Raise unless ``name`` is a valid name of an adapter.

    Raises:
        TypeError: not a string.
        ValueError: empty, with a dot, or an attribute of nn.ModuleDict.
    """
    if not isinstance(name, str):
        raise TypeError(f"name={name!r} must be a string")
    if not name or "." in name or hasattr(nn.ModuleDict, name) or name in vars(nn.ModuleDict()):
        raise ValueError(
            f"name={name!r} must not be empty, hold a dot, or be an attribute of nn.ModuleDict; choose another"
        )


def _layers_with(model: nn.Module, names: Iterable[str]) -> dict[LoRALinear, str]:
    """Return every adapted layer with its first path; raise a ValueError unless the model has all these adapters."""
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapter: add_adapter(model, name, LoRA()) adds one")
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise ValueError(f"adapter={name!r} is unknown: {type(model).__name__} has {', '.join(known)}")
    return layers


def _merged(layers: Iterable[LoRALinear]) -> str | None:
    return next((layer.merged for layer in layers if layer.merged is not None), None)


def _check_not_merged(layers: Iterable[LoRALinear], names: Collection[str]) -> None:
    merged = _merged(layers)
    if merged is not None and merged in names:
        raise ValueError(f"adapter {merged!r} is merged into the base: call unmerge_adapter(model) first")
