"""Moments of rows that come in parts are those of all rows, in float64; layers with one input share them."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from lowmem.transforms.calibration.input_moments import (
    InputMomentCollector,
    RegroupingNeeded,
    RunningMoments,
    unpadded_token_mask_or_none,
)
from tests.rounding import default_dtype, gamma


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(lambda parts: sum(parts) > 1),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 3.0, 300.0]),
    st.integers(0, 1000),
)
@example([3, 2], 4, True, False, 3.0, 0)  # the mean of all is not that of the first part
@example([3, 2], 256, False, False, 0.0, 0)  # columns are multiplied 256 at a time
@example([3, 2], 257, True, False, 3.0, 0)
@example([3, 2], 600, False, False, 0.0, 0)
def test_moments_are_those_of_float64(parts, columns, centred, diagonal, mean, seed):
    rows = torch.randn(sum(parts), columns, generator=torch.Generator().manual_seed(seed)) + mean
    with default_dtype((torch.float32, torch.bfloat16, torch.float64)[seed % 3]):  # none of which changes anything
        moments = RunningMoments(columns, centered=centred, diagonal=diagonal, device=rows.device)
        for part in rows.split(parts):
            moments.add_rows(part)
    assert moments.second_moments_or_covariance().dtype is moments.mean.dtype is torch.float32
    assert moments.rows == len(rows)
    exact = rows.double()
    assert (moments.mean - exact.mean(0)).abs().max() <= gamma(len(rows) + 3) * exact.abs().mean(0).max()
    off = exact - exact.mean(0) if centred else exact
    second = off.T @ off / len(rows)
    # Of centred rows: what is added up lies within the range of the rows, and its difference is rounded like them.
    size = exact.amax(0) - exact.amin(0) if centred else exact.abs().amax(0)
    size = size + 2**-23 * exact.abs().amax(0)
    bound = (
        4 * gamma(len(rows) + 8) * torch.outer(size, size) + 2**-22 * torch.outer(size, exact.abs().amax(0)) * centred
    )
    found = moments.second_moments_or_covariance()
    if diagonal:
        second, bound = second.diagonal(), bound.diagonal()
    assert found.shape == second.shape
    assert ((found - second).abs() <= bound).all()
    assert (found.diagonal() if not diagonal else found).ge(0).all()


@pytest.mark.parametrize(
    ("batch", "counted"),
    [
        (torch.ones(2, 3), None),
        ((torch.ones(2, 3),), None),
        ({"attention_mask": None}, None),
        ({"attention_mask": torch.ones(2, 1, 3, 3)}, None),  # of attention alone: which rows count is not in it
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, [[True, True, False]]),
        ({"attention_mask": torch.tensor([[False, True]])}, [[False, True]]),
    ],
)
def test_the_attention_mask_says_which_rows_count(batch, counted):
    found = unpadded_token_mask_or_none(batch, 0)
    assert found is None if counted is None else found.tolist() == counted


def taken(model, layers, run, mask=None, **options):
    options = {"centred": set(), "alone": set()} | options
    inputs = InputMomentCollector(layers, options.pop("centred"), options.pop("alone"), **options)
    with inputs.collecting_inputs():
        inputs.start_batch(mask)
        run()
    return inputs


def test_layers_with_one_input_share_moments_unless_one_is_centred():
    a, b, c = (nn.Linear(4, 4) for _ in range(3))
    x = torch.randn(9, 4)
    inputs = taken(None, [a, b, c], lambda: (a(x), b(x), c(x)), centred={a, b})
    assert inputs.layer_groups_by_input_or_raise() == [[a, b], [c]]
    assert set(inputs.moments) == {a, c}
    assert not a._forward_pre_hooks


def test_an_input_that_was_written_to_is_another_one_also_by_keyword():
    a, b = (nn.Linear(4, 4) for _ in range(2))
    x = torch.randn(9, 4)
    inputs = taken(None, [a, b], lambda: (a(input=x), b(x.mul_(2))))
    assert inputs.layer_groups_by_input_or_raise() == [[a], [b]]
    assert torch.equal(inputs.moments[b].mean, 2 * inputs.moments[a].mean)


def test_layers_that_part_are_taken_alone():
    a, b = (nn.Linear(4, 4) for _ in range(2))
    x, y = torch.randn(9, 4), torch.randn(9, 4)
    alone = set()
    with pytest.raises(RegroupingNeeded):
        taken(None, [a, b], lambda: (a(x), b(x), a(x), b(y)), alone=alone)
    assert alone == {b}
    inputs = taken(None, [a, b], lambda: (a(x), b(x), a(x), b(y)), alone=alone)
    assert [inputs.moments[layer].rows for layer in (a, b)] == [18, 18]
    with pytest.raises(RegroupingNeeded):  # called once more than the first one
        taken(None, [a, b], lambda: (a(x), b(x), b(x))).layer_groups_by_input_or_raise()


@pytest.mark.parametrize("flat", [False, True])
def test_rows_that_do_not_count_are_left_out_wherever_tokens_are_rows(flat):
    layer = nn.Linear(4, 4)
    x, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    inputs = taken(None, [layer], lambda: layer(x.flatten(0, 1) if flat else x), mask)
    assert inputs.moments[layer].rows == 3
    assert torch.allclose(inputs.moments[layer].mean, x[mask].mean(0))
    pooled = taken(None, [layer], lambda: layer(x[:, 0]), mask)
    assert pooled.moments[layer].rows == 2
