"""Saves an adapter without its base, and loads one onto a base: lowmem's own files, and other programs'."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lowmem.errors import as_path, is_one_of, printable, quoted, refusal, refusing, show
from lowmem.io.atomic import starts_with
from lowmem.io.checkpoint import how_stored, unwrap
from lowmem.io.container import bytes_of, read, write_tensors
from lowmem.io.formats.gguf.adapter import write_gguf_adapter
from lowmem.io.formats.gguf.container import MAGIC
from lowmem.io.formats.peft.reading import (
    CONFIG,
    PICKLES,
    WEIGHTS,
    AdapterContent,
    adapters_in,
    read_config,
    read_peft,
)
from lowmem.io.formats.peft.writing import write_peft
from lowmem.io.metadata import adapter_record, check_keys, check_object, lora_of, record_errors
from lowmem.io.skeleton import adapter_skip_reason, check_adapter
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter import Adapter
from lowmem.nn.adapter_bank import parameter_of
from lowmem.nn.adapter_buffers import buffers_of, changed_buffers
from lowmem.nn.coded_module import format_keys
from lowmem.nn.fold import without_adapters
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import LoRA
from lowmem.resident import returns_free_pages
from lowmem.transforms.adapters import adapter_layers, adapter_names, add_placed, check_name
from lowmem.transforms.commit import one_at_a_time
from lowmem.transforms.placement import places_of
from lowmem.transforms.refusals import refuse_layers, refuse_model, refuse_peft, refuse_sharded, refuse_wrapped
from lowmem.transforms.registry import check_module, layer_name, module_paths, parameters_to_adapt, place_name

M = TypeVar("M", bound=nn.Module)

FORMATS = ("lowmem", "peft", "gguf")
"""In which an adapter is written."""
_PARTS = ("lora_a", "lora_b")


@one_at_a_time
def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    format: str = "lowmem",
    base_name: str | None = None,
) -> None:
    """Save one adapter of a model, without its base. The write is atomic.

    Buffers of the model that training changed, such as the running statistics of BatchNorm, are saved with it.

    Args:
        model: has the adapter; one that DistributedDataParallel wraps counts as the model inside.
        path: of the file; an existing one is replaced. For ``format="peft"`` and "gguf" nothing may be there yet.
        name: of the adapter; None takes the only one.
        format: "lowmem": a safetensors file, which ``load_adapter`` loads onto the same base only. "peft": a folder
            that ``PeftModel.from_pretrained`` loads, and ``load_adapter``, too; parameters of the base that train
            beside the adapter are saved with it, as ``modules_to_save`` and biases. "gguf": a file for llama.cpp, of
            linear layers and the input embedding of the llama family in transformers; scalings that it has no form of
            are folded into B, and parameters of the base that train are refused.
        base_name: for ``format="peft"``: where ``AutoPeftModel`` finds the base, a path or a name on the Hub.
            None takes the base's name on the Hub, if it has one, since a path means nothing on another machine.

    Raises:
        TypeError: the model is not a module.
        ValueError: no such adapter, ``name=None`` with several, an unknown format, or one that has no form of the
            adapter; the layer is named. Or the model is sharded, or ``base_name`` is given for another format.
        FileExistsError: something is at ``path``, for ``format="peft"`` and "gguf".
        OSError: the file cannot be written; an existing file is unchanged.

    Warns:
        UserWarning: ``format="peft"`` has no form of the dropouts.
    """
    if not is_one_of(format, FORMATS):
        raise ValueError(f"format={show(format)} is none of {', '.join(FORMATS)}")
    if base_name is not None and format != "peft":
        raise ValueError(
            f"base_name={show(base_name)} is for format='peft': files of format={show(format)} name no base"
        )
    check_module(model)
    model = unwrap(model)
    refuse_sharded("save_adapter", model)
    if name is None:
        names = adapter_names(model)
        if len(names) > 1:
            raise ValueError(f"name=None must name one of several adapters: {printable(', '.join(names))}")
        name = names[0] if names else "default"
    layers = adapter_layers(model, name)
    _refuse_layers("save_adapter", places_of(model), model, layers)
    path = as_path("path", path)
    buffers = changed_buffers(model, name)
    if format == "peft":
        write_peft(path, model, layers, base_name, buffers)
    elif format == "gguf":
        if buffers:
            raise ValueError(
                f"training changed {layer_name(min(buffers))}, a buffer, of which GGUF has no form: save the adapter "
                "with format='lowmem' or 'peft'"
            )
        write_gguf_adapter(path, model, name, layers)
    else:
        _write(path, model, name, layers, buffers)


def _write(
    path: Path, model: nn.Module, name: str, layers: Mapping[str, Adapter], buffers: Mapping[str, Tensor]
) -> None:
    """Write lowmem's own file."""
    tensors = {_key(place, part): getattr(adapter, part) for place, adapter in layers.items() for part in _PARTS}
    metadata = {
        **({"buffers": sorted(buffers)} if buffers else {}),
        "kind": "adapter",
        "name": name,
        "base": fingerprint(model, list(layers)),
        "layers": {path: adapter_record(adapter) for path, adapter in layers.items()},
    }
    write_tensors(path, {**tensors, **buffers}, metadata)


