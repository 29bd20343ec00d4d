"""Writes another program's 4-bit weights as a file of lowmem's, one tensor at a time, codes as they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import FileError, refusal
from lowmem.io.container import TensorSpec
from lowmem.io.formats.foreign import ForeignTensor
from lowmem.io.formats.recognize import ForeignFile, open_foreign
from lowmem.io.formats.requantizing import Requantizing, why_refused
from lowmem.io.metadata import form_record, layer_of
from lowmem.io.shards import check_target, write_model
from lowmem.nn.forms import CodedForm
from lowmem.nn.techniques import EightBit, FourBit
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["ImportedRow", "import_checkpoint"]


@dataclass(frozen=True)
class ImportedRow:
    """The result for one tensor of the source."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """How the source stores it."""
    kept: str
    """How the target does."""
    before_bytes: int
    after_bytes: int
    error: float | None
    """``rms(stored - weight) / rms(weight)`` of what was quantized, the largest of several that became one weight;
    None: no value changed, unless ``dtype`` rounded it."""


@dataclass(frozen=True)
class _Plan:
    """What becomes of one tensor."""

    tensor: ForeignTensor
    kept: CodedForm | torch.dtype
    read: Callable[[], Tensor | QuantizedTensor]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.tensor.shape
        return (*shape[:-2], shape[-1], shape[-2]) if self.tensor.transposed else shape

    @property
    def record(self) -> dict[str, Any] | None:
        return None if isinstance(self.kept, torch.dtype) else form_record(self.kept)

    @property
    def path(self) -> str:
        """The key of the record: the layer's path, or the parameter's full name."""
        return layer_of(self.tensor.name)

    def parts(self) -> dict[str, str]:
        """Return the name in the file of each stored part, or of the dense tensor ("")."""
        name = self.tensor.name
        if isinstance(self.kept, torch.dtype):
            return {"": name}
        prefix = name.removesuffix("weight") if name.rpartition(".")[2] == "weight" else f"{name}_"
        return {part: prefix + part for part in self.kept.parts}

    def specs(self) -> dict[str, TensorSpec]:
        """Return the specs of what is written for it."""
        if isinstance(self.kept, torch.dtype):
            return {self.tensor.name: TensorSpec(self.kept, self.shape)}
        form = self.kept
        shape = self.tensor.shape if form.transposed else self.shape
        empty = QuantizedTensor.empty(
            torch.Size(shape), form.format, form.block_size, form.scale_encoding, form.method, device="meta"
        )
        order = torch.empty(shape[-1:], dtype=torch.int32, device="meta")
        return {
            name: TensorSpec.of(order if part == "order" else getattr(empty, part))
            for part, name in self.parts().items()
        }


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
) -> list[ImportedRow]:
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
        A row for each tensor, sorted by name.

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
        plans = _plans(source, file, requantizing, dtype)
        rows: dict[str, ImportedRow] = {}

        def layers(names: list[str]) -> dict[str, Any]:
            return {plans[name].path: record for name in names if (record := plans[name].record) is not None}

        def tensors(names: list[str]) -> Iterator[tuple[str, Tensor]]:
            return _tensors(source, [plans[name] for name in names], requantizing.errors, rows, progress)

        specs = {name: plan.specs() for name, plan in plans.items()}
        write_model(target, specs, shard_bytes, file.paths, layers, tensors)
    return [rows[name] for name in sorted(rows)]


def _plans(
    source: Path, file: ForeignFile, requantizing: Requantizing, dtype: torch.dtype | None
) -> dict[str, _Plan]:
    requantizing.check(file.tensors)
    plans: dict[str, _Plan] = {}
    refused: list[ForeignTensor] = []
    for name, found in file.tensors.items():
        tensor = requantizing.of(found)
        if tensor.refusal is not None:
            refused.append(tensor)
            continue
        kept = tensor.kept()
        if isinstance(kept, torch.dtype) and kept.is_floating_point and dtype is not None:
            plans[name] = _Plan(tensor, dtype, _rounded(tensor, dtype))
        else:
            plans[name] = _Plan(tensor, kept, tensor.read)
    if refused:
        raise refusal(source, why_refused(refused), "import")
    return plans


def _rounded(tensor: ForeignTensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    def read() -> Tensor:
        weight = tensor.read()
        assert isinstance(weight, Tensor)
        return weight.to(dtype)

    return read


def _tensors(
    source: Path,
    plans: list[_Plan],
    errors: Mapping[str, float],
    rows: dict[str, ImportedRow],
    progress: Callable[[str, int], None],
) -> Iterator[tuple[str, Tensor]]:
    for plan in plans:
        name = plan.tensor.name
        try:
            stored = plan.read()
        except FileError:
            raise
        except ValueError as reason:  # it cannot be quantized: it names the tensor
            raise refusal(source, str(reason), "import") from None
        after = stored.nbytes
        for part, out in plan.parts().items():
            if part == "order":
                assert plan.tensor.order is not None
                order = plan.tensor.order()
                after += order.nbytes
                yield out, order
            else:
                yield out, stored if isinstance(stored, Tensor) else getattr(stored, part)
        del stored
        kept = str(plan.kept).removeprefix("torch.")
        before = plan.tensor.nbytes
        rows[name] = ImportedRow(name, plan.shape, plan.tensor.kind, kept, before, after, errors.get(name))
        progress(name, before)
