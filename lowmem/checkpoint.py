"""Save converted models, load them without ever holding the dense weights, and the same for adapters alone.

A file holds each distinct tensor once, and of each converted layer how it is stored (``docs/format.md``). To load,
the model is built on the meta device, its layers become shells of the converted ones, and the file's tensors, mapped
into memory, take the place of the shells' parameters: nothing is copied, or changed before all of it fits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter
from torch.utils.weak import WeakTensorKeyDictionary

from lowmem.convert import freeze_all_but_adapters, swap
from lowmem.fourbit import FourBit, FourBitStorage
from lowmem.frozen import FrozenStorage
from lowmem.half import Half
from lowmem.lora import Adapter, LoRA, LoRALinear
from lowmem.registry import MADE_BY, REGISTRY, holders, layer_name, places, why_left
from lowmem.shards import read_model
from lowmem.tensorfile import FileError, write_tensors

__all__ = ["adapter_record", "base_of", "how_stored", "load", "lora_of", "save", "technique_record"]

_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a model, converted or not, as one safetensors file: whole, or not at all.

    Tensors that several names share are stored once. What a merged adapter's base was is stored, and that the
    adapter is active; not that it is merged. The same model gives the same bytes.

    Args:
        model: any module whose state is tensors.
        path: of the file; what was there is replaced, even if the model's own tensors are mapped from it.

    Raises:
        TypeError: the model is not a module.
        ValueError: a state that is not all tensors, or tensors without values.
        OSError: the file cannot be written; what was there is whole.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    layers = {module: paths[0] for module, paths in places(model).items() if type(module) in MADE_BY}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"state {name!r} is a {type(value).__name__}, no tensor: safetensors cannot hold it")
        if id(value) not in seen:
            tensors[name] = value
            seen.add(id(value))
    stored: dict[str, Any] = {}
    known: dict[int, Any] = {}  # by what is stored of a weight: its record, which goes for layers that share it, too
    adapters: dict[str, Any] = {}
    for layer, place in layers.items():
        base = base_of(layer)
        if isinstance(base, FrozenStorage):
            record = how_stored(base)
            first = known.setdefault(id(getattr(base, base.stored[0])), record)
            if first is record or first != record:
                stored[place] = record
        if isinstance(layer, LoRALinear):
            adapters[place] = [
                {**adapter_record(part), "name": name, "active": name in layer.in_use} for name, part in _parts(layer)
            ]
    metadata = {"kind": "model", "layers": stored, **({"adapters": adapters} if adapters else {})}
    write_tensors(path, tensors, metadata)


def load(path: str | os.PathLike[str], factory: Callable[[], nn.Module]) -> nn.Module:
    """Build a model and take its tensors from a file that ``save`` or ``lowmem quantize`` wrote.

    The tensors are views of the file, mapped into memory: pages are read as they are used, and changes stay in this
    process. Parameters that ``factory`` makes are put on the meta device as they are made; buffers are not, so
    that those which are no part of the state are what the factory says.

    Args:
        path: a file, or the ``.index.json`` of a sharded one.
        factory: makes the dense model that was converted; called once.

    Returns:
        The model as it was saved, in the mode that ``factory`` left it in. What ``convert`` lets train, trains.

    Raises:
        TypeError: ``factory`` is not callable, or returned no module.
        FileError: the file is damaged, of another kind or version, or holds another model than ``factory`` makes: the
            layers, names, shapes or dtypes that differ are named.
        OSError: it cannot be read.
    """
    if not callable(factory):
        raise TypeError(f"factory={type(factory).__name__} must be a callable that makes the model")
    file = read_model(path)
    with torch.random.fork_rng(devices=[]), _parameters_on_meta():
        model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"factory returned a {type(model).__name__}, not a torch.nn.Module")
    try:
        model = _shells(model, file.metadata)
        _assign(model, file.tensors)
    except (ValueError, TypeError, LookupError, AttributeError) as reason:
        text = (
            str(reason) if isinstance(reason, ValueError) else f"its record of the layers is not lowmem's ({reason})"
        )
        raise FileError(f"cannot load {str(path)!r}: {text}") from reason
    return model


def how_stored(layer: FrozenStorage) -> dict[str, Any]:
    """Return what a file says of a converted layer."""
    if isinstance(layer, FourBitStorage):
        weight = layer.quantized
        return technique_record(
            FourBit(weight.format, weight.block_size, weight.scale_encoding, getattr(layer, "compute_dtype", None)),
            weight.method,
        )
    stored: Any = getattr(layer, layer.stored[0])
    return technique_record(Half(stored.dtype))


def technique_record(technique: Half | FourBit, method: str = "absmax") -> dict[str, Any]:
    """Return what a file says of how a weight is stored."""
    if isinstance(technique, Half):
        return {"technique": "Half", "dtype": str(technique.dtype).removeprefix("torch.")}
    compute = None if technique.compute_dtype is None else str(technique.compute_dtype).removeprefix("torch.")
    return {
        "technique": "FourBit",
        "format": technique.format,
        "block_size": technique.block_size,
        "scales": technique.scales,
        "method": method,
        **({} if compute is None else {"compute_dtype": compute}),
    }


def adapter_record(adapter: Adapter) -> dict[str, Any]:
    """Return what a file says of one layer's part of an adapter."""
    technique = adapter.technique
    return {"rank": technique.rank, "alpha": technique.alpha, "dropout": technique.dropout}


def lora_of(record: Mapping[str, Any]) -> LoRA:
    """Undo ``adapter_record``."""
    return LoRA(record["rank"], record["alpha"], record["dropout"])


