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

from lowmem.errors import (
    checked_path,
    file_error,
    is_one_of,
    printable_line,
    quoted_path,
    short_repr,
    value_errors_as_file_errors,
)
from lowmem.io.checkpoint import checked_form_records_without_bias, unwrap_data_parallel
from lowmem.io.filesystem import has_magic_bytes
from lowmem.io.formats.gguf.gguf_adapter import write_gguf_adapter
from lowmem.io.formats.gguf.gguf_file import MAGIC
from lowmem.io.formats.peft.peft_reader import (
    CONFIG,
    PICKLES,
    WEIGHTS,
    AdapterContent,
    adapter_folders_by_name,
    read_peft_config,
    read_peft_content,
)
from lowmem.io.formats.peft.peft_writer import write_peft_folder
from lowmem.io.lowmem_file import tensor_bytes_view, verify_and_map_file, write_tensors_returning_digest
from lowmem.io.meta_loading import adapter_skip_reason_or_none, check_adapter_tensor_shapes
from lowmem.io.metadata_records import (
    adapter_to_record_dict,
    checked_json_object,
    checked_json_object_with_keys,
    parse_lora_record,
    value_errors_with_part,
)
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter import Adapter
from lowmem.nn.adapter_bank import unadapted_parameter
from lowmem.nn.adapter_buffers import buffers_changed_by_adapter, buffers_of_adapter_or_base
from lowmem.nn.fold import unadapted_shallow_copy
from lowmem.nn.quantized_module import state_dict_keys_of_formats
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import LoRA
from lowmem.resident import release_memory_after_call
from lowmem.transforms.adapter_placement import adaptable_module_and_name_by_path
from lowmem.transforms.model_checks import (
    check_layers_are_changeable,
    check_model_is_changeable,
    check_model_not_sharded,
    check_no_foreign_tensor_class,
    check_no_peft_conflict,
)
from lowmem.transforms.module_registry import (
    adaptable_parameter_names,
    all_paths_by_module,
    check_is_module,
    layer_display_name,
    layer_or_parameter_path,
)
from lowmem.transforms.module_replacement import with_model_lock
from lowmem.transforms.named_adapters import (
    adapter_layers,
    adapter_names,
    add_adapter_and_freeze_rest,
    check_adapter_name,
)

M = TypeVar("M", bound=nn.Module)

FORMATS = ("lowmem", "peft", "gguf")
"""In which an adapter is written."""
_PARTS = ("lora_a", "lora_b")


@with_model_lock
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
        raise ValueError(f"format={short_repr(format)} is none of {', '.join(FORMATS)}")
    if base_name is not None and format != "peft":
        raise ValueError(
            f"base_name={short_repr(base_name)} is for format='peft': files of format={short_repr(format)} name no "
            "base"
        )
    check_is_module(model)
    model = unwrap_data_parallel(model)
    check_model_not_sharded("save_adapter", model)
    if name is None:
        names = adapter_names(model)
        if len(names) > 1:
            raise ValueError(f"name=None must name one of several adapters: {printable_line(', '.join(names))}")
        name = names[0] if names else "default"
    layers = adapter_layers(model, name)
    _check_known_layers_are_changeable("save_adapter", adaptable_module_and_name_by_path(model), model, layers)
    path = checked_path("path", path)
    buffers = buffers_changed_by_adapter(model, name)
    if format == "peft":
        write_peft_folder(path, model, layers, base_name, buffers)
    elif format == "gguf":
        if buffers:
            raise ValueError(
                f"training changed {layer_display_name(min(buffers))}, a buffer, of which GGUF has no form: save the "
                "adapter "
                "with format='lowmem' or 'peft'"
            )
        write_gguf_adapter(path, model, name, layers)
    else:
        _write_lowmem_adapter(path, model, name, layers, buffers)


