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

from lowmem.errors import printable, refusal, show
from lowmem.integrations.transformers.config import METHOD, LowmemConfig
from lowmem.io.formats.recognize import is_coded
from lowmem.io.model_folder import WEIGHTS, quantization_of
from lowmem.io.safetensors import TensorSpec
from lowmem.io.shards import INDEX, read_index
from lowmem.io.source import Checkpoint, Source

_SLACK = 2**24  # bytes of new parameters that any folder may lack
_COMPUTED = 2**28  # bytes of buffers that any model may compute: masks and positions of its longest input


def check_index(files: Sequence[str]) -> None:
    """Raise a FileError if an index is damaged, or names other tensors than its files have, or files elsewhere."""
    for folder in sorted({Path(file).parent for file in files}):
        index = folder / f"{WEIGHTS}{INDEX}"
        if not index.exists():
            continue
        listed = set(read_index(index).values())
        if listed == {Path(file).name for file in files if Path(file).parent == folder}:  # not those of a variant
            Source(index).__exit__()


def refuse_pickles(files: Sequence[str]) -> None:
    """Raise a FileError for a file that transformers would read by pickle."""
    for file in files:
        if not file.endswith(".safetensors"):
            why = "lowmem reads safetensors only, and executed nothing; load the model without quantization_config=, "
            raise refusal(file, f"{why}and save it by save_pretrained, which writes them", "load")


def refuse_untold(names: Collection[str], config: LowmemConfig, prefix: str) -> None:
    """Raise a ValueError for a stored weight among a folder's tensors that no record in ``config.layers`` names.

    Both may lack the ``prefix`` of the base model.
    """
    told = {str(name).removeprefix(f"{prefix}.") for record in config.layers for name in record.get("names", ())}
    for name in _stored(names):
        own = name.removeprefix(f"{prefix}.")
        if not told & {own, own.removesuffix("weight").removesuffix(".")}:
            raise ValueError(
                f"the folder's config.json does not say how its tensor {show(name)} is stored: get it again, or save "
                "the model again by save_pretrained"
            )


def refuse_coded(folder: Path, names: Collection[str]) -> None:
    """Raise a ValueError if another program has quantized a folder, whose tensors have these names."""
    method = _method_of(folder)
    if method is not None or any(is_coded(name) for name in names):
        program = "another program" if method is None else show(method)
        raise ValueError(
            f"a folder that {program} quantized has weights that would be quantized a second time: "
            "lowmem.integrations.transformers.from_exact(folder) keeps their codes; `lowmem quantize IN OUT "
            "--requantize` quantizes again what cannot be kept, and prints the error"
        )


def _method_of(folder: Path) -> str | None:
    """Return the ``quant_method`` of a folder's config.json; None where transformers has read another config."""
    file = folder / "config.json"
    return quantization_of(file).get("quant_method") if file.exists() else None


def refuse_unread(folder: Path, names: Collection[str]) -> None:
    """Raise a ValueError if lowmem stored a folder's weights: read as dense ones, all would be random."""
    method = _method_of(folder)
    what = f"the weights of {show(str(folder))} are stored by lowmem"
    if method == METHOD:
        raise ValueError(
            f"{what}, and config= is of a dense model: leave out config= and quantization_config=, which the folder "
            "itself has"
        )
    if any(_stored(names)):
        says = "does not say how" if method is None else f"says quant_method={show(method)}"
        raise ValueError(
            f"{what}, and its config.json {says}: get it again, or save the model again by save_pretrained"
        )


def _stored(names: Collection[str]) -> list[str]:
    """Return the names of the weights of which a folder has the parts that lowmem stores."""
    found = set(names)
    fourbit = (name.removesuffix("_packed") for name in sorted(found) if name.endswith("_packed"))
    return [
        *(name for name in fourbit if f"{name}_scales" in found),
        *(name.removesuffix("_rounded") for name in sorted(found) if name.endswith("weight_rounded")),
    ]


