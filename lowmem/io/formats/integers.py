"""Weights of whole numbers, ``(code - zero) * scale``, as GPTQ, AWQ and compressed-tensors have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import show
from lowmem.io.formats.foreign_tensor import ForeignTensor, as_bytes, fitting_blocks, nibbles, quantized
from lowmem.io.formats.parts import Parts
from lowmem.io.safetensors import TensorSpec
from lowmem.io.source import Source
from lowmem.quant.packing import pack
from lowmem.quant.tensor import QuantizedTensor

__all__ = [
    "IntegerLayer",
    "check_group_size",
    "gathering",
    "integer_refusal",
    "integer_values",
    "integer_weight",
    "packed_layers",
    "unpacked",
    "words",
]


@dataclass(frozen=True)
class IntegerLayer:
    """The weight of a layer, whose parts are read when they are asked for.

    Args:
        parts: its tensors.
        kind: how it is stored, as text.
        shape: (..., out, in).
        group: columns of a scale; the last group may be shorter.
        dtype: of the scales.
        codes: returns the codes, integers (..., out, in).
        scales: returns the scales, (..., out, groups).
        zeros: returns the zero points, integers (..., out, groups); None: they are 8.
        groups: returns the group of each column; None: they are in order.
    """

    parts: Parts
    kind: str
    shape: tuple[int, ...]
    group: int
    dtype: torch.dtype
    codes: Callable[[], Tensor]
    scales: Callable[[], Tensor]
    zeros: Callable[[], Tensor | None] = lambda: None
    groups: Callable[[], Tensor] | None = None

    def tensor(self) -> ForeignTensor:
        """Return the weight, refused if it is not 16 levels times the scales of blocks."""
        try:
            self.order()
        except ValueError as reason:
            return self.refused(str(reason))
        why = integer_refusal(self.shape[-1], self.group, self.dtype, self.zeros())
        if why is not None:
            return self.refused(why)
        order = None if self.is_in_order() else self.order
        name, nbytes = self.parts.name("weight"), self.parts.nbytes
        return ForeignTensor.of_weight(name, self.shape, self.kind, nbytes, self.read, order=order)

    def refused(self, why: str) -> ForeignTensor:
        """Return the weight, which is quantized again or not read."""
        return self.parts.refused(self.kind, self.shape, why, self.values)

    def groups_of_columns(self) -> Tensor:
        """Return the group of each column.

        Raises:
            ValueError: one that has no scale.
        """
        if self.groups is None:
            return self._in_order()
        groups, count = self.groups().long(), -(-self.shape[-1] // self.group)
        if not bool(((groups >= 0) & (groups < count)).all()):
            raise ValueError(f"its columns are of groups that {count} scales do not have; get it again")
        return groups

    def _in_order(self) -> Tensor:
        return torch.arange(self.shape[-1]) // self.group

    def is_in_order(self) -> bool:
        """Whether the columns of each group lie side by side."""
        return torch.equal(self.groups_of_columns(), self._in_order())

    def order(self) -> Tensor:
        """Return the columns in the order of their groups: int32 (in,).

        Raises:
            ValueError: groups of several sizes, or one that has no scale.
        """
        return gathering(self.groups_of_columns(), self.group)

    def read(self) -> QuantizedTensor:
        """Return the weight, with its columns in the order of their groups."""
        codes = self.codes()
        codes = codes if self.is_in_order() else codes[..., self.order()]
        return integer_weight(codes, self.scales(), self.group, self.zeros())

    def values(self) -> Tensor:
        """Return the weight in float32."""
        return integer_values(self.codes(), self.scales(), self.groups_of_columns(), self.zeros())


def packed_layers(source: Source) -> Iterator[tuple[str, TensorSpec, TensorSpec]]:
    """Yield the path of each layer of GPTQ or AWQ, and the specs of its matrices ``qweight`` and ``scales``."""
    for name, words in source.specs.items():
        layer, _, part = name.rpartition(".")
        scales = source.specs.get(f"{layer}.scales".lstrip("."))
        if part == "qweight" and scales is not None and len(words.shape) == len(scales.shape) == 2:
            yield layer, words, scales


def unpacked(words: Tensor, count: int) -> Tensor:
    """Return eight codes of each word, the lowest bits first: int32 (..., count / 8) -> uint8 (..., count)."""
    return nibbles(as_bytes(words))[..., :count]


def words(codes: Tensor) -> Tensor:
    """Return codes with eight in a word, the first of them lowest: uint8 (n, m) -> int32 (n, m / 8)."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).view(codes.shape[0], -1, 4, 2)
    pairs = (padded[..., 0] | padded[..., 1] << 4).contiguous()  # (n, words, 4 bytes)
    return pairs.view(torch.int32).squeeze(-1)


