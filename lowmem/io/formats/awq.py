"""Linear layers of AWQ, packed for its "gemm" kernel.

``<layer>.qweight`` int32 (in, out / 8) holds eight outputs in a word: bits 4i to 4i + 3 are output ``_ORDER[i]`` of
the eight. ``.qzeros`` (groups, out / 8) is packed alike; ``.scales`` is float16 (groups, out). A weight is
``scale * (code - zero)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import show
from lowmem.io.formats.foreign_tensor import (
    ForeignTensor,
    check_group_size,
    integer_refusal,
    integer_values,
    integer_weight,
)
from lowmem.io.formats.gptq import packed_layers, unpacked_outputs
from lowmem.io.source import Source
from lowmem.quant.backend import Weight

__all__ = ["find"]

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def find(source: Source, config: Mapping[str, Any]) -> Iterator[tuple[ForeignTensor, set[str]]]:
    """Yield the weight of each layer of AWQ, and the names of its tensors.

    Raises:
        ValueError: a layer that lacks a part, or whose parts do not fit.
    """
    for layer, words, scales in packed_layers(source):
        if scales.shape[1] == 8 * words.shape[1]:  # GPTQ packs inputs
            yield _layer(source, layer, config)


def _layer(source: Source, layer: str, config: Mapping[str, Any]) -> tuple[ForeignTensor, set[str]]:
    names = {part: f"{layer}.{part}".lstrip(".") for part in ("qweight", "qzeros", "scales")}
    if names["qzeros"] not in source.specs:
        raise ValueError(f"the layer {show(layer)} of AWQ lacks {show(names['qzeros'])}; get it again")
    specs = {part: source.specs[name] for part, name in names.items()}
    (inputs, words), (groups, outputs) = specs["qweight"].shape, specs["scales"].shape
    fits = (
        0 < groups <= inputs
        and outputs > 0
        and inputs % groups == 0
        and all(specs[part].dtype == torch.int32 for part in ("qweight", "qzeros"))
        and specs["scales"].dtype.is_floating_point
        and specs["qzeros"].shape == (groups, words)
    )
    if not fits:
        shown = ", ".join(f"{part} {spec.dtype} {spec.shape}" for part, spec in specs.items())
        raise ValueError(f"the parts of the layer {show(layer)} of AWQ do not fit: {shown}; get it again")
    check_group_size(config, layer, inputs, groups, is_even=True)
    stored = _Stored(source, names, inputs // groups, outputs)
    weight, shape = f"{layer}.weight".lstrip("."), (outputs, inputs)
    nbytes = sum(spec.nbytes for spec in specs.values())
    why = stored.refusal(inputs)
    if why is not None:
        return ForeignTensor.refused(weight, shape, "AWQ", nbytes, why, stored.values), set(names.values())
    return ForeignTensor.of_weight(weight, shape, "AWQ", nbytes, stored.read), set(names.values())


@dataclass(frozen=True)
class _Stored:
    """The parts of one layer."""

    source: Source
    names: Mapping[str, str]
    group: int
    outputs: int

    def scales(self) -> Tensor:
        """Return the scales, (out, groups)."""
        return self.source.read_tensor(self.names["scales"]).T.contiguous()

    def unpacked(self, part: str) -> Tensor:
        """Return codes or zero points: uint8 (out, inputs or groups)."""
        order = torch.tensor(_ORDER).argsort()
        mixed = unpacked_outputs(self.source.read_tensor(self.names[part]), self.outputs)
        sorted_codes: Tensor = mixed.unflatten(-1, (-1, 8))[..., order]
        return sorted_codes.flatten(-2).T.contiguous()

    def refusal(self, inputs: int) -> str | None:
        """Return why it is not 16 levels times the scales of blocks."""
        dtype = self.source.specs[self.names["scales"]].dtype
        return integer_refusal(inputs, self.group, dtype, self.unpacked("qzeros"))

    def read(self) -> Weight:
        """Return the weight (out, in)."""
        return integer_weight(self.unpacked("qweight"), self.scales(), self.group, self.unpacked("qzeros"))

    def values(self) -> Tensor:
        """Return the weight in float32."""
        codes = self.unpacked("qweight")
        groups = torch.arange(codes.shape[-1]) // self.group
        return integer_values(codes, self.scales(), groups, self.unpacked("qzeros"))
