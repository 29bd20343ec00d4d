"""Writes another program's 4-bit weights as a file of lowmem's, one tensor at a time, codes as they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import file_error, value_errors_as_file_errors
from lowmem.io.formats.export_results import ForeignWeightResult
from lowmem.io.formats.foreign_format import LazyForeignTensor
from lowmem.io.formats.open_foreign import ForeignCheckpoint, open_foreign_checkpoint
from lowmem.io.formats.requantization import (
    Requantization,
    bytes_in_storage_form,
    form_with_dense_dtype,
    refused_tensors_message,
    warn_if_model_grows,
)
from lowmem.io.safetensors_checkpoint import check_each_pattern_matches_a_tensor
from lowmem.io.shards import LazyWeight, check_writable_model_path, write_model_or_shards_and_index
from lowmem.nn.techniques import EightBit, FourBit
from lowmem.quant.backend import Weight


def import_foreign_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    requantize: FourBit | EightBit | None = None,
    include: Iterable[str] = (),
    technique: FourBit | EightBit | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[ForeignWeightResult]:
    """Write another program's weights as a file of lowmem's, whose dequantized values are the same bits in float32.

    Args:
        source: a GGUF file, a safetensors file, the index of a sharded one, or a model's folder.
        target: the file to write; an existing file is replaced when the new one is complete.
        requantize: how weights are stored that cannot be kept exactly; None: they are refused.
        include: glob patterns of names: dense weights of 2 dimensions or more that match are quantized.
        technique: how these are.
        dtype: to which the other dense floating-point tensors are rounded; None: they stay as they are.
        shard_bytes: the most bytes of tensors per file, as in ``convert_checkpoint``; None: one file.
        progress: called with the name of each finished tensor and its bytes in the source.

    Returns:
        A row for each tensor, sorted by name. Its error does not count what ``dtype`` rounds.

    Raises:
        ValueError: a weight that cannot be kept exactly, without ``requantize``; or what ``convert_checkpoint``
            raises. No file has changed, except for shards that were completed.
        FileError: the source is damaged, or of a kind that lowmem does not read.
        OSError: a file cannot be read or written.

    Warns:
        GrowthWarning: the weights take more bytes than the source's, which names the option that avoids that.
    """
    source, target = Path(source), Path(target)
    check_writable_model_path(target)
    requantizing = Requantization(requantize, list(include), technique)
    with open_foreign_checkpoint(source) as checkpoint:
        weights = _checked_lazy_weights_by_name(source, checkpoint, requantizing, dtype)
        tensors_and_forms = [(checkpoint.tensors[name], weight.form) for name, weight in weights.items()]
        warn_if_model_grows(
            source, tensors_and_forms, sum(bytes_in_storage_form(*pair) for pair in tensors_and_forms)
        )
        rows: dict[str, ForeignWeightResult] = {}

        def add_row_and_call_progress(weight: LazyWeight, after_bytes: int) -> None:
            name, kind, before = weight.name, checkpoint.tensors[weight.name].kind, weight.nbytes
            error = requantizing.errors.get(name)
            rows[name] = ForeignWeightResult(name, weight.shape, kind, weight.form_name, before, after_bytes, error)
            progress(name, before)

        write_model_or_shards_and_index(target, weights, shard_bytes, checkpoint.paths, add_row_and_call_progress)
    return [rows[name] for name in sorted(rows)]


def _checked_lazy_weights_by_name(
    path: Path, checkpoint: ForeignCheckpoint, requantization: Requantization, dtype: torch.dtype | None
) -> dict[str, LazyWeight]:
    check_each_pattern_matches_a_tensor(requantization.include, checkpoint.tensors)
    tensors = [
        requantization.lazily_requantized_or_same_tensor(foreign_tensor)
        for foreign_tensor in checkpoint.tensors.values()
    ]
    refused = [tensor for tensor in tensors if tensor.refusal is not None]
    if refused:
        raise file_error(path, refused_tensors_message(refused), "import")
    return {tensor.name: _lazy_weight_with_dense_dtype(path, tensor, dtype) for tensor in tensors}


def _lazy_weight_with_dense_dtype(path: Path, tensor: LazyForeignTensor, dtype: torch.dtype | None) -> LazyWeight:
    stored = tensor.to_lazy_weight()
    form = form_with_dense_dtype(stored.form, dtype)

    def read_and_cast_if_dense() -> Weight:
        with value_errors_as_file_errors(path, "import"):  # it cannot be quantized
            weight = tensor.read()
        return weight.to(form) if isinstance(weight, Tensor) and isinstance(form, torch.dtype) else weight

    return replace(stored, form=form, read=read_and_cast_if_dense)
