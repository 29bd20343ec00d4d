"""Several named adapters on one base: add, activate, deactivate, delete, merge and unmerge them. A function checks
the whole model before it changes anything, and one function runs at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

from torch import nn

from lowmem.errors import is_one_of, short_repr
from lowmem.nn.adapted_module import AdaptedModule, share_adapters_of_tied_embeddings
from lowmem.nn.adapter import Adapter
from lowmem.nn.adapter_bank import AdapterBank
from lowmem.nn.adapter_buffers import sync_buffers_with_adapters
from lowmem.nn.fold import unadapted_shallow_copy
from lowmem.nn.techniques import LoRA
from lowmem.resident import release_memory_after_call
from lowmem.transforms.adapter_placement import adapter_techniques_by_layer, adapter_warning_texts, can_have_adapter
from lowmem.transforms.converted_copies import copy_with_first_adapter
from lowmem.transforms.merge_adapters import (
    first_path_by_adapted_layer,
    merged_copy_and_errors_by_layer,
    warn_of_requantization_errors,
)
from lowmem.transforms.model_checks import (
    check_layers_are_changeable,
    check_model_is_changeable,
    check_no_peft_conflict,
)
from lowmem.transforms.module_registry import layer_display_name, layer_or_parameter_path
from lowmem.transforms.module_replacement import (
    freeze_non_adapter_parameters,
    let_integrations_adopt_model,
    replace_modules_and_update_encoder_nesting,
    with_model_lock,
)
from lowmem.transforms.module_selection import (
    first_path_by_selected_module,
    nothing_to_convert_message,
    record_user_exclusions,
)

M = TypeVar("M", bound=nn.Module)


@with_model_lock
def add_adapter(
    model: M,
    name: str,
    technique: LoRA,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    skip: str | Iterable[str] = (),
) -> M:
    """Add a new, active adapter to every layer that LoRA supports and that ``where`` and ``skip`` select.

    Layers stay the same objects, as by ``convert``. The new adapter trains, other adapters do not change (active or
    not, frozen or not), and the rest of the model is frozen. Output layers, embeddings and other layers are left out
    as by ``convert``, unless ``where`` selects them.

    Args:
        model: any module, with or without adapters; the root itself can be the layer.
        name: of the adapter: not empty, without dots, and no attribute of what holds it.
        technique: rank, alpha, dropout and scaling. Further calls may add the same name to other layers with other
            values.
        where, skip: as in ``convert``.

    Returns:
        The model, changed in place.

    Raises:
        TypeError: the model is not a module, the name is not a string, or the technique is not a ``LoRA``.
        RuntimeError: inference mode is active, or was when a parameter was made; or a layer is prepared for training.
        ValueError: an invalid name, or one that a layer has already; nothing to adapt; a ``where`` that only leaves
            out, as in ``convert``; a pattern of ``skip`` or of the technique that matches nothing; a layer that is
            lazy, sharded, without values, or inside one of PEFT; or a model that is wrapped for several processes.
            The model is left as it was.

    Warns:
        UserWarning: as ``convert``, of ranks that are too large, and of linear layers that share the weight of one
            that gets an adapter, and get none.
    """
    check_adapter_name(name)
    if not isinstance(technique, LoRA):
        raise TypeError(f"technique={short_repr(technique)} must be an instance of LoRA")
    check_model_is_changeable("add_adapter", model)
    where = cache(where) if callable(where) else where  # it may be slow, or ask a person
    selected = first_path_by_selected_module(model, where, skip)
    layers = [m for m in selected if can_have_adapter(m, where is not None)]
    check_no_peft_conflict(model, layers, will_freeze=True)
    if not layers:
        raise ValueError(nothing_to_convert_message(LoRA, model, selected, where is not None))
    placed = adapter_techniques_by_layer(model, technique, layers, where)
    check_layers_are_changeable("add_adapter", {layer: selected[layer] for layer in placed})
    warning_texts = adapter_warning_texts(model, placed)
    add_adapter_and_freeze_rest(model, name, placed, selected)
    record_user_exclusions(model, where, skip, LoRA)
    for text in warning_texts:
        # The caller of the function that with_model_lock wraps
        warnings.warn(text, UserWarning, stacklevel=3)
    return model


@with_model_lock
def add_adapter_and_freeze_rest(
    model: nn.Module,
    adapter_name: str,
    layer_techniques: Mapping[nn.Module, Mapping[str, LoRA]],
    layer_paths: Mapping[nn.Module, str],
) -> None:
    """Add a new, active adapter ``adapter_name`` to layers, with the techniques of the parameters that it changes in
    each.

    ``layer_paths`` are those of the layers; raises as ``add_adapter``.
    """
    made: dict[nn.Module, nn.Module] = {}
    added: dict[AdaptedModule, dict[str, Adapter]] = {}
    for module, techniques in layer_techniques.items():
        if not isinstance(module, AdaptedModule):
            made[module] = copy_with_first_adapter(module, techniques, layer_paths[module], {}, adapter_name)
            continue
        if module.adapters.adapters_by_parameter(adapter_name).keys() & techniques.keys():
            raise ValueError(
                f"{layer_display_name(layer_paths[module])} has an adapter {adapter_name!r} already: choose another "
                "name, delete that "
                "adapter first, or leave the layer out with skip="
            )
        added[module] = {
            parameter_name: Adapter(module, technique, None, parameter_name)
            for parameter_name, technique in techniques.items()
        }
    replace_modules_and_update_encoder_nesting(model, made)
    for module, parts in added.items():
        module.adapters.add_and_activate(adapter_name, parts)
    share_adapters_of_tied_embeddings([*made, *added])
    freeze_non_adapter_parameters(model)
    sync_buffers_with_adapters(model)
    let_integrations_adopt_model(model)


@with_model_lock
def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the model's adapters, in the order of its layers, then in that in which they were added."""
    return list(dict.fromkeys(name for layer in first_path_by_adapted_layer(model) for name in layer.adapters.names))


