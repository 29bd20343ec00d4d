"""Writes a folder of transformers whose linear layers are packed, and everything else dense, one tensor at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import printable, refusal, show
from lowmem.io.atomic import atomic_folder, check_free, write_errors
from lowmem.io.container import write_plain
from lowmem.io.formats.architecture import Architecture, architecture_of
from lowmem.io.formats.exported import Exported
from lowmem.io.formats.stored_model import StoredModel, open_stored
from lowmem.io.metadata import layer_of
from lowmem.io.model_folder import CONFIG, WEIGHTS, copy_others
from lowmem.io.safetensors import TensorSpec
from lowmem.io.shards import INDEX, StoredWeight, divide, shard_name, swapped
from lowmem.nn.forms import CodedForm
from lowmem.quant.formats import get_format
from lowmem.quant.tensor import QuantizedTensor

SHARD_BYTES = 5 * 10**9
"""The most bytes of tensors in a file, unless one weight has more."""

_CONV1D = "it is transposed (Conv1D), so that blocks run along outputs, and the format's along inputs"


@dataclass(frozen=True)
class Packed:
    """A linear layer's weight in another program's format.

    Args:
        kind: how the weight is stored, as text.
        parts: its tensors, by their names in the layer.
        scheme: what the config says of the weight; hashable.
    """

    kind: str
    parts: Mapping[str, Tensor]
    scheme: Any

    def named(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a weight of some name."""
        return {name.removesuffix("weight") + part: tensor for part, tensor in self.parts.items()}


@dataclass(frozen=True)
class Packing:
    """A format of folders with packed linear layers.

    Args:
        name: of the format.
        pack: weight (out, in) and dtype of the model -> the same weight packed; ValueError: why that cannot be.
        pack_again: values (out, in), dtype, and the weight as it is stored unless that is transposed -> them packed
            with other scales or codes, and what they became. On the meta device the parts have no values. ValueError:
            why it is impossible.
        config: schemes by layer, dense layers, dtype -> the ``quantization_config``.
        conv1d: whether the format has transformers' Conv1D layers, transposed.
        keeps_weight: whether a loaded layer's codes are called ``weight``.
        warning: schemes of a folder -> what its user should know, or None.
    """

    name: str
    pack: Callable[[QuantizedTensor, torch.dtype], Packed]
    pack_again: Callable[[Tensor, torch.dtype, QuantizedTensor | None], tuple[Packed, Tensor | QuantizedTensor]]
    config: Callable[[Mapping[str, Any], Collection[str], torch.dtype], dict[str, Any]]
    conv1d: bool
    keeps_weight: bool
    warning: Callable[[Collection[Any]], str | None] = lambda schemes: None


@dataclass(frozen=True)
class _Plan:
    """What becomes of one weight."""

    specs: dict[str, TensorSpec]
    make: Callable[[], tuple[dict[str, Tensor], Exported]]
    scheme: Any = None


