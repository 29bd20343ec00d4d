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
from lowmem.io.shards import read_model
from lowmem.io.source import Source
from lowmem.nn.forms import CodedForm
from lowmem.nn.gathered_weight import check_order
from lowmem.quant.formats import get_format
from lowmem.quant.tensor import QuantizedTensor


def swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the transpose, of a stack of matrices."""
    return (*shape[:-2], shape[-1], shape[-2])


@dataclass(frozen=True)
class StoredWeight:
    """A weight, whose values are read when they are asked for.

    Args:
        name: as the dense model's state has it, such as ``model.layers.0.mlp.up_proj.weight``.
        shape: of the weight. In 4 bits the last dimension is even: an odd one is not told from the next.
        form: how the weight is stored: in 4 or 8 bits, or dense in a dtype.
        nbytes: what the weight takes in the source.
        read: returns the weight, in newly allocated memory or as a view of the mapped file.
        transposed: whether the last two dimensions of what ``read`` returns are swapped.
        order: returns the column of the weight for each column that ``read`` returns, int32; None: they are the same.
    """

    name: str
    shape: tuple[int, ...]
    form: CodedForm | torch.dtype
    nbytes: int
    read: Callable[[], QuantizedTensor | Tensor]
    transposed: bool = False
    order: Callable[[], Tensor] | None = None

    def plain(
        self, weight: QuantizedTensor | Tensor | None = None, dtype: torch.dtype | None = None
    ) -> QuantizedTensor | Tensor:
        """Return the weight in its own shape and order of columns.

        Args:
            weight: what ``read`` returned; None: it is read.
            dtype: of the values; None: float32 where ``read`` has other columns, else as it is stored.
        """
        weight = self.read() if weight is None else weight
        if not self.transposed and self.order is None and dtype is None:
            return weight
        dtype = dtype or torch.float32
        values = weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight.to(dtype)
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(-1, self.order().long(), values)
        return values.transpose(-1, -2).contiguous() if self.transposed else values

    @property
    def kept(self) -> str:
        """How it is stored, as text."""
        return str(self.form).removeprefix("torch.")


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
        flags, form = form.flags, replace(form, transposed=False, gathered=False, compute_dtype=None)
        name, parts = _parts(place, specs)
        if name in left and specs[name].dtype == torch.uint8:  # of a folder: the format's name, which the record has
            left.discard(name)
        if parts is None:
            tied.append(name)
            continue
        weights[name] = weight = _fourbit(path, name, form, parts, specs, read)
        left -= set(parts)
        if "gathered" in flags:
            order = parts[0].removesuffix("packed") + "order"
            if specs.get(order) != TensorSpec(torch.int32, weight.shape[-1:]):
                raise refusal(path, f"{show(name)} has no {show(order)} of its columns; get it again")
            weights[name] = replace(weights[name], order=partial(_order, path, order, read))
            left.discard(order)
        if "transposed" in flags:
            weights[name] = replace(weights[name], shape=swapped(weight.shape), transposed=True)
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


def _parts(place: str, specs: Mapping[str, TensorSpec]) -> tuple[str, tuple[str, str] | None]:
    """Return the names of the weight of a record at a module or parameter, and of its codes and scales."""
    weight = f"{place}.weight".lstrip(".")
    for name in (weight, place):
        packed, scales = f"{name}_packed", f"{name}_scales"
        if packed in specs and scales in specs:
            return name, (packed, scales)
    return weight, None


def _fourbit(
    path: Path,
    name: str,
    form: CodedForm,
    parts: tuple[str, str],
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
) -> StoredWeight:
    packed, scales = (specs[part] for part in parts)
    shape = (*packed.shape[:-1], packed.shape[-1] * 8 // get_format(form.format).bits) if packed.shape else ()
    empty = QuantizedTensor.empty(
        torch.Size(shape or (1,)), form.format, form.block_size, form.scale_encoding, form.method, device="meta"
    )
    wanted = TensorSpec.of(empty.scales.view(torch.uint8)) if shape else None
    if packed.dtype is not torch.uint8 or scales != wanted:
        why = f"{show(parts[0])} {packed.shape} and {show(parts[1])} {scales.shape} are no weight in {form}"
        raise refusal(path, f"{why}; get it again")

    def read_both() -> QuantizedTensor:
        return form.join([read(part) for part in parts], shape[-1])

    return StoredWeight(name, tuple(shape), form, packed.nbytes + scales.nbytes, read_both)
