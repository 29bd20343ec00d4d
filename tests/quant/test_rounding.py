"""Rounding to 16 bits is torch's, once, and what does not fit is refused by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.quant.rounding import round_to
from tests.selection import rows_in_one_case

DTYPES = [torch.float16, torch.bfloat16]


@given(st.sampled_from(DTYPES), st.lists(st.floats(-6e4, 6e4), min_size=1, max_size=20))
def test_it_is_the_nearest_value_of_the_dtype_in_memory_of_its_own(dtype, values):
    weight = torch.tensor([values], dtype=torch.float32)
    rounded = round_to(weight, dtype, "weight")
    assert torch.equal(rounded, weight.to(dtype))
    assert rounded.is_contiguous()
    again = round_to(rounded, dtype, "weight")
    assert torch.equal(again, rounded)
    assert again.data_ptr() != rounded.data_ptr()


@rows_in_one_case("dtype", DTYPES)
@rows_in_one_case("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(dtype, value):
    with pytest.raises(ValueError, match="gate holds 1 values that are NaN or infinite; repair them first"):
        round_to(torch.tensor([[value, 1.0]]), dtype, "gate")


def test_a_magnitude_that_float16_does_not_hold_is_named_with_the_remedy():
    weight = torch.tensor([[65536.0]])
    with pytest.raises(ValueError, match=r"up holds the magnitude 65536, above 65504.*Half\(torch.bfloat16\)"):
        round_to(weight, torch.float16, "up")
    assert round_to(weight, torch.bfloat16, "up") == 65536
