"""Weights of whole numbers, ``(code - zero) * scale``, as GPTQ, AWQ and compressed-tensors have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.io.formats.codes import fitting_blocks, quantized
from lowmem.io.formats.foreign import ForeignTensor, Parts
from lowmem.quant.packing import pack
from lowmem.quant.tensor import QuantizedTensor


@dataclass(frozen=True)
class IntegerLayer:
    """The weight of a layer, whose parts are read when they are asked for.

    Args:
        parts: its tensors.
        kind: how the weight is stored, as text.
        shape: (..., out, in).
        group: columns of a scale; the last group may be shorter.
        dtype: of the scales.
        codes: returns the codes, integers (..., out, in).
        scales: returns the scales, (..., out, groups).
        zeros: returns the zero points, integers (..., out, groups); None: they are 8.
        groups: returns the group of each column; None: the groups are in order.
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
        zeros = self.zeros()
        try:
            is_in_order = _is_sorted(self.order())
            if self.dtype not in (torch.float16, torch.bfloat16) and zeros is not None and bool((zeros != 8).any()):
                raise ValueError(f"zero points times scales in {self.dtype} have more bits than float32")
            fitting_blocks(self.group, self.shape[-1])
        except ValueError as reason:
            return self.refused(str(reason))
        return self.parts.weight(self.kind, self.shape, self.read, order=None if is_in_order else self.order)

    def refused(self, why: str) -> ForeignTensor:
        """Return the weight, which is quantized again or not read."""
        return self.parts.refused(self.kind, self.shape, why, self.values)

    def _groups_of_columns(self) -> Tensor:
        """Return the group of each column; a ValueError if one has no scale."""
        if self.groups is None:
            return torch.arange(self.shape[-1]) // self.group
        groups, count = self.groups().long(), -(-self.shape[-1] // self.group)
        if not bool(((groups >= 0) & (groups < count)).all()):
            raise ValueError(f"its columns are of groups that {count} scales do not have; get it again")
        return groups

    def order(self) -> Tensor:
        """Return the columns with those of a group side by side: int32 (in,); a ValueError if sizes differ."""
        groups = self._groups_of_columns()
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], torch.arange(len(groups)) // self.group):
            raise ValueError(f"its groups do not have {self.group} columns each")
        return order.to(torch.int32)

    def read(self) -> QuantizedTensor:
        """Return the weight, with its columns in the order of their groups.

        Where all zeros are 8 it has the levels (code - 8) / 8, else code / 16 and the offsets ``-zero * scale``. Both
        products, and so their sum, are exact: a scale of 16 bits times 4 bits.

        Raises:
            ValueError: scales that are not finite.
        """
        columns, size = self.shape[-1], fitting_blocks(self.group, self.shape[-1])
        starts = torch.arange(0, columns, size) // self.group  # the group of each block
        codes, scales, zeros, order = self.codes(), self.scales().float(), self.zeros(), self.order()
        codes = codes if _is_sorted(order) else codes[..., order]
        if columns % 2:
            codes = torch.nn.functional.pad(codes, (0, 1), value=8)  # fills the last byte
        packed = pack(codes, size)
        if zeros is None or bool((zeros == 8).all()):
            return quantized(packed, (8 * scales)[..., starts].contiguous(), self.shape, "q4_0", size)
        offsets = -(zeros.float() * scales)[..., starts].contiguous()
        return quantized(packed, (16 * scales)[..., starts].contiguous(), self.shape, "uint4", size, offsets)

    def values(self) -> Tensor:
        """Return the weight in float32, with its columns as the file has them."""
        groups, zeros = self._groups_of_columns(), self.zeros()
        less = 8 if zeros is None else zeros.int()[..., groups]
        return (self.codes().int() - less).float() * self.scales().float()[..., groups]


def _is_sorted(order: Tensor) -> bool:
    return bool((order.diff() > 0).all())
