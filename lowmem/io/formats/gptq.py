"""Linear layers of GPTQ (AutoGPTQ, GPTQModel) and of AWQ, packed for its "gemm" kernel.

``<layer>.scales`` is float16 (groups, out); a weight is ``scale * (code - zero)``. ``.qweight`` and ``.qzeros`` hold
eight numbers in a word:

* GPTQ: ``.qweight`` int32 (in / 8, out) eight inputs, the first in the lowest bits; ``.qzeros`` int32
  (groups, out / 8) eight outputs. ``.g_idx`` (in,) is the group of each input: with ``desc_act`` the inputs of a
  group lie apart, and are read side by side, in the order ``argsort(g_idx)``. Version 1 stores ``zero - 1``.
* AWQ: ``.qweight`` int32 (in, out / 8) eight outputs: bits 4i to 4i + 3 are output ``_ORDER[i]`` of the eight.
  ``.qzeros`` (groups, out / 8) is packed alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import show
from lowmem.io.formats.codes import IntegerLayer, unpacked
from lowmem.io.formats.foreign import Foreign, ForeignTensor, Parts, one_of
from lowmem.io.source import Source

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "qzeros", "scales")


def _find(
    read: Callable[[Parts, Mapping[str, Any]], ForeignTensor],
    name: str,
    factor: int,
    source: Source,
    config: Mapping[str, Any],
) -> Iterator[tuple[ForeignTensor, set[str]]]:
    """Yield the weight of each layer with ``factor`` outputs for each word of a row, and the names of its tensors."""
    for key, words in source.specs.items():
        layer, _, part = key.rpartition(".")
        scales = source.specs.get(f"{layer}.scales".lstrip("."))
        if part != "qweight" or scales is None or len(words.shape) != 2 or len(scales.shape) != 2:
            continue
        if scales.shape[1] == factor * words.shape[1]:
            parts = Parts.of(source, layer, name, _PARTS, ("g_idx",) if factor == 1 else ())
            yield read(parts, config), parts.names


def _check(parts: Parts, inputs: int, zeros: tuple[int, int], fits: bool) -> None:
    """Raise a ValueError unless the parts of a layer fit; ``zeros`` is the shape of its zero points."""
    specs = parts.specs
    groups, outputs = specs["scales"].shape
    parts.check(
        fits
        and 0 < groups <= inputs
        and outputs > 0
        and all(specs[part].dtype == torch.int32 for part in ("qweight", "qzeros"))
        and specs["scales"].dtype.is_floating_point
        and specs["qzeros"].shape == zeros
    )


def _check_group_size(config: Mapping[str, Any], layer: str, columns: int, groups: int, is_even: bool) -> None:
    """Raise a ValueError unless the ``group_size`` of a config is a layer's; ``is_even``: all groups are whole."""
    size = config.get("group_size")
    if size is None or (size == -1 and groups == 1):
        return
    fits = type(size) is int and size > 0 and -(-columns // size) == groups
    if not fits or (is_even and columns % min(size, columns)):
        raise ValueError(
            f"its config.json says group_size={show(size)}, and {show(layer)} has {groups} groups of {columns} inputs"
            "; get both again from one source"
        )


def _gptq(parts: Parts, config: Mapping[str, Any]) -> ForeignTensor:
    specs, layer = parts.specs, parts.layer
    (words, outputs), (groups, _) = specs["qweight"].shape, specs["scales"].shape
    order = specs.get("g_idx")
    inputs = 8 * words if order is None else math.prod(order.shape)
    bits = config.get("bits", 32 * words / inputs if inputs else 0)
    if bits != 4:
        why = f"it has {show(bits)} bits a weight, and 4 are read: take the dense model, or one in 4 bits"
        return parts.refused("GPTQ", (outputs, inputs), why)
    is_order = order is None or (order.shape == (inputs,) and order.dtype in (torch.int32, torch.int64))
    _check(parts, inputs, (groups, -(-outputs // 8)), inputs == 8 * words and is_order)
    _check_group_size(config, layer, inputs, groups, is_even=order is None)
    group = config.get("group_size")  # the last group may be shorter
    if group is None and order is not None:
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
        zeros=lambda: _gptq_zeros(parts, outputs, config).T,
        groups=None if order is None else lambda: parts.read("g_idx"),
    ).tensor()


def _gptq_zeros(parts: Parts, outputs: int, config: Mapping[str, Any]) -> Tensor:
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


def _awq(parts: Parts, config: Mapping[str, Any]) -> ForeignTensor:
    (inputs, words), (groups, outputs) = parts.specs["qweight"].shape, parts.specs["scales"].shape
    _check(parts, inputs, (groups, words), groups > 0 and inputs % groups == 0)
    _check_group_size(config, parts.layer, inputs, groups, is_even=True)

    def outputs_first(part: str) -> Tensor:
        """Return codes or zero points: uint8 (out, inputs or groups)."""
        eights = unpacked(parts.read(part), outputs).unflatten(-1, (-1, 8))
        sorted_outputs: Tensor = eights[..., torch.tensor(_ORDER, dtype=torch.int64, device="cpu").argsort()]
        return sorted_outputs.flatten(-2).T.contiguous()

    return IntegerLayer(
        parts,
        "AWQ",
        (outputs, inputs),
        inputs // groups,
        parts.specs["scales"].dtype,
        codes=lambda: outputs_first("qweight"),
        scales=lambda: parts.read("scales").T,
        zeros=lambda: outputs_first("qzeros"),
    ).tensor()


GPTQ = Foreign(
    "gptq",
    partial(_find, _gptq, "GPTQ", 1),  # a row packs inputs
    _PARTS[:2],
    "gptq",
    {"checkpoint_format": one_of("gptq", "gptq_v2", None)},
)
AWQ = Foreign(
    "awq",
    partial(_find, _awq, "AWQ", 8),
    _PARTS[:2],
    "awq",
    {"bits": one_of(4), "version": lambda value: isinstance(value, str) and value.lower() == "gemm"},
)
