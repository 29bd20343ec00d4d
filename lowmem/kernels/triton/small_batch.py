"""The product of a few inputs with a weight: each byte of codes is read once. ``decode`` explains the constants."""

# mypy: ignore-errors

import triton
import triton.language as tl

from lowmem.kernels.triton.decode import (
    group_blocks_and_code_columns,
    load_row_scales,
    load_scales_or_steps,
    look_up,
    look_up_low_and_high,
)


@triton.jit
def add_products(sums, x, x_stride, inputs, column, mask, values):
    """Add the products of each input and the weights to its sums (rows, groups, bytes), each in one rounding; sums
    beyond the inputs stay 0."""
    added = ()
    for number in tl.static_range(len(sums)):
        # Each thread loads what it multiplies
        at = tl.broadcast_to((x + column)[None], values.shape)
        there = mask & (tl.full(mask.shape, number, tl.int32) < inputs)
        given = tl.load(at, mask=there[None], other=0).to(tl.float32)
        added = added + (tl.fma(given, values, sums[number]),)  # noqa: RUF005 (Triton unpacks no tuples)
        x += x_stride
    return added


@triton.jit
def few(
    x,
    packed,
    scales,
    levels,
    bias,
    out,
    out_features,
    columns,
    row_bytes,
    x_stride,
    inputs,
    packed_stride,
    scales_stride,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write ``x @ W.T + bias``: (inputs, columns) -> (inputs, out_features); sums are in float32.

    INPUTS is the next power of two: a kernel for each number would be compiled eight times. One for all of them would
    take 3.5 times the instructions for one input, and three times the registers.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < out_features
    stored, blocks = scales + row.to(tl.int64) * scales_stride, tl.cdiv(columns, BLOCK)
    codes_of = packed + row.to(tl.int64)[:, None, None] * packed_stride
    table = tl.load(levels + tl.arange(0, 2**BITS))
    sums = (tl.zeros((ROWS, GROUPS, GROUP), tl.float32),) * INPUTS
    for start in range(0, row_bytes, GROUPS * GROUP):
        first = start + tl.arange(0, GROUPS) * GROUP
        block, low, high = group_blocks_and_code_columns(first, columns, BLOCK, BITS, WHOLE, GROUP)
        byte = first[:, None] + tl.arange(0, GROUP)[None, :]
        there = byte < row_bytes
        codes = tl.load(codes_of + byte[None], mask=inside[:, None, None] & there[None], other=0)
        has_scale = inside[:, None] & (first < row_bytes)[None, :]
        scale = load_scales_or_steps(stored, block, has_scale, STEPS)[:, :, None]
        if BITS == 8:
            sums = add_products(sums, x, x_stride, inputs, low, there, look_up(table, codes) * scale)
        else:
            of_low, of_high = look_up_low_and_high(table, codes)
            sums = add_products(sums, x, x_stride, inputs, low, there, of_low * scale)
            sums = add_products(sums, x, x_stride, inputs, high, there & (high < columns), of_high * scale)
    factor = tl.div_rn(load_row_scales(stored, blocks, inside), 1.0 * STEPS) if STEPS else 1.0
    added = tl.load(bias + row, mask=inside, other=0).to(tl.float32) if BIAS else 0.0
    for number in tl.static_range(INPUTS):
        product = tl.sum(tl.reshape(sums[number], (ROWS, GROUPS * GROUP)), 1)
        product = (tl.reshape(product[:, None] * factor, (ROWS,)) if STEPS else product) + added
        tl.store(out + row, product.to(out.dtype.element_ty), mask=row < tl.where(number < inputs, out_features, 0))
        out += out_features
