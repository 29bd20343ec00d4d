"""What foreign codes and scales become."""

from dataclasses import replace

import pytest
import torch

from lowmem import quantize
from lowmem.io.formats.foreign_tensor import (
    ForeignTensor,
    as_bytes,
    encoding_of,
    fitting_blocks,
    nibbles,
    remapped,
)
from lowmem.nn.stored import FourBitForm


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


def test_a_weight_says_of_itself_what_it_reads_when_it_is_asked():
    weight = quantize(torch.randn(2, 3), "q4_0", block_size=8)
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
