"""Saves converted models, and loads them without ever holding the dense weights: the parameters of a skeleton on the
meta device are replaced by the memory-mapped tensors of the file (``docs/format.md``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem.errors import refusal, show
from lowmem.io.container import spec_of, write
from lowmem.io.metadata import adapters_record, form_record
from lowmem.io.safetensors import TensorSpec
from lowmem.io.shards import read_model
from lowmem.io.skeleton import assign, convert_skeleton
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter_buffers import without_copies
from lowmem.nn.coded_module import format_keys
from lowmem.nn.stored_module import StoredModule
from lowmem.quant.tensor import QuantizedTensor
from lowmem.resident import trim_heap
from lowmem.transforms.commit import one_at_a_time
from lowmem.transforms.meta import check_factory, make_on_meta
from lowmem.transforms.refusals import refuse_sharded, refuse_wrapped
from lowmem.transforms.registry import layer_name, made_by, module_paths, place_name

M = TypeVar("M", bound=nn.Module)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel or DataParallel, whose paths lack ``module.``; or the model."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model


@one_at_a_time
def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a model, converted or not, as one safetensors file. The write is atomic.

    Shared tensors are stored once. A merged adapter is stored unmerged, and as active. The same model always gives
    the same bytes.

    Args:
        model: any module whose state_dict holds only tensors. Of one that DistributedDataParallel wraps, the model
            inside is saved, under names without ``module.``.
        path: of the file; an existing file is replaced, even if the model's own tensors are mapped from it.

    Raises:
        TypeError: the model is not a module.
        RuntimeError: the stored tensors of a layer do not have its layout; nothing is written.
        ValueError: a state that is no tensor, a tensor that is lazy or without values, or a model that is sharded.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    write(path, *content_of(unwrap(model)))


Content: TypeAlias = tuple[dict[str, TensorSpec], dict[str, Any], Iterable[tuple[str, Tensor]]]


def content_of(model: nn.Module) -> Content:
    """Return what ``save`` writes, as arguments of ``write``, without a copy; raises as ``save`` does."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    layers = {module: paths[0] for module, paths in module_paths(model).items() if made_by(module) is not None}
    refuse_sharded("save", model)
    for name, one in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(one):
            path = name.rpartition(".")[0]
            raise ValueError(f"{layer_name(path)} is lazy and has no shape yet: call the model once before save")
    recorded = format_keys(model)  # skipped: ``metadata`` holds the formats
    for name, value in without_copies(model, model.state_dict(keep_vars=True)).items():
        if name in recorded:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"state {show(name)} is a {type(value).__name__}, no tensor: safetensors cannot hold it")
        refuse_wrapped(
            "save", name, value, "save the model with the library that made it, or convert the dense model"
        )
        if id(value) not in seen:
            seen.add(id(value))
            tensors[name] = value
    stored: dict[str, Any] = {}
    known: dict[int, Any] = {}  # id of a stored weight -> its record; layers that share it need none of their own
    adapters: dict[str, Any] = {}
    for layer, place in layers.items():
        if isinstance(layer, StoredModule):
            for name, record in how_stored(layer).items():
                first_part = getattr(layer, f"{name}_{layer.forms[name].parts[0]}")
                first = known.setdefault(id(first_part), record)
                if first is record or first != record:
                    stored[place if name == "weight" else f"{place}.{name}".lstrip(".")] = record
        if isinstance(layer, AdaptedModule):
            adapters |= {place_name(place, name): record for name, record in adapters_record(layer).items()}
    specs = {name: spec_of(name, tensor) for name, tensor in tensors.items()}
    return specs, {"kind": "model", "layers": stored, **({"adapters": adapters} if adapters else {})}, tensors.items()


def load(path: str | os.PathLike[str], factory: Callable[[], M]) -> M:
    """Build a model with the tensors of a file that ``save`` or ``lowmem quantize`` wrote.

    The tensors are views of the memory-mapped file: pages are read on first use, and changes stay in this process.
    The parameters of ``factory`` are moved to the meta device as it creates them. Its buffers are not, so that
    non-persistent ones keep their values.

    Don't change the file in place while the model is in use: its weights would change, and reading a part that was
    cut off ends the process (SIGBUS). ``save`` to the same path is safe: it replaces the file.

    Args:
        path: a file, or the ``.index.json`` of a sharded one.
        factory: makes the dense model that was converted; called once.

    Returns:
        The model as it was saved, in the training or evaluation mode of ``factory``. Parameters require gradients as
        after ``convert``, even if they were frozen later.

    Raises:
        TypeError: ``factory`` is not callable, is a module itself, or returned none.
        FileError: the file is damaged, of another kind or version, or holds another model than ``factory`` makes: the
            layers, names, shapes or dtypes that differ are named.
        OSError: the file cannot be read.
    """
    check_factory("factory", factory)
    file = read_model(path)
    try:
        model = make_on_meta(factory)
        try:
            convert_skeleton(model, file.metadata, file.tensors)
        except (TypeError, LookupError, AttributeError, OverflowError) as reason:
            raise ValueError(f"its record of the layers is not lowmem's ({reason})") from reason
        assign(model, file.tensors)
    except ValueError as reason:
        raise refusal(path, str(reason), "load") from reason
    trim_heap(model)
    return model


def how_stored(module: StoredModule) -> dict[str, dict[str, Any]]:
    """Return the metadata record of each stored parameter; that of a 16-bit weight stands for the bias, too.

    Raises:
        RuntimeError: the stored tensors do not have the layout of the form.
    """
    records = {}
    for name, form in module.forms.items():
        weight = module.stored_weight(name)
        if isinstance(weight, QuantizedTensor):
            weight.check_layout()
        if name != "bias":
            records[name] = form_record(form)
    return records
