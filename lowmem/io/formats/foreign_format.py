"""What a format of another program is: how it is recognized, read and written, and what its config may say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lowmem.errors import short_repr
from lowmem.io.formats.export_results import Exported
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint
from lowmem.io.safetensors_header import TensorSpec
from lowmem.io.shards import LazyWeight, transposed_shape
from lowmem.nn.forms import CodedForm
from lowmem.quant.backend import Weight
from lowmem.quant.tensor import QuantizedTensor

StorageForm: TypeAlias = "CodedForm | torch.dtype"
"""How a weight is kept: in 4 bits, with its codes, or dense in a dtype."""


@dataclass(frozen=True)
class LazyForeignTensor:
    """A weight of another program's file, whose values are read when they are asked for.

    Args:
        name: as the model's state names the weight.
        shape: of the weight as the file stores it: that of the model's weight, or its transpose.
        kind: how the file stores the weight, such as "Q4_0" or "bfloat16".
        nbytes: what the weight takes in the file.
        read: returns the weight: 4-bit codes as they are in the file, or a dense tensor.
        form: returns how ``read`` keeps the weight, without reading its codes; None: ``kept`` calls ``read``.
        refusal: why the weight cannot be kept exactly; None: it can. Of a refused weight ``read`` raises.
        values: returns a refused weight in float32, to be quantized again; None: its values are unknown.
        transposed: whether the last two dimensions of the model's weight are swapped here.
        order: returns the column of the model's weight for each column that ``read`` returns, int32; None: the
            columns are in the model's order.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    read: Callable[[], Weight]
    form: Callable[[], StorageForm] | None = None
    refusal: str | None = None
    values: Callable[[], Tensor] | None = None
    transposed: bool = False
    order: Callable[[], Tensor] | None = None

    @classmethod
    def with_refusal(
        cls,
        name: str,
        shape: tuple[int, ...],
        kind: str,
        nbytes: int,
        reason: str,
        values: Callable[[], Tensor] | None = None,
    ) -> LazyForeignTensor:
        """Return a weight that cannot be kept exactly."""

        def refuse_read() -> Weight:
            raise ValueError(f"{short_repr(name)} in {kind} cannot be kept exactly: {reason}")

        return cls(name, shape, kind, nbytes, refuse_read, refusal=reason, values=values)

    def storage_form(self) -> StorageForm:
        """Return how ``read`` keeps the weight, which may take reading its scales."""
        if self.form is not None:
            return self.form()
        weight = self.read()
        if not isinstance(weight, QuantizedTensor):
            return weight.dtype
        return replace(
            CodedForm.from_quantized_tensor(weight), transposed=self.transposed, gathered=self.order is not None
        )

    def to_lazy_weight(self) -> LazyWeight:
        """Return the weight as a file of lowmem's has it."""
        shape = transposed_shape(self.shape) if self.transposed else self.shape
        return LazyWeight(self.name, shape, self.storage_form(), self.nbytes, self.read, self.order)