def check_group_size(config: Mapping[str, Any], layer: str, columns: int, groups: int, is_even: bool) -> None:
    """Raise unless the ``group_size`` of a config can be that of a layer; ``is_even``: all groups are whole.

    Raises:
        ValueError: it is another layer's, or no size.
    """
    size = config.get("group_size")
    if size is None or (size == -1 and groups == 1):
        return
    fits = type(size) is int and size > 0 and -(-columns // size) == groups
    if not fits or (is_even and columns % min(size, columns)):
        raise ValueError(
            f"its config.json says group_size={show(size)}, and {show(layer)} has {groups} groups of {columns} inputs"
            "; get both again from one source"
        )


def gathering(groups: Tensor, size: int) -> Tensor:
    """Return the order of columns in which those of a group lie side by side: int32 (columns,), in it as they were.

    Args:
        groups: the group of each column.
        size: columns of a group; the last group may be shorter.

    Raises:
        ValueError: groups of other sizes.
    """
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order], torch.arange(len(groups)) // size):
        raise ValueError(f"its groups do not have {size} columns each")
    return order.to(torch.int32)


def integer_refusal(columns: int, group: int, dtype: torch.dtype, zeros: Tensor | None) -> str | None:
    """Return why ``integer_weight`` is not exact for scales of ``dtype``, or None."""
    if dtype not in (torch.float16, torch.bfloat16) and zeros is not None and bool((zeros != 8).any()):
        return f"zero points times scales in {dtype} have more bits than float32"
    try:
        fitting_blocks(group, columns)
    except ValueError as reason:
        return str(reason)
    return None


def integer_values(codes: Tensor, scales: Tensor, groups: Tensor, zeros: Tensor | None) -> Tensor:
    """Return ``(code - zero) * scale`` in float32, where column i has the scale and zero ``groups[i]``."""
    less = 8 if zeros is None else zeros.int()[..., groups]
    return (codes.int() - less).float() * scales.float()[..., groups]


def integer_weight(codes: Tensor, scales: Tensor, group: int, zeros: Tensor | None = None) -> QuantizedTensor:
    """Return the weight ``(code - zero) * scale`` of one scale for each group of columns.

    Where all zeros are 8 it has the levels (code - 8) / 8, else code / 16 and the offsets ``-zero * scale``. Both
    products, and so their sum, are exact: a scale of 16 bits times 4 bits.

    Args:
        codes: uint8 (..., columns), 0 to 15.
        scales: floating point (..., groups).
        zeros: integers (..., groups), 0 to 15; None: 8.
        group: columns of a scale; the last group may be shorter.

    Raises:
        ValueError: groups that no blocks divide, or scales that are not finite.
    """
    columns = codes.shape[-1]
    shape = (*codes.shape[:-1], columns)
    size = fitting_blocks(group, columns)

    def of_blocks(values: Tensor) -> Tensor:
        return values[..., torch.arange(0, columns, size) // group].contiguous()

    scales = scales.float()
    if columns % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=8)  # fills the last byte
    packed = pack(codes, size)
    if zeros is None or bool((zeros == 8).all()):
        return quantized(packed, of_blocks(8 * scales), shape, "q4_0", size)
    offsets = of_blocks(-(zeros.float() * scales))
    return quantized(packed, of_blocks(16 * scales), shape, "uint4", size, offsets)
