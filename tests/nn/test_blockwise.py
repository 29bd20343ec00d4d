"""What the techniques with codes share: what they store has the layout that they promise, and dtypes are checked."""

import pytest
import torch
from hypothesis import given

from lowmem.nn.blockwise import check_compute_dtype
from lowmem.nn.eightbit import blockwise
from tests import strategies


@given(strategies.weights(), strategies.formats, strategies.small_blocks, strategies.encodings)
def test_the_skeleton_has_the_layout_of_what_is_stored(weight, format, block_size, scales):
    technique = blockwise(format, block_size, scales)
    stored, skeleton = technique.store(weight), technique.skeleton(weight)
    assert skeleton.stored_layout == stored.stored_layout
    assert skeleton.packed.is_meta
    assert skeleton.scales.is_meta
    assert skeleton.method == stored.method
    assert not stored.packed.requires_grad
    assert not stored.scales.requires_grad


def test_a_compute_dtype_is_floating_point_or_int8():
    for dtype in (None, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        check_compute_dtype(dtype)
    for dtype in (torch.int32, torch.complex64, torch.float8_e4m3fn, "float32"):
        with pytest.raises(ValueError, match=r"compute_dtype=.* must be a floating-point"):
            check_compute_dtype(dtype)
