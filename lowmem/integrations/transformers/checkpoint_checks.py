"""Refuses folders whose index, shards, tensors and config.json contradict each other: transformers fills what a
folder lacks, or has in another shape, with random numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lowmem.errors import file_error, printable_line, short_repr
from lowmem.integrations.transformers.quantization_config import METHOD, LowmemConfig
from lowmem.io.formats.open_foreign import is_foreign_quantized_part
from lowmem.io.model_folder import WEIGHTS, read_quantization_config
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint, SafetensorsFile
from lowmem.io.safetensors_header import TensorSpec
from lowmem.io.shards import INDEX, read_weight_map

# Bytes of new parameters that any folder may lack
_SLACK = 2**24
# Bytes of buffers that any model may compute: masks and positions of its longest input
_COMPUTED = 2**28


def check_shard_index(files: Sequence[str]) -> None:
    """Raise a FileError if an index is damaged, or names other tensors than its files have, or files elsewhere."""
    for folder in sorted({Path(file).parent for file in files}):
        index = folder / f"{WEIGHTS}{INDEX}"
        if not index.exists():
            continue
        listed = set(read_weight_map(index).values())
        # Not those of a variant
        if listed == {Path(file).name for file in files if Path(file).parent == folder}:
            SafetensorsCheckpoint(index).__exit__()


def check_all_safetensors(files: Sequence[str]) -> None:
    """Raise a FileError for a file that transformers would read by pickle."""
    for file in files:
        if not file.endswith(".safetensors"):
            why = "lowmem reads safetensors only, and executed nothing; load the model without quantization_config=, "
            raise file_error(file, f"{why}and save it by save_pretrained, which writes them", "load")


def check_config_covers_stored_weights(tensor_names: Collection[str], config: LowmemConfig, prefix: str) -> None:
    """Raise a ValueError for a stored weight among a folder's tensors that no record in ``config.layers`` names.

    Both may lack the ``prefix`` of the base model.
    """
    configured_names = {
        str(name).removeprefix(f"{prefix}.") for record in config.layers for name in record.get("names", ())
    }
    for name in _stored_weight_names(tensor_names):
        bare_name = name.removeprefix(f"{prefix}.")
        if not configured_names & {bare_name, bare_name.removesuffix("weight").removesuffix(".")}:
            raise ValueError(
                f"the folder's config.json does not say how its tensor {short_repr(name)} is stored: get it again, "
                "or save "
                "the model again by save_pretrained"
            )


def check_not_foreign_quantized(folder: Path, tensor_names: Collection[str]) -> None:
    """Raise a ValueError if another program has quantized a folder, whose tensors have these names."""
    method = _quant_method_or_none(folder)
    if method is not None or any(is_foreign_quantized_part(name) for name in tensor_names):
        program = "another program" if method is None else short_repr(method)
        raise ValueError(
            f"a folder that {program} quantized has weights that would be quantized a second time: "
            "lowmem.integrations.transformers.from_exact(folder) keeps their codes; `lowmem quantize IN OUT "
            "--requantize` quantizes again what cannot be kept, and prints the error"
        )


def _quant_method_or_none(folder: Path) -> str | None:
    """Return the ``quant_method`` of a folder's config.json; None where transformers has read another config."""
    file = folder / "config.json"
    return read_quantization_config(file).get("quant_method") if file.exists() else None


def check_not_stored_by_lowmem(folder: Path, tensor_names: Collection[str]) -> None:
    """Raise a ValueError if lowmem stored a folder's weights: read as dense ones, all would be random."""
    method = _quant_method_or_none(folder)
    what = f"the weights of {short_repr(str(folder))} are stored by lowmem"
    if method == METHOD:
        raise ValueError(
            f"{what}, and config= is of a dense model: leave out config= and quantization_config=, which the folder "
            "itself has"
        )
    if any(_stored_weight_names(tensor_names)):
        says = "does not say how" if method is None else f"says quant_method={short_repr(method)}"
        raise ValueError(
            f"{what}, and its config.json {says}: get it again, or save the model again by save_pretrained"
        )


def _stored_weight_names(tensor_names: Collection[str]) -> list[str]:
    """Return the names of the weights of which a folder has the parts that lowmem stores."""
    name_set = set(tensor_names)
    fourbit = (name.removesuffix("_packed") for name in sorted(name_set) if name.endswith("_packed"))
    return [
        *(name for name in fourbit if f"{name}_scales" in name_set),
        *(name.removesuffix("_rounded") for name in sorted(name_set) if name.endswith("weight_rounded")),
    ]


