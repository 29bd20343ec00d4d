"""Loading the folder of a converted model into an empty model: records, names and parts of stored weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from lowmem.errors import short_repr
from lowmem.integrations.transformers.checkpoint_checks import safetensors_specs_by_name
from lowmem.integrations.transformers.quantization_config import LowmemConfig
from lowmem.integrations.transformers.save_pretrained import folder_names_by_state_key
from lowmem.nn.gathered_weight import check_column_permutation
from lowmem.nn.module_class import replace_class_and_parameters
from lowmem.nn.module_copy import dense_shallow_copy
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms.tied_weights import owners_and_paths_by_parameter_id

# Bytes of the widest scale
_WIDEST = 4


def folder_weight_conversions(model: Any) -> list[Any]:
    """Return how transformers renames and converts the tensors of a folder into those of a converted model."""
    names = {name: state_key for state_key, name in folder_names_by_state_key(model).items()}
    return [
        _FolderToModelRenaming(names, model.base_model_prefix),
        WeightConverter(["_scales"], ["_scales"], [_CloneMisalignedScales()]),
    ]


class _CloneMisalignedScales(ConversionOps):  # type: ignore[misc]
    """Copies scales whose bytes lie in a mapped file where their dtype cannot: they are read as floats."""

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any) -> dict[str, Any]:
        """Return the only tensor, by its full name."""
        ((_, value),) = input_dict.items()
        tensor: Tensor = value[0] if isinstance(value, list) else value
        return {full_layer_name: tensor.clone() if tensor.data_ptr() % _WIDEST else tensor}


class _FolderToModelRenaming(WeightRenaming):  # type: ignore[misc]
    """Renames a folder's tensors, whose names may lack the base model's prefix, to those in the model's state."""

    __slots__ = ("names", "prefix")

    def __init__(self, names: Mapping[str, str], prefix: str) -> None:
        super().__init__("^$", "")
        self.names, self.prefix = names, f"{prefix}."

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the name in the model."""
        matches = (
            self.names[name] for name in _names_with_and_without_prefix(source_key, self.prefix) if name in self.names
        )
        return next(matches, source_key), None


def _names_with_and_without_prefix(name: str, prefix: str) -> tuple[str, str, str]:
    """Return a name as it is, without, and with the base model's prefix: a folder or a model may lack the head."""
    return name, name.removeprefix(prefix), prefix + name


def ties_of_parts(model: Any, source_by_target: Mapping[str, str]) -> dict[str, str]:
    """Return the ties of what tied parameters consist of, without ties of which only one end is stored."""

    def part_names(name: str) -> list[str]:
        path, _, parameter_name = name.rpartition(".")
        module = model.get_submodule(path)
        form = module.forms.get(parameter_name) if isinstance(module, StoredModule) else None
        return [name] if form is None else [f"{name}_{part}" for part in form.parts]

    ties: dict[str, str] = {}
    for tie in source_by_target.items():
        parts = [part_names(name) for name in tie]
        stored = [names != [name] for names, name in zip(parts, tie, strict=True)]
        ties |= dict(zip(*parts, strict=True)) if stored[0] == stored[1] else {}
    return ties


