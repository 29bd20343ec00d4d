"""Codes and scales of other programs become weights of lowmem's, and the reverse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import quantize
from lowmem.io.formats.codes import (
    as_bytes,
    codes_of,
    encoding_of,
    fitting_blocks,
    nibbles,
    remapped,
    scales_of,
    uniform_block,
    unpacked,
    words,
)
from lowmem.quant.formats import get_format
from tests import strategies


def test_scales_are_stored_in_the_smallest_encoding_that_holds_them():
    assert encoding_of(torch.tensor([0.5, -65504.0, 2.0**-24, -0.0])) == "float16"
    for value in (65505.0, 2.0**-25, 1 + 2.0**-11):
        assert encoding_of(torch.tensor([1.0, value])) == "float32"
        assert encoding_of(torch.tensor([1.0, value]), torch.tensor([2.0, 0.5])) == "float32_offsets"
        assert encoding_of(torch.tensor([2.0, 0.5]), torch.tensor([1.0, value])) == "float32_offsets"
    assert encoding_of(torch.tensor([0.5]), torch.tensor([-65504.0])) == "float16_offsets"
    for broken in (float("nan"), float("inf"), -float("inf")):
        whole, part, none = torch.tensor([1.0, 2.0]), torch.tensor([1.0, broken]), torch.tensor([broken, broken])
        for scales, offsets, count in ((part, None, 1), (part, none, 3), (whole, part, 1)):
            with pytest.raises(ValueError, match=f"it holds {count} scales that are NaN, infinite or too large"):
                encoding_of(scales, offsets)


def test_blocks_divide_groups_and_are_the_largest_that_may_be():
    sizes = {(128, 4096): 128, (8192, 8192): 4096, (9000, 9000): 3000, (24, 50): 24, (8, 50): 8, (64, 40): 40}
    for (group, columns), size in sizes.items():
        assert fitting_blocks(group, columns) == size
    for group in (1, 6, 9, 15, 8191):
        with pytest.raises(ValueError, match="no blocks of an even number"):
            fitting_blocks(group, 10**6)


def test_nibbles_of_bytes_are_read_low_first():
    packed = torch.arange(256, dtype=torch.uint8)
    codes = tuple(range(15, -1, -1))
    assert torch.equal(nibbles(remapped(packed, codes)), 15 - nibbles(packed))
    for shape in ((2,), (1, 2), (2, 1)):
        found = nibbles(torch.tensor([0x21, 0xF3], dtype=torch.uint8).view(shape))
        assert torch.equal(found, torch.tensor([1, 2, 3, 15]).view(*shape[:-1], -1))
    pairs = torch.tensor([[0x0201], [0x0403]], dtype=torch.int16)
    for given_as in (pairs, pairs.as_strided((2, 1), (1, 7))):  # the stride of a dimension of 1 may be any
        assert as_bytes(given_as).tolist() == [[1, 2], [3, 4]]


def test_eight_codes_share_a_word():
    codes = torch.randint(0, 16, (3, 11), dtype=torch.uint8)
    assert words(codes).shape == (3, 2)
    assert torch.equal(unpacked(words(codes), 11), codes)
    assert words(torch.tensor([[1, 2, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8)).item() == 0x21


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
    stored = quantize(torch.ones(1, columns), "nf4", block_size=block)
    starts = range(0, columns, block)
    whole = [n for n in range(1, columns + 1) if columns % n == 0 and all(start % n == 0 for start in starts)]
    assert uniform_block(stored) == max(whole)