class AdapterFacts(NamedTuple):
    """What an adapter's file or folder says of itself."""

    name: str
    rank: int  # of most layers
    base: str | None  # where the base is, or its name on the Hub; None: not said


def adapter_facts(path: Path) -> AdapterFacts:
    """Return what an adapter says, of lowmem or PEFT, without its weights; raises as ``load_adapter``."""
    if path.is_dir():
        config = read_config(path)
        return AdapterFacts("default", config.default.rank, config.base)
    _refuse_foreign(path)
    metadata = read(path).metadata
    with refusing(path, "load the adapter"):
        name, _, records, _ = _parsed(metadata)
    return AdapterFacts(name, Counter(one.rank for one in records.values()).most_common(1)[0][0], None)


def find_adapter(path: Path, name: str | None) -> tuple[Path, str | None]:
    """Return the file or folder of an adapter, and its name, or None if the file or folder tells the name.

    Args:
        path: a file of ``save_adapter``, or a folder of PEFT with one or several adapters.
        name: of the adapter; None takes the only one.

    Raises:
        ValueError: ``path`` has no adapter of that name, or several and ``name`` is None.
        FileError, OSError: as ``load_adapter``, for a file.
    """
    if not path.is_dir():
        return path, name and choose_adapter(path, [adapter_facts(path).name], name)
    found = adapters_in(path)
    chosen = choose_adapter(path, found, name)
    return (path, None) if chosen is None else (found[chosen], chosen)


def choose_adapter(path: Path, names: Collection[str], name: str | None) -> str | None:
    """Return the adapter of a file or folder to use, or None if it has none and no name is given.

    Raises:
        ValueError: as ``find_adapter``.
    """
    listed = printable(", ".join(names)) or "none"
    if name is not None and name not in names:
        raise ValueError(f"--adapter={name!r} is no adapter of {str(path)!r}, which has {listed}")
    if name is None and len(names) > 1:
        raise ValueError(f"{str(path)!r} has several adapters: choose one of {listed} with --adapter")
    return name or next(iter(names), None)


