"""Converts an empty model to the layers and adapters that a file records, and assigns the file's tensors to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.nn.parameter import is_lazy

from lowmem.errors import printable, show
from lowmem.io.metadata import adapters_of, check_object, form_of, record_errors, technique_of
from lowmem.nn.adapted_module import AdaptedModule, table_of
from lowmem.nn.adapter import layout_of
from lowmem.nn.adapter_buffers import CHILD, follow_adapters, keep_buffers
from lowmem.nn.coded_module import format_keys
from lowmem.nn.forms import CodedForm, Form
from lowmem.nn.gathered_weight import check_order
from lowmem.nn.linear import Linear4Bit, gathered_copy
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import LoRA
from lowmem.transforms.adapters import add_placed
from lowmem.transforms.commit import commit
from lowmem.transforms.placement import places_of
from lowmem.transforms.registry import layer_name, module_paths, note_dense, parameters_to_adapt, skip_reason
from lowmem.transforms.store import store_parameters
from lowmem.transforms.ties import keep_shared_biases, weight_key


def convert_skeleton(model: nn.Module, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replace layers of a model on the meta device by empty ones as the file records them, and add adapters.

    Args:
        model: dense, on the meta device.
        metadata: with ``layers`` and maybe ``adapters``.
        tensors: of the file; they give the shapes and dtypes of its adapters.

    Raises:
        ValueError: the records are invalid, or do not fit the model.
    """
    _convert_layers(model, metadata["layers"])
    _add_adapters(model, metadata.get("adapters", {}), tensors)


def _convert_layers(model: nn.Module, records: Mapping[str, object]) -> None:
    by_path = {path: module for module, paths in module_paths(model).items() for path in paths}
    found = _forms_by_parameter(model, by_path, records)
    layers: dict[nn.Module, list[str]] = {}
    unfit: list[str] = []
    for (module, name), (path, form) in found.items():
        kind = type(technique_of(form))
        parameter = _dense(module, name)
        if parameter is None or parameter.dim() < 2 or isinstance(module, StoredModule):
            why = skip_reason(kind, module) or f"it has no parameter {show(name)} of its own to store"
            path = next(path for path, other in by_path.items() if other is module)
            there = f"the model has a {type(module).__name__} there: {why}"
            unfit.append(f"{layer_name(path)} is stored by {kind.__name__}, and {there}")
            continue
        names = layers.setdefault(module, [])
        names.append(name)
        if type(technique_of(found[module, names[0]][1])) is not kind:
            raise ValueError(f"it stores {layer_name(path)} by {kind.__name__}, and the rest of it otherwise")
    if unfit:
        raise ValueError(f"{_listed(unfit, '; ')}; leave them out when the file is made (skip= or --exclude)")
    replacements: dict[nn.Module, nn.Module] = {}
    stored: dict[Any, tuple[str, Form, Any]] = {}  # by the key of a weight
    for module, names in layers.items():

        def store(tensor: Tensor, name: str, module: nn.Module = module) -> Any:
            path, form = found.get((module, name)) or found[module, "weight"]  # the bias of a 16-bit weight
            if isinstance(form, CodedForm):  # each layer has its own compute_dtype
                form = replace(form, compute_dtype=None)
            first, known, skeleton = stored.setdefault(weight_key(tensor), (path, form, _empty(form, tensor, name)))
            if known != form:
                raise ValueError(
                    f"it stores {layer_name(first)} and {layer_name(path)} differently, which share a {name} here"
                )
            return skeleton

        path, forms = found[module, names[0]][0], {name: found[module, name][1] for name in names}
        transposed = [name for name in names if forms[name].transposed]
        made = store_parameters(module, technique_of(forms[names[-1]]), path, names, store, transposed)
        replacements[module] = _gathered(made, path) if any(form.gathered for form in forms.values()) else made
    keep_shared_biases(model, replacements)
    commit(model, replacements)
    note_dense({module: "dense in the file" for module in module_paths(model) if module not in replacements})


