"""What a format of another program is: how it is recognized, read and written, and what its config may say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lowmem.errors import show
from lowmem.io.formats.exported import Exported
from lowmem.io.safetensors import TensorSpec
from lowmem.io.shards import StoredWeight, swapped
from lowmem.io.source import Source
from lowmem.nn.forms import CodedForm
from lowmem.quant.backend import Weight
from lowmem.quant.tensor import QuantizedTensor

Kept: TypeAlias = "CodedForm | torch.dtype"
"""How a weight is kept: in 4 bits, with its codes, or dense in a dtype."""


@dataclass(frozen=True)
class ForeignTensor:
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
    form: Callable[[], Kept] | None = None
    refusal: str | None = None
    values: Callable[[], Tensor] | None = None
    transposed: bool = False
    order: Callable[[], Tensor] | None = None

    @classmethod
    def refused(
        cls,
        name: str,
        shape: tuple[int, ...],
        kind: str,
        nbytes: int,
        reason: str,
        values: Callable[[], Tensor] | None = None,
    ) -> ForeignTensor:
        """Return a weight that cannot be kept exactly."""

        def fail() -> Weight:
            raise ValueError(f"{show(name)} in {kind} cannot be kept exactly: {reason}")

        return cls(name, shape, kind, nbytes, fail, refusal=reason, values=values)

    def kept(self) -> Kept:
        """Return how ``read`` keeps the weight, which may take reading its scales."""
        if self.form is not None:
            return self.form()
        weight = self.read()
        if not isinstance(weight, QuantizedTensor):
            return weight.dtype
        return replace(CodedForm.of(weight), transposed=self.transposed, gathered=self.order is not None)

    def stored(self) -> StoredWeight:
        """Return the weight as a file of lowmem's has it."""
        shape = swapped(self.shape) if self.transposed else self.shape
        return StoredWeight(self.name, shape, self.kept(), self.nbytes, self.read, self.order)


@dataclass(frozen=True)
class Parts:
    """The tensors ``<layer>.<part>`` of a safetensors checkpoint, with the specs of those that it has."""

    source: Source
    layer: str
    format: str
    specs: Mapping[str, TensorSpec]

    @classmethod
    def of(cls, source: Source, layer: str, format: str, needed: Iterable[str], others: Iterable[str] = ()) -> Parts:
        """Return the parts of a layer; a ValueError if one of ``needed`` is missing."""
        names = {part: f"{layer}.{part}".lstrip(".") for part in (*needed, *others)}
        for part in needed:
            if names[part] not in source.specs:
                raise ValueError(f"the layer {show(layer)} of {format} lacks {show(names[part])}; get it again")
        specs = {part: source.specs[name] for part, name in names.items() if name in source.specs}
        return cls(source, layer, format, specs)

    def name(self, part: str) -> str:
        """Return the name of a part in the checkpoint."""
        return f"{self.layer}.{part}".lstrip(".")

    @property
    def names(self) -> set[str]:
        """The names of the parts in the checkpoint."""
        return {self.name(part) for part in self.specs}

    @property
    def nbytes(self) -> int:
        """What all of the parts take."""
        return sum(spec.nbytes for spec in self.specs.values())

    def read(self, part: str) -> Tensor:
        """Read a part."""
        return self.source.read_tensor(self.name(part))

    def check(self, fits: bool) -> None:
        """Raise a ValueError that names the parts, unless they fit each other."""
        if not fits:
            shown = ", ".join(f"{part} {spec.dtype} {spec.shape}" for part, spec in self.specs.items())
            raise ValueError(
                f"the parts of the layer {show(self.layer)} of {self.format} do not fit: {shown}; get it again"
            )

    def weight(self, kind: str, shape: tuple[int, ...], read: Callable[[], Weight], **more: Any) -> ForeignTensor:
        """Return the layer's weight; ``more`` are other fields of ``ForeignTensor``."""
        return ForeignTensor(self.name("weight"), shape, kind, self.nbytes, read, **more)

    def refused(
        self, kind: str, shape: tuple[int, ...], why: str, values: Callable[[], Tensor] | None = None
    ) -> ForeignTensor:
        """Return the layer's weight, which cannot be kept exactly."""
        return ForeignTensor.refused(self.name("weight"), shape, kind, self.nbytes, why, values)


Finder: TypeAlias = Callable[[Source, Mapping[str, Any]], Iterator[tuple[ForeignTensor, set[str]]]]
"""A checkpoint, and what its config.json says of the quantization -> each weight, and the names of its tensors.
ValueError: a weight lacks a part, or its parts do not fit."""


@dataclass(frozen=True)
class Target:
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
class Foreign:
    """A format.

    Args:
        name: by which errors and ``--format`` call the format.
        find: finds its weights in a safetensors checkpoint; None: the format has files of its own.
        coded_names: last parts of the names of tensors that mean nothing without the others of a weight.
        method: the ``quant_method`` of its config.
        settings: what other fields of the config may be.
        check: config, kinds of the weights -> nothing, or ValueError: they contradict each other.
        magic: what its own files begin with.
        open: opens one of these files, and returns the open file, its tensors, and the names of those left out.
        target: how the format is written; None: it is read only.
    """

    name: str
    find: Finder | None = None
    coded_names: tuple[str, ...] = ()
    method: str | None = None
    settings: Mapping[str, Callable[[object], bool]] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any], Collection[str]], None] = lambda config, kinds: None
    magic: bytes = b""
    open: Callable[[Path], tuple[BufferedReader, list[ForeignTensor], list[str]]] | None = None
    target: Target | None = None

    def check_config(self, config: Mapping[str, Any], kinds: Collection[str]) -> None:
        """Raise a ValueError if a ``quantization_config`` has settings that weights of some kinds do not have."""
        for name, allowed in self.settings.items():
            if name in config and not allowed(config[name]):
                raise contradiction(name, config[name], f"lowmem reads no such {self.name}, or its tensors differ")
        self.check(config, kinds)


def contradiction(name: str, value: object, why: str) -> ValueError:
    """Return the error of a config that contradicts its tensors."""
    return ValueError(f"its config.json says {name}={show(value)}, and {why}; get both again from one source")


def one_of(*values: object) -> Callable[[object], bool]:
    """Return a test for values that are equal to one of some, and of the same type."""
    return lambda value: any(value is known or (value == known and type(value) is type(known)) for known in values)
