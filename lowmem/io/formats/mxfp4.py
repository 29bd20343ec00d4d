"""MXFP4: E2M1 numbers of 4 bits in blocks of 32, with a power of two for each. Experts of gpt-oss are stored so.

``<name>_blocks`` (..., out, in / 32, 16) holds the codes, two in a byte, the first of them low, and
``<name>_scales`` (..., out, in / 32) the exponents. The parameter is the transpose: (..., in, out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import short_repr
from lowmem.io.formats.code_conversion import imported_quantized_tensor, unpacked_nibbles
from lowmem.io.formats.foreign_format import ForeignFormat, LazyForeignTensor
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint
from lowmem.quant.formats import get_format
from lowmem.quant.packing import pack
from lowmem.quant.tensor import QuantizedTensor

BLOCK = 32
E2M1_CODES = (8, 9, 10, 11, 12, 13, 14, 15, 7, 6, 5, 4, 3, 2, 1, 0)
"""The code of lowmem's ``fp4`` for each bit pattern of an E2M1 number; -0 keeps its sign."""

# The largest exponent whose largest weight, 6 * 2 ** (e - 127), float32 holds
_MAX_E8M0 = 252


def fp4_scales_from_exponents(exponents: Tensor) -> Tensor:
    """Return the scales of MXFP4 blocks for ``fp4``, whose levels are E2M1 / 6: 6 * 2 ** (e - 127), in float32."""
    if exponents.numel() and int(exponents.max()) > _MAX_E8M0:
        # 253 and 254 exceed float32, and 255 is NaN.
        raise ValueError(f"it holds a block exponent of {int(exponents.max())}, above {_MAX_E8M0}; get it again")
    # 1.5 * 2 ** (e - 125), by its bits
    return ((exponents.int() + 2) << 23 | 1 << 22).view(torch.float32)


def exponents_and_exact_mask(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exponents of scales, 0 for a scale of 0, and whether ``fp4_scales_from_exponents`` gives them."""
    bits, empty = scales.view(torch.int32), scales == 0
    # Negative, too, if the sign bit is set
    exponents = (bits >> 23) - 2
    return exponents.masked_fill(empty, 0), (bits % 2**23 == 1 << 22) & (exponents >= 0) | empty


def fp4_tensor_from_mxfp4_parts(packed_codes: Tensor, exponents: Tensor, shape: tuple[int, ...]) -> QuantizedTensor:
    """Return a weight of codes, two in a byte, the first of them low: uint8 (..., in / 2), and (..., in / 32)."""
    codes = torch.tensor(E2M1_CODES, dtype=torch.uint8, device="cpu")[unpacked_nibbles(packed_codes).int()]
    return imported_quantized_tensor(pack(codes, BLOCK), fp4_scales_from_exponents(exponents), shape, "fp4", BLOCK)


def nearest_mxfp4_weight(values: Tensor) -> QuantizedTensor:
    """Return a weight in "fp4" with scales of MXFP4, of the two next powers of two those with the least error.

    OCP Microscaling Formats v1.0, section 6.3, takes the smaller one always.
    """
    shape, form = values.shape, get_format("fp4")
    if values.is_meta:
        return QuantizedTensor.empty(shape, "fp4", BLOCK, "float32", "imported", device="meta")
    blocks = values.float().view(*shape[:-1], -1, BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    lower = (torch.frexp(largest).exponent - 1 - 2 + 127).clamp(0, 251)  # its largest weight, 6, or more
    levels, bounds = (
        torch.tensor(numbers, dtype=torch.float32, device="cpu") for numbers in (form.levels, form.boundaries)
    )
    both = []
    for scales in (fp4_scales_from_exponents(lower), fp4_scales_from_exponents(lower + 1)):
        codes = torch.bucketize(blocks / scales, bounds).to(torch.uint8)
        lost = (blocks - levels[codes.int()] * scales).double().square().sum(-1, keepdim=True)
        both.append((codes, scales, lost))
    better = both[1][2] < both[0][2]
    codes, scales = (torch.where(better, both[1][part], both[0][part]) for part in (0, 1))
    return QuantizedTensor(
        pack(codes.view(shape), BLOCK), scales.squeeze(-1), shape, "fp4", BLOCK, "float32", "imported"
    )


def iterate_weights_and_tensor_names(
    checkpoint: SafetensorsCheckpoint, config: Mapping[str, Any]
) -> Iterator[tuple[LazyForeignTensor, set[str]]]:
    """Yield each parameter of a checkpoint that is stored so, and the names of its tensors."""
    for blocks, spec in checkpoint.specs.items():
        name = blocks.removesuffix("_blocks")
        scales = checkpoint.specs.get(f"{name}_scales")
        if name == blocks or spec.dtype != torch.uint8 or scales is None:
            continue
        if len(spec.shape) < 3 or spec.shape[-1] != BLOCK // 2 or 0 in spec.shape or scales.shape != spec.shape[:-1]:
            raise ValueError(
                f"{short_repr(blocks)} is {spec}, and {short_repr(name + '_scales')} {scales}: they do not fit"
            )
        if scales.dtype != torch.uint8:
            raise ValueError(
                f"{short_repr(name + '_scales')} is {scales.dtype}, and exponents are bytes; get it again"
            )
        shape = (*spec.shape[:-2], spec.shape[-2] * BLOCK)
        read = partial(_read_mxfp4_weight, checkpoint, name, shape)
        weight = LazyForeignTensor(name, shape, "MXFP4", spec.nbytes + scales.nbytes, read, transposed=True)
        yield weight, {blocks, f"{name}_scales"}


def _read_mxfp4_weight(checkpoint: SafetensorsCheckpoint, name: str, shape: tuple[int, ...]) -> QuantizedTensor:
    pairs = checkpoint.read_tensor(f"{name}_blocks").flatten(-2)  # (..., out, in / 2)
    return fp4_tensor_from_mxfp4_parts(pairs, checkpoint.read_tensor(f"{name}_scales"), shape)


FORMAT = ForeignFormat("gpt-oss", iterate_weights_and_tensor_names, method="mxfp4")
