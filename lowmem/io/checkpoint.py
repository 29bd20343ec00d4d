"""Saves converted models, and loads them without ever holding the dense weights: the parameters of a skeleton on the
meta device are replaced by the memory-mapped tensors of the file (``docs/format.md``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem.errors import file_error, short_repr
from lowmem.io.lowmem_file import checked_tensor_spec, write_stream_returning_digest
from lowmem.io.meta_loading import check_and_assign_tensors, replace_layers_and_add_adapters
from lowmem.io.metadata_records import adapter_record_dicts_by_parameter, form_to_record_dict
from lowmem.io.safetensors_header import TensorSpec
from lowmem.io.shards import verify_and_map_lowmem_model
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter_buffers import without_adapter_buffers_if_equal
from lowmem.nn.quantized_module import state_dict_keys_of_formats
from lowmem.nn.stored_module import StoredModule
from lowmem.quant.tensor import QuantizedTensor
from lowmem.resident import trim_heap_unless_small
from lowmem.transforms.meta_device import check_model_factory, make_model_with_meta_parameters
from lowmem.transforms.model_checks import check_model_not_sharded, check_no_foreign_tensor_class
from lowmem.transforms.module_registry import (
    all_paths_by_module,
    applied_technique_type_or_none,
    layer_display_name,
    layer_or_parameter_path,
)
from lowmem.transforms.module_replacement import with_model_lock

M = TypeVar("M", bound=nn.Module)


def unwrap_data_parallel(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel or DataParallel, whose paths lack ``module.``; or the model."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model


@with_model_lock
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
    write_stream_returning_digest(path, *specs_metadata_and_tensors(unwrap_data_parallel(model)))


Content: TypeAlias = tuple[dict[str, TensorSpec], dict[str, Any], Iterable[tuple[str, Tensor]]]


def specs_metadata_and_tensors(model: nn.Module) -> Content:
    """Return what ``save`` writes, as arguments of ``write``, without a copy; raises as ``save`` does."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    layers = {
        module: paths[0]
        for module, paths in all_paths_by_module(model).items()
        if applied_technique_type_or_none(module) is not None
    }
    check_model_not_sharded("save", model)
    for name, state_tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(state_tensor):
            path = name.rpartition(".")[0]
            raise ValueError(
                f"{layer_display_name(path)} is lazy and has no shape yet: call the model once before save"
            )
    # Skipped: ``metadata`` holds the formats
    recorded = state_dict_keys_of_formats(model)
    for name, value in without_adapter_buffers_if_equal(model, model.state_dict(keep_vars=True)).items():
        if name in recorded:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(
                f"state {short_repr(name)} is a {type(value).__name__}, no tensor: safetensors cannot hold it"
            )
        check_no_foreign_tensor_class(
            "save", name, value, "save the model with the library that made it, or convert the dense model"
        )
        if id(value) not in seen:
            seen.add(id(value))
            tensors[name] = value
    stored: dict[str, Any] = {}
    # Id of a stored weight -> its record; layers that share it need none of their own
    known: dict[int, Any] = {}
    adapters: dict[str, Any] = {}
    for layer, place in layers.items():
        if isinstance(layer, StoredModule):
            for name, record in checked_form_records_without_bias(layer).items():
                first_part = getattr(layer, f"{name}_{layer.forms[name].parts[0]}")
                first = known.setdefault(id(first_part), record)
                if first is record or first != record:
                    stored[place if name == "weight" else f"{place}.{name}".lstrip(".")] = record
        if isinstance(layer, AdaptedModule):
            adapters |= {
                layer_or_parameter_path(place, name): record
                for name, record in adapter_record_dicts_by_parameter(layer).items()
            }
    specs = {name: checked_tensor_spec(name, tensor) for name, tensor in tensors.items()}
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
    check_model_factory("factory", factory)
    file = verify_and_map_lowmem_model(path)
    try:
        model = make_model_with_meta_parameters(factory)
        try:
            replace_layers_and_add_adapters(model, file.metadata, file.tensors)
        except (TypeError, LookupError, AttributeError, OverflowError) as reason:
            raise ValueError(f"its record of the layers is not lowmem's ({reason})") from reason
        check_and_assign_tensors(model, file.tensors)
    except ValueError as reason:
        raise file_error(path, str(reason), "load") from reason
    trim_heap_unless_small(model)
    return model


def checked_form_records_without_bias(module: StoredModule) -> dict[str, dict[str, Any]]:
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
            records[name] = form_to_record_dict(form)
    return records