@returns_free_pages
@one_at_a_time
def load_adapter(model: M, path: str | os.PathLike[str], name: str | None = None) -> M:
    """Load an adapter: of lowmem, onto the base that it was trained on, or a folder of PEFT.

    If the model has an adapter of that name with the same layers, ranks, alphas, dropouts and scalings, its values
    are replaced; otherwise a new, active adapter is added. PEFT's folders say nothing of the base's values: shapes
    are checked, names are compared, and the base may be stored otherwise than it was in training. What such a folder
    holds of the base itself (``modules_to_save``, biases) replaces the model's own values, and trains on.

    Args:
        model: the base, with or without adapters. One that DistributedDataParallel wraps counts as the model
            inside; wrap it after an adapter was added, not before.
        path: of a file that ``save_adapter`` wrote, or a folder that PEFT wrote.
        name: of the adapter in the model; None takes the name in the file, and "default" for a folder.

    Returns:
        The model, changed in place.

    Raises:
        TypeError: the model is not a module.
        RuntimeError: inference mode is active, or was when a parameter was made.
        FileError: the file is damaged, of another kind or version, or does not fit the model: another base,
            architecture, rank, shape or dtype; or PEFT's has what lowmem has no form of, as DoRA. The model is left
            as it was.
        OSError: the file cannot be read.

    Warns:
        UserWarning: an adapter was added inside DistributedDataParallel, which does not synchronize its gradients; or
            PEFT's folder names another base than the model.
    """
    if unwrap(model) is not model:
        wrapper: Any = model
        known = {*wrapper.module.parameters()}
        wrapper.module = load_adapter(wrapper.module, path, name)
        if isinstance(model, nn.parallel.DistributedDataParallel) and {*wrapper.module.parameters()} - known:
            warnings.warn(
                f"{type(model).__name__} was made before this adapter was loaded, and does not synchronize its "
                "gradients: load the adapter, then wrap the model",
                stacklevel=4,  # the caller of the function that both decorators wrap
            )
        return model
    refuse_model("load_adapter", model)
    found, places = module_paths(model), places_of(model)
    path = as_path("path", path)
    if path.is_dir():
        content = read_peft(path, model)
        _refuse_layers("load_adapter", places, model, content.techniques)
    else:
        content = _of_file(path, model, places)
    try:
        name = content.name if name is None else name
        check_name(name)
        present = adapter_layers(model, name) if name in adapter_names(model) else {}
        first = {place: place_name(found[places[place][0]][0], places[place][1]) for place in content.techniques}
        own = {first[place]: place for place in content.techniques}  # a layer's first path: its path in the file
        if len(own) < len(content.techniques):
            raise ValueError("it adapts two layers that are one here: it is of another architecture")
        if present and {at: lora_of(adapter_record(part)) for at, part in present.items()} != {
            at: replace(content.techniques[place], dtype=None) for at, place in own.items()
        }:
            raise ValueError(
                f"the model has an adapter {show(name)} of other layers, ranks, alphas, dropouts or scalings; "
                "delete that adapter first, or load this one under another name="
            )
        layers = [places[place][0] for place in content.techniques]
        if any(isinstance(layer, AdaptedModule) and layer.adapters.merged == name for layer in layers):
            raise ValueError(f"the model's adapter {show(name)} is merged: call unmerge_adapter(model) first")
    except (ValueError, TypeError) as reason:
        raise refusal(path, str(reason), "load the adapter") from reason
    if not present:
        placed: dict[nn.Module, dict[str, LoRA]] = {}
        for place, technique in content.techniques.items():
            module, parameter = places[place]
            placed.setdefault(module, {})[parameter] = technique
        refuse_peft(model, placed, freezes=True)
        add_placed(model, name, placed, {module: paths[0] for module, paths in found.items()})
    with torch.no_grad():
        for at, adapter in adapter_layers(model, name).items():
            for part, value in content.tensors[own[at]].items():
                getattr(adapter, part).copy_(value)
        for old, new in content.base_values:
            old.copy_(new)
        base = buffers_of(model, None)
        for at, buffer in buffers_of(model, name).items():
            buffer.copy_(content.buffers.get(at, base[at]))
    for trained in content.trained:
        trained.requires_grad_()
    return model


def _of_file(path: Path, model: nn.Module, places: dict[str, tuple[nn.Module, str]]) -> AdapterContent:
    _refuse_foreign(path)
    file = read(path)
    with refusing(path, "load the adapter"):
        if file.metadata.get("kind") != "adapter":
            raise ValueError("it holds no adapter alone; load it with load(path, factory)")
        name, base, records, buffers = _parsed(file.metadata)
        _refuse_layers("load_adapter", places, model, records)
        for place, technique in records.items():
            why = adapter_skip_reason(model, places, place)
            if why is not None:
                raise ValueError(f"it adapts {layer_name(place)}, and {why}: it is of another architecture")
            module, parameter = places[place]
            check_adapter(_key(place, ""), technique, module, file.tensors, parameter)
        own = buffers_of(model, None)
        for at in buffers:
            given = file.tensors.get(at)
            if at not in own or given is None or given.shape != own[at].shape:
                raise ValueError(
                    f"it holds a buffer {show(at)} that the model has not, or of another shape: it is of another "
                    "architecture"
                )
        surplus = file.tensors.keys() - {_key(place, part) for place in records for part in _PARTS} - {*buffers}
        if surplus:
            raise ValueError(f"it has tensors of no layer that it adapts, as {show(min(surplus))}")
        if fingerprint(model, list(records)) != base:
            raise ValueError(
                "it was trained on another base: the weights, or how they are stored, differ in the layers that it "
                "adapts; load it onto the base that it was saved from"
            )
    tensors = {place: {part: file.tensors[_key(place, part)] for part in _PARTS} for place in records}
    half = {place for place, parts in tensors.items() if {one.dtype for one in parts.values()} == {torch.bfloat16}}
    records |= {place: replace(records[place], dtype=torch.bfloat16) for place in half}
    return AdapterContent(records, tensors, name=name, buffers={at: file.tensors[at] for at in buffers})


