"""Save one adapter alone, and load it onto the base that it was trained on."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.adapters import adapter_layers, adapter_names, add_adapter, check_name
from lowmem.checkpoint import base_of, how_stored
from lowmem.frozen import FrozenStorage
from lowmem.lora import LoRA, LoRALinear
from lowmem.records import adapter_record, lora_of
from lowmem.registry import layer_name, places, why_left
from lowmem.tensorfile import FileError, read, write_tensors

__all__ = ["fingerprint", "load_adapter", "save_adapter"]


def save_adapter(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> None:
    """Save one adapter of a model, without its base, as a safetensors file: whole, or not at all.

    Args:
        model: has the adapter.
        path: of the file; what was there is replaced.
        name: of the adapter; None where there is one only.

    Raises:
        TypeError: the model is not a module.
        ValueError: no such adapter, or several and no name.
        OSError: the file cannot be written; what was there is whole.
    """
    if name is None:
        names = adapter_names(model)
        if len(names) > 1:
            raise ValueError(f"name=None must name one of several adapters: {', '.join(names)}")
        name = names[0] if names else "default"
    layers = adapter_layers(model, name)
    tensors = {_key(place, part): value for place, a in layers.items() for part, value in _values(a).items()}
    metadata = {
        "kind": "adapter",
        "name": name,
        "base": fingerprint(model, list(layers)),
        "layers": {path: adapter_record(adapter) for path, adapter in layers.items()},
    }
    write_tensors(path, tensors, metadata)


def load_adapter(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> nn.Module:
    """Load an adapter onto the base that it was trained on.

    Where the model has an adapter of that name, of the same layers and ranks, it takes the file's values;
    else a new one is added, active, beside those that there are.

    Args:
        model: the base, adapted already or not.
        path: of a file that ``save_adapter`` wrote.
        name: for the adapter here; None keeps its own.

    Returns:
        The model, changed in place; or the adapted layer, when the root itself was the layer.

    Raises:
        TypeError: the model is not a module.
        FileError: the file is damaged, of another kind or version, or does not fit the model: another base,
            architecture, rank, shape or dtype. The model is left as it was.
        OSError: it cannot be read.
    """
    found = places(model)
    by_path = {place: module for module, paths in found.items() for place in paths}
    file = read(path)
    try:
        if file.metadata.get("kind") != "adapter":
            raise ValueError("it holds no adapter alone; load it with load(path, factory)")
        name = file.metadata["name"] if name is None else name
        check_name(name)
        records = {place: lora_of(record) for place, record in file.metadata["layers"].items()}
        _check_fits(model, by_path, records, file.tensors, file.metadata["base"])
        present = adapter_layers(model, name) if name in adapter_names(model) else {}
        own = {found[by_path[place]][0]: place for place in records}  # the model's path of a layer: the file's
        if len(own) < len(records):
            raise ValueError("it adapts two layers that are one here: it is of another architecture")
        if present and {at: part.technique for at, part in present.items()} != {
            at: records[place] for at, place in own.items()
        }:
            raise ValueError(
                f"the model has an adapter {name!r} of other layers, ranks, alphas or dropouts; "
                "delete that adapter first, or load this one under another name="
            )
        if any(isinstance(by_path[place], LoRALinear) and by_path[place].merged == name for place in records):
            raise ValueError(f"the model's adapter {name!r} is merged: call unmerge_adapter(model) first")
    except (ValueError, TypeError, LookupError, AttributeError) as reason:
        text = str(reason) if isinstance(reason, ValueError) else f"its record is not lowmem's ({reason})"
        raise FileError(f"cannot load the adapter {str(path)!r}: {text}") from reason
    if not present:
        for technique in dict.fromkeys(records.values()):
            wanted = {by_path[place] for place, of in records.items() if of == technique}
            model = add_adapter(model, name, technique, where=_is_in(wanted))
    with torch.no_grad():
        for at, adapter in adapter_layers(model, name).items():
            for part, value in _values(adapter).items():
                value.copy_(file.tensors[_key(own[at], part)])
    return model


def fingerprint(model: nn.Module, paths: list[str]) -> str:
    """Return the SHA-256 of what the layers at these paths store without their adapters, and of how they store it."""
    by_path = {place: module for module, all_paths in places(model).items() for place in all_paths}
    sha256 = hashlib.sha256()
    for path in sorted(paths):
        base = base_of(by_path[path])
        record = how_stored(base) if isinstance(base, FrozenStorage) else {}
        record.pop("method", None)  # the same bytes, however they were found
        sha256.update(repr((path, sorted(record.items()))).encode())
        for name, value in sorted(base.state_dict().items()):
            content = value.detach().cpu().contiguous()
            sha256.update(repr((name, str(content.dtype), tuple(content.shape))).encode())
            sha256.update(content.flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _check_fits(
    model: nn.Module,
    by_path: dict[str, nn.Module],
    records: dict[str, LoRA],
    tensors: dict[str, Tensor],
    base: str,
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for place, technique in records.items():
        layer: Any = by_path.get(place)
        if layer is None:
            raise ValueError(f"it adapts {layer_name(place)}, which the model has not: it is of another architecture")
        why = None if isinstance(layer, LoRALinear) else why_left(LoRA, layer)
        if why is not None:
            raise ValueError(f"it adapts {layer_name(place)}, which is a {type(layer).__name__} here: {why}")
        expected[_key(place, "lora_a")] = (technique.rank, layer.in_features)
        expected[_key(place, "lora_b")] = (layer.out_features, technique.rank)
    if expected.keys() != tensors.keys():
        wrong = sorted(expected.keys() ^ tensors.keys())
        raise ValueError(f"its tensors are not those of its layers: {wrong[0]} is missing or extra")
    for key, shape in expected.items():
        given = tensors[key]
        if given.shape != shape or not given.is_floating_point():
            raise ValueError(f"{key} is {given.dtype} {tuple(given.shape)}; the model takes {shape} floating point")
    if fingerprint(model, list(records)) != base:
        raise ValueError(
            "it was trained on another base: the weights, or how they are stored, differ in the layers that it "
            "adapts; load it onto the base that it was saved from"
        )


def _is_in(wanted: set[nn.Module]) -> Any:
    return lambda path, module: module in wanted


def _key(path: str, part: str) -> str:
    return f"{path}.{part}" if path else part


def _values(adapter: Any) -> dict[str, Tensor]:
    return {"lora_a": adapter.lora_a, "lora_b": adapter.lora_b}
