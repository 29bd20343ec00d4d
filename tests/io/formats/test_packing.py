"""The blocks of a weight can be cut into smaller ones that have the same scales."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import quantize
from lowmem.io.formats.packing import codes_of, scales_of, uniform_block
from lowmem.quant.formats import get_format
from tests import strategies


@given(strategies.weights(views=False), strategies.formats, strategies.small_blocks, strategies.encodings)
def test_codes_and_scales_of_smaller_blocks_give_the_same_weight(weight, name, block, scales):
    stored = quantize(weight, name, block_size=block, scales=scales)
    columns = weight.shape[-1]
    largest = uniform_block(stored)
    assert columns % largest == 0
    levels = torch.tensor(get_format(name).levels)[codes_of(stored).int()]
    for size in {largest, 1} | {size for size in (2, 4, 8) if largest % size == 0}:
        wide = scales_of(stored, size).repeat_interleave(size, -1)
        assert torch.equal(levels * wide, stored.dequantize())


@given(st.integers(1, 64), strategies.small_blocks)
def test_no_larger_block_is_uniform(columns, block):
    """Blocks that are whole in each row and lie within its blocks."""
    stored = quantize(torch.ones(1, columns), "nf4", block_size=block)
    starts = range(0, columns, block)
    whole = [
        size for size in range(1, columns + 1) if columns % size == 0 and all(start % size == 0 for start in starts)
    ]
    assert uniform_block(stored) == max(whole)
