"""A file's record of a layer or an adapter says all that is needed to make it again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowmem import FourBit, Half, LoRA
from lowmem.lora import Adapter
from lowmem.records import adapter_record, lora_of, technique_of, technique_record
from tests import strategies


@given(
    strategies.formats,
    strategies.block_sizes,
    strategies.encodings,
    st.sampled_from([None, torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from(["absmax", "search", "calibrated"]),
)
def test_a_4_bit_record_comes_back(format, block_size, scales, dtype, method):
    technique = FourBit(format, block_size, scales, dtype)
    assert technique_of(technique_record(technique, method)) == (technique, method)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_record_comes_back(dtype):
    assert technique_of(technique_record(Half(dtype))) == (Half(dtype), None)


@given(st.integers(1, 9), st.none() | st.floats(0.5, 64), st.floats(0, 0.9))
def test_an_adapter_s_record_comes_back(rank, alpha, dropout):
    technique = LoRA(rank, alpha, dropout)
    assert lora_of(adapter_record(Adapter(nn.Linear(2, 2), technique))) == technique


def test_an_unknown_technique_is_named():
    with pytest.raises(ValueError, match="'Magic' is unknown"):
        technique_of({"technique": "Magic"})
