"""The scale of a block: its largest weight, or the candidate that leaves the least error, found in one order."""

from bisect import bisect_left

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.quant.formats import EIGHT_BIT, FORMATS, get_format
from lowmem.quant.scale_search import (
    CANDIDATES,
    block_absmax,
    block_squared_errors,
    expand_block_scales,
    least_error_scales,
    nearest_codes,
)
from tests import strategies

LARGEST = float(torch.finfo(torch.float32).max)


@given(strategies.weights(min_dims=2), strategies.block_sizes, st.booleans())
def test_the_largest_weight_is_one_of_its_block(weight, size, signed):
    rows = weight.reshape(-1, weight.shape[-1]).contiguous()
    found = block_absmax(rows, size, signed)
    for block, column in enumerate(found.unbind(-1)):
        part = rows[:, block * size : (block + 1) * size]
        assert torch.equal(column.abs(), part.abs().amax(-1))
        assert (part.eq(column[:, None]).any(-1) if signed else column >= 0).all()


def test_of_two_largest_weights_the_positive_one_counts():
    assert block_absmax(torch.tensor([[-2.0, 2.0, 0.0]]), 8, True).item() == 2


@given(strategies.weights(min_dims=2), strategies.formats, strategies.block_sizes, st.booleans())
def test_the_search_takes_the_best_of_its_candidates(weight, format, size, weighted):
    rows = weight.reshape(-1, weight.shape[-1]).contiguous()
    form = get_format(format)
    importance = torch.arange(rows.shape[-1]) % 3 * 1.0 if weighted else None
    found = least_error_scales(rows, form, size, LARGEST, importance)
    least = block_squared_errors(rows, found, form, size, importance)
    top = block_absmax(rows, size, form.signed)
    for factor in CANDIDATES:
        for sign in (1, -1) if form.signed else (1,):
            error = block_squared_errors(
                rows, (top * (sign * factor)).clamp(-LARGEST, LARGEST), form, size, importance
            )
            assert not (error < least).any()
    assert (found.abs() >= top.abs() * min(CANDIDATES) * (1 - 2**-22)).all()
    assert form.signed or (found >= 0).all()


@given(strategies.weights(min_dims=2), strategies.formats, strategies.block_sizes)
def test_block_errors_are_the_squared_differences(weight, format, size):
    rows = weight.reshape(-1, weight.shape[-1]).contiguous()
    rows = rows / rows.abs().max().clamp_min(1e-30)
    form = get_format(format)
    scales = block_absmax(rows, size, form.signed)
    levels = torch.tensor(form.levels)
    codes = nearest_codes(rows, scales, form, size)[:, : rows.shape[-1]].int()
    error = (rows - levels[codes] * expand_block_scales(scales, size, rows.shape[-1])).double().square()
    got = block_squared_errors(rows, scales, form, size, None)
    for block, column in enumerate(got.unbind(-1)):
        torch.testing.assert_close(
            column.double(), error[:, block * size : (block + 1) * size].sum(-1), rtol=1e-4, atol=1e-30
        )


@pytest.mark.parametrize("format", sorted({**FORMATS, **EIGHT_BIT}))
def test_a_code_is_the_number_of_thresholds_below_the_value(format):
    """Of the thresholds in float32: at each, beside it, and beyond them all."""
    form = get_format(format)
    boundaries = torch.tensor(form.boundaries)
    thresholds = boundaries[boundaries.isfinite()]
    beside = [torch.nextafter(thresholds, torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    values = torch.cat([thresholds, *beside, torch.tensor([-LARGEST, -1.0, -0.0, 0.0, 1.0, LARGEST])])[None]
    codes = nearest_codes(values, torch.ones(1, 1), form, values.shape[1])[0, : values.shape[1]]
    below = torch.tensor([bisect_left(boundaries.tolist(), value) for value in values[0].tolist()])
    assert torch.equal(codes.long(), below)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_where_nothing_is_better_the_largest_magnitude_stays(format):
    """Zeros, and weights whose squares are too small or too large for float32, leave no error to compare."""
    for value in (0.0, 1e-30, 3e38):
        rows = torch.full((2, 16), value)
        assert torch.equal(least_error_scales(rows, FORMATS[format], 8, LARGEST), torch.full((2, 2), value))


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_no_scale_is_above_the_largest_that_can_be_stored(format):
    """Of weights that 17/16 of the largest scale would hold exactly, which no encoding could then store."""
    largest = float(torch.finfo(torch.float16).max)
    levels = torch.tensor(FORMATS[format].levels)
    rows = (levels[levels.abs() < 1].repeat(4) * (largest * 17 / 16))[None]
    rows[0, 0] = largest
    assert (least_error_scales(rows, FORMATS[format], 64, LARGEST) > largest).any()
    assert (least_error_scales(rows, FORMATS[format], 64, largest) <= largest).all()


def test_candidates_lie_a_sixteenth_apart_those_nearest_to_the_largest_first():
    assert sorted(CANDIDATES) == [n / 16 for n in range(12, 21)]
    distances = [abs(factor - 1) for factor in CANDIDATES]
    assert distances == sorted(distances)


def test_importance_multiplies_the_squared_error():
    rows, form = torch.tensor([[0.3, -0.7, 1.0, 0.45]]), FORMATS["nf4"]
    importance, scale = torch.tensor([4.0, 0.0, 1.0, 9.0]), torch.tensor([[0.9]])
    codes = nearest_codes(rows, scale, form, 4).long()
    errors = (rows - torch.tensor(form.levels)[codes] * 0.9).double() ** 2
    found = block_squared_errors(rows, scale, form, 4, importance)
    torch.testing.assert_close(found.double(), (errors * importance).sum(-1, keepdim=True), rtol=1e-5, atol=0)