class Names:
    """The parameters of a model, and which of them a tensor of a folder becomes by transformers' conversions."""

    def __init__(self, model: Any, conversions: Sequence[Any]) -> None:
        self._prefix = model.base_model_prefix
        self.parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        conversions = deepcopy(list(conversions))  # which note that they were used
        self._renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        self._converters = [one for one in conversions if isinstance(one, WeightConverter)]
        self._by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}

    def of(self, name: str) -> tuple[str, WeightConverter | None]:
        """Return the parameter that a tensor becomes, or a part of it, and what converts it."""
        found, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.parameters)
        if found not in self.parameters and name in self.parameters:
            return name, None
        return found, None if pattern is None else self._by_pattern[pattern]


def specs_of(files: Sequence[str]) -> dict[str, TensorSpec]:
    """Return the dtypes and shapes of the tensors of safetensors files."""
    specs: dict[str, TensorSpec] = {}
    for file in files:
        with Checkpoint(file) as checkpoint:
            specs |= checkpoint.specs
    return specs


def shapes_and_bytes(specs: Mapping[str, TensorSpec]) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return the shapes of a folder's tensors and their bytes, as ``refuse_unfitting`` takes both."""
    return {name: spec.shape for name, spec in specs.items()}, sum(spec.nbytes for spec in specs.values())


def refuse_retyped(
    model: Any, specs: Mapping[str, TensorSpec], parts: Mapping[str, torch.dtype], conversions: Sequence[Any]
) -> None:
    """Raise a ValueError for a part of a stored weight with another dtype in a folder: its bits mean something else.

    ``parts`` are the dtypes of the parts, by their names in the model, which is on the meta device.
    """
    names = Names(model, conversions)
    for name, spec in specs.items():
        own = names.of(name)[0]
        if own.endswith("_extra_state") and spec.dtype != torch.uint8:
            raise ValueError(
                f"config.json says that {printable(name, 80)} is stored, and the folder has it dense: remove "
                "quantization_config from config.json, or get it again from one source"
            )
        wanted = parts.get(own, spec.dtype)
        if wanted != spec.dtype:
            raise ValueError(
                f"{printable(name, 80)} is {spec.dtype} in the folder, and its config.json says {wanted}: get it "
                "again from one source"
            )


def refuse_unfitting(
    model: Any, shapes: Mapping[str, tuple[int, ...] | None], nbytes: int, conversions: Sequence[Any]
) -> None:
    """Raise a ValueError if a model on the meta device would get more new parameters, or buffers, than a folder has.

    ``shapes`` are those of the folder's tensors, by name, with None for an unknown shape; ``nbytes`` is their sum.
    """
    names = Names(model, conversions)
    filled: set[int] = set()
    other: list[str] = []
    for name, shape in shapes.items():
        found, converter = names.of(name)
        parameter = names.parameters.get(found)
        if parameter is None:
            continue
        if shape is None or converter is not None or tuple(parameter.shape) == shape:
            filled.add(id(parameter))
        else:
            other.append(f"{printable(name, 80)} is {show(shape)}, and the model's {tuple(parameter.shape)}")
    lacking = {name: one for name, one in names.parameters.items() if id(one) not in filled}
    new = sum({id(one): one.numel() * one.itemsize for one in lacking.values()}.values())
    if new > nbytes + _SLACK:
        first = other[0] if other else f"it lacks {next(iter(lacking))}"
        raise ValueError(
            f"config.json describes a {type(model).__name__} of which {new} bytes are not in the folder, whose "
            f"tensors take {nbytes}: {first}; its sizes are another model's, or missing: get config.json again"
        )
    buffers = {name: one.numel() * one.itemsize for name, one in model.named_buffers() if one.is_meta}
    if sum(buffers.values()) > nbytes + _COMPUTED:
        largest = max(buffers, key=buffers.__getitem__)
        raise ValueError(
            f"config.json describes a {type(model).__name__} that computes {sum(buffers.values())} bytes of buffers, "
            f"as {printable(largest, 80)}, for {nbytes} bytes of tensors: get config.json again"
        )
