"""Save converted models, load them without ever holding the dense weights, and the same for adapters alone.

A file holds each distinct tensor once, and of each converted layer how it is stored (``docs/format.md``). To load,
the model is built on the meta device, its layers become shells of the converted ones, and the file's tensors, mapped
into memory, take the place of the shells' parameters: nothing is copied, or changed before all of it fits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lowmem.errors import refusal, show
from lowmem.io.container import write_tensors
from lowmem.io.metadata import adapters_record, technique_record
from lowmem.io.shards import read_model
from lowmem.io.skeleton import assign, build
from lowmem.nn.fourbit import FourBit, FourBitStorage, format_keys
from lowmem.nn.frozen_linear import FrozenStorage
from lowmem.nn.half import Half
from lowmem.nn.lora import LoRALinear
from lowmem.transforms.convert import one_at_a_time
from lowmem.transforms.registry import MADE_BY, module_paths

__all__ = ["base_of", "how_stored", "load", "save"]


@one_at_a_time
def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a model, converted or not, as one safetensors file: whole, or not at all.

    Tensors that several names share are stored once. What a merged adapter's base was is stored, and that the
    adapter is active; not that it is merged. The same model gives the same bytes.

    Args:
        model: any module whose state is tensors.
        path: of the file; what was there is replaced, even if the model's own tensors are mapped from it.

    Raises:
        TypeError: the model is not a module.
        RuntimeError: stored tensors of another layout than their layer's; nothing is written.
        ValueError: a state that is not all tensors, or tensors without values.
        OSError: the file cannot be written; what was there is whole.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    layers = {module: paths[0] for module, paths in module_paths(model).items() if type(module) in MADE_BY}
    recorded = format_keys(model)  # of what ``layers`` says below
    for name, value in model.state_dict(keep_vars=True).items():
        if name in recorded:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"state {show(name)} is a {type(value).__name__}, no tensor: safetensors cannot hold it")
        if id(value) not in seen:
            tensors[name] = value
            seen.add(id(value))
    stored: dict[str, Any] = {}
    known: dict[int, Any] = {}  # by what is stored of a weight: its record, which goes for layers that share it, too
    adapters: dict[str, Any] = {}
    for layer, place in layers.items():
        base = base_of(layer)
        if isinstance(base, FourBitStorage):
            base.quantized.check_layout()
        if isinstance(base, FrozenStorage):
            record = how_stored(base)
            first = known.setdefault(id(getattr(base, base.stored[0])), record)
            if first is record or first != record:
                stored[place] = record
        if isinstance(layer, LoRALinear):
            adapters[place] = adapters_record(layer)
    metadata = {"kind": "model", "layers": stored, **({"adapters": adapters} if adapters else {})}
    write_tensors(path, tensors, metadata)


def load(path: str | os.PathLike[str], factory: Callable[[], nn.Module]) -> nn.Module:
    """Build a model and take its tensors from a file that ``save`` or ``lowmem quantize`` wrote.

    The tensors are views of the file, mapped into memory: pages are read as they are used, and changes stay in this
    process. Parameters that ``factory`` makes are put on the meta device as they are made; buffers are not, so
    that those which are no part of the state are what the factory says.

    Don't change the file in place while the model is in use: its weights would change, and where the file was cut,
    the system ends the process that reads them (SIGBUS). Saving over it is safe: that puts a new file in its place.

    Args:
        path: a file, or the ``.index.json`` of a sharded one.
        factory: makes the dense model that was converted; called once.

    Returns:
        The model as it was saved, in the mode that ``factory`` left it in. What ``convert`` lets train, trains,
        whatever was frozen by hand.

    Raises:
        TypeError: ``factory`` is not callable, or returned no module.
        FileError: the file is damaged, of another kind or version, or holds another model than ``factory`` makes: the
            layers, names, shapes or dtypes that differ are named.
        OSError: it cannot be read.
    """
    if not callable(factory):
        raise TypeError(f"factory={type(factory).__name__} must be a callable that makes the model")
    file = read_model(path)
    try:
        model = build(factory, file.metadata, file.tensors)
        assign(model, file.tensors)
    except (ValueError, LookupError, AttributeError, OverflowError) as reason:
        text = (
            str(reason) if isinstance(reason, ValueError) else f"its record of the layers is not lowmem's ({reason})"
        )
        raise refusal(path, text, "load") from reason
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


def base_of(layer: nn.Module) -> nn.Module:
    """Return the layer that stores the weight: an adapted layer's base."""
    return layer.base if isinstance(layer, LoRALinear) else layer
