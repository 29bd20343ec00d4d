"""What the kernels share: where the codes of a row lie, their levels, and the scales of blocks.

A tile is three-dimensional: (rows, groups, bytes of a group). The bytes of a group belong to one block, so that a
scale is loaded once a group, and the bytes by one instruction. Names in capitals are compile-time constants:

    BLOCK: weights per scale.
    BITS: of a code, 4 or 8.
    STEPS: of a double scale, 255 or 127 (with a sign); 0 for scales in float32 or float16.
    WHOLE: whether the last block of a row is as long as the others.
    ROWS, GROUPS, GROUP: the shape of a tile.
"""

# The bodies are Triton's language, which Python's type checkers do not know.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def block_code_bytes(block, columns, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Return the bytes of a block's codes, which in 4 bits are half of its weights: the last block may be short."""
    width = tl.minimum(BLOCK, columns - block * BLOCK)
    return width if BITS == 8 else (width + 1) // 2


@triton.jit
def group_blocks_and_code_columns(
    first, columns, BLOCK: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr
):
    """Return the block of each group, the columns of its low codes, and those of its high codes: (groups, bytes).

    ``first`` has the place of each group's first byte. Codes of 8 bits have no high ones.
    """
    WIDTH: tl.constexpr = BLOCK * BITS // 8
    block = first // WIDTH
    low = (block * BLOCK + first % WIDTH)[:, None] + tl.arange(0, GROUP)[None, :]
    return block, low, low + (WIDTH if WHOLE else block_code_bytes(block, columns, BLOCK, BITS)[:, None])


@triton.jit
def look_up(levels, codes):
    """Return the level of each code."""
    return tl.reshape(tl.gather(levels, tl.ravel(codes.to(tl.int32)), 0), codes.shape)


@triton.jit
def look_up_low_and_high(levels, bytes):
    """Return the levels of the low and of the high codes of bytes, by one gather."""
    return tl.split(look_up(levels, tl.join(bytes & 15, bytes >> 4)))


@triton.jit
def load_scales_or_steps(stored, block, mask, STEPS: tl.constexpr):
    """Return the float32 scales (rows, groups) of blocks, where ``stored`` points to the first scale of each row; of
    double scales, which row scales multiply, the steps."""
    scale = tl.load(stored[:, None] + block[None, :], mask=mask, other=0)
    if STEPS == 127:
        count = scale.to(tl.int32)
        return tl.where(count >= 128, 128 - count, count).to(tl.float32)
    return scale.to(tl.float32)


@triton.jit
def load_row_scales(stored, blocks, inside):
    """Return the float16 behind each row's double scales, made of two bytes, since its address may be odd."""
    least = tl.load(stored + blocks, mask=inside, other=0).to(tl.int16)
    most = tl.load(stored + blocks + 1, mask=inside, other=0).to(tl.int16)
    return (least | (most << 8)).to(tl.float16, bitcast=True).to(tl.float32)[:, None]
