"""Reads what lowmem wrote, one weight at a time: a Hugging Face folder, a file, or the index of a sharded one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import file_error, short_repr, value_errors_as_file_errors
from lowmem.io.filesystem import has_magic_bytes
from lowmem.io.formats.gguf.gguf_file import MAGIC
from lowmem.io.formats.peft.peft_reader import check_not_adapters_only
from lowmem.io.metadata_records import check_lowmem_quantization_config, parse_form_record
from lowmem.io.model_folder import (
    CONFIG,
    check_layer_counts_of_folder,
    read_checked_model_config,
    weights_or_index_path,
)
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint
from lowmem.io.safetensors_header import TensorSpec
from lowmem.io.shards import LazyWeight, transposed_shape, verify_and_map_lowmem_model
from lowmem.nn.forms import CodedForm
from lowmem.nn.gathered_weight import check_column_permutation


@dataclass(frozen=True)
class LazyModelContent:
    """A model that lowmem wrote, or a dense folder.

    Args:
        path: the folder, file or index.
        folder: the folder with config.json and the tokenizer's files; None: a file that has none beside it.
        config: what config.json holds, without ``quantization_config``; None where there is none.
        weights: by name, sorted. A weight that is tied to another one is there once.
        tied: names of weights in 4 bits that have no values of their own, since they are tied to another one's.
    """

    path: Path
    folder: Path | None
    config: dict[str, Any] | None
    weights: dict[str, LazyWeight]
    tied: tuple[str, ...]


@contextmanager
def open_lazy_model(path: Path) -> Iterator[LazyModelContent]:
    """Open a folder, file or index; a FileError if lowmem did not write it, or it has adapters, or is damaged."""
    if path.is_dir():
        with _open_model_folder(path) as model:
            yield model
        return
    if has_magic_bytes(path, MAGIC):
        raise file_error(path, "it is a GGUF file: make it lowmem's first, by lowmem quantize", "export")
    file = verify_and_map_lowmem_model(path)
    if file.metadata.get("adapters"):
        raise file_error(path, _adapters_refusal_message(file.metadata["adapters"]), "export")
    beside = path.parent if (path.parent / CONFIG).is_file() else None
    config = None if beside is None else read_checked_model_config(beside / CONFIG)
    specs = {name: TensorSpec.from_tensor(tensor) for name, tensor in file.tensors.items()}
    weights, tied = _lazy_weights_and_tied_names(path, specs, file.metadata["layers"], file.tensors.__getitem__)
    yield LazyModelContent(path, beside, config, weights, tied)


@contextmanager
def _open_model_folder(path: Path) -> Iterator[LazyModelContent]:
    if not (path / CONFIG).is_file():
        check_not_adapters_only(path, "export")
        raise file_error(
            path, f"it has no {CONFIG}: name a folder that lowmem quantize or save_pretrained wrote", "export"
        )
    config = read_checked_model_config(path / CONFIG)
    record = config.pop("quantization_config", None) or {}
    method = record.get("quant_method")
    if record and not str(method).startswith("lowmem"):
        raise file_error(
            path, f"{short_repr(method)} quantized it: make it lowmem's first, by lowmem quantize", "export"
        )
    try:
        check_lowmem_quantization_config(record)
    except (TypeError, ValueError) as reason:
        raise file_error(path / CONFIG, str(reason), "export") from None
    if record.get("adapters"):
        raise file_error(path, _adapters_refusal_message(record["adapters"]), "export")
    with SafetensorsCheckpoint(weights_or_index_path(path, "export")) as source:
        check_layer_counts_of_folder(path / CONFIG, config, len(source.specs))
        weights, tied = _lazy_weights_and_tied_names(
            path, source.specs, _layer_records_by_path(path, record), source.read_tensor
        )
        yield LazyModelContent(path, path, config, weights, tied)


def _adapters_refusal_message(adapters: object) -> str:
    first = short_repr(next(iter(adapters))) if isinstance(adapters, dict) else short_repr(adapters)
    return f"it has adapters, as at {first}: merge them (lowmem.merge), or delete them and ship them by save_adapter"


def _layer_records_by_path(path: Path, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the records of a folder's config by path, as a file of lowmem's has them."""
    records: dict[str, Any] = {}
    for layer in quantization_config.get("layers", []):
        names = layer.get("names")
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise file_error(path / CONFIG, f"its record of layers has {short_repr(layer)}; get it again")
        form_fields = {key: value for key, value in layer.items() if key != "names"}
        records |= dict.fromkeys(names, form_fields)
    return records