@dataclass(frozen=True)
class LayerTensors:
    """The tensors ``<layer>.<part>`` of a safetensors checkpoint, with the specs of those that it has."""

    checkpoint: SafetensorsCheckpoint
    layer: str
    format: str
    specs: Mapping[str, TensorSpec]

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: SafetensorsCheckpoint,
        layer: str,
        format: str,
        required_parts: Iterable[str],
        optional_parts: Iterable[str] = (),
    ) -> LayerTensors:
        """Return the parts of a layer; a ValueError if one of ``required_parts`` is missing."""
        names = {part: f"{layer}.{part}".lstrip(".") for part in (*required_parts, *optional_parts)}
        for part in required_parts:
            if names[part] not in checkpoint.specs:
                raise ValueError(
                    f"the layer {short_repr(layer)} of {format} lacks {short_repr(names[part])}; get it again"
                )
        specs = {part: checkpoint.specs[name] for part, name in names.items() if name in checkpoint.specs}
        return cls(checkpoint, layer, format, specs)

    def tensor_name(self, part: str) -> str:
        """Return the name of a part in the checkpoint."""
        return f"{self.layer}.{part}".lstrip(".")

    @property
    def tensor_names(self) -> set[str]:
        """The names of the parts in the checkpoint."""
        return {self.tensor_name(part) for part in self.specs}

    @property
    def nbytes(self) -> int:
        """What all of the parts take."""
        return sum(spec.nbytes for spec in self.specs.values())

    def read_part(self, part: str) -> Tensor:
        """Read a part."""
        return self.checkpoint.read_tensor(self.tensor_name(part))

    def raise_parts_error_unless(self, fits: bool) -> None:
        """Raise a ValueError that names the parts, unless they fit each other."""
        if not fits:
            shown = ", ".join(f"{part} {spec.dtype} {spec.shape}" for part, spec in self.specs.items())
            raise ValueError(
                f"the parts of the layer {short_repr(self.layer)} of {self.format} do not fit: {shown}; get it again"
            )

    def foreign_tensor_of_weight(
        self, kind: str, shape: tuple[int, ...], read: Callable[[], Weight], **other_fields: Any
    ) -> LazyForeignTensor:
        """Return the layer's weight; ``other_fields`` are other fields of ``LazyForeignTensor``."""
        return LazyForeignTensor(self.tensor_name("weight"), shape, kind, self.nbytes, read, **other_fields)

    def refused_tensor_of_weight(
        self, kind: str, shape: tuple[int, ...], reason: str, values: Callable[[], Tensor] | None = None
    ) -> LazyForeignTensor:
        """Return the layer's weight, which cannot be kept exactly."""
        return LazyForeignTensor.with_refusal(self.tensor_name("weight"), shape, kind, self.nbytes, reason, values)


WeightIterator: TypeAlias = Callable[
    [SafetensorsCheckpoint, Mapping[str, Any]], Iterator[tuple[LazyForeignTensor, set[str]]]
]
"""A checkpoint, and what its config.json says of the quantization -> each weight, and the names of its tensors.
ValueError: a weight lacks a part, or its parts do not fit."""


@dataclass(frozen=True)
class ExportTarget:
    """How ``lowmem export`` writes a format.

    Args:
        write: ``write(source, out, requantize=..., progress=..., **options)`` writes it and returns the rows. When
            ``write`` raises ValueError, FileError or OSError it has written nothing.
        ending: of the file's name; None: the format writes a folder.
        options: names of further arguments of ``write``, of those that ``export`` has.
    """

    write: Callable[..., list[Exported]]
    ending: str | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class ForeignFormat:
    """A format.

    Args:
        name: by which errors and ``--format`` call the format.
        iterate_weights_and_tensor_names: finds its weights in a safetensors checkpoint; None: the format has files
            of its own.
        coded_names: last parts of the names of tensors that mean nothing without the others of a weight.
        method: the ``quant_method`` of its config.
        settings: what other fields of the config may be.
        check: config, kinds of the weights -> nothing, or ValueError: they contradict each other.
        magic: what its own files begin with.
        open: opens one of these files, and returns the open file, its tensors, and the names of those left out.
        target: how the format is written; None: it is read only.
    """

    name: str
    iterate_weights_and_tensor_names: WeightIterator | None = None
    coded_names: tuple[str, ...] = ()
    method: str | None = None
    settings: Mapping[str, Callable[[object], bool]] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any], Collection[str]], None] = lambda config, kinds: None
    magic: bytes = b""
    open: Callable[[Path], tuple[BufferedReader, list[LazyForeignTensor], list[str]]] | None = None
    target: ExportTarget | None = None

    def check_config_settings(self, config: Mapping[str, Any], weight_kinds: Collection[str]) -> None:
        """Raise a ValueError if a ``quantization_config`` has settings that weights of some kinds do not have."""
        for name, allowed in self.settings.items():
            if name in config and not allowed(config[name]):
                raise config_contradiction_error(
                    name, config[name], f"lowmem reads no such {self.name}, or its tensors differ"
                )
        self.check(config, weight_kinds)


def config_contradiction_error(field_name: str, value: object, reason: str) -> ValueError:
    """Return the error of a config that contradicts its tensors."""
    return ValueError(
        f"its config.json says {field_name}={short_repr(value)}, and {reason}; get both again from one source"
    )


def exact_match_predicate(*allowed_values: object) -> Callable[[object], bool]:
    """Return a test for values that are equal to one of some, and of the same type."""
    return lambda value: any(
        value is known or (value == known and type(value) is type(known)) for known in allowed_values
    )
