"""The technique Budget: what it holds, refuses, and chooses among."""

import math

import pytest
import torch

from lowmem import Budget, EightBit, FourBit, quantize
from lowmem.nn.budget import CHOICES, NORMAL_ERRORS
from lowmem.quant.quantize import relative_error


def test_the_choices_are_ordered_by_bytes_and_each_loses_less_of_a_normal_matrix():
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    stored = [one.store(weight) for one in CHOICES]
    bits = [one.bits_per_weight for one in stored]
    assert [round(one, 3) for one in bits] == [4.129, 4.254, 4.504, 8.129]
    errors = [relative_error(weight, one) for one in stored]
    assert errors == sorted(errors, reverse=True)
    assert all(abs(found / told - 1) < 0.005 for found, told in zip(errors, NORMAL_ERRORS, strict=True))
    same = quantize(weight, "bof4s", block_size=32, scales="double")
    assert torch.equal(stored[1].packed, same.packed)


def test_a_budget_is_a_value_and_its_inputs_are_no_part_of_it():
    assert Budget(4.4) == Budget(4.4, inputs=[torch.ones(2)]) != Budget(4.5)
    assert len({Budget(4.4), Budget(4.4, inputs=[torch.ones(2)])}) == 1
    assert repr(Budget(4.4, [torch.ones(2)])) == "Budget(bits=4.4, compute_dtype=None)"
    assert {type(one) for one in Budget(5).choices} == {FourBit, EightBit}
    assert all(one.compute_dtype is torch.int8 for one in Budget(5, compute_dtype=torch.int8).choices)


def test_what_is_no_budget_is_refused():
    for wrong in (0, -4.4, math.nan, math.inf, True, "4.4", None):
        with pytest.raises(ValueError, match=r"bits=.* must be a number of bits a weight, as 4\.4"):
            Budget(wrong)
    for wrong in (torch.ones(2), {"x": torch.ones(2)}, "text", 3):
        with pytest.raises(TypeError, match=r"inputs is a .*; pass a list of batches, if only of one: \[batch\]"):
            Budget(4.4, inputs=wrong)
    with pytest.raises(ValueError, match="compute_dtype"):
        Budget(4.4, compute_dtype=torch.int32)
