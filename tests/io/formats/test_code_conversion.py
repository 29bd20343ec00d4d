"""Codes and scales of other programs become weights of lowmem's, and the reverse."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import quantize
from lowmem.io.formats.code_conversion import (
    LazyIntegerWeight,
    float32_scales_for_smaller_blocks,
    largest_block_size_dividing_rows,
    largest_dividing_block_size,
    remapped_nibbles,
    smallest_exact_scale_encoding,
    tensor_bytes_copy,
    unpacked_codes,
    unpacked_nibbles,
)
from lowmem.io.formats.foreign_format import LayerTensors
from lowmem.quant.formats import get_format
from tests import strategies


def test_scales_are_stored_in_the_smallest_encoding_that_holds_them():
    assert smallest_exact_scale_encoding(torch.tensor([0.5, -65504.0, 2.0**-24, -0.0])) == "float16"
    for value in (65505.0, 2.0**-25, 1 + 2.0**-11):
        assert smallest_exact_scale_encoding(torch.tensor([1.0, value])) == "float32"
        assert (
            smallest_exact_scale_encoding(torch.tensor([1.0, value]), torch.tensor([2.0, 0.5])) == "float32_offsets"
        )
        assert (
            smallest_exact_scale_encoding(torch.tensor([2.0, 0.5]), torch.tensor([1.0, value])) == "float32_offsets"
        )
    assert smallest_exact_scale_encoding(torch.tensor([0.5]), torch.tensor([-65504.0])) == "float16_offsets"
    for broken in (float("nan"), float("inf"), -float("inf")):
        whole, part, none = torch.tensor([1.0, 2.0]), torch.tensor([1.0, broken]), torch.tensor([broken, broken])
        for scales, offsets, count in ((part, None, 1), (part, none, 3), (whole, part, 1)):
            with pytest.raises(ValueError, match=f"it holds {count} scales that are NaN, infinite or too large"):
                smallest_exact_scale_encoding(scales, offsets)


def test_blocks_divide_groups_and_are_the_largest_that_may_be():
    sizes = {(128, 4096): 128, (8192, 8192): 4096, (9000, 9000): 3000, (24, 50): 24, (8, 50): 8, (64, 40): 40}
    for (group, columns), size in sizes.items():
        assert largest_dividing_block_size(group, columns) == size
    for group in (1, 6, 9, 15, 8191):
        with pytest.raises(ValueError, match="no blocks of an even number"):
            largest_dividing_block_size(group, 10**6)


def test_nibbles_of_bytes_are_read_low_first():
    packed = torch.arange(256, dtype=torch.uint8)
    codes = tuple(range(15, -1, -1))
    assert torch.equal(unpacked_nibbles(remapped_nibbles(packed, codes)), 15 - unpacked_nibbles(packed))
    for shape in ((2,), (1, 2), (2, 1)):
        found = unpacked_nibbles(torch.tensor([0x21, 0xF3], dtype=torch.uint8).view(shape))
        assert torch.equal(found, torch.tensor([1, 2, 3, 15]).view(*shape[:-1], -1))
    pairs = torch.tensor([[0x0201], [0x0403]], dtype=torch.int16)
    for given_as in (pairs, pairs.as_strided((2, 1), (1, 7))):  # the stride of a dimension of 1 may be any
        assert tensor_bytes_copy(given_as).tolist() == [[1, 2], [3, 4]]


@given(strategies.weights(views=False), strategies.formats, strategies.small_blocks, strategies.encodings)
def test_codes_and_scales_of_smaller_blocks_give_the_same_weight(weight, name, block, scales):
    stored = quantize(weight, name, block_size=block, scales=scales)
    columns = weight.shape[-1]
    largest = largest_block_size_dividing_rows(stored)
    assert columns % largest == 0
    levels = torch.tensor(get_format(name).levels)[unpacked_codes(stored).int()]
    for size in {largest, 1} | {size for size in (2, 4, 8) if largest % size == 0}:
        wide = float32_scales_for_smaller_blocks(stored, size).repeat_interleave(size, -1)
        assert torch.equal(levels * wide, stored.dequantize())


@given(st.integers(1, 64), strategies.small_blocks)
def test_no_larger_block_is_uniform(columns, block):
    stored = quantize(torch.ones(1, columns), "nf4", block_size=block)
    starts = range(0, columns, block)
    whole = [n for n in range(1, columns + 1) if columns % n == 0 and all(start % n == 0 for start in starts)]
    assert largest_block_size_dividing_rows(stored) == max(whole)


def layer(codes, scales, group, zeros=None, groups=None):
    return LazyIntegerWeight(
        LayerTensors(None, "a", "F", {}),
        "F",
        tuple(codes.shape),
        group,
        scales.dtype,
        *(lambda: codes, lambda: scales, lambda: zeros),
        None if groups is None else lambda: groups,
    )


def test_columns_of_a_group_are_put_side_by_side():
    make = partial(layer, torch.zeros(2, 5, dtype=torch.uint8), torch.ones(2, 3))
    groups = torch.tensor([1, 0, 2, 1, 0])  # the last one is shorter
    order = make(2, groups=groups).checked_column_order_by_group()
    assert (order.tolist(), order.dtype) == ([1, 4, 0, 3, 2], torch.int32)
    for size in (1, 3):
        with pytest.raises(ValueError, match="do not have"):
            make(size, groups=groups).checked_column_order_by_group()
    codes, groups = torch.randint(0, 16, (2, 24), dtype=torch.uint8), torch.randperm(24) // 8
    mixed = layer(codes, torch.tensor([[1.0, 2, 4]] * 2), 8, groups=groups)
    assert torch.equal(
        mixed.read_quantized_in_group_order().dequantize(),
        mixed.read_float32_values()[:, mixed.checked_column_order_by_group().long()],
    )
    with pytest.raises(ValueError, match="its columns are of groups that 3 scales do not have; get it again"):
        make(2, groups=groups + 1).checked_column_order_by_group()


def test_integers_in_groups_of_any_length_are_exact():
    generator = torch.Generator().manual_seed(0)
    for columns, group in ((40, 16), (41, 16), (9000, 9000), (9001, 5000)):
        codes = torch.randint(0, 16, (2, columns), generator=generator, dtype=torch.uint8)
        scales = torch.randn(2, -(-columns // group), generator=generator)
        weight = layer(codes, scales, group).read_quantized_in_group_order()
        weight.check_layout()
        wide = scales.repeat_interleave(group, -1)[:, :columns]
        assert (weight.format, weight.scale_encoding, weight.method) == ("q4_0", "float32", "imported")
        assert torch.equal(weight.dequantize(), (codes.int() - 8).float() * wide)
        if columns % 2:
            assert (weight.packed[:, -1] >> 4 == 8).all()
        # With zero points, a scale of 16 bits: of a stack, too.
        halves, groups = scales.half(), torch.arange(columns) // group
        zeros = torch.randint(0, 16, scales.shape, generator=generator)
        zeros[0] = 8
        exact = (codes.int() - zeros[:, groups]).double() * halves.double()[:, groups]
        for lead in ((), (1,)):
            codes_of, scales_of, zeros_of = (part.view(*lead, *part.shape) for part in (codes, halves, zeros))
            made = layer(codes_of, scales_of, group, zeros_of)
            weight = made.read_quantized_in_group_order()
            weight.check_layout()
            assert (weight.format, weight.scale_encoding[-8:], weight.method) == ("uint4", "_offsets", "imported")
            assert torch.equal(weight.dequantize(torch.float64), exact.view(*lead, *exact.shape))
            assert torch.equal(made.read_float32_values(), weight.dequantize())
            symmetric = layer(
                codes_of, scales_of, group, torch.full_like(zeros_of, 8)
            ).read_quantized_in_group_order()
            assert symmetric.format == "q4_0"
            assert torch.equal(symmetric.dequantize(), layer(codes_of, scales_of, group).read_float32_values())


def test_what_has_more_bits_than_float32_or_no_blocks_is_refused():
    codes, eights = torch.zeros(2, 48, dtype=torch.uint8), torch.full((2, 3), 8)
    wide = "zero points times scales in torch.float32 have more bits than float32"
    one = eights.clone()
    one[1, 2] = 7
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        make = partial(layer, codes, torch.ones(2, 3, dtype=dtype))
        assert (
            make(16, eights).exact_or_refused_foreign_tensor().refusal
            is make(16).exact_or_refused_foreign_tensor().refusal
            is None
        )
        assert make(16, one).exact_or_refused_foreign_tensor().refusal == (wide if dtype == torch.float32 else None)
        assert "a scale for each 6 of 48 columns has no blocks" in make(6).exact_or_refused_foreign_tensor().refusal
