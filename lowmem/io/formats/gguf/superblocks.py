"""Q4_K and IQ4_XS of GGUF: eight blocks of 32 whose scales are one float16 number times whole factors.

A weight that was read from such a file has the products as its scales. Here the number and the factors are found
again: of several that give the same products, those with the largest factors, which llama.cpp chooses.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lowmem.io.formats.codes import as_bytes
from lowmem.io.formats.gguf.blocks import SIZE, SUPERBLOCKS
from lowmem.io.formats.gguf.encoding import scales_of, spread
from lowmem.quant.packing import unpack
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["superblock_rows"]

_BLOCKS = 8  # of 32 weights in a superblock
_CHUNK = 2**14  # superblocks that are factored at a time: a few MiB
_K_FACTORS = range(63, 0, -1)
_XS_FACTORS = tuple(one for size in range(32, 0, -1) for one in (-size, size) if one < 32)


def superblock_rows(weight: QuantizedTensor) -> Tensor | None:
    """Return the bytes of a weight in the type of its format: uint8 (rows, bytes); None: it does not hold it exactly.

    Args:
        weight: of any block size; blocks of 32 have to be whole.
    """
    if weight.format not in SUPERBLOCKS or weight.shape[-1] % (SIZE * _BLOCKS) or weight.block_size % SIZE:
        return None
    matrix = spread(weight).as_matrix()
    scales, offsets = (None if part is None else part.reshape(-1, _BLOCKS) for part in scales_of(matrix))
    assert scales is not None
    packed = matrix.packed.view(len(scales), _BLOCKS, SIZE // 2)
    if weight.format == "iq4_nl":
        found = None if offsets is not None else _factored(scales / 128, _XS_FACTORS)
        raw = None if found is None else _iq4_xs(*found, packed)
    else:
        first = _factored(scales / 16, _K_FACTORS)
        second = (
            None
            if first is None
            else _factored(torch.zeros_like(scales) if offsets is None else -offsets, _K_FACTORS)
        )
        raw = None if first is None or second is None else _q4_k(*first, *second, packed)
    return None if raw is None else raw.view(len(matrix.packed), -1)


def _factored(products: Tensor, factors: Iterable[int]) -> tuple[Tensor, Tensor] | None:
    """Return a float16 number and the whole factors of each row, of which ``products`` are the exact products.

    Args:
        products: float32 (n, 8).
        factors: those that the largest product of a row may have, by preference; 0 is that of a product that is 0.

    Returns:
        float16 (n, 1) and int32 (n, 8); None: some row has none.
    """
    factors = tuple(factors)
    least, most = min(0, *factors), max(factors)
    numbers = torch.zeros(len(products), 1, dtype=torch.float16)
    found = torch.zeros_like(products, dtype=torch.int32)
    for start in range(0, len(products), _CHUNK):
        rows = products[start : start + _CHUNK].double()
        largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
        left = largest[:, 0].nonzero()[:, 0]
        for factor in factors:
            number = (largest[left] / factor).half()
            whole = (rows[left] / number.double()).round()
            fits = ((whole * number.double() == rows[left]) & (whole >= least) & (whole <= most)).all(-1)
            numbers[start + left[fits]] = number[fits]
            found[start + left[fits]] = whole[fits].int()
            left = left[~fits]
            if not len(left):
                break
        if len(left):
            return None
    return numbers, found


def _q4_k(d: Tensor, scales: Tensor, dmin: Tensor, minima: Tensor, packed: Tensor) -> Tensor:
    """Q4_K: two float16 numbers, 12 bytes of 6-bit factors, and 32 low nibbles before 32 high ones, four times."""
    scales, minima = scales.to(torch.uint8), minima.to(torch.uint8)
    heads = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scales, minima)]
    low = scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4
    codes = unpack(packed, SIZE).view(-1, _BLOCKS // 2, 2, SIZE)
    nibbles = (codes[:, :, 0] | codes[:, :, 1] << 4).flatten(1)
    return torch.cat([as_bytes(d), as_bytes(dmin), *heads, low, nibbles], dim=-1)


def _iq4_xs(d: Tensor, factors: Tensor, packed: Tensor) -> Tensor:
    """IQ4_XS: a float16 number, the two high bits of eight 6-bit factors plus 32, their four low bits, the codes."""
    factors = factors + 32
    high = ((factors >> 4) << torch.arange(0, 2 * _BLOCKS, 2, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    low = (factors[:, ::2] & 15 | (factors[:, 1::2] & 15) << 4).to(torch.uint8)
    heads = torch.stack([high & 255, high >> 8], dim=-1).to(torch.uint8)
    return torch.cat([as_bytes(d), heads, low, packed.flatten(1)], dim=-1)
