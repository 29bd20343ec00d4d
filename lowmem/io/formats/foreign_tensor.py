"""A weight of another program's file; its codes and scales become a ``QuantizedTensor`` that holds them exactly.

Exact means: ``dequantize(torch.float32)`` gives the bits that the program which wrote the file computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lowmem.errors import show
from lowmem.nn.stored import FourBitForm
from lowmem.quant.backend import Weight
from lowmem.quant.packing import pack
from lowmem.quant.scales import get_encoding
from lowmem.quant.tensor import QuantizedTensor

__all__ = [
    "E2M1_CODES",
    "FILL",
    "ForeignTensor",
    "Kept",
    "as_bytes",
    "check_group_size",
    "encoding_of",
    "fitting_blocks",
    "gathering",
    "integer_refusal",
    "integer_values",
    "integer_weight",
    "nibbles",
    "power_scales",
    "quantized",
    "remapped",
]

E2M1_CODES = (8, 9, 10, 11, 12, 13, 14, 15, 7, 6, 5, 4, 3, 2, 1, 0)
"""The code of lowmem's ``fp4`` for each bit pattern of an E2M1 number; -0 keeps its sign."""

FILL = 8
"""What fills the last byte of a row with an odd number of codes."""

_MAX_E8M0 = 252  # the largest exponent whose largest weight, 6 * 2 ** (e - 127), float32 holds

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


def power_scales(exponents: Tensor) -> Tensor:
    """Return the scales of MXFP4 blocks for ``fp4``, whose levels are E2M1 / 6: 6 * 2 ** (e - 127), in float32.

    Raises:
        ValueError: an exponent above 252: 253 and 254 exceed float32, and 255 is NaN.
    """
    if exponents.numel() and int(exponents.max()) > _MAX_E8M0:
        raise ValueError(f"it holds a block exponent of {int(exponents.max())}, above {_MAX_E8M0}; get it again")
    # 1.5 * 2 ** (e - 125), by its bits
    return ((exponents.int() + 2) << 23 | 1 << 22).view(torch.float32)


def check_group_size(config: Mapping[str, Any], layer: str, columns: int, groups: int, is_even: bool) -> None:
    """Raise unless the ``group_size`` of a config can be that of a layer; -1 is one group.

    Args:
        config: what config.json says of the quantization.
        layer: its path.
        columns: of its weight.
        groups: of its columns, which have a scale.
        is_even: whether all groups have as many columns; otherwise the last one may be shorter.

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
        codes = torch.nn.functional.pad(codes, (0, 1), value=FILL)
    packed = pack(codes, size)
    if zeros is None or bool((zeros == 8).all()):
        return quantized(packed, of_blocks(8 * scales), shape, "q4_0", size)
    offsets = of_blocks(-(zeros.float() * scales))
    return quantized(packed, of_blocks(16 * scales), shape, "uint4", size, offsets)
