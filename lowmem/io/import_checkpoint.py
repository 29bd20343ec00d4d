"""Writes another program's 4-bit weights as a file of lowmem's, one tensor at a time, codes as they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import refusal, refusing
from lowmem.io.formats.exported import ForeignRow
from lowmem.io.formats.foreign import ForeignTensor
from lowmem.io.formats.recognize import ForeignFile, open_foreign
from lowmem.io.formats.requantizing import Requantizing, kept_bytes, warn_of_growth, why_refused, with_dtype
from lowmem.io.shards import StoredWeight, check_target, write_model
from lowmem.io.source import check_patterns
from lowmem.nn.techniques import EightBit, FourBit
from lowmem.quant.backend import Weight


def import_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    requantize: FourBit | EightBit | None = None,
    include: Iterable[str] = (),
    technique: FourBit | EightBit | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[ForeignRow]:
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
    check_target(target)
    requantizing = Requantizing(requantize, list(include), technique)
    with open_foreign(source) as file:
        weights = _plan(source, file, requantizing, dtype)
        kept = [(file.tensors[name], weight.form) for name, weight in weights.items()]
        warn_of_growth(source, kept, sum(kept_bytes(*pair) for pair in kept))
        rows: dict[str, ForeignRow] = {}

        def written(weight: StoredWeight, after: int) -> None:
            name, kind, before = weight.name, file.tensors[weight.name].kind, weight.nbytes
            error = requantizing.errors.get(name)
            rows[name] = ForeignRow(name, weight.shape, kind, weight.kept, before, after, error)
            progress(name, before)

        write_model(target, weights, shard_bytes, file.paths, written)
    return [rows[name] for name in sorted(rows)]


def _plan(
    source: Path, file: ForeignFile, requantizing: Requantizing, dtype: torch.dtype | None
) -> dict[str, StoredWeight]:
    check_patterns(requantizing.include, file.tensors)
    tensors = [requantizing.of(found) for found in file.tensors.values()]
    refused = [tensor for tensor in tensors if tensor.refusal is not None]
    if refused:
        raise refusal(source, why_refused(refused), "import")
    return {tensor.name: _planned(source, tensor, dtype) for tensor in tensors}


def _planned(source: Path, tensor: ForeignTensor, dtype: torch.dtype | None) -> StoredWeight:
    stored = tensor.stored()
    form = with_dtype(stored.form, dtype)

    def read() -> Weight:
        with refusing(source, "import"):  # it cannot be quantized
            weight = tensor.read()
        return weight.to(form) if isinstance(weight, Tensor) and isinstance(form, torch.dtype) else weight

    return replace(stored, form=form, read=read)
