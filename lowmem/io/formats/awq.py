"""Linear layers of AWQ, packed for its "gemm" kernel.

``<layer>.qweight`` int32 (in, out / 8) holds eight outputs in a word: bits 4i to 4i + 3 are output ``_ORDER[i]`` of
the eight. ``.qzeros`` (groups, out / 8) is packed alike; ``.scales`` is float16 (groups, out). A weight is
``scale * (code - zero)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowmem.io.formats.codes import unpacked
from lowmem.io.formats.foreign import Foreign, ForeignTensor, Parts, one_of
from lowmem.io.formats.integers import IntegerLayer, check_group_size, packed_layers
from lowmem.io.source import Source

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def find(source: Source, config: Mapping[str, Any]) -> Iterator[tuple[ForeignTensor, set[str]]]:
    """Yield the weight of each layer of AWQ, and the names of its tensors."""
    for layer, words, scales in packed_layers(source):
        if scales.shape[1] == 8 * words.shape[1]:  # GPTQ packs inputs
            parts = Parts.of(source, layer, "AWQ", ("qweight", "qzeros", "scales"))
            yield _weight(parts, config), parts.names


def _weight(parts: Parts, config: Mapping[str, Any]) -> ForeignTensor:
    specs = parts.specs
    (inputs, words), (groups, outputs) = specs["qweight"].shape, specs["scales"].shape
    parts.check(
        0 < groups <= inputs
        and outputs > 0
        and inputs % groups == 0
        and all(specs[part].dtype == torch.int32 for part in ("qweight", "qzeros"))
        and specs["scales"].dtype.is_floating_point
        and specs["qzeros"].shape == (groups, words)
    )
    check_group_size(config, parts.layer, inputs, groups, is_even=True)

    def outputs_first(part: str) -> Tensor:
        """Return codes or zero points: uint8 (out, inputs or groups)."""
        eights = unpacked(parts.read(part), outputs).unflatten(-1, (-1, 8))
        sorted_outputs: Tensor = eights[..., torch.tensor(_ORDER).argsort()]
        return sorted_outputs.flatten(-2).T.contiguous()

    return IntegerLayer(
        parts,
        "AWQ",
        (outputs, inputs),
        inputs // groups,
        specs["scales"].dtype,
        codes=lambda: outputs_first("qweight"),
        scales=lambda: parts.read("scales").T,
        zeros=lambda: outputs_first("qzeros"),
    ).tensor()


FORMAT = Foreign(
    "awq",
    find,
    ("qweight", "qzeros"),
    "awq",
    {"bits": one_of(4), "version": lambda value: isinstance(value, str) and value.lower() == "gemm"},
)