def _write_lowmem_adapter(
    path: Path, model: nn.Module, name: str, adapters_by_path: Mapping[str, Adapter], buffers: Mapping[str, Tensor]
) -> None:
    """Write lowmem's own file."""
    tensors = {
        _adapter_tensor_name(place, part): getattr(adapter, part)
        for place, adapter in adapters_by_path.items()
        for part in _PARTS
    }
    metadata = {
        **({"buffers": sorted(buffers)} if buffers else {}),
        "kind": "adapter",
        "name": name,
        "base": base_layers_sha256(model, list(adapters_by_path)),
        "layers": {path: adapter_to_record_dict(adapter) for path, adapter in adapters_by_path.items()},
    }
    write_tensors_returning_digest(path, {**tensors, **buffers}, metadata)


class AdapterFileSummary(NamedTuple):
    """What an adapter's file or folder says of itself."""

    name: str
    rank: int  # of most layers
    base: str | None  # where the base is, or its name on the Hub; None: not said
    base_revision: str | None  # of a name on the Hub; None: the main branch, or not said


def read_adapter_summary(path: Path) -> AdapterFileSummary:
    """Return what an adapter says, of lowmem or PEFT, without its weights; raises as ``load_adapter``."""
    if path.is_dir():
        config = read_peft_config(path)
        return AdapterFileSummary("default", config.default.rank, config.base, config.base_revision)
    _check_not_peft_part_or_gguf(path)
    metadata = verify_and_map_file(path).metadata
    with value_errors_as_file_errors(path, "load the adapter"):
        adapter = _parse_adapter_metadata(metadata)
    rank = Counter(technique.rank for technique in adapter.techniques.values()).most_common(1)[0][0]
    return AdapterFileSummary(adapter.name, rank, None, None)


def resolve_adapter_path_and_name(path: Path, requested_name: str | None) -> tuple[Path, str | None]:
    """Return the file or folder of an adapter, and its name, or None if the file or folder tells the name.

    Args:
        path: a file of ``save_adapter``, or a folder of PEFT with one or several adapters.
        name: of the adapter; None takes the only one.

    Raises:
        ValueError: ``path`` has no adapter of that name, or several and ``name`` is None.
        FileError, OSError: as ``load_adapter``, for a file.
    """
    if not path.is_dir():
        return path, requested_name and choose_adapter_name_or_none(
            path, [read_adapter_summary(path).name], requested_name
        )
    folders_by_name = adapter_folders_by_name(path)
    chosen = choose_adapter_name_or_none(path, folders_by_name, requested_name)
    return (path, None) if chosen is None else (folders_by_name[chosen], chosen)


def choose_adapter_name_or_none(
    path: Path, available_names: Collection[str], requested_name: str | None
) -> str | None:
    """Return the adapter of a file or folder to use, or None if it has none and no name is given.

    Raises:
        ValueError: as ``resolve_adapter_path_and_name``.
    """
    listed = printable_line(", ".join(available_names)) or "none"
    if requested_name is not None and requested_name not in available_names:
        raise ValueError(f"--adapter={requested_name!r} is no adapter of {str(path)!r}, which has {listed}")
    if requested_name is None and len(available_names) > 1:
        raise ValueError(f"{str(path)!r} has several adapters: choose one of {listed} with --adapter")
    return requested_name or next(iter(available_names), None)