class TensorToParameterMapping:
    """The parameters of a model, and which of them a tensor of a folder becomes by transformers' conversions."""

    def __init__(self, model: Any, conversions: Sequence[Any]) -> None:
        self._prefix = model.base_model_prefix
        self.parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        conversions = deepcopy(list(conversions))  # which note that they were used
        self._renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        self._converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
        self._by_pattern = {
            pattern: conversion for conversion in self._converters for pattern in conversion.source_patterns
        }

    def parameter_name_and_converter(self, tensor_name: str) -> tuple[str, WeightConverter | None]:
        """Return the parameter that a tensor becomes, or a part of it, and what converts it."""
        parameter_name, pattern = rename_source_key(
            tensor_name, self._renamings, self._converters, self._prefix, self.parameters
        )
        if parameter_name not in self.parameters and tensor_name in self.parameters:
            return tensor_name, None
        return parameter_name, None if pattern is None else self._by_pattern[pattern]


def safetensors_specs_by_name(files: Sequence[str]) -> dict[str, TensorSpec]:
    """Return the dtypes and shapes of the tensors of safetensors files."""
    specs: dict[str, TensorSpec] = {}
    for file in files:
        with SafetensorsFile(file) as checkpoint:
            specs |= checkpoint.specs
    return specs


def shapes_by_name_and_total_bytes(specs: Mapping[str, TensorSpec]) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return the shapes of a folder's tensors and their bytes, as ``check_folder_fills_model`` takes both."""
    return {name: spec.shape for name, spec in specs.items()}, sum(spec.nbytes for spec in specs.values())


def check_stored_part_dtypes(
    model: Any, specs: Mapping[str, TensorSpec], part_dtypes: Mapping[str, torch.dtype], conversions: Sequence[Any]
) -> None:
    """Raise a ValueError for a part of a stored weight with another dtype in a folder: its bits mean something else.

    ``part_dtypes`` are the dtypes of the parts, by their names in the model, which is on the meta device.
    """
    names = TensorToParameterMapping(model, conversions)
    for name, spec in specs.items():
        parameter_name = names.parameter_name_and_converter(name)[0]
        if parameter_name.endswith("_extra_state") and spec.dtype != torch.uint8:
            raise ValueError(
                f"config.json says that {printable_line(name, 80)} is stored, and the folder has it dense: remove "
                "quantization_config from config.json, or get it again from one source"
            )
        wanted = part_dtypes.get(parameter_name, spec.dtype)
        if wanted != spec.dtype:
            raise ValueError(
                f"{printable_line(name, 80)} is {spec.dtype} in the folder, and its config.json says {wanted}: get "
                "it "
                "again from one source"
            )


def check_folder_fills_model(
    model: Any, tensor_shapes: Mapping[str, tuple[int, ...] | None], total_bytes: int, conversions: Sequence[Any]
) -> None:
    """Raise a ValueError if a model on the meta device would get more new parameters, or buffers, than a folder has.

    ``tensor_shapes`` are those of the folder's tensors, by name, with None for an unknown shape; ``total_bytes`` is
    their sum.
    """
    names = TensorToParameterMapping(model, conversions)
    filled: set[int] = set()
    other: list[str] = []
    for name, shape in tensor_shapes.items():
        parameter_name, converter = names.parameter_name_and_converter(name)
        parameter = names.parameters.get(parameter_name)
        if parameter is None:
            continue
        if shape is None or converter is not None or tuple(parameter.shape) == shape:
            filled.add(id(parameter))
        else:
            other.append(
                f"{printable_line(name, 80)} is {short_repr(shape)}, and the model's {tuple(parameter.shape)}"
            )
    lacking = {name: tensor for name, tensor in names.parameters.items() if id(tensor) not in filled}
    new = sum({id(tensor): tensor.numel() * tensor.itemsize for tensor in lacking.values()}.values())
    if new > total_bytes + _SLACK:
        first = other[0] if other else f"it lacks {next(iter(lacking))}"
        raise ValueError(
            f"config.json describes a {type(model).__name__} of which {new} bytes are not in the folder, whose "
            f"tensors take {total_bytes}: {first}; its sizes are another model's, or missing: get config.json again"
        )
    buffers = {name: tensor.numel() * tensor.itemsize for name, tensor in model.named_buffers() if tensor.is_meta}
    if sum(buffers.values()) > total_bytes + _COMPUTED:
        largest = max(buffers, key=buffers.__getitem__)
        raise ValueError(
            f"config.json describes a {type(model).__name__} that computes {sum(buffers.values())} bytes of buffers, "
            f"as {printable_line(largest, 80)}, for {total_bytes} bytes of tensors: get config.json again"
        )
