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

from lowmem.errors import printable_line
from lowmem.io.formats.foreign_format import LazyForeignTensor, StorageForm
from lowmem.nn.forms import CodedForm
from lowmem.nn.techniques import EightBit, FourBit
from lowmem.quant.backend import Weight
from lowmem.quant.quantize_tensor import recorded_or_measured_squares
from lowmem.quant.tensor import QuantizedTensor


class GrowthWarning(UserWarning):
    """A model takes more bytes than the file or folder that it is read from."""


@dataclass
class Requantization:
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

    def lazily_requantized_or_same_tensor(self, tensor: LazyForeignTensor) -> LazyForeignTensor:
        """Return a weight that is quantized when it is read, if it is to be; else the same one."""
        if tensor.refusal is not None:
            if self.refused is None or tensor.values is None:
                return tensor
            return self._lazily_quantized_tensor(tensor, self.refused, tensor.values)
        if self.technique is None or len(tensor.shape) < 2:
            return tensor
        if not any(fnmatchcase(tensor.name, pattern) for pattern in self.include):
            return tensor
        form = tensor.storage_form()
        bits = form.bits if isinstance(form, CodedForm) else 16 * form.is_floating_point
        if bits > self.technique.bits:
            return self._lazily_quantized_tensor(tensor, self.technique, tensor.read)
        return replace(tensor, form=lambda: form)  # which may have read the scales

    def largest_error_or_none(self, model_weight_name: str) -> float | None:
        """Return the error of a weight of the model, the largest of its parts; None: none was quantized."""
        part_errors = (
            error for part, error in self.errors.items() if self.names.get(part, part) == model_weight_name
        )
        return max(part_errors, default=None)

    def _lazily_quantized_tensor(
        self, tensor: LazyForeignTensor, technique: FourBit | EightBit, read: Callable[[], Tensor | Weight]
    ) -> LazyForeignTensor:
        form: StorageForm = CodedForm.from_quantized_tensor(
            technique.skeleton(torch.empty(tensor.shape, dtype=torch.float32, device="meta"))
        )

        def quantize_and_record_error() -> Weight:
            weight = read()
            weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
            try:
                stored = technique.store(weight)
            except (ValueError, TypeError) as reason:
                raise ValueError(f"{printable_line(tensor.name)}: {reason}") from reason
            self.errors[tensor.name] = recorded_or_measured_squares(weight, stored).relative_error
            return stored

        return replace(tensor, form=lambda: form, read=quantize_and_record_error, refusal=None, values=None)


def refused_tensors_message(tensors: Sequence[LazyForeignTensor]) -> str:
    """Return why weights cannot be kept exactly, and how to go on: where all values are known, by --requantize."""
    shown = "; ".join(f"{printable_line(tensor.name, 80)}, {tensor.kind}: {tensor.refusal}" for tensor in tensors[:3])
    more = f"; and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    known = all(tensor.values is not None for tensor in tensors)
    how = "`lowmem quantize IN OUT --requantize` quantizes it again, and prints the error that this adds"
    return f"it cannot be kept exactly: {shown}{more}{f'; {how}' if known else ''}"


def bytes_in_storage_form(tensor: LazyForeignTensor, form: StorageForm) -> int:
    """Return the bytes that a tensor takes as it is kept."""
    return sum(
        spec.nbytes for spec in _tensor_with_storage_form(tensor, form).to_lazy_weight().file_tensor_specs().values()
    )


def _tensor_with_storage_form(tensor: LazyForeignTensor, form: StorageForm) -> LazyForeignTensor:
    return replace(tensor, form=lambda: form)


def form_with_dense_dtype(form: StorageForm, dtype: torch.dtype | None) -> StorageForm:
    """Return ``dtype`` for a dense tensor of floating-point numbers, if it is given; else how a tensor is kept."""
    return dtype if dtype is not None and isinstance(form, torch.dtype) and form.is_floating_point else form


def warn_if_model_grows(
    path: Path,
    tensors_and_forms: Sequence[tuple[LazyForeignTensor, StorageForm]],
    model_bytes: int,
    dense_dtype: torch.dtype | None = None,
) -> None:
    """Warn of a model of ``model_bytes`` bytes if the tensors that it is read from take less.

    The warning names the option of ``lowmem quantize`` that avoids the growth and loses least.

    Args:
        path: of the file or folder.
        tensors_and_forms: its tensors, each with how it is kept unless a dtype or an option changes that.
        model_bytes: bytes of the model.
        dense_dtype: of dense weights in the model; None keeps the dtype of each weight.
    """
    before = sum(tensor.nbytes for tensor, _ in tensors_and_forms)
    if model_bytes <= before:
        return
    half = torch.float16 if any(form == torch.float16 for _, form in tensors_and_forms) else torch.bfloat16
    sizes = {
        f" --dtype {str(half)[6:]}": sum(
            bytes_in_storage_form(foreign_tensor, form_with_dense_dtype(form, half))
            for foreign_tensor, form in tensors_and_forms
        )
    }
    for option, technique in ((" --include '*' --format int8", EightBit()), (" --include '*'", FourBit())):
        included = Requantization(include=["*"], technique=technique)
        sizes[option] = sum(
            bytes_in_storage_form(
                foreign_tensor,
                included.lazily_requantized_or_same_tensor(
                    _tensor_with_storage_form(foreign_tensor, form)
                ).storage_form(),
            )
            for foreign_tensor, form in tensors_and_forms
        )
    best = next((option for option, size in sizes.items() if size <= before), min(sizes, key=sizes.__getitem__))
    how = f"`lowmem quantize IN OUT{best}` makes {sizes[best] / 2**20:.2f} MiB of them"
    if sizes[best] > before:
        how = "no option avoids that" + (f"; {how}, the least" if sizes[best] < model_bytes else "")
    larger = {
        foreign_tensor.kind: None
        for foreign_tensor, form in tensors_and_forms
        if bytes_in_storage_form(foreign_tensor, form_with_dense_dtype(form, dense_dtype)) > foreign_tensor.nbytes
    }
    why = f", since weights in {', '.join(larger)} take more bits there" if larger else ""
    sizes_text = f"{before / 2**20:.2f} MiB of tensors become a model of {model_bytes / 2**20:.2f} MiB"
    warnings.warn(f"{printable_line(path.name)}: {sizes_text}{why}: {how}", GrowthWarning, stacklevel=3)
