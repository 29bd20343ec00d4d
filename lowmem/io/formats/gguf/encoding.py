"""Which block type of GGUF holds a weight of lowmem's exactly, and the bytes of its blocks.

Exact means: ggml's value, ``d * k[code]`` in float32, has the bits of ``levels[code] * scale``. The levels of
``lowmem.quant.formats.IMPORTED`` are those of ggml divided by a power of two, so ``d`` is the scale divided by it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowmem.io.formats.codes import as_bytes, remapped
from lowmem.io.formats.gguf.blocks import BLOCKS, KINDS, SIZE
from lowmem.io.formats.mxfp4 import E2M1_CODES, exponents_of
from lowmem.nn.forms import CodedForm
from lowmem.quant.packing import pack, unpack
from lowmem.quant.quantize import quantize
from lowmem.quant.tensor import QuantizedTensor

__all__ = [
    "dense_rows",
    "eight_bit_rows",
    "in_blocks",
    "inexact",
    "nearest",
    "nearest_format",
    "rows_of",
    "scales_of",
    "spread",
]


def inexact(form: CodedForm, columns: int) -> str | None:
    """Return why no block type has the levels and blocks of a form, or None; its scales may still not fit."""
    if form.format not in KINDS:
        return f"GGUF has no type with the levels of {form.format}"
    if form.scale_encoding.endswith("_offsets") and form.format != "uint4":
        return f"GGUF has no type with the levels of {form.format} and offsets"
    if columns % SIZE:
        return f"rows of {columns} are no multiple of {SIZE}, the blocks of GGUF"
    if form.block_size % SIZE:
        return f"block_size={form.block_size} is no multiple of {SIZE}, the blocks of GGUF"
    return None


def _divisor(format: str) -> float | None:
    return BLOCKS[KINDS[format]].divisor


def in_blocks(weight: QuantizedTensor) -> QuantizedTensor | None:
    """Return the same weight in blocks of 32 with float32 scales that its type holds; None: it holds not all of them.

    Only for a weight of which ``inexact`` returns None. The values are the same bits, but for the signs of zeros.
    """
    divisor, blocks = _divisor(weight.format), spread(weight)
    scales, offsets = scales_of(blocks)
    if divisor is None:
        return blocks if bool(exponents_of(scales)[1].all()) else None
    parts = [scales / divisor] if offsets is None else [scales / divisor, offsets]
    return blocks if all(torch.equal(part.half().float(), part) for part in parts) else None


def nearest_format(weight: QuantizedTensor) -> str:
    """Return the key of ``KINDS`` for a weight that GGUF does not hold: its own where only scales have to be rounded.

    Raises:
        ValueError: rows that are no multiple of 32.
    """
    columns = weight.shape[-1]
    if columns % SIZE:
        raise ValueError(f"rows of {columns} are no multiple of {SIZE}, the blocks of GGUF")
    if inexact(CodedForm.of(weight), columns) is None and (divisor := _divisor(weight.format)) is not None:
        scales, offsets = scales_of(weight)
        rounded = [scales / divisor] + ([] if offsets is None else [offsets])
        if all(bool(part.half().isfinite().all()) for part in rounded):
            return weight.format
    return "iq4_nl"


def nearest(weight: QuantizedTensor | Tensor, format: str) -> QuantizedTensor:
    """Return a weight that GGUF holds, close to one that it does not: see ``in_blocks``.

    In the format of the weight itself codes stay, and scales and offsets are rounded to float16. In another one the
    values are quantized again; ggml stores d, the scale divided by a power of two, in float16, so d is what is
    searched for.

    Args:
        weight: 4-bit, or float32.
        format: what ``nearest_format`` returned; or any other one with a divisor.

    Raises:
        ValueError: values that no float16 scale reaches.
    """
    divisor = _divisor(format)
    assert divisor is not None
    if isinstance(weight, QuantizedTensor) and format == weight.format:
        blocks = spread(weight)
        scales, offsets = scales_of(blocks)
        rounded = [(scales / divisor).half().float() * divisor] + (
            [] if offsets is None else [offsets.half().float()]
        )
        return replace(blocks, scales=torch.cat(rounded, dim=-1))
    values = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    made = quantize(values / divisor, format, block_size=SIZE, scales="float16")
    return replace(made, scales=made.scales.float() * divisor, scale_encoding="float32")


def rows_of(blocks: QuantizedTensor) -> Tensor:
    """Return the bytes of a weight that ``in_blocks`` or ``nearest`` returned: uint8 (rows, bytes)."""
    divisor, matrix = _divisor(blocks.format), blocks.as_matrix()
    packed = matrix.packed.view(len(matrix.packed), -1, SIZE // 2)  # (rows, blocks, 16)
    scales, offsets = scales_of(matrix)
    if divisor is None:
        packed = remapped(packed, _NIBBLES).masked_fill(scales[..., None] == 0, 0)  # no exponent makes others zeros
        parts = [exponents_of(scales)[0].to(torch.uint8)[..., None], packed]
    else:
        heads = [scales / divisor]
        if BLOCKS[KINDS[blocks.format]].offsets is not None:
            heads.append(torch.zeros_like(scales) if offsets is None else offsets)
        parts = [*(as_bytes(head.half()[..., None]) for head in heads), packed]
    return torch.cat(parts, dim=-1).flatten(1)


def eight_bit_rows(weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Return the values of Q8_0 that are nearest to a weight's, and their bytes.

    Returns:
        float32 (..., n) and uint8 (rows, bytes).

    Raises:
        ValueError: values that no float16 scale reaches.
    """
    values = weight.as_matrix().dequantize()
    parts = values.view(len(values), -1, SIZE)  # (rows, blocks, 32)
    scales = (parts.abs().amax(-1, keepdim=True) / 127).half()
    if not bool(scales.isfinite().all()):
        raise ValueError("it has values beyond the scales of Q8_0; write it with --dtype f32")
    steps = scales.float()
    codes = (parts / steps.masked_fill(steps == 0, 1)).round().clamp(-127, 127)
    raw = torch.cat([as_bytes(scales), as_bytes(codes.to(torch.int8))], dim=-1)
    return (codes * steps).view(weight.shape), raw.flatten(1)


def dense_rows(weight: Tensor) -> Tensor:
    """Return the bytes of a dense tensor, uint8, one-dimensional."""
    return weight.detach().contiguous().view(-1).view(torch.uint8)


_NIBBLES = tuple(E2M1_CODES.index(code) for code in range(16))
"""The bits of an E2M1 number for each code of ``fp4``. ggml reads -0 as 0."""


def spread(weight: QuantizedTensor) -> QuantizedTensor:
    """Return the same weight in blocks of 32, with float32 scales: (..., columns / 32)."""
    columns = weight.shape[-1]
    packed = weight.packed
    if weight.block_size != SIZE:
        packed = pack(unpack(packed, weight.block_size)[..., :columns], SIZE)
    index = torch.arange(0, columns, SIZE) // weight.block_size
    scales, offsets = scales_of(weight)
    scales = scales[..., index] if offsets is None else torch.cat([scales[..., index], offsets[..., index]], dim=-1)
    encoding = "float32" if offsets is None else "float32_offsets"
    return replace(weight, packed=packed, scales=scales, block_size=SIZE, scale_encoding=encoding)


def scales_of(weight: QuantizedTensor) -> tuple[Tensor, Tensor | None]:
    """Return float32 scales and offsets: (..., blocks)."""
    return weight.encoding.decode(weight.scales).contiguous(), weight.offsets() if weight.has_offsets else None
