"""Writes another program's 4-bit weights as a file of lowmem's, one tensor at a time: codes as they are, or quantized
while they are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import printable, refusal, refusing
from lowmem.io.formats.exported import ForeignRow
from lowmem.io.formats.foreign import ForeignTensor
from lowmem.io.formats.recognize import open_foreign
from lowmem.io.shards import StoredWeight, check_target, write_model
from lowmem.io.source import check_patterns
from lowmem.nn.forms import CodedForm
from lowmem.nn.techniques import EightBit, FourBit
from lowmem.quant.backend import Weight
from lowmem.quant.quantize import relative_error


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
    """
    source, target = Path(source), Path(target)
    check_target(target)
    requantizing = Requantizing(requantize, list(include), technique)
    with open_foreign(source) as file:
        check_patterns(requantizing.include, file.tensors)
        tensors = [requantizing.of(found) for found in file.tensors.values()]
        refused = [tensor for tensor in tensors if tensor.refusal is not None]
        if refused:
            raise refusal(source, why_refused(refused), "import")
        weights = {tensor.name: _planned(source, tensor, dtype) for tensor in tensors}
        rows: dict[str, ForeignRow] = {}

        def written(weight: StoredWeight, after: int) -> None:
            name, kind, before = weight.name, file.tensors[weight.name].kind, weight.nbytes
            error = requantizing.errors.get(name)
            rows[name] = ForeignRow(name, weight.shape, kind, weight.kept, before, after, error)
            progress(name, before)

        write_model(target, weights, shard_bytes, file.paths, written)
    return [rows[name] for name in sorted(rows)]


def _planned(source: Path, tensor: ForeignTensor, dtype: torch.dtype | None) -> StoredWeight:
    stored = tensor.stored()
    form = stored.form
    if isinstance(form, torch.dtype) and form.is_floating_point and dtype is not None:
        form = dtype

    def read() -> Weight:
        with refusing(source, "import"):  # it cannot be quantized
            weight = tensor.read()
        return weight.to(form) if isinstance(weight, Tensor) and isinstance(form, torch.dtype) else weight

    return replace(stored, form=form, read=read)


@dataclass
class Requantizing:
    """What is to be quantized of a file of another program; by default nothing.

    Args:
        refused: how weights are stored that cannot be kept exactly; None: they stay refused.
        include: glob patterns of names in the file: dense weights of 2 dimensions or more that match are quantized.
        technique: how weights that match are stored.

    Attributes:
        errors: by name, ``rms(stored - weight) / rms(weight)`` of each weight that was quantized and read.
        names: the name in the model of weights that have another one there; who places them sets it.
    """

    refused: FourBit | EightBit | None = None
    include: Sequence[str] = ()
    technique: FourBit | EightBit | None = None
    errors: dict[str, float] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def of(self, tensor: ForeignTensor) -> ForeignTensor:
        """Return a weight that is quantized when it is read, if it is to be; else the same one."""
        if tensor.refusal is not None:
            if self.refused is None or tensor.values is None:
                return tensor
            return self._quantized(tensor, self.refused, tensor.values)
        if self.technique is None or len(tensor.shape) < 2:
            return tensor
        if not any(fnmatchcase(tensor.name, pattern) for pattern in self.include):
            return tensor
        kept = tensor.kept()
        if isinstance(kept, torch.dtype) and kept.is_floating_point:
            return self._quantized(tensor, self.technique, tensor.read)
        return replace(tensor, form=lambda: kept)  # which may have read the scales

    def error(self, name: str) -> float | None:
        """Return the error of a weight of the model, the largest of its parts; None: none was quantized."""
        own = (error for part, error in self.errors.items() if self.names.get(part, part) == name)
        return max(own, default=None)

    def _quantized(
        self, tensor: ForeignTensor, technique: FourBit | EightBit, read: Callable[[], Tensor | Weight]
    ) -> ForeignTensor:
        form = CodedForm.of(technique.skeleton(torch.empty(tensor.shape, device="meta")))

        def store() -> Weight:
            weight = read()
            assert isinstance(weight, Tensor)
            try:
                stored = technique.store(weight)
            except (ValueError, TypeError) as reason:
                raise ValueError(f"{printable(tensor.name)}: {reason}") from reason
            self.errors[tensor.name] = relative_error(weight, stored)
            return stored

        return replace(tensor, form=lambda: form, read=store, refusal=None, values=None)


def why_refused(tensors: Sequence[ForeignTensor]) -> str:
    """Return why weights cannot be kept exactly, and how to go on: where all values are known, by --requantize."""
    shown = "; ".join(f"{printable(one.name, 80)}, {one.kind}: {one.refusal}" for one in tensors[:3])
    more = f"; and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    known = all(one.values is not None for one in tensors)
    how = "`lowmem quantize IN OUT --requantize` quantizes it again, and prints the error that this adds"
    return f"it cannot be kept exactly: {shown}{more}{f'; {how}' if known else ''}"
