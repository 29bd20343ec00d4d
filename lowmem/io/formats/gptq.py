"""Linear layers of GPTQ: AutoGPTQ and GPTQModel.

``<layer>.qweight`` int32 (in / 8, out) holds eight inputs in a word, the first in the lowest bits; ``.qzeros`` int32
(groups, out / 8) eight outputs; ``.scales`` is float16 (groups, out), and ``.g_idx`` (in,) the group of each input.
A weight is ``scale * (code - zero)``. The first version of the format stores ``zero - 1``.

With ``desc_act`` the inputs of a group lie apart: they are read side by side, in the order ``argsort(g_idx)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import show
from lowmem.io.formats.codes import unpacked
from lowmem.io.formats.foreign import Foreign, ForeignTensor, Parts, one_of
from lowmem.io.formats.integers import IntegerLayer, check_group_size, packed_layers
from lowmem.io.source import Source


def find(source: Source, config: Mapping[str, Any]) -> Iterator[tuple[ForeignTensor, set[str]]]:
    """Yield the weight of each layer of GPTQ, and the names of its tensors."""
    for layer, words, scales in packed_layers(source):
        if words.shape[1] == scales.shape[1]:  # AWQ packs outputs
            parts = Parts.of(source, layer, "GPTQ", ("qweight", "qzeros", "scales"), ("g_idx",))
            yield _weight(parts, config), parts.names


def _weight(parts: Parts, config: Mapping[str, Any]) -> ForeignTensor:
    specs, layer = parts.specs, parts.layer
    (words, outputs), (groups, _) = specs["qweight"].shape, specs["scales"].shape
    inputs = math.prod(specs["g_idx"].shape) if "g_idx" in specs else 8 * words
    bits = config.get("bits", 32 * words / inputs if inputs else 0)
    if bits != 4:
        why = f"it has {show(bits)} bits a weight, and 4 are read: take the dense model, or one in 4 bits"
        return parts.refused("GPTQ", (outputs, inputs), why)
    parts.check(
        inputs == 8 * words
        and 0 < groups <= inputs
        and outputs > 0
        and all(specs[part].dtype == torch.int32 for part in ("qweight", "qzeros"))
        and specs["scales"].dtype.is_floating_point
        and specs["qzeros"].shape == (groups, -(-outputs // 8))
        and ("g_idx" not in specs or specs["g_idx"].shape == (inputs,))
        and ("g_idx" not in specs or specs["g_idx"].dtype in (torch.int32, torch.int64))
    )
    check_group_size(config, layer, inputs, groups, is_even="g_idx" not in specs)
    group = config.get("group_size")  # the last group may be shorter
    if group is None and "g_idx" in specs:
        group = int((parts.read("g_idx") == 0).sum())
    group = -(-inputs // groups) if group in (None, -1) else int(group)  # -1: all inputs
    if group < 1 or -(-inputs // group) != groups:
        raise ValueError(
            f"the layer {show(layer)} of GPTQ has {groups} groups of {group} of {inputs} inputs; get it again, with "
            "its config.json"
        )
    return IntegerLayer(
        parts,
        "GPTQ",
        (outputs, inputs),
        min(group, inputs),
        specs["scales"].dtype,
        codes=lambda: unpacked(parts.read("qweight").T, inputs),
        scales=lambda: parts.read("scales").T,
        zeros=lambda: _zeros(parts, outputs, config).T,
        groups=(lambda: parts.read("g_idx")) if "g_idx" in specs else None,
    ).tensor()


def _zeros(parts: Parts, outputs: int, config: Mapping[str, Any]) -> Tensor:
    """Return the zero point of each group and output, int32 (groups, out)."""
    stored = unpacked(parts.read("qzeros"), outputs).int()
    kind = config.get("checkpoint_format")
    if kind is None:  # symmetric ones tell the version
        kind = "gptq_v2" if bool((stored == 8).all()) else "gptq"
        if not config and kind == "gptq" and not bool((stored == 7).all()):
            raise ValueError(
                f"the zero points {show(parts.name('qzeros'))} of GPTQ are of version 1 or 2, and no config.json "
                "beside the file tells; put the one of its folder there"
            )
    return stored if kind == "gptq_v2" else stored + 1 & 15  # 0 was stored as -1


FORMAT = Foreign("gptq", find, ("qweight", "qzeros"), "gptq", {"checkpoint_format": one_of("gptq", "gptq_v2", None)})
