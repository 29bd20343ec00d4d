"""Which of another program's weights are quantized while they are read, how, and the error that this adds; and the
warning of a model that takes more bytes than the tensors that it is read from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import printable
from lowmem.io.formats.foreign import ForeignTensor, Kept
from lowmem.nn.forms import CodedForm
from lowmem.nn.techniques import EightBit, FourBit
from lowmem.quant.backend import Weight
from lowmem.quant.quantize import squares_lost
from lowmem.quant.tensor import QuantizedTensor


class GrowthWarning(UserWarning):
    """A model takes more bytes than the file or folder that it is read from."""


@dataclass
class Requantizing:
    """What is to be quantized of a file of another program; by default nothing.

    Args:
        refused: how weights are stored that cannot be kept exactly; None: they stay refused.
        include: glob patterns of names in the file: weights of 2 dimensions or more that match are quantized, if they
            are dense, or have more bits than ``technique``.
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
        bits = kept.bits if isinstance(kept, CodedForm) else 16 * kept.is_floating_point
        if bits > self.technique.bits:
            return self._quantized(tensor, self.technique, tensor.read)
        return replace(tensor, form=lambda: kept)  # which may have read the scales

    def error(self, name: str) -> float | None:
        """Return the error of a weight of the model, the largest of its parts; None: none was quantized."""
        own = (error for part, error in self.errors.items() if self.names.get(part, part) == name)
        return max(own, default=None)

    def _quantized(
        self, tensor: ForeignTensor, technique: FourBit | EightBit, read: Callable[[], Tensor | Weight]
    ) -> ForeignTensor:
        form: Kept = CodedForm.of(technique.skeleton(torch.empty(tensor.shape, dtype=torch.float32, device="meta")))

        def store() -> Weight:
            weight = read()
            weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
            try:
                stored = technique.store(weight)
            except (ValueError, TypeError) as reason:
                raise ValueError(f"{printable(tensor.name)}: {reason}") from reason
            self.errors[tensor.name] = squares_lost(weight, stored).error
            return stored

        return replace(tensor, form=lambda: form, read=store, refusal=None, values=None)


def why_refused(tensors: Sequence[ForeignTensor]) -> str:
    """Return why weights cannot be kept exactly, and how to go on: where all values are known, by --requantize."""
    shown = "; ".join(f"{printable(one.name, 80)}, {one.kind}: {one.refusal}" for one in tensors[:3])
    more = f"; and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    known = all(one.values is not None for one in tensors)
    how = "`lowmem quantize IN OUT --requantize` quantizes it again, and prints the error that this adds"
    return f"it cannot be kept exactly: {shown}{more}{f'; {how}' if known else ''}"


def kept_bytes(tensor: ForeignTensor, kept: Kept) -> int:
    """Return the bytes that a tensor takes as it is kept."""
    return sum(spec.nbytes for spec in _of_form(tensor, kept).stored().specs().values())


def _of_form(tensor: ForeignTensor, kept: Kept) -> ForeignTensor:
    return replace(tensor, form=lambda: kept)


def with_dtype(kept: Kept, dtype: torch.dtype | None) -> Kept:
    """Return ``dtype`` for a dense tensor of floating-point numbers, if it is given; else how a tensor is kept."""
    return dtype if dtype is not None and isinstance(kept, torch.dtype) and kept.is_floating_point else kept


def warn_of_growth(
    path: Path, weights: Sequence[tuple[ForeignTensor, Kept]], after: int, dtype: torch.dtype | None = None
) -> None:
    """Warn of a model of ``after`` bytes if the tensors that it is read from take less.

    The warning names the option of ``lowmem quantize`` that avoids the growth and loses least.

    Args:
        path: of the file or folder.
        weights: its tensors, each with how it is kept unless a dtype or an option changes that.
        after: bytes of the model.
        dtype: of dense weights in the model; None keeps the dtype of each weight.
    """
    before = sum(tensor.nbytes for tensor, _ in weights)
    if after <= before:
        return
    half = torch.float16 if any(kept == torch.float16 for _, kept in weights) else torch.bfloat16
    sizes = {f" --dtype {str(half)[6:]}": sum(kept_bytes(one, with_dtype(kept, half)) for one, kept in weights)}
    for option, technique in ((" --include '*' --format int8", EightBit()), (" --include '*'", FourBit())):
        included = Requantizing(include=["*"], technique=technique)
        sizes[option] = sum(kept_bytes(one, included.of(_of_form(one, kept)).kept()) for one, kept in weights)
    best = next((option for option, size in sizes.items() if size <= before), min(sizes, key=sizes.__getitem__))
    how = f"`lowmem quantize IN OUT{best}` makes {sizes[best] / 2**20:.2f} MiB of them"
    if sizes[best] > before:
        how = "no option avoids that" + (f"; {how}, the least" if sizes[best] < after else "")
    larger = {one.kind: None for one, kept in weights if kept_bytes(one, with_dtype(kept, dtype)) > one.nbytes}
    why = f", since weights in {', '.join(larger)} take more bits there" if larger else ""
    sizes_told = f"{before / 2**20:.2f} MiB of tensors become a model of {after / 2**20:.2f} MiB"
    warnings.warn(f"{printable(path.name)}: {sizes_told}{why}: {how}", GrowthWarning, stacklevel=3)
