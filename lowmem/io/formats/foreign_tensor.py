"""A weight of another program's file; its codes and scales become a ``QuantizedTensor`` that holds them exactly.

Exact means: ``dequantize(torch.float32)`` gives the bits that the program which wrote the file computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from lowmem.errors import show
from lowmem.nn.stored import FourBitForm
from lowmem.quant.backend import Weight
from lowmem.quant.scales import get_encoding
from lowmem.quant.tensor import QuantizedTensor

__all__ = [
    "ForeignTensor",
    "Kept",
    "as_bytes",
    "encoding_of",
    "fitting_blocks",
    "nibbles",
    "quantized",
    "remapped",
]

Kept: TypeAlias = "FourBitForm | torch.dtype"
"""How a weight is kept: in 4 bits, with its codes, or dense in a dtype."""


@dataclass(frozen=True)
class ForeignTensor:
    """A weight of another program's file, whose values are read when they are asked for.

    Args:
        name: as the model's state names it.
        shape: of the weight as it is stored: that of the model's, or its transpose.
        kind: how the file stores it, such as "Q4_0" or "bfloat16".
        nbytes: what it takes in the file.
        kept: returns how ``read`` keeps it. It may have to read the scales.
        read: returns the weight: 4-bit codes as they are in the file, or a dense tensor.
        refusal: why it cannot be kept exactly; None: it can. Of a refused weight ``kept`` and ``read`` raise.
        values: returns a refused weight in float32, to be quantized again; None: its values are unknown.
        transposed: whether the last two dimensions of the model's weight are swapped here.
        order: returns the column of the model's weight for each column that ``read`` returns, int32; None: they are
            in the model's order.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    kept: Callable[[], Kept]
    read: Callable[[], Weight]
    refusal: str | None = None
    values: Callable[[], Tensor] | None = None
    transposed: bool = False
    order: Callable[[], Tensor] | None = None

    @classmethod
    def of_weight(
        cls,
        name: str,
        shape: tuple[int, ...],
        kind: str,
        nbytes: int,
        read: Callable[[], Weight],
        transposed: bool = False,
        order: Callable[[], Tensor] | None = None,
    ) -> ForeignTensor:
        """Return a weight that is kept as what ``read`` returns, which is called for either."""

        def kept() -> Kept:
            weight = read()
            if not isinstance(weight, QuantizedTensor):
                return weight.dtype
            return replace(FourBitForm.of(weight), transposed=transposed, gathered=order is not None)

        return cls(name, shape, kind, nbytes, kept, read, transposed=transposed, order=order)

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

        return cls(name, shape, kind, nbytes, fail, fail, reason, values)  # type: ignore[arg-type]


def quantized(
    packed: Tensor,
    scales: Tensor,
    shape: tuple[int, ...],
    format: str,
    block_size: int,
    offsets: Tensor | None = None,
) -> QuantizedTensor:
    """Return the weight of packed codes and float32 scales (..., blocks), which the smallest encoding holds exactly.

    Raises:
        ValueError: scales, or offsets, that are NaN or infinite.
    """
    encoding = encoding_of(scales, offsets)
    stored = (scales if offsets is None else torch.cat([scales, offsets], dim=-1)).to(get_encoding(encoding).dtype)
    return QuantizedTensor(packed, stored, torch.Size(shape), format, block_size, encoding, "imported")


def encoding_of(scales: Tensor, offsets: Tensor | None = None) -> str:
    """Return the smallest encoding that holds float32 scales, and offsets, exactly.

    Raises:
        ValueError: some are not finite.
    """
    parts = [scales] if offsets is None else [scales, offsets]
    broken = sum(int((~part.isfinite()).sum()) for part in parts)
    if broken:
        raise ValueError(f"it holds {broken} scales that are NaN, infinite or too large for float32; get it again")
    name = "float16" if all(torch.equal(part.to(torch.float16).float(), part) for part in parts) else "float32"
    return name if offsets is None else f"{name}_offsets"


def fitting_blocks(group: int, columns: int) -> int:
    """Return the largest valid block size that divides groups of ``group`` columns, or rows, into whole blocks.

    Raises:
        ValueError: there is none: the groups have no divisor that is an even number from 8 to 4096.
    """
    group = min(group, columns)
    for parts in range(1, group // 8 + 1):
        size, rest = divmod(group, parts)
        if not rest and size % 2 == 0 and size <= 4096:
            return size
        if parts > 4096:
            break
    raise ValueError(f"a scale for each {group} of {columns} columns has no blocks of an even number from 8 to 4096")


def nibbles(packed: Tensor) -> Tensor:
    """Return the low and the high nibble of each byte, in this order: uint8 (..., m) -> (..., 2 m)."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: (..., n) -> uint8 (..., n * itemsize)."""
    # Not contiguous(), which leaves dimensions of one number their strides.
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def remapped(packed: Tensor, codes: tuple[int, ...]) -> Tensor:
    """Replace both nibbles of each byte: nibble n becomes ``codes[n]``."""
    table = torch.tensor([codes[byte & 15] | codes[byte >> 4] << 4 for byte in range(256)], dtype=torch.uint8)
    return table[packed.int()]