def base_of(layer: nn.Module) -> nn.Module:
    """Return the layer that stores the weight: an adapted layer's base."""
    return layer.base if isinstance(layer, LoRALinear) else layer


def _parts(layer: LoRALinear) -> Iterator[tuple[str, Any]]:
    return iter(layer.adapters.items())


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put every parameter on the meta device as a module takes it; what two modules take stays one parameter."""
    known: Any = WeakTensorKeyDictionary()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or isinstance(parameter, UninitializedParameter):
            return None
        if parameter not in known:
            known[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        found: nn.Parameter = known[parameter]
        return found

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _shells(model: nn.Module, metadata: Mapping[str, Any]) -> nn.Module:
    """Replace the layers that were converted by shells of what they were converted to."""
    records: dict[str, Any] = metadata["layers"]
    held = holders(model)
    by_path = {path: module for module, paths in places(model).items() for path in paths}
    recorded: dict[nn.Module, Any] = {}
    for path, record in records.items():
        module = by_path.get(path)
        if module is None:
            raise ValueError(f"it has a layer {layer_name(path)!r} that the model has not: is this its factory?")
        recorded[module] = record
        for tied, _ in held.get(id(getattr(module, "weight", None)), ()):
            recorded.setdefault(tied, record)  # without a record of its own, it shares what is stored
    stored: dict[Any, Any] = {}
    shells: dict[nn.Module, Any] = {}
    for module, record in recorded.items():
        technique, method = _technique(record)
        why = why_left(type(technique), module)
        if why is not None:
            path = next(path for path, other in by_path.items() if other is module)
            raise ValueError(
                f"{layer_name(path)} is stored by {record['technique']}, and the model has a "
                f"{type(module).__name__} there: {why}; leave it out when the file is made (skip= or --exclude)"
            )

        def store(tensor: Tensor, name: str, technique: Any = technique, method: str | None = method) -> Any:
            key = tensor.untyped_storage()._cdata, tensor.shape
            if key not in stored:
                shell = technique.shell(tensor, name)
                stored[key] = shell if method is None else replace(shell, method=method)
            return stored[key]

        made: Any = REGISTRY[type(technique), type(module)]
        shells[module] = made.from_layer(module, technique, store)
    model = swap(model, {old: new.train(old.training) for old, new in shells.items()})
    adapted: dict[nn.Module, nn.Module] = {}
    by_path = {path: module for module, paths in places(model).items() for path in paths}
    for path, parts in metadata.get("adapters", {}).items():
        base = by_path.get(path)
        why = f"the model has no layer {layer_name(path)!r}" if base is None else why_left(LoRA, base)
        if base is None or why is not None:
            raise ValueError(f"it has adapters for {layer_name(path)}: {why}; is this its factory?")
        layer = _adapted(base, parts)
        adapted[base] = layer.train(base.training)
    model = swap(model, adapted)
    if adapted:
        freeze_all_but_adapters(model)
    return model


def _adapted(base: Any, parts: list[dict[str, Any]]) -> LoRALinear:
    layer = LoRALinear(base, lora_of(parts[0]), parts[0]["name"])
    for part in parts[1:]:
        layer.add(part["name"], Adapter(base, lora_of(part)))
    layer.active = tuple(part["name"] for part in parts if part["active"])
    return layer


def _technique(record: Mapping[str, Any]) -> tuple[Half | FourBit, str | None]:
    if record["technique"] == "Half":
        return Half(_DTYPES[record["dtype"]]), None
    if record["technique"] != "FourBit":
        raise ValueError(f"its technique {record['technique']!r} is unknown: upgrade lowmem")
    compute = record.get("compute_dtype")
    technique = FourBit(
        record["format"], record["block_size"], record["scales"], None if compute is None else _DTYPES[compute]
    )
    return technique, record["method"]


def _assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put a file's tensors in the place of the model's, once all of them are known to fit."""
    names: dict[int, list[str]] = {}
    own: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"the model's state {name!r} is a {type(value).__name__}, no tensor")
        names.setdefault(id(value), []).append(name)
        own[id(value)] = value
    known = {name for group in names.values() for name in group}
    missing = [group[0] for group in names.values() if not any(name in tensors for name in group)]
    extra = [name for name in tensors if name not in known]
    if missing or extra:
        raise ValueError(
            f"it holds another model than the factory makes: {_listed('it lacks', missing)}"
            f"{', and ' if missing and extra else ''}{_listed('the model lacks', extra)}"
        )
    found: dict[int, Tensor] = {}
    for key, group in names.items():
        first, *others = [name for name in group if name in tensors]
        given, mine = tensors[first], own[key]
        if given.shape != mine.shape or given.dtype != mine.dtype:
            raise ValueError(
                f"{first} is {given.dtype} {tuple(given.shape)} in it, and {mine.dtype} {tuple(mine.shape)} in the "
                "model that the factory makes: let the factory make the model that was saved"
            )
        for other in others:
            if not torch.equal(tensors[other], given):
                raise ValueError(f"{first} and {other} differ in it, and are one tensor in the model")
        found[key] = nn.Parameter(given, mine.requires_grad) if isinstance(mine, nn.Parameter) else given
    for module in model.modules():
        for tensors_of in (module._parameters, module._buffers):
            for name, value in tensors_of.items():
                if value is not None and id(value) in found:
                    tensors_of[name] = found[id(value)]  # type: ignore[assignment]


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}" if names else ""