@release_memory_after_call
@with_model_lock
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
    if unwrap_data_parallel(model) is not model:
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
    check_model_is_changeable("load_adapter", model)
    paths_by_module, places = all_paths_by_module(model), adaptable_module_and_name_by_path(model)
    path = checked_path("path", path)
    if path.is_dir():
        content = read_peft_content(path, model)
        _check_known_layers_are_changeable("load_adapter", places, model, content.techniques)
    else:
        content = _read_checked_lowmem_adapter_content(path, model, places)
    try:
        name = content.name if name is None else name
        check_adapter_name(name)
        present = adapter_layers(model, name) if name in adapter_names(model) else {}
        first = {
            place: layer_or_parameter_path(paths_by_module[places[place][0]][0], places[place][1])
            for place in content.techniques
        }
        content_paths = {
            first[place]: place for place in content.techniques
        }  # a layer's first path: its path in the file
        if len(content_paths) < len(content.techniques):
            raise ValueError("it adapts two layers that are one here: it is of another architecture")
        if present and {at: parse_lora_record(adapter_to_record_dict(part)) for at, part in present.items()} != {
            at: replace(content.techniques[place], dtype=None) for at, place in content_paths.items()
        }:
            raise ValueError(
                f"the model has an adapter {short_repr(name)} of other layers, ranks, alphas, dropouts or scalings; "
                "delete that adapter first, or load this one under another name="
            )
        layers = [places[place][0] for place in content.techniques]
        if any(isinstance(layer, AdaptedModule) and layer.adapters.merged_name == name for layer in layers):
            raise ValueError(f"the model's adapter {short_repr(name)} is merged: call unmerge_adapter(model) first")
    except (ValueError, TypeError) as reason:
        raise file_error(path, str(reason), "load the adapter") from reason
    if not present:
        placed: dict[nn.Module, dict[str, LoRA]] = {}
        for place, technique in content.techniques.items():
            module, parameter = places[place]
            placed.setdefault(module, {})[parameter] = technique
        check_no_peft_conflict(model, placed, will_freeze=True)
        add_adapter_and_freeze_rest(
            model, name, placed, {module: paths[0] for module, paths in paths_by_module.items()}
        )
    with torch.no_grad():
        for at, adapter in adapter_layers(model, name).items():
            for part, value in content.tensors[content_paths[at]].items():
                getattr(adapter, part).copy_(value)
        for old, new in content.base_values:
            old.copy_(new)
        base = buffers_of_adapter_or_base(model, None)
        for at, buffer in buffers_of_adapter_or_base(model, name).items():
            buffer.copy_(content.buffers.get(at, base[at]))
    for trained in content.trained_base_parameters:
        trained.requires_grad_()
    return model


def _read_checked_lowmem_adapter_content(
    path: Path, model: nn.Module, parameters_by_path: dict[str, tuple[nn.Module, str]]
) -> AdapterContent:
    _check_not_peft_part_or_gguf(path)
    file = verify_and_map_file(path)
    with value_errors_as_file_errors(path, "load the adapter"):
        if file.metadata.get("kind") != "adapter":
            raise ValueError("it holds no adapter alone; load it with load(path, factory)")
        name, base, records, buffers = _parse_adapter_metadata(file.metadata)
        _check_known_layers_are_changeable("load_adapter", parameters_by_path, model, records)
        for place, technique in records.items():
            why = adapter_skip_reason_or_none(model, parameters_by_path, place)
            if why is not None:
                raise ValueError(f"it adapts {layer_display_name(place)}, and {why}: it is of another architecture")
            module, parameter = parameters_by_path[place]
            check_adapter_tensor_shapes(_adapter_tensor_name(place, ""), technique, module, file.tensors, parameter)
        base_buffers = buffers_of_adapter_or_base(model, None)
        for at in buffers:
            stored_buffer = file.tensors.get(at)
            if at not in base_buffers or stored_buffer is None or stored_buffer.shape != base_buffers[at].shape:
                raise ValueError(
                    f"it holds a buffer {short_repr(at)} that the model has not, or of another shape: it is of "
                    "another "
                    "architecture"
                )
        surplus = (
            file.tensors.keys()
            - {_adapter_tensor_name(place, part) for place in records for part in _PARTS}
            - {*buffers}
        )
        if surplus:
            raise ValueError(f"it has tensors of no layer that it adapts, as {short_repr(min(surplus))}")
        if base_layers_sha256(model, list(records)) != base:
            raise ValueError(
                "it was trained on another base: the weights, or how they are stored, differ in the layers that it "
                "adapts; load it onto the base that it was saved from"
            )
    tensors = {place: {part: file.tensors[_adapter_tensor_name(place, part)] for part in _PARTS} for place in records}
    half = {
        place for place, parts in tensors.items() if {tensor.dtype for tensor in parts.values()} == {torch.bfloat16}
    }
    records |= {place: replace(records[place], dtype=torch.bfloat16) for place in half}
    return AdapterContent(records, tensors, name=name, buffers={at: file.tensors[at] for at in buffers})


