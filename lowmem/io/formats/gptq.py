"""Linear layers of GPTQ: AutoGPTQ and GPTQModel.

``<layer>.qweight`` int32 (in / 8, out) holds eight inputs in a word, the first in the lowest bits; ``.qzeros`` int32
(groups, out / 8) eight outputs; ``.scales`` is float16 (groups, out), and ``.g_idx`` (in,) the group of each input.
A weight is ``scale * (code - zero)``. The first version of the format stores ``zero - 1``.

With ``desc_act`` the inputs of a group lie apart: they are read side by side, in the order ``argsort(g_idx)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import show
from lowmem.io.formats.foreign_tensor import (
    ForeignTensor,
    as_bytes,
    check_group_size,
    gathering,
    integer_refusal,
    integer_values,
    integer_weight,
    nibbles,
)
from lowmem.io.safetensors import TensorSpec
from lowmem.io.source import Source
from lowmem.quant.backend import Weight

__all__ = ["find", "packed_layers", "unpacked_outputs"]

_PARTS = ("qweight", "qzeros", "scales")


def find(source: Source, config: Mapping[str, Any]) -> Iterator[tuple[ForeignTensor, set[str]]]:
    """Yield the weight of each layer of GPTQ, and the names of its tensors.

    Raises:
        ValueError: a layer that lacks a part, or whose parts do not fit.
    """
    for layer, words, scales in packed_layers(source):
        if words.shape[1] == scales.shape[1]:  # AWQ packs outputs
            yield _layer(source, layer, config)


def packed_layers(source: Source) -> Iterator[tuple[str, TensorSpec, TensorSpec]]:
    """Yield the path of each layer of GPTQ or AWQ, and the specs of its matrices ``qweight`` and ``scales``."""
    for name, words in source.specs.items():
        layer, _, part = name.rpartition(".")
        scales = source.specs.get(f"{layer}.scales".lstrip("."))
        if part == "qweight" and scales is not None and len(words.shape) == len(scales.shape) == 2:
            yield layer, words, scales


def _layer(source: Source, layer: str, config: Mapping[str, Any]) -> tuple[ForeignTensor, set[str]]:
    names = {part: f"{layer}.{part}".lstrip(".") for part in (*_PARTS, "g_idx")}
    if names["qzeros"] not in source.specs:
        raise ValueError(f"the layer {show(layer)} of GPTQ lacks {show(names['qzeros'])}; get it again")
    specs = {part: source.specs[name] for part, name in names.items() if name in source.specs}
    (words, outputs), (groups, _) = specs["qweight"].shape, specs["scales"].shape
    inputs = math.prod(specs["g_idx"].shape) if "g_idx" in specs else 8 * words
    weight = f"{layer}.weight".lstrip(".")
    nbytes = sum(spec.nbytes for spec in specs.values())
    claimed = {names[part] for part in specs}
    bits = config.get("bits", 32 * words / inputs if inputs else 0)
    if bits != 4:
        why = f"it has {show(bits)} bits a weight, and 4 are read: take the dense model, or one in 4 bits"
        return ForeignTensor.refused(weight, (outputs, inputs), "GPTQ", nbytes, why), claimed
    fits = (
        inputs == 8 * words
        and 0 < groups <= inputs
        and outputs > 0
        and all(specs[part].dtype == torch.int32 for part in ("qweight", "qzeros"))
        and specs["scales"].dtype.is_floating_point
        and specs["qzeros"].shape == (groups, -(-outputs // 8))
        and ("g_idx" not in specs or specs["g_idx"].shape == (inputs,))
        and ("g_idx" not in specs or specs["g_idx"].dtype in (torch.int32, torch.int64))
    )
    if not fits:
        shown = ", ".join(f"{part} {spec.dtype} {spec.shape}" for part, spec in specs.items())
        raise ValueError(f"the parts of the layer {show(layer)} of GPTQ do not fit: {shown}; get it again")
    check_group_size(config, layer, inputs, groups, is_even="g_idx" not in specs)
    group = _group(source, names, inputs, groups, config)
    if group < 1 or -(-inputs // group) != groups:
        raise ValueError(
            f"the layer {show(layer)} of GPTQ has {groups} groups of {group} of {inputs} inputs; get it again, with "
            "its config.json"
        )
    stored = _Stored(source, names, min(group, inputs), inputs, outputs, config)
    reason = stored.refusal()
    if reason is not None:
        return ForeignTensor.refused(weight, (outputs, inputs), "GPTQ", nbytes, reason, stored.values), claimed
    order = None if stored.is_in_order() else stored.order
    return ForeignTensor.of_weight(weight, (outputs, inputs), "GPTQ", nbytes, stored.read, order=order), claimed


def _group(source: Source, names: Mapping[str, str], inputs: int, groups: int, config: Mapping[str, Any]) -> int:
    """Return how many inputs share a scale; the last group may be shorter."""
    group = config.get("group_size")
    if group is None and names["g_idx"] in source.specs:
        return int((source.read_tensor(names["g_idx"]) == 0).sum())
    return -(-inputs // groups) if group in (None, -1) else int(group)  # -1: all inputs


@dataclass(frozen=True)
class _Stored:
    """The parts of one layer."""

    source: Source
    names: Mapping[str, str]
    group: int
    inputs: int
    outputs: int
    config: Mapping[str, Any]

    def part(self, name: str) -> Tensor:
        """Return one of its tensors."""
        return self.source.read_tensor(self.names[name])

    def groups(self) -> Tensor:
        """Return the group of each input.

        Raises:
            ValueError: one that has no scale.
        """
        in_order = torch.arange(self.inputs) // self.group
        if self.names["g_idx"] not in self.source.specs:
            return in_order
        groups = self.part("g_idx").long()
        count = self.source.specs[self.names["scales"]].shape[0]
        if not bool(((groups >= 0) & (groups < count)).all()):
            raise ValueError(
                f"{show(self.names['g_idx'])} names groups that {count} scales do not have; get it again"
            )
        return groups

    def zeros(self) -> Tensor:
        """Return the zero point of each group and output, int32 (groups, out).

        Raises:
            ValueError: nothing tells of which version they are.
        """
        stored = unpacked_outputs(self.part("qzeros"), self.outputs).int()
        kind = self.config.get("checkpoint_format")
        if kind is None:  # symmetric ones tell the version
            kind = "gptq_v2" if bool((stored == 8).all()) else "gptq"
            if not self.config and kind == "gptq" and not bool((stored == 7).all()):
                raise ValueError(
                    f"the zero points {show(self.names['qzeros'])} of GPTQ are of version 1 or 2, and no config.json "
                    "beside the file tells; put the one of its folder there"
                )
        return stored if kind == "gptq_v2" else stored + 1 & 15  # 0 was stored as -1

    def refusal(self) -> str | None:
        """Return why it is not 16 levels times the scales of blocks."""
        try:
            self.order()
        except ValueError as reason:
            return str(reason)
        dtype = self.source.specs[self.names["scales"]].dtype
        return integer_refusal(self.inputs, self.group, dtype, self.zeros())

    def order(self) -> Tensor:
        """Return the inputs in the order of their groups: int32 (in,).

        Raises:
            ValueError: groups of several sizes, or one that has no scale.
        """
        return gathering(self.groups(), self.group)

    def is_in_order(self) -> bool:
        """Whether the inputs of each group lie side by side."""
        return torch.equal(self.groups(), torch.arange(self.inputs) // self.group)

    def codes(self) -> Tensor:
        """Return the codes: uint8 (out, in)."""
        return nibbles(as_bytes(self.part("qweight").T))  # of (out, in / 8)

    def read(self) -> Weight:
        """Return the weight (out, in), with its columns in the order of their groups."""
        codes = self.codes() if self.is_in_order() else self.codes()[:, self.order()]
        return integer_weight(codes, self.part("scales").T, self.group, self.zeros().T)

    def values(self) -> Tensor:
        """Return the weight in float32."""
        return integer_values(self.codes(), self.part("scales").T, self.groups(), self.zeros().T)


def unpacked_outputs(words: Tensor, outputs: int) -> Tensor:
    """Return eight codes of each word, the lowest bits first: int32 (n, out / 8) -> uint8 (n, out)."""
    return nibbles(as_bytes(words))[:, :outputs]