def _forms_by_parameter(
    model: nn.Module, by_path: Mapping[str, nn.Module], records: Mapping[str, object]
) -> dict[tuple[nn.Module, str], tuple[str, Form]]:
    """Return the recorded path and form of each stored parameter, also of those that are tied to one."""
    owners: dict[Any, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name in module._parameters:
            parameter = _dense(module, name)
            if parameter is not None:
                owners.setdefault(weight_key(parameter), []).append((module, name))
    found: dict[tuple[nn.Module, str], tuple[str, Form]] = {}
    for path, record in records.items():
        place = _parameter_at(by_path, path)
        with record_errors(f"its record of {layer_name(path)}"):
            form = form_of(record)
        first, known = found.setdefault(place, (path, form))
        if known != form:
            raise ValueError(
                f"it stores {layer_name(first)} and {layer_name(path)} differently, which are one layer here"
            )
    for place, recorded in list(found.items()):
        parameter = _dense(*place)
        for tied in [] if parameter is None else owners[weight_key(parameter)]:
            found.setdefault(tied, recorded)  # a file records only the first of the layers that share a weight
    return found


def _dense(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a parameter that has a shape, or None."""
    parameter = module._parameters.get(name)
    return None if parameter is None or is_lazy(parameter) else parameter


def _empty(form: Form, tensor: Tensor, name: str) -> Any:
    """Return a stored weight of a form, without values."""
    skeleton: Any = technique_of(form).skeleton(tensor, name)
    return replace(skeleton, method=form.method) if isinstance(form, CodedForm) else skeleton


def _gathered(layer: StoredModule, path: str) -> StoredModule:
    """Return a linear layer whose columns are in an order that the file has."""
    if type(layer) is not Linear4Bit or layer.forms["weight"].transposed:
        raise ValueError(
            f"its record of {layer_name(path)} says that columns are gathered, which linear layers alone can: the "
            f"model has a {type(layer).__name__} there"
        )
    return gathered_copy(layer, torch.empty(layer.in_features, dtype=torch.int32, device="meta"))


def _parameter_at(by_path: Mapping[str, nn.Module], path: str) -> tuple[nn.Module, str]:
    """Return the module and the name of a recorded parameter: ``weight`` of a layer, or another by its full name."""
    if path in by_path:
        return by_path[path], "weight"
    parent, _, name = path.rpartition(".")
    module = by_path.get(parent)
    if module is None or name not in module._parameters:
        raise ValueError(f"it has a layer {show(path)} that the model has not: is this its factory?")
    return module, name


def _add_adapters(model: nn.Module, records: object, tensors: Mapping[str, Tensor]) -> None:
    """Give layers the adapters that a file records; all records are checked before one is built."""
    with record_errors("its record of the adapters"):
        records = check_object(records)
    places = places_of(model)
    found: dict[tuple[nn.Module, str], tuple[str, dict[str, tuple[LoRA, bool]]]] = {}
    for place, record in records.items():
        why = adapter_skip_reason(model, places, place)
        if why is not None:
            raise ValueError(f"it has adapters for {layer_name(place)}: {why}; is this its factory?")
        with record_errors(f"its record of the adapters of {layer_name(place)}"):
            adapters = adapters_of(record)
        first, same = found.setdefault(places[place], (place, adapters))
        if same != adapters:
            raise ValueError(
                f"it adapts {layer_name(first)} and {layer_name(place)} differently, which are one layer here"
            )
    parts = [
        (module, parameter, name, technique, active, _prefix(place, parameter, name))
        for (module, parameter), (place, adapters) in found.items()
        for name, (technique, active) in adapters.items()
    ]
    of_tables: dict[tuple[int, str, LoRA], str] = {}  # a file holds the adapter of a shared table once
    for module, _, name, technique, _, prefix in parts:
        if (table := table_of(module)) is not None and f"{prefix}lora_a" in tensors:
            of_tables.setdefault((table, name, technique), prefix)
    dtypes: dict[tuple[nn.Module, str, str], torch.dtype] = {}
    placed: dict[str, dict[nn.Module, dict[str, LoRA]]] = {}
    in_use: dict[nn.Module, dict[str, None]] = {}
    for module, parameter, name, technique, active, prefix in parts:
        if f"{prefix}lora_a" not in tensors and (table := table_of(module)) is not None:
            prefix = of_tables.get((table, name, technique), prefix)
        check_adapter(prefix, technique, module, tensors, parameter)
        dtypes[module, parameter, name] = tensors[f"{prefix}lora_a"].dtype
        placed.setdefault(name, {}).setdefault(module, {})[parameter] = technique
        in_use.setdefault(module, {}).update({name: None} if active else {})
    paths = {module: path for path, module in model.named_modules()}
    for name, techniques in placed.items():
        add_placed(model, name, techniques, paths)
    for module, names in in_use.items():
        cast(AdaptedModule, module).adapters.active = tuple(names)
    if any(f".{CHILD}." in f".{name}" for name in tensors):
        follow_adapters(model)
    else:  # those of all adapters are the base's; ``assign`` copies them
        keep_buffers(model)
    for (module, parameter, name), dtype in dtypes.items():
        cast(AdaptedModule, module).adapters.parts(name)[parameter].to(dtype)  # it may have been cast


def _prefix(place: str, parameter: str, name: str) -> str:
    """Return what the state's names of an adapter's tensors begin with."""
    path = place if parameter == "weight" else place.removesuffix(parameter).rstrip(".")
    return f"{path}.adapters.{name}.{parameter}.".lstrip(".")


def adapter_skip_reason(model: nn.Module, places: Mapping[str, tuple[nn.Module, str]], place: str) -> str | None:
    """Return why a model cannot have an adapter at a place, or None."""
    if place in places:
        return skip_reason(LoRA, places[place][0], chosen=True)
    module = next((one for path, one in model.named_modules(remove_duplicate=False) if path == place), None)
    if module is None:
        return f"the model has no layer {show(place)}"
    reason = skip_reason(LoRA, module, chosen=True)
    if reason is not None:
        return reason
    names = ", ".join(parameters_to_adapt(module))
    return f"the model has a {type(module).__name__} there, whose adapters change {names}"


def check_adapter(
    prefix: str, technique: LoRA, layer: nn.Module, tensors: Mapping[str, Tensor], parameter: str = "weight"
) -> None:
    """Raise a ValueError unless ``tensors`` holds an adapter of the rank of ``technique`` for a layer's parameter.

    Call it before the adapter is allocated, since a damaged file may claim any rank. The names of the adapter's
    tensors begin with ``prefix``.
    """
    for part, shape in layout_of(layer, parameter).shapes(technique.rank).items():
        given = tensors.get(prefix + part)
        if given is None:
            raise ValueError(f"it lacks {printable(prefix + part, 80)}")
        if given.shape != shape or not given.is_floating_point():
            raise ValueError(
                f"{printable(prefix + part, 80)} is {given.dtype} {tuple(given.shape)} in it; the model takes "
                f"{shape} floating point at rank {technique.rank}"
            )


def assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace the model's parameters and buffers by a file's tensors, after all of them were checked.

    Raises:
        ValueError: names, shapes or dtypes differ, or a parameter or buffer would stay on the meta device.
    """
    names: dict[int, list[str]] = {}
    own: dict[int, Tensor] = {}
    extra_states: list[str] = []
    recorded = format_keys(model)  # skipped: the skeletons have the formats that the file records
    for name, value in model.state_dict(keep_vars=True).items():
        if name in recorded:
            continue
        if name.rpartition(".")[2] == _EXTRA_STATE_KEY_SUFFIX:
            extra_states.append(name)
        elif not isinstance(value, Tensor) or is_lazy(value):
            raise ValueError(f"the model's state {show(name)} is a {type(value).__name__}, no tensor with a shape")
        else:
            names.setdefault(id(value), []).append(name)
            own[id(value)] = value
    known = {name for group in names.values() for name in group} | set(extra_states)
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}  # not persistent now
    missing = [group[0] for group in names.values() if not any(name in tensors for name in group)]
    missing += [name for name in extra_states if name not in tensors]
    surplus = [name for name in tensors if name not in known]
    if missing or surplus:
        raise ValueError(
            f"it holds another model than the factory makes: {_named('it lacks', missing)}"
            f"{', and ' if missing and surplus else ''}{_named('the model lacks', surplus)}"
        )
    for path, module in model.named_modules():
        for own_name in module.forms if isinstance(module, StoredModule) else ():
            place = f"{path}.{own_name}_order".lstrip(".")
            order = tensors.get(place)
            if order is not None and order.dtype is torch.int32:
                check_order(order, place)
    found: dict[int, Tensor] = {}
    for key, group in names.items():
        first, *others = [name for name in group if name in tensors]
        given, mine = tensors[first], own[key]
        if given.shape != mine.shape or given.dtype != mine.dtype:
            raise ValueError(
                f"{printable(first, 80)} is {given.dtype} {tuple(given.shape)} in it, and {mine.dtype} "
                f"{tuple(mine.shape)} in the model that the factory makes: let it make the model that was saved"
            )
        for other in others:
            if not torch.equal(tensors[other], given):
                raise ValueError(f"{first} and {other} differ in it, and are one tensor in the model")
        found[key] = nn.Parameter(given, mine.requires_grad) if isinstance(mine, nn.Parameter) else given
    empty = [
        name
        for name, value in (*model.named_parameters(), *model.named_buffers())
        if value.is_meta and id(value) not in found
    ]
    if empty:
        raise ValueError(
            f"{_named('no values are known for', empty)}: what is computed from parameters when the model is made "
            "must be a persistent buffer"
        )
    for module in model.modules():
        for tensors_of in (module._parameters, module._buffers):
            for name, value in tensors_of.items():
                if value is not None and id(value) in found:
                    tensors_of[name] = found[id(value)]  # type: ignore[assignment]
    for name in extra_states:
        model.get_submodule(name.rpartition(".")[0]).set_extra_state(tensors[name])
    follow_adapters(model)


def _named(what: str, names: list[str]) -> str:
    return f"{what} {_listed([printable(name, 80) for name in names], ', ')}" if names else ""


def _listed(parts: list[str], separator: str) -> str:
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return separator.join(parts[:3]) + more