def _lazy_weights_and_tied_names(
    path: Path, specs: Mapping[str, TensorSpec], records: Mapping[str, Any], read_tensor: Callable[[str], Tensor]
) -> tuple[dict[str, LazyWeight], tuple[str, ...]]:
    """Return the weights of the tensors of a file, and the names of those that have no tensors."""
    weights: dict[str, LazyWeight] = {}
    left = {name for name in specs if not name.endswith("_extra_state")}
    tied = []
    for place, record in records.items():
        try:
            form = parse_form_record(record)
        except ValueError as reason:
            raise file_error(
                path, f"the record of {short_repr(place)} is not lowmem's: {reason}; upgrade lowmem"
            ) from None
        if not isinstance(form, CodedForm):
            continue
        form, weight = replace(form, compute_dtype=None), f"{place}.weight".lstrip(".")
        stored = next(
            (
                candidate
                for candidate in (weight, place)
                if {f"{candidate}_packed", f"{candidate}_scales"} <= specs.keys()
            ),
            None,
        )
        name = stored or weight
        if name in left and specs[name].dtype == torch.uint8:  # of a folder: the format's name, which the record has
            left.discard(name)
        if stored is None:
            tied.append(name)
            continue
        weights[name] = _checked_lazy_coded_weight(path, name, form, specs, read_tensor)
        left -= {f"{name}_{part}" for part in form.parts}
    for name in left:
        weight_name = name.removesuffix("_rounded")
        if name.endswith(("weight_packed", "weight_scales")):
            raise file_error(path, f"nothing says how its tensor {short_repr(name)} is stored; get it again")
        if weight_name in weights:
            raise file_error(path, f"it has {short_repr(weight_name)} twice; get it again")
        spec = specs[name]
        weights[weight_name] = LazyWeight(
            weight_name, spec.shape, spec.dtype, spec.nbytes, partial(read_tensor, name)
        )
    if not weights:
        raise file_error(path, "it holds no weights; name a model that has some", "export")
    return {name: weights[name] for name in sorted(weights)}, tuple(sorted(tied))


def _read_checked_column_order(path: Path, name: str, read_tensor: Callable[[str], Tensor]) -> Tensor:
    """Return the column of a weight for each one that is stored, each once: else some would have no values."""
    order = read_tensor(name)
    with value_errors_as_file_errors(path, "export"):
        check_column_permutation(order, short_repr(name))
    return order


def _checked_lazy_coded_weight(
    path: Path,
    weight_name: str,
    form: CodedForm,
    specs: Mapping[str, TensorSpec],
    read_tensor: Callable[[str], Tensor],
) -> LazyWeight:
    packed, scales = f"{weight_name}_packed", f"{weight_name}_scales"
    *lead, columns = specs[packed].shape or (0,)
    columns = columns * 8 // form.bits
    weight = LazyWeight(
        weight_name,
        transposed_shape((*lead, columns)) if form.transposed else (*lead, columns),
        form,
        specs[packed].nbytes + specs[scales].nbytes,
        lambda: form.weight_from_parts([read_tensor(packed), read_tensor(scales)], columns),
        partial(_read_checked_column_order, path, f"{weight_name}_order", read_tensor) if form.gathered else None,
    )
    for part, spec in weight.file_tensor_specs().items():
        if specs.get(part) != spec:
            why = (
                f"{short_repr(part)} is {specs.get(part)}, and no weight in {form} has such a part: {spec} is needed"
            )
            raise file_error(path, f"{why}; get it again")
    return weight
