"""Converts a checkpoint on disk, one tensor at a time, to the file that ``save`` writes for the same model converted
in memory with ``embeddings="4bit"``, byte for byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import printable_line
from lowmem.io.metadata_records import parameter_record_key
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint, check_each_pattern_matches_a_tensor
from lowmem.io.safetensors_header import TensorSpec
from lowmem.io.shards import LazyWeight, check_writable_model_path, write_model_or_shards_and_index
from lowmem.nn.forms import CodedForm
from lowmem.nn.techniques import Budget, EightBit, FourBit
from lowmem.quant.quantize_tensor import recorded_or_measured_squares
from lowmem.quant.tensor import QuantizedTensor
from lowmem.transforms.bit_budget import (
    BudgetChoice,
    BudgetUnit,
    budget_choices_with_reasons,
    budget_unit_or_none,
    loss_per_choice,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of weights that are converted


@dataclass(frozen=True)
class TensorConversionRow:
    """The result for one tensor of the source."""

    name: str
    shape: tuple[int, ...]
    converted: bool
    before_bytes: int
    after_bytes: int
    error: float | None
    """``rms(stored - weight) / rms(weight)`` of a converted tensor."""
    stored: str = ""
    """How a converted tensor is stored."""
    chosen_because: str = ""
    """What its bits save of the loss of all tensors, if a ``Budget`` chose them."""


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    technique: FourBit | EightBit | Budget,
    *,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    shard_bytes: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[TensorConversionRow]:
    """Convert a safetensors checkpoint to 4 bits, with one tensor in memory at a time.

    Tensors named ``weight`` in float32, float16 or bfloat16 with 2 to 4 dimensions are converted: the weights of
    nn.Linear, nn.Embedding, nn.Conv1d and nn.Conv2d. Other tensors are copied.

    Args:
        source: a safetensors file, or the ``.index.json`` of a sharded one.
        target: the file to write; an existing file is replaced when the new one is complete.
        technique: with a single format. A file does not say which tensors are embeddings: they become 4 bits, too, as
            with ``embeddings="4bit"``. For a ``Budget``, without inputs, tensors are read twice.
        include, exclude: glob patterns of names; tensors that match ``include`` and not ``exclude`` are converted.
        shard_bytes: the most bytes of tensors per file; ``target-00001-of-00002.safetensors`` and so on are written,
            then ``target.safetensors.index.json``. None: one file.
        device: where each tensor is quantized.
        progress: called with the name of each tensor that was read and its bytes in the source.

    Returns:
        A row for each tensor of the source, sorted by name.

    Raises:
        ValueError: a pattern that matches nothing, nothing to convert, a weight that cannot be quantized, or a tensor
            larger than ``shard_bytes``. No file has changed, except for shards that were completed.
        FileError: the source is damaged, or no dense safetensors checkpoint.
        OSError: a file cannot be read or written.
    """
    source, target = Path(source), Path(target)
    check_writable_model_path(target)
    with SafetensorsCheckpoint(source) as checkpoint:
        wanted = _checked_2d_to_4d_weight_names(checkpoint.specs, list(include), list(exclude))
        chosen = (
            _read_weights_and_divide_budget(checkpoint, wanted, technique, device, progress)
            if isinstance(technique, Budget)
            else dict.fromkeys(wanted, BudgetChoice(technique, ""))
        )
        errors: dict[str, float] = {}
        weights = {
            name: _lazily_quantized_weight(checkpoint, name, chosen[name].technique, device, errors)
            if name in wanted
            else LazyWeight(name, spec.shape, spec.dtype, spec.nbytes, partial(checkpoint.read_tensor, name))
            for name, spec in checkpoint.specs.items()
        }
        taken: dict[str, str] = {}
        for name, weight in weights.items():
            for out in weight.file_tensor_specs():
                if taken.setdefault(out, name) != name:
                    names = [printable_line(text, 80) for text in (taken[out], name, out)]
                    both = f"both {names[0]} and {names[1]} would be {names[2]}"
                    raise ValueError(f"{both}; copy one as it is with --exclude")
        rows: dict[str, TensorConversionRow] = {}

        def add_row_and_call_progress(weight: LazyWeight, after_bytes: int) -> None:
            name, before = weight.name, weight.nbytes
            how = (weight.form_name, chosen[name].why) if name in wanted else ()
            rows[name] = TensorConversionRow(
                name, checkpoint.specs[name].shape, name in wanted, before, after_bytes, errors.get(name), *how
            )
            progress(name, before)

        write_model_or_shards_and_index(target, weights, shard_bytes, checkpoint.paths, add_row_and_call_progress)
    return [rows[name] for name in sorted(rows)]


def _read_weights_and_divide_budget(
    checkpoint: SafetensorsCheckpoint,
    tensor_names: set[str],
    budget: Budget,
    device: torch.device | str,
    progress: Callable[[str, int], None],
) -> dict[str, BudgetChoice]:
    """Return how each tensor is stored; all are read, and ``progress`` is called with each."""
    if budget.inputs is not None:
        raise ValueError("Budget(inputs=) runs a model, and a checkpoint is none: leave inputs= out")
    units: dict[str, BudgetUnit] = {}
    for name in sorted(tensor_names):
        tensor = _flattened_weight_matrix(checkpoint.read_tensor(name)).to(device)
        try:
            unit = budget_unit_or_none(
                {parameter_record_key(name): tensor}, lambda _, weight: loss_per_choice(weight)
            )
        except (ValueError, TypeError) as reason:
            raise ValueError(f"{printable_line(name)}: {reason}; or leave it as it is with --exclude") from reason
        assert unit is not None
        units[name] = unit
        progress(name, tensor.nbytes)
        del tensor
    return dict(zip(units, budget_choices_with_reasons(list(units.values()), budget), strict=True))


def _checked_2d_to_4d_weight_names(specs: dict[str, TensorSpec], include: list[str], exclude: list[str]) -> set[str]:
    check_each_pattern_matches_a_tensor((*include, *exclude), specs)
    wanted = {
        name
        for name, spec in specs.items()
        if name.rpartition(".")[2] == "weight"
        and spec.dtype in DTYPES
        and 2 <= len(spec.shape) <= 4
        and 0 not in spec.shape
        and any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not wanted:
        raise ValueError(
            f"nothing to convert among {len(specs)} tensors: looked for float32, float16 or bfloat16 tensors named "
            "weight, of 2 to 4 dimensions, that --include and --exclude leave"
        )
    return wanted


def _lazily_quantized_weight(
    checkpoint: SafetensorsCheckpoint,
    name: str,
    technique: FourBit | EightBit,
    device: torch.device | str,
    errors_to_fill: dict[str, float],
) -> LazyWeight:
    """Plan to store a tensor by ``technique``; its error is noted when it is written."""
    skeleton = technique.skeleton(
        _flattened_weight_matrix(torch.empty(checkpoint.specs[name].shape, dtype=torch.float32, device="meta"))
    )

    def read_quantized_and_record_error() -> QuantizedTensor:
        weight = _flattened_weight_matrix(checkpoint.read_tensor(name)).to(device)
        try:
            stored = technique.store(weight)
        except (ValueError, TypeError) as reason:
            raise ValueError(f"{printable_line(name)}: {reason}; or leave it as it is with --exclude") from reason
        errors_to_fill[name] = recorded_or_measured_squares(weight, stored).relative_error
        return replace(stored, packed=stored.packed.to("cpu"), scales=stored.scales.to("cpu"))

    return LazyWeight(
        name,
        tuple(skeleton.shape),
        CodedForm.from_quantized_tensor(skeleton),
        checkpoint.specs[name].nbytes,
        read_quantized_and_record_error,
    )


def _flattened_weight_matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)  # (out, in * kernel), as the 4-bit layers store it
