"""What foreign codes and scales become."""

from dataclasses import replace

import pytest
import torch

from lowmem.io.formats.foreign_tensor import (
    E2M1_CODES,
    ForeignTensor,
    as_bytes,
    encoding_of,
    fitting_blocks,
    gathering,
    integer_refusal,
    integer_values,
    integer_weight,
    nibbles,
    power_scales,
    remapped,
)
from lowmem.nn.stored import FourBitForm
from lowmem.quant.formats import FORMATS

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_every_e2m1_number_times_every_exponent_is_exact_and_keeps_the_sign_of_zero():
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    values[8] = -0.0
    levels = torch.tensor(FORMATS["fp4"].levels)[list(E2M1_CODES)]
    exponents = torch.arange(253, dtype=torch.uint8)
    powers = torch.tensor([2.0 ** (e - 127) for e in range(253)], dtype=torch.float64)
    expected = (values.double() * powers[:, None]).float()
    found = levels * power_scales(exponents)[:, None]
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    with pytest.raises(ValueError, match="exponent of 253"):
        power_scales(torch.tensor([253], dtype=torch.uint8))
    assert power_scales(torch.empty(0, 3, dtype=torch.uint8)).shape == (0, 3)


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
    for group, columns, size in (
        (128, 4096, 128),
        (8192, 8192, 4096),
        (9000, 9000, 3000),
        (24, 50, 24),
        (8, 50, 8),
        (64, 40, 40),
    ):
        assert fitting_blocks(group, columns) == size
    for group in (1, 6, 9, 15, 8191):
        with pytest.raises(ValueError, match="no blocks of an even number"):
            fitting_blocks(group, 10**6)
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
            assert_read_when_asked(weight)
    eights, wide = torch.full((2, 3), 8), "zero points times scales in torch.float32 have more bits than float32"
    one = eights.clone()
    one[1, 2] = 7
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert integer_refusal(48, 16, dtype, eights) is integer_refusal(48, 16, dtype, None) is None
        assert integer_refusal(48, 16, dtype, one) == (wide if dtype == torch.float32 else None)
        assert "a scale for each 6 of 48 columns has no blocks" in integer_refusal(48, 6, dtype, None)


def assert_read_when_asked(weight):
    """Hold what a file's weight says of itself to the weight that it reads, when it is asked."""
    calls = []
    for transposed, order in ((False, None), (True, None), (False, lambda: torch.arange(2))):
        one = ForeignTensor.of_weight("a", (2, 3), "b", 5, lambda: calls.append(1) or weight, transposed, order)
        assert not calls
        assert (one.name, one.shape, one.kind, one.nbytes, one.refusal) == ("a", (2, 3), "b", 5, None)
        assert (one.transposed, one.order) == (transposed, order)
        assert one.read() is weight
        form = FourBitForm(*(getattr(weight, name) for name in ("format", "block_size", "scale_encoding", "method")))
        assert one.kept() == replace(form, transposed=transposed, gathered=order is not None)
        calls.clear()
    assert ForeignTensor.of_weight("a", (2,), "b", 4, lambda: torch.zeros(2).half()).kept() is torch.float16
    for values in (None, weight.dequantize):
        one = ForeignTensor.refused("a", (2, 3), "b", 5, "it is odd", values)
        assert (one.name, one.shape, one.kind, one.nbytes) == ("a", (2, 3), "b", 5)
        assert (one.refusal, one.values, one.transposed) == ("it is odd", values, False)
        for read in (one.kept, one.read):
            with pytest.raises(ValueError, match="^'a' in b cannot be kept exactly: it is odd$"):
                read()


def test_nibbles_of_bytes():
    packed = torch.arange(256, dtype=torch.uint8)
    codes = tuple(range(15, -1, -1))
    assert torch.equal(nibbles(remapped(packed, codes)), 15 - nibbles(packed))
    for shape in ((2,), (1, 2), (2, 1)):  # the low one first
        found = nibbles(torch.tensor([0x21, 0xF3], dtype=torch.uint8).view(shape))
        assert torch.equal(found, torch.tensor([1, 2, 3, 15]).view(*shape[:-1], -1))
    words = torch.tensor([[0x0201], [0x0403]], dtype=torch.int16)
    for given in (words, words.as_strided((2, 1), (1, 7))):  # the stride of a dimension of 1 may be any
        assert as_bytes(given).tolist() == [[1, 2], [3, 4]]
