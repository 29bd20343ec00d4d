"""Converts an empty model to the layers and adapters that a file records, and assigns the file's tensors to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.nn.parameter import is_lazy

from lowmem.errors import printable_line, short_repr
from lowmem.io.metadata_records import (
    checked_json_object,
    parse_form_record,
    parse_loras_and_active_flags_by_name,
    technique_that_stores_form,
    value_errors_with_part,
)
from lowmem.nn.adapted_module import AdaptedModule, embedding_table_id_or_none
from lowmem.nn.adapter import parameter_layout
from lowmem.nn.adapter_buffers import CHILD, discard_inactive_buffers, sync_buffers_with_adapters
from lowmem.nn.forms import CodedForm, Form
from lowmem.nn.gathered_weight import check_column_permutation
from lowmem.nn.linear import Linear4Bit, shallow_copy_with_column_order
from lowmem.nn.quantized_module import state_dict_keys_of_formats
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import LoRA
from lowmem.transforms.adapter_placement import adaptable_module_and_name_by_path
from lowmem.transforms.converted_copies import copy_with_stored_parameters
from lowmem.transforms.module_registry import (
    adaptable_parameter_names,
    all_paths_by_module,
    conversion_skip_reason,
    layer_display_name,
    set_or_clear_dense_reasons,
)
from lowmem.transforms.module_replacement import commit_replacements_and_freeze_if_adapted
from lowmem.transforms.named_adapters import add_adapter_and_freeze_rest
from lowmem.transforms.tied_weights import restore_shared_biases_to_dense, weight_memory_key

_RecordedAdapters: TypeAlias = dict[tuple[nn.Module, str], tuple[str, dict[str, tuple[LoRA, bool]]]]
"""By the module and parameter that they change: the recorded path, and each adapter by name, and whether active."""


def replace_layers_and_add_adapters(
    model: nn.Module, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Replace layers of a model on the meta device by empty ones as the file records them, and add adapters.

    Args:
        model: dense, on the meta device.
        metadata: with ``layers`` and maybe ``adapters``.
        tensors: of the file; they give the shapes and dtypes of its adapters.

    Raises:
        ValueError: the records are invalid, or do not fit the model.
    """
    _replace_recorded_layers(model, metadata["layers"])
    with value_errors_with_part("its record of the adapters"):
        records = checked_json_object(metadata.get("adapters", {}))
    adapters_by_parameter = _recorded_adapters_by_parameter(model, records)
    _add_recorded_adapters(model, adapters_by_parameter, tensors)
    if any(f".{CHILD}." in f".{name}" for name in tensors):
        sync_buffers_with_adapters(model)
    else:
        # Those of all adapters are the base's; ``assign`` copies them
        discard_inactive_buffers(model)


def _checked_names_to_store_by_module(
    modules_by_path: Mapping[str, nn.Module], paths_and_forms: Mapping[tuple[nn.Module, str], tuple[str, Form]]
) -> dict[nn.Module, list[str]]:
    """Return the names of the parameters that each module stores; raise for modules that cannot."""
    layers: dict[nn.Module, list[str]] = {}
    unfit: list[str] = []
    for (module, name), (path, form) in paths_and_forms.items():
        kind = type(technique_that_stores_form(form))
        parameter = _non_lazy_parameter_or_none(module, name)
        if parameter is None or parameter.dim() < 2 or isinstance(module, StoredModule):
            why = (
                conversion_skip_reason(kind, module) or f"it has no parameter {short_repr(name)} of its own to store"
            )
            path = next(path for path, other in modules_by_path.items() if other is module)
            there = f"the model has a {type(module).__name__} there: {why}"
            unfit.append(f"{layer_display_name(path)} is stored by {kind.__name__}, and {there}")
            continue
        names = layers.setdefault(module, [])
        names.append(name)
        if type(technique_that_stores_form(paths_and_forms[module, names[0]][1])) is not kind:
            raise ValueError(f"it stores {layer_display_name(path)} by {kind.__name__}, and the rest of it otherwise")
    if unfit:
        what = _first_three_joined_and_more_count(unfit, "; ")
        raise ValueError(f"{what}; leave them out when the file is made (skip= or --exclude)")
    return layers


