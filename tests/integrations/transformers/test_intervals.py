"""The bootstrap's interval is that of the definition, and holds the mean as often as it says."""

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from lowmem.integrations.transformers.intervals import interval


def test_it_holds_the_mean_of_the_source_nineteen_times_in_twenty():
    """Of 400 texts of 30 parts 380 are expected, or some fewer since parts are few: 340 are five deviations below."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        counts = torch.randint(50, 100, (30,), generator=generator)
        sums = counts * (1 + torch.randn(30, generator=generator))
        low, high = interval(sums, counts)
        held += low <= 1 <= high
    assert 340 <= held <= 392


def test_a_function_of_the_mean_moves_its_ends_and_one_part_has_no_interval():
    sums, counts = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 1.0, 2.0])
    low, high = interval(sums, counts)
    assert (low, high) == (1.0, 2.0)  # the least and the largest mean of a part
    assert interval(sums, counts, torch.exp) == pytest.approx((torch.tensor([low, high]).double().exp()).tolist())
    assert interval(sums, counts) == (low, high)
    assert interval(sums[:1], counts[:1]) is None
