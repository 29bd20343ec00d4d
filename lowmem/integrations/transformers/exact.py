"""Another program's 4-bit weights, given to transformers as those of a folder that lowmem wrote: codes as they are.

transformers builds the model without values. Here its modules become those that store the file's weights, and the
file's tensors get the names of their parts. Each is read when transformers asks for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from lowmem.errors import printable, refusal, show
from lowmem.integrations.transformers.fitting import Names
from lowmem.integrations.transformers.gguf_config import check_config
from lowmem.io.formats.foreign_tensor import ForeignTensor
from lowmem.io.formats.recognize import ForeignFile, open_foreign
from lowmem.io.formats.requantizing import Requantizing, why_refused
from lowmem.io.metadata import form_record
from lowmem.nn.adapter import is_conv1d
from lowmem.nn.stored import FourBitForm
from lowmem.nn.stored_module import format_keys
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["Exact"]

_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int32: "I32",
}  # as safetensors calls them


class Exact:
    """The weights of a file or folder of another program, for one model. Use ``close`` when they are read.

    Args:
        files: the model's files, as transformers found them.
        model: dense, on the meta device, with its ties.
        requantizing: what of them is quantized; None: nothing.

    Attributes:
        layers: records of how weights are stored, by the model's paths, as the metadata of lowmem's files has them.
        state: what there is to load: an object for each tensor, of which ``[...]`` reads it.

    Raises:
        FileError: files that lowmem does not read, without 4-bit weights, or with some that cannot be kept exactly;
            a GGUF file of which the model's config says otherwise what it computes.
        ValueError: a weight of another shape than the model's.
    """

    def __init__(self, files: list[str], model: Any, requantizing: Requantizing | None = None) -> None:
        self._source = _path(files)
        self._requantizing = requantizing or Requantizing()
        with _plainly():
            self._file = open_foreign(self._source)
        self.layers: dict[str, dict[str, Any]] = {}
        self.state: dict[str, _Lazy] = {}
        self._merging: list[WeightConverter] = []
        try:
            with _plainly():
                self._place(self._file, model)
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """What the file's tensors take."""
        return sum(tensor.nbytes for tensor in self._file.tensors.values())

    def close(self) -> None:
        """Close the file."""
        self._file.__exit__()

    def add_formats(self, model: nn.Module) -> None:
        """Add to the state what modules of the converted model hold of their formats."""
        for name in format_keys(model):
            module: Any = model.get_submodule(name.rpartition(".")[0])
            self.state[name] = _Lazy(torch.uint8, module.get_extra_state)

    def conversions(self, own: list[Any]) -> list[Any]:
        """Return the model's conversions of a folder, and those that merge parts of weights as they merge weights."""
        return own + [_with_suffix(one, part) for one in self._merging for part in ("_packed", "_scales")]

    def _place(self, file: ForeignFile, model: Any) -> None:
        if file.kind == "gguf":
            check_config(self._source, model.config)
        names = Names(model, get_model_conversion_mapping(model))
        forms: dict[str, tuple[FourBitForm, str]] = {}
        refused: list[ForeignTensor] = []
        coded = False
        for found in file.tensors.values():
            tensor = self._requantizing.of(found)
            name, converter = names.of(tensor.name)
            if tensor.refusal is not None:
                coded = True
                if name in names.parameters:
                    refused.append(tensor)
                continue
            kept = tensor.kept()
            if not isinstance(kept, FourBitForm):
                if converter is None and name in names.parameters:
                    self._check_shape(tensor, tuple(names.parameters[name].shape))
                self.state[tensor.name] = _Lazy(kept, tensor.read)
                continue
            coded = True
            if name not in names.parameters:
                self.state[tensor.name] = _Lazy(
                    torch.uint8, tensor.read
                )  # transformers reports it, and does not read it
                continue
            parameter, module = names.parameters[name], model.get_submodule(name.rpartition(".")[0])
            # Other programs pack a Conv1D as a linear layer, and leave a dense one as it is.
            swapped = is_conv1d(module) and (found.refusal is not None or isinstance(found.kept(), FourBitForm))
            form = replace(kept, transposed=tensor.transposed or swapped)
            self._requantizing.names[tensor.name] = name
            if converter is not None:
                self._merge(tensor, name, converter, form, parameter)
            else:
                self._check_shape(tensor, tuple(parameter.shape), form.transposed)
            before, first = forms.setdefault(name, (form, tensor.name))
            if before != form:
                raise ValueError(
                    f"{printable(first, 80)} is stored in {before}, and {printable(tensor.name, 80)} in {form}, "
                    f"which are one weight in {type(model).__name__}: {_DENSE}"
                )
            self.layers[name.removesuffix("weight").rstrip(".") if name.endswith(".weight") else name] = form_record(
                form
            )
            of_parts = _Weight(tensor)
            prefix = name if converter is None else tensor.name
            self.state |= {f"{prefix}_{part}": of_parts.lazy(part) for part in form.parts}
        if refused:
            raise refusal(self._source, why_refused(refused), "load")
        if not self.layers and (coded or file.kind != "gguf"):  # which is read as it is, dense ones, too
            raise refusal(
                self._source,
                "it has no 4-bit weights of the model, of which codes could be kept: load it without "
                "quantization_config, or quantize it: LowmemConfig(FourBit('nf4'))",
                "load",
            )

    def _check_shape(self, tensor: ForeignTensor, shape: tuple[int, ...], transposed: bool = False) -> None:
        """Raise a ValueError unless a weight of the file, or its transpose, has the shape of the model's."""
        if tensor.shape != ((*shape[:-2], shape[-1], shape[-2]) if transposed else shape):
            raise ValueError(
                f"{printable(tensor.name, 80)} is {tensor.shape} in {self._source}, and the model's is {shape}: its "
                f"config is of another model: {_CONFIG}"
            )

    def _merge(
        self, tensor: ForeignTensor, name: str, converter: WeightConverter, form: FourBitForm, parameter: Tensor
    ) -> None:
        """Note a conversion that makes one weight of several; those of rows merge codes and scales alike.

        Raises:
            ValueError: it does something else.
        """
        last = parameter.dim() - 1
        merges = all(
            op.dim == 0 if type(op) is MergeModulelist else type(op) is Concatenate and op.dim not in (-1, last)
            for op in converter.operations
        )
        if not merges or len(converter.target_patterns) != 1 or form.transposed or form.gathered:
            steps = ", ".join(type(op).__name__ for op in converter.operations)
            raise ValueError(
                f"{printable(tensor.name, 80)} becomes {name} in transformers by {steps}, which codes of "
                f"{form} do not survive: {_DENSE}"
            )
        if tensor.shape[-1] != parameter.shape[-1]:
            raise ValueError(
                f"{printable(tensor.name, 80)} is {tensor.shape}, and {name}, of which it becomes a part, "
                f"{tuple(parameter.shape)}: its config is of another model: {_CONFIG}"
            )
        if not any(one is converter for one in self._merging):
            self._merging.append(converter)


