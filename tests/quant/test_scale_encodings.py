"""A stored scale holds its block's absmax up to a shortfall that is known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.quant.scale_encodings import ENCODINGS, OFFSETS, get_scale_encoding
from tests import strategies

magnitudes = st.lists(
    st.one_of(st.just(0.0), st.floats(2.0**-149, 65504.0, width=32), st.floats(2.0**-26, 2.0**-12, width=32)),
    min_size=1,
    max_size=9,
)


@given(magnitudes, strategies.encodings)
def test_absmax_never_exceeds_the_scale_by_more_than_the_shortfall(values, name):
    encoding = ENCODINGS[name]
    absmax = torch.tensor([values])
    stored = encoding.encode(absmax)
    assert stored.dtype == encoding.dtype
    assert stored.shape[-1] == absmax.shape[-1] + encoding.extra_per_row
    scales = encoding.decode(stored)
    assert scales.shape == absmax.shape
    rounding = absmax.double() * 2**-23
    assert (absmax.double() - scales.double() <= encoding.encoding_loss_bound(stored).double() + rounding).all()
    assert (scales[absmax == 0] == 0).all()


@given(magnitudes, strategies.encodings, st.randoms())
def test_a_signed_scale_keeps_its_sign_and_falls_as_short(values, name, random):
    encoding = get_scale_encoding(name, signed=True)
    assert encoding.signed
    scales = torch.tensor([[value * random.choice([1, -1]) for value in values]])
    stored = encoding.encode(scales)
    assert (stored.dtype, stored.shape[-1]) == (encoding.dtype, scales.shape[-1] + encoding.extra_per_row)
    decoded = encoding.decode(stored)
    below_one_step = scales.abs() < decoded  # which is stored without a sign
    assert ((decoded * scales >= 0) | below_one_step).all()
    rounding = scales.double().abs() * 2**-23
    excess = scales.double().abs() - decoded.double().abs() - encoding.encoding_loss_bound(stored).double()
    assert (excess <= rounding).all()
    assert torch.equal(encoding.decode(encoding.encode(decoded)), decoded)


@given(magnitudes)
def test_float16_scales_round_towards_zero(values):
    absmax = torch.tensor([values])
    scales = ENCODINGS["float16"].decode(ENCODINGS["float16"].encode(absmax))
    assert (scales <= absmax).all()
    again = ENCODINGS["float16"].encode(scales)
    assert torch.equal(ENCODINGS["float16"].decode(again), scales)


@given(magnitudes)
def test_offsets_are_rounded_down_whatever_their_sign(values):
    """To the largest number that can be stored and is not above: else a weight would be below its block's offset."""
    offsets = torch.tensor([values + [-value for value in values]])
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).float()
    halves = halves[halves.isfinite()].unique()
    below = OFFSETS["float16_offsets"].round_offsets_down(offsets)
    assert torch.equal(below, halves[torch.searchsorted(halves, offsets, right=True) - 1])
    stored = OFFSETS["float16_offsets"].concatenate_scales_and_offsets(torch.ones_like(below).half(), below)
    assert torch.equal(OFFSETS["float16_offsets"].decode_offsets(stored), below)
    assert torch.equal(OFFSETS["float16_offsets"].decode(stored), torch.ones_like(below))
    assert torch.equal(OFFSETS["float32_offsets"].round_offsets_down(offsets), offsets)


@given(magnitudes)
def test_double_scales_round_down_but_never_to_zero(values):
    absmax = torch.tensor([values])
    scales = ENCODINGS["double"].decode(ENCODINGS["double"].encode(absmax))
    row_scale = scales.max()
    above = scales > absmax * (1 + 2**-19)
    assert torch.equal(above, above & (scales == row_scale / 255))  # one step is the least
    assert (scales[absmax > 0] > 0).all() or absmax.max() < 2**-24
    assert torch.equal(ENCODINGS["double"].encode(scales), ENCODINGS["double"].encode(absmax))


@pytest.mark.parametrize("name", sorted(ENCODINGS))
def test_the_largest_magnitude_is_held(name):
    largest = torch.tensor([[ENCODINGS[name].largest]])
    assert torch.equal(ENCODINGS[name].decode(ENCODINGS[name].encode(largest)), largest)


def test_an_outlier_does_not_erase_the_other_blocks_of_its_row():
    scales = ENCODINGS["double"].decode(ENCODINGS["double"].encode(torch.tensor([[1000.0, 0.001]])))
    assert scales[0, 1] > 0


@pytest.mark.parametrize("name", ["fp8", "", None, 16])
def test_an_unknown_encoding_lists_the_choices(name):
    with pytest.raises(ValueError, match="choose from float32, float16, double"):
        get_scale_encoding(name)


def test_what_is_decoded_is_encoded_to_the_same_bytes():
    """Every number of steps, in rows whose largest scale has any mantissa of float16."""
    largest = (1 + torch.arange(0, 1024, 7) / 1024)[:, None]  # (rows, 1)
    scales = torch.arange(256) / 255 * largest  # (rows, 256)
    for encoding in ENCODINGS.values():
        stored = encoding.encode(scales)
        assert torch.equal(encoding.encode(encoding.decode(stored)), stored)


def test_a_subnormal_float32_scale_is_stored_as_zero():
    """Some processors take it for zero, and others do not."""
    tiny = torch.finfo(torch.float32).smallest_normal
    stored = get_scale_encoding("float32", False).encode(torch.tensor([[tiny / 2, tiny, 2.0**-149]]))
    assert stored.tolist() == [[0.0, tiny, 0.0]]