def write_folder(
    packing: Packing,
    source: Path,
    out: Path,
    *,
    requantize: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[Exported]:
    """Write a folder that lowmem wrote in another program's format, as ``export`` does, at once or not at all.

    Linear layers that lowmem stores in 4 bits are packed. What the other program leaves dense (embeddings, the output
    layer, tied weights, experts in one tensor) is written dense, in the dtype in which the model loads it. Tied
    weights stay tied. The tokenizer's and other files are copied. The same folder always gives the same bytes.

    Args:
        shard_bytes: the most bytes of tensors in a file, unless one weight has more.

    Warns:
        UserWarning: as ``packing.warning`` says.
    """
    check_free(out)
    with open_stored(source) as model:
        if model.config is None or model.folder is None or not source.is_dir():
            raise refusal(
                source, f"{packing.name} has folders: name one that lowmem wrote, with config.json", "export"
            )
        architecture = architecture_of(model.folder, model.config)
        _check_same(model, architecture)
        plans = _plans(model, architecture, packing, requantize)
        schemes = {layer_of(name): plan.scheme for name, plan in plans.items() if plan.scheme is not None}
        if not schemes:
            lacks = f"it has no linear layers in 4 bits that {packing.name} could hold"
            raise refusal(
                source, f"{lacks}; store the model's nn.Linear, if it has any, by lowmem quantize", "export"
            )
        why = None if packing.keeps_weight else architecture.refusal(schemes)
        if why is not None:
            raise refusal(source, why, "export")
        dense = [path for path in architecture.linear if path not in schemes]
        config = {**model.config, "quantization_config": packing.config(schemes, dense, architecture.dtype)}
        largest = max(sum(spec.nbytes for spec in plan.specs.values()) for plan in plans.values())
        shards = divide({name: plan.specs for name, plan in plans.items()}, max(shard_bytes, largest))
        with atomic_folder(out) as partial:
            copy_others(model.folder, partial, out, (CONFIG,))
            with write_errors(out):
                (partial / CONFIG).write_bytes(_json(config))
            rows = _write(partial, plans, shards, progress)
    if (warning := packing.warning(schemes.values())) is not None:
        warnings.warn(warning, UserWarning, stacklevel=3)  # the caller of export
    return sorted(rows, key=lambda row: row.name)


def _write(
    folder: Path, plans: dict[str, _Plan], shards: list[list[str]], progress: Callable[[str, int], None]
) -> list[Exported]:
    rows: list[Exported] = []
    weight_map: dict[str, str] = {}

    def tensors(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            parts, row = plans[name].make()
            rows.append(row)
            yield from parts.items()
            del parts
            progress(name, row.before_bytes)

    for number, names in enumerate(shards, 1):
        path = folder / WEIGHTS
        path = path if len(shards) == 1 else shard_name(path, number, len(shards))
        specs = {part: spec for name in names for part, spec in plans[name].specs.items()}
        write_plain(path, specs, tensors(names))
        weight_map |= dict.fromkeys(specs, path.name)
    if len(shards) > 1:
        size = sum(row.after_bytes for row in rows)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        with write_errors(folder):
            (folder / f"{WEIGHTS}{INDEX}").write_bytes(_json(index))
    return rows


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def _check_same(model: StoredModel, architecture: Architecture) -> None:
    """Raise unless the folder has the weights of the model that its config describes."""
    lacking = architecture.shapes.keys() - architecture.tied - model.weights.keys()
    unknown = {name for name, one in model.weights.items() if isinstance(one.form, CodedForm)}
    unknown -= architecture.shapes.keys()
    for what, names in (("lacks", lacking), ("has, and the model has not,", unknown)):
        if names:
            raise refusal(
                model.path, f"it {what} {show(min(names))} of the model that config.json describes", "export"
            )
    for name, one in model.weights.items():
        shape, own = architecture.shapes.get(name, one.shape), one.shape
        if isinstance(one.form, CodedForm):
            own, shape = (swapped(size) if one.transposed else size for size in (own, shape))
            bits = get_format(one.form.format).bits
            lead = len(own) - 1  # the last dimensions may be one row
            shape = (*shape[:lead], -(-torch.Size(shape[lead:]).numel() * bits // 8))
            own = (*own[:-1], own[-1] * bits // 8)
        if own != shape:
            raise refusal(
                model.path, f"{show(name)} has not the shape {show(shape)} of the model of config.json", "export"
            )


def _plans(model: StoredModel, architecture: Architecture, packing: Packing, requantize: bool) -> dict[str, _Plan]:
    plans: dict[str, _Plan] = {}
    refused: list[str] = []
    for name, weight in model.weights.items():
        if name in architecture.tied:
            continue  # its values are another one's
        layer = layer_of(name)
        kind = architecture.linear.get(layer) if name.rpartition(".")[2] == "weight" else None
        stays = layer in architecture.dense or kind not in ("linear", *(["conv1d"] if packing.conv1d else []))
        if not isinstance(weight.form, CodedForm) or stays:
            plans[name] = _dense(weight, architecture)
            continue
        try:
            plans[name] = _exact(weight, architecture, packing, kind == "conv1d")
        except ValueError as reason:
            if requantize:
                plans[name] = _again(weight, architecture, packing, kind == "conv1d")
            else:
                refused.append(f"{printable(name, 80)} ({weight.form.format}): {reason}")
    if refused:
        more = f"; and {len(refused) - 1} more" if len(refused) > 1 else ""
        how = "--requantize quantizes them again and prints the error that it adds"
        raise refusal(model.path, f"{packing.name} cannot hold it as it is: {refused[0]}{more}; {how}", "export")
    return plans


def _read(weight: StoredWeight, architecture: Architecture) -> QuantizedTensor:
    """Return a weight in 4 bits in the shape (*lead, columns); whether columns are odd, the model knows."""
    stored = weight.read()
    assert isinstance(stored, QuantizedTensor)
    shape = architecture.shapes[weight.name]
    shape, lead = (swapped(shape) if weight.transposed else shape), stored.shape[:-1]
    return replace(stored, shape=torch.Size((*lead, torch.Size(shape[len(lead) :]).numel())))


def _dense(weight: StoredWeight, architecture: Architecture) -> _Plan:
    name, dtype, shape = weight.name, weight.form, weight.shape
    if not isinstance(dtype, torch.dtype):
        dtype, shape = architecture.dtypes[name], architecture.shapes[name]

    def make() -> tuple[dict[str, Tensor], Exported]:
        tensor = weight.read() if dtype is weight.form else weight.plain(_read(weight, architecture), dtype)
        assert isinstance(tensor, Tensor)
        tensor = tensor.view(shape)
        kind = str(dtype).removeprefix("torch.")
        return {name: tensor}, Exported.compare(weight, name, kind, tensor, None, tensor.nbytes)

    return _Plan({name: TensorSpec(dtype, shape)}, make)


def _exact(weight: StoredWeight, architecture: Architecture, packing: Packing, transposed: bool) -> _Plan:
    """Plan to keep the codes of a layer; a ValueError says why it is impossible."""
    if transposed:
        raise ValueError(_CONV1D)
    if weight.transposed or weight.order is not None:
        raise ValueError(f"it is stored {'transposed' if weight.transposed else 'with its columns in another order'}")

    def make() -> tuple[dict[str, Tensor], Exported]:
        stored = _read(weight, architecture)
        return _row(weight, stored, packing.pack(stored, architecture.dtype), None)

    packed = packing.pack(_read(weight, architecture), architecture.dtype)
    return _plan(weight, packed, make)


def _again(weight: StoredWeight, architecture: Architecture, packing: Packing, transposed: bool) -> _Plan:
    dtype, shape = architecture.dtype, torch.Size(architecture.shapes[weight.name])

    def make() -> tuple[dict[str, Tensor], Exported]:
        stored = _read(weight, architecture)
        values = weight.plain(stored, torch.float32)
        assert isinstance(values, Tensor)
        try:
            given = values.T.contiguous() if transposed else values
            packed, after = packing.pack_again(given, dtype, stored if as_it_lies else None)
        except ValueError as reason:
            raise ValueError(f"{printable(weight.name)}: {reason}") from reason
        after = after.dequantize() if isinstance(after, QuantizedTensor) else after
        return _row(weight, values, packed, after.T.contiguous() if transposed else after)

    form = weight.form
    assert isinstance(form, CodedForm)
    as_it_lies = not (transposed or weight.transposed or weight.order is not None)
    empty = QuantizedTensor.empty(
        shape, form.format, form.block_size, form.scale_encoding, form.method, device="meta"
    )
    values = torch.empty(shape[::-1] if transposed else shape, dtype=torch.float32, device="meta")
    packed, _ = packing.pack_again(values, dtype, empty if as_it_lies else None)
    return _plan(weight, packed, make)


def _plan(weight: StoredWeight, packed: Packed, make: Callable[[], tuple[dict[str, Tensor], Exported]]) -> _Plan:
    specs = {part: TensorSpec.of(tensor) for part, tensor in packed.named(weight.name).items()}
    return _Plan(specs, make, packed.scheme)


def _row(
    weight: StoredWeight, before: Tensor | QuantizedTensor, packed: Packed, after: Tensor | None
) -> tuple[dict[str, Tensor], Exported]:
    size = sum(part.nbytes for part in packed.parts.values())
    return packed.named(weight.name), Exported.compare(weight, weight.name, packed.kind, before, after, size)
