"""What foreign codes and scales become."""

import pytest
import torch

from lowmem.io.foreign.tensor import (
    E2M1_CODES,
    encoding_of,
    fitting_blocks,
    integer_weight,
    nibbles,
    power_scales,
    remapped,
)
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


def test_scales_are_stored_in_the_smallest_encoding_that_holds_them():
    assert encoding_of(torch.tensor([0.5, -65504.0, 2.0**-24, -0.0])) == "float16"
    for value in (65505.0, 2.0**-25, 1 + 2.0**-11):
        assert encoding_of(torch.tensor([1.0, value])) == "float32"


def test_blocks_divide_groups_and_are_the_largest_that_may_be():
    for group, columns, size in (
        (128, 4096, 128),
        (8192, 8192, 4096),
        (9000, 9000, 3000),
        (24, 50, 24),
        (64, 40, 40),
    ):
        assert fitting_blocks(group, columns) == size
    for group in (1, 6, 9, 15, 8191):
        with pytest.raises(ValueError, match="no blocks of an even number"):
            fitting_blocks(group, 10**6)


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
        assert torch.equal(weight.dequantize(), (codes.int() - 8).float() * wide)


def test_nibbles_of_bytes():
    packed = torch.arange(256, dtype=torch.uint8)
    codes = tuple(range(15, -1, -1))
    assert torch.equal(nibbles(remapped(packed, codes)), 15 - nibbles(packed))
    for shape in ((2,), (1, 2), (2, 1)):  # the low one first
        found = nibbles(torch.tensor([0x21, 0xF3], dtype=torch.uint8).view(shape))
        assert torch.equal(found, torch.tensor([1, 2, 3, 15]).view(*shape[:-1], -1))
