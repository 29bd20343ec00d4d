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

from lowmem.errors import refusal, refusing, show
from lowmem.io.atomic import starts_with
from lowmem.io.formats.gguf.container import MAGIC
from lowmem.io.formats.peft.reading import refuse_adapters
from lowmem.io.metadata import check_config, form_of
from lowmem.io.model_folder import CONFIG, check_layers, read_model_config, weights_in
from lowmem.io.safetensors import TensorSpec
from lowmem.io.shards import StoredWeight, read_model, swapped
from lowmem.io.source import Source
from lowmem.nn.forms import CodedForm
from lowmem.nn.gathered_weight import check_order


@dataclass(frozen=True)
class StoredModel:
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
    weights: dict[str, StoredWeight]
    tied: tuple[str, ...]


@contextmanager
def open_stored(path: Path) -> Iterator[StoredModel]:
    """Open a folder, file or index; a FileError if lowmem did not write it, or it has adapters, or is damaged."""
    if path.is_dir():
        with _folder(path) as model:
            yield model
        return
    if starts_with(path, MAGIC):
        raise refusal(path, "it is a GGUF file: make it lowmem's first, by lowmem quantize", "export")
    file = read_model(path)
    if file.metadata.get("adapters"):
        raise refusal(path, _adapted(file.metadata["adapters"]), "export")
    beside = path.parent if (path.parent / CONFIG).is_file() else None
    config = None if beside is None else read_model_config(beside / CONFIG)
    specs = {name: TensorSpec.of(tensor) for name, tensor in file.tensors.items()}
    weights, tied = _weights(path, specs, file.metadata["layers"], file.tensors.__getitem__)
    yield StoredModel(path, beside, config, weights, tied)


@contextmanager
def _folder(path: Path) -> Iterator[StoredModel]:
    if not (path / CONFIG).is_file():
        refuse_adapters(path, "export")
        raise refusal(
            path, f"it has no {CONFIG}: name a folder that lowmem quantize or save_pretrained wrote", "export"
        )
    config = read_model_config(path / CONFIG)
    record = config.pop("quantization_config", None) or {}
    method = record.get("quant_method")
    if record and not str(method).startswith("lowmem"):
        raise refusal(path, f"{show(method)} quantized it: make it lowmem's first, by lowmem quantize", "export")
    try:
        check_config(record)
    except (TypeError, ValueError) as reason:
        raise refusal(path / CONFIG, str(reason), "export") from None
    if record.get("adapters"):
        raise refusal(path, _adapted(record["adapters"]), "export")
    with Source(weights_in(path, "export")) as source:
        check_layers(path / CONFIG, config, len(source.specs))
        weights, tied = _weights(path, source.specs, _records(path, record), source.read_tensor)
        yield StoredModel(path, path, config, weights, tied)


def _adapted(adapters: object) -> str:
    first = show(next(iter(adapters))) if isinstance(adapters, dict) else show(adapters)
    return f"it has adapters, as at {first}: merge them (lowmem.merge), or delete them and ship them by save_adapter"


def _records(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the records of a folder's config by path, as a file of lowmem's has them."""
    found: dict[str, Any] = {}
    for layer in record.get("layers", []):
        names = layer.get("names")
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise refusal(path / CONFIG, f"its record of layers has {show(layer)}; get it again")
        own = {key: value for key, value in layer.items() if key != "names"}
        found |= dict.fromkeys(names, own)
    return found


def _weights(
    path: Path, specs: Mapping[str, TensorSpec], records: Mapping[str, Any], read: Callable[[str], Tensor]
) -> tuple[dict[str, StoredWeight], tuple[str, ...]]:
    """Return the weights of the tensors of a file, and the names of those that have no tensors."""
    weights: dict[str, StoredWeight] = {}
    left = {name for name in specs if not name.endswith("_extra_state")}
    tied = []
    for place, record in records.items():
        try:
            form = form_of(record)
        except ValueError as reason:
            raise refusal(path, f"the record of {show(place)} is not lowmem's: {reason}; upgrade lowmem") from None
        if not isinstance(form, CodedForm):
            continue
        form, weight = replace(form, compute_dtype=None), f"{place}.weight".lstrip(".")
        stored = next((one for one in (weight, place) if {f"{one}_packed", f"{one}_scales"} <= specs.keys()), None)
        name = stored or weight
        if name in left and specs[name].dtype == torch.uint8:  # of a folder: the format's name, which the record has
            left.discard(name)
        if stored is None:
            tied.append(name)
            continue
        weights[name] = _coded(path, name, form, specs, read)
        left -= {f"{name}_{part}" for part in form.parts}
    for name in left:
        own = name.removesuffix("_rounded")
        if name.endswith(("weight_packed", "weight_scales")):
            raise refusal(path, f"nothing says how its tensor {show(name)} is stored; get it again")
        if own in weights:
            raise refusal(path, f"it has {show(own)} twice; get it again")
        spec = specs[name]
        weights[own] = StoredWeight(own, spec.shape, spec.dtype, spec.nbytes, partial(read, name))
    if not weights:
        raise refusal(path, "it holds no weights; name a model that has some", "export")
    return {name: weights[name] for name in sorted(weights)}, tuple(sorted(tied))


def _order(path: Path, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """Return the column of a weight for each one that is stored, each once: else some would have no values."""
    order = read(name)
    with refusing(path, "export"):
        check_order(order, show(name))
    return order


def _coded(
    path: Path, name: str, form: CodedForm, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor]
) -> StoredWeight:
    packed, scales = f"{name}_packed", f"{name}_scales"
    *lead, columns = specs[packed].shape or (0,)
    columns = columns * 8 // form.bits
    weight = StoredWeight(
        name,
        swapped((*lead, columns)) if form.transposed else (*lead, columns),
        form,
        specs[packed].nbytes + specs[scales].nbytes,
        lambda: form.join([read(packed), read(scales)], columns),
        partial(_order, path, f"{name}_order", read) if form.gathered else None,
    )
    for part, spec in weight.specs().items():
        if specs.get(part) != spec:
            why = f"{show(part)} is {specs.get(part)}, and no weight in {form} has such a part: {spec} is needed"
            raise refusal(path, f"{why}; get it again")
    return weight
