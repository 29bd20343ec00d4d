"""Which technique each layer gets: embeddings in 8 bits, a ``Budget``'s choice, ``LoRA`` as it is placed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from lowmem.nn.techniques import CHOICES, Budget, FourBit, LoRA, embedding_and_output_technique
from lowmem.transforms.adapter_placement import adapter_techniques_by_layer, can_have_adapter
from lowmem.transforms.bit_budget import (
    BudgetChoice,
    RowAndColumnImportance,
    budget_choices_with_reasons,
    budget_unit_or_none,
    loss_per_choice,
    module_groups_sharing_weights,
)
from lowmem.transforms.calibration.sensitivity import measure_importance_by_weight
from lowmem.transforms.converted_copies import copy_with_stored_parameters
from lowmem.transforms.layer_roles import embedding_or_output_reason_by_module, module_name_pairs_kept_in_float32
from lowmem.transforms.module_registry import (
    LayerTechnique,
    ModuleFilter,
    Technique,
    abbreviated_layer_names,
    layer_display_name,
    layer_or_parameter_path,
)
from lowmem.transforms.tied_weights import weight_memory_key


def techniques_by_layer(
    model: nn.Module,
    techniques: tuple[Technique, ...],
    layers: Iterable[nn.Module],
    where: ModuleFilter,
) -> dict[nn.Module, tuple[LayerTechnique, ...]]:
    """Return the techniques of each layer that ``convert`` takes, with LoRA by ``adapter_techniques_by_layer``.

    Embeddings and output layers get what ``FourBit.embeddings`` says in place of a ``FourBit``, and modules whose
    weights transformers keeps in float32 no narrower ``compute_dtype``.
    """
    chosen: dict[nn.Module, tuple[LayerTechnique, ...]] = dict.fromkeys(layers, techniques)
    first, *rest = techniques
    if isinstance(first, FourBit):
        wider = (embedding_and_output_technique(first), *rest)
        chosen |= {layer: wider for layer in embedding_or_output_reason_by_module(model) if layer in chosen}
    for layer, _ in module_name_pairs_kept_in_float32(model, getattr(first, "compute_dtype", None)):
        if layer in chosen:
            first_technique: Any = chosen[layer][0]
            chosen[layer] = (replace(first_technique, compute_dtype=None), *rest)
    for index, lora in enumerate(techniques):
        if isinstance(lora, LoRA):
            adaptable = [layer for layer in chosen if can_have_adapter(layer, where is not None)]
            placed = adapter_techniques_by_layer(model, lora, adaptable, where)
            for layer in adaptable:
                after = (placed[layer], *techniques[index + 1 :]) if layer in placed else ()
                chosen[layer] = (*chosen[layer][:index], *after)
    return chosen


def techniques_and_budget_by_layer(
    model: nn.Module,
    techniques: tuple[Technique, ...],
    selection: Mapping[nn.Module, tuple[str, list[str]]],
    where: ModuleFilter,
    choice_losses: Callable[[str, Tensor], Sequence[float] | None] | None = None,
) -> tuple[dict[nn.Module, tuple[LayerTechnique, ...]], dict[nn.Module, BudgetChoice]]:
    """Return the techniques of each layer, with a ``Budget`` divided, and what each layer got of the budget."""
    chosen = techniques_by_layer(model, techniques, selection, where)
    first, got = techniques[0], dict[nn.Module, BudgetChoice]()
    if isinstance(first, Budget):
        got = measure_and_divide_budget_by_module(model, first, selection, choice_losses)
        chosen = {module: (got[module].technique, *steps[1:]) for module, steps in chosen.items()}
    return chosen, got


def measure_and_divide_budget_by_module(
    model: nn.Module,
    budget: Budget,
    selection: Mapping[nn.Module, tuple[str, list[str]]],
    choice_losses: Callable[[str, Tensor], Sequence[float] | None] | None = None,
) -> dict[nn.Module, BudgetChoice]:
    """Return what each module gets of a budget; weights of unknown losses, which stay dense, have no part in it.

    ``selection`` has paths of modules and names of parameters to store; ``choice_losses`` is as in
    ``build_replacements``.
    """
    stored: dict[nn.Module, dict[Hashable, tuple[str, nn.Parameter, Tensor]]] = {}
    for module, (path, names) in selection.items():
        weights_by_key = stored[module] = {}
        for name, tensor in _tensors_in_stored_shape_by_name(module, path, names).items():
            parameter = cast(nn.Parameter, module._parameters[name])
            weights_by_key[weight_memory_key(parameter)] = layer_or_parameter_path(path, name), parameter, tensor
    groups = module_groups_sharing_weights(stored)
    weights: list[dict[Hashable, tuple[str, nn.Parameter, Tensor]]] = []
    for group in groups:
        weights.append({})
        for module in group:
            for key, weight in stored[module].items():
                # A shared weight has the name of the first
                weights[-1].setdefault(key, weight)
    important: Mapping[str, RowAndColumnImportance] = {}
    if budget.inputs is not None and choice_losses is None:
        sized = {
            name: (weight, tensor.shape[-1])
            for weights_by_key in weights
            for name, weight, tensor in weights_by_key.values()
        }
        important = _measured_importance_or_warn(model, budget.inputs, sized)

    def weight_losses_or_none(name: str, tensor: Tensor) -> Sequence[float] | None:
        if choice_losses is not None:
            return choice_losses(name, tensor)
        if budget.inputs is not None and name not in important:
            return (0.0,) * len(CHOICES)
        try:
            return loss_per_choice(tensor, important.get(name))
        except (TypeError, ValueError) as reason:
            raise type(reason)(f"{layer_display_name(name)}: {reason}") from reason

    units = [
        budget_unit_or_none({name: tensor for name, _, tensor in weights_by_key.values()}, weight_losses_or_none)
        for weights_by_key in weights
    ]
    known = [unit for unit in units if unit is not None]
    chosen = dict(zip(known, budget_choices_with_reasons(known, budget), strict=True))
    unknown = BudgetChoice(budget.choices[0], "")
    of_modules = {
        module: unknown if unit is None else chosen[unit]
        for group, unit in zip(groups, units, strict=True)
        for module in group
    }
    for module, _ in module_name_pairs_kept_in_float32(model, budget.compute_dtype):
        if module in of_modules:
            got = of_modules[module]
            of_modules[module] = replace(got, technique=replace(got.technique, compute_dtype=None))
    return of_modules


def _measured_importance_or_warn(
    model: nn.Module, batches: Iterable[Any], weights_and_columns: Mapping[str, tuple[nn.Parameter, int]]
) -> Mapping[str, RowAndColumnImportance]:
    """Return the importance of each weight that batches reach, by its name; warn of the others."""
    important = measure_importance_by_weight(model, batches, weights_and_columns)
    if unseen := [name for name in weights_and_columns if name not in important]:
        text = f"no batch of inputs= reached {abbreviated_layer_names(unseen)}, which get the least bits"
        # The caller of the function that with_model_lock wraps
        warnings.warn(text, UserWarning, stacklevel=7)
    return important


def _tensors_in_stored_shape_by_name(
    module: nn.Module, path: str, parameter_names: Iterable[str]
) -> dict[str, Tensor]:
    """Return parameters of a module in the shapes in which a block-wise technique stores them."""
    tensors: dict[str, Tensor] = {}

    def record_and_return_skeleton(tensor: Tensor, name: str) -> Any:
        tensors[name] = tensor
        return CHOICES[0].skeleton(tensor, name)

    copy_with_stored_parameters(module, CHOICES[0], path, parameter_names, record_and_return_skeleton)
    return tensors
