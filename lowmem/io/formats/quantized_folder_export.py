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

from lowmem.errors import file_error, printable_line, short_repr
from lowmem.io.filesystem import atomic_folder, check_not_exists, write_errors_with_path
from lowmem.io.formats.export_results import Exported
from lowmem.io.formats.lazy_model import LazyModelContent, open_lazy_model
from lowmem.io.formats.transformers_architecture import Architecture, architecture_from_config
from lowmem.io.lowmem_file import write_plain_safetensors_atomically
from lowmem.io.metadata_records import parameter_record_key
from lowmem.io.model_folder import CONFIG, WEIGHTS, copy_non_weight_files
from lowmem.io.safetensors_header import TensorSpec
from lowmem.io.shards import INDEX, LazyWeight, shard_path, sorted_weight_names_per_shard, transposed_shape
from lowmem.nn.forms import CodedForm
from lowmem.quant.formats import get_format
from lowmem.quant.tensor import QuantizedTensor

SHARD_BYTES = 5 * 10**9
"""The most bytes of tensors in a file, unless one weight has more."""

_CONV1D = "it is transposed (Conv1D), so that blocks run along outputs, and the format's along inputs"


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer's weight in another program's format.

    Args:
        kind: how the weight is stored, as text.
        parts: its tensors, by their names in the layer.
        scheme: what the config says of the weight; hashable.
    """

    kind: str
    parts: Mapping[str, Tensor]
    scheme: Any

    def tensors_by_full_name(self, weight_name: str) -> dict[str, Tensor]:
        """Return the tensors of a weight of some name."""
        return {weight_name.removesuffix("weight") + part: tensor for part, tensor in self.parts.items()}


@dataclass(frozen=True)
class PackingFormat:
    """A format of folders with packed linear layers.

    Args:
        name: of the format.
        pack_exactly: weight (out, in) and dtype of the model -> the same weight packed; ValueError: why that cannot
            be.
        packed_and_requantized: values (out, in), dtype, and the stored weight unless it is transposed -> them packed
            with other scales or codes, and what they became. On the meta device the parts have no values. ValueError:
            why it is impossible.
        config: schemes by layer, dense layers, dtype -> the ``quantization_config``.
        conv1d: whether the format has transformers' Conv1D layers, transposed.
        keeps_weight: whether a loaded layer's codes are called ``weight``.
        warning: schemes of a folder -> what its user should know, or None.
    """

    name: str
    pack_exactly: Callable[[QuantizedTensor, torch.dtype], PackedWeight]
    packed_and_requantized: Callable[
        [Tensor, torch.dtype, QuantizedTensor | None], tuple[PackedWeight, Tensor | QuantizedTensor]
    ]
    config: Callable[[Mapping[str, Any], Collection[str], torch.dtype], dict[str, Any]]
    conv1d: bool
    keeps_weight: bool
    warning: Callable[[Collection[Any]], str | None] = lambda schemes: None


@dataclass(frozen=True)
class _WeightExportPlan:
    """What becomes of one weight."""

    specs: dict[str, TensorSpec]
    make: Callable[[], tuple[dict[str, Tensor], Exported]]
    scheme: Any = None


def export_quantized_folder(
    packing: PackingFormat,
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
    check_not_exists(out)
    with open_lazy_model(source) as model:
        if model.config is None or model.folder is None or not source.is_dir():
            raise file_error(
                source, f"{packing.name} has folders: name one that lowmem wrote, with config.json", "export"
            )
        architecture = architecture_from_config(model.folder, model.config)
        _check_weights_match_architecture(model, architecture)
        plans = _plan_weight_exports_or_refuse(model, architecture, packing, requantize)
        schemes = {parameter_record_key(name): plan.scheme for name, plan in plans.items() if plan.scheme is not None}
        if not schemes:
            lacks = f"it has no linear layers in 4 bits that {packing.name} could hold"
            raise file_error(
                source, f"{lacks}; store the model's nn.Linear, if it has any, by lowmem quantize", "export"
            )
        why = None if packing.keeps_weight else architecture.refusal(schemes)
        if why is not None:
            raise file_error(source, why, "export")
        dense = [path for path in architecture.linear if path not in schemes]
        config = {**model.config, "quantization_config": packing.config(schemes, dense, architecture.dtype)}
        largest = max(sum(spec.nbytes for spec in plan.specs.values()) for plan in plans.values())
        shards = sorted_weight_names_per_shard(
            {name: plan.specs for name, plan in plans.items()}, max(shard_bytes, largest)
        )
        with atomic_folder(out) as partial:
            copy_non_weight_files(model.folder, partial, out, (CONFIG,))
            with write_errors_with_path(out):
                (partial / CONFIG).write_bytes(_json_bytes(config))
            rows = _write_shards_and_index(partial, plans, shards, progress)
    if (warning := packing.warning(schemes.values())) is not None:
        # The caller of export
        warnings.warn(warning, UserWarning, stacklevel=3)
    return sorted(rows, key=lambda row: row.name)


def _write_shards_and_index(
    folder: Path, plans: dict[str, _WeightExportPlan], shards: list[list[str]], progress: Callable[[str, int], None]
) -> list[Exported]:
    rows: list[Exported] = []
    weight_map: dict[str, str] = {}

    def iterate_tensors_and_add_rows(weight_names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in weight_names:
            parts, row = plans[name].make()
            rows.append(row)
            yield from parts.items()
            del parts
            progress(name, row.before_bytes)

    for number, names in enumerate(shards, 1):
        path = folder / WEIGHTS
        path = path if len(shards) == 1 else shard_path(path, number, len(shards))
        specs = {part: spec for name in names for part, spec in plans[name].specs.items()}
        write_plain_safetensors_atomically(path, specs, iterate_tensors_and_add_rows(names))
        weight_map |= dict.fromkeys(specs, path.name)
    if len(shards) > 1:
        size = sum(row.after_bytes for row in rows)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        with write_errors_with_path(folder):
            (folder / f"{WEIGHTS}{INDEX}").write_bytes(_json_bytes(index))
    return rows


def _json_bytes(content: Any) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def _check_weights_match_architecture(model: LazyModelContent, architecture: Architecture) -> None:
    """Raise unless the folder has the weights of the model that its config describes."""
    lacking = architecture.shapes.keys() - architecture.tied - model.weights.keys()
    unknown = {name for name, weight in model.weights.items() if isinstance(weight.form, CodedForm)}
    unknown -= architecture.shapes.keys()
    for what, names in (("lacks", lacking), ("has, and the model has not,", unknown)):
        if names:
            raise file_error(
                model.path, f"it {what} {short_repr(min(names))} of the model that config.json describes", "export"
            )
    for name, weight in model.weights.items():
        shape, stored_shape = architecture.shapes.get(name, weight.shape), weight.shape
        if isinstance(weight.form, CodedForm):
            stored_shape, shape = (
                transposed_shape(size) if weight.is_transposed else size for size in (stored_shape, shape)
            )
            bits = get_format(weight.form.format).bits
            # The last dimensions may be one row
            lead = len(stored_shape) - 1
            shape = (*shape[:lead], -(-torch.Size(shape[lead:]).numel() * bits // 8))
            stored_shape = (*stored_shape[:-1], stored_shape[-1] * bits // 8)
        if stored_shape != shape:
            raise file_error(
                model.path,
                f"{short_repr(name)} has not the shape {short_repr(shape)} of the model of config.json",
                "export",
            )


def _plan_weight_exports_or_refuse(
    model: LazyModelContent, architecture: Architecture, packing: PackingFormat, requantize: bool
) -> dict[str, _WeightExportPlan]:
    plans: dict[str, _WeightExportPlan] = {}
    refused: list[str] = []
    for name, weight in model.weights.items():
        if name in architecture.tied:
            continue  # its values are another one's
        layer = parameter_record_key(name)
        kind = architecture.linear.get(layer) if name.rpartition(".")[2] == "weight" else None
        stays = layer in architecture.dense or kind not in ("linear", *(["conv1d"] if packing.conv1d else []))
        if not isinstance(weight.form, CodedForm) or stays:
            plans[name] = _dense_export_plan(weight, architecture)
            continue
        try:
            plans[name] = _exact_export_plan(weight, architecture, packing, kind == "conv1d")
        except ValueError as reason:
            if requantize:
                plans[name] = _requantizing_export_plan(weight, architecture, packing, kind == "conv1d")
            else:
                refused.append(f"{printable_line(name, 80)} ({weight.form.format}): {reason}")
    if refused:
        more = f"; and {len(refused) - 1} more" if len(refused) > 1 else ""
        how = "--requantize quantizes them again and prints the error that it adds"
        raise file_error(model.path, f"{packing.name} cannot hold it as it is: {refused[0]}{more}; {how}", "export")
    return plans


def _read_coded_weight_matrix(weight: LazyWeight, architecture: Architecture) -> QuantizedTensor:
    """Return a weight in 4 bits in the shape (*lead, columns); whether columns are odd, the model knows."""
    stored = weight.read()
    assert isinstance(stored, QuantizedTensor)
    shape = architecture.shapes[weight.name]
    shape, lead = (transposed_shape(shape) if weight.is_transposed else shape), stored.shape[:-1]
    return replace(stored, shape=torch.Size((*lead, torch.Size(shape[len(lead) :]).numel())))


def _dense_export_plan(weight: LazyWeight, architecture: Architecture) -> _WeightExportPlan:
    name, dtype, shape = weight.name, weight.form, weight.shape
    if not isinstance(dtype, torch.dtype):
        dtype, shape = architecture.dtypes[name], architecture.shapes[name]

    def read_dense_tensor_and_result() -> tuple[dict[str, Tensor], Exported]:
        tensor = (
            weight.read()
            if dtype is weight.form
            else weight.weight_in_model_layout(_read_coded_weight_matrix(weight, architecture), dtype)
        )
        assert isinstance(tensor, Tensor)
        tensor = tensor.view(shape)
        kind = str(dtype).removeprefix("torch.")
        return {name: tensor}, Exported.compare(weight, name, kind, tensor, None, tensor.nbytes)

    return _WeightExportPlan({name: TensorSpec(dtype, shape)}, read_dense_tensor_and_result)


def _exact_export_plan(
    weight: LazyWeight, architecture: Architecture, packing: PackingFormat, is_conv1d: bool
) -> _WeightExportPlan:
    """Plan to keep the codes of a layer; a ValueError says why it is impossible."""
    if is_conv1d:
        raise ValueError(_CONV1D)
    if weight.is_transposed or weight.order is not None:
        raise ValueError(
            f"it is stored {'transposed' if weight.is_transposed else 'with its columns in another order'}"
        )

    def pack_tensors_and_result() -> tuple[dict[str, Tensor], Exported]:
        stored = _read_coded_weight_matrix(weight, architecture)
        return _packed_tensors_and_result(weight, stored, packing.pack_exactly(stored, architecture.dtype), None)

    packed = packing.pack_exactly(_read_coded_weight_matrix(weight, architecture), architecture.dtype)
    return _packed_weight_export_plan(weight, packed, pack_tensors_and_result)


def _requantizing_export_plan(
    weight: LazyWeight, architecture: Architecture, packing: PackingFormat, is_conv1d: bool
) -> _WeightExportPlan:
    dtype, shape = architecture.dtype, torch.Size(architecture.shapes[weight.name])

    def requantize_tensors_and_result() -> tuple[dict[str, Tensor], Exported]:
        stored = _read_coded_weight_matrix(weight, architecture)
        values = weight.weight_in_model_layout(stored, torch.float32)
        assert isinstance(values, Tensor)
        try:
            values_to_pack = values.T.contiguous() if is_conv1d else values
            packed, after = packing.packed_and_requantized(values_to_pack, dtype, stored if in_model_layout else None)
        except ValueError as reason:
            raise ValueError(f"{printable_line(weight.name)}: {reason}") from reason
        after = after.dequantize() if isinstance(after, QuantizedTensor) else after
        return _packed_tensors_and_result(weight, values, packed, after.T.contiguous() if is_conv1d else after)

    form = weight.form
    assert isinstance(form, CodedForm)
    in_model_layout = not (is_conv1d or weight.is_transposed or weight.order is not None)
    empty = QuantizedTensor.empty(
        shape, form.format, form.block_size, form.scale_encoding, form.method, device="meta"
    )
    values = torch.empty(shape[::-1] if is_conv1d else shape, dtype=torch.float32, device="meta")
    packed, _ = packing.packed_and_requantized(values, dtype, empty if in_model_layout else None)
    return _packed_weight_export_plan(weight, packed, requantize_tensors_and_result)


def _packed_weight_export_plan(
    weight: LazyWeight,
    packed: PackedWeight,
    make_tensors_and_result: Callable[[], tuple[dict[str, Tensor], Exported]],
) -> _WeightExportPlan:
    specs = {
        part: TensorSpec.from_tensor(tensor) for part, tensor in packed.tensors_by_full_name(weight.name).items()
    }
    return _WeightExportPlan(specs, make_tensors_and_result, packed.scheme)


def _packed_tensors_and_result(
    weight: LazyWeight, before: Tensor | QuantizedTensor, packed: PackedWeight, after: Tensor | None
) -> tuple[dict[str, Tensor], Exported]:
    size = sum(part.nbytes for part in packed.parts.values())
    return packed.tensors_by_full_name(weight.name), Exported.compare(
        weight, weight.name, packed.kind, before, after, size
    )