@with_model_lock
def active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters that contribute to the output: the active ones and the merged one."""
    return list(
        dict.fromkeys(
            name for layer in first_path_by_adapted_layer(model) for name in layer.adapters.active_or_merged_names
        )
    )


@with_model_lock
def adapter_layers(model: nn.Module, name: str) -> dict[str, Adapter]:
    """Return the modules of one adapter, by the first path of their layers.

    The adapter of a parameter but ``weight`` has its name after the path: ``mlp.experts.gate_up_proj``. Each has
    ``technique``, ``lora_a`` (rank, in), ``lora_b`` (out, rank), of experts a stack of these, and ``delta()``, what
    it adds to the parameter. To freeze the adapter, call ``requires_grad_(False)`` on each.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model has no such adapter.
    """
    layers = _adapted_layer_paths_or_raise(model, [name])
    return {
        layer_or_parameter_path(path, parameter): adapter
        for layer, path in layers.items()
        for parameter, adapter in layer.adapters.adapters_by_parameter(name).items()
    }


@with_model_lock
def adapter_parameter_groups(model: nn.Module, ratio: float = 16.0, *, lr: float) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer in which the matrices B learn ``ratio`` times faster.

    LoRA+, arXiv 2402.12354: B starts at zero and A does not, so that one learning rate for both is too low for B. Of
    an embedding A starts at zero, and learns faster.
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
            raise ValueError(f"{name}={short_repr(value)} must be a positive number")
    banks = [layer.adapters for layer in first_path_by_adapted_layer(model)]
    adapters: list[Adapter] = [
        part for bank in banks for name in bank.names for part in bank.adapters_by_parameter(name).values()
    ]
    fast = [adapter.zero_initialized_matrix for adapter in adapters if adapter.zero_initialized_matrix.requires_grad]
    if not fast:
        raise ValueError(
            f"{type(model).__name__} has no adapter that trains: add_adapter(model, name, LoRA()) adds one, and "
            "requires_grad_(True) on each of adapter_layers(model, name) lets it train"
        )
    known = set(fast)
    slow = [p for p in model.parameters() if p.requires_grad and p not in known]
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": ratio * lr}]


@with_model_lock
def activate(model: nn.Module, *names: str) -> None:
    """Activate adapters, in addition to those that are active already. Without names: all of them.

    The low-rank products of several are summed in the order in which the adapters were added. Buffers, such as the
    running statistics of BatchNorm, are those of the one that was added last.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model has no such adapter.
    """
    for layer in _adapted_layer_paths_or_raise(model, names):
        bank = layer.adapters
        active = {*bank.active, *(names or bank.names)}
        bank.active = tuple(name for name in bank.names if name in active)
    sync_buffers_with_adapters(model)


@with_model_lock
def deactivate(model: nn.Module, *names: str) -> None:
    """Deactivate adapters: they keep their values, and cost no time. Without names: all of them.

    Without active adapters the model computes the base's bits: buffers that training changed are the base's again.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model has no such adapter, or it is merged.
    """
    layers = _adapted_layer_paths_or_raise(model, names, unmerged_adapters=names or adapter_names(model))
    for layer in layers:
        layer.adapters.active = tuple(name for name in layer.adapters.active if names and name not in names)
    sync_buffers_with_adapters(model)


@release_memory_after_call
@with_model_lock
def delete_adapter(model: M, name: str) -> M:
    """Delete an adapter. A layer without further adapters gets its own class back.

    Returns:
        The model, changed in place.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model has no such adapter, or it is merged.
    """
    layers = _adapted_layer_paths_or_raise(model, [name], unmerged_adapters=[name])
    replace_modules_and_update_encoder_nesting(
        model, {layer: unadapted_shallow_copy(layer) for layer in layers if layer.adapters.names == (name,)}
    )
    for layer in first_path_by_adapted_layer(model):
        if name in layer.adapters.names:
            layer.adapters.remove(name)
    sync_buffers_with_adapters(model)
    let_integrations_adopt_model(model)
    return model


@release_memory_after_call
@with_model_lock
def merge_adapter(model: nn.Module, name: str) -> None:
    """Merge an adapter into copies of the weights, ``W + s B A``, which layers compute with in place of them.

    The weights are kept unchanged, and ``state_dict`` holds them without the copies. A merged adapter contributes to
    the output, active or not, and does not train; other adapters work as before. The copy of a half-precision weight
    is rounded once more; that of a 4-bit weight is quantized once more, and a warning gives the error that this adds.
    In-place changes of the weight or adapter do not reach the copy: unmerge first. ``load_state_dict`` rebuilds it.

    Raises:
        TypeError: the model is not a module.
        RuntimeError: inference mode is active, or was when a parameter was made.
        ValueError: the model has no such adapter, one is merged already, an adapted weight cannot be stored, is
            sharded, without values or inside a layer of PEFT, or the model is wrapped for several processes. The
            model is left as it was.
    """
    check_model_is_changeable("merge_adapter", model)
    check_no_peft_conflict(model, first_path_by_adapted_layer(model), will_merge=True)
    layers = _adapted_layer_paths_or_raise(model, [name])
    check_layers_are_changeable("merge_adapter", layers)
    if (merged := _merged_adapter_name_or_none(layers)) is not None:
        raise ValueError(f"adapter {merged!r} is merged already: call unmerge_adapter(model) first")
    copies = merged_copy_and_errors_by_layer(
        model, {layer: (name,) for layer in layers if name in layer.adapters.names}
    )
    warn_of_requantization_errors(copies, layers)
    for layer, copy in copies.items():
        layer.adapters.adopt_merged_copy(name, copy.layer)
    sync_buffers_with_adapters(model)


@release_memory_after_call
@with_model_lock
def unmerge_adapter(model: nn.Module) -> None:
    """Undo ``merge_adapter`` exactly: the layers compute with their own weights again, and the copies are freed.

    Raises:
        TypeError: the model is not a module.
        ValueError: nothing is merged.
    """
    layers = _adapted_layer_paths_or_raise(model, ())
    if not _merged_adapter_name_or_none(layers):
        raise ValueError(f"no adapter of {type(model).__name__} is merged: call merge_adapter(model, name) first")
    for layer in layers:
        layer.adapters.drop_merged_copy()
    sync_buffers_with_adapters(model)


def check_adapter_name(name: str) -> None:
    """Raise a TypeError or ValueError unless ``name`` is a valid name of an adapter."""
    if not isinstance(name, str):
        raise TypeError(f"name={short_repr(name)} must be a string")
    if not name or "." in name or hasattr(AdapterBank(), name):
        raise ValueError(
            f"name={name!r} must not be empty, hold a dot, or be an attribute of AdapterBank, which holds adapters; "
            "choose another"
        )


def _adapted_layer_paths_or_raise(
    model: nn.Module, required_adapters: Iterable[str], unmerged_adapters: Collection[str] = ()
) -> dict[AdaptedModule, str]:
    """Return every adapted layer with its first path; a missing adapter, or a merged one, is a ValueError."""
    layers = first_path_by_adapted_layer(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapter: add_adapter(model, name, LoRA()) adds one")
    known = adapter_names(model)
    for name in required_adapters:
        if not is_one_of(name, known):
            raise ValueError(f"adapter={short_repr(name)} is unknown: {type(model).__name__} has {', '.join(known)}")
    if (merged := _merged_adapter_name_or_none(layers)) in unmerged_adapters:
        raise ValueError(f"adapter {merged!r} is merged into the base: call unmerge_adapter(model) first")
    return layers


def _merged_adapter_name_or_none(layers: Iterable[AdaptedModule]) -> str | None:
    return next((layer.adapters.merged_name for layer in layers if layer.adapters.merged_name is not None), None)
