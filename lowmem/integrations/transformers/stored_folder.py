"""Loading the folder of a converted model into an empty model: records, names and parts of stored weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from lowmem.errors import show
from lowmem.integrations.transformers.checking import specs_of
from lowmem.integrations.transformers.config import LowmemConfig
from lowmem.integrations.transformers.saving import folder_names
from lowmem.nn.gathered_weight import check_order
from lowmem.nn.module_class import become
from lowmem.nn.module_copy import restored_copy
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms.ties import parameter_owners

_WIDEST = 4  # bytes of the widest scale


def conversions_of(model: Any) -> list[Any]:
    """Return how transformers renames and converts the tensors of a folder into those of a converted model."""
    names = {name: own for own, name in folder_names(model).items()}
    return [_FolderNames(names, model.base_model_prefix), WeightConverter(["_scales"], ["_scales"], [_Align()])]


class _Align(ConversionOps):  # type: ignore[misc]
    """Copies scales whose bytes lie in a mapped file where their dtype cannot: they are read as floats."""

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any) -> dict[str, Any]:
        """Return the only tensor, by its full name."""
        ((_, value),) = input_dict.items()
        tensor: Tensor = value[0] if isinstance(value, list) else value
        return {full_layer_name: tensor.clone() if tensor.data_ptr() % _WIDEST else tensor}


class _FolderNames(WeightRenaming):  # type: ignore[misc]
    """Renames a folder's tensors, whose names may lack the base model's prefix, to those in the model's state."""

    __slots__ = ("names", "prefix")

    def __init__(self, names: Mapping[str, str], prefix: str) -> None:
        super().__init__("^$", "")
        self.names, self.prefix = names, f"{prefix}."

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the name in the model."""
        found = (self.names[name] for name in _variants(source_key, self.prefix) if name in self.names)
        return next(found, source_key), None


def _variants(name: str, prefix: str) -> tuple[str, str, str]:
    """Return a name as it is, without, and with the base model's prefix: a folder or a model may lack the head."""
    return name, name.removeprefix(prefix), prefix + name


def ties_of_parts(model: Any, target: str, source: str) -> dict[str, str]:
    """Return the ties of what two tied parameters consist of; none where only one of them is stored."""
    parts = []
    for name in (target, source):
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        form = module.forms.get(own) if isinstance(module, StoredModule) else None
        parts.append([name] if form is None else [f"{name}_{part}" for part in form.parts])
    stored = [names != [name] for names, name in zip(parts, (target, source), strict=True)]
    return dict(zip(*parts, strict=True)) if stored[0] == stored[1] else {}


def dtypes_of_parts(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the names of all parameters that hold a part of a stored one, and their dtypes."""
    return {
        f"{path}.{name}".lstrip("."): getattr(module, name).dtype
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, StoredModule)
        for name in module.part_names
    }


def records_of(model: Any, config: LowmemConfig, files: list[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a folder's metadata as lowmem's files have it, and its tensors without values, by the model's paths."""
    found = dict(model.named_modules(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."

    def own(name: str) -> str | None:
        """Return the name that a module or parameter has in this model; None: the model does not have it."""
        for path in _variants(name, prefix):
            parent, _, parameter = path.rpartition(".")
            if path in found or (parent in found and parameter in found[parent]._parameters):
                return path
        return None

    layers: dict[str, Any] = {}
    for record in config.layers:
        if not isinstance(record.get("names"), list):
            raise ValueError(f"quantization_config: layers has {show(record)}, without the names of its weights")
        how = {key: value for key, value in record.items() if key != "names"}
        layers |= {place: how for name in record["names"] if (place := own(str(name))) is not None}
    adapters = {place: record for name, record in config.adapters.items() if (place := own(name)) is not None}
    if (config.layers and not layers) or (config.adapters and not adapters):
        raise ValueError(
            f"quantization_config names no module that {type(model).__name__} has: load the class that was saved"
        )
    tensors: dict[str, Tensor] = {}
    for name, spec in specs_of(files if adapters else []).items():
        place, adapter, rest = name.partition(".adapters.")
        full = f"{own(place)}{adapter}{rest}" if adapter and own(place) is not None else name
        tensors[full] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    return {"layers": layers, "adapters": adapters}, tensors


def is_dense(config: LowmemConfig, prefix: str, files: list[str]) -> bool:
    """Whether a folder has dense all that its config says is stored, as of a model that ``from_config`` made."""
    specs = specs_of(files)
    if not config.layers:
        return bool(files and config.adapters) and not any(".adapters." in name for name in specs)
    found = [
        (specs[own].dtype, record.get("dtype"))
        for record in config.layers
        for name in (record["names"] if isinstance(record.get("names"), list) else ())
        for full in _variants(str(name), f"{prefix}.")
        for own in (full, f"{full}.weight")
        if own in specs
    ]
    return bool(found) and all(own.is_floating_point and str(own) != f"torch.{kept}" for own, kept in found)


def restore_resized(model: Any, files: list[str]) -> None:
    """Make layers dense again whose parts have another shape in the folder, such as a head for other labels.

    transformers then makes them anew, or refuses them, as it does for dense models.

    Raises:
        ValueError: such a layer shares what it stores with another one.
    """
    naming = conversions_of(model)[0]
    shapes = {naming.rename_source_key(name)[0]: spec.shape for name, spec in specs_of(files).items()}
    modules = {path: module for path, module in model.named_modules() if isinstance(module, StoredModule)}
    owners = parameter_owners(model)
    copies = {}
    for path, module in modules.items():
        parts = {f"{path}.{name}".lstrip("."): getattr(module, name) for name in module.part_names}
        resized = [name for name, part in parts.items() if shapes.get(name, part.shape) != part.shape]
        if not resized:
            continue
        if any(len(owners[id(part)]) > 1 for part in parts.values()):
            first, own = resized[0], tuple(parts[resized[0]].shape)
            raise ValueError(
                f"{show(first)} is {tuple(shapes[first])} in the folder and {own} by its config, and shared with "
                "another layer: get both from one source, or load the dense folder"
            )
        values: dict[str, Tensor | None] = {}
        for name in module.forms:
            tensor = module.stored_tensor(name)
            values[name] = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        copies[module] = restored_copy(module, values)
    for module, copied in copies.items():
        become(module, copied)


def check_complete(model: nn.Module) -> None:
    """Raise a ValueError for a part of a stored weight that was not in the folder."""
    on_disk = "disk" in getattr(model, "hf_device_map", {}).values()
    for path, module in model.named_modules():
        if isinstance(module, StoredModule):
            for name in module.part_names:
                part: Any = getattr(module, name)
                if part.is_meta and on_disk:
                    continue
                if part.is_meta or not getattr(part, "_is_hf_initialized", False):
                    raise ValueError(
                        f"the folder lacks {f'{path}.{name}'.lstrip('.')}, which its quantization_config names: get "
                        "it again from one source"
                    )
                if name.endswith("_order"):
                    check_order(part, f"{path}.{name}".lstrip("."))
