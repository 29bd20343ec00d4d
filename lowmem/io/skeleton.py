"""Builds a model on the meta device with the layers that a file records, and assigns the file's tensors to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.nn.parameter import is_lazy

from lowmem.errors import printable, show
from lowmem.io.metadata import adapters_of, check_object, flags_of, record_errors, technique_of
from lowmem.nn.adapted_module import AdaptedModule, table_of
from lowmem.nn.adapter import layout_of
from lowmem.nn.coded_module import format_keys
from lowmem.nn.gathered_weight import check_order
from lowmem.nn.linear import Linear4Bit, gathered_copy
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import EightBit, FourBit, Half, LoRA
from lowmem.transforms.adapters import add_placed
from lowmem.transforms.commit import commit
from lowmem.transforms.meta import make_on_meta
from lowmem.transforms.placement import places_of
from lowmem.transforms.registry import layer_name, module_paths, skip_reason
from lowmem.transforms.store import store_parameters
from lowmem.transforms.ties import keep_shared_biases, weight_key

__all__ = ["adapter_skip_reason", "assign", "build", "check_adapter", "convert_skeleton"]


def build(factory: Callable[[], nn.Module], metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a meta-device skeleton of the model: dense parameters and converted layers, all without values.

    The global random state does not change.

    Args:
        factory: makes the dense model.
        metadata: of the file.
        tensors: of the file, for the shapes and dtypes of its adapters.

    Raises:
        TypeError, ValueError: a factory that ``make_on_meta`` rejects, or layers in the file that the model has not.
    """
    model = make_on_meta(factory)
    try:
        convert_skeleton(model, metadata, tensors)
    except TypeError as reason:
        raise ValueError(f"its record of the layers is not lowmem's ({reason})") from reason
    return model