def _refuse_layers(
    function: str, places: Mapping[str, tuple[nn.Module, str]], model: nn.Module, names: Iterable[str]
) -> None:
    """Refuse a model with layers at some places that ``function`` cannot take; unknown places are left to others."""
    found, here = module_paths(model), [places[name][0] for name in names if name in places]
    refuse_layers(function, {module: found[module][0] for module in here})


def _refuse_foreign(path: Path) -> None:
    """Raise a FileError that says what another program's file is, and what to load in its place."""
    if path.name in (WEIGHTS, CONFIG, *PICKLES):
        raise refusal(path, f"it is a part of a folder of PEFT: name the folder, {quoted(path.parent)}", "load")
    if starts_with(path, MAGIC):
        raise refusal(path, "it is a GGUF file, and adapters are read from lowmem's files and PEFT's folders", "load")


@one_at_a_time
def fingerprint(model: nn.Module, paths: list[str]) -> str:
    """Return the SHA-256 of the bases of the layers at ``paths``: stored tensors, and how they are stored."""
    places = places_of(model)
    by_path = {place: module for module, all_paths in module_paths(model).items() for place in all_paths}
    sha256 = hashlib.sha256()
    for path in sorted(paths):
        module, parameter = places.get(path) or (by_path[path], "weight")
        base = without_adapters(module) if isinstance(module, AdaptedModule) else module
        record = how_stored(base).get(parameter, {}) if isinstance(base, StoredModule) else {}
        record.pop("method", None)  # it does not change how bytes are decoded
        sha256.update(repr((path, sorted(record.items()))).encode())
        for name, value in sorted(_state_of(base, parameter).items()):
            remedy = "save_adapter(..., format='peft') writes the adapter without the base's fingerprint"
            refuse_wrapped("a fingerprint", f"{path}.{name}".lstrip("."), value, remedy)
            sha256.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
            sha256.update(bytes_of(value))
    return sha256.hexdigest()


def _state_of(base: nn.Module, parameter: str) -> dict[str, Tensor]:
    """Return the part of a layer's state that the parameter's adapter depends on: all of it for a linear layer."""
    if isinstance(base, nn.Linear) or parameter not in parameters_to_adapt(base):
        recorded = format_keys(base)
        return {name: value for name, value in base.state_dict().items() if name not in recorded}
    if isinstance(base, StoredModule) and parameter in base.forms:
        return {name: getattr(base, name) for name in (f"{parameter}_{part}" for part in base.forms[parameter].parts)}
    return {parameter: parameter_of(base, parameter)}


def _parsed(metadata: dict[str, Any]) -> tuple[str, str, dict[str, LoRA], list[str]]:
    """Return an adapter's name, the fingerprint of its base, its technique in each layer, and names of buffers."""
    with record_errors("its metadata"):
        fields = check_keys(metadata, ("kind", "name", "base", "layers"), ("buffers",))
        buffers = fields.get("buffers", [])
        if not isinstance(buffers, list) or not all(isinstance(one, str) for one in buffers):
            raise ValueError(f"buffers={show(buffers)} must be a list of names")
        for key in ("name", "base"):
            if not isinstance(fields[key], str):
                raise ValueError(f"{key}={show(fields[key])} must be a string")
    with record_errors("its record of the layers"):
        layers = check_object(fields["layers"])
        if not layers:
            raise ValueError("it names no layer")
    records = {}
    for place, record in layers.items():
        with record_errors(f"its record of {layer_name(place)}"):
            records[place] = lora_of(record)
    return fields["name"], fields["base"], records, buffers


def _key(path: str, part: str) -> str:
    return f"{path}.{part}" if path else part
