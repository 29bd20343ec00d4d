"""Whole numbers times scales, less zero points, are exact where lowmem has levels for them."""

import pytest
import torch

from lowmem.io.formats.integers import gathering, integer_refusal, integer_values, integer_weight, unpacked, words


def test_eight_codes_share_a_word():
    codes = torch.randint(0, 16, (3, 11), dtype=torch.uint8)
    assert words(codes).shape == (3, 2)
    assert torch.equal(unpacked(words(codes), 11), codes)
    assert words(torch.tensor([[1, 2, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8)).item() == 0x21


def test_columns_of_a_group_are_put_side_by_side():
    groups = torch.tensor([1, 0, 2, 1, 0])  # the last one is shorter
    assert gathering(groups, 2).tolist() == [1, 4, 0, 3, 2]
    assert gathering(groups, 2).dtype == torch.int32
    for size in (1, 3):
        with pytest.raises(ValueError, match=f"do not have {size} columns each"):
            gathering(groups, size)


def test_integers_in_groups_of_any_length_are_exact():
    generator = torch.Generator().manual_seed(0)
    for columns, group in ((40, 16), (41, 16), (9000, 9000), (9001, 5000), (7, 8)):
        codes = torch.randint(0, 16, (2, columns), generator=generator, dtype=torch.uint8)
        scales = torch.randn(2, -(-columns // group), generator=generator)
        if columns == 7:
            with pytest.raises(ValueError, match="no blocks"):
                integer_weight(codes, scales, group)
            continue
        weight = integer_weight(codes, scales, group)
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
            weight = integer_weight(codes_of, scales_of, group, zeros_of)
            weight.check_layout()
            assert (weight.format, weight.scale_encoding[-8:], weight.method) == ("uint4", "_offsets", "imported")
            assert torch.equal(weight.dequantize(torch.float64), exact.view(*lead, *exact.shape))
            assert torch.equal(integer_values(codes_of, scales_of, groups, zeros_of), weight.dequantize())
            symmetric = integer_weight(codes_of, scales_of, group, torch.full_like(zeros_of, 8))
            assert symmetric.format == "q4_0"
            assert torch.equal(symmetric.dequantize(), integer_values(codes_of, scales_of, groups, None))
    eights, wide = torch.full((2, 3), 8), "zero points times scales in torch.float32 have more bits than float32"
    one = eights.clone()
    one[1, 2] = 7
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert integer_refusal(48, 16, dtype, eights) is integer_refusal(48, 16, dtype, None) is None
        assert integer_refusal(48, 16, dtype, one) == (wide if dtype == torch.float32 else None)
        assert "a scale for each 6 of 48 columns has no blocks" in integer_refusal(48, 6, dtype, None)