def _replace_recorded_layers(model: nn.Module, records: Mapping[str, object]) -> None:
    """Replace layers by empty ones; a layer that the file does not record gets that as its reason to be dense."""
    modules_by_path = {path: module for module, paths in all_paths_by_module(model).items() for path in paths}
    paths_and_forms = _paths_and_forms_by_parameter(model, modules_by_path, records)
    replacements: dict[nn.Module, nn.Module] = {}
    # By the key of a weight
    stored: dict[Any, tuple[str, Form, Any]] = {}
    for module, names in _checked_names_to_store_by_module(modules_by_path, paths_and_forms).items():

        def shared_empty_weight(dense: Tensor, parameter_name: str, module: nn.Module = module) -> Any:
            path, form = (
                paths_and_forms.get((module, parameter_name)) or paths_and_forms[module, "weight"]
            )  # the bias of a 16-bit weight
            # Each layer has its own compute_dtype
            if isinstance(form, CodedForm):
                form = replace(form, compute_dtype=None)
            first, known, skeleton = stored.setdefault(
                weight_memory_key(dense), (path, form, _empty_stored_weight(form, dense, parameter_name))
            )
            if known != form:
                raise ValueError(
                    f"it stores {layer_display_name(first)} and {layer_display_name(path)} differently, which share "
                    f"a {parameter_name} here"
                )
            return skeleton

        path, forms = paths_and_forms[module, names[0]][0], {name: paths_and_forms[module, name][1] for name in names}
        transposed = [name for name in names if forms[name].transposed]
        made = copy_with_stored_parameters(
            module, technique_that_stores_form(forms[names[-1]]), path, names, shared_empty_weight, transposed
        )
        replacements[module] = (
            _linear_copy_with_empty_column_order(made, path)
            if any(form.gathered for form in forms.values())
            else made
        )
    restore_shared_biases_to_dense(model, replacements)
    commit_replacements_and_freeze_if_adapted(model, replacements)
    set_or_clear_dense_reasons(
        {module: "dense in the file" for module in all_paths_by_module(model) if module not in replacements}
    )