def convert_skeleton(model: nn.Module, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replace layers by meta-device skeletons of the converted ones that the file records, and add adapters.

    Args:
        model: dense, on the meta device.
        metadata: with ``layers`` and maybe ``adapters``.
        tensors: of the file, for the shapes and dtypes of its adapters.

    Raises:
        ValueError: layers in the file that the model has not.
    """
    _convert_layers(model, metadata["layers"])
    _add_adapters(model, metadata.get("adapters", {}), tensors)


def _convert_layers(model: nn.Module, records: Mapping[str, object]) -> None:
    owners: dict[Any, list[tuple[nn.Module, str]]] = {}
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and not is_lazy(parameter):
                owners.setdefault(weight_key(parameter), []).append((owner, name))
    by_path = {path: module for module, paths in module_paths(model).items() for path in paths}
    found: dict[tuple[nn.Module, str], tuple[str, Half | EightBit | FourBit, str | None, frozenset[str]]] = {}
    for path, record in records.items():
        module, name = _parameter_at(by_path, path)
        with record_errors(f"its record of {layer_name(path)}"):
            technique, method = technique_of(record)
        flags = flags_of(cast("dict[str, Any]", record))
        first, *same = found.setdefault((module, name), (path, technique, method, flags))
        if same != [technique, method, flags]:
            raise ValueError(
                f"it stores {layer_name(first)} and {layer_name(path)} differently, which are one layer here"
            )
    for (module, name), record in list(found.items()):
        parameter = module._parameters.get(name)
        for tied in [] if parameter is None or is_lazy(parameter) else owners[weight_key(parameter)]:
            found.setdefault(tied, record)  # a file records only the first of the layers that share a weight
    unfit: list[str] = []
    stored: dict[Any, tuple[str, tuple[Half | EightBit | FourBit, frozenset[str]], Any]] = {}
    layers: dict[nn.Module, tuple[Half | EightBit | FourBit, list[str]]] = {}
    for (module, name), (path, technique, *_) in found.items():
        parameter = module._parameters.get(name)
        if parameter is None or is_lazy(parameter) or parameter.dim() < 2 or isinstance(module, StoredModule):
            why = skip_reason(type(technique), module) or f"it has no parameter {show(name)} of its own to store"
            path = next(path for path, other in by_path.items() if other is module)
            unfit.append(
                f"{layer_name(path)} is stored by {type(technique).__name__}, and the model has a "
                f"{type(module).__name__} there: {why}"
            )
            continue
        how, names = layers.setdefault(module, (technique, []))
        names.append(name)
        if type(how) is not type(technique):
            raise ValueError(
                f"it stores {layer_name(path)} by {type(technique).__name__}, and the rest of it otherwise"
            )
        layers[module] = technique, names
    if unfit:
        raise ValueError(f"{_listed(unfit, '; ')}; leave them out when the file is made (skip= or --exclude)")
    replacements: dict[nn.Module, nn.Module] = {}
    for module, (technique, names) in layers.items():

        def store(tensor: Tensor, name: str, module: nn.Module = module) -> Any:
            path, how, method, flags = found.get((module, name)) or (*found[module, "weight"][:3], frozenset())
            how = replace(how, compute_dtype=None) if isinstance(how, FourBit | EightBit) else how
            skeleton: Any = how.skeleton(tensor, name)
            skeleton = skeleton if method is None else replace(skeleton, method=method)
            as_told = how, flags
            first, before, skeleton = stored.setdefault(weight_key(tensor), (path, as_told, skeleton))
            if before != as_told:
                raise ValueError(
                    f"it stores {layer_name(first)} and {layer_name(path)} differently, which share a {name} here"
                )
            return skeleton

        path = found[module, names[0]][0]
        transposed = [name for name in names if "transposed" in found[module, name][3]]
        made = store_parameters(module, technique, path, names, store, transposed)
        gathered = [name for name in names if "gathered" in found[module, name][3]]
        replacements[module] = _gathered(made, path) if gathered else made
    keep_shared_biases(model, replacements)
    commit(model, replacements)


def _gathered(layer: StoredModule, path: str) -> StoredModule:
    """Return a layer whose columns are in an order that the file has.

    Raises:
        ValueError: it is no linear layer.
    """
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
    wanted: dict[nn.Module, dict[str, dict[str, tuple[LoRA, bool]]]] = {}  # by layer, by adapter, by parameter
    prefixes: dict[tuple[nn.Module, str, str], str] = {}
    of_tables: dict[tuple[int | None, str, LoRA], str] = {}
    for (module, parameter), (place, adapters) in found.items():
        for name, (technique, _) in adapters.items() if table_of(module) is not None else ():
            prefix = _prefix(place, parameter, name)
            if f"{prefix}lora_a" in tensors:
                of_tables.setdefault((table_of(module), name, technique), prefix)
    for (module, parameter), (place, adapters) in found.items():
        for name, (technique, active) in adapters.items():
            prefix = _prefix(place, parameter, name)
            if f"{prefix}lora_a" not in tensors:  # a file holds the adapter of a shared table once
                prefix = of_tables.get((table_of(module), name, technique), prefix)
            prefixes[module, parameter, name] = prefix
            check_adapter(prefix, technique, module, tensors, parameter)
            wanted.setdefault(module, {}).setdefault(name, {})[parameter] = technique, active
    paths = {module: path for path, module in model.named_modules()}
    for name in dict.fromkeys(name for of_layer in wanted.values() for name in of_layer):
        placed = {
            module: {parameter: technique for parameter, (technique, _) in of_layer[name].items()}
            for module, of_layer in wanted.items()
            if name in of_layer
        }
        add_placed(model, name, placed, paths)
    for module, of_layer in wanted.items():
        bank = cast(AdaptedModule, module).adapters
        bank.active = tuple(n for n, parts in of_layer.items() if any(active for _, active in parts.values()))
        for name in bank.names:
            for parameter, adapter in bank.parts(name).items():
                adapter.to(tensors[f"{prefixes[module, parameter, name]}lora_a"].dtype)  # it may have been cast


def _prefix(place: str, parameter: str, name: str) -> str:
    """Return what the state's names of an adapter's tensors begin with."""
    path = place if parameter == "weight" else place.removesuffix(parameter).rstrip(".")
    return f"{path}.adapters.{name}.{parameter}.".lstrip(".")


def adapter_skip_reason(model: nn.Module, places: Mapping[str, tuple[nn.Module, str]], place: str) -> str | None:
    """Return why a model cannot have an adapter at a place, or None."""
    if place in places:
        return skip_reason(LoRA, places[place][0], chosen=True)
    module = next((one for path, one in model.named_modules(remove_duplicate=False) if path == place), None)
    return f"the model has no layer {show(place)}" if module is None else skip_reason(LoRA, module, chosen=True)


def check_adapter(
    prefix: str, technique: LoRA, layer: nn.Module, tensors: Mapping[str, Tensor], parameter: str = "weight"
) -> None:
    """Raise a ValueError unless ``tensors`` holds an adapter of the rank of ``technique`` for a layer's parameter.

    It is called before an adapter is allocated, since a damaged file may claim any rank.

    Args:
        prefix: of the names of the adapter's tensors.
        technique: with the rank.
        layer: dense, or the converted layer.
        tensors: of the file, by name.
        parameter: which the adapter changes.
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


def _named(what: str, names: list[str]) -> str:
    return f"{what} {_listed([printable(name, 80) for name in names], ', ')}" if names else ""


def _listed(parts: list[str], separator: str) -> str:
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return separator.join(parts[:3]) + more
