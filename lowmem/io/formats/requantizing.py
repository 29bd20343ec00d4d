"""Which of another program's weights are quantized while they are read, how, and the error that this adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lowmem.errors import printable
from lowmem.io.formats.foreign import ForeignTensor, Kept
from lowmem.nn.forms import CodedForm
from lowmem.nn.techniques import EightBit, FourBit
from lowmem.quant.backend import Weight
from lowmem.quant.quantize import squares_lost
from lowmem.quant.tensor import QuantizedTensor


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