def stored_part_dtypes_by_name(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the names of all parameters that hold a part of a stored one, and their dtypes."""
    return {
        f"{path}.{name}".lstrip("."): getattr(module, name).dtype
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, StoredModule)
        for name in module.part_parameter_names
    }


def metadata_and_meta_tensors(
    model: Any, config: LowmemConfig, files: list[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a folder's metadata as lowmem's files have it, and its tensors without values, by the model's paths."""
    modules = dict(model.named_modules(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."

    def model_path_or_none(name: str) -> str | None:
        """Return the name that a module or parameter has in this model; None: the model does not have it."""
        for path in _names_with_and_without_prefix(name, prefix):
            parent, _, parameter = path.rpartition(".")
            if path in modules or (parent in modules and parameter in modules[parent]._parameters):
                return path
        return None

    layers: dict[str, Any] = {}
    for record in config.layers:
        if not isinstance(record.get("names"), list):
            raise ValueError(
                f"quantization_config: layers has {short_repr(record)}, without the names of its weights"
            )
        how = {key: value for key, value in record.items() if key != "names"}
        layers |= {place: how for name in record["names"] if (place := model_path_or_none(str(name))) is not None}
    adapters = {
        place: record for name, record in config.adapters.items() if (place := model_path_or_none(name)) is not None
    }
    if (config.layers and not layers) or (config.adapters and not adapters):
        raise ValueError(
            f"quantization_config names no module that {type(model).__name__} has: load the class that was saved"
        )
    tensors: dict[str, Tensor] = {}
    for name, spec in safetensors_specs_by_name(files if adapters else []).items():
        place, adapter, rest = name.partition(".adapters.")
        full = (
            f"{model_path_or_none(place)}{adapter}{rest}"
            if adapter and model_path_or_none(place) is not None
            else name
        )
        tensors[full] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    return {"layers": layers, "adapters": adapters}, tensors


def are_recorded_weights_dense(config: LowmemConfig, prefix: str, files: list[str]) -> bool:
    """Whether a folder has dense all that its config says is stored, as of a model that ``from_config`` made."""
    specs = safetensors_specs_by_name(files)
    if not config.layers:
        return bool(files and config.adapters) and not any(".adapters." in name for name in specs)
    dtype_pairs = [
        (specs[item].dtype, record.get("dtype"))
        for record in config.layers
        for name in (record["names"] if isinstance(record.get("names"), list) else ())
        for full in _names_with_and_without_prefix(str(name), f"{prefix}.")
        for item in (full, f"{full}.weight")
        if item in specs
    ]
    return bool(dtype_pairs) and all(
        item.is_floating_point and str(item) != f"torch.{recorded_dtype}" for item, recorded_dtype in dtype_pairs
    )


def make_resized_layers_dense(model: Any, files: list[str]) -> None:
    """Make layers dense again whose parts have another shape in the folder, such as a head for other labels.

    transformers then makes them anew, or refuses them, as it does for dense models.

    Raises:
        ValueError: such a layer shares what it stores with another one.
    """
    naming = folder_weight_conversions(model)[0]
    shapes = {
        naming.rename_source_key(name)[0]: spec.shape for name, spec in safetensors_specs_by_name(files).items()
    }
    modules = {path: module for path, module in model.named_modules() if isinstance(module, StoredModule)}
    owners = owners_and_paths_by_parameter_id(model)
    copies = {}
    for path, module in modules.items():
        parts = {f"{path}.{name}".lstrip("."): getattr(module, name) for name in module.part_parameter_names}
        resized = [name for name, part in parts.items() if shapes.get(name, part.shape) != part.shape]
        if not resized:
            continue
        if any(len(owners[id(part)]) > 1 for part in parts.values()):
            first, config_shape = resized[0], tuple(parts[resized[0]].shape)
            raise ValueError(
                f"{short_repr(first)} is {tuple(shapes[first])} in the folder and {config_shape} by its config, and "
                "shared with "
                "another layer: get both from one source, or load the dense folder"
            )
        values: dict[str, Tensor | None] = {}
        for name in module.forms:
            tensor = module.stored_tensor(name)
            values[name] = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        copies[module] = dense_shallow_copy(module, values)
    for module, copied in copies.items():
        replace_class_and_parameters(module, copied)


def check_stored_parts_loaded(model: nn.Module) -> None:
    """Raise a ValueError for a part of a stored weight that was not in the folder."""
    on_disk = "disk" in getattr(model, "hf_device_map", {}).values()
    for path, module in model.named_modules():
        if isinstance(module, StoredModule):
            for name in module.part_parameter_names:
                part: Any = getattr(module, name)
                if part.is_meta and on_disk:
                    continue
                if part.is_meta or not getattr(part, "_is_hf_initialized", False):
                    raise ValueError(
                        f"the folder lacks {f'{path}.{name}'.lstrip('.')}, which its quantization_config names: get "
                        "it again from one source"
                    )
                if name.endswith("_order"):
                    check_column_permutation(part, f"{path}.{name}".lstrip("."))
