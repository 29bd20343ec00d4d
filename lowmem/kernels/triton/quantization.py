"""Rows of a weight, dequantized, or quantized for given scales: with the bits of plain torch, whose order of
operations the kernels keep. ``decode`` explains the constants."""

# mypy: ignore-errors

import triton
import triton.language as tl

from lowmem.kernels.triton.decode import (
    block_code_bytes,
    group_blocks_and_code_columns,
    load_row_scales,
    load_scales_or_steps,
    look_up,
    look_up_low_and_high,
)


@triton.jit
def restored(level, scale, offset, OFFSETS: tl.constexpr):
    """Return a weight; an offset of 0 would make +0 of -0."""
    return level * scale + offset if OFFSETS else level * scale


@triton.jit
def dequantize(
    packed,
    scales,
    levels,
    out,
    rows,
    columns,
    row_bytes,
    out_stride,
    behind,
    packed_stride,
    scales_stride,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    OFFSETS: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write ``levels[code] * scale (+ offset)`` to (rows, columns), computed in float32 and rounded once. OFFSETS
    says that offsets lie behind a row's scales; ``behind`` is how far, from the first scale that is read, the row
    scale or the first offset lies."""
    tiles = tl.cdiv(row_bytes, GROUPS * GROUP)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % tiles * (GROUPS * GROUP) + tl.arange(0, GROUPS) * GROUP
    block, low, high = group_blocks_and_code_columns(first, columns, BLOCK, BITS, WHOLE, GROUP)
    byte = first[:, None] + tl.arange(0, GROUP)[None, :]
    # Rows times bytes may exceed 2^31
    inside, row = row < rows, row.to(tl.int64)
    mask = inside[:, None, None] & (byte < row_bytes)[None]
    codes = tl.load(packed + row[:, None, None] * packed_stride + byte[None], mask=mask, other=0)
    stored = scales + row * scales_stride
    has_scale = inside[:, None] & (first < row_bytes)[None, :]
    scale = load_scales_or_steps(stored, block, has_scale, STEPS)
    if STEPS:
        scale = tl.div_rn(scale * load_row_scales(stored, behind, inside), 1.0 * STEPS)
    scale = scale[:, :, None]
    table = tl.load(levels + tl.arange(0, 2**BITS))
    offset = load_scales_or_steps(stored + behind, block, has_scale, STEPS)[:, :, None] if OFFSETS else 0.0
    at = out + row[:, None, None] * out_stride
    if BITS == 8:
        values = restored(look_up(table, codes), scale, offset, OFFSETS)
        tl.store(at + low[None], values.to(out.dtype.element_ty), mask=mask)
    else:
        of_low, of_high = look_up_low_and_high(table, codes)
        values = restored(of_low, scale, offset, OFFSETS)
        tl.store(at + low[None], values.to(out.dtype.element_ty), mask=mask)
        values = restored(of_high, scale, offset, OFFSETS)
        tl.store(at + high[None], values.to(out.dtype.element_ty), mask=mask & (high < columns)[None])


@triton.jit
def count_thresholds_below(thresholds, values, BITS: tl.constexpr):
    """Return how many thresholds lie below each value, by a binary search in 2^BITS - 1 and an infinite one."""
    codes = tl.zeros(values.shape, tl.int32)
    for bit in tl.static_range(BITS):
        step = 2 ** (BITS - 1 - bit)
        codes += tl.where(look_up(thresholds, codes + (step - 1)) < values, step, 0)
    return codes


@triton.jit
def quantize(
    weight,
    scales,
    boundaries,
    packed,
    used,
    count,
    columns,
    blocks,
    packed_stride,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the nearest codes of ``weight / scale``, and whether a block uses another code than ZERO.

    ``weight`` (rows, columns) and ``scales`` (rows, blocks) are float32 and contiguous. A program quantizes BLOCKS of
    the ``count`` blocks, whose codes take WIDTH bytes at most. A zero scale has zero codes.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    block, row = at % blocks, at // blocks
    width = block_code_bytes(block, columns, BLOCK, BITS)[:, None]
    inner = tl.arange(0, WIDTH)[None, :]
    mask = (at < count)[:, None] & (inner < width)
    scale = tl.load(scales + at, mask=at < count, other=0.0)
    scale = tl.where(scale == 0, float("inf"), scale)[:, None]
    thresholds = tl.load(boundaries + tl.arange(0, 2**BITS))
    low = block[:, None] * BLOCK + inner
    # Outside of the row, weights of 0 have zero codes, as padding does.
    values = tl.load(weight + row[:, None] * columns + low, mask=mask, other=0.0)
    byte = count_thresholds_below(thresholds, tl.div_rn(values, scale), BITS)
    others = byte != ZERO
    if BITS == 4:
        high = low + width
        values = tl.load(weight + row[:, None] * columns + high, mask=mask & (high < columns), other=0.0)
        codes = count_thresholds_below(thresholds, tl.div_rn(values, scale), BITS)
        byte = byte | (codes << 4)
        others = others | (codes != ZERO)
    into = packed + row[:, None] * packed_stride + block[:, None] * (BLOCK * BITS // 8) + inner
    tl.store(into, byte.to(tl.uint8), mask=mask)
    tl.store(used + at, tl.max(others.to(tl.int32), 1).to(tl.uint8), mask=at < count)
