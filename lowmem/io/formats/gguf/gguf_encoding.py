"""Which block type of GGUF holds a weight of lowmem's exactly, and the bytes of its blocks.

Exact means: ggml's value, ``d * k[code]`` in float32, has the bits of ``levels[code] * scale``. The levels of
``lowmem.quant.formats.IMPORTED`` are those of ggml divided by a power of two, so ``d`` is the scale divided by it.

Q4_K and IQ4_XS have eight blocks of 32 whose scales are one float16 number times whole factors. A weight that was
read from a file has the products as its scales; the number and the factors are found again. Of several that give the
same products, those with the largest factors are taken, which llama.cpp chooses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lowmem.io.formats.code_conversion import (
    float32_scales_for_smaller_blocks,
    offsets_for_smaller_blocks,
    remapped_nibbles,
    tensor_bytes_copy,
    unpacked_codes,
)
from lowmem.io.formats.gguf.gguf_block_types import BLOCKS, KINDS, SIZE, SUPERBLOCKS
from lowmem.io.formats.mxfp4 import E2M1_CODES, exponents_and_exact_mask
from lowmem.nn.forms import CodedForm
from lowmem.quant.formats import get_format
from lowmem.quant.packing import pack, unpack
from lowmem.quant.quantize_tensor import quantize
from lowmem.quant.tensor import QuantizedTensor

_NIBBLES = tuple(E2M1_CODES.index(code) for code in range(16))
"""The bits of an E2M1 number for each code of ``fp4``. ggml reads -0 as 0."""

AGAIN = {4: "iq4_nl", 8: "q8_0"}
"""By the bits of a weight: the format in which it is quantized again."""

_BLOCKS = 8  # of 32 weights in a superblock
# Superblocks that are factored at a time: a few MiB
_CHUNK = 2**14
_K_FACTORS = range(63, 0, -1)
_XS_FACTORS = tuple(signed_size for size in range(32, 0, -1) for signed_size in (-size, size) if signed_size < 32)


def form_mismatch_reason_or_none(form: CodedForm, columns: int) -> str | None:
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


def exact_type_and_row_bytes_or_none(weight: QuantizedTensor) -> tuple[int, Tensor] | None:
    """Return the type that holds a weight, and its bytes, uint8 (rows, bytes).

    ``form_mismatch_reason_or_none`` of the weight is None.
    """
    if (blocks := exact_blocks_of_32_or_none(weight)) is not None:
        return KINDS[weight.format], block_row_bytes(blocks)
    rows = superblock_row_bytes_or_none(weight)
    return None if rows is None else (SUPERBLOCKS[weight.format], rows)


def exact_blocks_of_32_or_none(weight: QuantizedTensor) -> QuantizedTensor | None:
    """Return a weight in blocks of 32, or None if its type does not hold the scales.

    ``form_mismatch_reason_or_none`` of the weight is None.
    """
    divisor, blocks = _scale_divisor_or_none(weight.format), _weight_in_blocks_of_32(weight)
    scales, *offsets = _reblocked_scales_and_offsets(blocks, SIZE)
    if divisor is None:
        return blocks if bool(exponents_and_exact_mask(scales)[1].all()) else None
    return blocks if all(torch.equal(part.half().float(), part) for part in (scales / divisor, *offsets)) else None


def nearest_gguf_format(weight: QuantizedTensor) -> str:
    """Return the key of ``KINDS`` for a weight that GGUF does not hold: its own if rounding its scales is enough, or
    the one with as many bits."""
    columns = weight.shape[-1]
    if columns % SIZE:
        raise ValueError(f"rows of {columns} are no multiple of {SIZE}, the blocks of GGUF")
    if (
        form_mismatch_reason_or_none(CodedForm.from_quantized_tensor(weight), columns) is None
        and (divisor := _scale_divisor_or_none(weight.format)) is not None
    ):
        scales, *offsets = _reblocked_scales_and_offsets(weight, weight.block_size)
        if all(bool(part.half().isfinite().all()) for part in (scales / divisor, *offsets)):
            return weight.format
    return AGAIN[get_format(weight.format).bits]


def nearest_gguf_weight(weight: QuantizedTensor | Tensor, format: str) -> QuantizedTensor:
    """Return a weight that GGUF holds, close to one that it does not; a ValueError for values beyond float16 scales.

    In the format of the weight itself codes stay, and scales and offsets are rounded to float16. In another one the
    values are quantized again; ggml stores d, the scale divided by a power of two, in float16, so d is searched for.
    """
    divisor = _scale_divisor_or_none(format)
    assert divisor is not None
    if isinstance(weight, QuantizedTensor) and format == weight.format:
        blocks = _weight_in_blocks_of_32(weight)
        scales, *offsets = _reblocked_scales_and_offsets(blocks, SIZE)
        rounded = [(scales / divisor).half().float() * divisor, *(part.half().float() for part in offsets)]
        return replace(blocks, scales=torch.cat(rounded, dim=-1))
    values = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    made = quantize(values / divisor, format, block_size=SIZE, scales="float16")
    return replace(made, scales=made.scales.float() * divisor, scale_encoding="float32")


def block_row_bytes(blocks: QuantizedTensor) -> Tensor:
    """Return the bytes of a weight in blocks of 32, as ``nearest_gguf_weight`` returns it: uint8 (rows, bytes)."""
    divisor, matrix = _scale_divisor_or_none(blocks.format), blocks.as_matrix()
    scales, *offsets = _reblocked_scales_and_offsets(matrix, SIZE)
    packed = matrix.packed.view(*scales.shape, -1)  # (rows, blocks, 16 or 32)
    if divisor is None:
        packed = remapped_nibbles(packed, _NIBBLES).masked_fill(
            scales[..., None] == 0, 0
        )  # no exponent makes others zeros
        heads = [exponents_and_exact_mask(scales)[0].to(torch.uint8)[..., None]]
    else:
        if BLOCKS[KINDS[blocks.format]].offsets is not None:
            offsets = offsets or [torch.zeros_like(scales)]
        heads = [tensor_bytes_copy(head.half()[..., None]) for head in (scales / divisor, *offsets)]
        packed = packed ^ 128 if get_format(blocks.format).width.is_centered else packed
    return torch.cat([*heads, packed], dim=-1).flatten(1)


def superblock_row_bytes_or_none(weight: QuantizedTensor) -> Tensor | None:
    """Return the bytes of a weight in superblocks, or None if they do not hold it.

    ``form_mismatch_reason_or_none`` of the weight is None.
    """
    if weight.format not in SUPERBLOCKS or weight.shape[-1] % (SIZE * _BLOCKS) or weight.block_size % SIZE:
        return None
    matrix = _weight_in_blocks_of_32(weight).as_matrix()
    scales, *offsets = (part.reshape(-1, _BLOCKS) for part in _reblocked_scales_and_offsets(matrix, SIZE))
    packed = matrix.packed.view(len(scales), _BLOCKS, SIZE // 2)
    raw = None
    if weight.format == "iq4_nl":
        if (number_and_factors := _exact_factorization_or_none(scales / 128, _XS_FACTORS)) is not None:
            raw = _encoded_iq4_xs_blocks(*number_and_factors, packed)
    elif (first := _exact_factorization_or_none(scales / 16, _K_FACTORS)) is not None:
        minima = -offsets[0] if offsets else torch.zeros_like(scales)
        if (second := _exact_factorization_or_none(minima, _K_FACTORS)) is not None:
            raw = _encoded_q4_k_blocks(*first, *second, packed)
    return None if raw is None else raw.view(len(matrix.packed), -1)


def flat_dense_bytes(weight: Tensor) -> Tensor:
    """Return the bytes of a dense tensor, uint8, one-dimensional."""
    return weight.detach().contiguous().view(-1).view(torch.uint8)


def _scale_divisor_or_none(format: str) -> float | None:
    return BLOCKS[KINDS[format]].divisor


def _weight_in_blocks_of_32(weight: QuantizedTensor) -> QuantizedTensor:
    """Return the same weight in blocks of 32, with float32 scales: (..., columns / 32)."""
    is_packed = weight.block_size == SIZE or not get_format(weight.format).width.is_packed_by_block
    packed = weight.packed if is_packed else pack(unpacked_codes(weight), SIZE)
    scales = torch.cat(_reblocked_scales_and_offsets(weight, SIZE), dim=-1)
    encoding = "float32_offsets" if weight.has_offsets else "float32"
    return replace(weight, packed=packed, scales=scales, block_size=SIZE, scale_encoding=encoding)


def _reblocked_scales_and_offsets(weight: QuantizedTensor, block_size: int) -> list[Tensor]:
    """Return the scales in blocks of ``block_size``, and the offsets of a weight that has them: float32 (...,
    blocks)."""
    return [float32_scales_for_smaller_blocks(weight, block_size)] + (
        [offsets_for_smaller_blocks(weight, block_size)] if weight.has_offsets else []
    )


def _exact_factorization_or_none(products: Tensor, allowed_factors: Iterable[int]) -> tuple[Tensor, Tensor] | None:
    """Return a float16 number (n, 1) and whole factors int32 (n, 8) whose products are exactly ``products`` (n, 8).
    The largest product of a row has the first of ``allowed_factors`` that fits; None where some row has none."""
    allowed_factors = tuple(allowed_factors)
    least, most = min(0, *allowed_factors), max(allowed_factors)
    numbers = torch.zeros(len(products), 1, dtype=torch.float16, device="cpu")
    integer_factors = torch.zeros_like(products, dtype=torch.int32)
    for start in range(0, len(products), _CHUNK):
        rows = products[start : start + _CHUNK].double()
        largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
        left = largest[:, 0].nonzero()[:, 0]
        for factor in allowed_factors:
            number = (largest[left] / factor).half()
            whole = (rows[left] / number.double()).round()
            fits = ((whole * number.double() == rows[left]) & (whole >= least) & (whole <= most)).all(-1)
            numbers[start + left[fits]] = number[fits]
            integer_factors[start + left[fits]] = whole[fits].int()
            left = left[~fits]
            if not len(left):
                break
        if len(left):
            return None
    return numbers, integer_factors


def _encoded_q4_k_blocks(d: Tensor, scales: Tensor, dmin: Tensor, minima: Tensor, packed: Tensor) -> Tensor:
    """Q4_K: two float16 numbers, 12 bytes of 6-bit factors, and 32 low nibbles before 32 high ones, four times."""
    scales, minima = scales.to(torch.uint8), minima.to(torch.uint8)
    heads = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scales, minima)]
    low = scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4
    codes = unpack(packed, SIZE).view(-1, _BLOCKS // 2, 2, SIZE)
    nibbles = (codes[:, :, 0] | codes[:, :, 1] << 4).flatten(1)
    return torch.cat([tensor_bytes_copy(d), tensor_bytes_copy(dmin), *heads, low, nibbles], dim=-1)


def _encoded_iq4_xs_blocks(d: Tensor, factors: Tensor, packed: Tensor) -> Tensor:
    """IQ4_XS: a float16 number, the two high bits of eight 6-bit factors plus 32, their four low bits, the codes."""
    factors = factors + 32
    shifts = torch.arange(0, 2 * _BLOCKS, 2, dtype=torch.int32, device="cpu")
    high = ((factors >> 4) << shifts).sum(-1, dtype=torch.int32)
    low = (factors[:, ::2] & 15 | (factors[:, 1::2] & 15) << 4).to(torch.uint8)
    heads = torch.stack([high & 255, high >> 8], dim=-1).to(torch.uint8)
    return torch.cat([tensor_bytes_copy(d), heads, low, packed.flatten(1)], dim=-1)
