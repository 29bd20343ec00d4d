"""Refuses a folder whose tensors are of another model than its config.json describes, before that model is allocated.

transformers fills what a folder lacks, or has in another shape, with random numbers. A config without sizes stands
for a model of the class's defaults, which may take a hundred times what the folder does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lowmem.errors import printable, show
from lowmem.io.safetensors import TensorSpec
from lowmem.io.source import Checkpoint

__all__ = ["Names", "refuse_retyped", "refuse_unfitting", "shapes_and_bytes", "specs_of"]

_SLACK = 2**24  # bytes of new parameters that any folder may lack
_COMPUTED = 2**28  # bytes of buffers that any model may compute: masks and positions of its longest input


class Names:
    """The parameters of a model, and which of them a tensor of a folder becomes in transformers.

    Args:
        model: on the meta device.
        conversions: how transformers renames and converts a folder's tensors.
    """

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
    """Return the dtypes and shapes of the tensors of safetensors files.

    Raises:
        FileError: a file is damaged.
    """
    specs: dict[str, TensorSpec] = {}
    for file in files:
        with Checkpoint(file) as checkpoint:
            specs |= checkpoint.specs
    return specs


def shapes_and_bytes(specs: Mapping[str, TensorSpec]) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return the shapes of a folder's tensors, and the bytes of all of them: what ``refuse_unfitting`` takes."""
    return {name: spec.shape for name, spec in specs.items()}, sum(spec.nbytes for spec in specs.values())


def refuse_retyped(
    model: Any, specs: Mapping[str, TensorSpec], parts: Mapping[str, torch.dtype], conversions: Sequence[Any]
) -> None:
    """Raise if a part of a stored weight has another dtype in a folder: its bits would mean something else.

    Args:
        model: on the meta device.
        specs: of the folder's tensors.
        parts: the dtypes of the parts, by their names in the model.
        conversions: as in ``Names``.

    Raises:
        ValueError: one has; it is named.
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
    """Raise if a model would get more new parameters, or buffers, than a folder has.

    Args:
        model: on the meta device.
        shapes: of the folder's tensors, by its names; None: not known.
        nbytes: what they take.
        conversions: as in ``Names``.

    Raises:
        ValueError: it would; the first tensor of another shape is named, or the first that the folder lacks.
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
