"""The tensors of one layer in a checkpoint of another program."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from lowmem.errors import show
from lowmem.io.formats.foreign_tensor import ForeignTensor
from lowmem.io.safetensors import TensorSpec
from lowmem.io.source import Source

__all__ = ["Parts"]


@dataclass(frozen=True)
class Parts:
    """The tensors ``<layer>.<part>`` of a checkpoint.

    Attributes:
        specs: of the parts that it has.
    """

    source: Source
    layer: str
    format: str
    specs: dict[str, TensorSpec]

    @classmethod
    def of(cls, source: Source, layer: str, format: str, needed: Iterable[str], others: Iterable[str] = ()) -> Parts:
        """Return the parts of a layer.

        Raises:
            ValueError: one of ``needed`` is missing.
        """
        found = cls(source, layer, format, {})
        for part in needed:
            if found.name(part) not in source.specs:
                why = f"the layer {show(layer)} of {format} lacks {show(found.name(part))}"
                raise ValueError(f"{why}; get it again")
        names = {part: found.name(part) for part in (*needed, *others)}
        found.specs.update({part: source.specs[name] for part, name in names.items() if name in source.specs})
        return found

    def name(self, part: str) -> str:
        """Return the name of a part in the checkpoint."""
        return f"{self.layer}.{part}".lstrip(".")

    @property
    def names(self) -> set[str]:
        """The names of the parts in the checkpoint."""
        return {self.name(part) for part in self.specs}

    @property
    def nbytes(self) -> int:
        """What all of them take."""
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

    def refused(
        self, kind: str, shape: tuple[int, ...], why: str, values: Callable[[], Tensor] | None = None
    ) -> ForeignTensor:
        """Return the layer's weight, which cannot be kept exactly."""
        return ForeignTensor.refused(self.name("weight"), shape, kind, self.nbytes, why, values)