def _check_known_layers_are_changeable(
    caller_name: str,
    parameters_by_path: Mapping[str, tuple[nn.Module, str]],
    model: nn.Module,
    parameter_paths: Iterable[str],
) -> None:
    """Refuse a model with layers at some places that ``caller_name`` cannot take; unknown places are left to
    others."""
    paths_by_module, here = (
        all_paths_by_module(model),
        [parameters_by_path[name][0] for name in parameter_paths if name in parameters_by_path],
    )
    check_layers_are_changeable(caller_name, {module: paths_by_module[module][0] for module in here})


def _check_not_peft_part_or_gguf(path: Path) -> None:
    """Raise a FileError that says what another program's file is, and what to load in its place."""
    if path.name in (WEIGHTS, CONFIG, *PICKLES):
        raise file_error(
            path, f"it is a part of a folder of PEFT: name the folder, {quoted_path(path.parent)}", "load"
        )
    if has_magic_bytes(path, MAGIC):
        raise file_error(
            path, "it is a GGUF file, and adapters are read from lowmem's files and PEFT's folders", "load"
        )


@with_model_lock
def base_layers_sha256(model: nn.Module, layer_paths: list[str]) -> str:
    """Return the SHA-256 of the bases of the layers at ``layer_paths``: stored tensors, and how they are stored."""
    places = adaptable_module_and_name_by_path(model)
    by_path = {place: module for module, all_paths in all_paths_by_module(model).items() for place in all_paths}
    sha256 = hashlib.sha256()
    for path in sorted(layer_paths):
        module, parameter = places.get(path) or (by_path[path], "weight")
        base = unadapted_shallow_copy(module) if isinstance(module, AdaptedModule) else module
        record = checked_form_records_without_bias(base).get(parameter, {}) if isinstance(base, StoredModule) else {}
        record.pop("method", None)  # it does not change how bytes are decoded
        sha256.update(repr((path, sorted(record.items()))).encode())
        for name, value in sorted(_fingerprinted_base_tensors_by_name(base, parameter).items()):
            remedy = "save_adapter(..., format='peft') writes the adapter without the base's fingerprint"
            check_no_foreign_tensor_class("a fingerprint", f"{path}.{name}".lstrip("."), value, remedy)
            sha256.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
            sha256.update(tensor_bytes_view(value))
    return sha256.hexdigest()


def _fingerprinted_base_tensors_by_name(base: nn.Module, parameter: str) -> dict[str, Tensor]:
    """Return the part of a layer's state that the parameter's adapter depends on: all of it for a linear layer."""
    if isinstance(base, nn.Linear) or parameter not in adaptable_parameter_names(base):
        recorded = state_dict_keys_of_formats(base)
        return {name: value for name, value in base.state_dict().items() if name not in recorded}
    if isinstance(base, StoredModule) and parameter in base.forms:
        return {name: getattr(base, name) for name in (f"{parameter}_{part}" for part in base.forms[parameter].parts)}
    return {parameter: unadapted_parameter(base, parameter)}


class _AdapterMetadata(NamedTuple):
    name: str
    base_sha256: str
    techniques: dict[str, LoRA]  # by the layers' paths
    buffer_names: list[str]


def _parse_adapter_metadata(metadata: dict[str, Any]) -> _AdapterMetadata:
    with value_errors_with_part("its metadata"):
        fields = checked_json_object_with_keys(metadata, ("kind", "name", "base", "layers"), ("buffers",))
        buffers = fields.get("buffers", [])
        if not isinstance(buffers, list) or not all(isinstance(buffer_name, str) for buffer_name in buffers):
            raise ValueError(f"buffers={short_repr(buffers)} must be a list of names")
        for key in ("name", "base"):
            if not isinstance(fields[key], str):
                raise ValueError(f"{key}={short_repr(fields[key])} must be a string")
    with value_errors_with_part("its record of the layers"):
        layers = checked_json_object(fields["layers"])
        if not layers:
            raise ValueError("it names no layer")
    records = {}
    for place, record in layers.items():
        with value_errors_with_part(f"its record of {layer_display_name(place)}"):
            records[place] = parse_lora_record(record)
    return _AdapterMetadata(fields["name"], fields["base"], records, buffers)


def _adapter_tensor_name(layer_path: str, matrix_name: str) -> str:
    return f"{layer_path}.{matrix_name}" if layer_path else matrix_name