_DENSE = "take the dense folder that it was made from, and quantize that: LowmemConfig(FourBit('nf4'))"
_CONFIG = "get both from one source, or give config="


def _path(files: list[str]) -> Path:
    """Return what to open: the only file, or the folder of several."""
    if not files or not files[0].endswith((".safetensors", ".gguf")):
        raise ValueError(f"LowmemConfig('exact') reads safetensors and GGUF files, and found {show(files[:1])}")
    return Path(files[0]) if len(files) == 1 else Path(files[0]).parent


@contextmanager
def _plainly() -> Iterator[None]:
    """Read one tensor at a time, to the CPU, whatever the default device is.

    transformers builds models on the meta device, and asks for tensors from several threads.
    """
    with _READING, torch.device("cpu"):
        yield


_READING = threading.RLock()


def _with_suffix(converter: WeightConverter, suffix: str) -> WeightConverter:
    """Return a conversion that does with parts of weights what another does with the weights."""
    sources, targets = (
        [pattern + suffix for pattern in patterns]
        for patterns in (converter._original_source_patterns, converter._original_target_patterns)
    )
    return converter.copy(sources, targets, operations=list(converter.operations))


@dataclass(frozen=True)
class _Lazy:
    """A tensor as transformers takes them from files: ``[...]`` reads it."""

    dtype: torch.dtype
    read: Callable[[], Any]

    def __getitem__(self, _: object) -> Tensor:
        with _plainly():
            found: Tensor = self.read()
        return found

    def get_dtype(self) -> str:
        """Return the dtype by the name that safetensors gives it."""
        return _KINDS.get(self.dtype, "I64")

    def is_floating_point(self) -> bool:
        """Whether the values are floating-point numbers."""
        return self.dtype.is_floating_point


class _Weight:
    """A weight that is read once: the first part that is asked for reads it, and each part is given away once."""

    def __init__(self, tensor: ForeignTensor) -> None:
        self._tensor = tensor
        self._parts: dict[str, Tensor] = {}

    def lazy(self, part: str) -> _Lazy:
        """Return one part."""
        return _Lazy(torch.int32 if part == "order" else torch.uint8, lambda: self._take(part))

    def _take(self, part: str) -> Tensor:
        if part == "order":
            assert self._tensor.order is not None
            return self._tensor.order()
        if part not in self._parts:
            weight = self._tensor.read()
            assert isinstance(weight, QuantizedTensor)
            self._parts |= dict(zip(("packed", "scales"), FourBitForm.split(weight), strict=True))
        return self._parts.pop(part)
