"""Whole numbers times scales, less zero points, are exact where lowmem has levels for them."""

from functools import partial

import pytest
import torch

from lowmem.io.formats.foreign import Parts
from lowmem.io.formats.integers import IntegerLayer


def layer(codes, scales, group, zeros=None, groups=None):
    return IntegerLayer(
        Parts(None, "a", "F", {}),
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
    order = make(2, groups=groups).order()
    assert (order.tolist(), order.dtype) == ([1, 4, 0, 3, 2], torch.int32)
    for size in (1, 3):
        with pytest.raises(ValueError, match="do not have"):
            make(size, groups=groups).order()
    with pytest.raises(ValueError, match="its columns are of groups that 3 scales do not have; get it again"):
        make(2, groups=groups + 1).order()


def test_integers_in_groups_of_any_length_are_exact():
    generator = torch.Generator().manual_seed(0)
    for columns, group in ((40, 16), (41, 16), (9000, 9000), (9001, 5000)):
        codes = torch.randint(0, 16, (2, columns), generator=generator, dtype=torch.uint8)
        scales = torch.randn(2, -(-columns // group), generator=generator)
        weight = layer(codes, scales, group).read()
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
            weight = made.read()
            weight.check_layout()
            assert (weight.format, weight.scale_encoding[-8:], weight.method) == ("uint4", "_offsets", "imported")
            assert torch.equal(weight.dequantize(torch.float64), exact.view(*lead, *exact.shape))
            assert torch.equal(made.values(), weight.dequantize())
            symmetric = layer(codes_of, scales_of, group, torch.full_like(zeros_of, 8)).read()
            assert symmetric.format == "q4_0"
            assert torch.equal(symmetric.dequantize(), layer(codes_of, scales_of, group).values())


def test_what_has_more_bits_than_float32_or_no_blocks_is_refused():
    codes, eights = torch.zeros(2, 48, dtype=torch.uint8), torch.full((2, 3), 8)
    wide = "zero points times scales in torch.float32 have more bits than float32"
    one = eights.clone()
    one[1, 2] = 7
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        make = partial(layer, codes, torch.ones(2, 3, dtype=dtype))
        assert make(16, eights).tensor().refusal is make(16).tensor().refusal is None
        assert make(16, one).tensor().refusal == (wide if dtype == torch.float32 else None)
        assert "a scale for each 6 of 48 columns has no blocks" in make(6).tensor().refusal