def _paths_and_forms_by_parameter(
    model: nn.Module, modules_by_path: Mapping[str, nn.Module], records: Mapping[str, object]
) -> dict[tuple[nn.Module, str], tuple[str, Form]]:
    """Return the recorded path and form of each stored parameter, also of those that are tied to one."""
    owners: dict[Any, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name in module._parameters:
            parameter = _non_lazy_parameter_or_none(module, name)
            if parameter is not None:
                owners.setdefault(weight_memory_key(parameter), []).append((module, name))
    paths_and_forms: dict[tuple[nn.Module, str], tuple[str, Form]] = {}
    for path, record in records.items():
        place = _module_and_parameter_name_or_weight(modules_by_path, path)
        with value_errors_with_part(f"its record of {layer_display_name(path)}"):
            form = parse_form_record(record)
        first, known = paths_and_forms.setdefault(place, (path, form))
        if known != form:
            raise ValueError(
                f"it stores {layer_display_name(first)} and {layer_display_name(path)} differently, which are one "
                "layer here"
            )
    for place, recorded in list(paths_and_forms.items()):
        parameter = _non_lazy_parameter_or_none(*place)
        for tied in [] if parameter is None else owners[weight_memory_key(parameter)]:
            paths_and_forms.setdefault(
                tied, recorded
            )  # a file records only the first of the layers that share a weight
    return paths_and_forms


def _non_lazy_parameter_or_none(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a parameter that has a shape, or None."""
    parameter = module._parameters.get(name)
    return None if parameter is None or is_lazy(parameter) else parameter


def _empty_stored_weight(form: Form, dense: Tensor, parameter_name: str) -> Any:
    """Return a stored weight of a form, without values."""
    skeleton: Any = technique_that_stores_form(form).skeleton(dense, parameter_name)
    return replace(skeleton, method=form.method) if isinstance(form, CodedForm) else skeleton


def _linear_copy_with_empty_column_order(layer: StoredModule, path: str) -> StoredModule:
    """Return a linear layer whose columns are in an order that the file has."""
    if type(layer) is not Linear4Bit or layer.forms["weight"].transposed:
        raise ValueError(
            f"its record of {layer_display_name(path)} says that columns are gathered, which linear layers alone "
            "can: the "
            f"model has a {type(layer).__name__} there"
        )
    return shallow_copy_with_column_order(layer, torch.empty(layer.in_features, dtype=torch.int32, device="meta"))


def _module_and_parameter_name_or_weight(
    modules_by_path: Mapping[str, nn.Module], path: str
) -> tuple[nn.Module, str]:
    """Return the module and the name of a recorded parameter: ``weight`` of a layer, or another by its full name."""
    if path in modules_by_path:
        return modules_by_path[path], "weight"
    parent, _, name = path.rpartition(".")
    module = modules_by_path.get(parent)
    if module is None or name not in module._parameters:
        raise ValueError(f"it has a layer {short_repr(path)} that the model has not: is this its factory?")
    return module, name


def _recorded_adapters_by_parameter(model: nn.Module, records: Mapping[str, object]) -> _RecordedAdapters:
    """Return the adapters that a file records, after all of them were checked against the model."""
    places = adaptable_module_and_name_by_path(model)
    adapters_by_parameter: _RecordedAdapters = {}
    for place, record in records.items():
        why = adapter_skip_reason_or_none(model, places, place)
        if why is not None:
            raise ValueError(f"it has adapters for {layer_display_name(place)}: {why}; is this its factory?")
        with value_errors_with_part(f"its record of the adapters of {layer_display_name(place)}"):
            adapters = parse_loras_and_active_flags_by_name(record)
        first, same = adapters_by_parameter.setdefault(places[place], (place, adapters))
        if same != adapters:
            raise ValueError(
                f"it adapts {layer_display_name(first)} and {layer_display_name(place)} differently, which are one "
                "layer here"
            )
    return adapters_by_parameter


def _add_recorded_adapters(
    model: nn.Module, adapters_by_parameter: _RecordedAdapters, tensors: Mapping[str, Tensor]
) -> None:
    """Give layers adapters in the dtypes of a file's tensors, active where the file says so."""
    parts = [
        (module, parameter, name, technique, active, _adapter_tensor_prefix(place, parameter, name))
        for (module, parameter), (place, adapters) in adapters_by_parameter.items()
        for name, (technique, active) in adapters.items()
    ]
    # A file holds the adapter of a shared table once
    of_tables: dict[tuple[int, str, LoRA], str] = {}
    for module, _, name, technique, _, prefix in parts:
        if (table := embedding_table_id_or_none(module)) is not None and f"{prefix}lora_a" in tensors:
            of_tables.setdefault((table, name, technique), prefix)
    dtypes: dict[tuple[nn.Module, str, str], torch.dtype] = {}
    placed: dict[str, dict[nn.Module, dict[str, LoRA]]] = {}
    in_use: dict[nn.Module, dict[str, None]] = {}
    for module, parameter, name, technique, active, prefix in parts:
        if f"{prefix}lora_a" not in tensors and (table := embedding_table_id_or_none(module)) is not None:
            prefix = of_tables.get((table, name, technique), prefix)
        check_adapter_tensor_shapes(prefix, technique, module, tensors, parameter)
        dtypes[module, parameter, name] = tensors[f"{prefix}lora_a"].dtype
        placed.setdefault(name, {}).setdefault(module, {})[parameter] = technique
        in_use.setdefault(module, {}).update({name: None} if active else {})
    paths = {module: path for path, module in model.named_modules()}
    for name, techniques in placed.items():
        add_adapter_and_freeze_rest(model, name, techniques, paths)
    for module, names in in_use.items():
        cast(AdaptedModule, module).adapters.active = tuple(names)
    for (module, parameter, name), dtype in dtypes.items():
        cast(AdaptedModule, module).adapters.adapters_by_parameter(name)[parameter].to(dtype)  # it may have been cast


def _adapter_tensor_prefix(parameter_path: str, parameter: str, adapter_name: str) -> str:
    """Return what the state's names of an adapter's tensors begin with."""
    path = parameter_path if parameter == "weight" else parameter_path.removesuffix(parameter).rstrip(".")
    return f"{path}.adapters.{adapter_name}.{parameter}.".lstrip(".")


def adapter_skip_reason_or_none(
    model: nn.Module, parameters_by_path: Mapping[str, tuple[nn.Module, str]], parameter_path: str
) -> str | None:
    """Return why a model cannot have an adapter at a place, or None."""
    if parameter_path in parameters_by_path:
        return conversion_skip_reason(LoRA, parameters_by_path[parameter_path][0], user_selected=True)
    module = next(
        (candidate for path, candidate in model.named_modules(remove_duplicate=False) if path == parameter_path), None
    )
    if module is None:
        return f"the model has no layer {short_repr(parameter_path)}"
    reason = conversion_skip_reason(LoRA, module, user_selected=True)
    if reason is not None:
        return reason
    names = ", ".join(adaptable_parameter_names(module))
    return f"the model has a {type(module).__name__} there, whose adapters change {names}"


def check_adapter_tensor_shapes(
    prefix: str, technique: LoRA, layer: nn.Module, tensors: Mapping[str, Tensor], parameter: str = "weight"
) -> None:
    """Raise a ValueError unless ``tensors`` holds an adapter of the rank of ``technique`` for a layer's parameter.

    Call it before the adapter is allocated, since a damaged file may claim any rank. The names of the adapter's
    tensors begin with ``prefix``.
    """
    for part, shape in parameter_layout(layer, parameter).lora_matrix_shapes(technique.rank).items():
        tensor = tensors.get(prefix + part)
        if tensor is None:
            raise ValueError(f"it lacks {printable_line(prefix + part, 80)}")
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{printable_line(prefix + part, 80)} is {tensor.dtype} {tuple(tensor.shape)} in it; the model takes "
                f"{shape} floating point at rank {technique.rank}"
            )


def check_and_assign_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace the model's parameters and buffers by a file's tensors, after all of them were checked.

    Raises:
        ValueError: names, shapes or dtypes differ, or a parameter or buffer would stay on the meta device.
    """
    names: dict[int, list[str]] = {}
    model_tensors: dict[int, Tensor] = {}
    extra_states: list[str] = []
    # Skipped: the skeletons have the formats that the file records
    recorded = state_dict_keys_of_formats(model)
    for name, value in model.state_dict(keep_vars=True).items():
        if name in recorded:
            continue
        if name.rpartition(".")[2] == _EXTRA_STATE_KEY_SUFFIX:
            extra_states.append(name)
        elif not isinstance(value, Tensor) or is_lazy(value):
            raise ValueError(
                f"the model's state {short_repr(name)} is a {type(value).__name__}, no tensor with a shape"
            )
        else:
            names.setdefault(id(value), []).append(name)
            model_tensors[id(value)] = value
    known = {name for group in names.values() for name in group} | set(extra_states)
    # Not persistent now
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    missing = [group[0] for group in names.values() if not any(name in tensors for name in group)]
    missing += [name for name in extra_states if name not in tensors]
    surplus = [name for name in tensors if name not in known]
    if missing or surplus:
        raise ValueError(
            f"it holds another model than the factory makes: {_names_message_or_empty('it lacks', missing)}"
            f"{', and ' if missing and surplus else ''}{_names_message_or_empty('the model lacks', surplus)}"
        )
    for path, module in model.named_modules():
        for own_name in module.forms if isinstance(module, StoredModule) else ():
            place = f"{path}.{own_name}_order".lstrip(".")
            order = tensors.get(place)
            if order is not None and order.dtype is torch.int32:
                check_column_permutation(order, place)
    new_tensors: dict[int, Tensor] = {}
    for key, group in names.items():
        first, *others = [name for name in group if name in tensors]
        file_tensor, model_tensor = tensors[first], model_tensors[key]
        if file_tensor.shape != model_tensor.shape or file_tensor.dtype != model_tensor.dtype:
            raise ValueError(
                f"{printable_line(first, 80)} is {file_tensor.dtype} {tuple(file_tensor.shape)} in it, and "
                f"{model_tensor.dtype} "
                f"{tuple(model_tensor.shape)} in the model that the factory makes: let it make the model that was "
                "saved"
            )
        for other in others:
            if not torch.equal(tensors[other], file_tensor):
                raise ValueError(f"{first} and {other} differ in it, and are one tensor in the model")
        new_tensors[key] = (
            nn.Parameter(file_tensor, model_tensor.requires_grad)
            if isinstance(model_tensor, nn.Parameter)
            else file_tensor
        )
    empty = [
        name
        for name, value in (*model.named_parameters(), *model.named_buffers())
        if value.is_meta and id(value) not in new_tensors
    ]
    if empty:
        raise ValueError(
            f"{_names_message_or_empty('no values are known for', empty)}: what is computed from parameters when the "
            "model is made "
            "must be a persistent buffer"
        )
    for module in model.modules():
        for tensors_of in (module._parameters, module._buffers):
            for name, value in tensors_of.items():
                if value is not None and id(value) in new_tensors:
                    tensors_of[name] = new_tensors[id(value)]  # type: ignore[assignment]
    for name in extra_states:
        model.get_submodule(name.rpartition(".")[0]).set_extra_state(tensors[name])
    sync_buffers_with_adapters(model)


def _names_message_or_empty(message_prefix: str, names: list[str]) -> str:
    return (
        f"{message_prefix} {_first_three_joined_and_more_count([printable_line(name, 80) for name in names], ', ')}"
        if names
        else ""
    )


def _first_three_joined_and_more_count(texts: list[str], separator: str) -> str:
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return separator.join(texts[:3]) + more
